"""
asyncpg connections that come back.

A :class:`Session` is one connection with one user at a time. Whatever says that the connection is gone becomes
DatabaseUnavailableError, and the next use connects again: the daemon outlives its database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import asyncpg

from jobdaemon.errors import DatabaseUnavailableError, RowsLockedError

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

#: Errors after which a connection cannot be trusted. A timeout belongs here: on a half-open socket it is all one sees.
_LOST: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # between the server's goodbye and the end of the socket
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    # too many connections, disk full, out of memory, deadlock, I/O error: none is the statement's own fault
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.TransactionRollbackError,
    asyncpg.exceptions.PostgresSystemError,
    asyncpg.exceptions.InvalidAuthorizationSpecificationError,
    asyncpg.exceptions.InvalidCatalogNameError,
    # the old primary after a failover
    asyncpg.exceptions.ReadOnlySQLTransactionError,
)

#: ValueError: a URL that asyncpg cannot read.
_NOT_CONNECTED: tuple[type[BaseException], ...] = (*_LOST, asyncpg.PostgresError, ValueError)

#: Whatever the server's or the role's defaults are. A claim under REPEATABLE READ would count running jobs in an old snapshot;
#: what a process has locked that stands still within a transaction must not hold up the others for longer than its lease.
_PINNED = """
SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED;
SET idle_in_transaction_session_timeout = {idle_ms};
SET lock_timeout = {lock_ms};
"""


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """
    Attributes:
        url: as libpq takes it; holds the password, so it is not shown.
        connect_timeout: for the handshake.
        command_timeout: for any statement of ours: none takes long, so a silence means a dead connection.
        idle_in_transaction: after so long the server ends a session that says nothing within a transaction; the lease.
        use_statement_cache: off behind PgBouncer in transaction mode.
    """

    url: str
    connect_timeout: timedelta = timedelta(seconds=5)
    command_timeout: timedelta = timedelta(seconds=30)
    idle_in_transaction: timedelta = timedelta(seconds=15)
    use_statement_cache: bool = True

    def __repr__(self) -> str:
        return "DatabaseAddress(…)"


async def connect(
    address: DatabaseAddress, *, application_name: str = "jobdaemon", lock_timeout: timedelta = timedelta(0)
) -> Connection:
    """
    Args:
        lock_timeout: no statement waits longer for a lock; zero: as long as it may take.

    Raises:
        DatabaseUnavailableError: one sentence, without the password.
    """
    pinned = _PINNED.format(idle_ms=_milliseconds(address.idle_in_transaction), lock_ms=_milliseconds(lock_timeout))
    try:
        connection = await asyncpg.connect(
            address.url,
            timeout=address.connect_timeout.total_seconds(),
            command_timeout=address.command_timeout.total_seconds(),
            statement_cache_size=100 if address.use_statement_cache else 0,
            server_settings={"application_name": application_name},
        )
        try:
            await connection.execute(pinned)
        except BaseException:
            connection.terminate()  # nobody else knows of it
            raise
    except _NOT_CONNECTED as error:
        raise DatabaseUnavailableError(unavailable(error)) from error
    return connection


def _milliseconds(time: timedelta) -> int:
    return round(time.total_seconds() * 1000)


def unavailable(error: BaseException) -> str:
    """One sentence about a lost connection; of a URL that cannot be read it repeats nothing, since it may hold a password."""
    match error:
        case ValueError():
            return "The database's URL cannot be read: check database.url."
        case TimeoutError():
            reason = "it did not answer in time"
        case OSError(strerror=str() as strerror):
            reason = strerror
        case _:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"The database cannot be reached: {reason}"


class Session:
    """One connection, made when first used and again after it was lost; one user at a time."""

    def __init__(
        self,
        address: DatabaseAddress,
        *,
        name: str,
        on_connect: Callable[[Connection], Awaitable[None]] | None = None,
        lock_timeout: timedelta = timedelta(0),
    ) -> None:
        """
        Args:
            name: shown in ``pg_stat_activity``.
            lock_timeout: see :func:`connect`.
            on_connect: run on each new connection before anybody else uses it.
        """
        self._address = address
        self._name = name
        self._on_connect = on_connect
        self._lock_timeout = lock_timeout
        self._connection: Connection | None = None
        self._busy = asyncio.Lock()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Connection]:
        """
        The connection, alone.

        Raises:
            DatabaseUnavailableError: it could not be made, or was lost meanwhile; whether the last statement took effect
                is unknown.
            RowsLockedError: somebody held what the last statement needs; it had no effect.
        """
        async with self._busy:
            connection = await self._connected()
            try:
                yield connection
            except asyncpg.exceptions.LockNotAvailableError as error:
                raise RowsLockedError("somebody holds what has to be written") from error
            except _LOST as error:
                self._drop()
                raise DatabaseUnavailableError(unavailable(error)) from error
            except asyncio.CancelledError:
                # A statement may be under way: its protocol state is not worth guessing.
                self._drop()
                raise

    async def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        self._drop()
        connection = await connect(self._address, application_name=f"jobdaemon {self._name}", lock_timeout=self._lock_timeout)
        try:
            if self._on_connect is not None:
                await self._on_connect(connection)
        except _LOST as error:
            connection.terminate()
            raise DatabaseUnavailableError(unavailable(error)) from error
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def close(self) -> None:
        """Say goodbye to the server when it still listens."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=2)
            except _NOT_CONNECTED:
                connection.terminate()


def rows(records: list[asyncpg.Record]) -> list[dict[str, Any]]:
    """Records as plain dicts."""
    return [dict(record) for record in records]
