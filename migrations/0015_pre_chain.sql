-- Provider calls of orders that ended are stopped; batches go on with another provider when theirs fails.

ALTER TABLE attempts
    -- The one that follows allows all that it allowed.
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT attempts_outcome_check,
    -- moved: the job went on in another provider's queue
    -- The runner applies each file in a transaction, and the constraint allows more than before.
    -- squawk-ignore constraint-missing-not-valid
    ADD CONSTRAINT attempts_outcome_check
        CHECK (outcome IN ('retry', 'snooze', 'handed_back', 'failed', 'cancelled', 'interrupted', 'moved'));

CREATE OR REPLACE VIEW failures AS
SELECT a.ended_at, a.queue, a.order_id, a.job_id, a.attempt, a.outcome, a.error_kind, a.error, a.daemon_id
FROM attempts a
WHERE a.outcome IN ('failed', 'retry', 'interrupted', 'moved');

-- Since when the circuit has not been closed, whatever it did meanwhile; NULL while it is.
ALTER TABLE queues ADD COLUMN circuit_since timestamptz;
UPDATE queues SET circuit_since = clock_timestamp() WHERE circuit <> 'closed';

CREATE FUNCTION circuit_turned() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    IF NEW.circuit = 'closed' THEN
        NEW.circuit_since := NULL;
    ELSIF OLD.circuit = 'closed' THEN
        NEW.circuit_since := clock_timestamp();
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER circuit_turned BEFORE UPDATE OF circuit ON queues FOR EACH ROW
    WHEN (OLD.circuit IS DISTINCT FROM NEW.circuit) EXECUTE FUNCTION circuit_turned();

-- Calls of these orders, which the caller holds and which have ended, that nobody goes on with: one with a task gets a job that
-- asks its provider to stop it, before everything else there; one without whose attempt is over was a lost submit. A dead letter's
-- calls wait for its redrive, unless its order was cancelled and has none. May be called again. Returns how many jobs it made.
CREATE FUNCTION abandon_calls(p_orders bigint[]) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_calls bigint[];
    v_jobs bigint[];
BEGIN
    UPDATE provider_calls c SET outcome = 'unknown', finished_at = coalesce(c.finished_at, now())
        FROM orders o
        WHERE c.order_id = ANY (p_orders) AND c.outcome IS NULL AND c.external_task_id IS NULL
            AND o.id = c.order_id AND o.finished_at IS NOT NULL
            AND NOT EXISTS (SELECT FROM procrastinate_jobs j WHERE j.id = c.job_id
                AND (j.status IN ('todo', 'doing') OR j.status = 'failed' AND o.status <> 'cancelled'));
    v_calls := ARRAY(
        SELECT c.id
        FROM provider_calls c JOIN orders o ON o.id = c.order_id
        WHERE c.order_id = ANY (p_orders) AND c.outcome IS NULL AND c.external_task_id IS NOT NULL AND o.finished_at IS NOT NULL
            AND NOT EXISTS (SELECT FROM procrastinate_jobs j WHERE j.id = c.job_id
                AND j.status = 'failed' AND o.status <> 'cancelled')
            AND NOT EXISTS (SELECT FROM procrastinate_jobs a
                WHERE (a.args ->> 'order_id')::bigint = c.order_id AND a.task_name LIKE 'jobdaemon.%'
                    AND a.status IN ('todo', 'doing') AND a.task_name = 'jobdaemon.abandon'
                    AND a.args -> 'call_id' = to_jsonb(c.id))
        ORDER BY c.id);
    IF cardinality(v_calls) > 0 THEN
        v_jobs := procrastinate_defer_jobs_v1(ARRAY(
            SELECT ROW('generate.' || c.provider, 'jobdaemon.abandon', lifted_priority() - 1, NULL, NULL,
                jsonb_build_object('order_id', c.order_id, 'call_id', c.id), NULL)::procrastinate_job_to_defer_v1
            FROM provider_calls c WHERE c.id = ANY (v_calls) ORDER BY c.id));
        -- It is nothing that is to be bought: it takes the call's own key, even when that is paused or has spent its budget.
        UPDATE procrastinate_jobs j SET key_alias = c.key_alias
            FROM provider_calls c WHERE j.id = ANY (v_jobs) AND c.id = (j.args ->> 'call_id')::bigint AND c.key_alias IS NOT NULL;
    END IF;
    RETURN cardinality(v_calls);
