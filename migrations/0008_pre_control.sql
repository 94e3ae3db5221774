-- Live control: what operators change while daemons work, and why an order waits. Every change reaches every daemon by a
-- notification on jobdaemon_control; a plain UPDATE of queues or of daemons.status does too.

-- An operator's own priority holds for the jobs that follow, whatever the stages saw.
ALTER TABLE orders ADD COLUMN prioritized boolean NOT NULL DEFAULT false;

-- What queues may hold. Asked by resize_queue and, for plain UPDATEs, by the trigger: a sentence instead of a constraint's name.
CREATE FUNCTION require_queue_limits(p_team_size bigint, p_cluster_limit bigint, p_fair_share bigint) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    IF p_team_size NOT BETWEEN 0 AND 10000 THEN
        RAISE EXCEPTION 'a team size must be 0 to 10000, not %', p_team_size USING ERRCODE = 'JD004';
    END IF;
    IF p_cluster_limit NOT BETWEEN 0 AND 100000 THEN
        RAISE EXCEPTION 'a cluster limit must be 0 to 100000, not %', p_cluster_limit USING ERRCODE = 'JD004';
    END IF;
    IF p_fair_share NOT BETWEEN 1 AND 100000 THEN
        RAISE EXCEPTION 'a fair share must be 1 to 100000, not %', p_fair_share USING ERRCODE = 'JD004';
    END IF;
END;
$$;

CREATE FUNCTION queues_changed() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    IF NEW.paused IS NULL THEN
        RAISE EXCEPTION 'paused must be true or false, not NULL' USING ERRCODE = 'JD004';
    END IF;
    PERFORM require_queue_limits(NEW.team_size, NEW.cluster_limit, NEW.fair_share);
    -- Not now(): of two operators the one who came later may have begun earlier.
    NEW.updated_at := clock_timestamp();
    PERFORM pg_notify('jobdaemon_control', NEW.name);
    RETURN NEW;
END;
$$;

CREATE TRIGGER queues_changed BEFORE UPDATE ON queues FOR EACH ROW EXECUTE FUNCTION queues_changed();

CREATE FUNCTION daemon_changed() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    PERFORM pg_notify('jobdaemon_control', 'daemon ' || NEW.id);
    RETURN NULL;
END;
$$;
CREATE TRIGGER daemon_changed AFTER UPDATE ON daemons FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION daemon_changed();

-- Who serves a queue now: daemons that claim from it, their slots in all, and those that only run out. A daemon counts while its
-- heartbeat is at most 30 s old.
CREATE FUNCTION queue_service(p_queue text, OUT daemons bigint, OUT slots bigint, OUT draining bigint)
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT count(*) FILTER (WHERE d.status = 'running'),
        coalesce(sum(coalesce(q.team_size, (d.queues ->> p_queue)::integer)) FILTER (WHERE d.status = 'running'), 0),
        count(*) FILTER (WHERE d.status = 'draining')
    FROM daemons d
    JOIN procrastinate_workers w ON w.id = d.id
    LEFT JOIN queues q ON q.name = p_queue
    WHERE d.status IN ('running', 'draining') AND d.queues ? p_queue AND w.last_heartbeat > now() - interval '30 seconds';
$$;

-- What a queue is set to, in words; what the functions below answer.
CREATE FUNCTION queue_answer(p_queue queues) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_service record;
BEGIN
    SELECT * INTO v_service FROM queue_service(p_queue.name);
    RETURN format('queue %s is %s: %s, %s%s%s', p_queue.name,
        CASE WHEN p_queue.paused THEN 'paused' ELSE 'open' END,
        coalesce('team size ' || p_queue.team_size, 'each daemon''s own team size'),
        coalesce('cluster limit ' || p_queue.cluster_limit, 'no cluster limit'),
        coalesce(', fair share ' || p_queue.fair_share, ''),
        CASE WHEN v_service.daemons > 0 THEN ''
            WHEN v_service.draining > 0 THEN '; every daemon that serves it is draining'
            ELSE '; no daemon serves it now' END);
