-- What transitions write besides the job. Each statement takes one JSON array of rows, applies those whose row is still in the
-- state they start from, and returns the keys of what it changed, so that following jobs are inserted exactly once.

-- name: order_started
-- {order_id}
UPDATE jobdaemon.orders o SET started_at = now()
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint)
WHERE o.id = w.order_id AND o.started_at IS NULL
RETURNING o.id AS order_id;

-- name: photo_beautified
-- {order_id, beautified}
UPDATE jobdaemon.orders o SET beautified = w.beautified
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, beautified jsonb)
WHERE o.id = w.order_id AND o.beautified IS NULL
RETURNING o.id AS order_id;

-- name: photo_prewarmed
-- {photo, backend, artifact, width, height, faces, unrestored, model, device}; of two that were made at once one is kept, and the
-- other's row only says what is to be deleted. What was announced needs no row for that any more.
WITH made AS (
    SELECT w.photo, w.backend, a.key AS artifact, a.sha256, a.size_bytes AS bytes, a.media_type, w.width, w.height, w.faces,
        w.unrestored, w.model, w.device
    FROM jsonb_to_recordset($1::jsonb) AS w (photo text, backend text, artifact jsonb, width integer, height integer, faces integer,
        unrestored integer, model text, device text)
    CROSS JOIN LATERAL jsonb_to_record(w.artifact) AS a (key text, sha256 text, size_bytes bigint, media_type text)
), kept AS (
    INSERT INTO jobdaemon.prewarmed (photo, backend, artifact, sha256, bytes, media_type, width, height, faces, unrestored, model, device)
    SELECT m.* FROM made m ORDER BY m.photo
    ON CONFLICT (photo, backend) WHERE dropped_at IS NULL DO NOTHING
    RETURNING artifact
), announced AS (
    DELETE FROM jobdaemon.prewarmed p USING made m WHERE p.artifact = m.artifact AND p.dropped_at IS NOT NULL
)
INSERT INTO jobdaemon.prewarmed (photo, backend, artifact, sha256, bytes, media_type, width, height, faces, unrestored, model, device,
    dropped_at)
SELECT m.*, now() FROM made m WHERE m.artifact NOT IN (SELECT k.artifact FROM kept k);

-- name: call_submitted
-- {order_id, job_id, batch, provider, images, task_id, key, price}: one row per call; a job has one open call at most.
SELECT order_id FROM jobdaemon.add_calls($1::jsonb) AS order_id;

-- name: call_accepted
-- {order_id, job_id, task_id}: instead of the id that was noted before the submit, where the provider chose another.
UPDATE jobdaemon.provider_calls c SET external_task_id = w.task_id
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, job_id bigint, task_id text)
WHERE c.job_id = w.job_id AND c.outcome IS NULL
RETURNING c.order_id;

-- name: call_ended
-- {order_id, job_id, outcome, call_id, made, usage}: the job's open call, or the one that is named; only what was fetched before can
-- expire. It costs what the provider made, or else what has arrived; what became of a lost one nobody knows.
WITH ended AS (
    SELECT c.id, w.outcome, w.usage, coalesce(w.made, c.images_made, nullif(a.arrived, CASE w.outcome WHEN 'unknown' THEN 0 END)) AS made
    FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, job_id bigint, outcome text, call_id bigint, made integer, usage jsonb)
    JOIN jobdaemon.provider_calls c ON CASE WHEN w.call_id IS NULL THEN c.job_id = w.job_id AND c.outcome IS NULL
        ELSE c.id = w.call_id AND (c.outcome IS NULL OR w.outcome = 'expired') END
    CROSS JOIN LATERAL (SELECT count(*)::integer AS arrived FROM jobdaemon.images i
        WHERE i.order_id = c.order_id AND i.call_id = c.id) AS a
)
UPDATE jobdaemon.provider_calls c SET outcome = e.outcome, finished_at = coalesce(c.finished_at, now()), images_made = e.made,
    cost = c.price * e.made, usage = coalesce(e.usage, c.usage)
FROM ended e WHERE c.id = e.id
RETURNING c.order_id;

-- name: image_generated
-- {order_id, index, provider, locator, expires_at, job_id, call_id}
UPDATE jobdaemon.images i
SET status = 'generated', provider = w.provider, locator = w.locator, locator_expires_at = w.expires_at,
    generated_at = now(), error = NULL, call_id = coalesce(w.call_id, (SELECT c.id FROM jobdaemon.provider_calls c
        WHERE c.job_id = w.job_id AND c.outcome IS NULL ORDER BY c.id DESC LIMIT 1))
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, index integer, provider text, locator text, expires_at timestamptz,
    job_id bigint, call_id bigint)
