-- A slot of a limit is free as soon as the provider has done what the job asked of it: decoding and keeping what it made take none of
-- the provider's time. The job runs on, under its lease and its fence, until its end is committed.

-- Of a running job whose provider has done its call: its token, so that no later claim inherits it. The job holds no slot of any
-- limit any more: not its queue's, its key's or its customer's share.
ALTER TABLE procrastinate_jobs ADD COLUMN IF NOT EXISTS released_token bigint;

-- As in 0005, without those in what runs; a job that tries an open circuit is counted until its end, which tells.
CREATE OR REPLACE FUNCTION queue_capacity(p_queue queues, p_asked integer) RETURNS integer
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_asked bigint := p_asked;
    v_running bigint;
    v_probes bigint;
BEGIN
    IF p_queue.paused OR p_queue.rested_until > clock_timestamp()
        OR (p_queue.circuit = 'open' AND p_queue.circuit_until > clock_timestamp())
    THEN
        RETURN 0;
    END IF;
    IF p_queue.cluster_limit IS NULL AND p_queue.adaptive_limit IS NULL AND p_queue.circuit = 'closed' THEN
        RETURN p_asked;
    END IF;
    -- Counted in the jobs themselves: a second table of leases leaks through procrastinate's own functions.
    SELECT count(*) FILTER (WHERE (j.released_token = j.token) IS NOT TRUE),
            count(*) FILTER (WHERE j.token > p_queue.circuit_token) INTO v_running, v_probes
        FROM procrastinate_jobs j WHERE j.queue_name = p_queue.name AND j.status = 'doing';
    IF p_queue.circuit <> 'closed' THEN
        -- One job at a time over all daemons tries whether the other side is back; what was claimed earlier does not count.
        v_asked := least(v_asked, 1 - v_probes);
        IF p_queue.circuit = 'open' AND v_asked > 0 THEN
            -- An operator who holds the row must not hold up the claim.
            UPDATE queues q SET circuit = 'probing' WHERE q.name = (SELECT held.name FROM queues held
                WHERE held.name = p_queue.name AND held.circuit = 'open' FOR NO KEY UPDATE SKIP LOCKED);
        END IF;
    END IF;
    RETURN greatest(least(v_asked, p_queue.cluster_limit - v_running, p_queue.adaptive_limit - v_running), 0);
END;
$$;

