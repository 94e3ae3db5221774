-- The cache: functions of migration 0017, and what its keeper does row by row.

-- name: take
-- What there is for images of an order; claims what has to be made.
SELECT * FROM jobdaemon.take_from_cache($1, $2, $3, $4::integer[], $5::text[], $6, $7);

-- name: release
-- This order does not have these images made after all.
SELECT jobdaemon.release_from_cache($1, $2::integer[]);

-- name: forget
-- A hit whose artifact was missing or damaged.
SELECT jobdaemon.forget_from_cache($1);

-- name: begin_copies
-- Up to $1 stored images, to be copied within $2 seconds.
SELECT * FROM jobdaemon.begin_cache_copies($1, $2);

-- name: end_copy
-- The copy of $1 is in the store.
UPDATE jobdaemon.cache SET copied_at = now(), copying_until = NULL WHERE id = $1 AND dropped_at IS NULL;

-- name: drop
-- What was to be copied under $1 is not there.
UPDATE jobdaemon.cache SET dropped_at = now() WHERE id = $1 AND dropped_at IS NULL;

-- name: trim
-- Gives up what is older than $1 seconds, or above $2 bytes, $3 rows each; says how many.
SELECT jobdaemon.trim_cache($1, $2, $3);

-- name: dropped
-- Up to $2 rows above $1 that were given up; one whose copying may not be over is left to the next look.
SELECT id, artifact FROM jobdaemon.cache
WHERE dropped_at IS NOT NULL AND coalesce(copying_until, '-infinity') < now() AND id > $1 ORDER BY id LIMIT $2;

-- name: remove
-- Their copies are gone.
DELETE FROM jobdaemon.cache WHERE id = ANY ($1::bigint[]) AND dropped_at IS NOT NULL;

-- name: is_empty
-- Whether nothing is kept that would have to go one day.
SELECT NOT EXISTS (SELECT FROM jobdaemon.cache);
