-- A daemon's own lease, and no fixed time, says when it is silent: with a lease of minutes one that is alive may say nothing for longer
-- than 30 s. (A program that names no lease is silent after 30 s, as before.)

-- As in 0019, and a daemon counts while its lease holds.
CREATE OR REPLACE FUNCTION key_is_held(p_provider text, p_alias text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(bool_or(d.keys IS NULL OR coalesce(d.keys -> p_provider, '[]') ? p_alias), true)
    FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
    WHERE d.status IN ('running', 'draining') AND d.queues ? ('generate.' || p_provider) AND is_beating(w)
$$;

-- As in 0021, and what could run counts a daemon's slots for its lease, 30 s at least: after an outage nobody has spoken for a while.
CREATE OR REPLACE FUNCTION lock_steering(p_queues text[], p_new text[])
RETURNS TABLE (queue text, adaptive_limit integer, rested_until timestamptz, circuit text, circuit_until timestamptz,
    circuit_token bigint, circuit_after integer, circuit_rest interval, circuit_rest_cap interval,
    limit_token bigint, limit_changed_at timestamptz, successes integer, step integer, signalled_at timestamptz, rests integer,
    opened integer, outages integer, outage_at timestamptz, running bigint, most bigint, newest_token bigint, now timestamptz)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue record;
BEGIN
    FOR v_queue IN SELECT q.id, q.name, q.adaptive_limit IS NOT NULL OR q.circuit <> 'closed' AS is_set FROM queues q WHERE q.name = ANY (p_queues) ORDER BY q.name LOOP
        PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);
        IF v_queue.is_set OR v_queue.name = ANY (p_new) THEN
            INSERT INTO queue_steering (queue) VALUES (v_queue.name) ON CONFLICT DO NOTHING;
            IF FOUND THEN
                PERFORM pg_notify('jobdaemon_control', v_queue.name);
            END IF;
        END IF;
        RETURN QUERY SELECT q.name, q.adaptive_limit, q.rested_until, q.circuit, q.circuit_until, q.circuit_token, q.circuit_after,
                q.circuit_rest, q.circuit_rest_cap, s.limit_token, s.limit_changed_at, s.successes, s.step, s.signalled_at, s.rests,
                s.opened, s.outages, s.outage_at,
                (SELECT count(*) FROM procrastinate_jobs j WHERE j.queue_name = q.name AND j.status = 'doing'
                    AND (j.released_token = j.token) IS NOT TRUE),
                least(q.cluster_limit::bigint, (SELECT sum(coalesce(q.team_size, (d.queues ->> q.name)::integer))
                    FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
                    WHERE d.status = 'running' AND d.queues ? q.name AND w.last_heartbeat > now() - greatest(w.lease, interval '30 seconds'))),
                nextval('attempt_token_seq'), clock_timestamp()
            FROM queue_steering s JOIN queues q ON q.name = s.queue WHERE s.queue = v_queue.name
            -- An operator who holds the row must not hold up every commit: this time nobody steers.
            FOR NO KEY UPDATE OF q, s SKIP LOCKED;
    END LOOP;
END;
$$;

-- As in 0003, and a daemon is silent once its lease has lapsed; spelled out, since who may read a view need not be allowed to call what it calls.
CREATE OR REPLACE VIEW workers AS
SELECT
    d.id AS daemon_id,
    d.host,
    d.pid,
    d.version,
    -- A daemon that died says nothing any more, least of all that it stopped.
    CASE WHEN d.status <> 'stopped'
            AND coalesce(w.last_heartbeat, '-infinity') < now() - coalesce(w.lease, interval '30 seconds')
        THEN 'silent' ELSE d.status END AS status,
    d.queues,
    d.started_at,
    -- -infinity is how a stopped daemon's lease ends at once
    CASE WHEN isfinite(w.last_heartbeat) THEN w.last_heartbeat END AS last_heartbeat,
    (SELECT count(*) FROM procrastinate_jobs j WHERE j.worker_id = d.id AND j.status = 'doing') AS running
FROM daemons d
LEFT JOIN procrastinate_workers w ON w.id = d.id;
