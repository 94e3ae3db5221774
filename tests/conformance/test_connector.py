"""The connector interface, the same on procrastinate's own connector and on ours; then what only ours promises."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import procrastinate
import psycopg
import psycopg.conninfo
import pytest
from procrastinate import SyncPsycopgConnector, exceptions, utils
from procrastinate.connector import BaseAsyncConnector
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager
from procrastinate.schema import SchemaManager

from jobdaemon.errors import SettingsError
from jobdaemon.queue.connector import AsyncpgConnector

pytestmark = pytest.mark.newest_postgres

_TIMEOUT_S = 20
_MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def _job(**fields: Any) -> Job:
    return Job(**{"queue": "queue_a", "task_name": "task_a", "lock": None, "queueing_lock": None, **fields})


# ---------------------------------------------------------------- opening and closing


async def test_queries_need_an_open_connector(connector_kind: Any, procrastinate_database: Any) -> None:
    """Before opening and after closing every query raises AppNotOpen; a closed connector can be opened again."""
    connector = connector_kind.make(procrastinate_database)
    for _ in range(2):
        with pytest.raises(exceptions.AppNotOpen):
            await connector.execute_query_all_async("SELECT 1")
        with pytest.raises(exceptions.AppNotOpen):
            await connector.execute_query_async("SELECT 1")
        with pytest.raises(exceptions.AppNotOpen):
            await connector.listen_notify(lambda **_: None, ["c"])
        await connector.open_async()
        await connector.open_async()
        assert await connector.execute_query_one_async("SELECT 1 AS n") == {"n": 1}
        await connector.close_async()
        await connector.close_async()


async def test_a_given_pool_is_used_and_left_open(connector_kind: Any, procrastinate_database: Any) -> None:
    """A pool from outside serves the whole job manager and still works after the connector is closed."""
    async with connector_kind.make_pool(procrastinate_database) as pool:
        connector = connector_kind.make(procrastinate_database)
        await connector.open_async(pool)
        manager = JobManager(connector)
        job = await manager.defer_job_async(_job(task_kwargs={"a": [1]}, lock="l"))
        fetched = await manager.fetch_job(["queue_a"], await manager.register_worker())
        assert fetched is not None
        assert (fetched.id, fetched.task_kwargs) == (job.id, {"a": [1]})
        assert [row["jobs_count"] for row in await manager.list_locks_async()] == [1]
        await manager.finish_job(fetched, Status.SUCCEEDED, delete_job=True)
        assert await manager.check_connection_async() is True
        await connector.close_async()
        assert connector.get_sync_connector() is not None
        async with pool.acquire() if hasattr(pool, "acquire") else pool.connection() as connection:
            await connection.execute("SELECT 1")


async def test_sync_use_before_opening(connector_kind: Any, procrastinate_database: Any) -> None:
    """An app whose connector is not open can be used synchronously, in the same schema and with the same hooks."""
    dumped: list[Any] = []

    def dumps(value: Any) -> str:
        dumped.append(value)
        return json.dumps(value)

    connector = connector_kind.make(procrastinate_database, json_dumps=dumps, json_loads=json.loads)
    app = procrastinate.App(connector=connector)

    def use() -> tuple[int, Status, bool]:
        with app.open():
            job_id = app.configure_task("t").defer(a=1)
            return job_id, app.job_manager.get_job_status(job_id), app.check_connection()

    job_id, status, is_there = await utils.sync_to_async(use)
    assert (status, is_there, dumped) == (Status.TODO, True, [{"a": 1}])
    async with app.open_async():
        assert connector.get_sync_connector() is connector
        assert await app.job_manager.get_job_status_async(job_id) is Status.TODO


async def test_opening_closes_the_sync_connector(connector_kind: Any, procrastinate_database: Any) -> None:
    """A synchronous pool that was opened on the way does not outlive the asynchronous one's opening."""
    connector = connector_kind.make(procrastinate_database)
    sync = connector.get_sync_connector()
    assert isinstance(sync, SyncPsycopgConnector)
    await utils.sync_to_async(sync.open)
    await connector.open_async()
    with pytest.raises(exceptions.AppNotOpen):
        sync.execute_query("SELECT 1")
    await connector.close_async()


# ---------------------------------------------------------------- schema


@pytest.mark.parametrize("schema", ["public", "jobdaemon"])
async def test_apply_schema(schema: str, connector_kind: Any, empty_database: str, database_in: Any) -> None:
    """Procrastinate's schema manager installs its schema into the connector's."""
    database = database_in(empty_database, schema)
    async with procrastinate.App(connector=connector_kind.make(database)).open_async() as app:
        assert await app.check_connection_async() is False
        await app.schema_manager.apply_schema_async()
        assert await app.check_connection_async() is True
        await app.configure_task("t").defer_async()
    with database.connect() as connection:
        tables = connection.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'procrastinate_jobs'").fetchall()
    assert tables == [{"schemaname": schema}]


