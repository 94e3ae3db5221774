"""Retention: orders that ended long ago are retired (their photos and jobs go), and later, if so wanted, their rows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta

from jobdaemon import db
from jobdaemon.domain.artifact import ARTIFACT_SCHEME, work_folder
from jobdaemon.errors import DatabaseUnavailableError, RowsLockedError, StoreRefusedError
from jobdaemon.events import Events, OrdersRemoved, OrdersRetired, UpkeepFailed
from jobdaemon.ports import ArtifactStore
from jobdaemon.queue import sql

_RETENTION = sql.load("retention.sql")
#: Orders and jobs at a time: some milliseconds of the upkeep connection, which rescues wait for.
_ORDERS = 50
_JOBS = 500
#: Between two looks while there is more to do, and when there was nothing left.
_BUSY_S = 0.5
_IDLE_S = 60.0
#: Between two walks through the jobs, which pass by all that are to stay.
_WALK_S = 3600.0
#: How long a source that nobody needs waits for an order, since somebody may have stored it a moment ago.
_SOURCES_WAIT = timedelta(days=1)
#: Sources at a time, and how long they may take: whoever is about to order one of them again waits (intake.py).
_SOURCES = 10
_DELETION_S = 20.0
_JITTER = 0.2


class RetentionRows:
    """The rows that retention looks at and writes; every method raises DatabaseUnavailableError when the database is away."""

    def __init__(self, keeps: db.Session) -> None:
        """
        Args:
            keeps: used by upkeep.
        """
        self._keeps = keeps

    async def retire(self, age: timedelta, limit: int) -> int:
        """Retire orders that ended *age* ago, the oldest first: nothing opens them again. Says how many."""
        return await self._count("retire", age.total_seconds(), limit)

    async def retired(self, after: int, limit: int) -> list[int]:
        """The next retired orders after this one, of which something may lie in the store."""
        async with self._keeps.use() as connection:
            return [record["id"] for record in await connection.fetch(_RETENTION["retired"], after, limit)]

    async def pruned(self, order_ids: Iterable[int]) -> None:
        """Of these nothing does any more."""
        async with self._keeps.use() as connection:
            await connection.execute(_RETENTION["pruned"], list(order_ids))

    async def prune_jobs(self, after: int, age: timedelta, limit: int) -> int | None:
        """Delete what may go of the next *limit* jobs after this id; the id to go on from, None at the end."""
        async with self._keeps.use() as connection:
            last_id: int | None = await connection.fetchval(_RETENTION["prune_jobs"], after, age.total_seconds(), limit)
        return last_id

    async def sources_to_delete(self, wait: timedelta, limit: int) -> list[str]:
        """Sources that have been idle for that long; they are the caller's to delete from the store, within minutes."""
        async with self._keeps.use() as connection:
            records = await connection.fetch(_RETENTION["sources_to_delete"], wait.total_seconds(), limit)
        return [record["source"] for record in records]

    async def sources_deleted(self, sources: Iterable[str]) -> None:
        """These are out of the store."""
        async with self._keeps.use() as connection:
            await connection.execute(_RETENTION["sources_deleted"], list(sources))

    async def sources_not_deleted(self, sources: Iterable[str]) -> None:
        """These are not, as far as is known: they are the last to be given out again."""
        async with self._keeps.use() as connection:
            await connection.execute(_RETENTION["sources_not_deleted"], list(sources))

    async def remove(self, age: timedelta, limit: int) -> int:
        """Remove the rows of retired orders that ended *age* ago; says how many."""
        return await self._count("remove", age.total_seconds(), limit)

    async def _count(self, name: str, *arguments: object) -> int:
        async with self._keeps.use() as connection:
            count: int = await connection.fetchval(_RETENTION[name], *arguments)
        return count


