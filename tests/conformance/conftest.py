"""Databases with procrastinate's schema, and the two connectors that must behave alike on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import asyncpg
import procrastinate
import psycopg
import psycopg.rows
import pytest
from procrastinate.connector import BaseAsyncConnector
from procrastinate.manager import JobManager
from procrastinate.schema import SchemaManager

from jobdaemon.queue.connector import AsyncpgConnector

# ---------------------------------------------------------------- how the schema was made


@dataclass(frozen=True)
class ProcrastinateDatabase:
    """A database with procrastinate's tables in *schema*, which is not on the path of a plain connection unless it is public."""

    url: str
    schema: str

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        """Give an autocommitting connection whose search_path is the schema."""
        return psycopg.connect(
            self.url, autocommit=True, row_factory=psycopg.rows.dict_row, options=f"-c search_path={self.schema}"
        )


def _make_stock(database: ProcrastinateDatabase) -> None:
    with database.connect() as connection:
        connection.execute(SchemaManager.get_schema().encode())


def _make_tuned(database: ProcrastinateDatabase) -> None:
    from jobdaemon.schema import migrate

    assert database.schema == "jobdaemon"
    with database.connect() as connection:
        connection.execute("DROP SCHEMA jobdaemon")
    migrate(database.url)


# The one place that knows how procrastinate's tables came to be.
_MAKERS: dict[str, Callable[[ProcrastinateDatabase], None]] = {"stock": _make_stock, "tuned": _make_tuned}
_VARIANTS = [("stock", "public"), ("stock", "jobdaemon"), ("tuned", "jobdaemon")]


class _Postgres(Protocol):
    def url(self, database: str) -> str: ...
    def create_database(self) -> str: ...
    def drop_database(self, name: str) -> None: ...


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On tables as procrastinate makes them each connector is tried in one schema; the other pairs are for thorough runs."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        variant, kind = parameters.get("_made_database"), parameters.get("connector_kind")
        if (variant, type(kind)) in ((("stock", "public"), AsyncpgKind), (("stock", "jobdaemon"), PsycopgKind)):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def database_in() -> Callable[[str, str], ProcrastinateDatabase]:
    """Make an empty schema in a database of the test's own."""

    def make(url: str, schema: str) -> ProcrastinateDatabase:
        database = ProcrastinateDatabase(url, schema)
        with database.connect() as connection:
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}".encode())
        return database

    return make


@pytest.fixture(scope="session", params=_VARIANTS, ids=lambda variant: f"{variant[0]}-{variant[1]}")
def _made_database(request: pytest.FixtureRequest, postgres: _Postgres) -> Iterator[ProcrastinateDatabase]:
    kind, schema = request.param
    name = postgres.create_database()
    database = ProcrastinateDatabase(postgres.url(name), schema)
    with database.connect() as connection:
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}".encode())
    _MAKERS[kind](database)
    yield database
    postgres.drop_database(name)


@pytest.fixture
def procrastinate_database(_made_database: ProcrastinateDatabase) -> ProcrastinateDatabase:
    """Give a database with procrastinate's schema and no rows; shared by the tests of one variant, emptied before each."""
    with _made_database.connect() as connection:
        connection.execute(
            "TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_periodic_defers, procrastinate_workers"
        )
    return _made_database


@pytest.fixture
def database_connection(procrastinate_database: ProcrastinateDatabase) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """Give a look from outside: neither connector has a part in it."""
    with procrastinate_database.connect() as connection:
        yield connection


# ---------------------------------------------------------------- the two connectors


@dataclass(frozen=True)
class CallersTransaction:
    """An open transaction of an application, on a connection of the connector's driver."""

    connection: Any
    execute: Callable[[str], Awaitable[object]]
    commit: Callable[[], Awaitable[None]]
    rollback: Callable[[], Awaitable[None]]


class ConnectorKind(Protocol):
    """What tests need to know of one connector and its driver."""

    def make(self, database: ProcrastinateDatabase, **options: Any) -> BaseAsyncConnector:
        """Make a connector that is not open yet."""
        ...

    def make_pool(self, database: ProcrastinateDatabase) -> AbstractAsyncContextManager[Any]:
        """Open a pool of the connector's driver."""
        ...

    def begin(self, database: ProcrastinateDatabase) -> AbstractAsyncContextManager[CallersTransaction]:
        """Open a transaction on a connection of the connector's driver."""
        ...