async def test_a_script_runs_whole_or_not_at_all(connector: BaseAsyncConnector) -> None:
    """A script whose last statement fails leaves nothing of the first."""
    with pytest.raises(exceptions.ConnectorException):
        await connector.execute_query_async("CREATE TABLE script_test (a int); SELECT 1 / 0")
    row = await connector.execute_query_one_async("SELECT to_regclass('script_test') AS found")
    assert row == {"found": None}


# ---------------------------------------------------------------- arguments and results


@pytest.mark.parametrize(
    ("cast", "value"),
    [
        ("text", "x'\"\\%"),
        ("varchar", None),
        ("int", -5),
        ("smallint", 7),
        ("bigint", 2**62),
        ("numeric", Decimal("12345678901234567890.5")),
        ("numeric", 2**80),
        ("float8", 0.1),
        ("boolean", True),
        ("timestamptz", _MOMENT),
        ("timestamp", _MOMENT.replace(tzinfo=None)),
        ("date", date(2026, 1, 2)),
        ("interval", timedelta(days=-3, microseconds=1)),
        ("uuid", uuid.UUID(int=5)),
        ("bytea", b"\x00\xff"),
        ("jsonb", {"a": ["ü", None, 1.5]}),
        ("json", {"a": {}}),
        ("text[]", ["a", None, 'b"\\,{}', ""]),
        ("text[]", []),
        ("int[]", [1, None, 70_000]),
        ("timestamptz[]", [_MOMENT]),
        ("bool[]", [True, False]),
        ("procrastinate_job_status", "doing"),
        ("procrastinate_job_status[]", ["todo", "doing"]),
    ],
)
async def test_values_make_the_round_trip(cast: str, value: Any, connector: BaseAsyncConnector) -> None:
    """A value sent under a type comes back equal and of the same Python type."""
    if cast.startswith("procrastinate_job_status"):
        query = f"SELECT %(v)s::{cast}::text AS v" if cast.endswith("status") else f"SELECT %(v)s::{cast}::text[] AS v"
    else:
        query = f"SELECT %(v)s::{cast} AS v"
    row = await connector.execute_query_one_async(query, v=value)
    assert row == {"v": value}
    if not isinstance(value, int) or cast != "numeric":
        assert isinstance(row["v"], type(value))  # asyncpg's UUID is a subclass


@pytest.mark.parametrize(
    ("query", "arguments", "expected"),
    [
        ("SELECT (%(n)s || 'SECOND')::interval AS v", {"n": 90}, timedelta(seconds=90)),
        ("SELECT (%(n)s || ' SECOND')::interval AS v", {"n": 1.5}, timedelta(seconds=1.5)),
        ("SELECT %(n)s + 1 AS v", {"n": 2**31}, 2**31 + 1),
        ("SELECT 7 %% %(n)s AS v", {"n": 4}, 3),
        ("SELECT 'a%%' AS v", {}, "a%"),
        ("SELECT %(a)s::text || %(a)s AS v", {"a": "x"}, "xx"),
        ("SELECT %(a)s::text IS NULL AS v", {"a": None, "unused": object()}, True),
        ("SELECT pg_typeof(%(a)s)::text AS v", {"a": {}}, "jsonb"),
        ("SELECT pg_typeof(%(a)s)::text AS v", {"a": True}, "boolean"),
        ("SELECT pg_typeof(%(a)s)::text AS v", {"a": _MOMENT}, "timestamp with time zone"),
        ("SELECT 'todo'::procrastinate_job_status AS v", {}, "todo"),
        ("SELECT '[1, {\"a\": null}]'::json AS v", {}, [1, {"a": None}]),
        ("SELECT 'null'::jsonb AS v", {}, None),
        ("SELECT '\"text\"'::jsonb AS v", {}, "text"),
        ("SELECT NULL::jsonb AS v", {}, None),
        ("SELECT json_object_agg('a', 1::bigint) AS v", {}, {"a": 1}),
        ("SELECT sum(n) AS v FROM (VALUES (1::bigint)) AS t (n)", {}, Decimal(1)),
    ],
)
async def test_results_and_inference(query: Any, arguments: dict[str, Any], expected: Any, connector: BaseAsyncConnector) -> None:
    """Types are inferred, and results decoded, as psycopg does it."""
    row = await connector.execute_query_one_async(query, **arguments)
    assert row == {"v": expected}
    assert type(row["v"]) is type(expected)


async def test_rows_are_dicts_in_order(connector: BaseAsyncConnector) -> None:
    """All rows come as plain dicts; one takes the first; a result without rows is an empty list."""
    query: Any = "SELECT n, n * 2 AS twice FROM generate_series(1, 3) AS n ORDER BY n DESC"
    rows = await connector.execute_query_all_async(query)
    assert rows == [{"n": 3, "twice": 6}, {"n": 2, "twice": 4}, {"n": 1, "twice": 2}]
    assert type(rows[0]) is dict
    assert await connector.execute_query_one_async(query) == rows[0]
    assert await connector.execute_query_all_async("SELECT 1 WHERE false") == []