class Pruner:
    """Retention, in small steps that any number of daemons may do at once."""

    def __init__(
        self,
        rows: RetentionRows,
        store: ArtifactStore,
        events: Events,
        *,
        photos: timedelta | None,
        orders: timedelta | None,
        sources_wait: timedelta = _SOURCES_WAIT,
    ) -> None:
        """
        Args:
            photos: how long after its end an order is retired; None for never.
            orders: how long after its end its rows go; None for never.
            sources_wait: how long a source photo that nobody needs waits for an order.
        """
        self._rows = rows
        self._store = store
        self._events = events
        self._photos = photos
        self._orders = orders
        self._sources_wait = sources_wait
        #: Up to which retired order the store was cleared, as far as it let itself be.
        self._cleared_to = 0
        #: Where the walk through the jobs goes on; None when it is over.
        self._walked_to: int | None = None
        self._next_walk = 0.0

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            has_more = await self.look()
            await asyncio.sleep((_BUSY_S if has_more else _IDLE_S) * (1 - _JITTER * random.random()))

    async def look(self) -> bool:
        """Do a part of all that is due; says whether there is more of it. What fails is an event, and keeps nothing else back."""
        steps = (self._retire, self._clear_away, self._prune_jobs, self._delete_sources, self._remove)
        return any([await self._tried(step) for step in steps])

    async def _tried(self, step: Callable[[], Awaitable[bool]]) -> bool:
        """Whether *step* says that there is more to do."""
        try:
            return await step()
        except RowsLockedError as error:  # nobody else tells of it
            self._events.emit(UpkeepFailed(error=f"retention waits: {error}", chore="retention"))
        except DatabaseUnavailableError:
            pass  # the heartbeat reports it
        except Exception as error:  # noqa: BLE001 - upkeep goes on
            self._events.emit(UpkeepFailed(error=f"{type(error).__name__}: {error}", chore="retention"))
        return False

    async def _retire(self) -> bool:
        if self._photos is None:
            return False
        count = await self._rows.retire(self._photos, _ORDERS)
        if count:
            self._events.emit(OrdersRetired(count=count))
        return count == _ORDERS

    async def _clear_away(self) -> bool:
        order_ids = await self._rows.retired(self._cleared_to, _ORDERS)
        gone: list[int] = []
        refused: StoreRefusedError | None = None
        try:
            for order_id in order_ids:
                self._cleared_to = order_id  # whatever happens to it: those behind it come next
                try:
                    await self._store.delete_folder(work_folder(order_id))
                    gone.append(order_id)
                except StoreRefusedError as error:
                    refused = error  # a folder that somebody else owns keeps none of the others
        finally:
            await self._rows.pruned(gone)
        if len(order_ids) < _ORDERS:
            self._cleared_to = 0
        if refused is not None:
            raise refused
        return len(order_ids) == _ORDERS

    async def _prune_jobs(self) -> bool:
        if self._photos is None:
            return False
        now = asyncio.get_running_loop().time()
        if self._walked_to is None:
            if now < self._next_walk:
                return False
            self._walked_to = 0
            self._next_walk = now + _WALK_S
        self._walked_to = await self._rows.prune_jobs(self._walked_to, self._photos, _JOBS)
        return self._walked_to is not None

    async def _delete_sources(self) -> bool:
        sources = await self._rows.sources_to_delete(self._sources_wait, _SOURCES)
        left = list(sources)
        refused: StoreRefusedError | None = None
        try:
            async with asyncio.timeout(_DELETION_S):
                for source in sources:
                    try:
                        await self._store.delete(source.removeprefix(ARTIFACT_SCHEME))
                    except StoreRefusedError as error:
                        refused = error
                        continue
                    except asyncio.CancelledError:
                        # The store may still do it: nobody may store it anew until that is over, which takes it minutes at most.
                        left.remove(source)
                        raise
                    await self._rows.sources_deleted([source])
                    left.remove(source)
        finally:
            if left:
                await self._rows.sources_not_deleted(left)
        if refused is not None:
            raise refused
        return len(sources) == _SOURCES

    async def _remove(self) -> bool:
        if self._orders is None:
            return False
        count = await self._rows.remove(self._orders, _ORDERS)
        if count:
            self._events.emit(OrdersRemoved(count=count))
        return count == _ORDERS
