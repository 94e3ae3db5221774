"""The rows of the cache (ports.ImageCache), and what keeps them: copying what was stored, giving up what is old or too much."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from jobdaemon import db
from jobdaemon.errors import ArtifactMissingError, DatabaseUnavailableError, JobdaemonError, UnsupportedImageError
from jobdaemon.events import Events, UpkeepFailed
from jobdaemon.ports import ArtifactStore, CachedImage, Taken
from jobdaemon.queue import sql
from jobdaemon.spool import Spool

_CACHE = sql.load("cache.sql")
_COPY_LIMIT = 8
#: A copier that is silent for longer has died; the copy is made again. No copy may take longer.
_COPY_S = 240.0
_TRIM_LIMIT = 200
#: How often the whole is looked at: it is counted row by row.
_TRIM_S = 60.0
_JITTER = 0.2


class CacheRows:
    """Implements :class:`jobdaemon.ports.ImageCache`; every method raises DatabaseUnavailableError when it is away."""

    def __init__(self, asks: db.Session, keeps: db.Session) -> None:
        """
        Args:
            asks: used by stages.
            keeps: used by upkeep.
        """
        self._asks = asks
        self._keeps = keeps

    async def take(
        self, provider: str, key: str | None, order_id: int, images: Mapping[int, str], *, hold: timedelta, ttl: timedelta
    ) -> Taken:
        """See the port."""
        async with self._asks.use() as connection:
            records = await connection.fetch(
                _CACHE["take"],
                provider,
                key,
                order_id,
                list(images),
                list(images.values()),
                hold.total_seconds(),
                ttl.total_seconds(),
            )
        waits = [record["wait_s"] for record in records if record["state"] == "busy"]
        return Taken(
            hits={
                record["image"]: CachedImage(record["id"], record["artifact"], record["sha256"], record["media_type"])
                for record in records
                if record["state"] == "hit"
            },
            claimed=frozenset(record["image"] for record in records if record["state"] == "claimed"),
            ask_again_in=timedelta(seconds=max(waits)) if waits else None,
        )

    async def release(self, order_id: int, images: Iterable[int]) -> None:
        """See the port."""
        async with self._asks.use() as connection:
            await connection.execute(_CACHE["release"], order_id, sorted(images))

    async def forget(self, entry_id: int) -> None:
        """See the port."""
        async with self._asks.use() as connection:
            await connection.execute(_CACHE["forget"], entry_id)

    # Upkeep

    async def begin_copies(self, limit: int, seconds: float) -> list[Copy]:
        """Stored images that have no copy yet; they are this caller's to copy for so many *seconds*."""
        async with self._keeps.use() as connection:
            records = await connection.fetch(_CACHE["begin_copies"], limit, seconds)
        return [Copy(**record) for record in records]

    async def end_copy(self, entry_id: int) -> None:
        """The copy is in the store: the cache gives that one from now on."""
        async with self._keeps.use() as connection:
            await connection.execute(_CACHE["end_copy"], entry_id)

    async def drop(self, entry_id: int) -> None:
        """What was to be copied is not there, or not what was stored."""
        async with self._keeps.use() as connection:
            await connection.execute(_CACHE["drop"], entry_id)

    async def trim(self, ttl: timedelta, max_bytes: int, limit: int) -> int:
        """Give up what is older than *ttl*, and what was not asked for the longest while there is more than *max_bytes*."""
        async with self._keeps.use() as connection:
            count: int = await connection.fetchval(_CACHE["trim"], ttl.total_seconds(), max_bytes, limit)
        return count

    async def dropped(self, after: int, limit: int) -> dict[int, str | None]:
        """What was given up and lies in the store: id and artifact key."""
        async with self._keeps.use() as connection:
            records = await connection.fetch(_CACHE["dropped"], after, limit)
        return {record["id"]: record["artifact"] for record in records}

    async def remove(self, entry_ids: Iterable[int]) -> None:
        """These are out of the store."""
        async with self._keeps.use() as connection:
            await connection.execute(_CACHE["remove"], list(entry_ids))

    async def is_empty(self) -> bool:
        """Whether nothing is kept."""
        async with self._keeps.use() as connection:
            return bool(await connection.fetchval(_CACHE["is_empty"]))


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy to be made, from the key *source* to the key *artifact*; *id* is its row's."""

    id: int
    source: str
    artifact: str
    sha256: str
    media_type: str


