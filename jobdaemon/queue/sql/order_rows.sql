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

-- name: open_call
-- The newest call of this job that is not known to have ended.
SELECT id, external_task_id, images, key_alias, submitted_at, jobdaemon.key_is_known(provider, key_alias, submitted_at) AS is_key_known
FROM jobdaemon.provider_calls
WHERE job_id = $1 AND outcome IS NULL
ORDER BY id DESC LIMIT 1;

-- name: unfinished_call
-- A call whose end is unknown.
SELECT id, external_task_id, images, key_alias, submitted_at, jobdaemon.key_is_known(provider, key_alias, submitted_at) AS is_key_known
FROM jobdaemon.provider_calls WHERE id = $1 AND outcome IS NULL;

-- name: collectable_call
-- A call that ended well, whose results may be fetched once more.
SELECT id, external_task_id, images, key_alias, submitted_at, jobdaemon.key_is_known(provider, key_alias, submitted_at) AS is_key_known
FROM jobdaemon.provider_calls
WHERE id = $1 AND external_task_id IS NOT NULL AND coalesce(outcome, 'succeeded') IN ('succeeded', 'partial');
