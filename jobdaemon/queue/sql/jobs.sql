-- Jobs and daemons. Every name is qualified: the daemon needs no search_path. Time is the database's.

-- name: register_daemon
-- A new worker row of procrastinate's with a lease ($6, seconds) from now on, and what we know about the daemon behind it; one that
-- was draining under its old id ($5) still is.
WITH worker AS (
    INSERT INTO jobdaemon.procrastinate_workers (lease) VALUES ($6::float8 * interval '1 second') RETURNING id
)
INSERT INTO jobdaemon.daemons (id, host, pid, version, queues, keys, status)
SELECT id, $1, $2, $3, $4::jsonb, $7::jsonb,
    CASE WHEN EXISTS (SELECT FROM jobdaemon.daemons d WHERE d.id = $5 AND d.status = 'draining') THEN 'draining' ELSE 'running' END
FROM worker
RETURNING id;

-- name: heartbeat
-- Says that the daemon lives, and how long its lease is ($2, seconds); no row means that somebody removed it and it has to
-- register again. Two beats further apart than half the lease, by this clock, are a gap, and so are beats that failed between them
-- (NOT $3).
UPDATE jobdaemon.procrastinate_workers w SET last_heartbeat = beat.at, lease = beat.lease,
    steady_since = CASE WHEN $3::boolean AND w.last_heartbeat BETWEEN beat.at - beat.lease / 2 AND beat.at
        THEN coalesce(w.steady_since, beat.at) ELSE beat.at END
FROM (SELECT clock_timestamp() AS at, $2 * interval '1 second' AS lease) AS beat
WHERE w.id = $1 RETURNING w.id;

-- name: answers
-- Whether this server takes writes; a standby, or the old primary after a failover, does not.
SELECT current_setting('transaction_read_only') = 'off';

-- name: set_daemon_status
-- running, stopping or stopped; a stopped daemon's heartbeat ends now, so that what it left can be rescued at once.
WITH worker AS (
    UPDATE jobdaemon.procrastinate_workers SET last_heartbeat = '-infinity' WHERE id = $1 AND $2 = 'stopped'
)
UPDATE jobdaemon.daemons SET status = $2, stopped_at = CASE WHEN $2 = 'stopped' THEN clock_timestamp() END WHERE id = $1;

-- name: restore_daemon
-- The row of daemon $1, which beats, where it is gone: it was silent for so long that it was pruned, or somebody removed it.
INSERT INTO jobdaemon.daemons (id, host, pid, version, queues, keys)
SELECT w.id, $2, $3, $4, $5::jsonb, $6::jsonb FROM jobdaemon.procrastinate_workers w WHERE w.id = $1
ON CONFLICT (id) DO NOTHING;

-- name: prune_daemons
-- Removes rows ($2 at most) of daemons that have not been heard of for $3 seconds, by daemon $1: those that run no job, and that no
-- failed attempt names, whose machine somebody may want to know. Their workers' rows stay, since finished jobs point at them.
WITH gone AS (
    SELECT d.id FROM jobdaemon.daemons d LEFT JOIN jobdaemon.procrastinate_workers w ON w.id = d.id
    WHERE d.id <> $1
        AND greatest(d.started_at, d.stopped_at, w.last_heartbeat) < clock_timestamp() - $3::float8 * interval '1 second'
        AND NOT EXISTS (SELECT FROM jobdaemon.procrastinate_jobs j WHERE j.worker_id = d.id AND j.status = 'doing')
        AND NOT EXISTS (SELECT FROM jobdaemon.attempts a WHERE a.daemon_id = d.id)
    ORDER BY d.id LIMIT $2 FOR UPDATE OF d SKIP LOCKED
)
DELETE FROM jobdaemon.daemons d USING gone WHERE d.id = gone.id RETURNING d.id;

-- name: end_silent_sessions
-- Ends the sessions of daemons whose process stood still for $1 seconds, within a transaction, after a statement was prepared and before
-- it was executed: the server counts them as active and as waiting for their client, so none of its timeouts ends them, and what
-- they have locked stays locked.
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND application_name LIKE 'jobdaemon %'
    AND state = 'active' AND wait_event = 'ClientRead' AND state_change < clock_timestamp() - $1::float8 * interval '1 second';

