-- Photos that lie at a service under a link: what calls are given, and what their keeper deletes.

-- name: find
-- The newest link of photo $1 that is not older than $2 seconds; a call is about to use it.
UPDATE jobdaemon.photo_links SET given = given + 1
WHERE is_current AND id = (
    SELECT l.id FROM jobdaemon.photo_links l
    WHERE l.photo = $1 AND l.is_current AND l.made_at > clock_timestamp() - make_interval(secs => $2)
    ORDER BY l.id DESC LIMIT 1)
RETURNING link;

-- name: note
-- The photo $2 of order $1 lies under the link $3.
INSERT INTO jobdaemon.photo_links (order_id, photo, link) VALUES ($1, $2, $3);

-- name: forget
-- No call is given the links of photo $1 any more; says how often each was given.
UPDATE jobdaemon.photo_links SET is_current = false WHERE photo = $1 AND is_current RETURNING given;

-- name: begin
-- Up to $1 links that no open order has, of at most $2 tries: ours to delete until the next try, $3 seconds times four to each try, $4 at most.
UPDATE jobdaemon.photo_links
SET is_current = false, tries = tries + 1, try_at = clock_timestamp() + make_interval(secs => least($4, $3 * 4.0 ^ least(tries, 20)))
WHERE id IN (
    SELECT l.id FROM jobdaemon.photo_links l
    WHERE l.tries < $2 AND l.try_at <= clock_timestamp() AND NOT EXISTS (
        -- the service may give the same bytes the same link
        SELECT FROM jobdaemon.photo_links other JOIN jobdaemon.orders o ON o.id = other.order_id
        WHERE other.link = l.link AND o.finished_at IS NULL)
    ORDER BY l.id LIMIT $1 FOR UPDATE OF l SKIP LOCKED)
RETURNING id, order_id, link, tries;

-- name: end
-- The link $1 gives nothing any more, whoever has it.
DELETE FROM jobdaemon.photo_links WHERE link = $1;

-- name: failed
-- Why the link of row $1 could not be deleted.
UPDATE jobdaemon.photo_links SET error = $2 WHERE id = $1;
