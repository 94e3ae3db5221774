-- Provider keys that only some daemons have, and what calls cost.

-- Provider -> aliases of the keys in this daemon's settings; NULL: a program that does not say.
ALTER TABLE daemons ADD COLUMN keys jsonb;

-- Whether some running daemon has this key, as far as that is known. Where none serves the queue, that is the trouble.
CREATE FUNCTION key_is_held(p_provider text, p_alias text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(bool_or(d.keys IS NULL OR coalesce(d.keys -> p_provider, '[]') ? p_alias), true)
    FROM daemons d JOIN procrastinate_workers w ON w.id = d.id
    WHERE d.status IN ('running', 'draining') AND d.queues ? ('generate.' || p_provider)
        AND w.last_heartbeat > now() - interval '30 seconds'
$$;

-- Whether a call made with this key then is to be asked for with it: the key has a row, and the call is not forgotten.
CREATE FUNCTION key_is_known(p_provider text, p_alias text, p_submitted_at timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT p_submitted_at > now() - interval '1 day'
        AND EXISTS (SELECT FROM provider_keys k WHERE k.provider = p_provider AND k.alias = p_alias)
$$;

-- The key of the task that this job goes on with: one that it has bought and whose end is not known; or another job's, when it was
-- made to collect from that once more, or to stop it. NULL when there is none, or one that is more than a day old: no provider knows
-- such a task any more, so it is not to be waited for.
CREATE OR REPLACE FUNCTION bought_with(p_job bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(
        (SELECT c.key_alias FROM provider_calls c
            WHERE c.job_id = p_job AND c.external_task_id IS NOT NULL AND c.outcome IS NULL
                AND c.submitted_at > now() - interval '1 day'
            ORDER BY c.id DESC LIMIT 1),
        (SELECT c.key_alias FROM procrastinate_jobs j
            JOIN provider_calls c ON c.id = CASE WHEN j.args ->> 'call' ~ '^[0-9]{1,18}$' THEN (j.args ->> 'call')::bigint END
            WHERE j.id = p_job AND c.external_task_id IS NOT NULL AND coalesce(c.outcome, 'succeeded') IN ('succeeded', 'partial')
                AND c.submitted_at > now() - interval '1 day'),
        (SELECT c.key_alias FROM procrastinate_jobs j
            JOIN provider_calls c ON c.id = CASE WHEN j.args ->> 'call_id' ~ '^[0-9]{1,18}$' THEN (j.args ->> 'call_id')::bigint END
            WHERE j.id = p_job AND j.task_name = 'jobdaemon.abandon' AND c.external_task_id IS NOT NULL AND c.outcome IS NULL
                AND c.submitted_at > now() - interval '1 day'))
$$;

-- As in 0012, and a job that has bought a task with a key which this worker lacks is passed by: another worker has it, or will
-- have. Only where the key's row is gone does any other key do.
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
            WHERE j.queue_name = p_queue.name AND j.status = 'doing' AND j.key_alias = v_key.alias));
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

-- As in 0014, and a key that no running daemon has.
CREATE OR REPLACE FUNCTION keys_in_the_way(p_job procrastinate_jobs, OUT told text, OUT numbers jsonb) RETURNS SETOF record
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
        SELECT k.*, CASE WHEN NOT key_is_held(substr(p_job.queue_name, length('generate.') + 1), k.alias) THEN 'missing'
                WHEN k.paused AND NOT its.own THEN 'paused'
                WHEN k.spent_today + k.wanted > k.daily_budget AND NOT its.own THEN 'budget'
                WHEN k.rested_until > now() THEN 'resting'
                WHEN k.in_use >= k.concurrency THEN 'concurrency'
                WHEN k.rate IS NOT NULL AND k.next_start_at > now() AND NOT its.own THEN 'rate' END AS in_the_way
        FROM known k CROSS JOIN LATERAL (SELECT coalesce(k.is_its_own, false) AS own) AS its
        WHERE its.own OR NOT EXISTS (SELECT FROM known other WHERE other.is_its_own)
    ), named AS (
        SELECT n.alias, row_number() OVER (ORDER BY n.alias) AS place,
            CASE n.in_the_way WHEN 'missing' THEN format('%s is in the settings of no running daemon', n.alias)
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

-- What a call costs: known when it has ended, as far as it is known at all.
ALTER TABLE provider_calls
    -- of one image when the call was made, in the operator's currency; NULL where the settings do not say
    ADD COLUMN price numeric CHECK (price >= 0),
    -- what the provider charges for, by its answer, or else what has arrived; NULL while it is not known
    ADD COLUMN images_made integer CHECK (images_made >= 0),
    -- the provider's own words on what was used, such as tokens
    ADD COLUMN usage jsonb;

-- By the day of the submit, UTC. A call whose answer was lost may have been charged for, and is in no sum.
CREATE VIEW spend AS
SELECT
    (c.submitted_at AT TIME ZONE 'UTC')::date AS day,
    c.provider,
    c.key_alias AS alias,
    count(*) AS calls,
    count(*) FILTER (WHERE c.outcome IS NULL) AS open,
    count(*) FILTER (WHERE c.outcome = 'unknown') AS unknown,
    coalesce(sum(c.images_made), 0) AS images,
    sum(c.cost) AS cost
FROM provider_calls c
GROUP BY 1, 2, 3;

-- As in 0016, without what went back to a key's budget: whatever an attempt did not buy goes back when it ends. p_alias is for
-- programs before this one.
CREATE OR REPLACE FUNCTION take_from_cache(p_provider text, p_alias text, p_order bigint, p_images integer[], p_keys text[],
    p_hold_s double precision, p_ttl_s double precision)
RETURNS TABLE (image integer, state text, id bigint, artifact text, sha256 text, media_type text, wait_s double precision)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_until timestamptz := v_now + p_hold_s * interval '1 second';
    v_oldest timestamptz := v_now - p_ttl_s * interval '1 second';
    v_new bigint[];
    v_locked bigint[];
    v_free bigint[] := '{}';
    v_free_images integer[] := '{}';
    v_over bigint[] := '{}';
    v_over_images integer[] := '{}';
    v_over_keys text[] := '{}';
    v_hits bigint[] := '{}';
    v_told integer[] := '{}';
    v_misses integer := 0;
    v_is_busy boolean := false;
    v_found record;
BEGIN
    -- This order has asked under other settings before: what it gets now is not what was asked for then.
    DELETE FROM cache c WHERE c.order_id = p_order AND c.index = ANY (p_images) AND c.key <> ALL (p_keys)
        AND c.artifact IS NULL AND c.dropped_at IS NULL;
    WITH new AS (
        INSERT INTO cache (key, provider, order_id, index, claimed_at, claimed_until)
        SELECT w.key, p_provider, p_order, w.image, v_now, v_until
        FROM unnest(p_keys, p_images) AS w (key, image) ORDER BY w.key
        ON CONFLICT (key) WHERE dropped_at IS NULL DO NOTHING
        RETURNING cache.id
    )
    SELECT coalesce(array_agg(n.id), '{}') INTO v_new FROM new n;
    -- Locked first and read afterwards: a row that we waited for is another one now, and so is its image.
    v_locked := ARRAY(SELECT c.id FROM cache c WHERE c.key = ANY (p_keys) AND c.dropped_at IS NULL ORDER BY c.key FOR UPDATE);
    FOR v_found IN
        SELECT w.image, c.id, c.key, c.claimed_at,
            CASE WHEN c.copied_at IS NOT NULL THEN c.artifact ELSE i.object_key END AS artifact,
            CASE WHEN c.copied_at IS NOT NULL THEN c.sha256 ELSE i.sha256 END AS sha256,
            CASE WHEN c.copied_at IS NOT NULL THEN c.media_type ELSE i.media_type END AS media_type,
            CASE
                WHEN c.copied_at IS NOT NULL THEN CASE WHEN c.made_at > v_oldest THEN 'hit' ELSE 'over' END
                WHEN c.order_id = p_order AND c.index = w.image THEN CASE WHEN c.id = ANY (v_new) THEN 'new' ELSE 'own' END
                WHEN has_stored(c, i) THEN CASE WHEN i.stored_at > v_oldest THEN 'hit' ELSE 'over' END
                WHEN i.status IN ('pending', 'generated') AND c.claimed_until > v_now THEN 'busy'
                WHEN c.artifact IS NOT NULL THEN 'over'
                ELSE 'free'
            END AS state
        FROM unnest(p_keys, p_images) AS w (key, image)
        JOIN cache c ON c.key = w.key AND c.id = ANY (v_locked)
        LEFT JOIN images i ON i.order_id = c.order_id AND i.index = c.index
    LOOP
        CASE v_found.state
            WHEN 'hit' THEN
                v_hits := v_hits || v_found.id;
                v_told := v_told || v_found.image;
                image := v_found.image; state := 'hit'; id := v_found.id; artifact := v_found.artifact;
                sha256 := v_found.sha256; media_type := v_found.media_type; wait_s := NULL;
                RETURN NEXT;
            WHEN 'busy' THEN
                v_is_busy := true;
                v_told := v_told || v_found.image;
                image := v_found.image; state := 'busy'; id := NULL; artifact := NULL; sha256 := NULL; media_type := NULL;
                -- The longer it has taken, the longer it may take: a few looks, whatever the provider's pace.
                wait_s := least(greatest(extract(epoch FROM v_now - v_found.claimed_at) / 2, 1), 15);
                RETURN NEXT;
            WHEN 'over' THEN
                v_over := v_over || v_found.id;
                v_over_images := v_over_images || v_found.image;
                v_over_keys := v_over_keys || v_found.key;
            ELSE
                v_free := v_free || v_found.id;
                v_free_images := v_free_images || v_found.image;
                v_misses := v_misses + (v_found.state <> 'own')::integer;
        END CASE;
    END LOOP;
    -- One that somebody dropped while we waited for it.
    v_is_busy := v_is_busy OR cardinality(v_told || v_over_images || v_free_images) < cardinality(p_images);
    IF v_is_busy THEN
        DELETE FROM cache c WHERE c.id = ANY (v_new);
        v_misses := 0;
    ELSE
        UPDATE cache c SET dropped_at = v_now WHERE c.id = ANY (v_over);
        INSERT INTO cache (key, provider, order_id, index, claimed_at, claimed_until)
            SELECT w.key, p_provider, p_order, w.image, v_now, v_until FROM unnest(v_over_keys, v_over_images) AS w (key, image);
        UPDATE cache c SET order_id = p_order, index = w.image, claimed_at = v_now, claimed_until = v_until
            FROM unnest(v_free, v_free_images) AS w (id, image) WHERE c.id = w.id;
        v_misses := v_misses + cardinality(v_over);
    END IF;
    RETURN QUERY SELECT m.image, CASE WHEN v_is_busy THEN 'busy' ELSE 'claimed' END, NULL::bigint, NULL::text, NULL::text,
            NULL::text, CASE WHEN v_is_busy THEN 0::double precision END
        FROM unnest(p_images) AS m (image) WHERE m.image <> ALL (v_told);
    UPDATE cache c SET hits = c.hits + 1, last_hit_at = v_now WHERE c.id = ANY (v_hits);
    PERFORM count_cache(p_provider, cardinality(v_hits), v_misses);
END;
$$;

-- As in 0016, for those who may steer.
CREATE OR REPLACE FUNCTION clear_cache(provider text DEFAULT NULL, order_id bigint DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_count bigint;
BEGIN
    WITH dropped AS (
        UPDATE cache c SET dropped_at = clock_timestamp() WHERE c.id IN (
            SELECT e.id FROM cache e
            WHERE e.dropped_at IS NULL AND (clear_cache.provider IS NULL OR e.provider = clear_cache.provider)
                AND (clear_cache.order_id IS NULL OR e.order_id = clear_cache.order_id)
            ORDER BY e.key FOR UPDATE)
        RETURNING c.artifact)
    SELECT count(*) FILTER (WHERE d.artifact IS NOT NULL) INTO v_count FROM dropped d;
    RETURN v_count;
END;
$$;

-- As before, with clear_cache; what is not there yet is not granted.
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
                'drain_daemon', 'prioritize_order', 'pause_key', 'resume_key', 'prewarm', 'clear_cache')
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