async def test_json_hooks_are_used(connector_kind: Any, procrastinate_database: Any) -> None:
    """json_dumps writes arguments at any depth, and json_loads reads results."""
    connector = connector_kind.make(
        procrastinate_database,
        json_dumps=lambda value: json.dumps({"dumped": value}),
        json_loads=lambda text: {"loaded": json.loads(text)},
    )
    await connector.open_async()
    try:
        row = await connector.execute_query_one_async("SELECT %(a)s AS v", a={"k": 1})
        assert row == {"v": {"loaded": {"dumped": {"k": 1}}}}
        await JobManager(connector).defer_job_async(_job(task_kwargs={"k": 2}))
        row = await connector.execute_query_one_async("SELECT args FROM procrastinate_jobs")
        assert row == {"args": {"loaded": {"dumped": {"k": 2}}}}
    finally:
        await connector.close_async()


async def test_queries_on_the_callers_connection(
    connector: BaseAsyncConnector, connector_kind: Any, procrastinate_database: Any
) -> None:
    """Arguments and results on a caller's connection are the same as elsewhere."""
    query = "SELECT %(a)s AS a, %(n)s || 's' AS n, 'todo'::procrastinate_job_status AS s, json_build_array(%(n)s) AS j"
    async with connector_kind.begin(procrastinate_database) as callers:
        row = await connector.execute_query_one_async_with_connection(callers.connection, query, a={"k": "v"}, n=5)
        assert row == {"a": {"k": "v"}, "n": "5s", "s": "todo", "j": [5]}
        assert await connector.execute_query_all_async_with_connection(callers.connection, query, a={"k": "v"}, n=5) == [row]
        with pytest.raises(exceptions.NoResult):
            await connector.execute_query_one_async_with_connection(callers.connection, "SELECT 1 WHERE false")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "query",
    [
        "SELECT nothing",
        "SELEC 1",
        "SELECT 1 / 0",
        "SELECT %(missing)s",
        "SELECT 5 % 2",
        "SELECT %(a)s::int",
        "SELECT * FROM nowhere",
    ],
)
async def test_database_errors_are_translated(query: Any, connector: BaseAsyncConnector) -> None:
    """Whatever is wrong with a query is a ConnectorException, not the driver's, and the connector works on."""
    for run in (connector.execute_query_async, connector.execute_query_one_async, connector.execute_query_all_async):
        with pytest.raises(exceptions.ConnectorException) as caught:
            await run(query, a="not a number")
        assert caught.value.__cause__ is not None
    assert await connector.execute_query_one_async("SELECT 1 AS n") == {"n": 1}


async def test_no_row_is_no_result(connector: BaseAsyncConnector) -> None:
    """Asking for one row where there is none raises NoResult."""
    with pytest.raises(exceptions.NoResult):
        await connector.execute_query_one_async("SELECT 1 WHERE false")


async def test_unique_violations_keep_their_constraint(connector: BaseAsyncConnector) -> None:
    """A unique violation names its constraint, and a queueing lock only where there is one."""
    await connector.execute_query_async("INSERT INTO procrastinate_workers (id) OVERRIDING SYSTEM VALUE VALUES (-1)")
    with pytest.raises(exceptions.UniqueViolation) as caught:
        await connector.execute_query_async("INSERT INTO procrastinate_workers (id) OVERRIDING SYSTEM VALUE VALUES (-1)")
    assert caught.value.constraint_name == "procrastinate_workers_pkey"
    assert caught.value.queueing_lock is None


# ---------------------------------------------------------------- notifications


