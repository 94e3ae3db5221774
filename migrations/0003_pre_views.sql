-- What operators and apps read. The CLI's --json has the same columns.

CREATE VIEW queue_depth AS
SELECT
    q.name AS queue,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NULL) AS ready,
    (SELECT count(*) FROM procrastinate_jobs j
        WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NOT NULL) AS scheduled,
    (SELECT count(*) FROM procrastinate_jobs j WHERE j.queue_name = q.name AND j.status = 'doing') AS running,
    (SELECT count(*) FROM procrastinate_jobs j WHERE j.queue_name = q.name AND j.status = 'failed') AS failed,
    -- Since it last became ready: the newest of its deferral, its due time and its last hand-back.
    (SELECT extract(epoch FROM now() - e.at)::double precision
        -- + 0 keeps the planner from walking the primary key through everything that has ended
        FROM (SELECT min(j.id + 0) AS id FROM procrastinate_jobs j
            WHERE j.queue_name = q.name AND j.status = 'todo' AND j.scheduled_at IS NULL) AS oldest
        CROSS JOIN LATERAL (SELECT max(ev.at) AS at FROM procrastinate_events ev
            WHERE ev.job_id = oldest.id AND ev.at <= now()) AS e) AS oldest_ready_seconds,
    q.paused,
    q.team_size,
    q.cluster_limit,
    q.adaptive_limit,
    q.circuit
FROM queues q;

CREATE VIEW order_images AS
SELECT i.order_id, i.index, i.prompt, i.status, i.url, i.object_key, i.sha256, i.bytes, i.width, i.height, i.media_type, i.error
FROM images i;

CREATE VIEW running_jobs AS
SELECT
    j.id AS job_id,
    j.queue_name AS queue,
    (j.args ->> 'order_id') AS order_id,
    j.attempts + 1 AS attempt,
    j.priority,
    j.worker_id AS daemon_id,
    d.host,
    (SELECT max(e.at) FROM procrastinate_events e WHERE e.job_id = j.id AND e.type = 'started') AS started_at,
    w.last_heartbeat
FROM procrastinate_jobs j
LEFT JOIN daemons d ON d.id = j.worker_id
LEFT JOIN procrastinate_workers w ON w.id = j.worker_id
WHERE j.status = 'doing' AND j.queue_name IN (SELECT q.name FROM queues q);

CREATE VIEW stage_timings AS
SELECT
    j.queue_name AS queue,
    count(*) AS jobs,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM ended.at - started.at)) AS run_seconds_p50,
    percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM ended.at - started.at)) AS run_seconds_p95
FROM procrastinate_events ended
JOIN procrastinate_jobs j ON j.id = ended.job_id
CROSS JOIN LATERAL (SELECT max(e.at) AS at FROM procrastinate_events e
    WHERE e.job_id = j.id AND e.type = 'started' AND e.at <= ended.at) AS started
WHERE ended.type = 'succeeded' AND ended.at > now() - interval '1 hour'
GROUP BY j.queue_name;

CREATE VIEW throughput AS
SELECT
    j.queue_name AS queue,
    date_trunc('minute', e.at) AS minute,
    count(*) FILTER (WHERE e.type = 'succeeded') AS succeeded,
    count(*) FILTER (WHERE e.type = 'failed') AS failed
FROM procrastinate_events e
JOIN procrastinate_jobs j ON j.id = e.job_id
WHERE e.type IN ('succeeded', 'failed') AND e.at > now() - interval '1 hour'
GROUP BY j.queue_name, date_trunc('minute', e.at);

CREATE VIEW failures AS
SELECT a.ended_at, a.queue, a.order_id, a.job_id, a.attempt, a.outcome, a.error_kind, a.error, a.daemon_id
FROM attempts a
WHERE a.outcome IN ('failed', 'retry', 'interrupted');

CREATE VIEW workers AS
SELECT
    d.id AS daemon_id,
    d.host,
    d.pid,
    d.version,
    -- A daemon that died says nothing any more, least of all that it stopped.
    CASE WHEN d.status <> 'stopped' AND coalesce(w.last_heartbeat, '-infinity') < now() - interval '30 seconds'
        THEN 'silent' ELSE d.status END AS status,
    d.queues,
    d.started_at,
    -- -infinity is how a stopped daemon's lease ends at once
    CASE WHEN isfinite(w.last_heartbeat) THEN w.last_heartbeat END AS last_heartbeat,
    (SELECT count(*) FROM procrastinate_jobs j WHERE j.worker_id = d.id AND j.status = 'doing') AS running
FROM daemons d
LEFT JOIN procrastinate_workers w ON w.id = d.id;
