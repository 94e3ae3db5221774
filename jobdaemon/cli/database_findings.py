"""What ``check`` finds in the database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobdaemon.cli.findings import Finding
from jobdaemon.cli.rows import read_rows
from jobdaemon.cli.session import missing_rows
from jobdaemon.errors import SchemaVersionError

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.settings import Settings

OLDEST_POSTGRES = 14
NEWEST_TESTED_POSTGRES = 18
#: A daemon's own, whatever its team sizes; see queue/store.py.
CONNECTIONS_PER_DAEMON = 5
_MIGRATE = "run `jobdaemon migrate`"
ROLES = ("jobdaemon_producer", "jobdaemon_reader", "jobdaemon_daemon")

OUR_TRIGGERS = ("jobs_inserted", "jobs_updated", "jobs_deleted")
#: Row triggers of procrastinate's, replaced by ours; its migrations may bring them back.
STOCK_TRIGGERS = (
    "procrastinate_jobs_notify_queue_job_inserted_v1",
    "procrastinate_trigger_status_events_insert_v1",
    "procrastinate_trigger_status_events_update_v1",
    "procrastinate_trigger_scheduled_events_v1",
)
OUR_INDEXES = (
    "jobs_ready_idx",
    "jobs_customer_idx",
    "jobs_lane_idx",
    "jobs_lane_customer_idx",
    "jobs_lock_idx",
    "jobs_running_idx",
    "jobs_bought_idx",
    "jobs_scheduled_idx",
    "jobs_failed_idx",
    "jobs_order_idx",
    "jobs_stopped_idx",
    "jobs_prewarm_idx",
)

_TRIGGERS = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'jobdaemon.procrastinate_jobs'::regclass AND NOT tgisinternal"
_INDEXES = """
SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = 'jobdaemon.procrastinate_jobs'::regclass AND i.indisvalid
"""
_UNPINNED_FUNCTIONS = r"""
SELECT p.proname FROM pg_proc p
WHERE p.pronamespace = 'jobdaemon'::regnamespace AND p.prokind = 'f' AND NOT coalesce(
    EXISTS (SELECT FROM unnest(p.proconfig) AS setting WHERE setting LIKE 'search\_path=%%'), false)
ORDER BY p.proname
"""
_ROOM = """
SELECT current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()),
    (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user AND NOT rolsuper),
    (SELECT datconnlimit FROM pg_database WHERE datname = current_database())
"""
_CAN_WORK = """
SELECT has_schema_privilege('jobdaemon', 'USAGE') AND has_table_privilege('jobdaemon.procrastinate_jobs', 'UPDATE')
    AND has_table_privilege('jobdaemon.orders', 'UPDATE') AND has_table_privilege('jobdaemon.daemons', 'INSERT')
