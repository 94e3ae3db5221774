-- The cache: images that were bought once are copied for whoever asks for the same again, and who is having one made makes the
-- others wait. Without [cache] in the settings these tables stay empty and nobody looks at them.

-- One row per image that is kept, or that an order is having made. In the order in which a row grows:
--   claimed    order_id has image "index" made until claimed_until; the row counts only for as long as that image is on its way
--   stored     that image is stored: what the cache gives lies under the order's own key
--   kept       a copy of its own lies under artifact (copied_at is set)
--   dropped    gives nothing any more; the copy is deleted from the store, then the row
CREATE TABLE cache (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- what was asked for: see jobdaemon/domain/cache.py
    key text COLLATE "C" NOT NULL CHECK (key ~ '^[0-9a-f]{64}$'),
    provider text NOT NULL,
    -- No reference: what is kept outlives the order.
    order_id bigint NOT NULL,
    index integer NOT NULL,
    claimed_at timestamptz NOT NULL,
    claimed_until timestamptz NOT NULL,
    -- the copy; set when copying begins, so that a copy is never without a row
    artifact text,
    sha256 text,
    bytes bigint,
    media_type text,
    -- when the image was made: its age counts from here
    made_at timestamptz,
    copying_until timestamptz,
    copied_at timestamptz,
    last_hit_at timestamptz,
    hits integer NOT NULL DEFAULT 0,
    dropped_at timestamptz
);
COMMENT ON TABLE cache IS 'Images that may be given again, and those that are being made; see docs/providers.md.';
CREATE UNIQUE INDEX cache_key_idx ON cache (key) WHERE dropped_at IS NULL;
CREATE INDEX cache_order_idx ON cache (order_id) WHERE dropped_at IS NULL;
CREATE INDEX cache_made_idx ON cache (made_at) WHERE dropped_at IS NULL;
-- what is claimed or stored and waits for its copy: few
CREATE INDEX cache_uncopied_idx ON cache (id) WHERE copied_at IS NULL AND dropped_at IS NULL;
CREATE INDEX cache_dropped_idx ON cache (dropped_at) WHERE dropped_at IS NOT NULL;

-- Images that the cache gave, and images that it did not have, by provider and hour.
CREATE TABLE cache_counts (
    provider text NOT NULL,
    hour timestamptz NOT NULL,
    hits bigint NOT NULL DEFAULT 0,
    misses bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (provider, hour)
);

CREATE FUNCTION count_cache(p_provider text, p_hits bigint, p_misses bigint) RETURNS void
LANGUAGE sql SET search_path = jobdaemon, pg_temp
AS $$
    INSERT INTO cache_counts AS c (provider, hour, hits, misses)
    SELECT p_provider, date_trunc('hour', now(), 'UTC'), p_hits, p_misses WHERE p_hits <> 0 OR p_misses <> 0
    ON CONFLICT (provider, hour) DO UPDATE SET hits = c.hits + excluded.hits, misses = c.misses + excluded.misses
$$;

-- Whether the order that claimed this row has stored its image: made by this provider, under this claim.
CREATE FUNCTION has_stored(p_entry cache, p_image images) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(p_image.status = 'stored' AND p_image.provider = p_entry.provider AND p_image.object_key IS NOT NULL
        AND p_image.generated_at BETWEEN p_entry.claimed_at AND p_entry.claimed_until, false)
$$;

-- What there is for images p_images of an order, whose keys are p_keys, in the same order; each image once:
--   hit      artifact holds it, if its digest is sha256
--   claimed  this order is to have it made, within p_hold_s seconds; nobody else does until then
--   busy     another order is having it made, or it cannot be told; ask again in wait_s seconds. Then nothing is claimed.
-- What was made longer than p_ttl_s seconds ago is nothing. p_alias: the provider key under which the job runs, if any; the images
-- that it does not buy go back to that key's daily budget where it buys none at all.
CREATE FUNCTION take_from_cache(p_provider text, p_alias text, p_order bigint, p_images integer[], p_keys text[],
    p_hold_s double precision, p_ttl_s double precision)
