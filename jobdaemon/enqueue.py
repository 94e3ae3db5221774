"""
The Python client: an order on the caller's own connection, in the caller's own transaction.

    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO purchases …")
        order = enqueue(connection, NewOrder(plan="Pro", source="https://…", key="purchase-17"))

The order and the caller's own rows commit together or not at all. A refusal aborts the transaction, as every error does in
Postgres: who wants to go on in it enqueues inside a savepoint (``connection.transaction()`` in both drivers). No driver is
imported: psycopg's and asyncpg's connections are told apart by what they can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from jobdaemon.domain.order import NewOrder
from jobdaemon.errors import RefusedError

# params travels as text: what a connection's own JSON codec would make of it depends on the caller.
_STATEMENT = """
SELECT order_id, created FROM jobdaemon.enqueue_order(plan => {0}::text, source => {1}::text, customer => {2}::text,
    key => {3}::text, prompts => {4}::text[], images => {5}::integer, provider => {6}::text, params => {7}::text::jsonb,
    at => {8}::timestamptz, "group" => {9}::text)
"""
_FOR_PSYCOPG = _STATEMENT.format(*["%s"] * 10)
_FOR_ASYNCPG = _STATEMENT.format(*[f"${number}" for number in range(1, 11)])


@dataclass(frozen=True, slots=True)
class EnqueuedOrder:
    """
    Attributes:
        created: False when the key was known: the order is the one that was made then.
    """

    order_id: int
    created: bool


class PsycopgConnection(Protocol):
    """``psycopg.Connection`` or ``psycopg.AsyncConnection``, with any row factory."""

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """A cursor."""
        ...


class AsyncpgConnection(Protocol):
    """``asyncpg.Connection``, or what a pool lends of one."""

    def fetchrow(self, *args: Any, **kwargs: Any) -> Any:
        """One row."""
        ...


def enqueue(connection: PsycopgConnection, order: NewOrder) -> EnqueuedOrder:
    """
    Enqueue *order* on a ``psycopg.Connection``; nothing is committed here unless the connection is in autocommit mode.

    Raises:
        RefusedError: JD001 to JD005, with the database's sentence.
    """
    with connection.cursor(row_factory=_tuples) as cursor:
        try:
            cursor.execute(_FOR_PSYCOPG, _values(order))
        except Exception as error:
            raise_refusal(error)
            raise
        return EnqueuedOrder(*cursor.fetchone())


async def enqueue_async(connection: AsyncpgConnection | PsycopgConnection, order: NewOrder) -> EnqueuedOrder:
    """
    Enqueue *order* on an ``asyncpg.Connection`` or a ``psycopg.AsyncConnection``; commits like :func:`enqueue`.

    Raises:
        RefusedError: JD001 to JD005, with the database's sentence.
    """
    try:
        if hasattr(connection, "fetchrow"):
            record = await connection.fetchrow(_FOR_ASYNCPG, *_values(order))
            return EnqueuedOrder(record["order_id"], record["created"])
        async with connection.cursor(row_factory=_tuples) as cursor:
            await cursor.execute(_FOR_PSYCOPG, _values(order))
            return EnqueuedOrder(*await cursor.fetchone())
    except Exception as error:
        raise_refusal(error)
        raise


def _tuples(_cursor: object) -> type[tuple[Any, ...]]:
    """The rows of psycopg's ``tuple_row``, whatever rows the caller's connection makes otherwise."""
    return tuple


def _values(order: NewOrder) -> list[Any]:
    prompts = None if order.prompts is None else list(order.prompts)
    return [
        order.plan,
        order.source,
        order.customer,
        order.key,
        prompts,
        order.images,
        order.provider,
        order.params_json(),
        order.at,
        order.group,
    ]


def raise_refusal(error: Exception) -> None:
    """
    Raises RefusedError where *error* is the database's refusal; else nothing.

    Both drivers' errors carry the SQLSTATE under the same name, and the sentence under two.
    """
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(sqlstate, str) and sqlstate.startswith("JD"):
        diagnostics = getattr(error, "diag", None)
        message = getattr(diagnostics, "message_primary", None) or getattr(error, "message", None) or str(error)
        raise RefusedError(message, sqlstate=sqlstate) from error
