"""The rows that reading verbs show. Views as they are: their columns are the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobdaemon.errors import RefusedError

if TYPE_CHECKING:
    import psycopg

Row = dict[str, Any]

_IMAGES = """
SELECT index, prompt, status, url, object_key, sha256, bytes, width, height, error
FROM jobdaemon.order_images WHERE order_id = %s ORDER BY index
"""
_DAEMONS = """
SELECT daemon_id, host, pid, version, status, queues, started_at, last_heartbeat, running
FROM jobdaemon.workers
WHERE status <> 'stopped' OR %(all)s ORDER BY daemon_id
"""
# Only our own tasks name an order: another app's order_id may be anything.
_JOB_COLUMNS = """
j.id AS job_id, j.queue_name AS queue, j.task_name AS task, j.status::text AS status,
CASE WHEN j.task_name LIKE 'jobdaemon.%%' THEN (j.args ->> 'order_id')::bigint END AS order_id,
j.attempts, j.priority, j.scheduled_at, j.worker_id AS daemon_id
"""
_JOBS = f"""
SELECT {_JOB_COLUMNS} FROM jobdaemon.procrastinate_jobs j
WHERE (%(queue)s::text IS NULL OR j.queue_name = %(queue)s)
    AND (%(status)s::text IS NULL OR j.status::text = %(status)s)
    AND (%(order)s::text IS NULL OR (j.task_name LIKE 'jobdaemon.%%' AND j.args ->> 'order_id' = %(order)s))
ORDER BY j.id DESC LIMIT %(limit)s
"""  # noqa: S608 - one constant
_JOB = f"SELECT {_JOB_COLUMNS}, j.args FROM jobdaemon.procrastinate_jobs j WHERE j.id = %s"  # noqa: S608 - one constant
_ATTEMPTS = """
SELECT attempt, outcome, started_at, ended_at, daemon_id, error_kind, error
FROM jobdaemon.attempts WHERE job_id = %s ORDER BY id
"""
_EVENTS = "SELECT type::text AS type, at FROM jobdaemon.procrastinate_events WHERE job_id = %s ORDER BY id"
_ORDERS = """
SELECT p.* FROM jobdaemon.order_progress p
WHERE (%(status)s::text IS NULL OR p.status = %(status)s) AND (%(customer)s::text IS NULL OR p.customer = %(customer)s)
"""
_IN_GROUP = """ AND p.order_id IN (SELECT o.id FROM jobdaemon.orders o WHERE o."group" = %(group)s)"""
_NEWEST_FIRST = " ORDER BY p.order_id DESC LIMIT %(limit)s"


def _rows(connection: psycopg.Connection[Any], query: str, parameters: Any = None) -> list[Row]:
    from psycopg.rows import dict_row

    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


def orders(
    connection: psycopg.Connection[Any], *, status: str | None, customer: str | None, group: str | None, limit: int
) -> list[Row]:
    """Rows of ``order_progress``, the newest first."""
    query = _ORDERS + (_IN_GROUP if group is not None else "") + _NEWEST_FIRST
    return _rows(connection, query, {"status": status, "customer": customer, "group": group, "limit": limit})


def order_progress(connection: psycopg.Connection[Any], order_id: int) -> Row:
    """
    One row of ``order_progress``.

    Raises:
        RefusedError: JD005, there is no such order.
    """
    found = _rows(connection, "SELECT * FROM jobdaemon.order_progress WHERE order_id = %s", [order_id])
    if not found:
        raise RefusedError(f"unknown order {order_id}", sqlstate="JD005")
    return found[0]


def order_document(connection: psycopg.Connection[Any], order_id: int) -> Row:
    """The columns of ``order_progress``, and ``images``; both of one moment."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return order_progress(connection, order_id) | {"images": _rows(connection, _IMAGES, [order_id])}


def order_error(connection: psycopg.Connection[Any], order_id: int) -> str | None:
    """Why the order failed, when it did."""
    row = connection.execute("SELECT error FROM jobdaemon.orders WHERE id = %s", [order_id]).fetchone()
    return None if row is None else row[0]


def queues(connection: psycopg.Connection[Any]) -> list[Row]:
    """Rows of ``queue_depth``."""
    return _rows(connection, "SELECT * FROM jobdaemon.queue_depth ORDER BY queue")


def keys(connection: psycopg.Connection[Any]) -> list[Row]:
    """Rows of ``keys``."""
    return _rows(connection, "SELECT * FROM jobdaemon.keys ORDER BY provider, alias")


def cache_stats(connection: psycopg.Connection[Any]) -> list[Row]:
    """Rows of ``cache_stats``."""
    return _rows(connection, "SELECT * FROM jobdaemon.cache_stats ORDER BY provider")


def daemons(connection: psycopg.Connection[Any], *, include_stopped: bool) -> list[Row]:
    """Rows of ``workers``."""
    return _rows(connection, _DAEMONS, {"all": include_stopped})


def jobs(
    connection: psycopg.Connection[Any], *, queue: str | None, status: str | None, order_id: int | None, limit: int
) -> list[Row]:
    """Jobs, the newest first."""
    order = None if order_id is None else str(order_id)
    return _rows(connection, _JOBS, {"queue": queue, "status": status, "order": order, "limit": limit})


def explained(connection: psycopg.Connection[Any], any_id: int, *, is_job: bool) -> list[Row]:
    """
    A row for each reason why a job, or each open job of an order, waits.

    Raises:
        psycopg.Error: JD005, there is no such order or job.
    """
    return _rows(connection, f"SELECT * FROM jobdaemon.explain_{'job' if is_job else 'order'}(%s)", [any_id])  # noqa: S608 - two constants


def job_document(connection: psycopg.Connection[Any], job_id: int) -> Row:
    """
    One job, its arguments, ``failed_attempts`` and ``events``.

    Raises:
        RefusedError: JD005, there is no such job.
    """
    found = _rows(connection, _JOB, [job_id])
    if not found:
        raise RefusedError(f"unknown job {job_id}", sqlstate="JD005")
    history = {"failed_attempts": _rows(connection, _ATTEMPTS, [job_id]), "events": _rows(connection, _EVENTS, [job_id])}
    return found[0] | history
