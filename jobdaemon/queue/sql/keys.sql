-- What rests provider keys by the ends of attempts: see jobdaemon/queue/key_rests.py.

-- name: recovered_keys
-- Which of these keys ($1, $2) were refused, and have a success since: the newest token is in $3.
SELECT k.provider, k.alias
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS w (provider, alias, token)
JOIN jobdaemon.provider_keys k ON k.provider = w.provider AND k.alias = w.alias
WHERE k.rests > 0 AND w.token > k.rest_token;

-- name: lock_keys
-- How these keys ($2, $3) rest, under the locks of queues $1.
SELECT * FROM jobdaemon.lock_keys($1::text[], $2::text[], $3::text[]);

-- name: save_rests
-- Keeps what was decided: {provider, alias, rested_until, rest_reason, rests, rest_token}. Only a changed rest wakes daemons: the
-- trigger goes by the columns that are named.
WITH decided AS (
    SELECT d.* FROM jsonb_to_recordset($1::jsonb)
        AS d (provider text, alias text, rested_until timestamptz, rest_reason text, rests integer, rest_token bigint)
), kept AS (
    UPDATE jobdaemon.provider_keys k SET rests = d.rests, rest_token = d.rest_token FROM decided d
    WHERE k.provider = d.provider AND k.alias = d.alias AND k.rested_until IS NOT DISTINCT FROM d.rested_until
)
UPDATE jobdaemon.provider_keys k
SET rested_until = d.rested_until, rest_reason = d.rest_reason, rests = d.rests, rest_token = d.rest_token
FROM decided d
WHERE k.provider = d.provider AND k.alias = d.alias AND k.rested_until IS DISTINCT FROM d.rested_until;

-- name: unbought
-- What these attempts of jobs $1, under keys $2, $3, took of the day's budget ($4 images each) and did not buy; less than nothing
-- where they bought more. Those that went on with an earlier call, their own or call $5 of another, took nothing. A call whose end
-- is not known may have been paid for.
SELECT u.provider, u.alias, u.day, sum(u.images)::integer AS images
FROM (
    SELECT r.provider, r.alias, (s.at AT TIME ZONE 'UTC')::date AS day, r.images - coalesce((
        SELECT sum(CASE WHEN c.outcome IS NULL THEN cardinality(c.images)
            ELSE coalesce(c.images_made, CASE WHEN c.outcome IN ('failed', 'cancelled') THEN 0 ELSE cardinality(c.images) END) END)
        FROM jobdaemon.provider_calls c WHERE c.job_id = r.id AND c.submitted_at >= s.at), 0) AS images
    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::integer[], $5::bigint[]) AS r (id, provider, alias, images, call)
    CROSS JOIN LATERAL (SELECT max(e.at) AS at FROM jobdaemon.procrastinate_events e
        WHERE e.job_id = r.id AND e.type = 'started') AS s
    WHERE s.at IS NOT NULL
        AND NOT EXISTS (SELECT FROM jobdaemon.provider_calls c
            WHERE c.job_id = r.id AND c.submitted_at < s.at AND (c.outcome IS NULL OR c.finished_at >= s.at))
        AND NOT EXISTS (SELECT FROM jobdaemon.provider_calls c WHERE c.id = r.call)
) AS u
WHERE u.images <> 0 GROUP BY 1, 2, 3;

-- name: return_images
-- Gives {provider, alias, day, images} back to the budgets of these (locked) keys.
UPDATE jobdaemon.provider_keys k SET spent = least(greatest(k.spent::bigint - u.images, 0), 2147483647)
FROM jsonb_to_recordset($1::jsonb) AS u (provider text, alias text, day date, images integer)
WHERE k.provider = u.provider AND k.alias = u.alias AND k.spent_on = u.day;