END;
$$;

-- As in 0011, and a job that stops a call asks with the key of that call.
CREATE OR REPLACE FUNCTION bought_with(p_job bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(
        (SELECT c.key_alias FROM provider_calls c
            WHERE c.job_id = p_job AND c.external_task_id IS NOT NULL AND c.outcome IS NULL
            ORDER BY c.id DESC LIMIT 1),
        (SELECT c.key_alias FROM procrastinate_jobs j
            JOIN provider_calls c ON c.id = CASE WHEN j.args ->> 'call' ~ '^[0-9]{1,18}$' THEN (j.args ->> 'call')::bigint END
            WHERE j.id = p_job AND c.external_task_id IS NOT NULL AND c.outcome IN ('succeeded', 'partial')),
        (SELECT c.key_alias FROM procrastinate_jobs j
            JOIN provider_calls c ON c.id = CASE WHEN j.args ->> 'call_id' ~ '^[0-9]{1,18}$' THEN (j.args ->> 'call_id')::bigint END
            WHERE j.id = p_job AND j.task_name = 'jobdaemon.abandon' AND c.external_task_id IS NOT NULL AND c.outcome IS NULL))
$$;

-- As in 0002, and what the order has bought is stopped where it can be.
CREATE OR REPLACE FUNCTION cancel_order(id bigint, remove_images boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_order orders;
    v_jobs bigint[];
    v_ended boolean;
BEGIN
    SELECT * INTO v_order FROM orders o WHERE o.id = cancel_order.id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown order %', cancel_order.id USING ERRCODE = 'JD005';
    END IF;
    v_ended := v_order.finished_at IS NOT NULL;
    IF NOT v_ended THEN
        v_jobs := ARRAY(SELECT j.id FROM procrastinate_jobs j
            WHERE (j.args ->> 'order_id')::bigint = cancel_order.id AND j.task_name LIKE 'jobdaemon.%'
                AND j.status IN ('todo', 'doing', 'failed')
            ORDER BY j.id FOR UPDATE);
        UPDATE procrastinate_jobs j SET status = 'cancelled' WHERE j.id = ANY (v_jobs) AND j.status = 'todo';
        -- What runs ends unrecorded: its writes find the order ended.
        UPDATE procrastinate_jobs j SET abort_requested = true WHERE j.id = ANY (v_jobs) AND j.status = 'doing';
        UPDATE images i SET status = 'cancelled', locator = NULL, locator_expires_at = NULL
            WHERE i.order_id = cancel_order.id AND i.status IN ('pending', 'generated');
        UPDATE orders o SET status = 'cancelled', finished_at = now(),
            images_stored = (SELECT count(*) FROM images i WHERE i.order_id = o.id AND i.status = 'stored'),
            images_failed = (SELECT count(*) FROM images i WHERE i.order_id = o.id AND i.status = 'failed')
            WHERE o.id = cancel_order.id RETURNING * INTO v_order;
        PERFORM abandon_calls(ARRAY[v_order.id]);
        PERFORM pg_notify('jobdaemon_orders', json_build_object('order_id', v_order.id, 'status', v_order.status,
            'stored', v_order.images_stored, 'failed', v_order.images_failed, 'total', v_order.images_total)::text);
    END IF;
    IF coalesce(cancel_order.remove_images, false) AND v_order.status = 'cancelled' THEN
        PERFORM procrastinate_defer_jobs_v1(ARRAY[ROW('upload', 'jobdaemon.remove', v_order.priority, NULL, NULL,
            jsonb_build_object('order_id', v_order.id), NULL)::procrastinate_job_to_defer_v1]);
    END IF;
    RETURN v_order.status;
END;
$$;

-- As in 0008, and an open job that came from another provider says so.
CREATE OR REPLACE FUNCTION explained(p_job procrastinate_jobs) RETURNS TABLE (reason text, told text, numbers jsonb)
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