-- As in 0010, without those in what a customer runs.
CREATE OR REPLACE FUNCTION choose_shared_jobs(
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
            WHERE j.queue_name = p_queue.name AND j.status = 'doing' AND (j.released_token = j.token) IS NOT TRUE
                AND j.task_name LIKE 'jobdaemon.%'
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

-- As in 0019, without those in what runs under a key.
CREATE OR REPLACE FUNCTION claim_keyed_jobs(p_queue queues, p_worker bigint, p_limit integer, p_keys text[])
RETURNS TABLE (id bigint, task_name character varying, priority integer, args jsonb, attempts integer, deaths smallint,
    token bigint, key_alias text, opens_in_s double precision)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    -- more than any concurrency may be
    v_unbounded CONSTANT bigint := 2147483648;
    v_now timestamptz := clock_timestamp();
    v_today date := (v_now AT TIME ZONE 'UTC')::date;
    v_provider text := substring(p_queue.name FROM '^generate\.(.+)$');
    -- all of the provider's; those of them that this worker has; v_keys are those that nobody holds the rows of
    v_all text[] := ARRAY(SELECT k.alias FROM provider_keys k WHERE k.provider = v_provider);
    v_known text[] := ARRAY(SELECT a.alias FROM unnest(v_all) AS a (alias) WHERE a.alias = ANY (p_keys));
    v_keys provider_keys[] := '{}';
    v_aliases text[] := '{}';
    -- jobs that may run under each more than do; of those, jobs that may buy now
    v_room bigint[] := '{}';
    v_free bigint[];
    v_has_bought boolean[] := '{}';
    v_key provider_keys;
    -- ready jobs that have bought a task, in claim order, and with which key
    v_bought bigint[];
    v_bought_with text[];
    -- jobs that fit no key's budget
    v_unfit bigint[] := '{}';
    v_except bigint[];
    v_first integer;
    v_at integer;
    v_id bigint;
    v_ids bigint[];
    v_alias text;
    v_images integer;
    v_turn integer;
    v_token bigint;
    v_count integer := 0;
    v_opens timestamptz;
BEGIN
    -- An operator who holds a row must not hold up the claim.
    FOR v_key IN SELECT k.* FROM provider_keys k WHERE k.provider = v_provider AND k.alias = ANY (v_known)
        ORDER BY k.alias FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        IF v_key.spent_on IS DISTINCT FROM v_today THEN
            v_key.spent := 0;
        END IF;
        v_keys := v_keys || v_key;
        v_aliases := v_aliases || v_key.alias;
        v_room := v_room || (coalesce(v_key.concurrency, v_unbounded) - (SELECT count(*) FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'doing' AND j.key_alias = v_key.alias
                AND (j.released_token = j.token) IS NOT TRUE));
        v_has_bought := v_has_bought || false;
    END LOOP;
    SELECT b.ids, b.aliases INTO v_bought, v_bought_with FROM ready_bought(p_queue.name, v_all) AS b;

    WHILE v_count < p_limit LOOP
        -- What has to wait for its own key is not to be picked; the first that need not goes on when nothing can be bought.
        v_except := v_unfit;
        v_first := NULL;
        FOR i IN 1..cardinality(v_bought) LOOP
            v_at := array_position(v_aliases, v_bought_with[i]);
            IF v_at IS NULL OR v_room[v_at] <= 0 OR coalesce((v_keys[v_at]).rested_until > v_now, false) THEN
                v_except := v_except || v_bought[i];
            ELSE
                v_first := coalesce(v_first, i);
            END IF;
        END LOOP;
        v_free := '{}';
        FOR i IN 1..cardinality(v_keys) LOOP
            v_free := v_free || key_free(v_keys[i], v_room[i], v_now);
        END LOOP;
        IF 0 < ANY (v_free) AND cardinality(v_unfit) < 20 THEN
            v_turn := (SELECT t.passed FROM lifted_turns t WHERE t.queue = p_queue.name);
            v_ids := pick_jobs(p_queue, 1, v_except);
            EXIT WHEN cardinality(v_ids) = 0;
            v_id := v_ids[1];
            v_alias := bought_with(v_id);
            IF v_alias = ANY (v_all) THEN
                v_at := array_position(v_bought, v_id);
                IF v_at IS NULL THEN
                    -- Its row does not say that it has bought a task: it was written by somebody else. Now we know.
                    UPDATE lifted_turns t SET passed = coalesce(v_turn, 0) WHERE t.queue = p_queue.name AND t.passed <> coalesce(v_turn, 0);
                    v_bought := v_bought || v_id;
                    v_bought_with := v_bought_with || v_alias;
                    CONTINUE;
                END IF;
            ELSE
                v_alias := NULL;
                v_images := (SELECT job_images(j.args) FROM procrastinate_jobs j WHERE j.id = v_id);
                FOR i IN 1..cardinality(v_keys) LOOP
                    v_key := v_keys[i];
                    -- the one with most free starts; of equals the first by alias
                    IF v_free[i] > 0 AND (v_alias IS NULL OR v_free[i] > v_free[v_at])
                        AND coalesce(v_images <= v_key.daily_budget - v_key.spent, true)
                    THEN
                        v_at := i;
                        v_alias := v_key.alias;
                    END IF;
                END LOOP;
                IF v_alias IS NULL THEN
                    UPDATE lifted_turns t SET passed = coalesce(v_turn, 0) WHERE t.queue = p_queue.name AND t.passed <> coalesce(v_turn, 0);
                    v_unfit := v_unfit || v_id;
                    CONTINUE;
                END IF;
                v_key := v_keys[v_at];
                v_key.spent := least(v_key.spent::bigint + v_images, 2147483647);
                v_key.next_start_at := CASE WHEN v_key.rate IS NOT NULL THEN v_now + make_interval(secs => 1 / v_key.rate) END;
                v_keys[v_at] := v_key;
                v_has_bought[v_at] := true;
            END IF;
        ELSE
            EXIT WHEN v_first IS NULL;
            v_id := v_bought[v_first];
            v_alias := v_bought_with[v_first];
            PERFORM FROM procrastinate_jobs j
                WHERE j.id = v_id AND CASE WHEN j.status = 'todo' THEN j.scheduled_at IS NULL ELSE false END
                FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_bought := v_bought[:v_first - 1] || v_bought[v_first + 1:];
                v_bought_with := v_bought_with[:v_first - 1] || v_bought_with[v_first + 1:];
                CONTINUE;
            END IF;
        END IF;

        v_token := coalesce(v_token, nextval('attempt_token_seq'));
        RETURN QUERY UPDATE procrastinate_jobs j
            SET status = 'doing', worker_id = p_worker, token = v_token, key_alias = v_alias
            WHERE j.id = v_id
            RETURNING j.id, j.task_name, j.priority, j.args, j.attempts, j.deaths, j.token, j.key_alias, NULL::double precision;
        v_count := v_count + 1;
        v_at := array_position(v_aliases, v_alias);
        v_room[v_at] := v_room[v_at] - 1;
        v_at := array_position(v_bought, v_id);
        IF v_at IS NOT NULL THEN
            v_bought := v_bought[:v_at - 1] || v_bought[v_at + 1:];
            v_bought_with := v_bought_with[:v_at - 1] || v_bought_with[v_at + 1:];
        END IF;
    END LOOP;

    FOR i IN 1..cardinality(v_keys) LOOP
        v_key := v_keys[i];
        IF v_has_bought[i] THEN
            UPDATE provider_keys k SET next_start_at = v_key.next_start_at, spent = v_key.spent, spent_on = v_today
                WHERE k.provider = v_key.provider AND k.alias = v_key.alias;
        END IF;
        v_opens := least(v_opens,
            key_opens_at(v_key, v_room[i], v_key.alias = ANY (v_bought_with), cardinality(v_unfit) > 0, v_now));
    END LOOP;
    IF cardinality(v_keys) < cardinality(v_known) THEN
        -- Who holds a row may let go without a word.
        v_opens := least(v_opens, v_now + interval '1 second');
    END IF;
    IF v_count < p_limit AND v_opens IS NOT NULL AND EXISTS (SELECT FROM procrastinate_jobs j
        WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL)
    THEN
        RETURN QUERY SELECT NULL::bigint, NULL::character varying, NULL::integer, NULL::jsonb, NULL::integer, NULL::smallint,
            NULL::bigint, NULL::text, greatest(extract(epoch FROM v_opens - clock_timestamp()), 0)::double precision;
    END IF;
END;
$$;

-- As in 0007, without those in what runs: they say nothing of what the provider can take.
CREATE OR REPLACE FUNCTION lock_steering(p_queues text[], p_new text[])
RETURNS TABLE (queue text, adaptive_limit integer, rested_until timestamptz, circuit text, circuit_until timestamptz,
    circuit_token bigint, circuit_after integer, circuit_rest interval, circuit_rest_cap interval,
    limit_token bigint, limit_changed_at timestamptz, successes integer, step integer, signalled_at timestamptz, rests integer,
    opened integer, outages integer, outage_at timestamptz, running bigint, most bigint, newest_token bigint, now timestamptz)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue record;
BEGIN
    FOR v_queue IN SELECT q.id, q.name, q.adaptive_limit IS NOT NULL OR q.circuit <> 'closed' AS is_set FROM queues q WHERE q.name = ANY (p_queues) ORDER BY q.name LOOP
        PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);
        IF v_queue.is_set OR v_queue.name = ANY (p_new) THEN
            INSERT INTO queue_steering (queue) VALUES (v_queue.name) ON CONFLICT DO NOTHING;
            IF FOUND THEN
                PERFORM pg_notify('jobdaemon_control', v_queue.name);
            END IF;
        END IF;
        RETURN QUERY SELECT q.name, q.adaptive_limit, q.rested_until, q.circuit, q.circuit_until, q.circuit_token, q.circuit_after,
                q.circuit_rest, q.circuit_rest_cap, s.limit_token, s.limit_changed_at, s.successes, s.step, s.signalled_at, s.rests,
                s.opened, s.outages, s.outage_at,
                (SELECT count(*) FROM procrastinate_jobs j WHERE j.queue_name = q.name AND j.status = 'doing'
                    AND (j.released_token = j.token) IS NOT TRUE),
                least(q.cluster_limit::bigint, (SELECT sum(coalesce(q.team_size, (d.queues ->> q.name)::integer))
                    FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
                    WHERE d.status = 'running' AND d.queues ? q.name AND w.last_heartbeat > now() - interval '30 seconds')),
                nextval('attempt_token_seq'), clock_timestamp()
            FROM queue_steering s JOIN queues q ON q.name = s.queue WHERE s.queue = v_queue.name
            -- An operator who holds the row must not hold up every commit: this time nobody steers.
            FOR NO KEY UPDATE OF q, s SKIP LOCKED;
    END LOOP;
