-- Which jobs are picked when it is not simply the first ones: a fair share per customer, and work that waited too long.
-- The same decision in Python, which tests hold equal to this: jobdaemon/domain/picking.py.

ALTER TABLE orders
    -- since when the customer waits: when it was made, or the time it was scheduled for
    ADD COLUMN waits_from timestamptz NOT NULL DEFAULT now(),
    -- when it was lifted over the plans; its jobs have lifted_priority() since, its own priority stays what it was
    ADD COLUMN lifted_at timestamptz;
-- The runner applies each file in a transaction, and one pass over orders is short.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_lift_idx ON orders (plan, waits_from) WHERE finished_at IS NULL AND lifted_at IS NULL;

CREATE TABLE lifted_turns (
    queue text PRIMARY KEY,
    -- how often the highest plan went first while lifted work waited, since lifted work last started
    passed integer NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
COMMENT ON TABLE lifted_turns IS 'Whose turn it is, per queue, while lifted work and work of the highest plan both wait.';

-- The priority of all lifted work, so that it goes by its order's age alone: were it to keep its plans' order among itself, an
-- endless stream of one plan, lifted too after a while, would still starve the plans below. Settings allow a tenth of it at most.
CREATE FUNCTION lifted_priority() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = jobdaemon, pg_temp
AS 'SELECT 10000000';

-- Lifts up to p_limit open orders that have waited longer than their plan's lift_after; returns how many. Orders of the highest
-- plan have nothing above them, and where an operator has set a priority it stays. Orders that somebody holds are left to the
-- next round. Lock order as everywhere: orders by id, then jobs by id.
CREATE FUNCTION lift_orders(p_limit integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_orders bigint[];
    v_jobs bigint[];
BEGIN
    v_orders := ARRAY(
        SELECT o.id FROM orders o
        WHERE o.id IN (
                SELECT due.id FROM plans p
                CROSS JOIN LATERAL (
                    SELECT w.id FROM orders w
                    WHERE w.plan = p.name AND w.finished_at IS NULL AND w.lifted_at IS NULL AND NOT w.prioritized
                        AND w.waits_from <= now() - p.lift_after
                    ORDER BY w.waits_from LIMIT p_limit) AS due
                WHERE p.priority < (SELECT max(t.priority) FROM plans t))
            AND o.finished_at IS NULL AND o.lifted_at IS NULL AND NOT o.prioritized
        ORDER BY o.id LIMIT p_limit FOR UPDATE SKIP LOCKED);
    IF cardinality(v_orders) > 0 THEN
        -- What runs and what is dead too: it may wait again.
        v_jobs := ARRAY(SELECT j.id FROM procrastinate_jobs j
            WHERE (j.args ->> 'order_id')::bigint = ANY (v_orders) AND j.task_name LIKE 'jobdaemon.%'
                AND j.status IN ('todo', 'doing', 'failed')
            ORDER BY j.id FOR UPDATE);
        UPDATE procrastinate_jobs j SET priority = lifted_priority() WHERE j.id = ANY (v_jobs);
        UPDATE orders o SET lifted_at = now() WHERE o.id = ANY (v_orders);
    END IF;
    RETURN cardinality(v_orders);
END;
$$;

-- Ready jobs of the queue to choose from, lifted ones first, each part in claim order: ids, priorities, customers numbered from 1
-- (0: no customer, never capped) and how many jobs each customer runs; the first lifted_count are lifted.
-- p_window: look at so many from the head of each part; NULL: go from customer to customer, to each one's first p_most (or all
-- that its share still allows, unless p_with_surplus).
-- is_enough: whoever is within the share can be chosen from this. is_all: so can the surplus of the others.
CREATE FUNCTION shared_candidates(
    p_queue queues, p_most integer, p_window integer, p_with_surplus boolean, p_has_lifted boolean, p_except bigint[],
    OUT ids bigint[], OUT priorities integer[], OUT customers integer[], OUT running bigint[], OUT lifted_count integer,
    OUT is_enough boolean, OUT is_all boolean)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
-- Planned once per session, whatever the tables hold then: planning takes ten times as long as running, and every part of this is
-- a walk along an index that is in the order wanted.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_share integer := p_queue.fair_share;
BEGIN
    WITH RECURSIVE known AS (
        -- A loose index scan: one step per customer, however many jobs each has.
        (SELECT coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" AS customer
            FROM procrastinate_jobs j
            WHERE p_window IS NULL AND j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
            ORDER BY 1 LIMIT 1)
        UNION ALL
        SELECT (SELECT coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C"
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" > k.customer
            ORDER BY 1 LIMIT 1)
        FROM known k WHERE k.customer IS NOT NULL
    ), held AS MATERIALIZED (
        SELECT coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" AS customer,
            count(*) AS running
        FROM procrastinate_jobs j
        WHERE v_share IS NOT NULL AND j.queue_name = p_queue.name AND j.status = 'doing'
        GROUP BY 1
    ), seen AS MATERIALIZED (
        (SELECT j.id, j.priority, j.lock, j.task_name, j.args, true AS is_lifted
            FROM procrastinate_jobs j
            WHERE p_has_lifted AND j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                AND j.priority >= lifted_priority() AND j.id <> ALL (p_except)
                AND (j.lock IS NULL OR NOT EXISTS (SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
            ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
            LIMIT coalesce(p_window, 0))
        UNION ALL
        (SELECT j.id, j.priority, j.lock, j.task_name, j.args, false
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                AND j.priority < lifted_priority() AND j.id <> ALL (p_except)
                AND (j.lock IS NULL OR NOT EXISTS (SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
            ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
            LIMIT coalesce(p_window, 0))
        UNION ALL
        SELECT r.id, r.priority, r.lock, r.task_name, r.args, r.is_lifted
        FROM (
            SELECT k.customer, CASE WHEN k.customer = '' OR p_with_surplus THEN p_most
                ELSE least(p_most, greatest(v_share - coalesce(h.running, 0), 0)) END AS most
            FROM known k LEFT JOIN held h ON h.customer = k.customer WHERE k.customer IS NOT NULL
        ) AS wanted
        CROSS JOIN LATERAL (
            (SELECT j.id, j.priority, j.lock, j.task_name, j.args, true AS is_lifted
                FROM procrastinate_jobs j
                WHERE p_has_lifted AND j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" = wanted.customer
                    AND j.priority >= lifted_priority() AND j.id <> ALL (p_except)
                    AND (j.lock IS NULL OR NOT EXISTS (
                        SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
                ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
                LIMIT wanted.most)
            UNION ALL
            (SELECT j.id, j.priority, j.lock, j.task_name, j.args, false
                FROM procrastinate_jobs j
                WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C" = wanted.customer
                    AND j.priority < lifted_priority() AND j.id <> ALL (p_except)
                    AND (j.lock IS NULL OR NOT EXISTS (
                        SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
                ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
                LIMIT wanted.most)
        ) AS r
    ), named AS (
        SELECT s.id, s.priority, s.lock, s.is_lifted,
            CASE WHEN s.task_name LIKE 'jobdaemon.%' THEN (s.args ->> 'order_id')::bigint END AS order_id,
            CASE WHEN v_share IS NULL THEN '' ELSE
                coalesce(CASE WHEN s.task_name LIKE 'jobdaemon.%' THEN s.args ->> 'customer' END, '') END COLLATE "C" AS customer
        FROM seen s
    ), unlocked AS (
        -- Of the jobs with one lock only the first is a choice.
        SELECT n.*, n.lock IS NULL OR row_number() OVER (PARTITION BY n.lock ORDER BY n.priority DESC, n.order_id, n.id) = 1
            AS is_choice
        FROM named n
    ), placed AS (
        SELECT n.*, h.running,
            dense_rank() OVER (ORDER BY n.customer) AS number,
            row_number() OVER (PARTITION BY n.customer, n.is_lifted, n.is_choice ORDER BY n.priority DESC, n.order_id, n.id) AS place
        FROM unlocked n LEFT JOIN held h ON h.customer = n.customer
    ), judged AS (
        SELECT p.*, p.customer = '' OR coalesce(p.running, 0) + p.place <= v_share AS is_within FROM placed p
    )
    SELECT
        coalesce(array_agg(w.id ORDER BY w.is_lifted DESC, w.priority DESC, w.order_id, w.id) FILTER (WHERE w.is_kept), '{}'),
        coalesce(array_agg(w.priority ORDER BY w.is_lifted DESC, w.priority DESC, w.order_id, w.id) FILTER (WHERE w.is_kept), '{}'),
        coalesce(array_agg(CASE WHEN w.customer = '' THEN 0 ELSE w.number END
            ORDER BY w.is_lifted DESC, w.priority DESC, w.order_id, w.id) FILTER (WHERE w.is_kept), '{}'),
        coalesce(array_agg(coalesce(w.running, 0)
            ORDER BY w.is_lifted DESC, w.priority DESC, w.order_id, w.id) FILTER (WHERE w.is_kept), '{}'),
        count(*) FILTER (WHERE w.is_kept AND w.is_lifted),
        -- Each pick can spend the share of one job that this counted in, at most p_most in all: twice as many are enough.
        p_window IS NULL
            OR (count(*) FILTER (WHERE w.is_lifted) < p_window OR count(*) FILTER (WHERE w.is_lifted AND w.is_choice AND w.is_within) >= 2 * p_most)
            AND (count(*) FILTER (WHERE NOT w.is_lifted) < p_window
                OR count(*) FILTER (WHERE NOT w.is_lifted AND w.is_choice AND w.is_within) >= 2 * p_most),
        CASE WHEN p_window IS NULL THEN p_with_surplus
            ELSE count(*) FILTER (WHERE w.is_lifted) < p_window AND count(*) FILTER (WHERE NOT w.is_lifted) < p_window END
    INTO ids, priorities, customers, running, lifted_count, is_enough, is_all
    FROM (SELECT u.*, u.is_choice AND (u.customer = '' OR u.place <= p_most) AS is_kept FROM judged u) AS w;
END;
$$;

-- Chooses, locks and returns up to p_limit ready jobs of a queue that has a fair share or lifted work waiting; see
-- jobdaemon/domain/picking.py for the rules. Called under the queue's lock when it has a fair share.
CREATE FUNCTION pick_shared_jobs(p_queue queues, p_limit integer, p_has_lifted boolean) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    -- lifted work waits for this plan's work, three times out of four
    v_top integer := (SELECT max(p.priority) FROM plans p);
    v_before integer := 0;
    v_passed integer;
    v_except bigint[] := '{}';
    v_chosen bigint[];
    v_locked bigint[];
    v_step integer;
    v_try integer;
    v_from record;
    v_held integer[];
    v_is_taken boolean[];
    v_level integer;
    v_lifted integer;
    v_other integer;
    v_take integer;
    v_count integer;
BEGIN
    IF p_has_lifted THEN
        -- Who holds the row decides; the others wait and see what it left.
        INSERT INTO lifted_turns (queue) SELECT p_queue.name
            WHERE NOT EXISTS (SELECT FROM lifted_turns t WHERE t.queue = p_queue.name) ON CONFLICT DO NOTHING;
        SELECT t.passed INTO v_before FROM lifted_turns t WHERE t.queue = p_queue.name FOR UPDATE;
    END IF;
    -- Somebody who cancels or lifts an order may hold a job: then choose again without it.
    FOR v_try IN 1..3 LOOP
        -- Look at more only where that leaves slots: the head; further down; each customer in turn; the surplus of all.
        FOR v_step IN 1..4 LOOP
            -- One or two customers fill the head: further down it is likely to be the same, and their number may be small.
            IF v_step = 2 THEN
                CONTINUE WHEN (SELECT max(c.number) FROM unnest(v_from.customers) AS c (number)) <= 2;
            END IF;
            SELECT * INTO v_from FROM shared_candidates(p_queue, p_limit, (ARRAY[4 * p_limit + 32, 8 * p_limit + 256])[v_step],
                v_step = 4, p_has_lifted, v_except);
            v_passed := v_before;
            v_chosen := '{}';
            v_count := cardinality(v_from.ids);
            v_is_taken := array_fill(false, ARRAY[v_count]);
            v_held := '{}';
            FOR i IN 1..v_count LOOP
                IF v_from.customers[i] > 0 THEN
                    v_held[v_from.customers[i]] := v_from.running[i];
                END IF;
            END LOOP;
            v_level := p_queue.fair_share;
            WHILE v_from.is_enough LOOP
                v_lifted := 1;
                v_other := v_from.lifted_count + 1;
                WHILE cardinality(v_chosen) < p_limit LOOP
                    WHILE v_lifted <= v_from.lifted_count AND (v_is_taken[v_lifted]
                        OR v_from.customers[v_lifted] > 0 AND v_held[v_from.customers[v_lifted]] >= v_level)
                    LOOP
                        v_lifted := v_lifted + 1;
                    END LOOP;
                    WHILE v_other <= v_count AND (v_is_taken[v_other]
                        OR v_from.customers[v_other] > 0 AND v_held[v_from.customers[v_other]] >= v_level)
                    LOOP
                        v_other := v_other + 1;
                    END LOOP;
                    EXIT WHEN v_lifted > v_from.lifted_count AND v_other > v_count;
                    IF v_lifted > v_from.lifted_count THEN
                        v_take := v_other;
                    ELSIF v_other <= v_count AND v_from.priorities[v_other] >= v_top AND v_passed < 3 THEN
                        v_take := v_other;
                        v_passed := v_passed + 1;
                    ELSE
                        v_take := v_lifted;
                        v_passed := 0;
                    END IF;
                    v_is_taken[v_take] := true;
                    v_chosen := v_chosen || v_from.ids[v_take];
                    IF v_from.customers[v_take] > 0 THEN
                        v_held[v_from.customers[v_take]] := v_held[v_from.customers[v_take]] + 1;
                    END IF;
                END LOOP;
                EXIT WHEN cardinality(v_chosen) >= p_limit OR NOT v_from.is_all;
                -- Nobody within the share waits: what is left goes round, to who runs least.
                v_level := NULL;
                FOR i IN 1..v_count LOOP
                    IF NOT v_is_taken[i] THEN
                        v_level := least(v_level, v_held[v_from.customers[i]] + 1);
                    END IF;
                END LOOP;
                EXIT WHEN v_level IS NULL;
            END LOOP;
            EXIT WHEN v_from.is_enough AND cardinality(v_chosen) >= p_limit OR v_from.is_all;
        END LOOP;
        -- CASE hides the condition from the planner, who would rather walk all of a small-looking index of ready jobs.
        v_locked := ARRAY(SELECT j.id FROM procrastinate_jobs j
            WHERE j.id = ANY (v_chosen) AND CASE WHEN j.status = 'todo' THEN j.scheduled_at IS NULL ELSE false END
            FOR UPDATE SKIP LOCKED);
        EXIT WHEN cardinality(v_locked) = cardinality(v_chosen);
        v_except := v_except || ARRAY(SELECT c.id FROM unnest(v_chosen) AS c (id) WHERE c.id <> ALL (v_locked));
    END LOOP;
    IF v_passed <> v_before AND p_has_lifted THEN
        UPDATE lifted_turns t SET passed = v_passed WHERE t.queue = p_queue.name;
    END IF;
    RETURN v_locked;
END;
$$;
