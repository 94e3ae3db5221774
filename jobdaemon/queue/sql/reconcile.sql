-- Bringing orders back in line with their jobs, after somebody else had his hands on them: see jobdaemon/domain/mending.py.

-- name: open_orders
-- The next open orders after $1, $2 at most, and of each whether it waits for a job that is not there. One statement, hence one
-- snapshot: what our own transactions write always fits together.
SELECT o.id, CASE WHEN o.beautified IS NULL THEN NOT coalesce(jobs.beautifies, false)
    ELSE coalesce(images.is_stray, true) END AS is_stray
FROM (SELECT w.id, w.beautified FROM jobdaemon.orders w WHERE w.finished_at IS NULL AND w.id > $1 ORDER BY w.id LIMIT $2) AS o
CROSS JOIN LATERAL (
    SELECT bool_or(j.task_name = 'jobdaemon.beautify') AS beautifies,
        coalesce(jsonb_agg(batch.value) FILTER (WHERE j.task_name = 'jobdaemon.generate'), '[]') AS generates,
        coalesce(jsonb_agg(j.args -> 'image') FILTER (WHERE j.task_name = 'jobdaemon.upload'), '[]') AS uploads
    FROM jobdaemon.procrastinate_jobs j
    LEFT JOIN LATERAL jsonb_array_elements(
        CASE WHEN jsonb_typeof(j.args -> 'images') = 'array' THEN j.args -> 'images' END) AS batch ON true
    WHERE (j.args ->> 'order_id')::bigint = o.id AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('todo', 'doing')
) AS jobs
CROSS JOIN LATERAL (
    SELECT bool_or(NOT CASE i.status WHEN 'pending' THEN jobs.generates ELSE jobs.uploads END @> to_jsonb(i.index)) AS is_stray
    FROM jobdaemon.images i WHERE i.order_id = o.id AND i.status IN ('pending', 'generated')
) AS images
ORDER BY o.id;

-- name: lock_strays
-- Those of these orders that are open; one that somebody holds is left to the next look.
SELECT o.id, o.priority, o.provider, o.beautified IS NOT NULL AS is_beautified
FROM jobdaemon.orders o WHERE o.id = ANY ($1::bigint[]) AND o.finished_at IS NULL ORDER BY o.id FOR UPDATE SKIP LOCKED;

-- name: stray_images
-- The images of these (locked) orders.
SELECT i.order_id, i.index, i.prompt, i.status FROM jobdaemon.images i WHERE i.order_id = ANY ($1::bigint[]) ORDER BY i.index;

-- name: stray_jobs
-- Their jobs that are open, dead, or were stopped by somebody.
SELECT (j.args ->> 'order_id')::bigint AS order_id, j.id, j.task_name, j.status::text, j.args
FROM jobdaemon.procrastinate_jobs j
WHERE (j.args ->> 'order_id')::bigint = ANY ($1::bigint[]) AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('todo', 'doing', 'failed')
UNION ALL
SELECT (j.args ->> 'order_id')::bigint, j.id, j.task_name, j.status::text, j.args
FROM jobdaemon.procrastinate_jobs j
WHERE (j.args ->> 'order_id')::bigint = ANY ($1::bigint[]) AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('cancelled', 'aborted');

-- name: stray_calls
-- Calls of theirs that may still give something, though the job that noted them is not open.
SELECT c.order_id, c.provider, c.images FROM jobdaemon.provider_calls c
WHERE c.order_id = ANY ($1::bigint[]) AND c.outcome IS NULL AND cardinality(c.images) > 0
    AND NOT EXISTS (SELECT FROM jobdaemon.procrastinate_jobs j WHERE j.id = c.job_id AND j.status IN ('todo', 'doing'))
ORDER BY c.id;

-- name: hand_on_calls
-- Jobs that were made again ask for the calls which their lost ones had noted, instead of buying others: {order_id, batch, first},
-- batch being the first image of the call and first that of the new job, which is for the same provider.
UPDATE jobdaemon.provider_calls c SET job_id = j.id
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, batch integer, first integer)
JOIN jobdaemon.procrastinate_jobs j ON (j.args ->> 'order_id')::bigint = w.order_id AND j.task_name LIKE 'jobdaemon.%'
    AND j.task_name = 'jobdaemon.generate' AND j.status = 'todo' AND j.args -> 'images' @> to_jsonb(w.first)
WHERE c.order_id = w.order_id AND c.batch = w.batch AND c.outcome IS NULL AND j.queue_name = 'generate.' || c.provider
    AND NOT EXISTS (SELECT FROM jobdaemon.procrastinate_jobs held WHERE held.id = c.job_id AND held.status IN ('todo', 'doing'));
