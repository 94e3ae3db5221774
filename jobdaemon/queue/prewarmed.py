"""The rows of prewarmed photos (ports.PrewarmedPhotos), and what keeps them: giving up what is old or too much."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta

from jobdaemon import db
from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.write import PhotoPrewarmed
from jobdaemon.errors import DatabaseUnavailableError, JobdaemonError
from jobdaemon.events import Events, UpkeepFailed
from jobdaemon.ports import ArtifactStore, Prewarmed
from jobdaemon.queue import sql

_PREWARMED = sql.load("prewarmed.sql")
_TRIM_LIMIT = 200
_TRIM_S = 60.0
_JITTER = 0.2


class PrewarmedRows:
    """Implements :class:`jobdaemon.ports.PrewarmedPhotos`; every method raises DatabaseUnavailableError when it is away."""

    def __init__(self, asks: db.Session, keeps: db.Session) -> None:
        """
        Args:
            asks: used by stages.
            keeps: used by upkeep.
        """
        self._asks = asks
        self._keeps = keeps

    async def find(self, photo: str, backend: str) -> Prewarmed | None:
        """See the port."""
        async with self._asks.use() as connection:
            record = await connection.fetchrow(_PREWARMED["find"], photo, backend)
        if record is None:
            return None
        return Prewarmed(
            record["id"],
            Artifact(record["artifact"], record["sha256"], record["bytes"], record["media_type"]),
            width=record["width"],
            height=record["height"],
            faces=record["faces"],
            unrestored=record["unrestored"],
            model=record["model"],
            device=record["device"],
        )

    async def announce(self, photo: PhotoPrewarmed) -> None:
        """See the port."""
        async with self._asks.use() as connection:
            await connection.execute(_PREWARMED["announce"], json.dumps(asdict(photo)))

    async def used(self, entry_id: int) -> None:
        """See the port."""
        async with self._asks.use() as connection:
            await connection.execute(_PREWARMED["used"], entry_id)

    async def forget(self, entry_id: int) -> None:
        """See the port."""
        async with self._asks.use() as connection:
            await connection.execute(_PREWARMED["forget"], entry_id)

    # Upkeep

    async def trim(self, ttl: timedelta, max_bytes: int, limit: int) -> int:
        """Give up what is older than *ttl*, then the oldest while there is more than *max_bytes*; says how many."""
        async with self._keeps.use() as connection:
            count: int = await connection.fetchval(_PREWARMED["trim"], ttl.total_seconds(), max_bytes, limit)
        return count

    async def dropped(self, after: int, limit: int) -> dict[int, str]:
        """What was given up and may lie in the store: ids, in their order and above *after*, and artifact keys."""
        async with self._keeps.use() as connection:
            records = await connection.fetch(_PREWARMED["dropped"], after, limit)
        return {record["id"]: record["artifact"] for record in records}

    async def remove(self, entry_ids: Iterable[int]) -> None:
        """These are out of the store."""
        async with self._keeps.use() as connection:
            await connection.execute(_PREWARMED["remove"], list(entry_ids))


class PrewarmedKeeper:
    """Upkeep of prewarmed photos that any number of daemons may do at once."""

    def __init__(
        self,
        rows: PrewarmedRows,
        store: ArtifactStore,
        events: Events,
        *,
        ttl: timedelta,
        max_bytes: int,
        every_s: float = _TRIM_S,
    ) -> None:
        """
        Args:
            ttl: neither a photo nor a prewarm that waits gets older.
            max_bytes: of all photos.
            every_s: how often to look.
        """
        self._rows = rows
        self._store = store
        self._events = events
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._every_s = every_s

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                await self.trim()
            except DatabaseUnavailableError:
                pass  # the heartbeat reports it
            except Exception as error:  # noqa: BLE001 - upkeep goes on
                self._events.emit(UpkeepFailed(error=f"{type(error).__name__}: {error}", chore="prewarmed"))
            await asyncio.sleep(self._every_s * (1 - _JITTER * random.random()))

    async def trim(self) -> None:
        """
        Give up what is old or too much, and delete the artifacts of what was given up.

        Raises:
            What the store raised last, once all others were tried.
        """
        while await self._rows.trim(self._ttl, self._max_bytes, _TRIM_LIMIT) >= _TRIM_LIMIT:
            pass
        last, failed = 0, None
        while dropped := await self._rows.dropped(last, _TRIM_LIMIT):
            gone = []
            for entry_id, artifact in dropped.items():
                try:
                    await self._store.delete(artifact)
                    gone.append(entry_id)
                except JobdaemonError as error:
                    failed = error
            await self._rows.remove(gone)
            last = max(dropped)
        if failed is not None:
            raise failed