WHERE i.order_id = w.order_id AND i.index = w.index AND i.status = 'pending'
RETURNING i.order_id, i.index;

-- name: image_lost
-- {order_id, index}: its link no longer gives it.
UPDATE jobdaemon.images i
SET status = 'pending', locator = NULL, locator_expires_at = NULL, times_lost = i.times_lost + 1
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, index integer)
WHERE i.order_id = w.order_id AND i.index = w.index AND i.status = 'generated' AND i.times_lost < 2
RETURNING i.order_id, i.index;

-- name: image_stored
-- {order_id, index, object_key, url, sha256, bytes, width, height, media_type}
UPDATE jobdaemon.images i
SET status = 'stored', object_key = w.object_key, url = w.url, sha256 = w.sha256, bytes = w.bytes, width = w.width,
    height = w.height, media_type = w.media_type, stored_at = now(), locator = NULL, locator_expires_at = NULL, error = NULL
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, index integer, object_key text, url text, sha256 text,
    bytes bigint, width integer, height integer, media_type text)
WHERE i.order_id = w.order_id AND i.index = w.index AND i.status = 'generated'
RETURNING i.order_id, i.index;

-- name: image_failed
-- {order_id, index, error, was}
UPDATE jobdaemon.images i SET status = 'failed', error = w.error
FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, index integer, error text, was text)
WHERE i.order_id = w.order_id AND i.index = w.index AND i.status = w.was
RETURNING i.order_id, i.index;

-- name: order_failed
-- {order_id, error}: every image not stored yet fails with it.
WITH failed AS (
    SELECT w.order_id, w.error FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint, error text)
), lost AS (
    UPDATE jobdaemon.images i SET status = 'failed', error = f.error
    FROM failed f WHERE i.order_id = f.order_id AND i.status IN ('pending', 'generated')
)
UPDATE jobdaemon.orders o SET error = f.error FROM failed f WHERE o.id = f.order_id AND o.finished_at IS NULL
RETURNING o.id AS order_id;

-- name: images_removed
-- {order_id}: all stored images of an ended order are gone; nothing else counts them again. What the cache has of them goes too.
WITH uncached AS (
    UPDATE jobdaemon.cache SET dropped_at = now() WHERE id IN (
        SELECT c.id FROM jobdaemon.cache c
        WHERE c.order_id IN (SELECT w.order_id FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint)) AND c.dropped_at IS NULL
        ORDER BY c.key FOR UPDATE)
), removed AS (
    UPDATE jobdaemon.images i SET status = 'cancelled', object_key = NULL, url = NULL
    FROM jsonb_to_recordset($1::jsonb) AS w (order_id bigint)
    WHERE i.order_id = w.order_id AND i.status = 'stored'
    RETURNING i.order_id
)
UPDATE jobdaemon.orders o SET images_stored = 0
WHERE o.id IN (SELECT r.order_id FROM removed r) AND o.finished_at IS NOT NULL
RETURNING o.id AS order_id;

