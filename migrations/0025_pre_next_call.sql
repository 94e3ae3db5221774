-- What a provider's slot waits for between two calls, each in one question: a job leaves its slot and another starts in its place; and
-- the next call is noted. In functions, since planning such statements takes longer than carrying them out; bound to the indexes, since
-- what is planned once may be planned while the tables are empty.

-- The provider has done what these running jobs asked of it: from now on they hold no slot of any limit. Those (of p_ids, each with
-- its token of p_tokens) that still run under that token.
CREATE FUNCTION leave_slots(p_ids bigint[], p_tokens bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_ids bigint[];
BEGIN
    v_ids := ARRAY(SELECT j.id FROM unnest(p_ids, p_tokens) AS a (id, token)
        JOIN procrastinate_jobs j ON j.id = a.id AND j.token = a.token
        WHERE j.status = 'doing' ORDER BY j.id FOR UPDATE OF j);
    UPDATE procrastinate_jobs j SET released_token = j.token WHERE j.id = ANY (v_ids);
    RETURN v_ids;
END;
$$;

-- One row for each of these calls, rows of {order_id, job_id, batch, provider, images, task_id, key, price}, but for jobs that have an
-- open call; their orders.
CREATE FUNCTION add_calls(p_calls jsonb) RETURNS SETOF bigint
LANGUAGE sql SET search_path = jobdaemon, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off
AS $$
    INSERT INTO provider_calls (order_id, job_id, batch, provider, images, external_task_id, key_alias, price)
    SELECT w.order_id, w.job_id, w.batch, w.provider, w.images, w.task_id, w.key, w.price
    FROM jsonb_to_recordset(p_calls) AS w (order_id bigint, job_id bigint, batch integer, provider text, images integer[],
        task_id text, key text, price numeric)
    WHERE NOT EXISTS (SELECT FROM provider_calls c WHERE c.job_id = w.job_id AND c.outcome IS NULL)
    RETURNING order_id
$$;

-- Calls (p_calls, as for add_calls) of running jobs (p_ids, each with its token of p_tokens) of open orders (p_orders, each once) are
-- noted, if the fence accepts them all; whether it did and each is new. Locks orders by id, then jobs by id; the orders only against
-- who means to stop their jobs, as cancelling does, or to delete them.
CREATE FUNCTION note_submits(p_orders bigint[], p_ids bigint[], p_tokens bigint[], p_calls jsonb) RETURNS boolean
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_count integer;
BEGIN
    -- Asked for by their ids alone: some indexes hold nothing but open orders, and would be gone through for them.
    SELECT count(*) FILTER (WHERE held.finished_at IS NULL) INTO v_count
        FROM (SELECT o.finished_at FROM orders o WHERE o.id = ANY (p_orders) ORDER BY o.id FOR KEY SHARE) AS held;
    IF v_count <> cardinality(p_orders) THEN
        RETURN false;
    END IF;
    PERFORM FROM unnest(p_ids, p_tokens) AS a (id, token)
        JOIN procrastinate_jobs j ON j.id = a.id AND j.token = a.token
        WHERE j.status = 'doing' ORDER BY j.id FOR UPDATE OF j;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count <> cardinality(p_ids) THEN
        RETURN false;
    END IF;
    RETURN (SELECT count(*) FROM add_calls(p_calls)) = cardinality(p_ids);
END;
$$;

-- Planning a claim anew each time was four tenths of its work. What is planned once may be planned while the table is empty, so what
-- claims is bound to the indexes that are made for it, as what chooses by fair share has been all along; before, 40,000 jobs that came
-- to a table nobody had analysed since were read through by every claim.
ALTER FUNCTION claim_jobs(text, bigint, integer, text[])
    SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
    SET enable_incremental_sort = off SET jit = off;

-- As in 0012, but what has bought is found first, by the index made for it, and put in order then: to spare itself the sort, the planner
-- would rather go through all that is ready in claim order.
CREATE OR REPLACE FUNCTION ready_bought(p_queue text, p_keys text[], OUT ids bigint[], OUT aliases text[])
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    WITH bought AS MATERIALIZED (
        SELECT j.id, j.priority, j.lock, bought_with(j.id) AS alias,
            CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END AS order_id
        FROM procrastinate_jobs j
        WHERE j.queue_name = p_queue AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.key_alias IS NOT NULL
    )
    SELECT coalesce(array_agg(b.id ORDER BY b.place), '{}'), coalesce(array_agg(b.alias ORDER BY b.place), '{}')
    FROM (
        SELECT r.id, r.alias, row_number() OVER (ORDER BY r.priority DESC, r.order_id, r.id) AS place
        FROM bought r
        WHERE r.alias = ANY (p_keys)
            AND (r.lock IS NULL OR NOT EXISTS (
                SELECT FROM procrastinate_jobs d WHERE d.lock = r.lock AND d.status = 'doing'))
        ORDER BY place LIMIT 500
    ) AS b
$$;

-- As in 0012 (there still pick_jobs), but for how it asks whether anything is lifted.
CREATE OR REPLACE FUNCTION pick_wanted_jobs(p_queue queues, p_limit integer, p_except bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_ids bigint[] := '{}';
    v_has_lifted boolean;
BEGIN
    FOR v_try IN 1..2 LOOP
        -- Asked in this way only the index of the claim order answers: others would be gone through, as far as they are the queue's.
        v_has_lifted := coalesce((SELECT j.priority >= lifted_priority() FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
            ORDER BY j.priority DESC LIMIT 1), false);
        IF v_has_lifted OR p_queue.fair_share IS NOT NULL THEN
            RETURN pick_shared_jobs(p_queue, p_limit, v_has_lifted, p_except);
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
                        AND j.id <> ALL (p_except)
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
