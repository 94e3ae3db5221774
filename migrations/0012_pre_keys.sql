-- Provider keys: how much may start under each key, over all daemons; taken in the claim, under the queue's lock. A row names a
-- key by its alias only: the secret is in the settings of the daemons that hold it. The decisions are in jobdaemon/domain/keys.py
-- too, and tests hold both equal.

CREATE TABLE provider_keys (
    provider text NOT NULL CHECK (provider ~ '^[a-z][a-z0-9_-]{0,63}$'),
    alias text COLLATE "C" NOT NULL CHECK (alias ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'),
    -- NULL is no limit
    -- most jobs at once
    concurrency integer CHECK (concurrency BETWEEN 0 AND 100000),
    -- starts per second, evenly spaced
    rate double precision CHECK (rate BETWEEN 0.0001 AND 10000),
    -- images asked for per day, UTC
    daily_budget integer CHECK (daily_budget BETWEEN 0 AND 1000000000),
    paused boolean NOT NULL DEFAULT false,
    rested_until timestamptz CHECK (isfinite(rested_until)),
    rest_reason text,
    -- refusals in a row; each rest is twice as long as the one before
    rests integer NOT NULL DEFAULT 0 CHECK (rests >= 0),
    -- attempts with this token or an older one were claimed before the last rest
    rest_token bigint NOT NULL DEFAULT 0,
    -- the claim's own: a key with a rate starts nothing before; images asked for on the day spent_on
    next_start_at timestamptz CHECK (isfinite(next_start_at)),
    spent integer NOT NULL DEFAULT 0 CHECK (spent >= 0),
    spent_on date,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, alias)
);
COMMENT ON TABLE provider_keys IS 'One row per provider key, without its secret; an operator may UPDATE the limits at any time.';

-- Of a running job: the key it runs under. Of one that waits or failed: the key of the task it has bought and not collected.
ALTER TABLE procrastinate_jobs ADD COLUMN IF NOT EXISTS key_alias text;

CREATE FUNCTION key_changed() RETURNS trigger
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    IF NEW.concurrency NOT BETWEEN 0 AND 100000 THEN
        RAISE EXCEPTION 'a key''s concurrency must be 0 to 100000, not %', NEW.concurrency USING ERRCODE = 'JD004';
    END IF;
    IF NEW.rate NOT BETWEEN 0.0001 AND 10000 THEN
        RAISE EXCEPTION 'a key''s rate must be 0.0001 to 10000 starts per second, not %', NEW.rate USING ERRCODE = 'JD004';
    END IF;
    IF NEW.daily_budget NOT BETWEEN 0 AND 1000000000 THEN
        RAISE EXCEPTION 'a key''s daily budget must be 0 to 1000000000 images, not %', NEW.daily_budget USING ERRCODE = 'JD004';
    END IF;
    IF NEW.paused IS NULL THEN
        RAISE EXCEPTION 'paused must be true or false, not NULL' USING ERRCODE = 'JD004';
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.rate IS DISTINCT FROM OLD.rate THEN
        -- What the old rate asked for may be far away.
        NEW.next_start_at := NULL;
    END IF;
    NEW.updated_at := clock_timestamp();
    PERFORM pg_notify('jobdaemon_control', 'generate.' || NEW.provider);
    RETURN NEW;
END;
$$;
-- Not for the claim's own columns: a start must not wake every daemon.
CREATE TRIGGER key_changed
    BEFORE INSERT OR UPDATE OF provider, alias, concurrency, rate, daily_budget, paused, rested_until ON provider_keys
    FOR EACH ROW EXECUTE FUNCTION key_changed();

-- How many images a job asks its provider for.
CREATE FUNCTION job_images(p_args jsonb) RETURNS integer
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$ SELECT CASE WHEN jsonb_typeof(p_args -> 'images') = 'array' THEN jsonb_array_length(p_args -> 'images') ELSE 1 END $$;