-- name: ensure_queues
-- Rows for the queues we serve; an operator's rows stay as they are.
INSERT INTO jobdaemon.queues (name) SELECT unnest($1::text[]) ON CONFLICT (name) DO NOTHING;

-- name: ensure_keys
-- Provider keys of the settings that have no row yet; an operator's rows stay as they are.
INSERT INTO jobdaemon.provider_keys (provider, alias, concurrency, rate, daily_budget)
SELECT k.provider, k.alias, k.concurrency, k.rate, k.daily_budget
FROM jsonb_to_recordset($1::jsonb) AS k (provider text, alias text, concurrency integer, rate float8, daily_budget integer)
ON CONFLICT (provider, alias) DO NOTHING;

-- name: ensure_plans
-- Plans of the settings that have no row yet; an operator's rows stay as they are.
INSERT INTO jobdaemon.plans (name, images, priority, stage_priority, lift_after, expires_after, max_open_orders,
    max_open_orders_per_customer, prompts, provider)
SELECT p.name, p.images, p.priority, p.stage_priority, p.lift_after_s * interval '1 second', p.expires_after_s * interval '1 second',
    p.max_open_orders, p.max_open_orders_per_customer, p.prompts, p.provider
FROM jsonb_to_recordset($1::jsonb) AS p (name text, images integer, priority integer, stage_priority jsonb, lift_after_s float8,
    expires_after_s float8, max_open_orders integer, max_open_orders_per_customer integer, prompts text[], provider text)
ON CONFLICT (name) DO NOTHING;

-- name: claim
-- Up to $3 ready jobs of one queue, under one token; with keys $4, a last row without a job may say when they open. How the circuit
-- was before: this statement sees nothing of what the function does.
SELECT id, task_name, priority, args, attempts, deaths, token, key_alias, opens_in_s,
    (SELECT q.circuit FROM jobdaemon.queues q WHERE q.name = $1) AS circuit_before
FROM jobdaemon.claim_jobs($1, $2, $3, $4::text[]);

-- name: claim_in_place
-- The provider has done what these running jobs (ids $5, tokens $6) asked of it, and they leave their slots. Then as claim, for as many
-- more jobs, but $7 at most; where there is none, there is a row without a job.
SELECT c.id, c.task_name, c.priority, c.args, c.attempts, c.deaths, c.token, c.key_alias, c.opens_in_s, f.freed,
    (SELECT q.circuit FROM jobdaemon.queues q WHERE q.name = $1) AS circuit_before
FROM jobdaemon.leave_slots($5::bigint[], $6::bigint[]) AS f (freed)
LEFT JOIN LATERAL jobdaemon.claim_jobs($1, $2, least($3::integer + cardinality(f.freed), $7::integer), $4::text[]) AS c ON true;

-- name: queue_rows
-- What operators set for these queues and for daemon $2, and whether a job is ready in them: the net below the notifications.
SELECT q.name, q.paused, EXISTS (SELECT FROM jobdaemon.daemons d WHERE d.id = $2 AND d.status = 'draining') AS is_draining, q.team_size, q.adaptive_limit IS NOT NULL OR q.circuit <> 'closed'
        OR EXISTS (SELECT FROM jobdaemon.queue_steering s WHERE s.queue = q.name) AS is_steered,
    extract(epoch FROM greatest(q.rested_until, CASE WHEN q.circuit = 'open' THEN q.circuit_until END) - clock_timestamp())::float8
    AS opens_in_s, EXISTS (SELECT FROM jobdaemon.procrastinate_jobs j
    WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NULL) AS has_ready
FROM jobdaemon.queues q WHERE q.name = ANY ($1::text[]);

-- name: report_team_sizes
-- This daemon's own team sizes, when they have changed.
UPDATE jobdaemon.daemons SET queues = $2::jsonb WHERE id = $1 AND queues <> $2::jsonb;

-- name: promote
-- Lets due jobs in; says how many, in how many seconds the next one falls due, if that is within a day ('infinity' is legal), and
-- whether an order has expired, or has waited so long that it is to be lifted.
SELECT promoted, CASE WHEN next_due < clock_timestamp() + interval '1 day'
    THEN extract(epoch FROM next_due - clock_timestamp())::float8 END AS next_due_s,
    EXISTS (SELECT FROM jobdaemon.orders o WHERE o.finished_at IS NULL AND o.expires_at <= now()) AS has_expired,
    EXISTS (SELECT FROM jobdaemon.plans_below_top() AS p
        WHERE EXISTS (SELECT FROM jobdaemon.orders o WHERE o.plan = p.name AND o.finished_at IS NULL AND o.lifted_at IS NULL
            AND NOT o.prioritized AND o.waits_from <= now() - p.lift_after)) AS has_overdue
