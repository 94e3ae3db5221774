"""
A server's websocket: says at once what polling would find out later, and is never needed.

Events that were missed are not sent again, so nothing is believed on its word: whoever hears something asks /history.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp

_OPEN_TIMEOUT_S = 5.0
#: A server whose machine is gone sends no end; pings find out.
_PING_S = 20.0
#: An error's event repeats the node's inputs; larger frames end the socket, and polling goes on.
_MAX_FRAME_BYTES = 16 * 1024 * 1024
_ENDS = frozenset({"execution_success", "execution_error", "execution_interrupted"})


class PromptSocket:
    """What is said of one prompt, as long as the connection lasts."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse | None, prompt_id: str) -> None:
        self._connection = connection
        self.prompt_id = prompt_id

    @property
    def is_open(self) -> bool:
        """Whether anything may still be said."""
        return self._connection is not None

    async def listen(self, patience_s: float) -> None:
        """Return when the prompt is said to be over, or when nothing was said of it for *patience_s*."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience_s) as silence:
                while self._connection is not None:
                    frame = await self._connection.receive()
                    if frame.type in (
                        aiohttp.WSMsgType.CLOSE,
                        aiohttp.WSMsgType.CLOSING,
                        aiohttp.WSMsgType.CLOSED,
                        aiohttp.WSMsgType.ERROR,
                    ):
                        self._connection = None
                        break
                    is_ours, is_over = self._meaning(frame)
                    if is_over:
                        return
                    if is_ours:
                        silence.reschedule(loop.time() + patience_s)
                # The connection broke: polling from now on.
                await asyncio.sleep(patience_s)
        except TimeoutError:
            return

    def _meaning(self, frame: aiohttp.WSMessage) -> tuple[bool, bool]:
        """Whether a frame speaks of this prompt, and whether it says that it is over; binary frames are previews."""
        if frame.type is not aiohttp.WSMsgType.TEXT:
            return False, False
        try:
            event: Any = json.loads(frame.data)
            kind, data = event["type"], event["data"]
            is_ours = data["prompt_id"] == self.prompt_id
        except (ValueError, TypeError, KeyError, RecursionError):
            return False, False
        return is_ours, is_ours and (kind in _ENDS or (kind == "executing" and data.get("node") is None))


class Sockets:
    """Opens them; holds the session they share."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def open(self, url: str, prompt_id: str) -> AsyncIterator[PromptSocket]:
        """
        Listen to the server at *url* as the client ``prompt_id``; a server that has no socket for us just says nothing.

        Args:
            url: http or https, without a slash at the end.
        """
        connection = await self._connected(f"ws{url.removeprefix('http')}/ws", prompt_id)
        try:
            yield PromptSocket(connection, prompt_id)
        finally:
            if connection is not None:
                await connection.close()

    async def _connected(self, url: str, client_id: str) -> aiohttp.ClientWebSocketResponse | None:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_request_redirect.append(_refuse_redirect)
            self._session = aiohttp.ClientSession(trace_configs=[trace], connector=aiohttp.TCPConnector(limit=0))
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                return await self._session.ws_connect(
                    url,
                    params={"clientId": client_id},
                    heartbeat=_PING_S,
                    max_msg_size=_MAX_FRAME_BYTES,
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                )
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None

    async def close(self) -> None:
        """Free the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


async def _refuse_redirect(
    _session: aiohttp.ClientSession, _context: SimpleNamespace, redirect: aiohttp.TraceRequestRedirectParams
) -> None:
    """Only the servers that the settings name are talked to; one of them may not send us to others."""
    redirect.response.close()
    raise aiohttp.ClientError("a websocket that redirects")
