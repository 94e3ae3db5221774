-- Orders, images and what steers them. Runs after procrastinate's own schema, in schema jobdaemon
-- (the runner sets search_path to it). Rows of plans and queues come from the settings, never from here.

CREATE TABLE plans (
    name text PRIMARY KEY CHECK (name <> ''),
    images integer NOT NULL CHECK (images BETWEEN 1 AND 1000),
    priority integer NOT NULL,
    lift_after interval NOT NULL CHECK (lift_after > interval '0'),
    expires_after interval NOT NULL CHECK (expires_after > interval '0'),
    -- 0 switches a limit off
    max_open_orders integer NOT NULL DEFAULT 100 CHECK (max_open_orders >= 0),
    max_open_orders_per_customer integer NOT NULL DEFAULT 0 CHECK (max_open_orders_per_customer >= 0),
    -- used when an order brings no prompts of its own
    prompts text[] NOT NULL CHECK (cardinality(prompts) BETWEEN 1 AND images),
    -- used when an order names no provider
    provider text NOT NULL
);
COMMENT ON TABLE plans IS 'What Free, Start and Pro buy. Higher priority goes first.';

CREATE TABLE queues (
    id integer GENERATED ALWAYS AS IDENTITY UNIQUE,
    name text PRIMARY KEY CHECK (name <> ''),
    paused boolean NOT NULL DEFAULT false,
    -- NULL: every daemon's own setting
    team_size integer CHECK (team_size BETWEEN 0 AND 10000),
    -- NULL: no limit. Most jobs of the queue running at once over all daemons
    cluster_limit integer CHECK (cluster_limit BETWEEN 0 AND 100000),
    adaptive_limit integer CHECK (adaptive_limit >= 0),
    fair_share integer CHECK (fair_share >= 1),
    circuit text NOT NULL DEFAULT 'closed' CHECK (circuit IN ('closed', 'open', 'probing')),
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE queues IS 'One row per queue we serve; an operator may UPDATE it at any time.';

CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text NOT NULL DEFAULT '',
    key text,
    "group" text,
    plan text NOT NULL REFERENCES plans (name),
    provider text NOT NULL,
    source text NOT NULL,
    params jsonb NOT NULL DEFAULT '{}',
    priority integer NOT NULL,
    status text NOT NULL DEFAULT 'queued' CHECK (status IN
        ('queued', 'beautifying', 'generating', 'uploading', 'completed', 'partial', 'failed', 'cancelled')),
    images_total integer NOT NULL,
    images_stored integer NOT NULL DEFAULT 0,
    images_failed integer NOT NULL DEFAULT 0,
    error text,
    -- what beautify made: {key, sha256, size_bytes, media_type, width, height, faces, unrestored, model, device}
    beautified jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    first_image_at timestamptz,
    finished_at timestamptz,
    expires_at timestamptz NOT NULL,
    -- when progress was last told on channel jobdaemon_orders
    notified_at timestamptz,
    CONSTRAINT orders_ended_has_time CHECK
        ((finished_at IS NOT NULL) = (status IN ('completed', 'partial', 'failed', 'cancelled')))
);
CREATE UNIQUE INDEX orders_customer_key_idx ON orders (customer, key) WHERE key IS NOT NULL;
CREATE INDEX orders_open_idx ON orders (plan, customer) WHERE finished_at IS NULL;
CREATE INDEX orders_expiry_idx ON orders (expires_at) WHERE finished_at IS NULL;
CREATE INDEX orders_group_idx ON orders ("group") WHERE "group" IS NOT NULL;

CREATE TABLE images (
    order_id bigint NOT NULL REFERENCES orders (id) ON DELETE CASCADE,
    -- from 1, as in the file names people see
    index integer NOT NULL CHECK (index >= 1),
    prompt text NOT NULL,
    status text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'generated', 'stored', 'failed', 'cancelled')),
    provider text,
    -- between generate and upload: artifact:<key> or https://…
    locator text,
    locator_expires_at timestamptz,
    object_key text,
    url text,
    sha256 text,
    bytes bigint,
    width integer,
    height integer,
    media_type text,
    error text,
    generated_at timestamptz,
    stored_at timestamptz,
    PRIMARY KEY (order_id, index)
);

CREATE TABLE attempts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id bigint NOT NULL,
    order_id bigint,
    queue text NOT NULL,
    -- counted from 1
    attempt integer NOT NULL,
    token bigint,
    daemon_id bigint,
    started_at timestamptz,
    ended_at timestamptz NOT NULL DEFAULT now(),
    outcome text NOT NULL CHECK (outcome IN ('retry', 'snooze', 'handed_back', 'failed', 'cancelled', 'interrupted')),
    error_kind text,
    error text
);
CREATE INDEX attempts_job_idx ON attempts (job_id);
CREATE INDEX attempts_order_idx ON attempts (order_id) WHERE order_id IS NOT NULL;
CREATE INDEX attempts_ended_idx ON attempts (ended_at);
COMMENT ON TABLE attempts IS 'Attempts that did not succeed: why, when, by whom.';

CREATE TABLE provider_calls (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id bigint NOT NULL REFERENCES orders (id) ON DELETE CASCADE,
    job_id bigint NOT NULL,
    -- the lowest image index of the batch
    batch integer NOT NULL,
    provider text NOT NULL,
    key_alias text,
    -- the provider's own id of this call; NULL while (or because) it is unknown
    external_task_id text,
    submitted_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    outcome text CHECK (outcome IN ('succeeded', 'partial', 'failed')),
    cost numeric
);
CREATE INDEX provider_calls_job_idx ON provider_calls (job_id);
CREATE INDEX provider_calls_order_idx ON provider_calls (order_id);

CREATE TABLE daemons (
    -- procrastinate_workers.id, whose last_heartbeat is this daemon's
    id bigint PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    version text NOT NULL,
    -- queue name -> team size
    queues jsonb NOT NULL,
    status text NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'draining', 'stopping', 'stopped')),
    started_at timestamptz NOT NULL DEFAULT now(),
    stopped_at timestamptz
);

-- One value per claim call fences every end, checkpoint and hand-back of the jobs it claimed.
CREATE SEQUENCE attempt_token_seq AS bigint;
ALTER TABLE procrastinate_jobs ADD COLUMN IF NOT EXISTS token bigint;
-- how many workers died while this job ran; stock SQL inserts by column list, so it may be NULL
ALTER TABLE procrastinate_jobs ADD COLUMN IF NOT EXISTS deaths smallint;