FROM jobdaemon.promote_jobs($1);

-- name: missing_keys
-- Keys with which something was bought that waits to be collected, and that no running daemon has; and how many jobs wait so.
SELECT k.provider, k.alias, k.jobs FROM (
    SELECT substr(j.queue_name, length('generate.') + 1) AS provider, j.key_alias AS alias, count(*) AS jobs
    FROM jobdaemon.procrastinate_jobs j
    WHERE j.status = 'todo' AND j.key_alias IS NOT NULL AND j.queue_name LIKE 'generate.%' GROUP BY 1, 2) AS k
WHERE NOT jobdaemon.key_is_held(k.provider, k.alias) ORDER BY 1, 2;

-- name: wake_queues
-- Slots were freed that this daemon will not use.
SELECT pg_notify('jobdaemon_jobs', name) FROM unnest($1::text[]) AS name;

-- name: stop_jobs
-- Ends what waits of these (locked) orders, and asks what runs to stop.
WITH locked AS (
    SELECT j.id FROM jobdaemon.procrastinate_jobs j
    WHERE (j.args ->> 'order_id')::bigint = ANY ($1::bigint[]) AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('todo', 'doing')
    ORDER BY j.id FOR UPDATE
)
UPDATE jobdaemon.procrastinate_jobs j
SET status = CASE WHEN j.status = 'todo' THEN 'cancelled' ELSE j.status END, abort_requested = j.status = 'doing'
FROM locked l WHERE j.id = l.id;

-- name: lost_jobs
-- Running jobs whose worker is gone, or silent for longer than its lease and than ours ($1, seconds; NULL: none is judged), with its
-- last beat; those of worker $3 that are not among those it knows to run ($4); and those it runs that have no worker, since somebody
-- removed its row. Others are judged only by a worker whose own beats have come without a gap for a whole lease, the last one within
-- half a lease: after an outage, a long lock, a standstill of all or a leap of the clock everybody looks silent, itself included. One
-- reading of the clock is for both, so that it does not matter how long this statement had to wait. No lock: the fence decides.
-- At least one row, if only to say in how many seconds a look may find more: another heartbeat lapses, or we may judge from then on.
WITH look AS MATERIALIZED (
    SELECT c.at, c.lease, us.last_heartbeat BETWEEN c.at - c.lease / 2 AND c.at AND us.steady_since <= c.at - c.lease AS may_judge,
        us.steady_since + c.lease AS judges_at
    FROM (SELECT clock_timestamp() AS at, $1 * interval '1 second' AS lease) AS c
    LEFT JOIN jobdaemon.procrastinate_workers us ON us.id = $3
), lapse AS (
    SELECT min(beat.lapses_at) AS at
    FROM look l CROSS JOIN jobdaemon.procrastinate_workers w
    CROSS JOIN LATERAL (SELECT greatest(w.last_heartbeat + greatest(l.lease, w.lease), l.judges_at) AS lapses_at) AS beat
    WHERE w.id <> $3 AND beat.lapses_at > l.at
), lost AS (
    SELECT j.id, j.queue_name, j.task_name, j.priority, j.args, j.attempts, j.deaths, j.token, j.key_alias, j.worker_id,
        coalesce(extract(epoch FROM w.last_heartbeat)::text, '') AS last_beat
    FROM look l CROSS JOIN jobdaemon.procrastinate_jobs j
    LEFT JOIN jobdaemon.procrastinate_workers w ON w.id = j.worker_id
    WHERE j.status = 'doing' AND j.queue_name IN (SELECT q.name FROM jobdaemon.queues q)
        AND CASE WHEN j.id = ANY ($4::bigint[]) AND coalesce(j.worker_id = $3, true) THEN j.worker_id IS NULL
            WHEN j.worker_id = $3 THEN true
            ELSE l.may_judge AND (w.id IS NULL
                OR w.last_heartbeat NOT BETWEEN l.at - greatest(l.lease, w.lease) AND l.at + greatest(l.lease, w.lease)) END
    ORDER BY j.id LIMIT $2
)
SELECT extract(epoch FROM lapse.at - look.at)::float8 AS lapses_in_s, lost.*
FROM look CROSS JOIN lapse LEFT JOIN lost ON true ORDER BY lost.id;

