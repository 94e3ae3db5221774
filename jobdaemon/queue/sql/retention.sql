-- Retention: orders that ended long ago, and what goes with them.

-- name: retire
-- Retires orders that ended $1 seconds ago, $2 at most; says how many.
SELECT jobdaemon.retire_orders($1, $2);

-- name: retired
-- Up to $2 retired orders above $1, of which something may lie under work/ in the store.
SELECT id FROM jobdaemon.orders WHERE retired_at IS NOT NULL AND pruned_at IS NULL AND id > $1 ORDER BY id LIMIT $2;

-- name: pruned
-- Nothing of these lies there any more; one that somebody holds is looked at again.
UPDATE jobdaemon.orders SET pruned_at = clock_timestamp() WHERE id = ANY (ARRAY(
    SELECT o.id FROM jobdaemon.orders o WHERE o.id = ANY ($1::bigint[]) AND o.pruned_at IS NULL ORDER BY o.id FOR UPDATE SKIP LOCKED));

-- name: prune_jobs
-- Deletes what may go of the $3 jobs after $1, $2 being an age in seconds: where to go on, if there is more.
SELECT last_id FROM jobdaemon.prune_jobs($1, $2, $3);

-- name: sources_to_delete
-- Up to $2 sources that have been idle for $1 seconds; they are the caller's to delete.
SELECT source FROM jobdaemon.sources_to_delete($1, $2) AS source;

-- name: sources_deleted
-- These are out of the store; one that somebody holds is deleted once more.
DELETE FROM jobdaemon.idle_sources WHERE source = ANY (ARRAY(
    SELECT s.source FROM jobdaemon.idle_sources s
    WHERE s.source = ANY ($1::text[]) AND s.deleting_at IS NOT NULL ORDER BY s.source FOR UPDATE SKIP LOCKED));

-- name: sources_not_deleted
-- These are not, or it is not known: they wait again, behind all others.
UPDATE jobdaemon.idle_sources SET deleting_at = NULL, idle_since = clock_timestamp() WHERE source = ANY (ARRAY(
    SELECT s.source FROM jobdaemon.idle_sources s
    WHERE s.source = ANY ($1::text[]) AND s.deleting_at IS NOT NULL ORDER BY s.source FOR UPDATE SKIP LOCKED));

-- name: remove
-- Removes rows of retired orders that ended $1 seconds ago, $2 at most; says how many.
SELECT jobdaemon.remove_orders($1, $2);