END;
$$;

-- As in 0020, without those in what runs under a key.
CREATE OR REPLACE FUNCTION keys_in_the_way(p_job procrastinate_jobs, OUT told text, OUT numbers jsonb) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    WITH provider AS (
        SELECT substr(p_job.queue_name, length('generate.') + 1) AS name
    ), known AS (
        SELECT k.alias, k.paused, k.concurrency, k.rate, k.daily_budget, k.rested_until, k.rest_reason, k.next_start_at,
            k.alias = p_job.key_alias AS is_its_own,
            CASE WHEN k.spent_on = (now() AT TIME ZONE 'UTC')::date THEN k.spent ELSE 0 END AS spent_today,
            (SELECT count(*) FROM procrastinate_jobs j
                WHERE j.queue_name = p_job.queue_name AND j.status = 'doing' AND j.key_alias = k.alias
                    AND (j.released_token = j.token) IS NOT TRUE) AS in_use,
            CASE jsonb_typeof(p_job.args -> 'images') WHEN 'array' THEN jsonb_array_length(p_job.args -> 'images') ELSE 1 END AS wanted,
            ((now() AT TIME ZONE 'UTC')::date + 1)::timestamp AT TIME ZONE 'UTC' AS midnight
        FROM provider_keys k WHERE p_job.queue_name = 'generate.' || k.provider
    ), judged AS (
        SELECT k.*, silence.daemon_id AS silent_daemon, silence.seconds AS silent_s,
            CASE WHEN silence.daemon_id IS NOT NULL OR NOT key_is_held(provider.name, k.alias) THEN 'missing'
                WHEN k.paused AND NOT its.own THEN 'paused'
                WHEN k.spent_today + k.wanted > k.daily_budget AND NOT its.own THEN 'budget'
                WHEN k.rested_until > now() THEN 'resting'
                WHEN k.in_use >= k.concurrency THEN 'concurrency'
                WHEN k.rate IS NOT NULL AND k.next_start_at > now() AND NOT its.own THEN 'rate' END AS in_the_way
        FROM known k CROSS JOIN provider CROSS JOIN LATERAL (SELECT coalesce(k.is_its_own, false) AS own) AS its
            CROSS JOIN LATERAL key_silence(provider.name, k.alias) AS silence
        WHERE its.own OR NOT EXISTS (SELECT FROM known other WHERE other.is_its_own)
    ), named AS (
        SELECT n.alias, row_number() OVER (ORDER BY n.alias) AS place,
            CASE n.in_the_way WHEN 'missing' THEN CASE WHEN n.silent_daemon IS NULL
                    THEN format('%s is in the settings of no running daemon', n.alias)
                    ELSE format('%s is held by daemon %s, which has said nothing for %s s', n.alias, n.silent_daemon, n.silent_s) END
                WHEN 'paused' THEN format('%s is paused', n.alias)
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
                    WHEN 'missing' THEN jsonb_build_object('daemon_id', n.silent_daemon, 'silent_seconds', n.silent_s)
                    WHEN 'budget' THEN jsonb_build_object('budget', n.daily_budget, 'spent', n.spent_today, 'until', n.midnight)
                    WHEN 'resting' THEN jsonb_build_object('until', n.rested_until, 'why', left(n.rest_reason, 100))
                    WHEN 'concurrency' THEN jsonb_build_object('running', n.in_use, 'limit', n.concurrency)
                    WHEN 'rate' THEN jsonb_build_object('until', n.next_start_at) ELSE '{}' END) AS numbers,
            n.is_its_own
        FROM judged n
    )
    SELECT CASE WHEN bool_or(n.is_its_own) THEN 'its call is to be collected with the key it was bought with: '
                ELSE format('no key of %s can start a call now: ', min(p.name)) END
            || string_agg(n.told, ', ' ORDER BY n.alias) FILTER (WHERE n.place <= 5)
            || CASE WHEN count(*) > 5 THEN format(', and %s more', count(*) - 5) ELSE '' END,
        jsonb_build_object('provider', min(p.name), 'keys', jsonb_agg(n.numbers ORDER BY n.alias))
    FROM named n CROSS JOIN provider p
    HAVING count(*) > 0 AND count(n.told) = count(*);