-- name: adopt_jobs
-- Running jobs that belong to nobody become those of worker $1, where the tokens ($3) of its attempts still hold.
WITH own AS (
    SELECT j.id FROM unnest($2::bigint[], $3::bigint[]) AS a (id, token)
    JOIN jobdaemon.procrastinate_jobs j ON j.id = a.id AND j.token = a.token
    WHERE j.status = 'doing' AND j.worker_id IS NULL AND EXISTS (SELECT FROM jobdaemon.procrastinate_workers w WHERE w.id = $1)
    ORDER BY j.id FOR UPDATE OF j SKIP LOCKED
)
UPDATE jobdaemon.procrastinate_jobs j SET worker_id = $1 FROM own o WHERE j.id = o.id;

-- name: other_deaths
-- Signs of the last $1 seconds that workers die whatever they run: those that died (silent for $2, and never stopped), without
-- worker $3 and those in which a suspect ran alone ($4), $6 at most; and every other suspect than job $5 that died so.
SELECT (SELECT count(DISTINCT a.job_id) FROM jobdaemon.attempts a
        WHERE a.ended_at > now() - $1 * interval '1 second' AND a.error_kind = $4 AND a.job_id <> $5)
    + count(*) FROM (
    SELECT FROM jobdaemon.daemons d JOIN jobdaemon.procrastinate_workers w ON w.id = d.id
    WHERE d.status <> 'stopped' AND d.id IS DISTINCT FROM $3
        AND w.last_heartbeat > now() - $1 * interval '1 second' AND w.last_heartbeat < now() - $2 * interval '1 second'
        AND NOT EXISTS (SELECT FROM jobdaemon.attempts a
            WHERE a.ended_at > now() - 2 * $1 * interval '1 second' AND a.daemon_id = d.id AND a.error_kind = $4)
    LIMIT $6) AS died;

