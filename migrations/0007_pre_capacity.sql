-- Limits that follow the provider: what the claim needs to know stands in queues, what the decision remembers in queue_steering.
-- The decisions themselves are Python (jobdaemon/domain/capacity.py).

ALTER TABLE queues
    -- nothing starts before: a provider asked for it
    ADD COLUMN rested_until timestamptz,
    -- an open circuit lets nothing start before; then one job at a time
    ADD COLUMN circuit_until timestamptz,
    -- jobs with a newer token were claimed since the circuit last opened
    ADD COLUMN circuit_token bigint NOT NULL DEFAULT 0,
    -- how many outages in a row open the circuit; 0 switches it off
    ADD COLUMN circuit_after integer NOT NULL DEFAULT 5 CHECK (circuit_after BETWEEN 0 AND 100000),
    -- how long it stays open at first, and at most
    ADD COLUMN circuit_rest interval NOT NULL DEFAULT '5 seconds' CHECK (circuit_rest > interval '0'),
    ADD COLUMN circuit_rest_cap interval NOT NULL DEFAULT '1 minute' CHECK (circuit_rest_cap > interval '0');

-- A row is there while a queue's successes are worth counting: it has an adaptive limit, or had an outage.
CREATE TABLE queue_steering (
    queue text PRIMARY KEY REFERENCES queues (name) ON DELETE CASCADE ON UPDATE CASCADE,
    limit_token bigint NOT NULL DEFAULT 0,
    limit_changed_at timestamptz,
    successes integer NOT NULL DEFAULT 0,
    step integer NOT NULL DEFAULT 0,
    signalled_at timestamptz,
    rests integer NOT NULL DEFAULT 0,
    opened integer NOT NULL DEFAULT 0,
    outages integer NOT NULL DEFAULT 0,
    outage_at timestamptz
);
COMMENT ON TABLE queue_steering IS 'What the adaptive limit and the circuit of a queue remember.';

-- Locks what steers these queues, and says how they are now. Comes last in the lock order: orders, jobs, images, queues by name.
-- The lock is the claim's own: no claim under way reads a limit that is being changed. Queues in p_new get a row when they have
-- none, and so do those that an operator limits by hand; every daemon hears of it and begins to count.
CREATE FUNCTION lock_steering(p_queues text[], p_new text[])
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
                (SELECT count(*) FROM procrastinate_jobs j WHERE j.queue_name = q.name AND j.status = 'doing'),
                least(q.cluster_limit::bigint, (SELECT sum(coalesce(q.team_size, (d.queues ->> q.name)::integer))
                    FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
                    WHERE d.status = 'running' AND d.queues ? q.name AND w.last_heartbeat > now() - interval '30 seconds')),
                nextval('attempt_token_seq'), clock_timestamp()
            FROM queue_steering s JOIN queues q ON q.name = s.queue WHERE s.queue = v_queue.name
            -- An operator who holds the row must not hold up every commit: this time nobody steers.
            FOR NO KEY UPDATE OF q, s SKIP LOCKED;
    END LOOP;
END;
$$;

-- Writes what a decision changed; a calm queue is forgotten. Where the claim's own columns stay as they are, nobody is woken.
CREATE FUNCTION save_steering(p_states jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_state queues;
    v_steering queue_steering;
    v_document jsonb;
BEGIN
    FOR v_document IN SELECT d.value FROM jsonb_array_elements(p_states) AS d ORDER BY d.value ->> 'queue' LOOP
        v_state := jsonb_populate_record(NULL::queues, v_document);
        v_steering := jsonb_populate_record(NULL::queue_steering, v_document);
        UPDATE queues q SET adaptive_limit = v_state.adaptive_limit, rested_until = v_state.rested_until,
            circuit = v_state.circuit, circuit_until = v_state.circuit_until, circuit_token = v_state.circuit_token
            WHERE q.name = v_steering.queue AND
                (q.adaptive_limit, q.rested_until, q.circuit, q.circuit_until, q.circuit_token) IS DISTINCT FROM
                (v_state.adaptive_limit, v_state.rested_until, v_state.circuit, v_state.circuit_until, v_state.circuit_token);
        IF (v_document ->> 'is_calm')::boolean THEN
            DELETE FROM queue_steering s WHERE s.queue = v_steering.queue;
        ELSE
            UPDATE queue_steering s SET limit_token = v_steering.limit_token, limit_changed_at = v_steering.limit_changed_at,
                successes = v_steering.successes, step = v_steering.step, signalled_at = v_steering.signalled_at,
                rests = v_steering.rests, opened = v_steering.opened, outages = v_steering.outages, outage_at = v_steering.outage_at
                WHERE s.queue = v_steering.queue;
        END IF;
    END LOOP;
END;
$$;
