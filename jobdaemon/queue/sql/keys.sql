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

-- name: return_images
-- Refused jobs ($1) under keys ($2, $3) that bought nothing give back what they took of the day's budget: those that neither went
-- on with an earlier call, which was free, nor made one that was taken, or may have been.
UPDATE jobdaemon.provider_keys k SET spent = greatest(k.spent - u.images, 0)
FROM (
    SELECT r.provider, r.alias, (s.at AT TIME ZONE 'UTC')::date AS day, sum(jobdaemon.job_images(j.args)) AS images
    FROM unnest($1::bigint[], $2::text[], $3::text[]) AS r (id, provider, alias)
    JOIN jobdaemon.procrastinate_jobs j ON j.id = r.id
    CROSS JOIN LATERAL (SELECT max(e.at) AS at FROM jobdaemon.procrastinate_events e
        WHERE e.job_id = j.id AND e.type = 'started') AS s
    WHERE NOT EXISTS (SELECT FROM jobdaemon.provider_calls c WHERE c.job_id = j.id AND (c.outcome IS NULL
        OR c.submitted_at < s.at AND c.finished_at >= s.at
        OR c.submitted_at >= s.at AND c.outcome NOT IN ('failed', 'cancelled')))
    GROUP BY 1, 2, 3
) AS u
WHERE k.provider = u.provider AND k.alias = u.alias AND k.spent_on = u.day;
