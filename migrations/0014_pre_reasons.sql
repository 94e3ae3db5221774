-- A priority for each stage, and what is said of jobs that wait: keys that cannot start a call, lifted work.

ALTER TABLE plans
    -- stage -> priority, for instance {"upload": 500}; a stage that is not named has the plan's own priority
    ADD COLUMN stage_priority jsonb NOT NULL DEFAULT '{}';
ALTER TABLE orders
    -- its plan's when it was made, as orders.priority is
    ADD COLUMN stage_priority jsonb NOT NULL DEFAULT '{}';

-- What plans may hold, for plain statements as for the settings: a sentence instead of a constraint's name. A priority above these
-- would pass for lifted work, a longer wait would be no moment any more for the upkeep of every daemon.
CREATE FUNCTION plan_written() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_stage text;
    v_value jsonb;
BEGIN
    IF NEW.priority IS NULL OR NEW.priority NOT BETWEEN -1000000 AND 1000000 THEN
        RAISE EXCEPTION 'a plan''s priority must be -1000000 to 1000000, not %', coalesce(NEW.priority::text, 'NULL')
            USING ERRCODE = 'JD004';
    END IF;
    IF NEW.stage_priority IS NULL OR jsonb_typeof(NEW.stage_priority) <> 'object' THEN
        RAISE EXCEPTION 'stage_priority must be an object such as {"upload": 500}, not %',
            coalesce(left(NEW.stage_priority::text, 64), 'NULL') USING ERRCODE = 'JD004';
    END IF;
    FOR v_stage, v_value IN SELECT s.key, s.value FROM jsonb_each(NEW.stage_priority) AS s LOOP
        IF v_stage NOT IN ('beautify', 'generate', 'upload') THEN
            RAISE EXCEPTION 'stage_priority names no stage "%": there are beautify, generate and upload', left(v_stage, 64)
                USING ERRCODE = 'JD004';
        END IF;
        -- CASE: only what is a number is looked at as one
        IF (CASE WHEN jsonb_typeof(v_value) = 'number'
            THEN v_value::numeric NOT BETWEEN -1000000 AND 1000000 OR v_value::numeric <> trunc(v_value::numeric) ELSE true END)
        THEN
            RAISE EXCEPTION 'the priority of stage % must be a whole number, -1000000 to 1000000, not %', v_stage,
                left(v_value::text, 64) USING ERRCODE = 'JD004';
        END IF;
    END LOOP;
    IF greatest(NEW.lift_after, NEW.expires_after) > interval '100 years' THEN
        RAISE EXCEPTION 'lift_after and expires_after must be 100 years at most' USING ERRCODE = 'JD004';
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER plan_written BEFORE INSERT OR UPDATE ON plans FOR EACH ROW EXECUTE FUNCTION plan_written();

-- The same for what steers a queue by its ends. A time without end is no time to count down to: a daemon could not.
CREATE FUNCTION queue_steered() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    IF NEW.adaptive_limit < 0 THEN
        RAISE EXCEPTION 'an adaptive limit must be 0 or more, not %', NEW.adaptive_limit USING ERRCODE = 'JD004';
    END IF;
    IF NEW.circuit IS NULL OR NEW.circuit NOT IN ('closed', 'open', 'probing') THEN
        RAISE EXCEPTION 'a circuit must be closed, open or probing, not %', coalesce('"' || left(NEW.circuit, 64) || '"', 'NULL')
            USING ERRCODE = 'JD004';
    END IF;
    IF NOT isfinite(NEW.rested_until) OR NOT isfinite(NEW.circuit_until) THEN
        RAISE EXCEPTION 'rested_until and circuit_until must be a moment; pause_queue(''%'') lasts until it is undone', NEW.name
            USING ERRCODE = 'JD004';
    END IF;
    IF NEW.circuit_after IS NULL OR NEW.circuit_after NOT BETWEEN 0 AND 100000 THEN
        RAISE EXCEPTION 'circuit_after must be 0 to 100000, not %', coalesce(NEW.circuit_after::text, 'NULL')
            USING ERRCODE = 'JD004';
    END IF;
    IF NEW.circuit_rest IS NULL OR NEW.circuit_rest_cap IS NULL OR least(NEW.circuit_rest, NEW.circuit_rest_cap) <= interval '0'
        OR greatest(NEW.circuit_rest, NEW.circuit_rest_cap) > interval '1 year'
    THEN
        RAISE EXCEPTION 'circuit_rest and circuit_rest_cap must be more than 0 and a year at most' USING ERRCODE = 'JD004';
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER queue_steered BEFORE UPDATE OF adaptive_limit, rested_until, circuit, circuit_until, circuit_after, circuit_rest,
    circuit_rest_cap ON queues FOR EACH ROW EXECUTE FUNCTION queue_steered();

