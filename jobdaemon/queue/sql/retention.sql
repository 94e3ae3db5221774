-- Retention: orders that ended long ago, and what goes with them.

-- name: retire
-- Retires orders that ended $1 seconds ago, $2 at most; says how many.
SELECT jobdaemon.retire_orders($1, $2);

-- name: retired
-- Up to $2 retired orders above $1, of which something may lie under work/ in the store.
SELECT id FROM jobdaemon.orders WHERE retired_at IS NOT NULL AND pruned_at IS NULL AND id > $1 ORDER BY id LIMIT $2;

-- name: pruned
-- Nothing of these lies there any more.
UPDATE jobdaemon.orders SET pruned_at = clock_timestamp() WHERE id = ANY ($1::bigint[]) AND pruned_at IS NULL;

-- name: prune_jobs
-- Deletes what may go of the $3 jobs after $1, $2 being an age in seconds: where to go on, if there is more.
SELECT last_id FROM jobdaemon.prune_jobs($1, $2, $3);

-- name: sources_to_delete
-- Up to $2 sources that have been idle for $1 seconds; they are the caller's to delete.
SELECT source FROM jobdaemon.sources_to_delete($1, $2) AS source;

-- name: sources_deleted
-- These are out of the store.
DELETE FROM jobdaemon.idle_sources WHERE source = ANY ($1::text[]) AND deleting_at IS NOT NULL;

-- name: sources_not_deleted
-- These are not, or it is not known: they wait again, behind all others.
UPDATE jobdaemon.idle_sources SET deleting_at = NULL, idle_since = clock_timestamp() WHERE source = ANY ($1::text[]);

-- name: remove
-- Removes rows of retired orders that ended $1 seconds ago, $2 at most; says how many.
SELECT jobdaemon.remove_orders($1, $2);
