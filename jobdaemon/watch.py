"""Watching orders: LISTEN for their changes, and a slow poll below it, since a notification may be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from jobdaemon.db import Connection, DatabaseAddress, Session, rows
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import EnqueuedOrder, enqueue_async, raise_refusal

ORDERS_CHANNEL = "jobdaemon_orders"


class OrderDesk:
    """Enqueues orders and follows them, on one connection of its own."""

    def __init__(self, address: DatabaseAddress) -> None:
        self._session = Session(address, name="orders", on_connect=self._listen)
        self._changed = asyncio.Event()

    async def _listen(self, connection: Connection) -> None:
        await connection.add_listener(ORDERS_CHANNEL, lambda *_: self._changed.set())
        self._changed.set()

    async def enqueue(self, order: NewOrder) -> EnqueuedOrder:
        """
        Enqueue one order.

        Raises:
            RefusedError: the door said no.
            DatabaseUnavailableError: whether it was enqueued is unknown; with a key, enqueueing again is safe.
        """
        async with self._session.use() as connection:
            return await enqueue_async(connection, order)

    async def hold_source(self, source: str) -> bool:
        """Keep a source for a day until it is ordered, whatever became of it before; False while it is being deleted."""
        async with self._session.use() as connection:
            return bool(await connection.fetchval("SELECT jobdaemon.hold_source($1)", source))

    async def redrive(self, order_id: int) -> int:
        """
        Give the dead letters of an order new attempts; returns how many jobs that were.

        Raises:
            RefusedError: it was cancelled, or retired.
        """
        async with self._session.use() as connection:
            try:
                count: int = await connection.fetchval("SELECT jobdaemon.redrive(order_id => $1)", order_id)
            except Exception as error:
                raise_refusal(error)
                raise
            return count

    async def progress(self, order_ids: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The row of ``order_progress`` for each of these orders, and why it failed if it did."""
        async with self._session.use() as connection:
            records = await connection.fetch(
                "SELECT p.*, o.error FROM jobdaemon.order_progress p JOIN jobdaemon.orders o ON o.id = p.order_id"
                " WHERE p.order_id = ANY ($1::bigint[])",
                list(order_ids),
            )
        return {row["order_id"]: row for row in rows(records)}

    async def images(self, order_id: int) -> list[dict[str, Any]]:
        """The images of one order, by index, with the columns people see."""
        async with self._session.use() as connection:
            return rows(
                await connection.fetch(
                    "SELECT index, prompt, status, url, object_key, sha256, bytes, width, height, error, media_type"
                    " FROM jobdaemon.order_images WHERE order_id = $1 ORDER BY index",
                    order_id,
                )
            )

    async def changed(self, *, at_most: timedelta) -> None:
        """Return when an order (any order) may have changed, or after *at_most*."""
        try:
            async with asyncio.timeout(at_most.total_seconds()):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def close(self) -> None:
        """Close the connection."""
        await self._session.close()
