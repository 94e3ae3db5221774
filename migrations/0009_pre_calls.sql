-- Provider calls that are noted before they are made, and looked after until they end.

ALTER TABLE provider_calls
    -- the indexes asked for, in the order in which the call asks
    ADD COLUMN images integer[] NOT NULL DEFAULT '{}',
    -- The one that follows allows all that it allowed.
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT provider_calls_outcome_check,
    -- unknown: the answer to the submit was lost; expired: the provider has forgotten what it made
    -- The runner applies each file in a transaction, and the table is short-lived work.
    -- squawk-ignore constraint-missing-not-valid
    ADD CONSTRAINT provider_calls_outcome_check
        CHECK (outcome IN ('succeeded', 'partial', 'failed', 'unknown', 'cancelled', 'expired'));
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX provider_calls_open_idx ON provider_calls (job_id) WHERE outcome IS NULL;
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX provider_calls_unknown_idx ON provider_calls (submitted_at) WHERE external_task_id IS NULL;

ALTER TABLE images
    -- the call that made it: an expired link is asked for again there
    ADD COLUMN call_id bigint,
    ADD COLUMN times_lost smallint NOT NULL DEFAULT 0;

-- Calls whose answer never arrived: each may have been paid for without an image. Those of running jobs are simply on their way.
CREATE VIEW unknown_submits AS
SELECT c.id AS call_id, c.provider, c.key_alias, c.order_id, c.job_id, c.images, c.submitted_at, c.outcome
FROM provider_calls c
WHERE c.external_task_id IS NULL
    AND (c.outcome = 'unknown' OR c.outcome IS NULL AND NOT EXISTS (
        SELECT FROM procrastinate_jobs j WHERE j.id = c.job_id AND j.status = 'doing'));