"""
_DAEMONS = """
SELECT d.host, d.pid, d.queues, w.last_heartbeat > clock_timestamp() - %s AS lives
FROM jobdaemon.daemons d JOIN jobdaemon.procrastinate_workers w ON w.id = d.id
WHERE d.status <> 'stopped' AND w.last_heartbeat > clock_timestamp() - interval '1 day'
"""


def database_findings(connection: psycopg.Connection[Any], settings: Settings) -> Iterator[Finding]:
    """Server, schema, tuning, rows, roles, connections and daemons; stops where the next would make no sense."""
    server = _server(connection, settings)
    yield server
    if server.state == "error":
        return
    schema = list(_schema(connection))
    yield from schema
    if any(finding.state == "error" for finding in schema):
        return
    yield from _tuning(connection)
    yield from _rows(connection, settings)
    yield from _roles(connection)
    yield from _connections(connection)
    yield from _daemons(connection, settings)


def _server(connection: psycopg.Connection[Any], settings: Settings) -> Finding:
    major = connection.info.server_version // 10_000
    what = f"PostgreSQL {connection.info.parameter_status('server_version') or major}"
    what += ", embedded" if settings.database.url is None else f" at {connection.info.host or 'a local socket'}"
    if major < OLDEST_POSTGRES:
        return Finding("database", "error", what, f"jobdaemon needs PostgreSQL {OLDEST_POSTGRES} or newer")
    if major > NEWEST_TESTED_POSTGRES:
        action = f"jobdaemon was tested up to {NEWEST_TESTED_POSTGRES}; look for a newer jobdaemon"
        return Finding("database", "warning", what, action)
    row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
    if row is not None and row[0]:
        return Finding("database", "error", f"{what} is a read-only standby", "connect to the primary")
    return Finding("database", "ok", what)


def _schema(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    from jobdaemon.schema import applied_migrations
    from jobdaemon.schema_version import compare

    applied = applied_migrations(connection)
    state = compare(applied)
    try:
        state.require_usable()
    except SchemaVersionError as error:
        message, _, action = str(error).rstrip(".").partition(": ")
        yield Finding("schema", "error", message, action)
        return
    if state.pending_post:
        action = "run `jobdaemon migrate --post` once every daemon is this program"
        yield Finding("schema", "warning", f"{len(state.pending_post)} post migrations wait", action)
    if state.unknown_pre:
        yield Finding("schema", "warning", f"a newer jobdaemon has prepared it ({state.unknown_pre[0]})", "upgrade this one too")
    if not state.pending_post and not state.unknown_pre:
        yield Finding("schema", "ok", f"{len(applied)} migrations applied, up to date")


def _names(connection: psycopg.Connection[Any], query: str) -> list[str]:
    return [name for (name,) in connection.execute(query)]


def _tuning(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    triggers, indexes = _names(connection, _TRIGGERS), _names(connection, _INDEXES)
    problems = [f"trigger {name} is missing" for name in OUR_TRIGGERS if name not in triggers]
    problems += [f"trigger {name} is back" for name in STOCK_TRIGGERS if name in triggers]
    problems += [f"index {name} is missing" for name in OUR_INDEXES if name not in indexes]
    problems += [f"function {name} has no search_path" for name in _names(connection, _UNPINNED_FUNCTIONS)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        yield Finding("tuning", "error", problems[0] + more, _MIGRATE)
    else:
        yield Finding("tuning", "ok", "triggers, indexes and functions are as they should be")


def _rows(connection: psycopg.Connection[Any], settings: Settings) -> Iterator[Finding]:
    plans, queues = missing_rows(connection, settings)
    missing = [f"plan {name}" for name in plans] + [f"queue {name}" for name in queues]
    if missing:
        yield Finding("plans", "error", f"the database has no {', no '.join(missing)}", "run `jobdaemon config apply`")
    else:
        yield Finding("plans", "ok", "every plan and queue of the settings is there")
    yield from _differing_rows(connection, settings)


def _differing_rows(connection: psycopg.Connection[Any], settings: Settings) -> Iterator[Finding]:
    from jobdaemon import settings_rows
    from jobdaemon.domain.rows import differing_rows

    differing = list(differing_rows(settings_rows.wanted_rows(settings), read_rows(connection)))
    for row in differing:
        if row.named:
            message, action = settings_rows.overruled(row)
            yield Finding("rows", "warning", f"{row.title}: {message}", action)
        if row.unnamed:
            yield Finding("rows", "ok", f"{row.title}: {settings_rows.instead_of_defaults(row)}")
    if not differing:
        yield Finding("rows", "ok", "they say what the settings say")


def _roles(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    found = _names(connection, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'jobdaemon%'")
    missing = [name for name in ROLES if name not in found]
    row = connection.execute(_CAN_WORK).fetchone()
    if row is None or not row[0]:
        yield Finding("roles", "error", f"{connection.info.user} may not do a daemon's work", "grant it jobdaemon_daemon")
    elif missing:
        action = f"as a role that may: {'; '.join(f'CREATE ROLE {name} NOLOGIN' for name in missing)}; then {_MIGRATE}"
        yield Finding("roles", "warning", f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", action)
    else:
        yield Finding("roles", "ok", ", ".join(ROLES))


def _connections(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    row = connection.execute(_ROOM).fetchone()
    assert row is not None
    most, used, role_limit, database_limit = row
    limits = [most, *(limit for limit in (role_limit, database_limit) if limit is not None and limit >= 0)]
    free = min(limits) - used
    told = f"{used} of {min(limits)} in use; a daemon needs {CONNECTIONS_PER_DAEMON}"
    if free < CONNECTIONS_PER_DAEMON:
        yield Finding("connections", "warning", told, "raise max_connections, or the role's or database's limit")
    else:
        yield Finding("connections", "ok", told)


def _daemons(connection: psycopg.Connection[Any], settings: Settings) -> Iterator[Finding]:
    from jobdaemon import settings_rows

    rows = connection.execute(_DAEMONS, [settings.engine.lease]).fetchall()
    alive = [row for row in rows if row[3]]
    silent = [f"{host} (pid {pid})" for host, pid, _, lives in rows if not lives]
    if silent:
        yield Finding("daemons", "warning", f"{', '.join(silent)} went silent", "look at its log; its jobs go to the others")
    if not alive:
        yield Finding("daemons", "warning", "none is running: orders wait", "start one with `jobdaemon run`")
        return
    served = {queue for _, _, queues, _ in alive for queue, team_size in queues.items() if team_size > 0}
    if unserved := [name for name in settings_rows.queue_names(settings) if name not in served]:
        yield Finding("daemons", "warning", f"{len(alive)} running, none works {', '.join(unserved)}", "give it a team_size")
    else:
        yield Finding("daemons", "ok", f"{len(alive)} running, every queue is worked")
