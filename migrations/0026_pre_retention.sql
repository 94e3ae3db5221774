-- Retention: orders that ended long ago are retired. Their photos in the store and their jobs go, and nothing opens them again; what
-- they were and came to stays, until their rows go too. The functions are for the daemons' upkeep: each does so much at a time and is
-- called until it finds nothing. Their statements are planned anew each time, since what is planned once may be planned while the
-- tables are empty. Rescues wait for them: so they pass by what somebody holds, and what cannot be passed by they leave soon.

ALTER TABLE orders
    -- its photos and jobs are being removed, or gone
    ADD COLUMN retired_at timestamptz,
    -- nothing of it lies under work/ in the store any more
    ADD COLUMN pruned_at timestamptz;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_ended_idx ON orders (finished_at) WHERE finished_at IS NOT NULL AND retired_at IS NULL;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_retired_idx ON orders (id) WHERE retired_at IS NOT NULL AND pruned_at IS NULL;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_pruned_idx ON orders (finished_at) WHERE pruned_at IS NOT NULL;
-- who still needs a photo that was stored here
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_source_idx ON orders (hashtext(source COLLATE "C"))
    WHERE retired_at IS NULL AND source LIKE 'artifact:sources/%';

-- Whether we named this artifact ourselves, by its content (jobdaemon/domain/artifact.py); what others put into the store is theirs.
CREATE FUNCTION is_own_source(p_source text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = jobdaemon, pg_temp
AS $$ SELECT p_source ~ '^artifact:sources/[0-9a-f]{2}/[0-9a-f]{64}[.][a-z]{1,8}$' $$;

-- Whether an order that may still want it, or an open prewarm, is for this source.
CREATE FUNCTION is_source_needed(p_source text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM orders o
            WHERE hashtext(o.source COLLATE "C") = hashtext(p_source COLLATE "C") AND o.source = p_source
                AND o.source LIKE 'artifact:sources/%' AND o.retired_at IS NULL)
        OR EXISTS (SELECT FROM procrastinate_jobs j
            WHERE j.task_name = 'jobdaemon.prewarm' AND j.status IN ('todo', 'doing')
                AND hashtext((j.args ->> 'source') COLLATE "C") = hashtext(p_source COLLATE "C") AND j.args ->> 'source' = p_source)
$$;

CREATE FUNCTION has_open_jobs(p_order bigint) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM procrastinate_jobs j WHERE (j.args ->> 'order_id')::bigint = p_order
        AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('todo', 'doing'))
$$;

-- Photos under sources/ that no order needs, any more or as yet, by what orders call them. All orders for a photo share it, and it may be
-- ordered again at any moment: so it waits here for a day. Then it is deleted from the store, or only from here when it was ordered.
CREATE TABLE idle_sources (
    source text COLLATE "C" PRIMARY KEY CHECK (is_own_source(source)),
    idle_since timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- a daemon deletes it: too late
    deleting_at timestamptz
);
CREATE INDEX idle_sources_since_idx ON idle_sources (idle_since);
COMMENT ON TABLE idle_sources IS 'Source photos that nobody has ordered, or nobody needs any more; see docs/operate.md.';

