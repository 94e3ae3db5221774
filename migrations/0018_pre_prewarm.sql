-- Prewarms: photos that are retouched before anybody orders them, in slots that no order wants. A prewarm is a job of queue beautify
-- for no order, below every priority that an order can have; what it made lies in prewarmed until it is used, too old or too much.

-- Work at this priority or below it starts only when nothing else of its queue is ready. Plans and operators stay above -1000000.
CREATE FUNCTION prewarm_priority() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = jobdaemon, pg_temp
AS 'SELECT -2000000';

ALTER TABLE queues
    -- open prewarms, at most; 0: none at all. Only queue beautify has any. The claim looks at all of them, hence the bound.
    ADD COLUMN max_prewarms integer NOT NULL DEFAULT 100 CHECK (max_prewarms BETWEEN 0 AND 1000);

CREATE FUNCTION prewarms_limited() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    IF NEW.max_prewarms IS NULL OR NEW.max_prewarms NOT BETWEEN 0 AND 1000 THEN
        RAISE EXCEPTION 'max_prewarms must be 0 to 1000, not %', coalesce(NEW.max_prewarms::text, 'NULL') USING ERRCODE = 'JD004';
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER prewarms_limited BEFORE UPDATE OF max_prewarms ON queues FOR EACH ROW EXECUTE FUNCTION prewarms_limited();

-- One row per photo and way of retouching it. A dropped row gives nothing any more; its artifact is deleted, then the row.
CREATE TABLE prewarmed (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- digest of the source photo's bytes
    photo text COLLATE "C" NOT NULL CHECK (photo ~ '^[0-9a-f]{64}$'),
    -- what retouched it, and how: see jobdaemon/domain/prewarm.py
    backend text COLLATE "C" NOT NULL CHECK (backend ~ '^[0-9a-f]{64}$'),
    artifact text NOT NULL,
    sha256 text NOT NULL,
    bytes bigint NOT NULL,
    media_type text NOT NULL,
    width integer NOT NULL,
    height integer NOT NULL,
    faces integer NOT NULL,
    unrestored integer NOT NULL,
    model text NOT NULL,
    device text NOT NULL,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    used_at timestamptz,
    uses integer NOT NULL DEFAULT 0,
    dropped_at timestamptz
);
COMMENT ON TABLE prewarmed IS 'Retouched photos that wait for an order; see docs/sql.md.';
CREATE UNIQUE INDEX prewarmed_photo_idx ON prewarmed (photo, backend) WHERE dropped_at IS NULL;
CREATE INDEX prewarmed_made_idx ON prewarmed (made_at) WHERE dropped_at IS NULL;
CREATE INDEX prewarmed_dropped_idx ON prewarmed (id) WHERE dropped_at IS NOT NULL;