class Ear:
    """Notes what a listener hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.event = asyncio.Event()

    async def __call__(self, *, channel: str, payload: str) -> None:
        self.heard.append((channel, payload))
        self.event.set()

    async def next(self, until: Any, provoke: Callable[[], Any]) -> None:
        """Wait until something new is heard."""
        self.event.clear()
        await until(self.event, provoke)


def _shout(connector: BaseAsyncConnector, channel: str, payload: str = "p") -> Callable[[], Any]:
    return lambda: connector.execute_query_one_async(
        "SELECT pg_notify(%(channel)s, %(payload)s)", channel=channel, payload=payload
    )


async def _wait_for(is_so: Callable[[], bool]) -> None:
    """Wait for what only looking can tell."""
    async with asyncio.timeout(_TIMEOUT_S):
        while not is_so():  # noqa: ASYNC110 (the server and the log have no event to wait for)
            await asyncio.sleep(0.02)


def _listeners(connection: psycopg.Connection[dict[str, Any]]) -> list[int]:
    query = """
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND query ~* '^(LISTEN|SELECT 1$)' AND pid <> pg_backend_pid()
    """
    return [row["pid"] for row in connection.execute(query.encode())]


@pytest.mark.parametrize("channel", ["plain", 'Od"d #chännel', "procrastinate_queue_v1#queue"])
async def test_listen_hears_channel_and_payload(
    channel: str, connector: BaseAsyncConnector, in_background: Callable[[Any], Any], until: Any
) -> None:
    """A notification comes with its channel and payload, whatever their spelling."""
    ear = Ear()
    in_background(connector.listen_notify(ear, [channel, "other"]))
    await ear.next(until, _shout(connector, channel, "päyload"))
    assert ear.heard[0] == (channel, "päyload")
    await ear.next(until, _shout(connector, "other", ""))
    assert ear.heard[-1] == ("other", "")


async def test_listen_survives_its_backends_end(
    connector: BaseAsyncConnector,
    in_background: Callable[[Any], Any],
    until: Any,
    database_connection: psycopg.Connection[dict[str, Any]],
) -> None:
    """A listener whose backend is terminated, twice, connects and listens again on all its channels."""
    ear = Ear()
    in_background(connector.listen_notify(ear, ["one", "two"]))
    for _ in range(2):
        await ear.next(until, _shout(connector, "two"))
        for pid in _listeners(database_connection):
            database_connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    await ear.next(until, _shout(connector, "one"))
    await ear.next(until, _shout(connector, "two"))


async def test_listen_raises_what_its_callback_raises(
    connector: BaseAsyncConnector, in_background: Callable[[Any], Any], until: Any
) -> None:
    """An error in the callback ends the listening and reaches whoever awaits it, even if it looks like a lost connection."""
    called = asyncio.Event()

    async def fail(*, channel: str, payload: str) -> None:
        called.set()
        raise ConnectionResetError("the callback's own")

    task = in_background(connector.listen_notify(fail, ["c"]))
    await until(called, _shout(connector, "c"))
    with pytest.raises(ConnectionResetError, match="callback's own"):
        await asyncio.wait_for(task, _TIMEOUT_S)


# ---------------------------------------------------------------- only ours: opening


@pytest.fixture
async def ours(procrastinate_database: Any) -> AsyncIterator[AsyncpgConnector]:
    """Give our connector, open."""
    connector = AsyncpgConnector(dsn=procrastinate_database.url, schema=procrastinate_database.schema, max_size=4)
    await connector.open_async()
    yield connector
    await connector.close_async()


async def test_an_unreachable_database_is_a_connector_exception(tmp_path: Any) -> None:
    """A database that cannot be reached is told when the connector is opened, and opening can be tried again."""
    connector = AsyncpgConnector(host=str(tmp_path), user="nobody", database="nothing")
    for _ in range(2):
        with pytest.raises(exceptions.ConnectorException) as caught:
            await connector.open_async()
        assert isinstance(caught.value.__cause__, OSError)


def test_a_malformed_dsn_is_a_connector_exception() -> None:
    """A DSN that asyncpg cannot read is a ConnectorException too."""
    connector = AsyncpgConnector(dsn="mysql://x")
    with pytest.raises(exceptions.ConnectorException):
        asyncio.run(connector.open_async())


def test_two_search_paths_are_refused() -> None:
    """A schema and a search_path in server_settings contradict each other."""
    with pytest.raises(SettingsError, match="search_path"):
        AsyncpgConnector(schema="a", server_settings={"search_path": "b"})


async def test_an_odd_schema_name_is_quoted(empty_database: str) -> None:
    """Any schema name works, for our own connections and for synchronous use."""
    schema = 'Odd "sch\\ema", x'
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(schema)))
    app = procrastinate.App(connector=AsyncpgConnector(dsn=empty_database, schema=schema))
    await app.open_async()
    await app.schema_manager.apply_schema_async()
    assert await app.check_connection_async() is True
    await app.close_async()

    def check() -> bool:
        with app.open():
            return app.check_connection()

    assert await utils.sync_to_async(check) is True


async def test_parameters_without_a_dsn(procrastinate_database: Any) -> None:
    """Host, port, user, database and server settings given apart work, asynchronously and synchronously."""
    parts: dict[str, Any] = {**psycopg.conninfo.conninfo_to_dict(procrastinate_database.url)}
    connector = AsyncpgConnector(
        **{name: parts[name] for name in ("host", "port", "user", "password") if name in parts},
        database=parts["dbname"],
        schema=procrastinate_database.schema,
        server_settings={"application_name": "a name"},
        max_size=2,
    )
    query = "SELECT current_setting('application_name') AS name, to_regclass('procrastinate_jobs') IS NOT NULL AS found"
    expected = {"name": "a name", "found": True}
    sync = connector.get_sync_connector()
    await utils.sync_to_async(sync.open)
    assert await utils.sync_to_async(sync.execute_query_one, query) == expected
    await connector.open_async()
    assert await connector.execute_query_one_async(query) == expected
    await connector.close_async()


@pytest.mark.parametrize("option", [{"ssl": object()}, {"password": lambda: "secret"}])
def test_what_libpq_cannot_express_is_refused(option: dict[str, Any]) -> None:
    """A TLS context or a password callback has no libpq form; leaving it out in silence would be worse than refusing."""
    with pytest.raises(SettingsError, match=next(iter(option))):
        AsyncpgConnector(dsn="postgresql:///x", **option).get_sync_connector()


async def test_nothing_of_a_session_reaches_the_next_query(procrastinate_database: Any) -> None:
    """Settings and transactions that a script leaves behind are undone before the connection serves again."""
    connector = AsyncpgConnector(dsn=procrastinate_database.url, max_size=1)
    await connector.open_async()
    await connector.execute_query_async("SET application_name = 'left behind'; SELECT pg_advisory_lock(1)")
    await connector.execute_query_async("BEGIN; SET LOCAL statement_timeout = 1")
    row = await connector.execute_query_one_async(
        "SELECT current_setting('application_name') AS name, current_setting('statement_timeout') AS timeout,"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks"
    )
    assert (row["name"], row["timeout"], row["locks"]) == ("", "0", 0)
    await connector.execute_query_all_async("BEGIN")
    query = "SELECT count(*) AS n FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%' AND datname = current_database()"
    assert await connector.execute_query_one_async(query) == {"n": 0}
    row = await connector.execute_query_one_async("SELECT pg_current_xact_id_if_assigned() IS NULL AS is_fresh")
    assert row == {"is_fresh": True}
    await connector.close_async()


async def test_without_a_statement_cache(procrastinate_database: Any) -> None:
    """The connector works with statement_cache_size=0, as a PgBouncer in transaction mode needs it."""
    connector = AsyncpgConnector(dsn=procrastinate_database.url, schema=procrastinate_database.schema, statement_cache_size=0)
    async with procrastinate.App(connector=connector).open_async() as app:
        job_id = await app.configure_task("t").defer_async(a=1)
        assert [job.id for job in await app.job_manager.list_jobs_async(queue="default")] == [job_id]


# ---------------------------------------------------------------- only ours: the caller's connection


async def _no_codec(connection: Any) -> None:
    pass


async def _text_codec(connection: Any) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)


async def _one_codec(connection: Any) -> None:
    await connection.set_type_codec("json", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)


async def _binary_codec(connection: Any) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: b"\x01" + json.dumps(value).encode(),
        decoder=lambda raw: json.loads(raw[1:]),
        format="binary",
    )


@pytest.mark.parametrize("prepare", [_no_codec, _text_codec, _one_codec, _binary_codec])
async def test_codecs_of_the_callers_connection_do_not_matter(
    prepare: Any, ours: AsyncpgConnector, procrastinate_database: Any
) -> None:
    """Arguments are stored, and JSON is read, alike whatever JSON codecs the caller's connection has."""
    connection = await asyncpg.connect(procrastinate_database.url, server_settings={"search_path": procrastinate_database.schema})
    try:
        await prepare(connection)
        await JobManager(ours).defer_job_async(_job(task_kwargs={"a": ["x", {"b": None}]}), connection=connection)
        query: Any = """
            SELECT args, to_json(args) AS plain, jsonb_typeof(args) AS kind, '"x"'::jsonb AS text, NULL::json AS none
            FROM procrastinate_jobs
        """
        row = await ours.execute_query_one_async_with_connection(connection, query)
        args = {"a": ["x", {"b": None}]}
        assert row == {"args": args, "plain": args, "kind": "object", "text": "x", "none": None}
    finally:
        await connection.close()


