-- Leases, judged by the database alone, at the moment it matters: in the claim, and in the look for jobs that nobody runs.

ALTER TABLE procrastinate_workers
    -- a daemon's: silent for longer, it has lost what it runs; NULL for whoever does not say
    ADD COLUMN IF NOT EXISTS lease interval,
    -- since when its beats came without a gap
    ADD COLUMN IF NOT EXISTS steady_since timestamptz;

-- Raises where the lease of this worker may lapse before it next says that it lives. What it claims then is another daemon's at
-- once, while it runs here. A heartbeat from the future is as bad as an old one: the clock was set back since.
CREATE FUNCTION require_lease(p_worker bigint) RETURNS void
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    IF EXISTS (SELECT FROM procrastinate_workers w WHERE w.id = p_worker
        AND w.last_heartbeat NOT BETWEEN v_now - w.lease * 0.75 AND v_now + w.lease)
    THEN
        RAISE EXCEPTION 'worker % has not said for most of its lease that it lives', p_worker
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'A heartbeat has to come first.';
    END IF;
END;
$$;