-- To be asked before a photo is stored that is to be ordered: from now on it is kept for a day, whatever became of it before. False:
-- it is being deleted at this moment; ask again.
CREATE FUNCTION hold_source(p_source text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    INSERT INTO idle_sources AS s (source) VALUES (p_source)
        ON CONFLICT (source) DO UPDATE SET idle_since = clock_timestamp() WHERE s.deleting_at IS NULL;
    RETURN FOUND;
END;
$$;

-- Until its transaction ends an order keeps its photo by holding the row; then it is seen to need it. The weakest of locks: others
-- may hold and order the same photo meanwhile, whatever else they order in their transactions.
CREATE FUNCTION source_ordered() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    PERFORM FROM idle_sources s WHERE s.source = NEW.source AND s.deleting_at IS NULL FOR KEY SHARE;
    RETURN NULL;
END;
$$;
CREATE TRIGGER source_ordered AFTER INSERT ON orders FOR EACH ROW
    WHEN (NEW.source LIKE 'artifact:sources/%') EXECUTE FUNCTION source_ordered();

-- Retires up to p_limit orders that ended p_age_s seconds ago or before; says how many. One with open jobs waits for them.
CREATE FUNCTION retire_orders(p_age_s double precision, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp SET lock_timeout = '500ms'
SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_orders bigint[];
    v_calls bigint[];
BEGIN
    -- Two at a time would each find a photo needed by the order that the other one retires.
    IF NOT pg_try_advisory_xact_lock(1784835685, 26) THEN
        RETURN 0;
    END IF;
    v_orders := ARRAY(SELECT o.id FROM orders o
        WHERE o.finished_at <= now() - p_age_s * interval '1 second' AND o.retired_at IS NULL AND NOT has_open_jobs(o.id)
        ORDER BY o.finished_at LIMIT p_limit FOR UPDATE SKIP LOCKED);
    -- Of a dead letter that nobody redrove: no provider knows its task any more.
    v_calls := ARRAY(SELECT c.id FROM provider_calls c
        WHERE c.order_id = ANY (v_orders) AND c.outcome IS NULL ORDER BY c.id FOR UPDATE SKIP LOCKED);
    v_orders := ARRAY(SELECT w.id FROM unnest(v_orders) AS w (id) WHERE NOT EXISTS (SELECT FROM provider_calls c
        WHERE c.order_id = w.id AND c.outcome IS NULL AND c.id <> ALL (v_calls)));
    IF cardinality(v_orders) = 0 THEN
        RETURN 0;
    END IF;
    UPDATE orders o SET retired_at = clock_timestamp() WHERE o.id = ANY (v_orders);
    INSERT INTO idle_sources (source)
        SELECT DISTINCT o.source FROM orders o
            WHERE o.id = ANY (v_orders) AND is_own_source(o.source) AND NOT is_source_needed(o.source)
        ON CONFLICT DO NOTHING;
    UPDATE provider_calls c SET outcome = 'unknown', finished_at = coalesce(c.finished_at, now())
        WHERE c.order_id = ANY (v_orders) AND c.outcome IS NULL;
    -- What is left goes with its job.
    DELETE FROM attempts a WHERE a.id = ANY (ARRAY(SELECT h.id FROM attempts h
        WHERE h.order_id = ANY (v_orders) ORDER BY h.id FOR UPDATE SKIP LOCKED));
    RETURN cardinality(v_orders);
END;
$$;

-- Looks at up to p_limit jobs from p_after on (by id, which is by age) and deletes those of ours that have ended, of orders that are
-- retired or gone, or of no order and as old. last_id: where to go on; NULL when younger ones follow.
CREATE FUNCTION prune_jobs(p_after bigint, p_age_s double precision, p_limit integer, OUT last_id bigint, OUT pruned integer)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp SET lock_timeout = '500ms'
SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_page bigint[];
    v_jobs bigint[];
    v_attempts bigint[];
    v_sources text[];
    v_is_old boolean;
BEGIN
    pruned := 0;
    v_page := ARRAY(SELECT j.id FROM procrastinate_jobs j WHERE j.id > p_after ORDER BY j.id LIMIT p_limit);
    IF cardinality(v_page) = 0 THEN
        RETURN;
    END IF;
    -- A job that nobody remembers the making of is old.
    v_is_old := coalesce((SELECT min(e.at) FROM procrastinate_events e
        WHERE e.job_id = v_page[cardinality(v_page)]) <= now() - p_age_s * interval '1 second', true);
    v_jobs := ARRAY(SELECT j.id FROM procrastinate_jobs j
        WHERE j.id = ANY (v_page) AND j.task_name LIKE 'jobdaemon.%' AND j.status NOT IN ('todo', 'doing')
            -- Somebody else's task may be called like ours, and for something else.
            AND CASE WHEN j.args ->> 'order_id' ~ '^[0-9]{1,18}$'
                THEN NOT EXISTS (SELECT FROM orders o WHERE o.id = (j.args ->> 'order_id')::bigint AND o.retired_at IS NULL)
                ELSE v_is_old END
        ORDER BY j.id FOR UPDATE SKIP LOCKED);
    v_attempts := ARRAY(SELECT a.id FROM attempts a WHERE a.job_id = ANY (v_jobs) ORDER BY a.id FOR UPDATE SKIP LOCKED);
    v_jobs := ARRAY(SELECT w.id FROM unnest(v_jobs) AS w (id)
        WHERE NOT EXISTS (SELECT FROM attempts a WHERE a.job_id = w.id AND a.id <> ALL (v_attempts)));
    IF cardinality(v_jobs) > 0 THEN
        v_sources := ARRAY(SELECT DISTINCT j.args ->> 'source' FROM procrastinate_jobs j
            WHERE j.id = ANY (v_jobs) AND j.task_name = 'jobdaemon.prewarm' AND is_own_source(j.args ->> 'source'));
        DELETE FROM attempts a WHERE a.job_id = ANY (v_jobs);
        DELETE FROM procrastinate_jobs j WHERE j.id = ANY (v_jobs);
        GET DIAGNOSTICS pruned = ROW_COUNT;
        -- A photo that was prewarmed and never ordered.
        INSERT INTO idle_sources (source)
            SELECT s.source FROM unnest(v_sources) AS s (source) WHERE NOT is_source_needed(s.source)
            ON CONFLICT DO NOTHING;
    END IF;
    IF v_is_old AND cardinality(v_page) >= p_limit THEN
        last_id := v_page[cardinality(v_page)];
    END IF;
END;
$$;

-- Up to p_limit sources that have been idle for p_wait_s seconds, for the caller to delete from the store, which takes it less than ten
-- minutes: those that somebody began to delete earlier are given out again. Afterwards their rows are to be deleted.
CREATE FUNCTION sources_to_delete(p_wait_s double precision, p_limit integer) RETURNS SETOF text
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp SET lock_timeout = '500ms'
SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_source text;
    v_due text[] := '{}';
BEGIN
    FOR v_source IN SELECT s.source FROM idle_sources s
        WHERE s.idle_since <= clock_timestamp() - p_wait_s * interval '1 second'
            AND (s.deleting_at IS NULL
                -- the second since a clock may be set back
                OR s.deleting_at NOT BETWEEN clock_timestamp() - interval '10 minutes' AND clock_timestamp() + interval '10 minutes')
        ORDER BY s.idle_since LIMIT 50 * p_limit FOR UPDATE SKIP LOCKED
    LOOP
        EXIT WHEN cardinality(v_due) >= p_limit;
        -- Ordered since; also for want of patience while it was deleted.
        IF is_source_needed(v_source) THEN
            DELETE FROM idle_sources s WHERE s.source = v_source;
        ELSE
            v_due := v_due || v_source;
        END IF;
    END LOOP;
    RETURN QUERY UPDATE idle_sources s SET deleting_at = clock_timestamp() WHERE s.source = ANY (v_due) RETURNING s.source;
END;
$$;

-- Removes the rows of up to p_limit retired orders that ended p_age_s seconds ago or before, with images and calls; says how many.
CREATE FUNCTION remove_orders(p_age_s double precision, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp SET lock_timeout = '500ms'
SET plan_cache_mode = force_custom_plan SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_orders bigint[];
BEGIN
    v_orders := ARRAY(SELECT o.id FROM orders o
        WHERE o.pruned_at IS NOT NULL AND o.finished_at <= now() - p_age_s * interval '1 second' AND NOT has_open_jobs(o.id)
        ORDER BY o.finished_at LIMIT p_limit FOR UPDATE SKIP LOCKED);
    -- Nothing new begins for them now that they are locked; it may have begun since we looked. What goes with them must be free as well.
    v_orders := ARRAY(SELECT w.id FROM unnest(v_orders) AS w (id)
        WHERE NOT has_open_jobs(w.id)
            AND (SELECT count(*) FROM images i WHERE i.order_id = w.id)
                = (SELECT count(*) FROM (SELECT FROM images i WHERE i.order_id = w.id FOR UPDATE SKIP LOCKED) AS free)
            AND (SELECT count(*) FROM provider_calls c WHERE c.order_id = w.id)
                = (SELECT count(*) FROM (SELECT FROM provider_calls c WHERE c.order_id = w.id FOR UPDATE SKIP LOCKED) AS free));
    DELETE FROM orders o WHERE o.id = ANY (v_orders);
    RETURN cardinality(v_orders);
END;
$$;

-- As in 0014, and a retired order has nothing to be redriven from.
CREATE OR REPLACE FUNCTION redrive(order_id bigint DEFAULT NULL, job_id bigint DEFAULT NULL) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_order_id bigint := redrive.order_id;
    v_order orders;
    v_jobs bigint[];
    v_idle bigint[];
BEGIN
    IF (redrive.order_id IS NULL) = (redrive.job_id IS NULL) THEN
        RAISE EXCEPTION 'name either an order or a job to redrive' USING ERRCODE = 'JD005';
    END IF;
    IF redrive.job_id IS NOT NULL THEN
        SELECT (j.args ->> 'order_id')::bigint INTO v_order_id FROM procrastinate_jobs j
            WHERE j.id = redrive.job_id AND j.task_name LIKE 'jobdaemon.%';
        IF NOT FOUND THEN
            RAISE EXCEPTION 'unknown job %', redrive.job_id USING ERRCODE = 'JD005';
        END IF;
        IF v_order_id IS NULL THEN
            RAISE EXCEPTION 'job % is for no order and cannot be redriven', redrive.job_id USING ERRCODE = 'JD005';
        END IF;
    END IF;
    SELECT * INTO v_order FROM orders o WHERE o.id = v_order_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown order %', v_order_id USING ERRCODE = 'JD005';
    END IF;
    IF v_order.status = 'cancelled' THEN
        RAISE EXCEPTION 'order % was cancelled and cannot be redriven', v_order_id USING ERRCODE = 'JD005';
    END IF;
    IF v_order.retired_at IS NOT NULL THEN
        RAISE EXCEPTION 'order % ended so long ago that its photos are gone, and cannot be redriven', v_order_id USING ERRCODE = 'JD005';
    END IF;
    v_jobs := ARRAY(SELECT j.id FROM procrastinate_jobs j
        WHERE (j.args ->> 'order_id')::bigint = v_order_id AND j.task_name LIKE 'jobdaemon.%' AND j.status = 'failed'
            AND (redrive.job_id IS NULL OR j.id = redrive.job_id)
        ORDER BY j.id FOR UPDATE);
    -- An image whose link was cleared when its order ended must be made again before it can be uploaded: by a generate job that
    -- is redriven with it (which brings an upload of its own), else by the upload job turned into a generate job.
    v_idle := ARRAY(SELECT j.id FROM procrastinate_jobs j
        JOIN images i ON i.order_id = v_order_id AND i.index = (j.args ->> 'image')::integer
        WHERE j.id = ANY (v_jobs) AND i.status = 'failed' AND i.locator IS NULL
            AND EXISTS (SELECT FROM procrastinate_jobs g WHERE g.id = ANY (v_jobs) AND (g.args -> 'images') @> to_jsonb(i.index)));
    UPDATE procrastinate_jobs j SET status = 'cancelled' WHERE j.id = ANY (v_idle);
    v_jobs := ARRAY(SELECT job.id FROM unnest(v_jobs) AS job (id) WHERE job.id <> ALL (v_idle));
    IF cardinality(v_jobs) = 0 THEN
        RETURN 0;
    END IF;
    UPDATE procrastinate_jobs j
        SET task_name = 'jobdaemon.generate', queue_name = 'generate.' || coalesce(i.provider, v_order.provider),
            args = (j.args - 'image') || jsonb_build_object('images', jsonb_build_array(i.index))
        FROM images i
        WHERE j.id = ANY (v_jobs) AND i.order_id = v_order_id AND i.index = (j.args ->> 'image')::integer
            AND i.status = 'failed' AND i.locator IS NULL;
    -- What arrived is only to be uploaded: a generate job takes no such image along.
    UPDATE images i SET status = CASE WHEN i.locator IS NULL THEN 'pending' ELSE 'generated' END, error = NULL
        FROM procrastinate_jobs j
        WHERE j.id = ANY (v_jobs) AND i.order_id = v_order_id AND i.status = 'failed'
            AND (j.task_name = 'jobdaemon.beautify'
                 OR i.locator IS NULL AND (j.args -> 'images') @> to_jsonb(i.index)
                 OR (j.args ->> 'image')::integer = i.index);
    UPDATE procrastinate_jobs j
        SET status = 'todo', attempts = 0, deaths = NULL, token = NULL, scheduled_at = NULL, abort_requested = false,
            -- an upload that became a generate job has that stage's
            worker_id = NULL, priority = job_priority(v_order, j.queue_name)
        WHERE j.id = ANY (v_jobs);
    UPDATE orders o SET finished_at = NULL, error = NULL,
        status = CASE WHEN o.beautified IS NULL THEN 'queued'
            WHEN EXISTS (SELECT FROM images i WHERE i.order_id = o.id AND i.status = 'pending') THEN 'generating'
            ELSE 'uploading' END,
        images_failed = (SELECT count(*) FROM images i WHERE i.order_id = o.id AND i.status = 'failed'),
        expires_at = now() + (SELECT p.expires_after FROM plans p WHERE p.name = o.plan)
        -- A job that has nothing left to do does not open its order again: nothing would end it.
        WHERE o.id = v_order_id
            AND EXISTS (SELECT FROM images i WHERE i.order_id = o.id AND i.status IN ('pending', 'generated'));
    RETURN cardinality(v_jobs);
END;
$$;