-- name: lock_expired
-- Open orders whose time is up; those that somebody holds are left to the next look.
SELECT o.id, format('the order expired: it was not finished by %s',
    to_char(o.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"')) AS error
FROM jobdaemon.orders o WHERE o.finished_at IS NULL AND o.expires_at <= now()
ORDER BY o.id LIMIT $1 FOR UPDATE SKIP LOCKED;

-- name: lift_orders
-- Lifts open orders that waited longer than their plan's lift_after; says how many.
SELECT jobdaemon.lift_orders($1);

-- name: settle_orders
-- Counts the images of these (locked) orders, moves their status on, ends them when nothing is left, and tells listeners: at
-- once when an order ends, else at most every 100 ms; told = false asks the daemon to tell later.
WITH counted AS (
    SELECT i.order_id,
        count(*) FILTER (WHERE i.status = 'stored') AS stored,
        count(*) FILTER (WHERE i.status = 'failed') AS failed,
        count(*) FILTER (WHERE i.status = 'pending') AS pending,
        (array_agg(i.error ORDER BY i.index) FILTER (WHERE i.status = 'failed'))[1] AS error
    FROM jobdaemon.images i WHERE i.order_id = ANY ($1::bigint[]) GROUP BY i.order_id
), settled AS (
    UPDATE jobdaemon.orders o
    SET images_stored = c.stored,
        images_failed = c.failed,
        status = CASE
            WHEN c.stored + c.failed >= o.images_total THEN
                CASE WHEN c.failed = 0 THEN 'completed' WHEN c.stored = 0 THEN 'failed' ELSE 'partial' END
            WHEN o.started_at IS NULL THEN 'queued'
            WHEN o.beautified IS NULL THEN 'beautifying'
            WHEN c.pending > 0 THEN 'generating'
            ELSE 'uploading' END,
        error = coalesce(o.error, CASE WHEN c.stored + c.failed >= o.images_total THEN c.error END),
        first_image_at = coalesce(o.first_image_at, CASE WHEN c.stored > 0 THEN now() END),
        finished_at = CASE WHEN c.stored + c.failed >= o.images_total THEN now() END,
        notified_at = CASE WHEN c.stored + c.failed >= o.images_total
                OR coalesce(o.notified_at, '-infinity') <= now() - interval '100 milliseconds'
            THEN now() ELSE o.notified_at END
    FROM counted c
    WHERE o.id = c.order_id AND o.finished_at IS NULL
    RETURNING o.id, o.status, o.images_stored, o.images_failed, o.images_total, o.finished_at, o.notified_at
)
SELECT s.id, s.status, s.finished_at IS NOT NULL AS ended, s.notified_at = now() AS told,
    CASE WHEN s.notified_at = now() THEN pg_notify('jobdaemon_orders', json_build_object('order_id', s.id,
        'status', s.status, 'stored', s.images_stored, 'failed', s.images_failed, 'total', s.images_total)::text) END AS notified
FROM settled s;

-- name: clear_links
-- Signed URLs leave the rows of orders that ended.
UPDATE jobdaemon.images SET locator = NULL, locator_expires_at = NULL
WHERE order_id = ANY ($1::bigint[]) AND locator LIKE 'http%';

-- name: tell_orders
-- The latest state of open orders whose change came too soon after the last one to be told; told = false says that it still is.
WITH free AS (
    -- Whoever holds an order is changing it and has its own news to tell: waiting here could deadlock with a group of commits.
    SELECT o.id FROM jobdaemon.orders o
    WHERE o.id = ANY ($1::bigint[]) AND o.finished_at IS NULL
        AND coalesce(o.notified_at, '-infinity') <= now() - interval '100 milliseconds'
    ORDER BY o.id FOR UPDATE SKIP LOCKED
), told AS (
    UPDATE jobdaemon.orders o SET notified_at = now() FROM free f WHERE o.id = f.id
    RETURNING o.id, o.status, o.images_stored, o.images_failed, o.images_total
)
SELECT t.id, true AS told, pg_notify('jobdaemon_orders', json_build_object('order_id', t.id, 'status', t.status,
    'stored', t.images_stored, 'failed', t.images_failed, 'total', t.images_total)::text) AS notified
FROM told t
UNION ALL
SELECT o.id, false, NULL FROM jobdaemon.orders o
WHERE o.id = ANY ($1::bigint[]) AND o.finished_at IS NULL AND o.id NOT IN (SELECT t.id FROM told t);

-- name: pending_images
-- What is still to be made of these (locked) orders.
SELECT order_id, index, prompt FROM jobdaemon.images WHERE order_id = ANY ($1::bigint[]) AND status = 'pending' ORDER BY index;

-- name: abandon_calls
-- Nobody goes on with the calls of these (locked) orders that have ended: see the function.
SELECT jobdaemon.abandon_calls($1);

-- name: abandoned_orders
-- Ended orders with calls that nobody goes on with, as abandon_calls sees it; locked, those that somebody holds left out.
SELECT o.id FROM jobdaemon.orders o
WHERE o.finished_at IS NOT NULL AND o.id IN (
    SELECT c.order_id FROM jobdaemon.provider_calls c
    JOIN jobdaemon.orders p ON p.id = c.order_id AND p.finished_at IS NOT NULL
    LEFT JOIN jobdaemon.procrastinate_jobs j ON j.id = c.job_id
    WHERE c.outcome IS NULL AND (j.id IS NULL OR j.status NOT IN ('todo', 'doing', 'failed')
            OR j.status = 'failed' AND p.status = 'cancelled')
        AND NOT EXISTS (SELECT FROM jobdaemon.procrastinate_jobs a
            WHERE (a.args ->> 'order_id')::bigint = c.order_id AND a.task_name LIKE 'jobdaemon.%' AND a.status IN ('todo', 'doing')
                AND a.task_name = 'jobdaemon.abandon' AND a.args -> 'call_id' = to_jsonb(c.id))
    ORDER BY c.order_id LIMIT $1)
ORDER BY o.id FOR UPDATE SKIP LOCKED;
