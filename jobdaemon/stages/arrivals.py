"""
Images that arrived, on their way into the store and the database.

They are stored side by side, and whatever is stored at one moment is committed together; what is stored when nothing more is to
come goes with the attempt's end. A commit of its own for each would have all that wants to be committed wait for them in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from jobdaemon.domain.write import Write
from jobdaemon.ports import Attempt

#: How long a stored image waits for siblings that are being stored: less than anybody notices, more than a disk takes.
_GATHER_S = 0.05


class Arrivals:
    """
    An async context manager around what brings the images.

    What fails ends the attempt, at the latest with the block. However that ends, what is stored by then is noted: it is paid for.
    """

    def __init__(self, attempt: Attempt, with_last: Callable[[], tuple[Write, ...]] = tuple) -> None:
        """
        Args:
            with_last: what to commit with images after which none is being stored: the end of a call, if they were its last. An
                order may end with its last image, and nothing of it should be open then.
        """
        self._attempt = attempt
        self._with_last = with_last
        self._storing: set[asyncio.Future[Write]] = set()
        self._stored: list[Write] = []
        self._noting: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._end_takes_the_rest = False

    async def __aenter__(self) -> Self:
        return self

    def take(self, storing: Coroutine[Any, Any, Write]) -> None:
        """
        Start *storing* one image; its result says so to the database.

        Raises:
            What earlier ones raised: nothing more is to be asked for then.
        """
        task = asyncio.ensure_future(storing)
        self._storing.add(task)
        task.add_done_callback(self._on_stored)
        if self._error is not None:
            raise self._error

    async def all_noted(self) -> None:
        """Wait until those so far are stored and committed. Raises what went wrong."""
        self._end_takes_the_rest = False
        await self._settled()
        if self._error is not None:
            raise self._error

    async def rest(self) -> tuple[Write, ...]:
        """
        Wait until all are stored, since nothing more will come; raises what went wrong.

        Returns:
            What to commit with the attempt's end.
        """
        self._end_takes_the_rest = True
        await self._settled()
        if self._error is not None:
            raise self._error
        rest, self._stored = tuple(self._stored), []
        return rest

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for all of them, whatever else went wrong; an attempt that is cancelled gives up what is not stored yet."""
        self._end_takes_the_rest = False
        if kind is not None and not issubclass(kind, Exception):
            for task in self._storing:
                task.cancel()
        await self._settled()
        if kind is None and self._error is not None:
            raise self._error

    def _on_stored(self, task: asyncio.Future[Write]) -> None:
        self._storing.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._error = self._error or error
            return
        self._stored.append(task.result())
        self._note_soon()

    def _note_soon(self) -> None:
        if self._noting is None:
            self._noting = asyncio.get_running_loop().create_task(self._note())

    async def _note(self) -> None:
        try:
            while self._stored:
                if self._storing:
                    await asyncio.wait(self._storing, timeout=_GATHER_S)
                if self._end_takes_the_rest and not self._storing:
                    return
                writes, self._stored = tuple(self._stored), []
                if not self._storing:
                    writes += self._with_last()
                await self._attempt.checkpoint(*writes)
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for it
            self._error = self._error or error
        finally:
            self._noting = None

    async def _settled(self) -> None:
        """Until nothing is being stored, nor committed, nor left over that the end does not take."""
        while True:
            if self._stored and not self._end_takes_the_rest:
                self._note_soon()
            pending: set[asyncio.Future[Any]] = {*self._storing}
            if self._noting is not None:
                pending.add(self._noting)
            if not pending:
                return
            await asyncio.wait(pending)
