"""What stages read of an order, its images and its provider calls (ports.OrderReader)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from jobdaemon import db
from jobdaemon.domain.artifact import Artifact
from jobdaemon.ports import Batch, ImageRow, OrderRow, ProviderCall
from jobdaemon.queue import sql

_ROWS = sql.load("order_rows.sql")


class OrderRows:
    """Implements :class:`jobdaemon.ports.OrderReader`; every method raises DatabaseUnavailableError when it is away."""

    def __init__(self, reads: db.Session) -> None:
        self._reads = reads

    async def load_order(self, order_id: int) -> OrderRow | None:
        """See the port."""
        async with self._reads.use() as connection:
            record = await connection.fetchrow(_ROWS["order"], order_id)
        return None if record is None else _order(record)

    async def load_images(self, order_id: int) -> list[ImageRow]:
        """See the port."""
        async with self._reads.use() as connection:
            records = await connection.fetch(_ROWS["images"], order_id)
        return [ImageRow(**record) for record in records]

    async def load_image(self, order_id: int, index: int) -> ImageRow | None:
        """See the port."""
        async with self._reads.use() as connection:
            record = await connection.fetchrow(_ROWS["image"], order_id, index)
        return None if record is None else ImageRow(**record)

    async def load_batch(self, order_id: int, job_id: int, images: Sequence[int]) -> Batch | None:
        """See the port."""
        async with self._reads.use() as connection:
            record = await connection.fetchrow(_ROWS["batch"], order_id, job_id, list(images))
        if record is None:
            return None
        call = None if record["call_id"] is None else _call(record, record["call_id"], record["call_images"])
        return Batch(_order(record), [ImageRow(**image) for image in json.loads(record["images"])], call)

    async def collectable_call(self, call_id: int) -> ProviderCall | None:
        """See the port."""
        return await self._call("collectable_call", call_id)

    async def unfinished_call(self, call_id: int) -> ProviderCall | None:
        """See the port."""
        return await self._call("unfinished_call", call_id)

    async def _call(self, statement: str, number: int) -> ProviderCall | None:
        async with self._reads.use() as connection:
            record = await connection.fetchrow(_ROWS[statement], number)
        return None if record is None else _call(record, record["id"], record["images"])


def _order(record: Any) -> OrderRow:
    photo = None if record["beautified"] is None else json.loads(record["beautified"])
    return OrderRow(
        id=record["id"],
        plan=record["plan"],
        provider=record["provider"],
        source=record["source"],
        params=json.loads(record["params"]),
        priority=record["priority"],
        beautified=None if photo is None else Artifact(photo["key"], photo["sha256"], photo["size_bytes"], photo["media_type"]),
        has_ended=record["ended"],
    )


def _call(record: Any, call_id: int, images: Iterable[int]) -> ProviderCall:
    return ProviderCall(
        call_id,
        record["external_task_id"],
        tuple(images),
        record["key_alias"],
        record["submitted_at"],
        is_key_known=record["is_key_known"],
    )
