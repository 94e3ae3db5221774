-- Prewarmed photos: what orders take, and what their keeper does.

-- name: find
-- What was made of photo $1 by backend $2.
SELECT id, artifact, sha256, bytes, media_type, width, height, faces, unrestored, model, device
FROM jobdaemon.prewarmed WHERE photo = $1 AND backend = $2 AND dropped_at IS NULL;

-- name: used
-- An order has copied $1. A row that somebody holds is not counted: no order waits for a count.
UPDATE jobdaemon.prewarmed SET uses = uses + 1, used_at = now()
WHERE id IN (SELECT p.id FROM jobdaemon.prewarmed p WHERE p.id = $1 FOR UPDATE SKIP LOCKED);

-- name: forget
-- What was found under $1 is missing or damaged. No order waits for that either: the next one finds it so.
UPDATE jobdaemon.prewarmed SET dropped_at = now()
WHERE id IN (SELECT p.id FROM jobdaemon.prewarmed p WHERE p.id = $1 AND p.dropped_at IS NULL FOR UPDATE SKIP LOCKED);

-- name: trim
-- Gives up what is older than $1 seconds, or above $2 bytes, $3 rows each; says how many.
SELECT jobdaemon.trim_prewarmed($1, $2, $3);

-- name: dropped
-- Up to $2 rows above $1 that were given up, and their artifacts.
SELECT id, artifact FROM jobdaemon.prewarmed WHERE dropped_at IS NOT NULL AND id > $1 ORDER BY id LIMIT $2;

-- name: remove
-- Their artifacts are gone.
DELETE FROM jobdaemon.prewarmed WHERE id = ANY ($1::bigint[]) AND dropped_at IS NOT NULL;