-- The highest priority that a plan has in the stage of this queue (what stands before the dot in its name): lifted work there
-- shares with work of at least this.
CREATE OR REPLACE FUNCTION top_priority(queue text) RETURNS integer
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT max(coalesce((p.stage_priority -> split_part(queue, '.', 1))::integer, p.priority)) FROM plans p;
$$;

-- The priority of this order's jobs in this queue: the one place that says so, for every job that is made, lifted or redriven. An
-- operator's own wins in every stage; a lifted order is lifted where its plan is not the highest already, since there it would only
-- lose by it. The same in Python, without operators and lifting: Plan.priority_in.
CREATE FUNCTION job_priority(p_order orders, p_queue text) RETURNS integer
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_own integer := coalesce((p_order.stage_priority -> split_part(p_queue, '.', 1))::integer, p_order.priority);
BEGIN
    IF p_order.prioritized THEN
        RETURN p_order.priority;
    ELSIF p_order.lifted_at IS NULL OR v_own >= top_priority(p_queue) THEN
        RETURN v_own;
    END IF;
    RETURN lifted_priority();
END;
$$;

-- The plans whose orders may be lifted: in some stage another plan is above them.
CREATE FUNCTION plans_below_top() RETURNS TABLE (name text, lift_after interval)
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT p.name, p.lift_after FROM plans p
    WHERE EXISTS (SELECT FROM unnest(ARRAY['beautify', 'generate', 'upload']) AS s (stage)
        WHERE coalesce((p.stage_priority -> s.stage)::integer, p.priority) < top_priority(s.stage));
$$;