RETURNS TABLE (image integer, state text, id bigint, artifact text, sha256 text, media_type text, wait_s double precision)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_until timestamptz := v_now + p_hold_s * interval '1 second';
    v_oldest timestamptz := v_now - p_ttl_s * interval '1 second';
    v_new bigint[];
    v_locked bigint[];
    v_free bigint[] := '{}';
    v_free_images integer[] := '{}';
    v_over bigint[] := '{}';
    v_over_images integer[] := '{}';
    v_over_keys text[] := '{}';
    v_hits bigint[] := '{}';
    v_told integer[] := '{}';
    v_misses integer := 0;
    v_is_busy boolean := false;
    v_unbought integer;
    v_found record;
BEGIN
    -- This order has asked under other settings before: what it gets now is not what was asked for then.
    DELETE FROM cache c WHERE c.order_id = p_order AND c.index = ANY (p_images) AND c.key <> ALL (p_keys)
        AND c.artifact IS NULL AND c.dropped_at IS NULL;
    WITH new AS (
        INSERT INTO cache (key, provider, order_id, index, claimed_at, claimed_until)
        SELECT w.key, p_provider, p_order, w.image, v_now, v_until
        FROM unnest(p_keys, p_images) AS w (key, image) ORDER BY w.key
        ON CONFLICT (key) WHERE dropped_at IS NULL DO NOTHING
        RETURNING cache.id
    )
    SELECT coalesce(array_agg(n.id), '{}') INTO v_new FROM new n;
    -- Locked first and read afterwards: a row that we waited for is another one now, and so is its image.
    v_locked := ARRAY(SELECT c.id FROM cache c WHERE c.key = ANY (p_keys) AND c.dropped_at IS NULL ORDER BY c.key FOR UPDATE);
    FOR v_found IN
        SELECT w.image, c.id, c.key, c.claimed_at,
            CASE WHEN c.copied_at IS NOT NULL THEN c.artifact ELSE i.object_key END AS artifact,
            CASE WHEN c.copied_at IS NOT NULL THEN c.sha256 ELSE i.sha256 END AS sha256,
            CASE WHEN c.copied_at IS NOT NULL THEN c.media_type ELSE i.media_type END AS media_type,
            CASE
                WHEN c.copied_at IS NOT NULL THEN CASE WHEN c.made_at > v_oldest THEN 'hit' ELSE 'over' END
                WHEN c.order_id = p_order AND c.index = w.image THEN CASE WHEN c.id = ANY (v_new) THEN 'new' ELSE 'own' END
                WHEN has_stored(c, i) THEN CASE WHEN i.stored_at > v_oldest THEN 'hit' ELSE 'over' END
                WHEN i.status IN ('pending', 'generated') AND c.claimed_until > v_now THEN 'busy'
                WHEN c.artifact IS NOT NULL THEN 'over'
                ELSE 'free'
            END AS state
        FROM unnest(p_keys, p_images) AS w (key, image)
        JOIN cache c ON c.key = w.key AND c.id = ANY (v_locked)
        LEFT JOIN images i ON i.order_id = c.order_id AND i.index = c.index
    LOOP
        CASE v_found.state
            WHEN 'hit' THEN
                v_hits := v_hits || v_found.id;
                v_told := v_told || v_found.image;
                image := v_found.image; state := 'hit'; id := v_found.id; artifact := v_found.artifact;
                sha256 := v_found.sha256; media_type := v_found.media_type; wait_s := NULL;
                RETURN NEXT;
            WHEN 'busy' THEN
                v_is_busy := true;
                v_told := v_told || v_found.image;
                image := v_found.image; state := 'busy'; id := NULL; artifact := NULL; sha256 := NULL; media_type := NULL;
                -- The longer it has taken, the longer it may take: a few looks, whatever the provider's pace.
                wait_s := least(greatest(extract(epoch FROM v_now - v_found.claimed_at) / 2, 1), 15);
                RETURN NEXT;
            WHEN 'over' THEN
                v_over := v_over || v_found.id;
                v_over_images := v_over_images || v_found.image;
                v_over_keys := v_over_keys || v_found.key;
            ELSE
                v_free := v_free || v_found.id;
                v_free_images := v_free_images || v_found.image;
                v_misses := v_misses + (v_found.state <> 'own')::integer;
        END CASE;
    END LOOP;
    -- One that somebody dropped while we waited for it.
    v_is_busy := v_is_busy OR cardinality(v_told || v_over_images || v_free_images) < cardinality(p_images);
    IF v_is_busy THEN
        DELETE FROM cache c WHERE c.id = ANY (v_new);
        v_misses := 0;
    ELSE
        UPDATE cache c SET dropped_at = v_now WHERE c.id = ANY (v_over);
        INSERT INTO cache (key, provider, order_id, index, claimed_at, claimed_until)
            SELECT w.key, p_provider, p_order, w.image, v_now, v_until FROM unnest(v_over_keys, v_over_images) AS w (key, image);
        UPDATE cache c SET order_id = p_order, index = w.image, claimed_at = v_now, claimed_until = v_until
            FROM unnest(v_free, v_free_images) AS w (id, image) WHERE c.id = w.id;
        v_misses := v_misses + cardinality(v_over);
    END IF;
    RETURN QUERY SELECT m.image, CASE WHEN v_is_busy THEN 'busy' ELSE 'claimed' END, NULL::bigint, NULL::text, NULL::text,
            NULL::text, CASE WHEN v_is_busy THEN 0::double precision END
        FROM unnest(p_images) AS m (image) WHERE m.image <> ALL (v_told);
    UPDATE cache c SET hits = c.hits + 1, last_hit_at = v_now WHERE c.id = ANY (v_hits);
    PERFORM count_cache(p_provider, cardinality(v_hits), v_misses);
    IF p_alias IS NOT NULL AND (v_is_busy OR cardinality(v_hits) = cardinality(p_images)) THEN
        -- What the claim took for the whole job. Under the claim's own lock: no claim passes the key by because we hold its row.
        v_unbought := coalesce((SELECT job_images(j.args) FROM procrastinate_jobs j
            WHERE j.task_name LIKE 'jobdaemon.%' AND j.status = 'doing' AND (j.args ->> 'order_id')::bigint = p_order
                AND j.args -> 'images' @> to_jsonb(p_images) LIMIT 1), cardinality(p_images));
        PERFORM pg_advisory_xact_lock(1784835684, q.id) FROM queues q WHERE q.name = 'generate.' || p_provider;
        UPDATE provider_keys k SET spent = greatest(k.spent - v_unbought, 0)
            WHERE k.provider = p_provider AND k.alias = p_alias AND k.spent_on = (clock_timestamp() AT TIME ZONE 'UTC')::date;
    END IF;
