-- A fair share that costs little however many jobs wait, and of however many customers: from the head of the queue to its lanes (64, by
-- a hash of the customer: jobs_lane_idx in tune.sql), and from a lane to its customers (jobs_lane_customer_idx) only where somebody who
-- has had his share fills it. The rules are those of jobdaemon/domain/picking.py, which tests hold equal to this.

-- shared_candidates of 0006 is used no more. It stays until a post migration: a claim under way while this is applied may call it.

-- Whether no ready job of the queue with this lock goes before this one.
CREATE FUNCTION is_first_of_lock(
    p_queue text, p_lock text, p_priority integer, p_order_id bigint, p_id bigint, p_except bigint[]) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT NOT EXISTS (SELECT FROM procrastinate_jobs j
        WHERE j.lock = p_lock AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name = p_queue AND j.id <> ALL (p_except)
            AND (-j.priority, coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END,
                    9223372036854775807), j.id)
                < (-p_priority, coalesce(p_order_id, 9223372036854775807), p_id));
$$;

-- Ready jobs of the queue to choose from, lifted ones first, each part in claim order. They come from sources: the head of the queue
-- (p_window jobs of each part; source 1), lanes (as many of each part as their depth says; sources 2 and on) and customers (in the
-- same way, numbered on from there; '' is nobody's work). p_held: how many jobs each customer runs; jobs of those who run more than
-- p_most are left out. edges: 0, or the source that was cut off here, so that what lies behind this place is not certain. ids: NULL at
-- an edge where the job itself has to wait for another one's lock.
CREATE FUNCTION gather_candidates(
    p_queue queues, p_has_lifted boolean, p_most integer, p_held jsonb, p_except bigint[],
    p_window integer, p_lanes bigint[], p_lane_depths integer[], p_customers text[], p_customer_depths integer[],
    OUT ids bigint[], OUT priorities integer[], OUT customers text[], OUT edges integer[], OUT lifted_count integer)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
-- Planned once per session, whatever the tables hold then: planning takes ten times as long as running, and every part of this is
-- a walk along an index that is in the order wanted.
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET enable_incremental_sort = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    WITH part AS MATERIALIZED (
        SELECT p.* FROM (VALUES (true, lifted_priority(), 2147483647), (false, -2147483648, lifted_priority() - 1))
            AS p (is_lifted, low, high)
        WHERE p_has_lifted OR NOT p.is_lifted
    ), seen AS (
        SELECT CASE WHEN found.place = p_window THEN 1 ELSE 0 END AS edge, part.is_lifted, found.*
        FROM part CROSS JOIN LATERAL (
            SELECT j.id, j.lock, j.priority,
                CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END AS order_id,
                coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') AS customer,
                row_number() OVER (ORDER BY j.priority DESC,
                    (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id) AS place
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                AND j.priority BETWEEN part.low AND part.high
                AND j.id <> ALL (p_except)
                AND (j.lock IS NULL OR NOT EXISTS (SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
            ORDER BY j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
            LIMIT p_window) AS found
        UNION ALL
        SELECT CASE WHEN found.place = wanted.depth THEN wanted.place + 1 ELSE 0 END, part.is_lifted, found.*
        FROM unnest(p_lanes, p_lane_depths) WITH ORDINALITY AS wanted (lane, depth, place)
        CROSS JOIN part
        CROSS JOIN LATERAL (
            SELECT j.id, j.lock, j.priority, (j.args ->> 'order_id')::bigint, j.args ->> 'customer',
                row_number() OVER (ORDER BY j.priority DESC, ((j.args ->> 'order_id')::bigint), j.id) AS place
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                AND j.task_name LIKE 'jobdaemon.%' AND (j.args ->> 'customer') COLLATE "C" <> ''
                AND (hashtext(j.queue_name COLLATE "C")::bigint * 64 + (hashtext((j.args ->> 'customer') COLLATE "C") & 63)) = wanted.lane
                AND j.priority BETWEEN part.low AND part.high
                AND j.id <> ALL (p_except)
                AND (j.lock IS NULL OR NOT EXISTS (SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
            ORDER BY j.priority DESC, ((j.args ->> 'order_id')::bigint), j.id
            LIMIT wanted.depth) AS found
        UNION ALL
        SELECT CASE WHEN found.place = wanted.depth THEN wanted.place + 1 + cardinality(p_lanes) ELSE 0 END, part.is_lifted, found.*
        FROM unnest(p_customers, p_customer_depths) WITH ORDINALITY AS wanted (customer, depth, place)
        CROSS JOIN part
        CROSS JOIN LATERAL (
            SELECT j.id, j.lock, j.priority, CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END,
                wanted.customer,
                row_number() OVER (
                    ORDER BY (coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C"),
                        j.priority DESC,
                        (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id) AS place
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                -- Not =: then jobs_ready_idx would have the order wanted too, and may be thought as good.
                AND coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C"
                    BETWEEN wanted.customer AND wanted.customer
                AND j.priority BETWEEN part.low AND part.high
                AND j.id <> ALL (p_except)
                AND (j.lock IS NULL OR NOT EXISTS (SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
            ORDER BY (coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '') COLLATE "C"),
                j.priority DESC, (CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END), j.id
            LIMIT wanted.depth) AS found
    ), judged AS (
        SELECT s.*, s.lock IS NULL OR is_first_of_lock(p_queue.name, s.lock, s.priority, s.order_id, s.id, p_except) AS is_choice
        FROM seen s WHERE s.edge <> 0 OR coalesce((p_held ->> s.customer)::integer, 0) <= p_most
    ), kept AS (
        SELECT CASE WHEN d.is_choice THEN d.id END AS id, d.priority, d.customer, d.edge, d.is_lifted
        FROM judged d WHERE d.is_choice OR d.edge <> 0
        ORDER BY d.is_lifted DESC, d.priority DESC, d.order_id, d.id
    )
    SELECT coalesce(array_agg(k.id), '{}'), coalesce(array_agg(k.priority), '{}'), coalesce(array_agg(k.customer), '{}'),
        coalesce(array_agg(k.edge::integer), '{}'), count(*) FILTER (WHERE k.is_lifted)
    INTO ids, priorities, customers, edges, lifted_count
    FROM kept k;
END;
$$;

-- The customers of these lanes who have not had their share. Where nothing is lifted or locked no more than p_most of them, those whose
-- first job comes first: while fewer than p_most jobs have been chosen, one of these still has its first job, and that goes before all
-- of the others'.
CREATE FUNCTION lane_customers(
    p_queue queues, p_most integer, p_has_lifted boolean, p_held jsonb, p_except bigint[], p_lanes bigint[]) RETURNS text[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET enable_incremental_sort = off SET jit = off
AS $$
BEGIN
    RETURN ARRAY(
        -- A loose index scan: one step per customer, however many jobs each has.
        WITH RECURSIVE known AS (
            SELECT wanted.lane, first.*
            FROM unnest(p_lanes) AS wanted (lane)
            CROSS JOIN LATERAL (
                SELECT (j.args ->> 'customer') COLLATE "C" AS customer, j.lock, j.priority,
                    (j.args ->> 'order_id')::bigint AS order_id, j.id
                FROM procrastinate_jobs j
                WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND j.task_name LIKE 'jobdaemon.%' AND (j.args ->> 'customer') COLLATE "C" <> ''
                    AND (hashtext(j.queue_name COLLATE "C")::bigint * 64 + (hashtext((j.args ->> 'customer') COLLATE "C") & 63)) = wanted.lane
                ORDER BY ((j.args ->> 'customer') COLLATE "C"), j.priority DESC, ((j.args ->> 'order_id')::bigint), j.id
                LIMIT 1) AS first
            UNION ALL
            SELECT k.lane, next.*
            FROM known k
            CROSS JOIN LATERAL (
                SELECT (j.args ->> 'customer') COLLATE "C", j.lock, j.priority, (j.args ->> 'order_id')::bigint, j.id
                FROM procrastinate_jobs j
                WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL
                    AND j.task_name LIKE 'jobdaemon.%' AND (j.args ->> 'customer') COLLATE "C" <> ''
                    AND (hashtext(j.queue_name COLLATE "C")::bigint * 64 + (hashtext((j.args ->> 'customer') COLLATE "C") & 63)) = k.lane
                    AND (j.args ->> 'customer') COLLATE "C" > k.customer
                ORDER BY ((j.args ->> 'customer') COLLATE "C"), j.priority DESC, ((j.args ->> 'order_id')::bigint), j.id
                LIMIT 1) AS next
        )
        SELECT k.customer FROM known k
        WHERE coalesce((p_held ->> k.customer)::integer, 0) < p_queue.fair_share
        ORDER BY k.priority DESC, k.order_id, k.id
        LIMIT CASE WHEN NOT p_has_lifted AND cardinality(p_except) = 0 AND NOT EXISTS (SELECT FROM known l WHERE l.lock IS NOT NULL)
            THEN p_most END);
END;
$$;

-- Deals up to p_limit slots to candidates in turn: those below the share first; then, p_with_surplus, round and round to who runs
-- least. Lifted work goes first, but after p_passed starts of work of priority p_top or more only when that makes three.
-- crossed: the sources whose edge was passed, so that this may be wrong; minus the source where the job at the edge was not
-- taken. Sources above p_blocks are customers: passing their edge is harmless where they could not have had more.
CREATE FUNCTION deal_slots(
    p_limit integer, p_share integer, p_top integer, p_passed integer, p_held jsonb, p_with_surplus boolean, p_blocks integer,
    p_ids bigint[], p_priorities integer[], p_customers text[], p_edges integer[], p_lifted_count integer,
    OUT chosen bigint[], OUT passed integer, OUT crossed integer[])
LANGUAGE plpgsql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_count integer := cardinality(p_ids);
    v_is_taken boolean[] := array_fill(false, ARRAY[v_count]);
    v_held jsonb := coalesce(p_held, '{}');
    -- who runs as many gets no more for now; nobody's work is never held back
    v_level integer := coalesce(p_share, 2147483647);
    -- who of those with more waiting runs least, and who they are when it is only one
    v_next_level integer;
    v_left text;
    v_is_left_alone boolean;
    -- lifted work and the rest: from where something is left, where each stands, and where it ends
    v_first integer[] := ARRAY[1, p_lifted_count + 1];
    v_at integer[];
    v_end integer[] := ARRAY[p_lifted_count, v_count];
    v_place integer;
    v_edge integer;
    v_running integer;
BEGIN
    chosen := '{}';
    passed := p_passed;
    crossed := '{}';
    LOOP
        v_at := v_first;
        v_next_level := NULL;
        v_is_left_alone := true;
        WHILE cardinality(chosen) < p_limit LOOP
            FOR v_part IN 1..2 LOOP
                v_place := v_at[v_part];
                WHILE v_place <= v_end[v_part] LOOP
                    v_running := CASE WHEN p_customers[v_place] = '' THEN -1
                        ELSE coalesce((v_held ->> p_customers[v_place])::integer, 0) END;
                    EXIT WHEN NOT v_is_taken[v_place] AND v_running < v_level AND p_ids[v_place] IS NOT NULL;
                    v_edge := p_edges[v_place];
                    IF v_edge <> 0 AND (v_edge <= p_blocks OR v_running < v_level) THEN
                        v_edge := CASE WHEN v_is_taken[v_place] THEN v_edge ELSE -v_edge END;
                        IF v_edge <> ALL (crossed) THEN
                            crossed := crossed || v_edge;
                        END IF;
                    END IF;
                    IF v_is_taken[v_place] AND v_place = v_first[v_part] AND v_edge = 0 THEN
                        v_first[v_part] := v_place + 1;
                    END IF;
                    IF NOT v_is_taken[v_place] OR v_edge <> 0 THEN
                        v_is_left_alone := v_is_left_alone AND (v_next_level IS NULL OR v_left = p_customers[v_place]);
                        v_left := p_customers[v_place];
                        v_next_level := least(v_next_level, v_running + 1);
                    END IF;
                    v_place := v_place + 1;
                END LOOP;
                v_at[v_part] := v_place;
            END LOOP;
            IF v_at[1] <= v_end[1] THEN
                IF v_at[2] <= v_end[2] AND p_priorities[v_at[2]] >= p_top AND passed < 3 THEN
                    v_place := v_at[2];
                    passed := passed + 1;
                ELSE
                    v_place := v_at[1];
                    passed := 0;
                END IF;
            ELSE
                EXIT WHEN v_at[2] > v_end[2];
                v_place := v_at[2];
            END IF;
            v_is_taken[v_place] := true;
            chosen := chosen || p_ids[v_place];
            IF p_held IS NOT NULL AND p_customers[v_place] <> '' THEN
                v_held := v_held || jsonb_build_object(p_customers[v_place], coalesce((v_held ->> p_customers[v_place])::integer, 0) + 1);
            END IF;
        END LOOP;
        EXIT WHEN cardinality(chosen) >= p_limit OR NOT p_with_surplus OR cardinality(crossed) > 0;
        -- Nobody within the share waits: what is left goes round, to who runs least. Behind an edge there may be more of the same.
        EXIT WHEN v_next_level IS NULL;
        v_level := CASE WHEN v_is_left_alone THEN 2147483647 ELSE v_next_level END;
    END LOOP;
END;
$$;

-- What pick_shared_jobs chooses, locking nothing: it looks at the head of the queue, and further only where slots are left.
CREATE FUNCTION choose_shared_jobs(
    p_queue queues, p_limit integer, p_has_lifted boolean, p_top integer, p_passed integer, p_except bigint[],
    OUT ids bigint[], OUT passed integer)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET enable_incremental_sort = off SET jit = off
AS $$
DECLARE
    v_share integer := p_queue.fair_share;
    -- how many jobs each customer runs
    v_held jsonb;
    v_with_surplus boolean := false;
    -- where to look, and how far at a time
    v_depth integer := least(p_limit, 2 + p_limit / 16);
    v_window integer := 2 * p_limit + 32;
    v_first_lane bigint := hashtext(p_queue.name COLLATE "C")::bigint * 64;
    v_lanes bigint[] := '{}';
    v_lane_depths integer[] := '{}';
    v_customers text[] := '{}';
    v_customer_depths integer[] := '{}';
    v_blocks integer;
    v_from record;
    v_dealt record;
    v_edge integer;
    v_split bigint[];
    v_found text[];
BEGIN
    IF v_share IS NOT NULL THEN
        v_held := (SELECT coalesce(jsonb_object_agg(h.customer, h.running), '{}') FROM (
            SELECT j.args ->> 'customer' AS customer, count(*) AS running
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'doing' AND j.task_name LIKE 'jobdaemon.%'
                AND (j.args ->> 'customer') COLLATE "C" <> ''
            GROUP BY 1) AS h);
    END IF;
    LOOP
        v_blocks := cardinality(v_lanes) + 1;
        v_from := gather_candidates(p_queue, p_has_lifted, CASE WHEN v_with_surplus OR v_share IS NULL THEN 2147483647 ELSE v_share - 1 END,
            v_held, p_except, v_window, v_lanes, v_lane_depths, v_customers, v_customer_depths);
        v_dealt := deal_slots(p_limit, v_share, p_top, p_passed, v_held, v_with_surplus, v_blocks, v_from.ids, v_from.priorities,
            v_from.customers, v_from.edges, v_from.lifted_count);
        IF cardinality(v_dealt.crossed) = 0 THEN
            EXIT WHEN cardinality(v_dealt.chosen) >= p_limit OR v_with_surplus OR v_share IS NULL;
            -- All that waits within the share is chosen, and slots are left: whoever has had the share waits for the surplus.
            v_with_surplus := true;
            v_window := 0;
            v_lanes := '{}';
            v_lane_depths := '{}';
            v_customers := ARRAY(
                SELECT h.key FROM jsonb_each_text(v_held) AS h WHERE h.value::integer >= v_share
                UNION
                SELECT coalesce(CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN j.args ->> 'customer' END, '')
                FROM procrastinate_jobs j WHERE j.id = ANY (v_dealt.chosen));
            v_customer_depths := array_fill(least(p_limit, 4 * p_limit / greatest(cardinality(v_customers), 1) + 1),
                ARRAY[cardinality(v_customers)]);
            CONTINUE;
        END IF;
        v_split := '{}';
        FOREACH v_edge IN ARRAY v_dealt.crossed LOOP
            IF v_share IS NULL THEN
                v_window := 8 * v_window;
            ELSIF abs(v_edge) = 1 THEN
                -- Who fills the head fills its lane too.
                v_split := ARRAY(SELECT DISTINCT v_first_lane + (hashtext(c.customer COLLATE "C") & 63)
                    FROM unnest(v_from.customers, v_from.edges) AS c (customer, edge)
                    WHERE c.edge = 1 AND (v_held ->> c.customer)::integer >= v_share);
                v_window := 0;
                v_lanes := ARRAY(SELECT generate_series(v_first_lane, v_first_lane + 63));
                v_lane_depths := array_fill(v_depth, ARRAY[64]);
                v_customers := '{""}';
                v_customer_depths := ARRAY[p_limit];
                EXIT;
            ELSIF abs(v_edge) > v_blocks THEN
                v_customer_depths[abs(v_edge) - v_blocks] := 8 * v_customer_depths[abs(v_edge) - v_blocks];
            ELSIF v_edge > 0 THEN
                v_lane_depths[v_edge - 1] := 8 * v_lane_depths[v_edge - 1];
            ELSE
                v_split := v_split || v_lanes[-v_edge - 1];
            END IF;
        END LOOP;
        IF cardinality(v_split) > 0 THEN
            SELECT array_agg(l.lane), array_agg(l.depth) INTO v_lanes, v_lane_depths
                FROM unnest(v_lanes, v_lane_depths) AS l (lane, depth) WHERE l.lane <> ALL (v_split);
            v_lanes := coalesce(v_lanes, '{}');
            v_lane_depths := coalesce(v_lane_depths, '{}');
            v_found := lane_customers(p_queue, p_limit, p_has_lifted, v_held, p_except, v_split);
            v_customers := v_customers || v_found;
            v_customer_depths := v_customer_depths || array_fill(v_depth, ARRAY[cardinality(v_found)]);
        END IF;
    END LOOP;
    ids := v_dealt.chosen;
    passed := v_dealt.passed;
END;
$$;

-- The highest priority that a plan has: lifted work shares with work of at least this.
CREATE FUNCTION top_priority(queue text) RETURNS integer
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT max(p.priority) FROM plans p WHERE queue IS NOT NULL;
$$;

-- Its successor is called in the same way.
-- squawk-ignore ban-drop-function
DROP FUNCTION pick_shared_jobs(queues, integer, boolean);
-- Chooses, locks and returns up to p_limit ready jobs of a queue that has a fair share or lifted work waiting, none of p_except; see
-- jobdaemon/domain/picking.py for the rules. Called under the queue's lock when it has a fair share.
CREATE FUNCTION pick_shared_jobs(p_queue queues, p_limit integer, p_has_lifted boolean, p_except bigint[] DEFAULT '{}')
RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
AS $$
DECLARE
    -- lifted work waits for this plan's work, three times out of four
    v_top integer;
    v_before integer := 0;
    v_except bigint[] := p_except;
    v_chosen record;
    v_locked bigint[];
BEGIN
    IF p_has_lifted THEN
        v_top := top_priority(p_queue.name);
        -- Who holds the row decides; the others wait and see what it left.
        INSERT INTO lifted_turns (queue) SELECT p_queue.name
            WHERE NOT EXISTS (SELECT FROM lifted_turns t WHERE t.queue = p_queue.name) ON CONFLICT DO NOTHING;
        SELECT t.passed INTO v_before FROM lifted_turns t WHERE t.queue = p_queue.name FOR UPDATE;
    END IF;
    -- Somebody who cancels or lifts an order may hold a job: then choose again without it.
    FOR v_try IN 1..3 LOOP
        v_chosen := choose_shared_jobs(p_queue, p_limit, p_has_lifted, v_top, v_before, v_except);
        -- CASE hides the condition from the planner, who would rather walk all of a small-looking index of ready jobs.
        v_locked := ARRAY(SELECT j.id FROM procrastinate_jobs j
            WHERE j.id = ANY (v_chosen.ids) AND CASE WHEN j.status = 'todo' THEN j.scheduled_at IS NULL ELSE false END
            FOR UPDATE SKIP LOCKED);
        EXIT WHEN cardinality(v_locked) = cardinality(v_chosen.ids);
        v_except := v_except || ARRAY(SELECT c.id FROM unnest(v_chosen.ids) AS c (id) WHERE c.id <> ALL (v_locked));
    END LOOP;
    IF v_chosen.passed <> v_before AND p_has_lifted THEN
        UPDATE lifted_turns t SET passed = v_chosen.passed WHERE t.queue = p_queue.name;
    END IF;
    RETURN v_locked;
END;
$$;