-- Lifts up to p_limit open orders that have waited longer than their plan's lift_after; returns how many. Orders of a plan that is
-- the highest in every stage have nothing above them, and where an operator has set a priority it stays. Orders that somebody holds
-- are left to the next round. Lock order as everywhere: orders by id, then jobs by id.
CREATE OR REPLACE FUNCTION lift_orders(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_orders bigint[];
    v_jobs bigint[];
BEGIN
    v_orders := ARRAY(
        SELECT o.id FROM orders o
        WHERE o.id IN (
                SELECT due.id FROM plans_below_top() AS p
                CROSS JOIN LATERAL (
                    SELECT w.id FROM orders w
                    WHERE w.plan = p.name AND w.finished_at IS NULL AND w.lifted_at IS NULL AND NOT w.prioritized
                        AND w.waits_from <= now() - p.lift_after
                    ORDER BY w.waits_from LIMIT p_limit) AS due)
            AND o.finished_at IS NULL AND o.lifted_at IS NULL AND NOT o.prioritized
        ORDER BY o.id LIMIT p_limit FOR UPDATE SKIP LOCKED);
    IF cardinality(v_orders) > 0 THEN
        -- What runs and what is dead too: it may wait again.
        v_jobs := ARRAY(SELECT j.id FROM procrastinate_jobs j
            WHERE (j.args ->> 'order_id')::bigint = ANY (v_orders) AND j.task_name LIKE 'jobdaemon.%'
                AND j.status IN ('todo', 'doing', 'failed')
            ORDER BY j.id FOR UPDATE);
        UPDATE orders o SET lifted_at = now() WHERE o.id = ANY (v_orders);
        UPDATE procrastinate_jobs j SET priority = job_priority(o, j.queue_name)
            FROM orders o WHERE j.id = ANY (v_jobs) AND o.id = (j.args ->> 'order_id')::bigint;
    END IF;
    RETURN cardinality(v_orders);
END;
$$;

CREATE OR REPLACE FUNCTION enqueue_order(
    plan text,
    source text,
    customer text DEFAULT '',
    key text DEFAULT NULL,
    prompts text[] DEFAULT NULL,
    images integer DEFAULT NULL,
    provider text DEFAULT NULL,
    params jsonb DEFAULT '{}',
    at timestamptz DEFAULT NULL,
    "group" text DEFAULT NULL
) RETURNS TABLE (order_id bigint, created boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_plan plans;
    v_prompts text[];
    v_images integer;
    v_provider text;
    v_customer text := coalesce(enqueue_order.customer, '');
    v_key text := nullif(enqueue_order.key, '');
    v_at timestamptz := CASE WHEN enqueue_order.at > now() THEN enqueue_order.at END;
    v_id bigint;
    v_order orders;
    v_bad integer;
BEGIN
    SELECT * INTO v_plan FROM plans p WHERE p.name = enqueue_order.plan;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown plan "%"; the plans are %', left(coalesce(enqueue_order.plan, ''), 64),
            coalesce((SELECT string_agg(p.name, ', ' ORDER BY p.priority DESC) FROM plans p), 'none: run jobdaemon migrate')
            USING ERRCODE = 'JD001';
    END IF;

    -- The same key is the same order, whatever else the caller says now and however full the queue is.
    IF v_key IS NOT NULL THEN
        IF octet_length(v_key) > 255 THEN
            RAISE EXCEPTION 'the key is % bytes long; at most 255 are allowed', octet_length(v_key) USING ERRCODE = 'JD004';
        END IF;
        SELECT o.id INTO v_id FROM orders o WHERE o.customer = v_customer AND o.key = v_key;
        IF FOUND THEN
            RETURN QUERY SELECT v_id, false;
            RETURN;
        END IF;
    END IF;

    -- A path on this machine is never a source: the CLI stores the file first and passes its artifact key.
    IF enqueue_order.source IS NULL OR octet_length(enqueue_order.source) > 4096
        OR NOT (enqueue_order.source ~ '^https://[^/?#[:space:][:cntrl:]]+([/?#][^[:space:][:cntrl:]]*)?$'
                OR (enqueue_order.source ~ '^artifact:[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*$'
                    AND enqueue_order.source !~ '[:/][.]{1,2}(/|$)'))
    THEN
        RAISE EXCEPTION 'bad source: it must be https://… or artifact:<key>, of at most 4096 bytes' USING ERRCODE = 'JD004';
    END IF;

    IF octet_length(v_customer) > 255 OR octet_length(coalesce(enqueue_order."group", '')) > 255 THEN
        RAISE EXCEPTION 'customer and group may be at most 255 bytes long' USING ERRCODE = 'JD004';
    END IF;
    IF enqueue_order.params IS NULL OR jsonb_typeof(enqueue_order.params) <> 'object'
        OR octet_length(enqueue_order.params::text) > 65536
    THEN
        RAISE EXCEPTION 'params must be a JSON object of at most 65536 bytes' USING ERRCODE = 'JD004';
    END IF;

    IF v_at > now() + interval '1 year' THEN
        RAISE EXCEPTION 'an order may be scheduled at most a year ahead' USING ERRCODE = 'JD004';
    END IF;

    v_images := coalesce(enqueue_order.images, v_plan.images);
    IF v_images NOT BETWEEN 1 AND v_plan.images THEN
        RAISE EXCEPTION 'plan % gives 1 to % images, not %', v_plan.name, v_plan.images, v_images USING ERRCODE = 'JD004';
    END IF;

    -- A smaller order of a plan takes as many of the plan's own prompts as it has images.
    v_prompts := coalesce(enqueue_order.prompts, v_plan.prompts[1:v_images]);
    IF array_ndims(v_prompts) > 1 THEN
        RAISE EXCEPTION 'prompts must be a plain list, not one of % dimensions', array_ndims(v_prompts) USING ERRCODE = 'JD004';
    END IF;
    IF cardinality(v_prompts) NOT BETWEEN 1 AND v_images THEN
        RAISE EXCEPTION '% prompts for % images: give 1 to % prompts', cardinality(v_prompts), v_images, v_images
            USING ERRCODE = 'JD004';
    END IF;
    SELECT p.n INTO v_bad FROM unnest(v_prompts) WITH ORDINALITY AS p (prompt, n)
        WHERE p.prompt IS NULL OR p.prompt !~ '[^[:space:]]' OR octet_length(p.prompt) > 4000
        ORDER BY p.n LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'prompt % is %', v_bad, CASE WHEN octet_length(v_prompts[v_bad]) > 4000
            THEN format('%s bytes long; at most 4000 are allowed', octet_length(v_prompts[v_bad])) ELSE 'empty' END
            USING ERRCODE = 'JD004';
    END IF;

    v_provider := coalesce(enqueue_order.provider, v_plan.provider);
    IF NOT EXISTS (SELECT FROM queues q WHERE q.name = 'generate.' || v_provider) THEN
        RAISE EXCEPTION 'unknown provider "%": there is no queue generate.%', left(v_provider, 64), left(v_provider, 64)
            USING ERRCODE = 'JD005';
    END IF;

    -- No lock is held on the caller's behalf: depth may overshoot by the transactions open right now.
    IF v_plan.max_open_orders > 0 AND (
        SELECT count(*) FROM (SELECT FROM orders o WHERE o.plan = v_plan.name AND o.finished_at IS NULL
            LIMIT v_plan.max_open_orders) AS open) >= v_plan.max_open_orders
    THEN
        RAISE EXCEPTION 'queue full: plan % has % open orders already', v_plan.name, v_plan.max_open_orders
            USING ERRCODE = 'JD002';
    END IF;
    IF v_plan.max_open_orders_per_customer > 0 AND (
        SELECT count(*) FROM (SELECT FROM orders o
            WHERE o.plan = v_plan.name AND o.customer = v_customer AND o.finished_at IS NULL
            LIMIT v_plan.max_open_orders_per_customer) AS open) >= v_plan.max_open_orders_per_customer
    THEN
        RAISE EXCEPTION 'this customer has % open orders of plan % already', v_plan.max_open_orders_per_customer, v_plan.name
            USING ERRCODE = 'JD003';
    END IF;

    INSERT INTO orders (customer, key, "group", plan, provider, source, params, priority, stage_priority, images_total,
            waits_from, expires_at)
        VALUES (v_customer, v_key, nullif(enqueue_order."group", ''), v_plan.name, v_provider, enqueue_order.source,
                enqueue_order.params, v_plan.priority, v_plan.stage_priority, v_images, coalesce(v_at, now()),
                coalesce(v_at, now()) + v_plan.expires_after)
        ON CONFLICT (customer, key) WHERE key IS NOT NULL DO NOTHING
        RETURNING * INTO v_order;
    v_id := v_order.id;
    IF v_id IS NULL THEN
        -- Another transaction enqueued this key between our look and our insert.
        RETURN QUERY SELECT o.id, false FROM orders o WHERE o.customer = v_customer AND o.key = v_key;
        RETURN;
    END IF;

    -- K prompts are dealt over N images in order: N/K each, the first N mod K one more.
    INSERT INTO images (order_id, index, prompt)
        SELECT v_id, row_number() OVER (ORDER BY p.n, copy), p.prompt
        FROM unnest(v_prompts) WITH ORDINALITY AS p (prompt, n)
        CROSS JOIN LATERAL generate_series(1, v_images / cardinality(v_prompts)
            + CASE WHEN p.n <= v_images % cardinality(v_prompts) THEN 1 ELSE 0 END) AS copy;

    PERFORM procrastinate_defer_jobs_v1(ARRAY[ROW('beautify', 'jobdaemon.beautify', job_priority(v_order, 'beautify'), NULL,
        NULL, jsonb_build_object('order_id', v_id)
            || CASE WHEN v_customer <> '' THEN jsonb_build_object('customer', v_customer) ELSE '{}' END, v_at)::procrastinate_job_to_defer_v1]);
    RETURN QUERY SELECT v_id, true;
END;
$$;

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

-- Why a job waits. Every phrase is a clause that can follow "Why it waits:".

CREATE OR REPLACE FUNCTION utc_text(p_at timestamptz) RETURNS text
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT CASE WHEN isfinite(p_at) THEN to_char(p_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') ELSE 'further notice' END
        WHERE p_at IS NOT NULL
$$;

-- How many lifted jobs of the queue are ready; all of them go before a job that is not lifted, if it is none of the highest plan's.
CREATE FUNCTION lifted_ready(p_queue text) RETURNS integer
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT count(*)::integer FROM (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_queue AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority >= lifted_priority()
        LIMIT 1001) AS lifted
$$;

-- Who goes first, as the beginning of a sentence: of p_count jobs p_lifted are lifted.
CREATE FUNCTION first_text(p_count integer, p_lifted integer, p_queue text DEFAULT NULL) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT CASE WHEN p_count > 1000 THEN '1000+' ELSE p_count::text END || CASE WHEN p_lifted >= p_count THEN ' lifted' ELSE '' END
        || CASE WHEN p_count = 1 THEN ' job goes first' ELSE ' jobs go first' END || coalesce(' in queue ' || p_queue, '')
        || CASE WHEN p_lifted BETWEEN 1 AND p_count - 1 THEN format(', %s of them lifted', p_lifted) ELSE '' END
$$;

-- The keys of this job's provider when it has some and none of them can start a call for it now: what is in the way of each, in
-- words and as {provider, keys: [{alias, reason, until, …}]}. No row where there are no keys, or one is free. A job that waits with a
-- key has bought a task under it: it is to be collected with that key, and only a rest or its concurrency is in the way.
CREATE FUNCTION keys_in_the_way(p_job procrastinate_jobs, OUT told text, OUT numbers jsonb) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    WITH known AS (
        SELECT k.alias, k.paused, k.concurrency, k.rate, k.daily_budget, k.rested_until, k.rest_reason, k.next_start_at,
            k.alias = p_job.key_alias AS is_its_own,
            CASE WHEN k.spent_on = (now() AT TIME ZONE 'UTC')::date THEN k.spent ELSE 0 END AS spent_today,
            (SELECT count(*) FROM procrastinate_jobs j
                WHERE j.queue_name = p_job.queue_name AND j.status = 'doing' AND j.key_alias = k.alias) AS in_use,
            CASE jsonb_typeof(p_job.args -> 'images') WHEN 'array' THEN jsonb_array_length(p_job.args -> 'images') ELSE 1 END AS wanted,
            ((now() AT TIME ZONE 'UTC')::date + 1)::timestamp AT TIME ZONE 'UTC' AS midnight
        FROM provider_keys k WHERE p_job.queue_name = 'generate.' || k.provider
    ), judged AS (
        SELECT k.*, CASE WHEN k.paused AND NOT its.own THEN 'paused'
                WHEN k.spent_today + k.wanted > k.daily_budget AND NOT its.own THEN 'budget'
                WHEN k.rested_until > now() THEN 'resting'
                WHEN k.in_use >= k.concurrency THEN 'concurrency'
                WHEN k.rate IS NOT NULL AND k.next_start_at > now() AND NOT its.own THEN 'rate' END AS in_the_way
        FROM known k CROSS JOIN LATERAL (SELECT coalesce(k.is_its_own, false) AS own) AS its
        WHERE its.own OR NOT EXISTS (SELECT FROM known other WHERE other.is_its_own)
    ), named AS (
        SELECT n.alias, row_number() OVER (ORDER BY n.alias) AS place,
            CASE n.in_the_way WHEN 'paused' THEN format('%s is paused', n.alias)
                WHEN 'budget' THEN CASE WHEN n.spent_today >= n.daily_budget
                    THEN format('%s has spent its budget of %s images for today, until %s', n.alias, n.daily_budget,
                        utc_text(n.midnight))
                    ELSE format('%s has %s of its %s images for today left until %s, and this job asks for %s', n.alias,
                        n.daily_budget - n.spent_today, n.daily_budget, utc_text(n.midnight), n.wanted) END
                WHEN 'resting' THEN format('%s rests until %s', n.alias, utc_text(n.rested_until))
                    || coalesce(' (' || left(n.rest_reason, 100) || ')', '')
                WHEN 'concurrency' THEN format('%s runs as many calls as it may (running %s, limit %s)', n.alias, n.in_use,
                    n.concurrency)
                WHEN 'rate' THEN format('%s may start its next call at %s', n.alias, utc_text(n.next_start_at)) END AS told,
            jsonb_strip_nulls(jsonb_build_object('alias', n.alias, 'reason', n.in_the_way)
                || CASE n.in_the_way
                    WHEN 'budget' THEN jsonb_build_object('budget', n.daily_budget, 'spent', n.spent_today, 'until', n.midnight)
                    WHEN 'resting' THEN jsonb_build_object('until', n.rested_until, 'why', left(n.rest_reason, 100))
                    WHEN 'concurrency' THEN jsonb_build_object('running', n.in_use, 'limit', n.concurrency)
                    WHEN 'rate' THEN jsonb_build_object('until', n.next_start_at) ELSE '{}' END) AS numbers,
            n.is_its_own
        FROM judged n
    ), provider AS (
        SELECT substr(p_job.queue_name, length('generate.') + 1) AS name
    )
    SELECT CASE WHEN bool_or(n.is_its_own) THEN 'its call is to be collected with the key it was bought with: '
                ELSE format('no key of %s can start a call now: ', min(p.name)) END
            || string_agg(n.told, ', ' ORDER BY n.alias) FILTER (WHERE n.place <= 5)
            || CASE WHEN count(*) > 5 THEN format(', and %s more', count(*) - 5) ELSE '' END,
        jsonb_build_object('provider', min(p.name), 'keys', jsonb_agg(n.numbers ORDER BY n.alias))
    FROM named n CROSS JOIN provider p
    HAVING count(*) > 0 AND count(n.told) = count(*);
$$;

-- Why this job does not run, most decisive reason first: a word for programs, a clause for people, and its numbers. p_first_only
-- stops at the first one, which then also says how many jobs go before.
CREATE OR REPLACE FUNCTION job_reasons(p_job procrastinate_jobs, p_first_only boolean DEFAULT false)
RETURNS TABLE (reason text, told text, numbers jsonb)
LANGUAGE plpgsql STABLE SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue queues;
    v_service record;
    v_last attempts;
    v_keys record;
    v_name text := p_job.queue_name;
    v_customer text COLLATE "C" := coalesce(CASE WHEN p_job.task_name LIKE 'jobdaemon.%' THEN p_job.args ->> 'customer' END, '');
    v_until text := utc_text(p_job.scheduled_at);
    v_error text;
    v_is_lifted boolean := p_job.priority >= lifted_priority();
    v_lifted_at timestamptz;
    v_shares boolean := false;
    v_top integer;
    v_before integer := 0;
    v_lifted integer := 0;
    v_line text := '';
    v_running integer;
    v_hindered boolean := false;
BEGIN
    SELECT * INTO v_queue FROM queues q WHERE q.name = v_name;
    IF v_queue.name IS NULL THEN
        RETURN QUERY SELECT 'unknown_queue', format('queue %s is not one of jobdaemon''s', v_name), '{}'::jsonb;
        RETURN;
    END IF;

    IF v_queue.paused THEN
        RETURN QUERY SELECT 'paused', format('queue %s is paused', v_name), '{}'::jsonb;
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    IF p_job.scheduled_at > now() THEN
        SELECT * INTO v_last FROM attempts a WHERE a.job_id = p_job.id ORDER BY a.id DESC LIMIT 1;
        v_error := coalesce(': ' || left(v_last.error, 200), '');
        RETURN QUERY SELECT
            CASE v_last.outcome WHEN 'retry' THEN 'retry' WHEN 'interrupted' THEN 'retry' WHEN 'snooze' THEN 'snooze'
                ELSE 'scheduled' END,
            CASE v_last.outcome
                WHEN 'retry' THEN format('attempt %s failed, and the next one waits until %s', v_last.attempt, v_until) || v_error
                WHEN 'interrupted' THEN format('attempt %s was interrupted, and the next one waits until %s', v_last.attempt, v_until)
                    || v_error
                WHEN 'snooze' THEN format('it was put off until %s', v_until) || v_error
                ELSE format('it is scheduled to wait until %s', v_until) END,
            jsonb_strip_nulls(jsonb_build_object('until', p_job.scheduled_at, 'attempt', v_last.attempt,
                'error_kind', v_last.error_kind, 'error', v_last.error));
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    SELECT * INTO v_service FROM queue_service(v_name);
    IF v_service.daemons = 0 THEN
        RETURN QUERY SELECT CASE WHEN v_service.draining > 0 THEN 'draining' ELSE 'no_daemon' END,
            CASE WHEN v_service.draining > 0 THEN format('every daemon that serves queue %s is draining', v_name)
                ELSE format('no daemon serves queue %s', v_name) END,
            jsonb_build_object('draining', v_service.draining);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    ELSIF v_service.slots = 0 THEN
        RETURN QUERY SELECT 'team_size', format('the team size of queue %s is 0: no worker takes its jobs', v_name),
            jsonb_build_object('daemons', v_service.daemons, 'slots', 0);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    -- What waits for its time is not in the line.
    IF p_job.scheduled_at IS NULL THEN
        v_before := jobs_before(p_job);
        v_lifted := CASE WHEN v_is_lifted THEN v_before ELSE least(lifted_ready(v_name), v_before) END;
        IF p_first_only THEN
            v_line := CASE WHEN v_is_lifted THEN '; it is lifted' ELSE '' END
                || CASE WHEN v_before > 0 THEN '; ' || first_text(v_before, v_lifted) ELSE '' END;
        END IF;
    END IF;
    IF v_queue.rested_until > now() THEN
        RETURN QUERY SELECT 'resting', format('queue %s rests until %s, as its provider asked', v_name,
            utc_text(v_queue.rested_until)) || v_line, jsonb_build_object('until', v_queue.rested_until);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_queue.circuit <> 'closed' THEN
        RETURN QUERY SELECT 'circuit', CASE WHEN v_queue.circuit = 'open' AND v_queue.circuit_until > now()
                THEN format('too many jobs of queue %s failed in a row, so none starts until %s (its circuit is open)', v_name,
                    utc_text(v_queue.circuit_until))
                ELSE format('too many jobs of queue %s failed in a row, so one at a time tries it (its circuit is open)', v_name) END
                || v_line,
            jsonb_strip_nulls(jsonb_build_object('circuit', v_queue.circuit, 'until', v_queue.circuit_until));
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    SELECT * INTO v_keys FROM keys_in_the_way(p_job);
    IF FOUND THEN
        RETURN QUERY SELECT 'key', v_keys.told || v_line, v_keys.numbers;
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    IF v_queue.fair_share IS NOT NULL AND v_customer <> '' COLLATE "C" THEN
        SELECT count(*) INTO v_running FROM procrastinate_jobs j
            WHERE j.queue_name = v_name AND j.status = 'doing' AND j.task_name LIKE 'jobdaemon.%'
                AND j.args ->> 'customer' = v_customer;
        -- It matters while somebody else waits.
        IF v_running >= v_queue.fair_share AND (
            EXISTS (SELECT FROM procrastinate_jobs j
                WHERE j.queue_name = v_name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" < v_customer)
            OR EXISTS (SELECT FROM procrastinate_jobs j
                WHERE j.queue_name = v_name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" > v_customer))
        THEN
            RETURN QUERY SELECT 'fair_share', format('its customer has its fair share of queue %s while others wait'
                ' (running %s, share %s)', v_name, v_running, v_queue.fair_share) || v_line,
                jsonb_build_object('running', v_running, 'limit', v_queue.fair_share);
            IF p_first_only THEN RETURN; END IF;
            v_hindered := true;
        END IF;
    END IF;
    SELECT count(*) INTO v_running FROM (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = v_name AND j.status = 'doing' LIMIT 10001) AS running;
    IF v_running >= v_queue.cluster_limit THEN
        RETURN QUERY SELECT 'cluster_limit', format('queue %s is at its cluster limit (running %s, limit %s)', v_name, v_running,
            v_queue.cluster_limit) || v_line,
            jsonb_build_object('running', v_running, 'limit', v_queue.cluster_limit);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_running >= v_queue.adaptive_limit THEN
        RETURN QUERY SELECT 'adaptive_limit', format('queue %s is at its adaptive limit: its provider takes no more now'
            ' (running %s, limit %s)', v_name, v_running, v_queue.adaptive_limit) || v_line,
            jsonb_build_object('running', v_running, 'limit', v_queue.adaptive_limit);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF v_service.slots > 0 AND v_running >= v_service.slots THEN
        RETURN QUERY SELECT 'slots', format('every worker of queue %s is busy (running %s, slots %s)', v_name, v_running,
            v_service.slots) || v_line, jsonb_build_object('running', v_running, 'slots', v_service.slots, 'daemons', v_service.daemons);
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;
    IF p_job.lock IS NOT NULL AND EXISTS (SELECT FROM procrastinate_jobs j WHERE j.lock = p_job.lock AND j.status = 'doing') THEN
        RETURN QUERY SELECT 'lock', 'another job with the same lock runs', '{}'::jsonb;
        IF p_first_only THEN RETURN; END IF;
        v_hindered := true;
    END IF;

    v_top := top_priority(v_name);
    IF v_is_lifted THEN
        -- Work of the highest plan, if it waits too, has three turns of four.
        v_shares := coalesce((SELECT max(j.priority) FROM (SELECT j.priority FROM procrastinate_jobs j
            WHERE j.queue_name = v_name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority < lifted_priority()
            ORDER BY j.priority DESC LIMIT 1) AS j) >= v_top, false);
        SELECT o.lifted_at INTO v_lifted_at FROM orders o
            WHERE o.id = CASE WHEN p_job.task_name LIKE 'jobdaemon.%' THEN (p_job.args ->> 'order_id')::bigint END;
        IF NOT p_first_only OR p_job.scheduled_at IS NULL AND (v_shares OR v_before > 0) THEN
            RETURN QUERY SELECT 'lifted', CASE WHEN v_shares
                    THEN format('it is lifted: lifted jobs take one start in four while jobs of priority %s or more wait too', v_top)
                    ELSE 'it is lifted: it goes before all that is not' END
                    || CASE WHEN p_first_only AND v_before > 0 THEN '; ' || first_text(v_before, v_lifted) ELSE '' END,
                jsonb_strip_nulls(jsonb_build_object('since', v_lifted_at, 'shares_with', CASE WHEN v_shares THEN v_top END));
            IF p_first_only THEN RETURN; END IF;
            v_hindered := v_hindered OR v_shares;
        END IF;
    END IF;
    IF v_before > 0 THEN
        RETURN QUERY SELECT 'behind', first_text(v_before, v_lifted, v_name)
                || CASE WHEN v_lifted > 0 AND NOT v_is_lifted AND p_job.priority >= v_top
                    THEN ' (lifted jobs take one start in four)' ELSE '' END,
            jsonb_strip_nulls(jsonb_build_object('jobs', least(v_before, 1000), 'or_more', v_before > 1000,
                'lifted', CASE WHEN NOT v_is_lifted THEN nullif(least(v_lifted, 1000), 0) END));
        v_hindered := true;
    END IF;
    IF NOT v_hindered THEN
        RETURN QUERY SELECT 'ready', format('nothing is in its way: the next free worker of queue %s takes it', v_name) || v_line,
            '{}'::jsonb;
    END IF;
END;
$$;
-- Only job_reasons asked these.
-- squawk-ignore ban-drop-function
DROP FUNCTION before_text(integer, boolean);
-- squawk-ignore ban-drop-function
DROP FUNCTION before_jobs(integer);

-- In one phrase why nothing of this order runs; NULL while something does. For the view.
CREATE OR REPLACE FUNCTION order_waits_for(p_order bigint) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_job procrastinate_jobs;
    v_told text;
BEGIN
    -- The job that may come first.
    SELECT j.* INTO v_job FROM procrastinate_jobs j
        WHERE (j.args ->> 'order_id')::bigint = p_order AND j.task_name LIKE 'jobdaemon.%' AND j.status IN ('todo', 'doing')
        ORDER BY (j.status = 'doing') DESC, j.scheduled_at NULLS FIRST, j.priority DESC, j.id
        LIMIT 1;
    IF v_job.id IS NULL THEN
        RETURN 'it has no open job: nothing happens by itself any more';
    ELSIF v_job.status = 'doing' THEN
        RETURN NULL;
    END IF;
    SELECT r.told INTO v_told FROM job_reasons(v_job, true) AS r LIMIT 1;
    RETURN v_told;
END;
$$;
