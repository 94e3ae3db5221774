"""One life of the child process: start it, give it batches, know at once when it is dead, hung or talks nonsense."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jobdaemon.backends.gfpgan.frames import MAX_MESSAGE_BYTES, Frames, open_memory
from jobdaemon.errors import SettingsError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def child_command() -> list[str]:
    """What starts a child, from where this process has its own modules: not from the current folder, unless it has."""
    # -m alone looks there first: for another version of this package, or for a torch.py that somebody laid into /tmp.
    is_safe = str(Path.cwd()) not in sys.path and "" not in sys.path
    return [sys.executable, *(["-P"] if is_safe else []), "-m", "jobdaemon.backends.gfpgan.child"]


#: What the child writes goes into the daemon's log: so many characters of a line, so many lines in a life.
_MAX_LINE = 1_000
_MAX_LINES = 500
#: An idle child ends by itself when its channel closes; a busy one or a stuck one is killed after that.
_CLOSE_S = 3.0
#: A process that the driver holds may take its time even to be killed; nobody waits for it for longer.
_REAP_S = 10.0


class ChildDiedError(Exception):
    """The child is gone, or was killed because it hung or talked nonsense; the text says what happened."""


class ChildGoneError(ChildDiedError):
    """It was dead before it could get the batch: no crop of it has anything to do with that."""


class BatchFailedError(Exception):
    """The network made nothing of a batch, because of one of its crops; the child goes on."""


class NoDeviceMemoryError(Exception):
    """The device had no memory for a batch, not even crop by crop; the child goes on."""


class RefusedError(SettingsError):
    """
    The child cannot work with these settings on this machine.

    Attributes:
        lacks_device: no torch, or no such device.
    """

    def __init__(self, message: str, *, lacks_device: bool) -> None:
        super().__init__(message)
        self.lacks_device = lacks_device


@dataclass(frozen=True, slots=True)
class Loaded:
    """
    What the child has loaded.

    Attributes:
        model: name and version of the weights.
        device: where they are.
    """

    model: str
    device: str


@dataclass(frozen=True, slots=True)
class Failed:
    """
    What did not come out of a batch whose other crops did.

    Attributes:
        places: in the batch.
        reason: of one of them, for people.
    """

    places: frozenset[int]
    reason: str


class RestorerProcess:
    """A child at work, from :meth:`begin` to its death."""

    def __init__(self, process: asyncio.subprocess.Process, channel: asyncio.StreamWriter, frames: Frames) -> None:
        """Use :meth:`begin`."""
        loop = asyncio.get_running_loop()
        self.frames = frames
        self._process = process
        self._channel = channel
        self._loaded: asyncio.Future[Loaded] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._answers: dict[int, asyncio.Future[Failed]] = {}
        self._requests = 0
        self._last_line = ""
        #: What it said it dies of.
        self._broken: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._why: str | None = None
        #: Done with the reason once the process is dead.
        self.died: asyncio.Future[str] = loop.create_future()

    @classmethod
    async def begin(cls, command: Sequence[str], *, batch: int) -> RestorerProcess:
        """
        Start a child.

        The process that forks must be the thread of the event loop: the kernel ends the child with the thread that made it.

        Args:
            command: the program and its arguments, but for what is about this process.
            batch: crops in a slot.
        """
        ours, theirs = socket.socketpair()
        memory = open_memory(batch=batch)
        try:
            frames = Frames(memory, batch=batch)
            handed = {"--channel": theirs.fileno(), "--memory": memory, "--parent": os.getpid(), "--batch": batch}
            process = await asyncio.create_subprocess_exec(
                *command,
                *(str(part) for pair in handed.items() for part in pair),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(), memory),
                start_new_session=True,  # Ctrl-C in the daemon's terminal is for the daemon
                env=_environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        try:
            reader, channel = await asyncio.open_connection(sock=ours, limit=MAX_MESSAGE_BYTES)
        except BaseException:
            ours.close()
            process.kill()
            raise
        life = cls(process, channel, frames)
        life._tasks = [asyncio.create_task(life._listen(reader)), asyncio.create_task(life._log_output())]
        life._tasks.append(asyncio.create_task(life._bury()))
        return life

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether nothing is known against it."""
        return self._why is None

    async def loaded(self, *, timeout_s: float) -> Loaded:
        """
        What it has loaded.

        Raises:
            RefusedError: it says that it cannot.
            ChildDiedError: it died, or did not load in time.
        """
        return await self._within(timeout_s, self._loaded, "loading the weights")

    async def ready(self, *, timeout_s: float) -> None:
        """Wait until it has warmed up; raises as :meth:`loaded`."""
        await self._within(timeout_s, self._ready, "warming up")

    async def restore(self, slot: int, count: int, *, timeout_s: float) -> Failed:
        """
        Have the first *count* crops of *slot* restored in place; returns those that were not, none as a rule.

        Args:
            timeout_s: for this batch; one that was sent before has its time too.

        Raises:
            NoDeviceMemoryError: the device has none now.
            BatchFailedError: the network made nothing of it, nobody knows for which of them.
            ChildDiedError: it died of this or of something else, or gave no answer in time.
            ChildGoneError: it was dead before.
        """
        if self._why is not None:
            raise ChildGoneError(self._why)
        self._requests += 1
        number = self._requests
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._channel.write(json.dumps({"number": number, "slot": slot, "count": count}).encode() + b"\n")
        try:
            return await self._within(timeout_s * len(self._answers), answer, "restoring faces")
        finally:
            self._answers.pop(number, None)

    async def close(self) -> None:
        """End it, and wait until it is gone."""
        self._why = self._why or "it was no longer needed"
        self._channel.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.shield(self.died)
        except TimeoutError:
            self.kill("it did not end by itself")
        with suppress(TimeoutError):
            async with asyncio.timeout(_REAP_S):
                await asyncio.shield(self.died)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(OSError):
            await self._channel.wait_closed()
        self.frames.close()

    def kill(self, why: str) -> None:
        """End it now; whoever waits for an answer hears *why*."""
        self._fail(why)
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def _within(self, timeout_s: float, answer: asyncio.Future[_T], doing: str) -> _T:
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            self.kill(f"it gave no answer for {timeout_s:g} s while {doing}")
            return await answer

    def _fail(self, why: str) -> None:
        self._why = self._why or why
        futures: list[asyncio.Future[Any]] = [self._loaded, self._ready, *self._answers.values()]
        for future in futures:
            if not future.done():
                future.set_exception(ChildDiedError(self._why))
                future.exception()  # nobody need wait for it

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while (line := await reader.readline()).endswith(b"\n"):  # half a line is all that came of it before it died
                self._hear(json.loads(line))
        except (ValueError, KeyError, TypeError, asyncio.InvalidStateError) as error:
            self.kill(f"it talked nonsense ({type(error).__name__})")
        except OSError:
            pass  # it died with the channel full
        # Closed: a process that can say nothing more is of no use, dead or not.
        if self._why is None:
            await self._a_moment_to_die()
            self.kill("it closed its channel")

    async def _a_moment_to_die(self) -> None:
        """The channel of a dying process closes before it is dead: so that its end is told, not that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.shield(self.died)

    def _hear(self, message: dict[str, Any]) -> None:
        match message["told"]:
            case "loaded":
                self._loaded.set_result(Loaded(str(message["model"]), str(message["device"])))
            case "refused":
                self._why = str(message["reason"])
                self._loaded.set_exception(RefusedError(self._why, lacks_device=bool(message["lacks_device"])))
            case "ready":
                self._ready.set_result(None)
            case "broken":
                self._broken = str(message["reason"]).removesuffix(".")
            case "restored":
                failed = Failed(frozenset(map(int, message["failed"])), str(message["reason"]).removesuffix("."))
                self._answers.pop(message["number"]).set_result(failed)
            case "no_memory":
                self._answers.pop(message["number"]).set_exception(NoDeviceMemoryError(str(message["reason"])))
            case "failed":
                self._answers.pop(message["number"]).set_exception(BatchFailedError(str(message["reason"]).removesuffix(".")))
            case _:
                raise ValueError("unknown message")

    async def _bury(self) -> None:
        code = await self._process.wait()
        with suppress(TimeoutError):  # its last words; a grandchild may hold the pipe open
            async with asyncio.timeout(1):
                await asyncio.shield(self._tasks[1])
        self._fail(f"it died ({self._broken or _end(code, self._last_line)})")
        if not self.died.done():
            self.died.set_result(self._why or "")

    async def _log_output(self) -> None:
        """Its standard output and error, line by line, bounded."""
        assert self._process.stdout is not None
        rest, lines = b"", 0
        while chunk := await self._process.stdout.read(8192):
            *whole, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_LINE:
                whole.append(rest)
                rest = b""
            for line in whole:
                lines += 1
                self._log_line(line, lines)
        if rest:
            self._log_line(rest, lines + 1)

    def _log_line(self, line: bytes, number: int) -> None:
        text = line[:_MAX_LINE].decode(errors="replace").rstrip()
        if not text:
            return
        self._last_line = text[:200]
        if text.strip().startswith("what():"):  # the error of which a library in C++ dies by SIGABRT
            self._broken = text.strip().removeprefix("what():").strip()[:200]
        if number <= _MAX_LINES:
            logger.warning("the face restorer says", extra={"line": text, "child": self.pid})
        elif number == _MAX_LINES + 1:
            logger.warning("the face restorer says more than is logged", extra={"child": self.pid})


def _end(code: int, last_line: str) -> str:
    """How a process ended that did not say it."""
    if code >= 0:
        return f"exit code {code}" + (f"; it said: {last_line}" if last_line else "")
    try:
        # What it said last has nothing to do with that, or is the end of a list of everything that was loaded.
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-code}"


def _environment() -> dict[str, str]:
    """This process's, without its settings: they hold secrets that the child does not need."""
    return {name: value for name, value in os.environ.items() if not name.startswith("JOBDAEMON_")}