class CacheKeeper:
    """
    Upkeep of the cache that any number of daemons may do at once.

    No customer waits for it: an image is stored without the cache, and its copy is made afterwards.
    """

    def __init__(
        self,
        rows: CacheRows,
        store: ArtifactStore,
        events: Events,
        *,
        is_on: bool,
        ttl: timedelta,
        max_bytes: int,
        max_image_bytes: int,
        poll: timedelta,
        spool: Callable[[], Spool] = Spool,
    ) -> None:
        """
        Args:
            spool: makes an empty one, for an image on its way.
            is_on: whether any provider's images are cached; when not, what is left from before goes by its age, and one look says
                that nothing is.
        """
        self._rows = rows
        self._store = store
        self._events = events
        self._is_on = is_on
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._max_image_bytes = max_image_bytes
        self._poll_s = poll.total_seconds()
        self._new_spool = spool

    async def run(self) -> None:
        """Go on until cancelled, or until there is nothing left to keep."""
        loop = asyncio.get_running_loop()
        next_trim = loop.time()
        while True:
            try:
                if not self._is_on and await self._rows.is_empty():
                    return
                if self._is_on:
                    await self.copy()
                if loop.time() >= next_trim:
                    next_trim = loop.time() + _TRIM_S
                    await self.trim()
            except DatabaseUnavailableError:
                pass  # the heartbeat reports it
            except Exception as error:  # noqa: BLE001 - upkeep goes on
                self._events.emit(UpkeepFailed(error=f"{type(error).__name__}: {error}", chore="cache"))
            await asyncio.sleep(self._poll_s * (1 - _JITTER * random.random()))

    async def copy(self) -> None:
        """Copy what was stored since the last look."""
        copies = await self._rows.begin_copies(_COPY_LIMIT, _COPY_S)
        while copies:
            for copy in copies:
                # Half of the time that is ours, all of them together, so that nobody else is at it meanwhile.
                async with asyncio.timeout(_COPY_S / 2 / _COPY_LIMIT):
                    await self._copy_one(copy)
            copies = await self._rows.begin_copies(_COPY_LIMIT, _COPY_S) if len(copies) == _COPY_LIMIT else []

    async def _copy_one(self, copy: Copy) -> None:
        spool = self._new_spool()
        try:
            await self._store.get_to_file(copy.source, spool, max_bytes=self._max_image_bytes)
        except (ArtifactMissingError, UnsupportedImageError):
            await self._rows.drop(copy.id)
            return
        if spool.sha256 != copy.sha256:
            await self._rows.drop(copy.id)
            return
        await self._store.put_file(copy.artifact, spool, copy.media_type)
        await self._rows.end_copy(copy.id)

    async def trim(self) -> None:
        """Give up what is old or too much, and delete the copies of what was given up: by us, or by an operator."""
        while await self._rows.trim(self._ttl, self._max_bytes, _TRIM_LIMIT) >= _TRIM_LIMIT:
            pass
        last, failed = 0, None
        while dropped := await self._rows.dropped(last, _TRIM_LIMIT):
            gone = []
            for entry_id, artifact in dropped.items():
                try:
                    if artifact is not None:
                        await self._store.delete(artifact)
                    gone.append(entry_id)
                except JobdaemonError as error:
                    failed = error
            await self._rows.remove(gone)
            last = max(dropped)
        if failed is not None:
            raise failed
