"""
The sandbox's HTTP side, on the loopback interface only.

    POST /call    {"queue", "order_id", "images": [1, 2], "daemon", "job_id", "token"?}: held open for the latency, then
                  {"images": [{"index", "digest"}]}; 429 with Retry-After above the provider's own limits
    POST /store   {"order_id", "image", "digest"}: a finished image is kept; {"first": true} unless it was there
    POST /limit   {"queue", "limit"} before a change: claims may see this limit from now on; {"queue", "token"} once it is
                  committed: every claim with a higher token saw it
    POST /daemon  {"daemon", "lapses_in_s"} when it is frozen beyond its lease, {"daemon", "token"} before it goes on
    POST /_sandbox/behaviour  {"latency_s"?, "concurrency"?, "qps"?}: changed while it runs; null is no limit
    GET  /_sandbox/report     see Referee.report and Shop.report
    GET  /files/…             images that were bought
    everything else           the image APIs, each in a module of its own
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from jobdaemon.errors import SettingsError
from jobdaemon.sandbox import comfyui, dashscope, files, jimeng, openai_images, photo_enhance, superbed
from jobdaemon.sandbox.faults import SLOW_FACTOR, Fault
from jobdaemon.sandbox.referee import Call, Referee
from jobdaemon.sandbox.shop import Behaviour, Shop

_HOST = "127.0.0.1"
#: Photos come in bodies too.
_MAX_BODY_BYTES = 64 * 1024 * 1024
#: The APIs it speaks: each module's routes.
_APIS: tuple[Callable[[Shop], list[web.RouteDef]], ...] = (
    files.routes,
    openai_images.routes,
    comfyui.routes,
    dashscope.routes,
    jimeng.routes,
    superbed.routes,
    photo_enhance.routes,
)
#: A provider that is full names no time; a second is what most say.
_RETRY_AFTER_FULL_S = 1


class BadRequestError(web.HTTPBadRequest):
    """The caller's JSON is not what the endpoint takes; says what is wrong."""

    def __init__(self, what: str) -> None:
        super().__init__(text=json.dumps({"error": what}), content_type="application/json")


