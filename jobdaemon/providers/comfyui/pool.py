"""Which server gets the next call: the least busy one that is up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from jobdaemon.errors import PermanentError, ProviderUnavailableError, RetryableError
from jobdaemon.providers.comfyui.answers import NAME
from jobdaemon.providers.comfyui.server import ComfyServer

#: A server that was down is left alone for so long, unless there is no other.
_REST_S = 15.0


class Place:
    """A call's place at a server, from the choice of the server until the call is over."""

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self._is_queued = False
        server.calls += 1

    def queued(self) -> None:
        """The server's own count has it from now on."""
        self._is_queued = True
        self.server.queued_calls += 1

    def leave(self) -> None:
        """The call is over, or this process goes on without it."""
        self.server.calls -= 1
        self.server.queued_calls -= self._is_queued


class ServerPool:
    """The servers of the settings."""

    def __init__(self, servers: Sequence[ComfyServer]) -> None:
        self._servers = servers
        self._rests_until: dict[str, float] = {}

    def named(self, url: str) -> ComfyServer | None:
        """The server at *url*, if the settings still name it."""
        return next((server for server in self._servers if server.url == url), None)

    @asynccontextmanager
    async def place(self, tried: Mapping[ComfyServer, Exception]) -> AsyncIterator[Place]:
        """
        A place at the server with the least to do; the first of the settings among equals.

        Args:
            tried: servers that did not take this call, and why.

        Raises:
            ProviderUnavailableError: no other one is up. Retryable.
            ProviderRefusedError: none is left, since each refused the call for good. Permanent.
        """
        server = await self._least_busy([server for server in self._servers if server not in tried])
        if server is None:
            raise self._why(tried)
        place = Place(server)
        try:
            yield place
        finally:
            place.leave()

    async def is_any_up(self, without: ComfyServer) -> bool:
        """Whether a server other than *without* takes calls."""
        return bool(await self._loads([server for server in self._servers if server is not without]))

    def _why(self, tried: Mapping[ComfyServer, Exception]) -> Exception:
        """Why nobody takes the call; what a server that is down now would say is not known, so that is worth another try."""
        passing = [error for error in tried.values() if isinstance(error, RetryableError)]
        if passing or len(tried) == len(self._servers):
            return [*passing, *tried.values()][0]
        down = f"none of {len(self._servers)} servers can be reached" if not tried else "the other servers cannot be reached"
        return ProviderUnavailableError("; ".join([f"{NAME}: {down}", *map(str, tried.values())]))

    async def _least_busy(self, servers: Sequence[ComfyServer]) -> ComfyServer | None:
        now = asyncio.get_running_loop().time()
        rested = [server for server in servers if self._rests_until.get(server.url, now) <= now]
        loads = await self._loads(rested) or await self._loads([server for server in servers if server not in rested])
        # No await from here to the place: calls that ask at the same time must not all see the same server idle.
        return min(loads, key=lambda server: _busyness(server, loads[server]), default=None)

    async def _loads(self, servers: Sequence[ComfyServer]) -> dict[ComfyServer, int]:
        """The load of each server that is up, in the order of the settings; the others rest."""
        answers = await asyncio.gather(*(server.load() for server in servers), return_exceptions=True)
        loads = {}
        for server, answer in zip(servers, answers, strict=True):
            if isinstance(answer, int):
                self._rests_until.pop(server.url, None)
                loads[server] = answer
            elif isinstance(answer, RetryableError | PermanentError):
                self._rests_until[server.url] = asyncio.get_running_loop().time() + _REST_S
            else:
                raise answer
        return loads


def _busyness(server: ComfyServer, remaining: int) -> int:
    """Other people's prompts, and all our calls: those too that were on their way when the server counted."""
    return max(0, remaining - server.queued_calls) + server.calls
