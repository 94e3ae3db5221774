"""The rows of photos that lie at a service (ports.UploadedPhotos), and what deletes them there once their order has ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

from jobdaemon import db
from jobdaemon.domain.artifact import order_of
from jobdaemon.errors import DatabaseUnavailableError, JobdaemonError
from jobdaemon.events import Events, PhotoLeft, UpkeepFailed
from jobdaemon.queue import sql
from jobdaemon.queue.writes import storable

_LINKS = sql.load("photo_links.sql")
_JITTER = 0.2


@dataclass(frozen=True, slots=True)
class DeletionRules:
    """
    How often a deletion is tried.

    Attributes:
        tries: the most; by default over some two days.
        rest: after the first one that failed, then four times as long each time.
        longest_rest: but no longer than this.
    """

    tries: int = 13
    rest: timedelta = timedelta(seconds=10)
    longest_rest: timedelta = timedelta(hours=6)


@dataclass(frozen=True, slots=True)
class LeftLink:
    """A link to delete, for the *tries*-th time; *id* is its row's."""

    id: int
    order_id: int
    link: str
    tries: int


class PhotoLinkRows:
    """Implements :class:`jobdaemon.ports.UploadedPhotos`; every method raises DatabaseUnavailableError when it is away."""

    def __init__(self, asks: db.Session, keeps: db.Session) -> None:
        """
        Args:
            asks: used by stages.
            keeps: used by upkeep.
        """
        self._asks = asks
        self._keeps = keeps

    async def find(self, photo: str, *, max_age: timedelta) -> str | None:
        """See the port."""
        async with self._asks.use() as connection:
            link: str | None = await connection.fetchval(_LINKS["find"], photo, max_age.total_seconds())
        return link

    async def note(self, photo: str, link: str) -> None:
        """See the port."""
        async with self._asks.use() as connection:
            await connection.execute(_LINKS["note"], order_of(photo), photo, link)

    async def forget(self, photo: str) -> bool:
        """See the port."""
        async with self._asks.use() as connection:
            records = await connection.fetch(_LINKS["forget"], photo)
        return not records or any(record["given"] > 1 for record in records)

    # Upkeep

    async def begin_deletions(self, limit: int, rules: DeletionRules) -> list[LeftLink]:
        """Links that no open order has: the caller's to delete, until the next try is due."""
        async with self._keeps.use() as connection:
            rest_s, longest_s = rules.rest.total_seconds(), rules.longest_rest.total_seconds()
            records = await connection.fetch(_LINKS["begin"], limit, rules.tries, rest_s, longest_s)
        return [LeftLink(**record) for record in records]

    async def end_deletion(self, link: str) -> None:
        """It is gone."""
        async with self._keeps.use() as connection:
            await connection.execute(_LINKS["end"], link)

    async def deletion_failed(self, entry_id: int, error: str) -> None:
        """It may still be there."""
        async with self._keeps.use() as connection:
            await connection.execute(_LINKS["failed"], entry_id, storable(error))


class PhotoLinkKeeper:
    """
    Deletes the photos of orders that have ended, which any number of daemons may do at once. No order waits for it.

    A link that cannot be deleted in all tries is said, and its row stays for the operator.
    """

    def __init__(
        self,
        rows: PhotoLinkRows,
        delete: Callable[[str], Awaitable[None]],
        events: Events,
        *,
        poll: timedelta,
        rules: DeletionRules | None = None,
    ) -> None:
        """
        Args:
            delete: removes what a link gives from its service; that it is gone already is a success.
            poll: how often to look.
        """
        self._rows = rows
        self._delete = delete
        self._events = events
        self._poll_s = poll.total_seconds()
        self._rules = rules or DeletionRules()

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                await self.sweep()
            except DatabaseUnavailableError:
                pass  # the heartbeat reports it
            except Exception as error:  # noqa: BLE001 - upkeep goes on
                self._events.emit(UpkeepFailed(error=f"{type(error).__name__}: {error}", chore="photo links"))
            await asyncio.sleep(self._poll_s * (1 - _JITTER * random.random()))

    async def sweep(self) -> None:
        """
        Try to delete what is due, one after another, up to the first that fails: where the service is away the others would
        only spend a try each.
        """
        # One at a time: what waited here behind slow answers would be due again.
        while left := await self._rows.begin_deletions(1, self._rules):
            if not await self._try(left[0]):
                return

    async def _try(self, left: LeftLink) -> bool:
        """Whether it is gone."""
        try:
            await self._delete(left.link)
        except DatabaseUnavailableError:
            raise
        except JobdaemonError as error:
            await self._rows.deletion_failed(left.id, str(error))
            if left.tries >= self._rules.tries:
                self._events.emit(PhotoLeft(order_id=left.order_id, tries=left.tries, error=str(error)))
            return False
        await self._rows.end_deletion(left.link)
        return True
