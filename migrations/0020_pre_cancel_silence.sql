-- Prewarms can be cancelled by whoever may ask for them; and what waits for a daemon that has died says so as soon as that is known.

-- Drops a prewarm that waits; one that runs is stopped by its daemon, at once where that hears of it. Returns the job's status as it
-- is then: cancelled; doing, while it stops; or as it had ended before.
CREATE FUNCTION cancel_prewarm(job_id bigint) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_job procrastinate_jobs;
BEGIN
    SELECT * INTO v_job FROM procrastinate_jobs j WHERE j.id = cancel_prewarm.job_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown job %', coalesce(cancel_prewarm.job_id::text, 'NULL') USING ERRCODE = 'JD005';
    END IF;
    IF v_job.task_name <> 'jobdaemon.prewarm' THEN
        RAISE EXCEPTION 'job % is no prewarm%', v_job.id, CASE WHEN v_job.args ? 'order_id'
            THEN ': cancel its order, ' || left(v_job.args ->> 'order_id', 20) ELSE '' END USING ERRCODE = 'JD005';
    END IF;
    IF v_job.status = 'todo' THEN
        UPDATE procrastinate_jobs j SET status = 'cancelled' WHERE j.id = v_job.id;
        RETURN 'cancelled';
    END IF;
    -- The trigger tells its daemon. What would run again after a death or a retry ends instead.
    UPDATE procrastinate_jobs j SET abort_requested = true
        WHERE j.id = v_job.id AND j.status = 'doing' AND NOT j.abort_requested;
    RETURN v_job.status;
END;
$$;

-- Whether this worker's lease holds, by its last heartbeat; of one that names no lease, whether it spoke within 30 s. When it does
-- not, its jobs are another daemon's to rescue.
CREATE FUNCTION is_beating(p_worker procrastinate_workers) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT p_worker.last_heartbeat > now() - coalesce(p_worker.lease, interval '30 seconds')
$$;

-- As in 0008, and a daemon counts while its lease holds.
CREATE OR REPLACE FUNCTION queue_service(p_queue text, OUT daemons bigint, OUT slots bigint, OUT draining bigint)
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT count(*) FILTER (WHERE d.status = 'running'),
        coalesce(sum(coalesce(q.team_size, (d.queues ->> p_queue)::integer)) FILTER (WHERE d.status = 'running'), 0),
        count(*) FILTER (WHERE d.status = 'draining')
    FROM daemons d
    JOIN procrastinate_workers w ON w.id = d.id
    LEFT JOIN queues q ON q.name = p_queue
    WHERE d.status IN ('running', 'draining') AND d.queues ? p_queue AND is_beating(w);
$$;