-- Has this photo retouched when a slot is idle; an order for the same photo then begins with generating. The same source again is
-- the same job while that is open. What it comes to: explain_job(job_id).
CREATE FUNCTION prewarm(source text) RETURNS TABLE (job_id bigint, created boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_most integer;
    v_id bigint;
BEGIN
    -- The same sources as enqueue_order's.
    IF prewarm.source IS NULL OR octet_length(prewarm.source) > 4096
        OR NOT (prewarm.source ~ '^https://[^/?#[:space:][:cntrl:]]+([/?#][^[:space:][:cntrl:]]*)?$'
                OR (prewarm.source ~ '^artifact:[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*$'
                    AND prewarm.source !~ '[:/][.]{1,2}(/|$)'))
    THEN
        RAISE EXCEPTION 'bad source: it must be https://… or artifact:<key>, of at most 4096 bytes' USING ERRCODE = 'JD004';
    END IF;
    SELECT q.max_prewarms INTO v_most FROM queues q WHERE q.name = 'beautify';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown queue "beautify": run jobdaemon migrate' USING ERRCODE = 'JD005';
    END IF;
    -- Who asks for the same source at the same moment waits for our transaction, as with the key of an order.
    PERFORM pg_advisory_xact_lock(1784835686, hashtext(prewarm.source COLLATE "C"));
    SELECT j.id INTO v_id FROM procrastinate_jobs j
        WHERE j.task_name = 'jobdaemon.prewarm' AND j.status IN ('todo', 'doing') AND NOT j.abort_requested
            AND hashtext((j.args ->> 'source') COLLATE "C") = hashtext(prewarm.source COLLATE "C")
            AND j.args ->> 'source' = prewarm.source
        ORDER BY j.id LIMIT 1;
    IF FOUND THEN
        RETURN QUERY SELECT v_id, false;
        RETURN;
    END IF;
    -- As with orders: it may overshoot by the transactions open right now.
    IF v_most = 0 THEN
        RAISE EXCEPTION 'prewarming is switched off: max_prewarms of queue beautify is 0' USING ERRCODE = 'JD002';
    ELSIF (SELECT count(*) FROM (SELECT FROM procrastinate_jobs j
            WHERE j.task_name = 'jobdaemon.prewarm' AND j.status IN ('todo', 'doing') LIMIT v_most) AS open) >= v_most
    THEN
        RAISE EXCEPTION 'queue full: as many prewarms are open as may be (%)', v_most USING ERRCODE = 'JD002';
    END IF;
    v_id := (procrastinate_defer_jobs_v1(ARRAY[ROW('beautify', 'jobdaemon.prewarm', prewarm_priority(),
        NULL, NULL, jsonb_build_object('source', prewarm.source), NULL)::procrastinate_job_to_defer_v1]))[1];
    RETURN QUERY SELECT v_id, true;
END;
$$;

-- Gives up what is older than p_ttl_s seconds, then what was made first while more than p_max_bytes are kept, p_limit rows each at
-- most; and prewarms that have waited for an idle slot for so long. Returns how many rows of prewarmed.
CREATE FUNCTION trim_prewarmed(p_ttl_s double precision, p_max_bytes bigint, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_oldest timestamptz := now() - p_ttl_s * interval '1 second';
    v_excess bigint;
    v_old integer;
    v_surplus integer := 0;
BEGIN
    UPDATE procrastinate_jobs SET status = 'cancelled' WHERE id IN (
        SELECT j.id FROM procrastinate_jobs j
        WHERE j.task_name = 'jobdaemon.prewarm' AND j.status = 'todo'
            AND EXISTS (SELECT FROM procrastinate_events e WHERE e.job_id = j.id AND e.type = 'deferred' AND e.at <= v_oldest)
        ORDER BY j.id FOR UPDATE SKIP LOCKED);
    UPDATE prewarmed SET dropped_at = clock_timestamp() WHERE id IN (
        SELECT p.id FROM prewarmed p WHERE p.dropped_at IS NULL AND p.made_at <= v_oldest
        ORDER BY p.made_at LIMIT p_limit FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS v_old = ROW_COUNT;
    -- Two that count at once would both give up the surplus.
    IF pg_try_advisory_xact_lock(1784835685, 18) THEN
        SELECT sum(p.bytes) - p_max_bytes INTO v_excess FROM prewarmed p WHERE p.dropped_at IS NULL;
        IF v_excess > 0 THEN
            UPDATE prewarmed SET dropped_at = clock_timestamp() WHERE id IN (
                SELECT e.id FROM prewarmed e WHERE e.dropped_at IS NULL AND e.id IN (
                    SELECT s.id FROM (
                        SELECT p.id, sum(p.bytes) OVER (ORDER BY p.made_at, p.id) - p.bytes AS before
                        FROM prewarmed p WHERE p.dropped_at IS NULL
                        ORDER BY p.made_at, p.id LIMIT p_limit
                    ) AS s WHERE s.before < v_excess)
                FOR UPDATE SKIP LOCKED);
            GET DIAGNOSTICS v_surplus = ROW_COUNT;
        END IF;
    END IF;
    RETURN v_old + v_surplus;
END;
$$;

-- Whether a ready job of this queue, none of p_except, is no prewarm: somebody waits for it.
CREATE FUNCTION is_work_waiting(p_queue text, p_except bigint[]) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_queue AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.task_name <> 'jobdaemon.prewarm'
            AND j.id <> ALL (p_except))
$$;

-- What somebody waits for is picked as before, by the function that did it alone until now. Nobody but the claim calls it.
-- squawk-ignore renaming-object
ALTER FUNCTION pick_jobs(queues, integer, bigint[]) RENAME TO pick_wanted_jobs;

-- Locks and returns up to p_limit ready jobs of this queue, none of p_except: those that somebody waits for, and prewarms, the
-- oldest first, when every other ready job is among the picked. Neither a fair share, which knows no customer of a prewarm, nor a
-- row that somebody holds lets one through before.
CREATE FUNCTION pick_jobs(p_queue queues, p_limit integer, p_except bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_ids bigint[] := '{}';
BEGIN
    -- Other queues have no prewarms, and this one seldom.
    IF p_queue.name <> 'beautify' OR NOT EXISTS (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority <= prewarm_priority()
            AND j.task_name = 'jobdaemon.prewarm')
    THEN
        RETURN pick_wanted_jobs(p_queue, p_limit, p_except);
    END IF;
    IF is_work_waiting(p_queue.name, '{}') THEN
        v_ids := pick_wanted_jobs(p_queue, p_limit, p_except || ARRAY(SELECT j.id FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority <= prewarm_priority()
                AND j.task_name = 'jobdaemon.prewarm'));
        IF cardinality(v_ids) >= p_limit OR is_work_waiting(p_queue.name, v_ids) THEN
            RETURN v_ids;
        END IF;
    END IF;
    RETURN v_ids || ARRAY(SELECT j.id FROM procrastinate_jobs j
        WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority <= prewarm_priority()
            AND j.task_name = 'jobdaemon.prewarm' AND j.lock IS NULL AND j.id <> ALL (p_except)
        ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
        LIMIT p_limit - cardinality(v_ids)
        FOR UPDATE SKIP LOCKED);
END;
$$;

-- As in 0003, without prewarms in what waits and what has failed: nobody waits for one, and its dead letter needs nobody. They
-- count as running, since they hold slots.
CREATE OR REPLACE VIEW queue_depth AS
SELECT
    q.name AS queue,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NULL
            AND j.task_name <> 'jobdaemon.prewarm') AS ready,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NOT NULL
            AND j.task_name <> 'jobdaemon.prewarm') AS scheduled,
    (SELECT count(*) FROM procrastinate_jobs j WHERE j.queue_name = q.name AND j.status = 'doing') AS running,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'failed' AND j.task_name <> 'jobdaemon.prewarm') AS failed,
    -- Since it last became ready: the newest of its deferral, its due time and its last hand-back.
    (SELECT extract(epoch FROM now() - e.at)::double precision
        -- + 0 keeps the planner from walking the primary key through everything that has ended
        FROM (SELECT min(j.id + 0) AS id FROM procrastinate_jobs j
            WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                AND j.task_name <> 'jobdaemon.prewarm') AS oldest
        CROSS JOIN LATERAL (SELECT max(ev.at) AS at FROM procrastinate_events ev
            WHERE ev.job_id = oldest.id AND ev.at <= now()) AS e) AS oldest_ready_seconds,
    q.paused,
    q.team_size,
    q.cluster_limit,
    q.adaptive_limit,
    q.circuit
FROM queues q;

-- Prewarms that wait and run, and photos that wait for an order; used: how many of them had one.
CREATE VIEW prewarm_stats AS
SELECT j.waiting, j.running, p.kept, p.bytes, p.used
FROM (SELECT count(*) FILTER (WHERE j.status = 'todo') AS waiting, count(*) FILTER (WHERE j.status = 'doing') AS running
    FROM procrastinate_jobs j WHERE j.task_name = 'jobdaemon.prewarm' AND j.status IN ('todo', 'doing')) AS j
CROSS JOIN (SELECT count(*) AS kept, coalesce(sum(p.bytes), 0)::bigint AS bytes, count(*) FILTER (WHERE p.uses > 0) AS used
    FROM prewarmed p WHERE p.dropped_at IS NULL) AS p;

-- As in 0012, with prewarm.
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
                'drain_daemon', 'prioritize_order', 'pause_key', 'resume_key', 'prewarm')
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
