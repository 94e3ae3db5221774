-- What steers queues by their ends: see jobdaemon/queue/steering.py.

-- name: lock_steering
-- How these queues ($1) are, under lock, and what is remembered of them; those in $2 are remembered from now on.
SELECT * FROM jobdaemon.lock_steering($1::text[], $2::text[]);

-- name: save_steering
-- Keeps what was decided: one JSON document per queue.
SELECT jobdaemon.save_steering($1::jsonb);
