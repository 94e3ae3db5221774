-- Prewarmed photos: what orders take, and what their keeper does.

-- name: find
-- What was made of photo $1 by backend $2.
SELECT id, artifact, sha256, bytes, media_type, width, height, faces, unrestored, model, device
FROM jobdaemon.prewarmed WHERE photo = $1 AND backend = $2 AND dropped_at IS NULL;

-- name: announce
-- An artifact is about to be stored, so that none is ever without a row: {photo, backend, artifact, width, height, faces, unrestored,
-- model, device}. The end of the attempt takes the row away; where none comes, the artifact is deleted an hour later.
INSERT INTO jobdaemon.prewarmed (photo, backend, artifact, sha256, bytes, media_type, width, height, faces, unrestored, model, device,
    dropped_at)
SELECT w.photo, w.backend, a.key, a.sha256, a.size_bytes, a.media_type, w.width, w.height, w.faces, w.unrestored, w.model, w.device,
    now() + interval '1 hour'
FROM jsonb_to_record($1::jsonb) AS w (photo text, backend text, artifact jsonb, width integer, height integer, faces integer,
    unrestored integer, model text, device text)
CROSS JOIN LATERAL jsonb_to_record(w.artifact) AS a (key text, sha256 text, size_bytes bigint, media_type text);

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
SELECT id, artifact FROM jobdaemon.prewarmed WHERE dropped_at <= now() AND id > $1 ORDER BY id LIMIT $2;

-- name: remove
-- Their artifacts are gone.
DELETE FROM jobdaemon.prewarmed WHERE id = ANY ($1::bigint[]) AND dropped_at IS NOT NULL;
