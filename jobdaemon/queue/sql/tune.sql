-- Makes procrastinate's tables fast and usable from any search_path. Runs after every migration, because a migration of
-- procrastinate may bring back what is taken away here; does nothing, and takes no lock, where all is as it should be.
-- Figures: statement-level triggers, fewer indexes and no foreign key on events took a drain of no-op jobs from 15,800 to
-- 24,900 jobs/s (PostgreSQL 15, 2 cores).

-- ADD COLUMN IF NOT EXISTS alone would lock the table even where the column is there.
DO $$
BEGIN
    IF (SELECT count(*) FROM pg_attribute a WHERE a.attrelid = 'procrastinate_jobs'::regclass
            AND a.attname IN ('token', 'deaths', 'key_alias', 'released_token') AND NOT a.attisdropped) < 4 THEN
        ALTER TABLE procrastinate_jobs ADD COLUMN IF NOT EXISTS token bigint, ADD COLUMN IF NOT EXISTS deaths smallint,
            ADD COLUMN IF NOT EXISTS key_alias text, ADD COLUMN IF NOT EXISTS released_token bigint;
    END IF;
END;
$$;

-- Events and wake-ups once per statement. The transition tables cannot be joined without a pinned plan: their plan is made at
-- the first, small call and would stay a nested loop.
CREATE OR REPLACE FUNCTION jobs_inserted() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    INSERT INTO procrastinate_events (job_id, type)
        SELECT n.id, 'deferred' FROM inserted n WHERE n.status = 'todo';
    INSERT INTO procrastinate_events (job_id, type, at)
        SELECT n.id, 'scheduled', n.scheduled_at FROM inserted n WHERE n.status = 'todo' AND n.scheduled_at IS NOT NULL;
    -- One wake-up per queue of ours, and a look at the clock for what is due later.
    PERFORM pg_notify(CASE WHEN n.is_ready THEN 'jobdaemon_jobs' ELSE 'jobdaemon_scheduled' END, n.queue_name)
        FROM (SELECT DISTINCT i.queue_name, i.scheduled_at IS NULL AS is_ready FROM inserted i WHERE i.status = 'todo') AS n
        WHERE EXISTS (SELECT FROM queues q WHERE q.name = n.queue_name);
    -- Queues that stock workers serve keep their stock notifications.
    PERFORM pg_notify('procrastinate_queue_v1#' || n.queue_name, payload.text),
            pg_notify('procrastinate_any_queue_v1', payload.text)
        FROM inserted n
        CROSS JOIN LATERAL (SELECT json_build_object('type', 'job_inserted', 'job_id', n.id)::text AS text) AS payload
        WHERE n.status = 'todo' AND NOT EXISTS (SELECT FROM queues q WHERE q.name = n.queue_name);
    RETURN NULL;
END;
$$;

CREATE OR REPLACE FUNCTION jobs_updated() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp SET enable_nestloop = off
AS $$
BEGIN
    INSERT INTO procrastinate_events (job_id, type)
        SELECT c.id, c.type::procrastinate_job_event_type FROM (
            SELECT n.id, CASE
                WHEN o.status = 'todo' AND n.status = 'doing' THEN 'started'
                WHEN o.status = 'doing' AND n.status = 'todo' THEN 'deferred_for_retry'
                WHEN o.status = 'doing' AND n.status = 'failed' THEN 'failed'
                WHEN o.status = 'doing' AND n.status = 'succeeded' THEN 'succeeded'
                WHEN o.status = 'doing' AND n.status = 'aborted' THEN 'aborted'
                WHEN o.status = 'todo' AND n.status IN ('cancelled', 'failed', 'succeeded') THEN 'cancelled'
                WHEN o.status = 'failed' AND n.status = 'todo' THEN 'retried'
            END AS type
            FROM after n JOIN before o ON o.id = n.id
            WHERE o.status <> n.status
        ) AS c WHERE c.type IS NOT NULL;
    INSERT INTO procrastinate_events (job_id, type, at)
        SELECT n.id, 'scheduled', n.scheduled_at FROM after n JOIN before o ON o.id = n.id
        WHERE n.status = 'todo' AND n.scheduled_at IS NOT NULL
            AND (o.status <> 'todo' OR o.scheduled_at IS DISTINCT FROM n.scheduled_at);
    -- A running job that somebody wants stopped: its daemon hears of it.
    PERFORM pg_notify('jobdaemon_abort', n.id::text) FROM after n JOIN before o ON o.id = n.id
        WHERE n.abort_requested AND NOT o.abort_requested AND n.status = 'doing'
            AND EXISTS (SELECT FROM queues q WHERE q.name = n.queue_name);
    -- What became ready or due without being inserted: hand-back, rescue, redrive, a stock retry.
    PERFORM pg_notify(CASE WHEN c.is_ready THEN 'jobdaemon_jobs' ELSE 'jobdaemon_scheduled' END, c.queue_name)
        FROM (SELECT DISTINCT n.queue_name, n.scheduled_at IS NULL AS is_ready FROM after n JOIN before o ON o.id = n.id
            WHERE n.status = 'todo' AND o.status <> 'todo') AS c
        WHERE EXISTS (SELECT FROM queues q WHERE q.name = c.queue_name);
    RETURN NULL;
