"""
Restores faces in a child process that may die: keeps one at work, and feeds it batches of whoever's crops wait.

A death (error of the device, out of memory, segfault, SIGKILL), a hang or nonsense costs the child and nothing else. It is
started again, at once the first time, then less and less often; what was in it is tried again by itself (see
:mod:`jobdaemon.backends.gfpgan.batching`). Whoever waits while there is no device to be had is put off, which spends no attempt:
another machine may have a sound one, and this one claims on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from jobdaemon.backends.gfpgan.batching import Crop, Waiting
from jobdaemon.backends.gfpgan.frames import SLOTS, Pixels
from jobdaemon.backends.gfpgan.process import (
    BatchFailedError,
    ChildDiedError,
    ChildGoneError,
    Loaded,
    NoDeviceMemoryError,
    RestorerProcess,
)
from jobdaemon.errors import DeviceFailedError, PutOffError

logger = logging.getLogger(__name__)

#: Less than a service manager waits for a start.
_LOAD_TIMEOUT_S = 80.0
#: Libraries may translate their kernels for a device that they do not know yet; torch.compile takes longer.
_WARM_UP_TIMEOUT_S, _COMPILE_TIMEOUT_S = 300.0, 900.0
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0
_LONGEST_MEMORY_REST_S = 10.0
#: A start takes some seconds: for so long crops wait for a device, then their attempts are put off.
_PATIENCE_S = 60.0
#: Characters of the reason that an order is given for its waiting.
_MAX_WHY = 300
#: Each time: a sixth of how long that has lasted. Another machine takes what is put off at once; here it would only be asked for,
#: and noted, again and again.
_PUT_OFF_S = (10.0, 60.0)


@dataclass(frozen=True, slots=True)
class RestorerRules:
    """
    Attributes:
        batch: most crops of a batch.
        max_wait: how long a crop waits for company while the device has nothing to do.
        timeout: a child that has a batch for longer hangs, and is killed.
        compiles: a child fuses the network before it is ready, which takes a minute or more.
    """

    batch: int
    max_wait: timedelta
    timeout: timedelta
    compiles: bool = False


class Restorer:
    """A child process at work, or on its way back."""

    def __init__(self, command: Sequence[str], rules: RestorerRules) -> None:
        """
        Args:
            command: starts the child.
        """
        self._command = command
        self._rules = rules
        self._waiting = Waiting(rules.batch, rules.max_wait.total_seconds())
        self._changed = asyncio.Event()
        #: By the child there is, or by the last one: the file may be another one at the next start.
        self.loaded: Loaded | None = None
        #: The child there is, be it loading or dying; and the one that can be given work.
        self._child: RestorerProcess | None = None
        self._life: RestorerProcess | None = None
        self._free_slots = list(range(SLOTS))
        self._copier = ThreadPoolExecutor(max_workers=SLOTS, thread_name_prefix="crops")
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaths = 0
        self._shortages = 0
        self._rest_until_s = 0.0
        #: Since when there has been nothing that could restore, None while there is; and why.
        self._down_since_s: float | None = None
        self._why_down = "the process that does it is starting"

    async def start(self) -> Loaded:
        """
        Start the first child, and say what it has loaded.

        It has warmed up then, so that a device on which nothing can be computed is found at once; unless that takes too long for
        a start to wait for, as compiling does.

        Raises:
            RefusedError: it cannot work with these settings on this machine.
            DeviceFailedError: it died over it, or hung before it had loaded anything.
        """
        started_s = self._down_since_s = asyncio.get_running_loop().time()
        try:
            self._child = await RestorerProcess.begin(self._command, batch=self._rules.batch)
            loaded = self.loaded = await self._child.loaded(timeout_s=_LOAD_TIMEOUT_S)
            if not self._rules.compiles:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(started_s + _LOAD_TIMEOUT_S):
                        await self._warmed_up(self._child)
        except (ChildDiedError, OSError) as error:
            raise DeviceFailedError(f"The process that restores faces does not start: {error}.") from error
        self._log("the face restorer has loaded", model=loaded.model, device=loaded.device)
        self._begin(self._keep_alive())
        self._begin(self._feed())
        return loaded

    async def restore(self, crops: Sequence[Pixels]) -> list[Pixels]:
        """
        Restore crops of one photo, in any company; each comes out the same whatever was beside it.

        Args:
            crops: (512, 512, 3) uint8 RGB each.

        Raises:
            DeviceFailedError: the child dies of one of them.
            PutOffError: there is no child, or no memory for one, and has not been for a while.
        """
        loop = asyncio.get_running_loop()
        mine = [Crop(pixels, loop.create_future(), loop.time()) for pixels in crops]
        self._waiting.add(mine)
        self._changed.set()
        try:
            return await asyncio.gather(*(crop.restored for crop in mine))
        finally:
            for crop in mine:  # of a photo that failed or was cancelled nobody wants the rest
                crop.restored.cancel()

    def require_device(self) -> None:
        """
        Say at once what :meth:`restore` would say in the end.

        Raises:
            PutOffError: there is nothing to restore with, and has not been for a while.
        """
        now = asyncio.get_running_loop().time()
        if self._is_given_up(now) and (self._life is None or now < self._rest_until_s):
            raise self._put_off(now)

    async def close(self) -> None:
        """End the child; what waits is put off."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._turn_away(PutOffError("No face was restored: the daemon stops.", retry_after=timedelta(seconds=_PUT_OFF_S[0])))
        if self._child is not None:
            await self._child.close()
        await asyncio.to_thread(self._copier.shutdown)

    # -- keeping a child at work -------------------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        while True:
            why = await self._live()
            self._go_down(why)
            self._log("the face restorer is gone", level=logging.ERROR, reason=why, rest_s=self._rest_s())
            if self._child is not None:
                await self._child.close()
                self._child = None
            await asyncio.sleep(self._rest_s())
            self._deaths += 1

    async def _live(self) -> str:
        """One child's life, from its start to its end; says what ended it."""
        try:
            if self._child is None:
                self._child = await RestorerProcess.begin(self._command, batch=self._rules.batch)
                self.loaded = await self._child.loaded(timeout_s=_LOAD_TIMEOUT_S)
            await self._warmed_up(self._child)
            self._log("the face restorer is ready", model=self.loaded and self.loaded.model)
            self._come_up(self._child)
            return await asyncio.shield(self._child.died)
        except Exception as error:  # noqa: BLE001 - whatever came of this one, the next is started
            return str(error)

    async def _warmed_up(self, child: RestorerProcess) -> None:
        await child.ready(timeout_s=_COMPILE_TIMEOUT_S if self._rules.compiles else _WARM_UP_TIMEOUT_S)

    def _rest_s(self) -> float:
        """Before the next start: none after the first death since something was restored."""
        return min(_FIRST_REST_S * 2.0 ** min(self._deaths - 1, 16), _LONGEST_REST_S) if self._deaths else 0.0

    def _come_up(self, life: RestorerProcess) -> None:
        self._life = life
        self._down_since_s = None
        self._changed.set()

    def _go_down(self, why: str) -> None:
        self._life = None
        self._mark_down(why)
        self._changed.set()

    def _mark_down(self, why: str) -> None:
        self._why_down = why.removesuffix(".")[:_MAX_WHY]
        if self._down_since_s is None:
            self._down_since_s = asyncio.get_running_loop().time()

    # -- feeding it --------------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            now = loop.time()
            life = self._life if now >= self._rest_until_s else None
            if life is not None and not life.is_alive:
                life = None
            if life is not None and self._free_slots and (batch := self._waiting.next_batch(now)):
                self._begin(self._run(life, self._free_slots.pop(), batch))
                continue
            if life is None and self._is_given_up(now):
                self._turn_away(self._put_off(now))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_again_s(now, is_up=life is not None)):
                    await self._changed.wait()

    def _look_again_s(self, now: float, *, is_up: bool) -> float | None:
        if is_up:
            return self._waiting.due_in(now)
        times = [self._rest_until_s]
        if self._down_since_s is not None:
            times.append(self._down_since_s + _PATIENCE_S)
        return min((time - now for time in times if time > now), default=None)

    def _is_given_up(self, now: float) -> bool:
        return self._down_since_s is not None and now - self._down_since_s >= _PATIENCE_S

    def _turn_away(self, error: PutOffError) -> None:
        for crop in self._waiting.take_all():
            self._fail(crop, error)

    def _put_off(self, now: float) -> PutOffError:
        lasted_s = now - (now if self._down_since_s is None else self._down_since_s)
        shortest_s, longest_s = _PUT_OFF_S
        retry_after = timedelta(seconds=min(max(lasted_s / 6, shortest_s), longest_s))
        told = f"No face was restored: there is nothing to restore faces with at the moment ({self._why_down})."
        return PutOffError(told, retry_after=retry_after)

    async def _run(self, life: RestorerProcess, slot: int, batch: list[Crop]) -> None:
        loop = asyncio.get_running_loop()
        shared = life.frames.slot(slot, len(batch))
        try:
            await loop.run_in_executor(self._copier, _lay_out, shared, batch)
            failed = await life.restore(slot, len(batch), timeout_s=self._rules.timeout.total_seconds())
            restored = await loop.run_in_executor(self._copier, shared.copy)
        except ChildGoneError:
            self._waiting.put_back(batch)
        except asyncio.CancelledError:
            self._waiting.put_back(batch)
            raise
        except (ChildDiedError, BatchFailedError) as error:
            self._suspect(batch, str(error))
        except NoDeviceMemoryError as error:
            self._waiting.put_back(batch)
            self._rest_for_memory(str(error))
        except Exception as error:  # noqa: BLE001 - its photos fail, nobody waits for ever
            for crop in batch:
                self._fail(crop, error)
        else:
            self._deaths = self._shortages = 0
            self._down_since_s = None
            for place, (crop, pixels) in enumerate(zip(batch, restored, strict=True)):
                if crop.is_wanted and place not in failed.places:
                    crop.restored.set_result(pixels)
            self._suspect([batch[place] for place in failed.places], failed.reason)
        finally:
            self._free_slots.append(slot)
            self._waiting.ended()
            self._changed.set()

    def _rest_for_memory(self, why: str) -> None:
        """Somebody else has the device's memory: that is no photo's fault, and passes."""
        self._mark_down(why)
        rest_s = min(0.5 * 2.0**self._shortages, _LONGEST_MEMORY_REST_S)
        self._shortages += 1
        self._rest_until_s = asyncio.get_running_loop().time() + rest_s
        self._log("the device has no memory", level=logging.WARNING, reason=why, rest_s=rest_s)

    def _suspect(self, crops: list[Crop], why: str) -> None:
        """They are tried again, each by itself; those that failed so before are given up."""
        for crop in self._waiting.died(crops):
            self._fail(crop, DeviceFailedError(f"The face could not be restored: {why}."))

    def _fail(self, crop: Crop, error: Exception) -> None:
        if crop.is_wanted:
            crop.restored.set_exception(error)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _log(self, words: str, *, level: int = logging.INFO, **fields: object) -> None:
        logger.log(level, words, extra={"child": None if self._child is None else self._child.pid, **fields})


def _lay_out(slot: Pixels, batch: Sequence[Crop]) -> None:
    for place, crop in zip(slot, batch, strict=True):
        place[:] = crop.pixels