@pytest.mark.parametrize("prepare", [_no_codec, _text_codec])
async def test_codecs_of_a_given_pool_do_not_matter(prepare: Any, procrastinate_database: Any) -> None:
    """A pool from outside may decode JSON or not, beside a caller's connection that does the opposite."""
    settings = {"search_path": procrastinate_database.schema}
    async with asyncpg.create_pool(
        procrastinate_database.url, min_size=1, max_size=2, init=prepare, server_settings=settings
    ) as pool:
        connector = AsyncpgConnector()
        await connector.open_async(pool)
        manager = JobManager(connector)
        job = await manager.defer_job_async(_job(task_kwargs={"a": 1}))
        for other in (_text_codec, _no_codec):
            connection = await asyncpg.connect(procrastinate_database.url, server_settings=settings)
            await other(connection)
            row = await connector.execute_query_one_async_with_connection(connection, "SELECT args FROM procrastinate_jobs")
            assert row == {"args": {"a": 1}}
            await connection.close()
            assert [stored.task_kwargs for stored in await manager.list_jobs_async(id=job.id)] == [{"a": 1}]


async def test_defer_needs_no_search_path_of_the_caller(ours: AsyncpgConnector, procrastinate_database: Any) -> None:
    """With a schema set, jobs are deferred from any search_path, once the functions have one of their own."""
    schema = procrastinate_database.schema
    connection = await asyncpg.connect(procrastinate_database.url, server_settings={"search_path": "pg_catalog"})
    transaction = connection.transaction()
    await transaction.start()
    try:
        functions = await connection.fetch(
            "SELECT oid::regprocedure::text AS f FROM pg_proc WHERE proname LIKE 'procrastinate\\_%'"
        )
        for function in functions:
            await connection.execute(f"ALTER FUNCTION {function['f']} SET search_path = {schema}, pg_temp")
        manager = JobManager(ours)
        job = await manager.defer_job_async(_job(task_kwargs={"a": 1}), connection=connection)
        assert job.id is not None
        assert await manager.get_job_status_async(job.id, connection=connection) is Status.TODO
        assert await manager.cancel_job_by_id_async(job.id, connection=connection) is True
        assert await connection.fetchval("SHOW search_path") == "pg_catalog"
    finally:
        await transaction.rollback()
        await connection.close()