$$;

-- As in 0014, without those in what runs.
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
            WHERE j.queue_name = v_name AND j.status = 'doing' AND (j.released_token = j.token) IS NOT TRUE
                AND j.task_name LIKE 'jobdaemon.%'
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
        WHERE j.queue_name = v_name AND j.status = 'doing' AND (j.released_token = j.token) IS NOT TRUE LIMIT 10001) AS running;
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

-- As in 0018: running is what holds a slot; finishing, what holds none any more.
CREATE OR REPLACE VIEW queue_depth AS
SELECT
    q.name AS queue,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NULL
            AND j.task_name <> 'jobdaemon.prewarm') AS ready,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NOT NULL
            AND j.task_name <> 'jobdaemon.prewarm') AS scheduled,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'doing' AND (j.released_token = j.token) IS NOT TRUE) AS running,
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
    q.circuit,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'doing' AND j.released_token = j.token) AS finishing
FROM queues q;

-- As in 0012, without those in what runs.
CREATE OR REPLACE VIEW keys AS
SELECT
    k.provider,
    k.alias,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = 'generate.' || k.provider AND j.status = 'doing' AND j.key_alias = k.alias
            AND (j.released_token = j.token) IS NOT TRUE) AS running,
    k.concurrency,
    k.rate,
    k.daily_budget,
    CASE WHEN k.spent_on = (now() AT TIME ZONE 'UTC')::date THEN k.spent ELSE 0 END AS spent_today,
    CASE WHEN k.rested_until > now() THEN k.rested_until END AS rested_until,
    CASE WHEN k.rested_until > now() THEN k.rest_reason END AS rest_reason,
    k.paused
FROM provider_keys k;
