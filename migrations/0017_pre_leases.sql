-- A claim trusts its worker's last heartbeat for half a lease.

-- Raises where this worker has not said for half its lease that it lives. What it claims later might be another worker's before its
-- next heartbeat, while it runs here: whoever judges others may do so for half a lease after a heartbeat of its own, so that an
-- outage as long as that goes unnoticed, and both together are to be no more than a lease. A heartbeat from the future is as bad as
-- an old one: the clock was set back since.
CREATE OR REPLACE FUNCTION require_lease(p_worker bigint) RETURNS void
LANGUAGE plpgsql SET search_path = jobdaemon, pg_temp
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    IF EXISTS (SELECT FROM procrastinate_workers w WHERE w.id = p_worker
        AND w.last_heartbeat NOT BETWEEN v_now - w.lease / 2 AND v_now + w.lease / 2)
    THEN
        RAISE EXCEPTION 'worker % has not said for half its lease that it lives', p_worker
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'A heartbeat has to come first.';
    END IF;
END;
$$;