async def test_a_pools_connection_is_as_good(ours: AsyncpgConnector, procrastinate_database: Any) -> None:
    """A connection that the caller acquired from a pool, ours included, serves as well as one of its own."""
    async with ours.pool.acquire() as connection, connection.transaction():
        job = await JobManager(ours).defer_job_async(_job(), connection=connection)
        row = await ours.execute_query_one_async_with_connection(connection, "SELECT id, args FROM procrastinate_jobs")
        assert row == {"id": job.id, "args": {}}


async def test_a_savepoint_saves_the_callers_transaction(ours: AsyncpgConnector, procrastinate_database: Any) -> None:
    """A refused defer inside a nested transaction undoes only that."""
    manager = JobManager(ours)
    settings = {"search_path": procrastinate_database.schema}
    connection = await asyncpg.connect(procrastinate_database.url, server_settings=settings)
    try:
        async with connection.transaction():
            await manager.defer_job_async(_job(queueing_lock="ql"), connection=connection)
            with pytest.raises(exceptions.AlreadyEnqueued):
                async with connection.transaction():
                    await manager.defer_job_async(_job(queueing_lock="ql"), connection=connection)
            await manager.defer_job_async(_job(), connection=connection)
    finally:
        await connection.close()
    assert len(list(await manager.list_jobs_async())) == 2


async def test_a_foreign_kind_of_connection_is_refused(ours: AsyncpgConnector, procrastinate_database: Any) -> None:
    """A connection of another driver is refused by name."""
    async with await psycopg.AsyncConnection.connect(procrastinate_database.url) as connection:
        with pytest.raises(exceptions.ConnectorException, match="asyncpg connection, not a psycopg"):
            await JobManager(ours).defer_job_async(_job(), connection=connection)


@pytest.mark.parametrize("lock", ["new\nline", "both (brackets)", ")=("])
async def test_the_violated_lock_is_named_in_full(lock: str, ours: AsyncpgConnector) -> None:
    """Any queueing lock is named; procrastinate 3.10's own connector cuts it at a bracket and fails on a line break."""
    manager = JobManager(ours)
    await manager.defer_job_async(_job(queueing_lock=lock))
    with pytest.raises(exceptions.AlreadyEnqueued) as caught:
        await manager.defer_job_async(_job(queueing_lock=lock))
    assert str(caught.value).endswith(f"the queueing lock {lock}")


# ---------------------------------------------------------------- only ours: a schema that changes underneath


async def _use_everything(manager: JobManager) -> None:
    job = await manager.defer_job_async(_job(task_kwargs={"a": 1}))
    worker_id = await manager.register_worker()
    fetched = await manager.fetch_job(["queue_a"], worker_id)
    assert fetched is not None
    assert (fetched.id, fetched.status, fetched.task_kwargs) == (job.id, "doing", {"a": 1})
    assert len(list(await manager.list_jobs_async(status="doing"))) == 1
    assert len(list(await manager.list_queues_async(status="doing"))) == 1
    await manager.finish_job(fetched, Status.SUCCEEDED, delete_job=False)
    await manager.delete_old_jobs(nb_hours=-1)
    assert list(await manager.list_jobs_async()) == []


@pytest.mark.parametrize("is_given", [False, True])
async def test_statements_survive_new_tables_and_types(is_given: bool, empty_database: str) -> None:
    """Warm statements work on after every table, type and function was dropped and made anew under them."""
    pool = await asyncpg.create_pool(empty_database, min_size=1, max_size=1) if is_given else None
    connector = AsyncpgConnector(dsn=empty_database, max_size=1)
    await connector.open_async(pool)
    for _ in range(3):
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            connection.execute(SchemaManager.get_schema().encode())
        await _use_everything(JobManager(connector))
    await connector.close_async()
    if pool is not None:
        await pool.close()


