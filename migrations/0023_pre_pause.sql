-- A claim reads its queue's row and then looks for jobs, a moment later: it may see jobs that came after the row had changed. Whoever
-- has been told that a queue is paused, or what its limit is now, may count on it for all that he enqueues from then on; and a
-- queue's first limit counts what is being claimed without one.

-- squawk-ignore renaming-object
ALTER FUNCTION pick_jobs(queues, integer, bigint[]) RENAME TO pick_ready_jobs;

-- Locks and returns up to p_limit ready jobs of this queue, none of p_except; none at all when an operator has changed the queue
-- meanwhile: the change has told every daemon to claim again.
CREATE FUNCTION pick_jobs(p_queue queues, p_limit integer, p_except bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_ids bigint[] := pick_ready_jobs(p_queue, p_limit, p_except);
BEGIN
    -- This statement sees whatever was there when the jobs were picked.
    IF cardinality(v_ids) > 0 AND NOT EXISTS (SELECT FROM queues q
        WHERE q.name = p_queue.name AND q.paused = p_queue.paused AND q.cluster_limit IS NOT DISTINCT FROM p_queue.cluster_limit)
    THEN
        RETURN '{}';
    END IF;
    RETURN v_ids;
END;
$$;

-- Whether claims of this queue wait for each other, so as to count exactly what runs.
CREATE FUNCTION claims_one_by_one(p_queue queues) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT p_queue.cluster_limit IS NOT NULL OR p_queue.adaptive_limit IS NOT NULL OR p_queue.fair_share IS NOT NULL
        OR p_queue.circuit <> 'closed'
$$;

-- Up to p_limit ready jobs of one queue start under this worker; one token for all of them. Needs READ COMMITTED. None
-- when the queue changes meanwhile: that has told every daemon to claim again.
-- p_keys: aliases of the keys whose secrets this worker has; NULL: the queue's provider knows no keys.
CREATE OR REPLACE FUNCTION claim_jobs(p_queue text, p_worker bigint, p_limit integer, p_keys text[] DEFAULT NULL)
RETURNS TABLE (id bigint, task_name character varying, priority integer, args jsonb, attempts integer, deaths smallint,
    token bigint, key_alias text, opens_in_s double precision)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue queues;
    v_is_alone boolean;
    v_limit integer;
    v_ids bigint[];
    v_token bigint;
BEGIN
    SELECT * INTO v_queue FROM queues q WHERE q.name = p_queue;
    v_is_alone := claims_one_by_one(v_queue) OR p_keys IS NOT NULL;
    IF v_is_alone THEN
        PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);
    ELSE
        -- Should the queue get its first limit now, whoever counts waits for what is claimed here without one.
        PERFORM pg_advisory_xact_lock_shared(1784835684, v_queue.id);
    END IF;
    SELECT * INTO v_queue FROM queues q WHERE q.name = p_queue;
    IF claims_one_by_one(v_queue) AND NOT v_is_alone THEN
        RETURN;
    END IF;
    -- Only here: the lease may have lapsed while we waited for the lock.
    PERFORM require_lease(p_worker);
    v_limit := queue_capacity(v_queue, p_limit);
    IF v_queue.name IS NULL OR v_limit IS NULL OR v_limit <= 0 THEN
        RETURN;
    END IF;
    IF p_keys IS NOT NULL THEN
        RETURN QUERY SELECT * FROM claim_keyed_jobs(v_queue, p_worker, v_limit, p_keys);
        RETURN;
    END IF;
    v_ids := pick_jobs(v_queue, v_limit, '{}');
    IF cardinality(v_ids) = 0 THEN
        RETURN;
    END IF;
    v_token := nextval('attempt_token_seq');
    RETURN QUERY UPDATE procrastinate_jobs j
        SET status = 'doing', worker_id = p_worker, token = v_token, key_alias = NULL
        WHERE j.id = ANY (v_ids)
        RETURNING j.id, j.task_name, j.priority, j.args, j.attempts, j.deaths, j.token, j.key_alias, NULL::double precision;
END;
$$;
