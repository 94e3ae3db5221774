"""
procrastinate's connector interface on asyncpg.

With it a procrastinate ``App``, its ``JobManager`` and its stock worker run on an ``asyncpg.Pool``, and ``defer`` runs on the
caller's own asyncpg connection, inside the caller's transaction. Behaviour, results and exceptions are those of
``procrastinate.PsycopgConnector``; ``tests/conformance`` holds the two equal. How a statement is put into asyncpg's form is
``placeholders``' business.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, LiteralString, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from procrastinate import SyncPsycopgConnector, exceptions
from procrastinate.connector import BaseAsyncConnector, BaseConnector, Notify
from procrastinate.manager import QUEUEING_LOCK_CONSTRAINT

from jobdaemon.errors import SettingsError
from jobdaemon.queue.placeholders import JsonDumps, PlaceholderError, Statement, bind, quote_identifier

# In quotes: these classes are generic in the stubs alone.
_Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 10.0
_PING_TIMEOUT_S = 10.0
_HANG_UP_TIMEOUT_S = 2.0
_RECONNECT_DELAY_MIN_S = 0.1
_RECONNECT_DELAY_MAX_S = 5.0

# What asyncpg.create_pool takes and asyncpg.connect does not.
_POOL_ONLY = frozenset(
    {
        "connect",
        "init",
        "init_size",
        "loop",
        "max_inactive_connection_lifetime",
        "max_queries",
        "max_size",
        "min_size",
        "reset",
        "setup",
    }
)

# What Postgres says when a cached statement or type refers to an object that a migration dropped and made anew. Each refuses the
# statement before it has any effect, so that running it once more is safe. (A changed result type, "cached plan must not change
# result type", asyncpg cures by itself.)
_STALE = (asyncpg.InternalServerError, asyncpg.UndefinedObjectError)


class AsyncpgConnector(BaseAsyncConnector):
    """
    Runs procrastinate's queries on an ``asyncpg.Pool``, its own or one given to ``open_async``.

    A caller's connection, and a pool given from outside, may carry any type codecs and any search_path: nothing sent or read
    depends on the codecs for ``json`` and ``jsonb``, and with *schema* set the names of procrastinate's tables, types and
    functions are qualified there (its functions then need a search_path of their own, which ``jobdaemon migrate`` sets).

    Strings go only where Postgres infers a text or an enum; psycopg would also send ``"5"`` for a bigint.
    """

    def __init__(
        self,
        *,
        dsn: str | None = None,
        json_dumps: JsonDumps | None = None,
        json_loads: Callable[[str], Any] | None = None,
        schema: str | None = None,
        listen_keepalive_s: float = 30.0,
        **pool_kwargs: Any,
    ) -> None:
        """
        Note how to connect; nothing is opened yet.

        Args:
            dsn: ``postgresql://…``; without it, asyncpg's own defaults and the PG* environment variables.
            json_dumps: makes JSON (str or bytes) of a job's arguments.
            json_loads: reads JSON from a str.
            schema: the schema that holds procrastinate's tables, made the search_path of our own connections by a startup
                parameter (a PgBouncer in between must let ``search_path`` pass).
            listen_keepalive_s: after so many seconds without a notification the LISTEN connection is tried, and replaced when it
                does not answer.
            pool_kwargs: the rest of ``asyncpg.create_pool``; ``min_size`` is 1 unless given.

        Raises:
            SettingsError: *schema* and a search_path in ``server_settings`` contradict each other.
        """
        self._dsn = dsn
        self._dumps = json_dumps or json.dumps
        self._loads = json_loads or json.loads
        self._json_hooks = {"json_dumps": json_dumps, "json_loads": json_loads}
        self._schema = schema
        self._keepalive_s = listen_keepalive_s
        self._pool_kwargs = _with_search_path(pool_kwargs, schema)
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._pool_is_foreign = False
        self._foreign_pool_raw_json: frozenset[str] | None = None
        self._json_columns: dict[str, dict[str, str]] = {}
        self._sync_connector: BaseConnector | None = None

    # ------------------------------------------------------------ opening and closing

    @property
    def pool(self) -> asyncpg.Pool[asyncpg.Record]:
        """
        The open pool.

        Raises:
            AppNotOpen: ``open_async`` has not been called.
        """
        if self._pool is None:
            raise exceptions.AppNotOpen
        return self._pool

    async def open_async(self, pool: asyncpg.Pool[asyncpg.Record] | None = None) -> None:
        """
        Open the pool, or take *pool*, which stays its owner's to close. Opening twice does nothing.

        Raises:
            ConnectorException: the database cannot be reached.
        """
        if self._pool is not None:
            return
        if self._sync_connector is not None:
            await asyncio.to_thread(self._sync_connector.close)
            self._sync_connector = None
        self._pool_is_foreign = pool is not None
        self._foreign_pool_raw_json = None
        self._pool = pool if pool is not None else await self._create_pool()

    async def close_async(self) -> None:
        """Close our own pool once its connections are back, within 10 seconds; a pool given from outside is only let go."""
        pool, self._pool = self._pool, None
        if pool is None or self._pool_is_foreign:
            return
        with _translated():
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await pool.close()
            except TimeoutError:
                _logger.warning("Connections still in use %s seconds after closing were cut.", _CLOSE_TIMEOUT_S)

    async def _create_pool(self) -> asyncpg.Pool[asyncpg.Record]:
        init = self._pool_kwargs.get("init")

        async def prepare(connection: _Connection) -> None:
            for json_type in ("json", "jsonb"):
                await connection.set_type_codec(
                    json_type, schema="pg_catalog", encoder=self._encode_json, decoder=self._loads, format="text"
                )
            if init is not None:
                await init(connection)

        # asyncpg's own reset costs a round trip for each query; _execute resets where a session can have been changed.
        options = {"min_size": 1, "reset": _leave_as_is, **self._pool_kwargs, "init": prepare}
        with _translated():
            return await asyncpg.create_pool(self._dsn, **options)

    def _encode_json(self, value: Any) -> str:
        encoded = self._dumps(value)
        return encoded if isinstance(encoded, str) else encoded.decode()

    def get_sync_connector(self) -> BaseConnector:
        """
        Give a connector for synchronous use: this one once it is open, before that one on psycopg for the same database.

        Raises:
            SettingsError: the connection parameters have no equivalent in libpq.
        """
        if self._pool is not None:
            return self
        if self._sync_connector is None:
            self._sync_connector = SyncPsycopgConnector(**self._json_hooks, **_psycopg_pool_kwargs(self._dsn, self._pool_kwargs))
        return self._sync_connector

    # ------------------------------------------------------------ queries

    async def execute_query_async(self, query: LiteralString, **arguments: Any) -> None:
        """
        Run a statement and drop its result; without arguments *query* may be a script, run as one transaction.

        Raises:
            ConnectorException: the database refused or could not be reached; UniqueViolation when a unique index did.
            AppNotOpen: ``open_async`` has not been called.
        """
        is_script = not arguments
        with _translated():
            # CREATE INDEX and CREATE TRIGGER take no qualified name: a script finds its objects by the search_path.
            schema = self._schema if self._pool_is_foreign and not is_script else None
            statement = bind(query, arguments, dumps=self._dumps, schema=schema)

            async def run(connection: _Connection) -> None:
                await _again_if_stale(connection, lambda: connection.execute(statement.text, *statement.values))
                if is_script:
                    await connection.reset()

            await self._on_pool(run)

    async def execute_query_one_async(self, query: LiteralString, **arguments: Any) -> dict[str, Any]:
        """Run a statement for its first row. Raises what ``execute_query_async`` raises, and NoResult when there is no row."""
        return _first(await self._fetch(query, arguments))

    async def execute_query_all_async(self, query: LiteralString, **arguments: Any) -> list[dict[str, Any]]:
        """Run a statement for all its rows. Raises what ``execute_query_async`` raises."""
        return await self._fetch(query, arguments)

    async def execute_query_one_async_with_connection(
        self, connection: _Connection, query: LiteralString, **arguments: Any
    ) -> dict[str, Any]:
        """Like ``execute_query_one_async``, on the caller's connection and in the caller's transaction."""
        return _first(await self._fetch_on_callers(connection, query, arguments))

    async def execute_query_all_async_with_connection(
        self, connection: _Connection, query: LiteralString, **arguments: Any
    ) -> list[dict[str, Any]]:
        """Like ``execute_query_all_async``, on the caller's connection and in the caller's transaction."""
        return await self._fetch_on_callers(connection, query, arguments)

    async def _fetch(self, query: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        with _translated():
            if self._pool_is_foreign:
                return await self._on_pool(lambda connection: self._fetch_foreign(connection, query, arguments, is_pools=True))
            statement = bind(query, arguments, dumps=self._dumps)
            return await self._on_pool(lambda connection: _fetch_dicts(connection, statement))

    async def _on_pool(self, run: Callable[[_Connection], Awaitable[_Result]]) -> _Result:
        """Run on a connection of the pool; on another when the server has just cut this one, before anything was sent."""
        pool = self.pool
        for _ in range(pool.get_max_size()):
            async with pool.acquire() as connection:
                try:
                    return await run(connection)
                except asyncpg.InternalClientError as error:
                    # asyncpg's state between the server's goodbye and the end of the socket, when it refuses to send.
                    if "cannot switch to state" not in str(error):
                        raise
                    connection.terminate()
        async with pool.acquire() as connection:
            return await run(connection)

    async def _fetch_on_callers(self, connection: _Connection, query: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not isinstance(connection, asyncpg.Connection | PoolConnectionProxy):
            raise exceptions.ConnectorException(
                f"AsyncpgConnector needs an asyncpg connection, not a {type(connection).__module__}.{type(connection).__name__}."
            )
        with _translated():
            return await self._fetch_foreign(connection, query, arguments, is_pools=False)

    async def _fetch_foreign(
        self, connection: _Connection, query: str, arguments: Mapping[str, Any], *, is_pools: bool
    ) -> list[dict[str, Any]]:
        """Fetch on a connection whose codecs are unknown: what its owner left as JSON text is decoded here."""
        statement = bind(query, arguments, dumps=self._dumps, schema=self._schema)
        json_columns = await self._json_columns_of(connection, statement.text)
        raw = await self._raw_json_types(connection, is_pools=is_pools) if json_columns else frozenset[str]()
        rows = await _fetch_dicts(connection, statement)
        for column, json_type in json_columns.items():
            if json_type in raw:
                for row in rows:
                    row[column] = None if row[column] is None else self._loads(row[column])
        return rows

    async def _json_columns_of(self, connection: _Connection, text: str) -> dict[str, str]:
        """Tell which result columns of a statement are JSON, and of which type; asked once for each statement."""
        if text not in self._json_columns:
            prepared = await connection.prepare(text)
            self._json_columns[text] = {
                column.name: column.type.name for column in prepared.get_attributes() if column.type.name in {"json", "jsonb"}
            }
        return self._json_columns[text]

    async def _raw_json_types(self, connection: _Connection, *, is_pools: bool) -> frozenset[str]:
        """Tell which JSON types *connection* hands over undecoded; the connections of our pool are taken to be alike."""
        if is_pools and self._foreign_pool_raw_json is not None:
            return self._foreign_pool_raw_json
        sample = await connection.fetchrow("""SELECT '"x"'::json AS json, '"x"'::jsonb AS jsonb""")
        assert sample is not None  # a SELECT without FROM has one row
        raw = frozenset(json_type for json_type, value in sample.items() if value == '"x"')
        if is_pools:
            self._foreign_pool_raw_json = raw
        return raw

    # ------------------------------------------------------------ notifications

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        """
        Await *on_notification* for each notification, one after the other, until cancelled.

        A connection that is lost, cut by the server or silent is replaced, for ever; what is notified in between is lost, so poll
        as well. The LISTEN connection is extra to the pool, except on a pool given from outside to a connector without *dsn*,
        which has to spare one.

        Raises:
            ConnectorException: the first connection could not be made.
            AppNotOpen: the connector is not open, or was closed meanwhile.
            Exception: whatever *on_notification* raises.
        """
        wanted = tuple(channels)
        has_listened = False
        delay = _RECONNECT_DELAY_MIN_S
        while True:
            listener = _Listener(self._listen_connection(), wanted, keepalive_s=self._keepalive_s)
            try:
                await listener.open()
                has_listened = True
            except exceptions.ConnectorException as error:
                if not has_listened:
                    raise
                _logger.warning("LISTEN cannot be restored yet: %s", error.__cause__ or error)
            else:
                await listener.deliver(on_notification)
                _logger.warning("The LISTEN connection was lost; connecting again.")
            finally:
                await listener.close()
            delay = _RECONNECT_DELAY_MIN_S if listener.was_healthy else min(2 * delay, _RECONNECT_DELAY_MAX_S)
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))

    @asynccontextmanager
    async def _listen_connection(self) -> AsyncIterator[_Connection]:
        pool = self.pool
        if self._pool_is_foreign and self._dsn is None:
            async with pool.acquire() as connection:
                yield connection
            return
        options = {name: value for name, value in self._pool_kwargs.items() if name not in _POOL_ONLY}
        connect = self._pool_kwargs.get("connect") or asyncpg.connect
        own: asyncpg.Connection[asyncpg.Record] = await connect(self._dsn, **options)
        try:
            yield own
        finally:
            await _hang_up(own)


class _Listener:
    """
    One LISTEN connection from its opening to its loss.

    Attributes:
        was_healthy: a notification or an answer came through it.
    """

    def __init__(
        self, connecting: AbstractAsyncContextManager[_Connection], channels: tuple[str, ...], *, keepalive_s: float
    ) -> None:
        self.was_healthy = False
        self._connecting = connecting
        self._channels = channels
        self._keepalive_s = keepalive_s
        self._connection: _Connection | None = None
        # (channel, payload) as asyncpg hands them over, None when the connection ends.
        self._inbox: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()

    async def open(self) -> None:
        """
        Connect and LISTEN.

        Raises:
            ConnectorException: that failed.
        """
        with _translated():
            self._connection = await self._connecting.__aenter__()
            self._connection.add_termination_listener(self._note_end)
            for channel in self._channels:
                await self._connection.add_listener(channel, self._note)

    async def deliver(self, on_notification: Notify) -> None:
        """Hand over notifications until the connection is lost; raises only what *on_notification* raises."""
        while True:
            try:
                async with asyncio.timeout(self._keepalive_s):
                    item = await self._inbox.get()
            except TimeoutError:
                if await self._is_alive():
                    self.was_healthy = True
                    continue
                return
            if item is None:
                return
            self.was_healthy = True
            channel, payload = item
            await on_notification(channel=channel, payload=payload)

    async def close(self) -> None:
        """Give the connection back or hang up; never raises a database error, since whoever closes has nothing left to do."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            with _translated():
                connection.remove_termination_listener(self._note_end)
                # Needed where the connection goes back to a pool; bounded, since it may be half-open.
                async with asyncio.timeout(_HANG_UP_TIMEOUT_S):
                    for channel in self._channels:
                        await connection.remove_listener(channel, self._note)
        except exceptions.ConnectorException:
            with suppress(asyncpg.InterfaceError):  # a pool takes a lost connection back by itself
                connection.terminate()
        finally:
            with suppress(exceptions.ConnectorException), _translated():
                await self._connecting.__aexit__(None, None, None)

    async def _is_alive(self) -> bool:
        assert self._connection is not None
        try:
            with _translated():
                await self._connection.execute("SELECT 1", timeout=min(self._keepalive_s, _PING_TIMEOUT_S))
        except exceptions.ConnectorException:
            # Half-open: a polite goodbye would wait for an answer that never comes.
            self._connection.terminate()
            return False
        return True

    def _note(self, _connection: object, _pid: int, channel: str, payload: object) -> None:
        self._inbox.put_nowait((channel, str(payload)))

    def _note_end(self, _connection: object) -> None:
        self._inbox.put_nowait(None)