@pytest.mark.parametrize(
    "first",
    [
        lambda manager: manager.list_jobs_async(status="doing"),
        lambda manager: manager.list_queues_async(status="doing"),
        lambda manager: manager.finish_job_by_id_async(1, Status.SUCCEEDED, delete_job=False),
        lambda manager: manager.fetch_job(["queue_a"], 1),
        lambda manager: manager.delete_old_jobs(nb_hours=1),
        lambda manager: manager.defer_job_async(_job()),
    ],
    ids=["list_jobs", "list_queues", "finish_job", "fetch_job", "delete_old_jobs", "defer_job"],
)
async def test_each_statement_survives_as_the_first_to_notice(first: Callable[[JobManager], Any], empty_database: str) -> None:
    """Whichever warm statement meets the new schema first, it works."""
    connector = AsyncpgConnector(dsn=empty_database, max_size=1)
    await connector.open_async()
    manager = JobManager(connector)
    for _ in range(2):
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            connection.execute(SchemaManager.get_schema().encode())
            connection.execute("INSERT INTO procrastinate_workers DEFAULT VALUES")
            connection.execute("INSERT INTO procrastinate_jobs (queue_name, task_name, status) VALUES ('q', 't', 'doing')")
        await first(manager)
    await connector.close_async()


async def test_statements_survive_a_changed_result_type(ours: AsyncpgConnector) -> None:
    """A statement whose result changed its type is prepared anew."""
    await ours.execute_query_async("CREATE TABLE changing (a int); INSERT INTO changing VALUES (1)")
    try:
        query = "SELECT * FROM changing WHERE a::text = %(a)s"
        assert await ours.execute_query_all_async(query, a="1") == [{"a": 1}]
        await ours.execute_query_async("ALTER TABLE changing ALTER a TYPE text, ADD b jsonb DEFAULT '{}'")
        assert await ours.execute_query_all_async(query, a="1") == [{"a": "1", "b": {}}]
    finally:
        await ours.execute_query_async("DROP TABLE changing")


@pytest.mark.parametrize("turns", [2, 3, 4, 20])
async def test_queries_survive_terminated_backends(
    turns: int, ours: AsyncpgConnector, database_connection: psycopg.Connection[dict[str, Any]]
) -> None:
    """Connections that the server cut while they were idle are replaced unnoticed, from the moment its goodbye was read."""
    query: Any = """
        SELECT count(pg_terminate_backend(pid, 5000)) AS n FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
    """
    await asyncio.gather(*(ours.execute_query_one_async("SELECT pg_sleep(0.02)") for _ in range(4)))
    assert database_connection.execute(query).fetchone() == {"n": 4}  # the event loop stands still meanwhile
    for _ in range(turns):  # the first reads what has arrived, later ones the end of the socket
        await asyncio.sleep(0)
    assert await ours.execute_query_one_async("SELECT 1 AS n") == {"n": 1}


# ---------------------------------------------------------------- only ours: listening through trouble


class Wire:
    """A TCP way to the server that can go silent or be cut."""

    def __init__(self, url: str) -> None:
        parts = psycopg.conninfo.conninfo_to_dict(url)
        self._host, self._port = str(parts["host"]), str(parts.get("port", 5432))
        self._parameters = {name: parts[name] for name in ("user", "password", "dbname") if name in parts}
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._port_here = 0
        self.is_silent = False
        self.connections = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._port_here)
        self._port_here = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Refuse new connections and drop those there are."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    @property
    def connect_options(self) -> dict[str, Any]:
        return {
            "host": "127.0.0.1",
            "port": self._port_here,
            "user": self._parameters.get("user"),
            "password": self._parameters.get("password"),
            "database": self._parameters["dbname"],
            "ssl": "disable",
        }

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._host.startswith("/"):
            other_reader, other_writer = await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        else:
            other_reader, other_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, other_writer]
        is_silent_for_ever = False

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal is_silent_for_ever
            with suppress(OSError):
                while data := await source.read(65536):
                    is_silent_for_ever = is_silent_for_ever or self.is_silent
                    if not is_silent_for_ever:
                        sink.write(data)
                        await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, other_writer), pump(other_reader, writer))


@asynccontextmanager
async def _wired(url: str) -> AsyncIterator[Wire]:
    wire = Wire(url)
    await wire.open()
    yield wire
    wire.cut()