END;
$$;

CREATE FUNCTION pause_queue(name text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_queue queues;
BEGIN
    UPDATE queues q SET paused = true WHERE q.name = pause_queue.name RETURNING * INTO v_queue;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown queue "%"', left(coalesce(pause_queue.name, ''), 128) USING ERRCODE = 'JD005';
    END IF;
    RETURN queue_answer(v_queue);
END;
$$;

CREATE FUNCTION resume_queue(name text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_queue queues;
BEGIN
    UPDATE queues q SET paused = false WHERE q.name = resume_queue.name RETURNING * INTO v_queue;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown queue "%"', left(coalesce(resume_queue.name, ''), 128) USING ERRCODE = 'JD005';
    END IF;
    RETURN queue_answer(v_queue);
END;
$$;

-- NULL leaves a value as it is; one that is named in unset goes back to none. Two at once: each value is the last one's.
CREATE FUNCTION resize_queue(
    name text,
    team_size bigint DEFAULT NULL,
    cluster_limit bigint DEFAULT NULL,
    fair_share bigint DEFAULT NULL,
    unset text[] DEFAULT '{}'
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue queues;
    v_unset text[] := coalesce(resize_queue.unset, '{}');
    v_bad text;
BEGIN
    PERFORM require_queue_limits(resize_queue.team_size, resize_queue.cluster_limit, resize_queue.fair_share);
    SELECT coalesce(u.name, 'NULL') INTO v_bad FROM unnest(v_unset) AS u (name)
        WHERE u.name IS NULL OR u.name NOT IN ('team_size', 'cluster_limit', 'fair_share') LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'cannot unset "%": only team_size, cluster_limit and fair_share', left(v_bad, 64) USING ERRCODE = 'JD004';
    END IF;
    SELECT g.name INTO v_bad FROM (VALUES ('team_size', resize_queue.team_size), ('cluster_limit', resize_queue.cluster_limit),
        ('fair_share', resize_queue.fair_share)) AS g (name, value) WHERE g.value IS NOT NULL AND g.name = ANY (v_unset) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '% is given and unset at once', v_bad USING ERRCODE = 'JD004';
    END IF;
    UPDATE queues q SET
        team_size = CASE WHEN 'team_size' <> ALL (v_unset) THEN coalesce(resize_queue.team_size, q.team_size) END,
        cluster_limit = CASE WHEN 'cluster_limit' <> ALL (v_unset) THEN coalesce(resize_queue.cluster_limit, q.cluster_limit) END,
        fair_share = CASE WHEN 'fair_share' <> ALL (v_unset) THEN coalesce(resize_queue.fair_share, q.fair_share) END
        WHERE q.name = resize_queue.name RETURNING * INTO v_queue;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown queue "%"', left(coalesce(resize_queue.name, ''), 128) USING ERRCODE = 'JD005';
    END IF;
    RETURN queue_answer(v_queue);
END;
$$;

-- The daemon claims nothing more, and lives on; what it runs, runs out. Returns its status: a stopped one stays stopped.
CREATE FUNCTION drain_daemon(id bigint, undo boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_status text;
BEGIN
    SELECT d.status INTO v_status FROM daemons d WHERE d.id = drain_daemon.id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown daemon %', coalesce(drain_daemon.id::text, 'NULL') USING ERRCODE = 'JD005';
    END IF;
    IF v_status IN ('running', 'draining') THEN
        v_status := CASE WHEN coalesce(drain_daemon.undo, false) THEN 'running' ELSE 'draining' END;
        UPDATE daemons d SET status = v_status WHERE d.id = drain_daemon.id AND d.status <> v_status;
    END IF;
    RETURN v_status;
END;
$$;

-- Sets an open order's priority, that of its jobs which have not ended, and that of the jobs which follow. Returns how many wait.
CREATE FUNCTION prioritize_order(id bigint, priority bigint) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_status text;
    v_jobs bigint[];
    v_waiting integer;
BEGIN
    IF prioritize_order.priority IS NULL OR prioritize_order.priority NOT BETWEEN -1000000 AND 1000000 THEN
        RAISE EXCEPTION 'a priority must be -1000000 to 1000000, not %', coalesce(prioritize_order.priority::text, 'NULL')
            USING ERRCODE = 'JD004';
    END IF;
    SELECT o.status INTO v_status FROM orders o WHERE o.id = prioritize_order.id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown order %', coalesce(prioritize_order.id::text, 'NULL') USING ERRCODE = 'JD005';
    END IF;
    IF v_status IN ('completed', 'partial', 'failed', 'cancelled') THEN
        RAISE EXCEPTION 'order % has ended: it is %', prioritize_order.id, v_status USING ERRCODE = 'JD005';
    END IF;
    UPDATE orders o SET priority = prioritize_order.priority::integer, prioritized = true WHERE o.id = prioritize_order.id;
    -- Running and dead jobs too: they may wait again.
    v_jobs := ARRAY(SELECT j.id FROM procrastinate_jobs j
        WHERE (j.args ->> 'order_id')::bigint = prioritize_order.id AND j.task_name LIKE 'jobdaemon.%'
            AND j.status IN ('todo', 'doing', 'failed')
        ORDER BY j.id FOR UPDATE);
    UPDATE procrastinate_jobs j SET priority = prioritize_order.priority::integer WHERE j.id = ANY (v_jobs);
    SELECT count(*) INTO v_waiting FROM procrastinate_jobs j WHERE j.id = ANY (v_jobs) AND j.status = 'todo';
    RETURN v_waiting;
END;
$$;

-- Why an order waits. At most 1,000 jobs are counted, so that a listing of orders stays cheap; 1001 stands for more.

-- How many ready jobs of the queue go before this one: higher priority first, then older order, then older job. What a fair share
-- and the turns of lifted work change in that is left out.
CREATE FUNCTION jobs_before(p_job procrastinate_jobs) RETURNS integer
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_order bigint := CASE WHEN p_job.task_name LIKE 'jobdaemon.%' THEN (p_job.args ->> 'order_id')::bigint END;
    v_count integer;
BEGIN
    -- Each part is one stretch of the ready index.
    SELECT count(*) INTO v_count FROM (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_job.queue_name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority > p_job.priority
        LIMIT 1001) AS higher;
    IF v_count > 1000 THEN
        RETURN v_count;
    END IF;
    IF v_order IS NOT NULL THEN
        SELECT v_count + count(*) INTO v_count FROM (SELECT FROM procrastinate_jobs j
            WHERE j.queue_name = p_job.queue_name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority = p_job.priority
                AND ((CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id)
                    < (v_order, p_job.id)
            LIMIT 1001 - v_count) AS older;
        RETURN v_count;
    END IF;
    -- Work for no order comes after all that is for one.
    SELECT v_count + count(*) INTO v_count FROM (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_job.queue_name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority = p_job.priority
            AND (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END) IS NOT NULL
        LIMIT 1001 - v_count) AS ordered;
    SELECT v_count + count(*) INTO v_count FROM (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_job.queue_name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority = p_job.priority
            AND (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END) IS NULL
            AND j.id < p_job.id
        LIMIT 1001 - v_count) AS older;
    RETURN v_count;
END;
$$;

CREATE FUNCTION utc_text(p_at timestamptz) RETURNS text
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$ SELECT to_char(p_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') $$;

-- Why this job does not run, most decisive reason first: a word for programs, a phrase for people, and its numbers. p_first_only
-- stops at the first one, which then also says how many jobs go before.
CREATE FUNCTION job_reasons(p_job procrastinate_jobs, p_first_only boolean DEFAULT false)
RETURNS TABLE (reason text, told text, numbers jsonb)
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue queues;
    v_service record;
    v_last attempts;
    v_name text := p_job.queue_name;
    v_customer text COLLATE "C" := coalesce(CASE WHEN p_job.task_name LIKE 'jobdaemon.%' THEN p_job.args ->> 'customer' END, '');
    v_before integer;
    v_running integer;
    v_hindered boolean := false;
BEGIN
    SELECT * INTO v_queue FROM queues q WHERE q.name = v_name;
    IF v_queue.name IS NULL THEN
        RETURN QUERY SELECT 'unknown_queue', format('queue %s is not one of jobdaemon''s', v_name), '{}'::jsonb;
        RETURN;
    END IF;

    IF v_queue.paused THEN
        RETURN QUERY SELECT 'paused', format('queue %s is paused', v_name), '{}'::jsonb;
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    IF p_job.scheduled_at > now() THEN
        SELECT * INTO v_last FROM attempts a WHERE a.job_id = p_job.id ORDER BY a.id DESC LIMIT 1;
        RETURN QUERY SELECT
            CASE v_last.outcome WHEN 'retry' THEN 'retry' WHEN 'interrupted' THEN 'retry' WHEN 'snooze' THEN 'snooze'
                ELSE 'scheduled' END,
            CASE v_last.outcome
                WHEN 'retry' THEN format('a retry at %s in queue %s, after attempt %s failed: %s', utc_text(p_job.scheduled_at), v_name,
                    v_last.attempt, left(v_last.error, 200))
                WHEN 'interrupted' THEN format('a retry at %s in queue %s, after attempt %s was interrupted: %s',
                    utc_text(p_job.scheduled_at), v_name, v_last.attempt, left(v_last.error, 200))
                WHEN 'snooze' THEN format('its turn at %s in queue %s: %s', utc_text(p_job.scheduled_at), v_name, left(v_last.error, 200))
                ELSE format('scheduled until %s in queue %s', utc_text(p_job.scheduled_at), v_name) END,
            jsonb_strip_nulls(jsonb_build_object('until', p_job.scheduled_at, 'attempt', v_last.attempt,
                'error_kind', v_last.error_kind, 'error', v_last.error));
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    SELECT * INTO v_service FROM queue_service(v_name);
    IF v_service.daemons = 0 THEN
        RETURN QUERY SELECT CASE WHEN v_service.draining > 0 THEN 'draining' ELSE 'no_daemon' END,
            CASE WHEN v_service.draining > 0 THEN format('every daemon that serves queue %s is draining', v_name)
                ELSE format('no daemon serves queue %s', v_name) END,
            jsonb_build_object('draining', v_service.draining);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    ELSIF v_service.slots = 0 THEN
        RETURN QUERY SELECT 'team_size', format('the team size of queue %s is 0', v_name),
            jsonb_build_object('daemons', v_service.daemons, 'slots', 0);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    -- What waits for its time is not in the line.
    v_before := CASE WHEN p_job.scheduled_at IS NULL THEN jobs_before(p_job) END;
    IF v_queue.rested_until > now() THEN
        RETURN QUERY SELECT 'resting', format('queue %s rests until %s, as its provider asked', v_name,
            utc_text(v_queue.rested_until)) || before_text(v_before, p_first_only),
            jsonb_build_object('until', v_queue.rested_until);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_queue.circuit <> 'closed' THEN
        RETURN QUERY SELECT 'circuit', CASE WHEN v_queue.circuit = 'open' AND v_queue.circuit_until > now()
                THEN format('the circuit of queue %s is open until %s', v_name, utc_text(v_queue.circuit_until))
                ELSE format('the circuit of queue %s is open: one job at a time tries it', v_name) END
                || before_text(v_before, p_first_only),
            jsonb_strip_nulls(jsonb_build_object('circuit', v_queue.circuit, 'until', v_queue.circuit_until));
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    IF v_queue.fair_share IS NOT NULL AND v_customer <> '' COLLATE "C" THEN
        SELECT count(*) INTO v_running FROM procrastinate_jobs j
            WHERE j.queue_name = v_name AND j.status = 'doing' AND j.task_name LIKE 'jobdaemon.%'
                AND j.args ->> 'customer' = v_customer;
        -- It matters while somebody else waits.
        IF v_running >= v_queue.fair_share AND (
            EXISTS (SELECT FROM procrastinate_jobs j
                WHERE j.queue_name = v_name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" < v_customer)
            OR EXISTS (SELECT FROM procrastinate_jobs j
                WHERE j.queue_name = v_name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" > v_customer))
        THEN
            RETURN QUERY SELECT 'fair_share', format('its customer''s fair share of queue %s (%s of %s run)', v_name, v_running,
                v_queue.fair_share) || before_text(v_before, p_first_only),
                jsonb_build_object('running', v_running, 'limit', v_queue.fair_share);
            IF p_first_only THEN RETURN; END IF;
            v_hindered := true;
        END IF;
    END IF;
    SELECT count(*) INTO v_running FROM (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = v_name AND j.status = 'doing' LIMIT 10001) AS running;
    IF v_running >= v_queue.cluster_limit THEN
        RETURN QUERY SELECT 'cluster_limit', format('the cluster limit of queue %s (%s of %s run)', v_name, v_running,
            v_queue.cluster_limit) || before_text(v_before, p_first_only),
            jsonb_build_object('running', v_running, 'limit', v_queue.cluster_limit);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_running >= v_queue.adaptive_limit THEN
        RETURN QUERY SELECT 'adaptive_limit', format('the adaptive limit of queue %s (%s of %s run)', v_name, v_running,
            v_queue.adaptive_limit) || before_text(v_before, p_first_only),
            jsonb_build_object('running', v_running, 'limit', v_queue.adaptive_limit);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_service.slots > 0 AND v_running >= v_service.slots THEN
        RETURN QUERY SELECT 'slots', format('a free slot in queue %s (%s of %s taken)', v_name, v_running, v_service.slots)
            || before_text(v_before, p_first_only),
            jsonb_build_object('running', v_running, 'slots', v_service.slots, 'daemons', v_service.daemons);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF p_job.lock IS NOT NULL AND EXISTS (SELECT FROM procrastinate_jobs j WHERE j.lock = p_job.lock AND j.status = 'doing') THEN
        RETURN QUERY SELECT 'lock', 'a job that holds the same lock', '{}'::jsonb;
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_before > 0 AND NOT p_first_only THEN
        RETURN QUERY SELECT 'behind', format('%s of queue %s %s first', before_jobs(v_before), v_name,
            CASE WHEN v_before = 1 THEN 'goes' ELSE 'go' END),
            jsonb_build_object('jobs', least(v_before, 1000), 'or_more', v_before > 1000);
        v_hindered := true;
    END IF;
    IF NOT v_hindered THEN
        RETURN QUERY SELECT 'ready', format('a free slot in queue %s', v_name) || before_text(v_before, p_first_only), '{}'::jsonb;
    END IF;
END;
$$;

CREATE FUNCTION before_jobs(p_count integer) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$ SELECT CASE WHEN p_count = 1 THEN '1 job' WHEN p_count > 1000 THEN '1000+ jobs' ELSE p_count || ' jobs' END $$;

CREATE FUNCTION before_text(p_count integer, p_wanted boolean) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$ SELECT CASE WHEN p_wanted AND p_count > 0 THEN ', behind ' || before_jobs(p_count) ELSE '' END $$;

-- In one phrase why nothing of this order runs; NULL while something does. For the view.
CREATE FUNCTION order_waits_for(p_order bigint) RETURNS text
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
        RETURN 'nothing: no job of it is open';
    ELSIF v_job.status = 'doing' THEN
        RETURN NULL;
    END IF;
    SELECT r.told INTO v_told FROM job_reasons(v_job, true) AS r LIMIT 1;
    RETURN v_told;
END;
$$;

CREATE FUNCTION explained(p_job procrastinate_jobs) RETURNS TABLE (reason text, told text, numbers jsonb)
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF p_job.status = 'todo' THEN
        RETURN QUERY SELECT r.reason, r.told, r.numbers FROM job_reasons(p_job) AS r;
    ELSIF p_job.status = 'doing' THEN
        RETURN QUERY SELECT 'running', 'it runs' || coalesce(format(' on %s (daemon %s)', d.host, d.id), '')
                || coalesce(' since ' || utc_text(s.at), ''),
            jsonb_strip_nulls(jsonb_build_object('daemon_id', p_job.worker_id, 'host', d.host, 'started_at', s.at,
                'attempt', p_job.attempts + 1))
            FROM (SELECT max(e.at) AS at FROM procrastinate_events e WHERE e.job_id = p_job.id AND e.type = 'started') AS s
            LEFT JOIN daemons d ON d.id = p_job.worker_id;
    ELSIF p_job.status = 'failed' THEN
        RETURN QUERY SELECT 'given_up', 'it was given up' || coalesce(': ' || left(a.error, 200), ''),
            jsonb_strip_nulls(jsonb_build_object('attempts', p_job.attempts, 'error_kind', a.error_kind, 'error', a.error))
            FROM (SELECT 1) AS one
            LEFT JOIN LATERAL (SELECT * FROM attempts a WHERE a.job_id = p_job.id ORDER BY a.id DESC LIMIT 1) AS a ON true;
    ELSE
        RETURN QUERY SELECT 'ended', format('it has ended: %s', p_job.status), '{}'::jsonb;
    END IF;
END;
$$;

-- Why each open job of an order waits, and what was given up: a row for each reason. Nothing for an order that has ended well.
CREATE FUNCTION explain_order(id bigint)
RETURNS TABLE (job_id bigint, queue text, task text, status text, reason text, told text, numbers jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF NOT EXISTS (SELECT FROM orders o WHERE o.id = explain_order.id) THEN
        RAISE EXCEPTION 'unknown order %', coalesce(explain_order.id::text, 'NULL') USING ERRCODE = 'JD005';
    END IF;
    RETURN QUERY SELECT j.id, j.queue_name::text, j.task_name::text, j.status::text, e.reason, e.told, e.numbers
        FROM procrastinate_jobs j CROSS JOIN LATERAL explained(j) WITH ORDINALITY AS e (reason, told, numbers, place)
        WHERE (j.args ->> 'order_id')::bigint = explain_order.id AND j.task_name LIKE 'jobdaemon.%'
            AND j.status IN ('todo', 'doing', 'failed')
        ORDER BY j.id, e.place;
END;
$$;

CREATE FUNCTION explain_job(id bigint)
RETURNS TABLE (job_id bigint, queue text, task text, status text, reason text, told text, numbers jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT j.id, j.queue_name::text, j.task_name::text, j.status::text, e.reason, e.told, e.numbers
        FROM procrastinate_jobs j CROSS JOIN LATERAL explained(j) WITH ORDINALITY AS e (reason, told, numbers, place)
        WHERE j.id = explain_job.id
        ORDER BY e.place;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown job %', coalesce(explain_job.id::text, 'NULL') USING ERRCODE = 'JD005';
    END IF;
END;
$$;

CREATE VIEW order_progress AS
SELECT
    o.id AS order_id,
    o.customer,
    o.plan,
    o.status,
    o.images_total,
    o.images_stored,
    o.images_failed,
    ((o.images_stored + o.images_failed)::double precision / o.images_total) AS progress,
    o.created_at,
    o.first_image_at,
    o.finished_at,
    CASE WHEN o.finished_at IS NULL THEN order_waits_for(o.id) END AS waiting_for
FROM orders o;