async def _hang_up(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    try:
        await connection.close(timeout=_HANG_UP_TIMEOUT_S)
    finally:
        connection.terminate()  # nothing to do when close() went well


# ---------------------------------------------------------------- running statements


async def _fetch_dicts(connection: _Connection, statement: Statement) -> list[dict[str, Any]]:
    records = await _again_if_stale(connection, lambda: connection.fetch(statement.text, *statement.values))
    return [dict(record) for record in records]


async def _again_if_stale(connection: _Connection, run: Callable[[], Awaitable[_Result]]) -> _Result:
    """Run a statement; once more, with empty caches, when it may have failed on what a migration replaced."""
    try:
        return await run()
    except _STALE:
        if connection.is_in_transaction():
            raise  # the caller's transaction is spoilt, and only its owner can start it again
        await connection.reload_schema_state()
        return await run()


def _first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        raise exceptions.NoResult
    return rows[0]


async def _leave_as_is(connection: _Connection) -> None:
    """Take the place of asyncpg's reset between two single statements; only an open transaction must not be passed on."""
    if connection.is_in_transaction():
        await connection.reset()


@contextmanager
def _translated() -> Iterator[None]:
    """Raise procrastinate's exceptions for asyncpg's, with the original as the cause."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        raise exceptions.UniqueViolation(
            constraint_name=error.constraint_name, queueing_lock=_violated_queueing_lock(error)
        ) from error
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,  # TimeoutError among them
        PlaceholderError,
    ) as error:
        raise exceptions.ConnectorException from error


def _violated_queueing_lock(error: asyncpg.UniqueViolationError) -> str | None:
    if error.constraint_name != QUEUEING_LOCK_CONSTRAINT:
        return None
    # "Key (queueing_lock)=(…) already exists.", in the server's language; absent where the role may not read the column.
    match = re.search(r"\(queueing_lock\)=\((.*)\)", error.detail or "", re.DOTALL)
    return match[1] if match else None


# ---------------------------------------------------------------- connection parameters


def _with_search_path(pool_kwargs: dict[str, Any], schema: str | None) -> dict[str, Any]:
    if schema is None:
        return pool_kwargs
    settings = dict(pool_kwargs.get("server_settings") or {})
    if "search_path" in settings:
        raise SettingsError("Give either a schema or a search_path in server_settings, not both.")
    return {**pool_kwargs, "server_settings": {**settings, "search_path": quote_identifier(schema)}}


def _psycopg_pool_kwargs(dsn: str | None, pool_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Put asyncpg's connection parameters into libpq's words, as psycopg_pool.ConnectionPool takes them."""
    parameters: dict[str, Any] = {}
    for ours, libpq in (("host", "host"), ("port", "port"), ("user", "user"), ("database", "dbname"), ("passfile", "passfile")):
        value = pool_kwargs.get(ours)
        if value is not None:
            parameters[libpq] = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if pool_kwargs.get("password") is not None:
        parameters["password"] = _text_only("password", pool_kwargs["password"])
    if pool_kwargs.get("ssl") is not None:
        ssl = pool_kwargs["ssl"]
        parameters["sslmode"] = {True: "verify-full", False: "disable"}[ssl] if isinstance(ssl, bool) else _text_only("ssl", ssl)
    settings: Mapping[str, str] = pool_kwargs.get("server_settings") or {}
    if settings:
        parameters["options"] = " ".join(f"-c {name}={_escape_option(value)}" for name, value in settings.items())
    sizes = {name: pool_kwargs[name] for name in ("min_size", "max_size") if name in pool_kwargs}
    return {"conninfo": dsn or "", "kwargs": parameters, "min_size": 1, **sizes}


def _text_only(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"For synchronous use before the connector is open, {name} must be text that libpq understands.")
    return value


def _escape_option(value: str) -> str:
    return re.sub(r"([\\\s])", r"\\\1", value)