async def test_listen_replaces_a_half_open_connection(
    ours: AsyncpgConnector, procrastinate_database: Any, in_background: Callable[[Any], Any], until: Any
) -> None:
    """A connection that stays open but carries nothing any more is noticed within the keepalive and replaced."""
    async with _wired(procrastinate_database.url) as wire:
        connector = AsyncpgConnector(**wire.connect_options, listen_keepalive_s=0.3, min_size=0)
        await connector.open_async()
        ear = Ear()
        in_background(connector.listen_notify(ear, ["c"]))
        await ear.next(until, _shout(ours, "c"))
        wire.is_silent = True
        seen = wire.connections
        await _wait_for(lambda: wire.connections > seen)  # it knocks again by itself, with nothing sent to it
        wire.is_silent = False
        await ear.next(until, _shout(ours, "c"))
        await connector.close_async()


async def test_a_listener_on_a_half_open_connection_can_be_cancelled(
    ours: AsyncpgConnector, procrastinate_database: Any, in_background: Callable[[Any], Any], until: Any
) -> None:
    """Cancelling does not wait for goodbyes that a dead connection never answers."""
    async with _wired(procrastinate_database.url) as wire:
        connector = AsyncpgConnector(**wire.connect_options, min_size=0)
        await connector.open_async()
        ear = Ear()
        task = in_background(connector.listen_notify(ear, ["c"]))
        await ear.next(until, _shout(ours, "c"))
        wire.is_silent = True
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), _TIMEOUT_S)
        await connector.close_async()


async def test_listen_keeps_an_idle_connection(
    ours: AsyncpgConnector, procrastinate_database: Any, in_background: Callable[[Any], Any], until: Any
) -> None:
    """A quiet but healthy connection passes its keepalives and stays."""
    async with _wired(procrastinate_database.url) as wire:
        connector = AsyncpgConnector(**wire.connect_options, listen_keepalive_s=0.05, min_size=0)
        await connector.open_async()
        ear = Ear()
        in_background(connector.listen_notify(ear, ["c"]))
        await ear.next(until, _shout(ours, "c"))
        await ours.execute_query_one_async("SELECT pg_sleep(0.5)")
        await ear.next(until, _shout(ours, "c"))
        assert wire.connections == 1
        await connector.close_async()


async def test_listen_waits_out_an_outage(
    ours: AsyncpgConnector, procrastinate_database: Any, in_background: Callable[[Any], Any], until: Any, caplog: Any
) -> None:
    """While the server refuses connections the listener goes on trying, and listens again when it is back."""
    async with _wired(procrastinate_database.url) as wire:
        connector = AsyncpgConnector(**wire.connect_options, min_size=0)
        await connector.open_async()
        ear = Ear()
        task = in_background(connector.listen_notify(ear, ["c"]))
        await ear.next(until, _shout(ours, "c"))
        wire.cut()
        await _wait_for(lambda: "cannot be restored yet" in caplog.text)
        assert not task.done()
        await wire.open()
        await ear.next(until, _shout(ours, "c"))
        await connector.close_async()


async def test_listen_says_when_it_cannot_begin(tmp_path: Any, procrastinate_database: Any) -> None:
    """A first connection that fails is an error, not an endless silence."""
    async with _wired(procrastinate_database.url) as wire:
        connector = AsyncpgConnector(**wire.connect_options, min_size=0)
        await connector.open_async()
        wire.cut()
        with pytest.raises(exceptions.ConnectorException):
            await connector.listen_notify(Ear(), ["c"])
        await connector.close_async()


async def test_listen_borrows_from_a_pool_without_a_dsn(
    procrastinate_database: Any, in_background: Callable[[Any], Any], until: Any, database_connection: psycopg.Connection[Any]
) -> None:
    """On a given pool, without a DSN, one connection is borrowed to listen, replaced when lost, and given back clean."""
    async with asyncpg.create_pool(procrastinate_database.url, min_size=2, max_size=2) as pool:
        connector = AsyncpgConnector()
        await connector.open_async(pool)
        ear = Ear()
        task = in_background(connector.listen_notify(ear, ["c"]))
        await ear.next(until, _shout(connector, "c"))
        assert pool.get_idle_size() == 1
        for pid in _listeners(database_connection):
            database_connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        await ear.next(until, _shout(connector, "c"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.get_idle_size() == pool.get_size()
        async with pool.acquire() as one, pool.acquire() as two:
            for connection in (one, two):
                assert await connection.fetchval("SELECT count(*) FROM pg_listening_channels()") == 0


async def test_a_cancelled_listener_hangs_up(
    ours: AsyncpgConnector, in_background: Callable[[Any], Any], until: Any, database_connection: psycopg.Connection[Any]
) -> None:
    """When listening is cancelled its connection is closed."""
    ear = Ear()
    task = in_background(ours.listen_notify(ear, ["c"]))
    await ear.next(until, _shout(ours, "c"))
    [pid] = _listeners(database_connection)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _wait_for(lambda: pid not in _listeners(database_connection))  # the backend ends a moment after its client