-- name: lock_orders
-- Orders first, by id; then jobs; then images: every transaction that touches several keeps this order. What share_orders locks
-- goes on beside it.
SELECT id, finished_at IS NOT NULL AS ended FROM jobdaemon.orders WHERE id = ANY ($1::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- name: share_orders
-- For what changes nothing of these orders: it waits for nobody but those who mean to stop their jobs, as cancelling does, or to
-- delete them.
SELECT id, finished_at IS NOT NULL AS ended FROM jobdaemon.orders WHERE id = ANY ($1::bigint[]) ORDER BY id FOR KEY SHARE;

-- name: lock_jobs
-- The jobs of a group of transitions, by id, with what the fence needs.
SELECT id, status::text, token, abort_requested FROM jobdaemon.procrastinate_jobs
WHERE id = ANY ($1::bigint[]) ORDER BY id FOR UPDATE;

-- name: note_submits
-- Calls ($4, as for call_submitted) of running jobs ($2, with their tokens $3) of open orders ($1) are noted, if the fence accepts them
-- all: whether it did.
SELECT jobdaemon.note_submits($1::bigint[], $2::bigint[], $3::bigint[], $4::jsonb);

-- name: living_jobs
-- Those of these (locked) jobs ($1) whose daemon has beaten, or has changed, since its last beat was $2: they are its own again. No
-- clock is asked.
SELECT s.id FROM unnest($1::bigint[], $2::text[]) AS s (id, last_beat)
JOIN jobdaemon.procrastinate_jobs j ON j.id = s.id
LEFT JOIN jobdaemon.procrastinate_workers w ON w.id = j.worker_id
WHERE coalesce(extract(epoch FROM w.last_heartbeat)::text, '') <> s.last_beat;

-- name: locked_jobs
-- Of these jobs ($1), each with its order ($2), those whose commit would have to wait: somebody holds the job, its order or one of
-- its images. Takes the others for an instant, and waits for nothing.
WITH asked AS (
    SELECT a.job_id, a.order_id FROM unnest($1::bigint[], $2::bigint[]) AS a (job_id, order_id)
), free_orders AS (
    SELECT o.id FROM jobdaemon.orders o WHERE o.id = ANY ($2::bigint[]) FOR NO KEY UPDATE SKIP LOCKED
), free_jobs AS (
    SELECT j.id FROM jobdaemon.procrastinate_jobs j WHERE j.id = ANY ($1::bigint[]) FOR UPDATE SKIP LOCKED
), free_images AS (
    SELECT i.order_id, i.index FROM jobdaemon.images i WHERE i.order_id = ANY ($2::bigint[]) FOR UPDATE SKIP LOCKED
), held AS (
    SELECT NULL::bigint AS job_id, o.id AS order_id FROM jobdaemon.orders o
    WHERE o.id = ANY ($2::bigint[]) AND o.id NOT IN (SELECT f.id FROM free_orders f)
    UNION ALL
    SELECT j.id, NULL FROM jobdaemon.procrastinate_jobs j
    WHERE j.id = ANY ($1::bigint[]) AND j.id NOT IN (SELECT f.id FROM free_jobs f)
    UNION ALL
    SELECT NULL, i.order_id FROM jobdaemon.images i
    WHERE i.order_id = ANY ($2::bigint[]) AND (i.order_id, i.index) NOT IN (SELECT f.order_id, f.index FROM free_images f)
)
SELECT a.job_id FROM asked a WHERE EXISTS (SELECT FROM held h WHERE h.job_id = a.job_id OR h.order_id = a.order_id);

-- name: end_jobs
-- Ends attempts whose fence held: id, status, attempts spent, seconds to wait, deaths, and whether the token is forgotten. A job
-- that may run again keeps the key of a task that it has bought and not collected.
UPDATE jobdaemon.procrastinate_jobs j
SET status = e.status::jobdaemon.procrastinate_job_status,
    attempts = j.attempts + e.spent,
    deaths = CASE WHEN e.died > 0 THEN coalesce(j.deaths, 0) + e.died ELSE j.deaths END,
    scheduled_at = CASE WHEN e.status = 'todo' THEN now() + e.delay_s * interval '1 second' END,
    worker_id = CASE WHEN e.status = 'todo' THEN NULL ELSE j.worker_id END,
    token = CASE WHEN e.died > 0 THEN NULL ELSE j.token END,
    key_alias = CASE WHEN j.key_alias IS NOT NULL AND e.status IN ('todo', 'failed') THEN jobdaemon.bought_with(j.id) END,
    abort_requested = false
FROM unnest($1::bigint[], $2::text[], $3::integer[], $4::float8[], $5::smallint[]) AS e (id, status, spent, delay_s, died)
WHERE j.id = e.id;

-- name: defer_jobs
-- Inserts what follows, through procrastinate's own function: {queue, task, priority, args, delay_s}. The orders are locked: job_priority
-- knows their priority in this stage, what an operator has set it to, and that they were lifted, though the stage may have read
-- them before. Each job names its order's customer, for the fair share.
SELECT jobdaemon.procrastinate_defer_jobs_v1(array_agg(ROW(n.queue, n.task,
    CASE WHEN o.id IS NULL THEN n.priority ELSE jobdaemon.job_priority(o, n.queue) END,
    NULL, NULL, CASE WHEN o.customer <> '' THEN n.args || jsonb_build_object('customer', o.customer) ELSE n.args END,
    now() + n.delay_s * interval '1 second')::jobdaemon.procrastinate_job_to_defer_v1 ORDER BY n.place))
FROM ROWS FROM (jsonb_to_recordset($1::jsonb) AS (queue text, task text, priority integer, args jsonb, delay_s float8))
    WITH ORDINALITY AS n (queue, task, priority, args, delay_s, place)
LEFT JOIN jobdaemon.orders o ON o.id = (n.args ->> 'order_id')::bigint;

-- name: move_jobs
-- {job_id, queue, images, tried}: (locked) jobs go on in another provider's queue, with new attempts and the images named.
-- What an earlier provider has made is not to be had there.
UPDATE jobdaemon.procrastinate_jobs j
SET queue_name = m.queue, attempts = 0, scheduled_at = NULL, key_alias = NULL,
    args = (j.args - 'call') || jsonb_build_object('images', m.images, 'tried', m.tried)
FROM jsonb_to_recordset($1::jsonb) AS m (job_id bigint, queue text, images jsonb, tried jsonb)
WHERE j.id = m.job_id;

-- name: troubled_providers
-- Providers whose circuit is not closed, and those of whose keys none can start a call now; whether that has been so, or will be so,
-- for longer than $1 seconds; and why. Keys that an operator paused all of are his own affair, as a paused queue is.
SELECT substr(q.name, length('generate.') + 1) AS provider,
    coalesce(q.circuit_since <= clock_timestamp() - $1 * interval '1 second', false) AS is_long,
    format('its circuit has been open for %s s', $1::float8) AS reason
FROM jobdaemon.queues q WHERE q.circuit <> 'closed' AND q.name LIKE 'generate.%'
UNION ALL
SELECT k.provider, min(k.opens_at) > clock_timestamp() + $1 * interval '1 second',
    format('no key of it can start a call within %s s: %s', $1::float8, string_agg(format('%s %s', k.alias, CASE
        WHEN k.paused THEN 'is paused' WHEN k.rested_until > clock_timestamp() THEN 'rests' || coalesce(' (' || k.rest_reason || ')', '')
        ELSE 'has spent its budget for today' END), ', ' ORDER BY k.alias))
FROM (
    SELECT k.*, CASE WHEN k.paused OR k.daily_budget = 0 THEN 'infinity' ELSE greatest(k.rested_until,
        CASE WHEN k.spent_on = t.today AND k.spent >= k.daily_budget THEN (t.today + 1)::timestamp AT TIME ZONE 'UTC' END) END AS opens_at
    FROM jobdaemon.provider_keys k CROSS JOIN (SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date AS today) AS t
) AS k
GROUP BY k.provider HAVING bool_and(coalesce(k.opens_at > clock_timestamp(), false)) AND NOT bool_and(k.paused);

-- name: waiting_batches
-- Ready batches of queue $1 in claim order, $2 passed over, $3 at most. One that has bought something stays, unless calls cost
-- nothing here ($4): only its provider can say what became of that.
SELECT j.id, (j.args ->> 'order_id')::bigint AS order_id
FROM jobdaemon.procrastinate_jobs j
WHERE j.queue_name = $1 AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.task_name = 'jobdaemon.generate'
    AND ($4 OR NOT j.args ? 'call' AND NOT EXISTS (
        SELECT FROM jobdaemon.provider_calls c WHERE c.job_id = j.id AND c.outcome IS NULL))
ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
OFFSET $2 LIMIT $3;

-- name: lock_free_orders
-- Open ones of these orders; those that somebody holds are left to the next look.
SELECT o.id, o.plan, o.provider FROM jobdaemon.orders o
WHERE o.id = ANY ($1::bigint[]) AND o.finished_at IS NULL ORDER BY o.id FOR UPDATE SKIP LOCKED;

-- name: lock_waiting
-- Those of these jobs that still wait in queue $2, and have still bought nothing ($3 as $4 of waiting_batches): since the look they
-- may have run. From now on they note no call, since their orders are locked.
SELECT j.id, j.task_name, j.priority, j.args, j.attempts, j.deaths, j.token FROM jobdaemon.procrastinate_jobs j
WHERE j.id = ANY ($1::bigint[]) AND j.queue_name = $2 AND j.status = 'todo'
    AND ($3 OR NOT EXISTS (SELECT FROM jobdaemon.provider_calls c WHERE c.job_id = j.id AND c.outcome IS NULL))
ORDER BY j.id FOR UPDATE OF j SKIP LOCKED;

-- name: record_attempts
-- Why attempts did not succeed: {job_id, order_id, queue, attempt, token, daemon_id, seconds, outcome, error_kind, error}.
INSERT INTO jobdaemon.attempts
    (job_id, order_id, queue, attempt, token, daemon_id, started_at, ended_at, outcome, error_kind, error)
SELECT a.job_id, a.order_id, a.queue, a.attempt, a.token, a.daemon_id,
    clock_timestamp() - a.seconds * interval '1 second', clock_timestamp(), a.outcome, a.error_kind, a.error
FROM jsonb_to_recordset($1::jsonb) AS a (job_id bigint, order_id bigint, queue text, attempt integer, token bigint,
    daemon_id bigint, seconds float8, outcome text, error_kind text, error text);

-- name: database_time
-- For checks.
SELECT clock_timestamp() AS now;