class Sandbox:
    """The server; an async context manager that listens while it is entered."""

    def __init__(self, behaviour: Behaviour | None = None, *, port: int = 0) -> None:
        """
        Args:
            port: 0 takes a free one.
        """
        self.behaviour = behaviour or Behaviour()
        self.referee = Referee()
        self.shop = Shop(self.behaviour, url=lambda: self.url)
        self._port = port
        self._runner: web.AppRunner | None = None
        self._calls_of_job: Counter[int] = Counter()
        self._begun: dict[str, deque[float]] = {}
        self._numbers = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        if self._runner is None:
            raise RuntimeError("the sandbox does not listen")
        return f"http://{_HOST}:{self._runner.addresses[0][1]}"

    async def __aenter__(self) -> Self:
        """
        Listen.

        Raises:
            SettingsError: the port is taken or may not be used.
        """
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/call", self._call),
                web.post("/store", self._store),
                web.post("/limit", self._limit),
                web.post("/daemon", self._daemon),
                web.post("/_sandbox/behaviour", self._behave),
                web.get("/_sandbox/report", self._report),
            ]
        )
        for routes in _APIS:
            app.add_routes(routes(self.shop))
        # A caller that is gone ends its call at once: its handler is cancelled.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, _HOST, self._port, backlog=1024).start()
        except OSError as error:
            await runner.cleanup()
            raise SettingsError(f"the sandbox cannot listen on {_HOST}:{self._port}: {error.strerror}") from error
        self._runner = runner
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop listening and drop what is open."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    # Endpoints

    async def _call(self, request: web.Request) -> web.Response:
        call = _read_call(await _object(request), request)
        self._calls_of_job[call.job_id] += 1
        fault = self.behaviour.faults.of(call.job_id, self._calls_of_job[call.job_id])
        wait_s = self._refused_for_s(call.queue)
        if wait_s is None and fault is Fault.RATE_LIMITED:
            wait_s = _RETRY_AFTER_FULL_S
        if wait_s is not None:
            self.referee.reject(call.queue)
            return web.json_response({"error": "rate limited"}, status=429, headers={"Retry-After": str(wait_s)})
        self._numbers += 1
        number = self._numbers
        outcome = "gone"
        self.referee.start(call)
        try:
            outcome = await self._work(fault)
        finally:
            # Before the caller can know: it may start the next call at once.
            self.referee.end(call, outcome)
        if outcome == Fault.RESET:
            _reset(request)
        if outcome != "made":
            return web.json_response({"error": "internal error"}, status=500)
        images = [{"index": image, "digest": _digest(number, image)} for image in call.images]
        return web.json_response({"images": images})

    async def _work(self, fault: Fault | None) -> str:
        latency_s = self.behaviour.latency_s
        match fault:
            case Fault.SLOW:
                await asyncio.sleep(latency_s * SLOW_FACTOR)
            case Fault.RESET:
                await asyncio.sleep(latency_s / 2)
                return str(fault)
            case _:
                await asyncio.sleep(latency_s)
        return str(fault) if fault is Fault.ERROR else "made"

    def _refused_for_s(self, queue: str) -> int | None:
        """Seconds of Retry-After when the provider's own limits refuse a call now, else None."""
        behaviour = self.behaviour
        if behaviour.concurrency is not None and self.referee.open_calls(queue) >= behaviour.concurrency:
            return _RETRY_AFTER_FULL_S
        if behaviour.qps is None:
            return None
        now = asyncio.get_running_loop().time()
        begun = self._begun.setdefault(queue, deque())
        window_s = max(1.0, 1.0 / behaviour.qps)
        while begun and now - begun[0] >= window_s:
            begun.popleft()
        if len(begun) >= max(1, math.floor(behaviour.qps)):
            return math.ceil(window_s - (now - begun[0]))
        begun.append(now)
        return None

    async def _store(self, request: web.Request) -> web.Response:
        body = await _object(request)
        first = self.referee.store(_whole(body, "order_id"), _whole(body, "image"), _text(body, "digest"))
        return web.json_response({"first": first})

    async def _limit(self, request: web.Request) -> web.Response:
        body = await _object(request)
        queue = _text(body, "queue")
        if body.get("token") is None:
            self.referee.announce(queue, None if body.get("limit") is None else _whole(body, "limit"))
        else:
            self.referee.settle(queue, _whole(body, "token"))
        return web.json_response({})

    async def _daemon(self, request: web.Request) -> web.Response:
        body = await _object(request)
        daemon = _text(body, "daemon")
        if body.get("token") is None:
            self.referee.freeze(daemon, _number(body, "lapses_in_s"))
        else:
            self.referee.thaw(daemon, _whole(body, "token"))
        return web.json_response({})

    async def _behave(self, request: web.Request) -> web.Response:
        body = await _object(request)
        behaviour = self.behaviour
        if "latency_s" in body:
            behaviour.latency_s = _number(body, "latency_s")
        if "concurrency" in body:
            behaviour.concurrency = None if body["concurrency"] is None else _whole(body, "concurrency")
        if "qps" in body:
            qps = None if body["qps"] is None else _number(body, "qps")
            if qps == 0:
                raise BadRequestError("qps must be above 0, or null for no limit")
            behaviour.qps = qps
        return web.json_response({})

    async def _report(self, _request: web.Request) -> web.Response:
        return web.json_response(self.report())

    def report(self) -> dict[str, Any]:
        """The referee's counts, and under ``apis`` what was bought from each API: see :meth:`Shop.report`."""
        return self.referee.report() | {"apis": self.shop.report()}


def _read_call(body: Mapping[str, Any], request: web.Request) -> Call:
    images = body.get("images")
    if not isinstance(images, list) or not images or not all(_is_whole(image) for image in images):
        raise BadRequestError("images must be a list of whole numbers, not empty")
    return Call(
        queue=_text(body, "queue"),
        order_id=_whole(body, "order_id"),
        images=tuple(images),
        daemon=_text(body, "daemon"),
        job_id=_whole(body, "job_id"),
        token=None if body.get("token") is None else _whole(body, "token"),
        is_gone=_gone(request),
    )


def _gone(request: web.Request) -> Callable[[], bool]:
    """Asks the kernel whether the caller has closed its end: the event loop may not have come to it yet."""
    transport = request.transport
    opened = None if transport is None else transport.get_extra_info("socket")

    def is_gone() -> bool:
        if transport is None or transport.is_closing() or opened is None or opened.fileno() < 0:
            return True
        # The transport's own socket object does not let others read; a second handle on the same connection does.
        with socket.socket(fileno=os.dup(opened.fileno())) as handle:
            try:
                return handle.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True

    return is_gone


def _reset(request: web.Request) -> None:
    """Drop the connection without an answer."""
    if request.transport is not None:
        with suppress(OSError):
            # No lingering: the caller sees a reset, not an orderly end.
            handle = request.transport.get_extra_info("socket")
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        request.transport.abort()


def _digest(number: int, image: int) -> str:
    """What stands for the bytes of one made image: different for every call, as a provider's images are."""
    return hashlib.sha256(f"{number}:{image}".encode()).hexdigest()


async def _object(request: web.Request) -> Mapping[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        raise BadRequestError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _whole(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if not _is_whole(value):
        raise BadRequestError(f"{name} must be a whole number from 0")
    return int(value)  # type: ignore[arg-type]


def _number(body: Mapping[str, Any], name: str) -> float:
    value = body.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise BadRequestError(f"{name} must be a number from 0")
    return float(value)


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value or len(value) > 255:
        raise BadRequestError(f"{name} must be a text of 1 to 255 characters")
    return value
