-- A claim reads its queue's row and then looks for jobs, a moment later: it may see jobs that came after the row had changed. Whoever
-- has been told that a queue is paused, or what its limit is now, may count on it for all that he enqueues from then on.

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
