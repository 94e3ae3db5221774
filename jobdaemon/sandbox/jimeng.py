"""
Volcengine Jimeng: tasks that are submitted, asked for and cancelled, every request signed (see volc_signature.py).

A task holds its key's slot from the submit until it is made. Its images are bought when they are made, not when they are
fetched; a task that fails, expires in the queue or is cancelled costs nothing. What the models take is in jimeng_wishes.py.

A prompt with ``sandbox:submit=<code>`` in it is refused with that code, one with ``sandbox:result=<code>`` ends its task so.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from jobdaemon.sandbox.faults import CALL_FAULTS, SLOW_FACTOR, TASK_FAULTS, Fault
from jobdaemon.sandbox.jimeng_wishes import Wish, WishError, read_wish
from jobdaemon.sandbox.shop import File, Shop, prompt_digest
from jobdaemon.sandbox.volc_signature import GatewayError, request_id, verified

API = "jimeng"
_SUCCESS = 10000
#: code -> HTTP status and message.
_ERRORS: Mapping[int, tuple[int, str]] = {
    50215: (400, "Input invalid for this service."),
    50400: (403, "Access Denied"),
    50411: (400, "Pre Img Risk Not Pass"),
    50412: (400, "Text Risk Not Pass"),
    50413: (400, "Post Text Risk Not Pass"),
    50429: (429, "Request Has Reached API Limit, Please Try Later"),
    50430: (429, "Request Has Reached API Concurrent Limit, Please Try Later"),
    50500: (500, "Internal Error"),
    50501: (500, "Internal RPC Error"),
    50511: (400, "Post Img Risk Not Pass"),
    50512: (400, "Post Text Risk Not Pass"),
    50518: (400, "Pre Img Copyright Not Pass"),
    50519: (400, "Post Img Copyright Not Pass"),
    50520: (400, "Risk Review Service Error"),
    50521: (400, "Risk Review Service Error"),
    50522: (400, "Risk Review Service Error"),
}
_ORDERED_CODE = re.compile(r"sandbox:(submit|result)=(\d{5})")
#: What may happen to a question.
_POLL_FAULTS = frozenset({Fault.RATE_LIMITED, Fault.ERROR, Fault.RESET, Fault.HTML, Fault.TIMEOUT})
#: As long as its time in the queue is of the whole.
_QUEUED_SHARE = 0.25
#: Tasks that are kept; older ones are not found.
_MAX_TASKS = 5_000
_FIRST_TASK = 7_392_616_336_519_610_001


class ServiceError(Exception):
    """An error of the service itself."""

    def __init__(self, code: int, detail: str = "") -> None:
        self.code = code
        self.status, message = _ERRORS.get(code, (400, "Unknown Error"))
        super().__init__(f"{message} {detail}".strip())


@dataclass(slots=True)
class _Task:
    """
    Attributes:
        begun_s, ends_s: by the event loop's clock.
        code: what it fails with, if it does.
        files: what was made, once it is.
        has_expired: forgotten in the queue.
    """

    key: str
    wish: Wish
    begun_s: float
    ends_s: float
    count: int
    code: int | None = None
    has_expired: bool = False
    files: list[File] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


def routes(shop: Shop) -> list[web.RouteDef]:
    """POST / with an Action and a Version."""
    return [web.post("/", _Api(shop).handle)]


class _Api:
    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._tasks: dict[str, _Task] = {}
        self._numbers = itertools.count(_FIRST_TASK)
        self._submits_of_prompt: Counter[str] = Counter()
        self._polls_of_task: Counter[str] = Counter()

    async def handle(self, request: web.Request) -> web.Response:
        """One request, answered in the gateway's envelope or the service's."""
        began_s = time.monotonic()
        content = await request.read()
        try:
            try:
                key = verified(request, content)
            except GatewayError:
                self._shop.account(API, "").unauthorised += 1
                raise
            answer = await self._answer(request, key, _object(content))
        except GatewayError as error:
            return error.response(request)
        except ServiceError as error:
            return _told(error.code, None, str(error), error.status, began_s)
        return answer if isinstance(answer, web.Response) else _told(_SUCCESS, answer, "Success", 200, began_s)

    async def _answer(self, request: web.Request, key: str, body: Mapping[str, Any]) -> Mapping[str, Any] | web.Response | None:
        match request.query.get("Action"), request.query.get("Version"):
            case "CVSync2AsyncSubmitTask", "2022-08-31":
                return await self._submit(request, key, body)
            case "CVSync2AsyncGetResult", "2022-08-31":
                return await self._result(request, key, body)
            case "CVCancelTask", "2024-06-06":
                self._cancel(key, body)
                return None
            case action, version:
                raise GatewayError(404, "InvalidActionOrVersion", f"Could not find operation {action} for version {version}.")

    # Submit

    async def _submit(self, request: web.Request, key: str, body: Mapping[str, Any]) -> Mapping[str, Any] | web.Response:
        full = self._shop.begin(API, key)
        if full is not None:
            raise ServiceError(50429 if full.by_rate else 50430)
        is_taken = False
        try:
            wish = await _wish(body)
            if (code := _ordered("submit", wish.prompt)) is not None:
                raise ServiceError(code)
            fault = self._submit_fault(key, wish)
            if (broken := _broken(fault)) is not None:
                return broken
            if fault is Fault.UNSAFE:
                raise ServiceError(50412)
            number = self._begin(key, wish, fault)
            is_taken = True
        finally:
            if not is_taken:
                self._shop.end(API, key)
        await _leave(request, fault)
        return {"task_id": number}

    def _submit_fault(self, key: str, wish: Wish) -> Fault | None:
        digest = prompt_digest(wish.prompt)
        self._submits_of_prompt[digest] += 1
        among = CALL_FAULTS | (TASK_FAULTS if wish.count > 1 else TASK_FAULTS - {Fault.PARTIAL})
        return self._shop.fault(API, key, f"{digest}:{self._submits_of_prompt[digest]}", among)

    def _begin(self, key: str, wish: Wish, fault: Fault | None) -> str:
        loop = asyncio.get_running_loop()
        takes_s = self._shop.behaviour.latency_s * (SLOW_FACTOR if fault is Fault.SLOW else 1.0)
        task = _Task(
            key,
            wish,
            begun_s=loop.time(),
            ends_s=loop.time() + takes_s,
            count=wish.count // 2 if fault is Fault.PARTIAL else wish.count,
            code=50511 if fault is Fault.FAILED_TASK else _ordered("result", wish.prompt),
            has_expired=fault is Fault.EXPIRED_TASK,
        )
        task.timer = loop.call_later(takes_s, self._end, task)
        number = str(next(self._numbers))
        self._tasks[number] = task
        while len(self._tasks) > _MAX_TASKS:
            del self._tasks[next(iter(self._tasks))]
        return number

    def _end(self, task: _Task) -> None:
        """The work is done: the slot is free, and what was made costs money."""
        task.timer = None
        self._shop.end(API, task.key)
        if task.code is None and not task.has_expired:
            task.files = self._shop.buy(API, task.wish.prompt, task.count, size=task.wish.size)

    # Result and cancel

    async def _result(self, request: web.Request, key: str, body: Mapping[str, Any]) -> Mapping[str, Any] | web.Response:
        number, as_links = _named(body), _wants_links(body.get("req_json"))
        self._polls_of_task[number] += 1
        fault = self._shop.fault(API, key, f"{number}:poll:{self._polls_of_task[number]}", _POLL_FAULTS)
        if (broken := _broken(fault)) is not None:
            return broken
        await _leave(request, fault)
        task = self._tasks.get(number)
        if task is None or task.key != key or task.wish.req_key != body["req_key"]:
            return _state("not_found")
        if task.timer is not None:
            now_s = asyncio.get_running_loop().time()
            share = (now_s - task.begun_s) / max(1e-9, task.ends_s - task.begun_s)
            return _state("in_queue" if share < _QUEUED_SHARE else "generating")
        if task.has_expired:
            return _state("expired")
        if task.code is not None:
            raise ServiceError(task.code)
        if as_links and task.wish.gives_links:
            return _state("done") | {"image_urls": [self._shop.link(file) for file in task.files]}
        contents = await asyncio.to_thread(lambda: [file.content() for file in task.files])
        return _state("done") | {"binary_data_base64": [base64.b64encode(content).decode() for content in contents]}

    def _cancel(self, key: str, body: Mapping[str, Any]) -> None:
        number = _named(body)
        task = self._tasks.get(number)
        if task is None or task.key != key or task.timer is None:
            raise ServiceError(50215, "the task cannot be cancelled")
        task.timer.cancel()
        self._shop.end(API, key)
        del self._tasks[number]


def _told(code: int, data: Any, message: str, status: int, began_s: float) -> web.Response:
    elapsed = f"{(time.monotonic() - began_s) * 1000:.6f}ms"
    body = {"code": code, "data": data, "message": message, "request_id": request_id(), "status": code, "time_elapsed": elapsed}
    return web.json_response(body, status=status)


def _state(status: str) -> dict[str, Any]:
    return {"binary_data_base64": None, "image_urls": None, "status": status}


def _object(content: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ServiceError(50215, "the body is no JSON object")
    return body


async def _wish(body: Mapping[str, Any]) -> Wish:
    try:
        return await read_wish(body)
    except WishError as error:
        raise ServiceError(50215, str(error)) from error


def _ordered(where: str, prompt: str) -> int | None:
    """The code that the prompt itself asks for."""
    ordered = _ORDERED_CODE.search(prompt)
    return int(ordered[2]) if ordered is not None and ordered[1] == where else None


def _named(body: Mapping[str, Any]) -> str:
    if not isinstance(body.get("req_key"), str) or not isinstance(body.get("task_id"), str) or not body["task_id"]:
        raise ServiceError(50215, "req_key or task_id is missing")
    return str(body["task_id"])


def _wants_links(req_json: object) -> bool:
    """Whether the options, which are JSON in a text, ask for links."""
    if req_json is None:
        return False
    try:
        options = json.loads(req_json) if isinstance(req_json, str) else None
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ServiceError(50215, "req_json is invalid")
    return options.get("return_url") is True


def _broken(fault: Fault | None) -> web.Response | None:
    """What comes instead of an answer, before anything is done."""
    match fault:
        case Fault.RATE_LIMITED:
            raise ServiceError(50429)
        case Fault.ERROR:
            raise ServiceError(50500)
        case Fault.HTML:
            return web.Response(status=502, text="<html><title>502 Bad Gateway</title></html>", content_type="text/html")
    return None


async def _leave(request: web.Request, fault: Fault | None) -> None:
    """Nobody hears what was done."""
    if fault is Fault.RESET and request.transport is not None:
        request.transport.abort()
    if fault is Fault.TIMEOUT:
        await asyncio.Event().wait()  # until the caller is gone
