-- Prewarmed photos: what orders take, and what their keeper does.

-- name: take
-- What was made of photo $1 by backend $2; an order is about to use it.
UPDATE jobdaemon.prewarmed SET uses = uses + 1, used_at = now()
WHERE photo = $1 AND backend = $2 AND dropped_at IS NULL
RETURNING id, artifact, sha256, bytes, media_type, width, height, faces, unrestored, model, device;

-- name: has
-- Whether there is anything of photo $1 by backend $2.
SELECT EXISTS (SELECT FROM jobdaemon.prewarmed WHERE photo = $1 AND backend = $2 AND dropped_at IS NULL);

-- name: forget
-- What was taken under $1 is missing or damaged: it served nobody.
UPDATE jobdaemon.prewarmed SET dropped_at = now(), uses = greatest(uses - 1, 0) WHERE id = $1 AND dropped_at IS NULL;

-- name: trim
-- Gives up what is older than $1 seconds, or above $2 bytes, $3 rows each; says how many.
SELECT jobdaemon.trim_prewarmed($1, $2, $3);

-- name: dropped
-- Up to $1 rows that were given up, and their artifacts.
SELECT id, artifact FROM jobdaemon.prewarmed WHERE dropped_at IS NOT NULL ORDER BY id LIMIT $1;

-- name: remove
-- Their artifacts are gone.
DELETE FROM jobdaemon.prewarmed WHERE id = ANY ($1::bigint[]) AND dropped_at IS NOT NULL;