-- The key of the task that this job goes on with: one that it has bought and whose end is not known, or another job's, which ended
-- well, when it was made to collect from that once more. NULL when there is none: then it has to buy.
CREATE FUNCTION bought_with(p_job bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(
        (SELECT c.key_alias FROM provider_calls c
            WHERE c.job_id = p_job AND c.external_task_id IS NOT NULL AND c.outcome IS NULL
            ORDER BY c.id DESC LIMIT 1),
        (SELECT c.key_alias FROM procrastinate_jobs j
            JOIN provider_calls c ON c.id = CASE WHEN j.args ->> 'call' ~ '^[0-9]{1,18}$' THEN (j.args ->> 'call')::bigint END
            WHERE j.id = p_job AND c.external_task_id IS NOT NULL AND c.outcome IN ('succeeded', 'partial')))
$$;

-- pick_jobs as before, but for p_except.
CREATE FUNCTION pick_jobs(p_queue queues, p_limit integer, p_except bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_ids bigint[] := '{}';
    v_has_lifted boolean;
BEGIN
    FOR v_try IN 1..2 LOOP
        v_has_lifted := EXISTS (SELECT FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue.name AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.priority >= lifted_priority());
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
CREATE OR REPLACE FUNCTION pick_jobs(p_queue queues, p_limit integer) RETURNS bigint[]
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
BEGIN
    RETURN pick_jobs(p_queue, p_limit, '{}');
END;
$$;

-- How many jobs may buy under this key now, of those p_room that may run under it besides what runs.
CREATE FUNCTION key_free(p_key provider_keys, p_room bigint, p_now timestamptz) RETURNS bigint
LANGUAGE sql IMMUTABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT CASE
        WHEN p_key.paused OR p_key.rested_until > p_now OR p_key.spent >= p_key.daily_budget
            OR p_key.rate IS NOT NULL AND p_key.next_start_at > p_now THEN 0
        WHEN p_key.rate IS NOT NULL THEN least(p_room, 1)
        ELSE p_room END
$$;

-- When this key opens by the clock alone; NULL when it does not: a pause ends by a notification, a key that is full by a job's end.
-- p_has_bought: a job waits to collect what it bought under it. p_has_unfit: some job is too large for every key's budget.
CREATE FUNCTION key_opens_at(p_key provider_keys, p_room bigint, p_has_bought boolean, p_has_unfit boolean, p_now timestamptz)
RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT CASE WHEN o.at > p_now THEN o.at END FROM (SELECT CASE
        WHEN p_room <= 0 THEN NULL
        WHEN p_key.paused OR p_key.daily_budget = 0 THEN CASE WHEN p_has_bought THEN p_key.rested_until END
        ELSE greatest(p_key.rested_until, CASE WHEN p_key.rate IS NOT NULL THEN p_key.next_start_at END,
            CASE WHEN p_key.spent >= p_key.daily_budget OR p_key.daily_budget IS NOT NULL AND p_has_unfit
                THEN date_trunc('day', p_now, 'UTC') + interval '24 hours' END)
        END AS at) AS o
$$;

-- Ready jobs of the queue that have bought a task with one of these keys, in claim order, and which key.
CREATE FUNCTION ready_bought(p_queue text, p_keys text[], OUT ids bigint[], OUT aliases text[])
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT coalesce(array_agg(b.id ORDER BY b.place), '{}'), coalesce(array_agg(b.alias ORDER BY b.place), '{}')
    FROM (
        SELECT r.id, r.alias, row_number() OVER (ORDER BY r.priority DESC, r.order_id, r.id) AS place
        FROM (
            SELECT j.id, j.priority, bought_with(j.id) AS alias,
                CASE WHEN j.task_name LIKE 'jobdaemon.%' THEN (j.args ->> 'order_id')::bigint END AS order_id
            FROM procrastinate_jobs j
            WHERE j.queue_name = p_queue AND j.status = 'todo' AND j.scheduled_at IS NULL AND j.key_alias IS NOT NULL
                AND (j.lock IS NULL OR NOT EXISTS (
                    SELECT FROM procrastinate_jobs d WHERE d.lock = j.lock AND d.status = 'doing'))
        ) AS r
        WHERE r.alias = ANY (p_keys)
        ORDER BY place LIMIT 500
    ) AS b
$$;

-- Starts up to p_limit ready jobs of a provider's queue, each under one of the keys p_keys, one after another in the order in which
-- they are picked. Called under the queue's lock. A job that has bought a task goes on under that task's key, and costs neither
-- rate nor budget; a job that none of the keys can take is passed by. When the keys hold work back until a moment, a last row has
-- only opens_in_s: how many seconds it is until then.
CREATE FUNCTION claim_keyed_jobs(p_queue queues, p_worker bigint, p_limit integer, p_keys text[])
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
    -- those that are in the database; v_keys are those of them that nobody holds
    v_known text[] := ARRAY(SELECT k.alias FROM provider_keys k WHERE k.provider = v_provider AND k.alias = ANY (p_keys));
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
    SELECT b.ids, b.aliases INTO v_bought, v_bought_with FROM ready_bought(p_queue.name, v_known) AS b;

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
            IF v_alias = ANY (v_known) THEN
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

-- Its successor takes the same call, and returns two columns more.
-- squawk-ignore ban-drop-function
DROP FUNCTION claim_jobs(text, bigint, integer);
-- Up to p_limit ready jobs of one queue start under this worker; one token for all of them. Needs READ COMMITTED.
-- p_keys: aliases of the keys whose secrets this worker has; NULL: the queue's provider knows no keys.
CREATE FUNCTION claim_jobs(p_queue text, p_worker bigint, p_limit integer, p_keys text[] DEFAULT NULL)
RETURNS TABLE (id bigint, task_name character varying, priority integer, args jsonb, attempts integer, deaths smallint,
    token bigint, key_alias text, opens_in_s double precision)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue queues;
    v_limit integer;
    v_ids bigint[];
    v_token bigint;
BEGIN
    SELECT * INTO v_queue FROM queues q WHERE q.name = p_queue;
    IF v_queue.cluster_limit IS NOT NULL OR v_queue.adaptive_limit IS NOT NULL OR v_queue.fair_share IS NOT NULL
        OR v_queue.circuit <> 'closed' OR p_keys IS NOT NULL
    THEN
        PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);
        SELECT * INTO v_queue FROM queues q WHERE q.name = p_queue;
    END IF;
    -- Only here: the lease may have lapsed while we waited for the lock.
    PERFORM require_lease(p_worker);
    v_limit := queue_capacity(v_queue, p_limit);
    IF v_queue.name IS NULL OR v_limit IS NULL OR v_limit <= 0 THEN
        RETURN;
    END IF;
    IF p_keys IS NOT NULL THEN
        RETURN QUERY SELECT * FROM claim_keyed_jobs(v_queue, p_worker, v_limit, p_keys);
        RETURN;
    END IF;
    v_ids := pick_jobs(v_queue, v_limit, '{}');
    IF cardinality(v_ids) = 0 THEN
        RETURN;
    END IF;
    v_token := nextval('attempt_token_seq');
    RETURN QUERY UPDATE procrastinate_jobs j
        SET status = 'doing', worker_id = p_worker, token = v_token, key_alias = NULL
        WHERE j.id = ANY (v_ids)
        RETURNING j.id, j.task_name, j.priority, j.args, j.attempts, j.deaths, j.token, j.key_alias, NULL::double precision;
END;
$$;

-- Locks these keys of queues that a commit concerns, and says how they are. Comes last in the lock order, before lock_steering;
-- p_queues are all queues whose steering the same transaction may lock after it.
CREATE FUNCTION lock_keys(p_queues text[], p_providers text[], p_aliases text[])
RETURNS TABLE (provider text, alias text, rested_until timestamptz, rest_reason text, rests integer, rest_token bigint,
    newest_token bigint, now timestamptz)
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_queue record;
BEGIN
    -- The claim's own locks: no claim under way deals out a key that is about to rest.
    FOR v_queue IN SELECT q.id FROM queues q WHERE q.name = ANY (p_queues) ORDER BY q.name LOOP
        PERFORM pg_advisory_xact_lock(1784835684, v_queue.id);
    END LOOP;
    RETURN QUERY SELECT k.provider, k.alias, k.rested_until, k.rest_reason, k.rests, k.rest_token,
            nextval('attempt_token_seq'), clock_timestamp()
        FROM provider_keys k
        WHERE (k.provider, k.alias) IN (SELECT w.provider, w.alias FROM unnest(p_providers, p_aliases) AS w (provider, alias))
        ORDER BY k.provider, k.alias
        -- An operator who holds the row must not hold up every commit: this time the key does not rest.
        FOR NO KEY UPDATE OF k SKIP LOCKED;
END;
$$;

-- What a key is set to, in words; what the functions below answer.
CREATE FUNCTION key_answer(p_key provider_keys) RETURNS text
LANGUAGE sql STABLE SET search_path = jobdaemon, pg_temp
AS $$
    SELECT format('key %s of %s is %s: %s, %s, %s%s', p_key.alias, p_key.provider, CASE WHEN p_key.paused THEN 'paused' ELSE 'open' END,
        coalesce('concurrency ' || p_key.concurrency, 'any number at once'),
        coalesce(p_key.rate || ' starts per second', 'no rate'),
        coalesce(p_key.daily_budget || ' images a day', 'no daily budget'),
        CASE WHEN p_key.rested_until > now() THEN format('; it rests until %s', utc_text(p_key.rested_until)) ELSE '' END)
$$;

-- Buys nothing more under this key; what was bought is collected.
CREATE FUNCTION pause_key(provider text, alias text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_key provider_keys;
BEGIN
    UPDATE provider_keys k SET paused = true WHERE k.provider = pause_key.provider AND k.alias = pause_key.alias
        RETURNING * INTO v_key;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown key "%" of provider "%"', left(coalesce(pause_key.alias, ''), 128),
            left(coalesce(pause_key.provider, ''), 128) USING ERRCODE = 'JD005';
    END IF;
    RETURN key_answer(v_key);
END;
$$;

-- Lets a paused key go on, and ends its rest.
CREATE FUNCTION resume_key(provider text, alias text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = jobdaemon, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_key provider_keys;
BEGIN
    UPDATE provider_keys k SET paused = false, rested_until = NULL, rest_reason = NULL, rests = 0
        WHERE k.provider = resume_key.provider AND k.alias = resume_key.alias
        RETURNING * INTO v_key;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown key "%" of provider "%"', left(coalesce(resume_key.alias, ''), 128),
            left(coalesce(resume_key.provider, ''), 128) USING ERRCODE = 'JD005';
    END IF;
    RETURN key_answer(v_key);
END;
$$;

CREATE VIEW keys AS
SELECT
    k.provider,
    k.alias,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = 'generate.' || k.provider AND j.status = 'doing' AND j.key_alias = k.alias) AS running,
    k.concurrency,
    k.rate,
    k.daily_budget,
    CASE WHEN k.spent_on = (now() AT TIME ZONE 'UTC')::date THEN k.spent ELSE 0 END AS spent_today,
    CASE WHEN k.rested_until > now() THEN k.rested_until END AS rested_until,
    CASE WHEN k.rested_until > now() THEN k.rest_reason END AS rest_reason,
    k.paused
FROM provider_keys k;

-- As before, with pause_key and resume_key.
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
                'drain_daemon', 'prioritize_order', 'pause_key', 'resume_key')
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
