-- What the stages read of an order, its images and its provider calls.

-- name: order
-- What a stage needs to know of an order.
SELECT id, plan, provider, source, params, priority, status, beautified, finished_at IS NOT NULL AS ended
FROM jobdaemon.orders WHERE id = $1;

-- name: images
-- The images of one order.
SELECT index, prompt, status, provider, locator, object_key, call_id
FROM jobdaemon.images WHERE order_id = $1 ORDER BY index;

-- name: image
-- One image of an order.
SELECT index, prompt, status, provider, locator, object_key, call_id
FROM jobdaemon.images WHERE order_id = $1 AND index = $2;

-- name: batch
-- Order $1 with those of its images that have a prompt of images $3, as order and images tell, and the newest call of its job $2 that
-- is not known to have ended: in one question, since a slot of the provider waits for the answer.
SELECT o.id, o.plan, o.provider, o.source, o.params, o.priority, o.status, o.beautified, o.finished_at IS NOT NULL AS ended,
    coalesce((SELECT jsonb_agg(jsonb_build_object('index', i.index, 'prompt', i.prompt, 'status', i.status, 'provider', i.provider,
        'locator', i.locator, 'object_key', i.object_key, 'call_id', i.call_id) ORDER BY i.index)
        FROM jobdaemon.images i WHERE i.order_id = o.id AND i.prompt = ANY (ARRAY(
            SELECT w.prompt FROM jobdaemon.images w WHERE w.order_id = $1 AND w.index = ANY ($3::bigint[])))), '[]') AS images,
    c.id AS call_id, c.external_task_id, c.images AS call_images, c.key_alias, c.submitted_at, c.is_key_known
FROM jobdaemon.orders o
LEFT JOIN LATERAL (
    SELECT c.id, c.external_task_id, c.images, c.key_alias, c.submitted_at,
        jobdaemon.key_is_known(c.provider, c.key_alias, c.submitted_at) AS is_key_known
    FROM jobdaemon.provider_calls c WHERE c.job_id = $2 AND c.outcome IS NULL ORDER BY c.id DESC LIMIT 1
) AS c ON true
WHERE o.id = $1;

-- name: unfinished_call
-- A call whose end is unknown.
SELECT id, external_task_id, images, key_alias, submitted_at, jobdaemon.key_is_known(provider, key_alias, submitted_at) AS is_key_known
FROM jobdaemon.provider_calls WHERE id = $1 AND outcome IS NULL;

-- name: collectable_call
-- A call that ended well, whose results may be fetched once more.
SELECT id, external_task_id, images, key_alias, submitted_at, jobdaemon.key_is_known(provider, key_alias, submitted_at) AS is_key_known
FROM jobdaemon.provider_calls
WHERE id = $1 AND external_task_id IS NOT NULL AND coalesce(outcome, 'succeeded') IN ('succeeded', 'partial');