END;
$$;

-- This order does not have these images made after all.
CREATE FUNCTION release_from_cache(p_order bigint, p_images integer[]) RETURNS void
LANGUAGE sql SET search_path = jobdaemon, pg_temp
AS $$
    DELETE FROM cache WHERE id IN (
        SELECT c.id FROM cache c
        WHERE c.order_id = p_order AND c.index = ANY (p_images) AND c.artifact IS NULL AND c.dropped_at IS NULL
        ORDER BY c.key FOR UPDATE)
$$;

-- A hit whose artifact was missing or damaged: it was none.
CREATE FUNCTION forget_from_cache(p_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_provider text;
BEGIN
    UPDATE cache c SET dropped_at = clock_timestamp() WHERE c.id = p_id AND c.dropped_at IS NULL RETURNING c.provider INTO v_provider;
    IF FOUND THEN
        PERFORM count_cache(v_provider, -1, 0);
    END IF;
END;
$$;

-- Stored images that have no copy yet: this caller copies them within p_seconds.
CREATE FUNCTION begin_cache_copies(p_limit integer, p_seconds double precision)
RETURNS TABLE (id bigint, source text, artifact text, sha256 text, media_type text)
LANGUAGE sql SET search_path = jobdaemon, pg_temp
AS $$
    UPDATE cache c
    SET artifact = coalesce(c.artifact, format('cache/%s/%s-%s%s', left(c.key, 2), c.key, c.id,
            substring(d.object_key FROM '\.[a-z]+$'))),
        sha256 = d.sha256, bytes = d.bytes, media_type = d.media_type, made_at = d.stored_at,
        last_hit_at = coalesce(c.last_hit_at, d.stored_at), copying_until = now() + p_seconds * interval '1 second'
    FROM (
        SELECT c.id, i.object_key, i.sha256, i.bytes, i.media_type, i.stored_at
        FROM cache c JOIN images i ON i.order_id = c.order_id AND i.index = c.index
        WHERE c.copied_at IS NULL AND c.dropped_at IS NULL AND coalesce(c.copying_until, '-infinity') < now() AND has_stored(c, i)
        ORDER BY c.id LIMIT p_limit FOR UPDATE OF c SKIP LOCKED
    ) AS d
    WHERE c.id = d.id
    RETURNING c.id, d.object_key, c.artifact, c.sha256, c.media_type
$$;

-- Gives up what is too old, then what was not asked for the longest while more than p_max_bytes are kept, p_limit rows each at
-- most; and claims that came to nothing. Returns how many rows.
CREATE FUNCTION trim_cache(p_ttl_s double precision, p_max_bytes bigint, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_excess bigint;
    v_old integer;
    v_surplus integer := 0;
BEGIN
    UPDATE cache SET dropped_at = clock_timestamp() WHERE id IN (
        SELECT c.id FROM cache c
        WHERE c.dropped_at IS NULL AND c.made_at <= now() - p_ttl_s * interval '1 second'
        ORDER BY c.made_at LIMIT p_limit FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS v_old = ROW_COUNT;
    -- Two that count at once would both give up the surplus.
    IF pg_try_advisory_xact_lock(1784835685, 17) THEN
        SELECT sum(c.bytes) - p_max_bytes INTO v_excess FROM cache c WHERE c.dropped_at IS NULL;
        IF v_excess > 0 THEN
            UPDATE cache SET dropped_at = clock_timestamp() WHERE id IN (
                SELECT e.id FROM cache e WHERE e.dropped_at IS NULL AND e.id IN (
                    SELECT s.id FROM (
                        SELECT c.id, sum(c.bytes) OVER (ORDER BY c.last_hit_at, c.id) - c.bytes AS before
                        FROM cache c WHERE c.dropped_at IS NULL AND c.bytes IS NOT NULL
                        ORDER BY c.last_hit_at, c.id LIMIT p_limit
                    ) AS s WHERE s.before < v_excess)
                FOR UPDATE SKIP LOCKED);
            GET DIAGNOSTICS v_surplus = ROW_COUNT;
        END IF;
    END IF;
    -- What is stored may wait for its copy, if the store was away; an hour later it is the next order's to have made.
    DELETE FROM cache WHERE id IN (
        SELECT c.id FROM cache c
        WHERE c.copied_at IS NULL AND c.dropped_at IS NULL AND c.artifact IS NULL AND c.claimed_until < now() - interval '1 hour'
        LIMIT p_limit FOR UPDATE SKIP LOCKED);
    DELETE FROM cache_counts WHERE hour < now() - interval '30 days';
    RETURN v_old + v_surplus;
END;
$$;

-- Gives up what the cache keeps: of one provider, of one order (what was made for it), or all. Returns how many images. The copies
-- are deleted by the daemons, within a minute.
CREATE FUNCTION clear_cache(provider text DEFAULT NULL, order_id bigint DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_count bigint;
BEGIN
    WITH dropped AS (
        UPDATE cache c SET dropped_at = clock_timestamp() WHERE c.id IN (
            SELECT e.id FROM cache e
            WHERE e.dropped_at IS NULL AND (clear_cache.provider IS NULL OR e.provider = clear_cache.provider)
                AND (clear_cache.order_id IS NULL OR e.order_id = clear_cache.order_id)
            ORDER BY e.key FOR UPDATE)
        RETURNING c.artifact)
    SELECT count(*) FILTER (WHERE d.artifact IS NOT NULL) INTO v_count FROM dropped d;
    RETURN v_count;
END;
$$;

-- Images that are kept now, and what was asked for in the last 24 hours.
CREATE VIEW cache_stats AS
SELECT provider, coalesce(k.entries, 0) AS entries, coalesce(k.bytes, 0) AS bytes, coalesce(n.hits, 0) AS hits,
    coalesce(n.misses, 0) AS misses, round(n.hits::numeric / nullif(n.hits + n.misses, 0), 4)::double precision AS hit_rate
FROM (SELECT c.provider, count(*) AS entries, sum(c.bytes)::bigint AS bytes
    FROM cache c WHERE c.copied_at IS NOT NULL AND c.dropped_at IS NULL GROUP BY c.provider) AS k
FULL JOIN (SELECT c.provider, sum(c.hits)::bigint AS hits, sum(c.misses)::bigint AS misses
    FROM cache_counts c WHERE c.hour > now() - interval '24 hours' GROUP BY c.provider) AS n USING (provider);