END;
$$;

CREATE OR REPLACE FUNCTION jobs_deleted() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    -- In place of the foreign key's cascade.
    DELETE FROM procrastinate_events e WHERE e.job_id = ANY (ARRAY(SELECT d.id FROM deleted d));
    RETURN NULL;
END;
$$;

DO $$
DECLARE
    v_name text;
    v_wanted text;
    v_function regprocedure;
    v_definition text;
BEGIN
    FOREACH v_name IN ARRAY ARRAY[
        'procrastinate_jobs_notify_queue_job_inserted_v1', 'procrastinate_trigger_status_events_update_v1',
        'procrastinate_trigger_status_events_insert_v1', 'procrastinate_trigger_scheduled_events_v1'
    ] LOOP
        IF EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = 'procrastinate_jobs'::regclass AND t.tgname = v_name) THEN
            EXECUTE format('DROP TRIGGER %I ON procrastinate_jobs', v_name);
        END IF;
    END LOOP;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = 'procrastinate_jobs'::regclass AND t.tgname = 'jobs_inserted') THEN
        CREATE TRIGGER jobs_inserted AFTER INSERT ON procrastinate_jobs
            REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION jobs_inserted();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = 'procrastinate_jobs'::regclass AND t.tgname = 'jobs_updated') THEN
        CREATE TRIGGER jobs_updated AFTER UPDATE ON procrastinate_jobs
            REFERENCING OLD TABLE AS before NEW TABLE AS after FOR EACH STATEMENT EXECUTE FUNCTION jobs_updated();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = 'procrastinate_jobs'::regclass AND t.tgname = 'jobs_deleted') THEN
        CREATE TRIGGER jobs_deleted AFTER DELETE ON procrastinate_jobs
            REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT EXECUTE FUNCTION jobs_deleted();
    END IF;

    SELECT c.conname INTO v_name FROM pg_constraint c
        WHERE c.conrelid = 'procrastinate_events'::regclass AND c.confrelid = 'procrastinate_jobs'::regclass AND c.contype = 'f';
    IF FOUND THEN
        EXECUTE format('ALTER TABLE procrastinate_events DROP CONSTRAINT %I', v_name);
    END IF;

    -- Stock indexes that cost every update and serve none of our queries keep their names (later migrations of procrastinate
    -- may rename or drop them) with a predicate that is never true: 8 kB, never written.
    FOR v_name, v_wanted IN VALUES
        ('procrastinate_jobs_queue_name_idx_v1', '(queue_name)'),
        ('procrastinate_jobs_id_lock_idx_v1', '(id, lock)'),
        ('procrastinate_jobs_priority_idx_v1', '(priority DESC, id)'),
        ('idx_procrastinate_jobs_worker_not_null', '(worker_id)')
    LOOP
        IF EXISTS (SELECT FROM pg_indexes i WHERE i.schemaname = 'jobdaemon' AND i.indexname = v_name
                AND i.indexdef NOT LIKE '%WHERE false') THEN
            EXECUTE format('DROP INDEX %I', v_name);
            EXECUTE format('CREATE INDEX %I ON procrastinate_jobs %s WHERE false', v_name, v_wanted);
        END IF;
    END LOOP;
    FOR v_name, v_wanted IN VALUES
        -- claim order is index order; an order keeps its age through all stages, and only our own tasks name one
        ('jobs_ready_idx', '(queue_name, priority DESC,
            (CASE WHEN task_name LIKE ''jobdaemon.%'' THEN (args ->> ''order_id'')::bigint END), id)
            WHERE status = ''todo'' AND scheduled_at IS NULL'),
        -- a fair share: from customer to customer ('' when there is none), each one's jobs in claim order
        ('jobs_customer_idx', '(queue_name,
            (coalesce(CASE WHEN task_name LIKE ''jobdaemon.%'' THEN args ->> ''customer'' END, '''') COLLATE "C"), priority DESC,
            (CASE WHEN task_name LIKE ''jobdaemon.%'' THEN (args ->> ''order_id'')::bigint END), id)
            WHERE status = ''todo'' AND scheduled_at IS NULL'),
        -- behind a customer who has had his share: claim order in each of 64 lanes of customers, and from customer to customer in a lane
        ('jobs_lane_idx', '((hashtext(queue_name COLLATE "C")::bigint * 64 + (hashtext((args ->> ''customer'') COLLATE "C") & 63)), priority DESC,
            ((args ->> ''order_id'')::bigint), id)
            WHERE status = ''todo'' AND scheduled_at IS NULL AND task_name LIKE ''jobdaemon.%'' AND (args ->> ''customer'') COLLATE "C" <> '''''),
        ('jobs_lane_customer_idx', '((hashtext(queue_name COLLATE "C")::bigint * 64 + (hashtext((args ->> ''customer'') COLLATE "C") & 63)),
            ((args ->> ''customer'') COLLATE "C"), priority DESC, ((args ->> ''order_id'')::bigint), id)
            WHERE status = ''todo'' AND scheduled_at IS NULL AND task_name LIKE ''jobdaemon.%'' AND (args ->> ''customer'') COLLATE "C" <> '''''),
        -- of ready jobs with one lock the first; empty where no app uses locks
        ('jobs_lock_idx', '(lock) WHERE status = ''todo'' AND lock IS NOT NULL'),
        ('jobs_running_idx', '(queue_name, worker_id) WHERE status = ''doing'''),
        -- what has bought a task under a key and waits to collect it: few
        ('jobs_bought_idx', '(queue_name) WHERE status = ''todo'' AND scheduled_at IS NULL AND key_alias IS NOT NULL'),
        ('jobs_scheduled_idx', '(scheduled_at) WHERE status = ''todo'' AND scheduled_at IS NOT NULL'),
        ('jobs_failed_idx', '(queue_name) WHERE status = ''failed'''),
        -- from an order to its jobs; only our own tasks, since another app's order_id need not be a number
        ('jobs_order_idx', '(((args ->> ''order_id'')::bigint)) WHERE task_name LIKE ''jobdaemon.%'' AND status IN (''todo'', ''doing'', ''failed'')'),
        -- the same for those that somebody stopped
        ('jobs_stopped_idx', '(((args ->> ''order_id'')::bigint)) WHERE task_name LIKE ''jobdaemon.%'' AND status IN (''cancelled'', ''aborted'')'),
        -- open prewarms by their source: few
        ('jobs_prewarm_idx', '((hashtext((args ->> ''source'') COLLATE "C")))
            WHERE task_name = ''jobdaemon.prewarm'' AND status IN (''todo'', ''doing'')')
    LOOP
        IF to_regclass('jobdaemon.' || v_name) IS NULL THEN
            EXECUTE format('CREATE INDEX %I ON procrastinate_jobs %s', v_name, v_wanted);
        END IF;
    END LOOP;

    -- A stock worker started by mistake without a list of queues must not run our jobs unfenced.
    FOR v_function, v_definition IN
        SELECT p.oid::regprocedure, pg_get_functiondef(p.oid) FROM pg_proc p
        WHERE p.pronamespace = 'jobdaemon'::regnamespace AND p.proname LIKE 'procrastinate\_fetch\_job\_v%'
    LOOP
        IF v_definition NOT LIKE '%jobdaemon.queues%' THEN
            v_wanted := replace(v_definition, 'AND jobs.status = ''todo''',
                'AND jobs.status = ''todo'' AND jobs.queue_name NOT IN (SELECT q.name FROM jobdaemon.queues q)');
            IF v_wanted = v_definition THEN
                RAISE EXCEPTION 'cannot keep % away from our queues: its text is not as expected', v_function;
            END IF;
            EXECUTE v_wanted;
        END IF;
    END LOOP;

    -- Last, since replacing a function above loses the setting.
    FOR v_function IN
        SELECT p.oid::regprocedure FROM pg_proc p
        WHERE p.pronamespace = 'jobdaemon'::regnamespace AND p.proname LIKE 'procrastinate\_%'
            AND NOT coalesce('search_path=jobdaemon, pg_temp' = ANY (p.proconfig), false)
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = jobdaemon, pg_temp', v_function);
    END LOOP;
END;
$$;

-- Who may do what. In this step, so that a new function needs one name here and no copy of the whole in its migration.
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
                'drain_daemon', 'prioritize_order', 'pause_key', 'resume_key', 'prewarm', 'hold_source', 'cancel_prewarm', 'clear_cache')
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
SELECT grant_roles();
