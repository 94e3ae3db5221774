-- Prewarms can be cancelled by whoever may ask for them.

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
