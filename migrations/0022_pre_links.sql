-- Customers' photos that lie at a service under links which anybody can fetch (Superbed): each is deleted there once its order has
-- ended, by any daemon that has the service's token.

CREATE TABLE photo_links (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- no foreign key: the photo has to go even when the order's row is gone
    order_id bigint NOT NULL,
    -- the artifact that was uploaded, by its key
    photo text COLLATE "C" NOT NULL,
    link text COLLATE "C" NOT NULL,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- to how many calls
    given integer NOT NULL DEFAULT 1,
    -- false: not given any more, since it did not work, or is being deleted
    is_current boolean NOT NULL DEFAULT true,
    -- to delete it
    tries integer NOT NULL DEFAULT 0,
    try_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    error text
);
COMMENT ON TABLE photo_links IS 'Photos that lie at Superbed until their order has ended; see docs/providers.md.';
CREATE INDEX photo_links_photo_idx ON photo_links (photo) WHERE is_current;
CREATE INDEX photo_links_link_idx ON photo_links (link);
