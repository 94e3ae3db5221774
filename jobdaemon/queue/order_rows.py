"""What stages read of an order, its images and its provider calls (ports.OrderReader)."""

from __future__ import annotations

import json

from jobdaemon import db
from jobdaemon.domain.artifact import Artifact
from jobdaemon.ports import ImageRow, OrderRow, ProviderCall
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
        if record is None:
            return None
        photo = None if record["beautified"] is None else json.loads(record["beautified"])
        return OrderRow(
            id=record["id"],
            plan=record["plan"],
            provider=record["provider"],
            source=record["source"],
            params=json.loads(record["params"]),
            priority=record["priority"],
            beautified=None
            if photo is None
            else Artifact(photo["key"], photo["sha256"], photo["size_bytes"], photo["media_type"]),
            has_ended=record["ended"],
        )

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

    async def open_call(self, job_id: int) -> ProviderCall | None:
        """See the port."""
        return await self._call("open_call", job_id)

    async def collectable_call(self, call_id: int) -> ProviderCall | None:
        """See the port."""
        return await self._call("collectable_call", call_id)

    async def unfinished_call(self, call_id: int) -> ProviderCall | None:
        """See the port."""
        return await self._call("unfinished_call", call_id)

    async def _call(self, statement: str, number: int) -> ProviderCall | None:
        async with self._reads.use() as connection:
            record = await connection.fetchrow(_ROWS[statement], number)
        if record is None:
            return None
        return ProviderCall(
            record["id"],
            record["external_task_id"],
            tuple(record["images"]),
            record["key_alias"],
            record["submitted_at"],
            is_key_known=record["is_key_known"],
        )