class PsycopgKind:
    def make(self, database: ProcrastinateDatabase, **options: Any) -> BaseAsyncConnector:
        kwargs = {"options": f"-c search_path={database.schema}"}
        return procrastinate.PsycopgConnector(conninfo=database.url, kwargs=kwargs, min_size=1, max_size=4, **options)

    @asynccontextmanager
    async def make_pool(self, database: ProcrastinateDatabase) -> AsyncIterator[Any]:
        import psycopg_pool

        kwargs = {"options": f"-c search_path={database.schema}"}
        async with psycopg_pool.AsyncConnectionPool(database.url, kwargs=kwargs, min_size=1, max_size=2, open=False) as pool:
            yield pool

    @asynccontextmanager
    async def begin(self, database: ProcrastinateDatabase) -> AsyncIterator[CallersTransaction]:
        options = f"-c search_path={database.schema}"
        async with await psycopg.AsyncConnection.connect(database.url, options=options) as connection:
            yield CallersTransaction(
                connection, lambda query: connection.execute(query.encode()), connection.commit, connection.rollback
            )


class AsyncpgKind:
    def make(self, database: ProcrastinateDatabase, **options: Any) -> BaseAsyncConnector:
        return AsyncpgConnector(dsn=database.url, schema=database.schema, min_size=1, max_size=4, **options)

    @asynccontextmanager
    async def make_pool(self, database: ProcrastinateDatabase) -> AsyncIterator[Any]:
        settings = {"search_path": database.schema}
        async with asyncpg.create_pool(database.url, min_size=1, max_size=2, server_settings=settings) as pool:
            yield pool

    @asynccontextmanager
    async def begin(self, database: ProcrastinateDatabase) -> AsyncIterator[CallersTransaction]:
        connection = await asyncpg.connect(database.url, server_settings={"search_path": database.schema})
        try:
            transaction = connection.transaction()
            await transaction.start()
            yield CallersTransaction(connection, connection.execute, transaction.commit, transaction.rollback)
        finally:
            await connection.close()


@pytest.fixture(params=[PsycopgKind(), AsyncpgKind()], ids=["psycopg", "asyncpg"])
def connector_kind(request: pytest.FixtureRequest) -> ConnectorKind:
    """Give procrastinate's own connector, then ours."""
    kind: ConnectorKind = request.param
    return kind


@pytest.fixture
async def connector(
    connector_kind: ConnectorKind, procrastinate_database: ProcrastinateDatabase
) -> AsyncIterator[BaseAsyncConnector]:
    """Give an open connector."""
    connector = connector_kind.make(procrastinate_database)
    await connector.open_async()
    yield connector
    await connector.close_async()


@pytest.fixture
def job_manager(connector: BaseAsyncConnector) -> JobManager:
    """Give procrastinate's job manager on an open connector."""
    return JobManager(connector)


@pytest.fixture
def app(connector: BaseAsyncConnector) -> procrastinate.App:
    """Give an app on an open connector."""
    return procrastinate.App(connector=connector)


# ---------------------------------------------------------------- waiting


@pytest.fixture
async def in_background() -> AsyncIterator[Callable[[Any], asyncio.Task[Any]]]:
    """Start coroutines that are cancelled at the end of the test."""
    tasks: list[asyncio.Task[Any]] = []

    def start(coroutine: Any) -> asyncio.Task[Any]:
        tasks.append(asyncio.create_task(coroutine))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Until(Protocol):
    async def __call__(self, event: asyncio.Event, provoke: Callable[[], Awaitable[object]]) -> None: ...


@pytest.fixture
def until() -> Until:
    """Provoke a notification until one arrives: when LISTEN takes effect cannot be seen from outside."""

    async def wait(event: asyncio.Event, provoke: Callable[[], Awaitable[object]]) -> None:
        async with asyncio.timeout(20):
            while not event.is_set():
                await provoke()
                with suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), 0.05)

    return wait
