-- The claim, in three parts: how many jobs of a queue may start now, which ones, and the update that starts them.

-- How many of p_asked jobs of this queue may start now. Called under the queue's lock when the queue has any limit, in a statement
-- of its own after it: under READ COMMITTED only a new statement sees what the previous holder of the lock committed.
CREATE FUNCTION queue_capacity(p_queue queues, p_asked integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_asked bigint := p_asked;
    v_running bigint;
    v_probes bigint;
BEGIN
    IF p_queue.paused OR p_queue.rested_until > clock_timestamp()
        OR (p_queue.circuit = 'open' AND p_queue.circuit_until > clock_timestamp())
    THEN
        RETURN 0;
    END IF;
    IF p_queue.cluster_limit IS NULL AND p_queue.adaptive_limit IS NULL AND p_queue.circuit = 'closed' THEN
        RETURN p_asked;
    END IF;
    -- Counted in the jobs themselves: a second table of leases leaks through procrastinate's own functions.
    SELECT count(*), count(*) FILTER (WHERE j.token > p_queue.circuit_token) INTO v_running, v_probes
        FROM procrastinate_jobs j WHERE j.queue_name = p_queue.name AND j.status = 'doing';
    IF p_queue.circuit <> 'closed' THEN
        -- One job at a time over all daemons tries whether the other side is back; what was claimed earlier does not count.
        v_asked := least(v_asked, 1 - v_probes);
        IF p_queue.circuit = 'open' AND v_asked > 0 THEN
            -- An operator who holds the row must not hold up the claim.
            UPDATE queues q SET circuit = 'probing' WHERE q.name = (SELECT held.name FROM queues held
                WHERE held.name = p_queue.name AND held.circuit = 'open' FOR NO KEY UPDATE SKIP LOCKED);
        END IF;
    END IF;
    RETURN greatest(least(v_asked, p_queue.cluster_limit - v_running, p_queue.adaptive_limit - v_running), 0);
END;
$$;

-- Locks and returns up to p_limit ready jobs of this queue: highest priority first, then oldest order, then oldest job; one job per
-- lock, and none whose lock is held (the unique index on running locks is the last word). A fair share and lifted work have more to
-- say: pick_shared_jobs.
CREATE FUNCTION pick_jobs(p_queue queues, p_limit integer) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_ids bigint[] := '{}';
    v_has_lifted boolean;
BEGIN
    FOR v_try IN 1..2 LOOP
        v_has_lifted := EXISTS (SELECT FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority >= lifted_priority());
        IF v_has_lifted OR p_queue.fair_share IS NOT NULL THEN
            RETURN pick_shared_jobs(p_queue, p_limit, v_has_lifted);
        END IF;
        v_ids := ARRAY(
            SELECT c.id FROM (
                SELECT ready.id, row_number() OVER (PARTITION BY coalesce(ready.lock, ready.id::text)
                    ORDER BY ready.priority DESC, ready.order_id, ready.id) AS place
                FROM (
                    SELECT j.id, j.priority, j.lock,
                        CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END AS order_id
                    FROM procrastinate_jobs j
                    WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                        -- what was lifted since we looked has its own way
                        AND j.priority < lifted_priority()
                        AND (j.lock IS NULL OR NOT EXISTS (
                            SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
                    ORDER BY j.priority DESC,
                        (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
                    LIMIT p_limit
                    FOR UPDATE OF j SKIP LOCKED
                ) AS ready
            ) AS c WHERE c.place = 1);
        EXIT WHEN cardinality(v_ids) > 0;
    END LOOP;
    RETURN v_ids;
END;
$$;

-- Up to p_limit ready jobs of one queue start under this worker; one token for all of them. Needs READ COMMITTED.
CREATE FUNCTION claim_jobs(p_queue text, p_worker bigint, p_limit integer)
RETURNS TABLE (id bigint, task_name character varying, priority integer, args jsonb, attempts integer, deaths smallint, token bigint)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue queues;
    v_limit integer;
    v_ids bigint[];
    v_token bigint;
BEGIN
    SELECT * INTO v_queue FROM queues q WHERE q.name = p_queue;
    IF v_queue.cluster_limit IS NOT NULL OR v_queue.adaptive_limit IS NOT NULL OR v_queue.fair_share IS NOT NULL
        OR v_queue.circuit <> 'closed'
    THEN
        PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);
        SELECT * INTO v_queue FROM queues q WHERE q.name = p_queue;
    END IF;
    v_limit := queue_capacity(v_queue, p_limit);
    IF v_queue.name IS NULL OR v_limit IS NULL OR v_limit <= 0 THEN
        RETURN;
    END IF;
    v_ids := pick_jobs(v_queue, v_limit);
    IF cardinality(v_ids) = 0 THEN
        RETURN;
    END IF;
    v_token := nextval('attempt_token_seq');
    RETURN QUERY UPDATE procrastinate_jobs j
        SET status = 'doing', worker_id = p_worker, token = v_token
        WHERE j.id = ANY (v_ids)
        RETURNING j.id, j.task_name, j.priority, j.args, j.attempts, j.deaths, j.token;
END;
$$;

-- Lets due jobs into the hot index. Compares with now(), never clock_timestamp(): that one is volatile and
-- keeps the planner from the index. Returns how many, and when the next one falls due.
CREATE FUNCTION promote_jobs(p_limit integer) RETURNS TABLE (promoted integer, next_due timestamptz)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_ids bigint[];
BEGIN
    v_ids := ARRAY(SELECT j.id FROM procrastinate_jobs j JOIN queues q ON q.name = j.queue_name
        WHERE j.status = 'todo' AND j.scheduled_at IS NOT NULL AND j.scheduled_at <= now()
        ORDER BY j.scheduled_at LIMIT p_limit FOR UPDATE OF j SKIP LOCKED);
    IF cardinality(v_ids) > 0 THEN
        UPDATE procrastinate_jobs j SET scheduled_at = NULL WHERE j.id = ANY (v_ids);
        PERFORM pg_notify('jobdaemon_jobs', woken.queue_name)
            FROM (SELECT DISTINCT j.queue_name FROM procrastinate_jobs j WHERE j.id = ANY (v_ids)) AS woken;
    END IF;
    RETURN QUERY SELECT cardinality(v_ids), (
        SELECT j.scheduled_at FROM procrastinate_jobs j JOIN queues q ON q.name = j.queue_name
        WHERE j.status = 'todo' AND j.scheduled_at IS NOT NULL AND j.scheduled_at > now()
        ORDER BY j.scheduled_at LIMIT 1);
END;
$$;