-- As in 0019, and a daemon counts while its lease holds.
CREATE OR REPLACE FUNCTION key_is_held(p_provider text, p_alias text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(bool_or(d.keys IS NULL OR coalesce(d.keys -> p_provider, '[]') ? p_alias), true)
    FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
    WHERE d.status IN ('running', 'draining') AND d.queues ? ('generate.' || p_provider)
        AND is_beating(w)
$$;

-- Of the daemons that have this key the one that spoke last, and for how long it has said nothing, where that is more than half its
-- lease: from then on it claims nothing.
CREATE FUNCTION key_silence(p_provider text, p_alias text, OUT daemon_id bigint, OUT seconds integer)
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT l.id, extract(epoch FROM l.silent)::integer
    FROM (SELECT d.id, now() - w.last_heartbeat AS silent, w.lease FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
        WHERE d.status IN ('running', 'draining') AND d.queues ? ('generate.' || p_provider)
            AND (d.keys IS NULL OR coalesce(d.keys -> p_provider, '[]') ? p_alias) AND is_beating(w)
        ORDER BY w.last_heartbeat DESC LIMIT 1) AS l
    WHERE l.silent > l.lease / 2
$$;

-- As in 0019, and a key whose daemon says nothing any more.
CREATE OR REPLACE FUNCTION keys_in_the_way(p_job procrastinate_jobs, OUT told text, OUT numbers jsonb) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    WITH provider AS (
        SELECT substr(p_job.queue_name, length('generate.') + 1) AS name
    ), known AS (
        SELECT k.alias, k.paused, k.concurrency, k.rate, k.daily_budget, k.rested_until, k.rest_reason, k.next_start_at,
            k.alias = p_job.key_alias AS is_its_own,
            CASE WHEN k.spent_on = (now() AT TIME ZONE 'UTC')::date THEN k.spent ELSE 0 END AS spent_today,
            (SELECT count(*) FROM procrastinate_jobs j
                WHERE j.queue_name = p_job.queue_name AND j.status = 'doing' AND j.key_alias = k.alias) AS in_use,
            CASE jsonb_typeof(p_job.args -> 'images') WHEN 'array' THEN jsonb_array_length(p_job.args -> 'images') ELSE 1 END AS wanted,
            ((now() AT TIME ZONE 'UTC')::date + 1)::timestamp AT TIME ZONE 'UTC' AS midnight
        FROM provider_keys k WHERE p_job.queue_name = 'generate.' || k.provider
    ), judged AS (
        SELECT k.*, silence.daemon_id AS silent_daemon, silence.seconds AS silent_s,
            CASE WHEN silence.daemon_id IS NOT NULL OR NOT key_is_held(provider.name, k.alias) THEN 'missing'
                WHEN k.paused AND NOT its.own THEN 'paused'
                WHEN k.spent_today + k.wanted > k.daily_budget AND NOT its.own THEN 'budget'
                WHEN k.rested_until > now() THEN 'resting'
                WHEN k.in_use >= k.concurrency THEN 'concurrency'
                WHEN k.rate IS NOT NULL AND k.next_start_at > now() AND NOT its.own THEN 'rate' END AS in_the_way
        FROM known k CROSS JOIN provider CROSS JOIN LATERAL (SELECT coalesce(k.is_its_own, false) AS own) AS its
            CROSS JOIN LATERAL key_silence(provider.name, k.alias) AS silence
        WHERE its.own OR NOT EXISTS (SELECT FROM known other WHERE other.is_its_own)
    ), named AS (
        SELECT n.alias, row_number() OVER (ORDER BY n.alias) AS place,
            CASE n.in_the_way WHEN 'missing' THEN CASE WHEN n.silent_daemon IS NULL
                    THEN format('%s is in the settings of no running daemon', n.alias)
                    ELSE format('%s is held by daemon %s, which has said nothing for %s s', n.alias, n.silent_daemon, n.silent_s) END
                WHEN 'paused' THEN format('%s is paused', n.alias)
                WHEN 'budget' THEN CASE WHEN n.spent_today >= n.daily_budget
                    THEN format('%s has spent its budget of %s images for today, until %s', n.alias, n.daily_budget,
                        utc_text(n.midnight))
                    ELSE format('%s has %s of its %s images for today left until %s, and this job asks for %s', n.alias,
                        n.daily_budget - n.spent_today, n.daily_budget, utc_text(n.midnight), n.wanted) END
                WHEN 'resting' THEN format('%s rests until %s', n.alias, utc_text(n.rested_until))
                    || coalesce(' (' || left(n.rest_reason, 100) || ')', '')
                WHEN 'concurrency' THEN format('%s runs as many calls as it may (running %s, limit %s)', n.alias, n.in_use,
                    n.concurrency)
                WHEN 'rate' THEN format('%s may start its next call at %s', n.alias, utc_text(n.next_start_at)) END AS told,
            jsonb_strip_nulls(jsonb_build_object('alias', n.alias, 'reason', n.in_the_way)
                || CASE n.in_the_way
                    WHEN 'missing' THEN jsonb_build_object('daemon_id', n.silent_daemon, 'silent_seconds', n.silent_s)
                    WHEN 'budget' THEN jsonb_build_object('budget', n.daily_budget, 'spent', n.spent_today, 'until', n.midnight)
                    WHEN 'resting' THEN jsonb_build_object('until', n.rested_until, 'why', left(n.rest_reason, 100))
                    WHEN 'concurrency' THEN jsonb_build_object('running', n.in_use, 'limit', n.concurrency)
                    WHEN 'rate' THEN jsonb_build_object('until', n.next_start_at) ELSE '{}' END) AS numbers,
            n.is_its_own
        FROM judged n
    )
    SELECT CASE WHEN bool_or(n.is_its_own) THEN 'its call is to be collected with the key it was bought with: '
                ELSE format('no key of %s can start a call now: ', min(p.name)) END
            || string_agg(n.told, ', ' ORDER BY n.alias) FILTER (WHERE n.place <= 5)
            || CASE WHEN count(*) > 5 THEN format(', and %s more', count(*) - 5) ELSE '' END,
        jsonb_build_object('provider', min(p.name), 'keys', jsonb_agg(n.numbers ORDER BY n.alias))
    FROM named n CROSS JOIN provider p
    HAVING count(*) > 0 AND count(n.told) = count(*);
$$;

-- As in 0015, and of a job whose daemon says nothing any more that it does not.
CREATE OR REPLACE FUNCTION explained(p_job procrastinate_jobs) RETURNS TABLE (reason text, told text, numbers jsonb)
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF p_job.status = 'todo' THEN
        RETURN QUERY SELECT r.reason, r.told, r.numbers FROM job_reasons(p_job) AS r;
    ELSIF p_job.status = 'doing' THEN
        RETURN QUERY SELECT 'running', CASE WHEN NOT is_beating(w) THEN 'it ran' ELSE 'it runs' END
                || coalesce(format(' on %s (daemon %s)', d.host, d.id), '') || coalesce(' since ' || utc_text(s.at), '')
                || CASE WHEN NOT is_beating(w) THEN format('; that daemon %s, and another one takes it over', silence.told)
                    WHEN silence.seconds > extract(epoch FROM w.lease) / 2
                    THEN format('; that daemon %s: if it is dead another one takes it over', silence.told) ELSE '' END,
            jsonb_strip_nulls(jsonb_build_object('daemon_id', p_job.worker_id, 'host', d.host, 'started_at', s.at,
                'attempt', p_job.attempts + 1,
                'silent_seconds', CASE WHEN silence.seconds > extract(epoch FROM w.lease) / 2 THEN silence.seconds END))
            FROM (SELECT max(e.at) AS at FROM procrastinate_events e WHERE e.job_id = p_job.id AND e.type = 'started') AS s
            LEFT JOIN daemons d ON d.id = p_job.worker_id
            LEFT JOIN procrastinate_workers w ON w.id = p_job.worker_id
            CROSS JOIN LATERAL (SELECT m.seconds, coalesce(format('has said nothing for %s s', m.seconds), 'has stopped') AS told
                FROM (SELECT CASE WHEN isfinite(w.last_heartbeat) THEN extract(epoch FROM now() - w.last_heartbeat)::integer END
                    AS seconds) AS m) AS silence;
    ELSIF p_job.status = 'failed' THEN
        RETURN QUERY SELECT 'given_up', 'it was given up' || coalesce(': ' || left(a.error, 200), ''),
            jsonb_strip_nulls(jsonb_build_object('attempts', p_job.attempts, 'error_kind', a.error_kind, 'error', a.error))
            FROM (SELECT 1) AS one
            LEFT JOIN LATERAL (SELECT * FROM attempts a WHERE a.job_id = p_job.id ORDER BY a.id DESC LIMIT 1) AS a ON true;
    ELSE
        RETURN QUERY SELECT 'ended', format('it has ended: %s', p_job.status), '{}'::jsonb;
    END IF;
    IF p_job.status IN ('todo', 'doing', 'failed') AND p_job.task_name = 'jobdaemon.generate'
        AND jsonb_typeof(p_job.args -> 'tried') = 'array'
    THEN
        -- A batch that was cut smaller has jobs that were never in the other queue: the order's last move speaks for them.
        RETURN QUERY SELECT 'moved', coalesce('it was ' || left(a.error, 300),
                format('it was moved from %s', p_job.args -> 'tried' ->> -1)),
            jsonb_strip_nulls(jsonb_build_object('tried', p_job.args -> 'tried', 'since', a.ended_at))
            FROM (SELECT 1) AS one
            LEFT JOIN LATERAL (SELECT * FROM attempts a
                WHERE a.order_id = (p_job.args ->> 'order_id')::bigint AND a.outcome = 'moved'
                    AND a.queue = 'generate.' || (p_job.args -> 'tried' ->> -1)
                ORDER BY a.job_id <> p_job.id, a.id DESC LIMIT 1) AS a ON true;
    END IF;
END;
$$;

-- As in 0014, and nothing runs on a daemon whose lease has lapsed.
CREATE OR REPLACE FUNCTION order_waits_for(p_order bigint) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_job procrastinate_jobs;
    v_told text;
BEGIN
    -- The job that may come first.
    SELECT j.* INTO v_job FROM procrastinate_jobs j
        WHERE (j.args ->> 'order_id')::bigint = p_order AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('todo', 'doing')
        ORDER BY (j.status = 'doing') DESC, j.scheduled_at NULLS FIRST, j.priority DESC, j.id
        LIMIT 1;
    IF v_job.id IS NULL THEN
        RETURN 'it has no open job: nothing happens by itself any more';
    ELSIF v_job.status = 'doing' THEN
        SELECT j.* INTO v_job FROM procrastinate_jobs j JOIN procrastinate_workers w ON w.id = j.worker_id
            WHERE (j.args ->> 'order_id')::bigint = p_order AND j.task_name LIKE 'jobdaemon.%' AND j.status = 'doing'
            ORDER BY is_beating(w) DESC, j.id LIMIT 1;
        IF EXISTS (SELECT FROM procrastinate_workers w WHERE w.id = v_job.worker_id AND NOT is_beating(w)) THEN
            SELECT e.told INTO v_told FROM explained(v_job) AS e WHERE e.reason = 'running';
        END IF;
        RETURN v_told;
    END IF;
    SELECT r.told INTO v_told FROM job_reasons(v_job, true) AS r LIMIT 1;
    RETURN v_told;
END;
$$;

-- As before, with cancel_prewarm.
CREATE OR REPLACE FUNCTION grant_roles() RETURNS void
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_function regprocedure;
    v_view regclass;
BEGIN
    -- Functions may be executed by everybody unless that is taken away.
    REVOKE ALL ON ALL FUNCTIONS IN SCHEMA jobdaemon FROM PUBLIC;
    IF to_regrole('jobdaemon_producer') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA jobdaemon TO jobdaemon_producer;
        FOR v_function IN SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'jobdaemon'::regnamespace
            AND p.proname IN ('enqueue_order', 'cancel_order', 'redrive', 'pause_queue', 'resume_queue', 'resize_queue',
                'drain_daemon', 'prioritize_order', 'pause_key', 'resume_key', 'prewarm', 'cancel_prewarm', 'clear_cache')
        LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO jobdaemon_producer', v_function);
        END LOOP;
    END IF;
    IF to_regrole('jobdaemon_reader') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA jobdaemon TO jobdaemon_reader;
        FOR v_view IN SELECT c.oid::regclass FROM pg_class c
            WHERE c.relnamespace = 'jobdaemon'::regnamespace AND c.relkind = 'v'
        LOOP
            EXECUTE format('GRANT SELECT ON %s TO jobdaemon_reader', v_view);
        END LOOP;
        -- A view reads tables as its owner but calls functions as its reader.
        FOR v_function IN SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'jobdaemon'::regnamespace
            AND p.proname IN ('order_waits_for', 'explain_order', 'explain_job')
        LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO jobdaemon_reader', v_function);
        END LOOP;
    END IF;
    IF to_regrole('jobdaemon_daemon') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA jobdaemon TO jobdaemon_daemon;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA jobdaemon TO jobdaemon_daemon;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA jobdaemon TO jobdaemon_daemon;
        GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA jobdaemon TO jobdaemon_daemon;
    END IF;
END;
$$;
