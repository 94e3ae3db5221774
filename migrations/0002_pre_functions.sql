-- The SQL API, as named in docs/sql.md. Every function pins its search_path, so callers may have any.

CREATE FUNCTION enqueue_order(
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

    INSERT INTO orders (customer, key, "group", plan, provider, source, params, priority, images_total, waits_from, expires_at)
        VALUES (v_customer, v_key, nullif(enqueue_order."group", ''), v_plan.name, v_provider, enqueue_order.source,
                enqueue_order.params, v_plan.priority, v_images, coalesce(v_at, now()),
                coalesce(v_at, now()) + v_plan.expires_after)
        ON CONFLICT (customer, key) WHERE key IS NOT NULL DO NOTHING
        RETURNING id INTO v_id;
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

    PERFORM procrastinate_defer_jobs_v1(ARRAY[ROW('beautify', 'jobdaemon.beautify', v_plan.priority, NULL, NULL,
        jsonb_build_object('order_id', v_id)
            || CASE WHEN v_customer <> '' THEN jsonb_build_object('customer', v_customer) ELSE '{}' END, v_at)::procrastinate_job_to_defer_v1]);
    RETURN QUERY SELECT v_id, true;
END;
$$;

-- Lock order everywhere: orders by id, then jobs by id, then images.
CREATE FUNCTION cancel_order(id bigint, remove_images boolean DEFAULT false) RETURNS text
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

CREATE FUNCTION redrive(order_id bigint DEFAULT NULL, job_id bigint DEFAULT NULL) RETURNS integer
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
            worker_id = NULL
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
