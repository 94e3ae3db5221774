"""
DashScope's image API: tasks that are submitted, asked for, listed and cancelled, and models that answer when they are done.

    POST /api/v1/services/aigc/{text2image|image2image}/image-synthesis    tasks of the older models, ``results`` in the end
    POST /api/v1/services/aigc/image-generation/generation                 tasks of the newer ones, ``choices`` in the end
    POST /api/v1/services/aigc/multimodal-generation/generation            no task: the answer holds the ``choices``
    GET  /api/v1/tasks/<id>, GET /api/v1/tasks, POST /api/v1/tasks/<id>/cancel
    GET  /api/v1/uploads                                                   see dashscope_uploads.py

Each key is an account of its own: it sees its own tasks only. A task holds a slot of its key from the submit to its end, PENDING
for the first third of the latency. Images are charged when they are made: not those that fail or are unsafe, but those of a task
that is forgotten, and of a submit that is cut off or never answered. Blanks at the end of a prompt do not count as its words.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from aiohttp import web

from jobdaemon.sandbox.dashscope_uploads import Uploads
from jobdaemon.sandbox.faults import CALL_FAULTS, TASK_FAULTS, Fault
from jobdaemon.sandbox.fetching import UnfetchableError, fetched, is_near, picture_size
from jobdaemon.sandbox.shop import Shop, prompt_digest

API = "dashscope"
_SERVICES = "/api/v1/services/aigc"
_POLL_FAULTS = frozenset({Fault.RATE_LIMITED, Fault.ERROR, Fault.RESET, Fault.HTML})
#: Its times carry no zone.
_BEIJING = timezone(timedelta(hours=8))
_MAX_PHOTO_BYTES, _MAX_PHOTOS = 10 * 1024 * 1024, 3
_MAX_FETCHED_BYTES = 50 * 1024 * 1024
_MAX_TASKS = 5_000
_DATA_URL = re.compile(r"data:image/(?:jpeg|jpg|png|bmp|webp);base64,(.*)", re.DOTALL)
_SIZE = re.compile(r"([1-9]\d{1,4})\*([1-9]\d{1,4})")


@dataclass(frozen=True, slots=True)
class _Model:
    """
    A family of models, by how their names begin.

    Attributes:
        groups: the paths that know it.
        max_images, images: most of one call, and how many when the call does not say.
        pixels: fewest and most of an image.
        letters: whether sizes may be 1K, 2K, 4K.
        sides: fewest and most pixels of a photo's side.
    """

    groups: tuple[str, ...]
    max_images: int = 4
    images: int = 4
    pixels: tuple[int, int] = (1, 4096**2)
    letters: bool = False
    sides: tuple[int, int] = (1, 30_000)


_TEXT = _Model(("text2image",))
_BOTH = ("image-generation", "multimodal-generation")
_QWEN_SIDES = (384, 3072)
_DIRECT = _Model(("multimodal-generation",), max_images=6, images=1, sides=_QWEN_SIDES)
_ONE = _Model(("multimodal-generation",), max_images=1, images=1, sides=_QWEN_SIDES)
_MODELS: Mapping[str, _Model] = {
    "wan2.5-i2i": _Model(("image2image",), pixels=(768**2, 1280**2), sides=(384, 5000)),
    "wanx2.1-imageedit": _Model(("image2image",)),
    "wan2.6-image": _Model(_BOTH, letters=True, sides=(240, 8000)),
    "wan2.7-image": _Model(_BOTH, letters=True, sides=(240, 8000)),
    "wan2.6-t2i": _Model(_BOTH, pixels=(1280**2, 1440**2)),
    "wan2.5-t2i": _Model(("text2image",), pixels=(1280**2, 1440**2)),
    "wan2.2-t2i": _TEXT,
    "wanx2.1-t2i": _TEXT,
    "wanx2.0-t2i": _TEXT,
    "wanx-v1": _TEXT,
    "qwen-image-3.0": _Model(_BOTH, max_images=6, images=1, sides=_QWEN_SIDES),
    "qwen-image-2.0": _DIRECT,
    "qwen-image-edit-max": _DIRECT,
    "qwen-image-edit-plus": _DIRECT,
    "qwen-image-edit": _ONE,
    "qwen-image-max": _ONE,
    "qwen-image": _Model(("text2image", "multimodal-generation"), max_images=1, images=1),
    "z-image": _ONE,
}


class ApiError(Exception):
    """An error as this API tells it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class _Wish:
    """
    What a good request asks for.

    Attributes:
        group: the part of the path that tells the APIs apart.
        size: width and height; None is the sandbox's own.
    """

    group: str
    model: str
    prompt: str
    count: int
    size: tuple[int, int] | None

    @property
    def words(self) -> str:
        """The prompt as it is counted."""
        return self.prompt.rstrip()

    @property
    def is_new(self) -> bool:
        """Of the newer protocol: messages in, choices out."""
        return self.group in _BOTH


@dataclass(slots=True)
class _Task:
    """
    A task, and what became of it.

    Attributes:
        request_id: of its submit.
        output: what its end adds to the answer.
        timers: what will happen to it.
    """

    id: str
    request_id: str
    key: str
    wish: _Wish
    fault: Fault | None
    submitted: float
    status: str = "PENDING"
    scheduled: float | None = None
    ended: float | None = None
    output: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    polls: int = 0
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


def routes(shop: Shop) -> list[web.RouteDef]:
    """What stands behind the base URL of a region."""
    api = _Api(shop)
    return [
        web.post(_SERVICES + "/{group:text2image|image2image}/image-synthesis", api.answering(api.submit)),
        web.post(_SERVICES + "/{group:image-generation}/generation", api.answering(api.submit)),
        web.post(_SERVICES + "/{group:multimodal-generation}/generation", api.answering(api.make)),
        web.get("/api/v1/tasks", api.answering(api.list_tasks)),
        web.get("/api/v1/tasks/", api.answering(api.list_tasks)),
        web.get("/api/v1/tasks/{id}", api.answering(api.show)),
        web.post("/api/v1/tasks/{id}/cancel", api.answering(api.cancel)),
        web.get("/api/v1/uploads", api.answering(api.policy)),
        *api.uploads.routes(),
    ]


class _Api:
    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.uploads = Uploads()
        self._tasks: dict[str, _Task] = {}
        self._calls_of_prompt: Counter[str] = Counter()
        self._numbers = itertools.count(1)

    def answering(
        self, endpoint: Callable[[web.Request, str, str], Awaitable[web.Response | Mapping[str, Any]]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """A handler: *endpoint* gets the key and the request's id, and returns a body or a whole response."""

        async def handle(request: web.Request) -> web.Response:
            request_id = self._new_id()
            try:
                answer = await endpoint(request, self._key(request), request_id)
            except ApiError as error:
                told = {"request_id": request_id, "code": error.code, "message": error.message}
                return web.json_response(told, status=error.status)
            return answer if isinstance(answer, web.Response) else web.json_response({"request_id": request_id, **answer})

        return handle

    def _new_id(self) -> str:
        digest = hashlib.sha256(b"%d" % next(self._numbers)).hexdigest()
        return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))

    def _key(self, request: web.Request) -> str:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
        self._shop.account(API, "").unauthorised += 1
        raise ApiError(401, "InvalidApiKey", "Invalid API-key provided.")

    # Endpoints

    async def submit(self, request: web.Request, key: str, request_id: str) -> web.Response | Mapping[str, Any]:
        """A new task."""
        if request.headers.get("X-DashScope-Async", "").lower() != "enable":
            raise ApiError(403, "AccessDenied", "current user api does not support synchronous calls.")
        wish = await _read(request, self.uploads)
        fault, page = self._begin(key, wish, TASK_FAULTS)
        if page is not None:
            return page
        task = self._start(key, request_id, wish, fault)
        await _cut(request, fault)
        return {"output": {"task_status": task.status, "task_id": task.id}}

    async def make(self, request: web.Request, key: str, request_id: str) -> web.Response | Mapping[str, Any]:  # noqa: ARG002
        """Images at once."""
        if "X-DashScope-Async" in request.headers:
            raise ApiError(403, "AccessDenied", "current user api does not support asynchronous calls.")
        wish = await _read(request, self.uploads)
        fault, page = self._begin(key, wish, frozenset({Fault.PARTIAL}))
        if page is not None:
            return page
        try:
            await self._shop.work(fault, size=wish.size)
            entries = self._entries(wish, fault)
            await _cut(request, fault)
        finally:
            self._shop.end(API, key)
        made = [entry for entry in entries if "url" in entry]
        return {"output": {"choices": _choices(wish, made)}, "usage": {"image_count": len(made)}}

    async def show(self, request: web.Request, key: str, request_id: str) -> web.Response | Mapping[str, Any]:  # noqa: ARG002
        """What became of a task; whatever it is, it is a 200."""
        task = self._find(request, key)
        if task is None:
            return {"output": {"task_id": request.match_info["id"], "task_status": "UNKNOWN"}}
        task.polls += 1
        fault = self._shop.fault(API, key, f"poll:{task.id}:{task.polls}", _POLL_FAULTS)
        if (page := _refusal(fault, task.wish)) is not None:
            return page
        await _cut(request, fault)
        output: dict[str, Any] = {"task_id": task.id, "task_status": task.status, "submit_time": _clock(task.submitted)}
        for name, moment in (("scheduled_time", task.scheduled), ("end_time", task.ended)):
            if moment is not None:
                output[name] = _clock(moment)
        answer: dict[str, Any] = {"output": output | task.output}
        if task.status == "SUCCEEDED":
            answer["usage"] = {"image_count": task.images}
        return answer

    async def list_tasks(self, request: web.Request, key: str, request_id: str) -> Mapping[str, Any]:  # noqa: ARG002
        """Tasks of the last day, the newest first."""
        page, size = (_whole(request.query, name, default) for name, default in (("page_no", 1), ("page_size", 10)))
        since, until = (_moment(request.query, name) for name in ("start_time", "end_time"))
        found = [
            task
            for task in reversed(self._tasks.values())
            if task.key == key
            and request.query.get("model_name") in (None, "", task.wish.model)
            and request.query.get("status") in (None, "", task.status)
            and (since or 0.0) <= task.submitted <= (until or math.inf)
        ]
        rows = [_row(task) for task in found[(page - 1) * size : page * size]]
        return {"total": len(found), "data": rows, "total_page": math.ceil(len(found) / size), "page_no": page, "page_size": size}

    async def cancel(self, request: web.Request, key: str, request_id: str) -> Mapping[str, Any]:  # noqa: ARG002
        """Only what has not begun."""
        task = self._find(request, key)
        if task is None or task.status != "PENDING":
            told = "Failed to cancel the task, please confirm if the task is in PENDING status."
            raise ApiError(400, "UnsupportedOperation", told)
        for timer in task.timers:
            timer.cancel()
        self._end(task, "CANCELED")
        return {}

    async def policy(self, request: web.Request, key: str, request_id: str) -> Mapping[str, Any]:
        """How to upload a file."""
        policy = self.uploads.policy(request, key, request_id)
        if policy is None:
            raise _wrong("action must be getPolicy, and model is required.")
        return {"data": policy}

    # Tasks

    def _find(self, request: web.Request, key: str) -> _Task | None:
        task = self._tasks.get(request.match_info["id"])
        return task if task is not None and task.key == key else None

    def _begin(self, key: str, wish: _Wish, more_faults: frozenset[Fault]) -> tuple[Fault | None, web.Response | None]:
        """
        Take a slot and draw what goes wrong; with a proxy's page there is no slot.

        Raises:
            ApiError: a limit of the key, or what goes wrong; there is no slot.
        """
        full = self._shop.begin(API, key)
        if full is not None:
            code = "Throttling.RateQuota" if full.by_rate else "Throttling"
            raise ApiError(429, code, "Requests rate limit exceeded, please try again later.")
        digest = prompt_digest(wish.words)
        self._calls_of_prompt[digest] += 1
        fault = self._shop.fault(API, key, f"{digest}:{self._calls_of_prompt[digest]}", CALL_FAULTS | more_faults)
        try:
            page = _refusal(fault, wish)
        except ApiError:
            self._shop.end(API, key)
            raise
        if page is not None:
            self._shop.end(API, key)
        return fault, page

    def _start(self, key: str, request_id: str, wish: _Wish, fault: Fault | None) -> _Task:
        task = _Task(self._new_id(), request_id, key, wish, fault, time.time())
        self._tasks[task.id] = task
        while len(self._tasks) > _MAX_TASKS:
            del self._tasks[next(iter(self._tasks))]
        latency_s = self._shop.work_s(fault)
        loop = asyncio.get_running_loop()
        task.timers = [loop.call_later(latency_s / 3, _schedule, task), loop.call_later(latency_s, self._finish, task)]
        return task

    def _finish(self, task: _Task) -> None:
        wish = task.wish
        if task.fault is Fault.FAILED_TASK or (task.fault is Fault.PARTIAL and wish.count == 1):
            task.output = {**_timed_out(), "task_metrics": {"TOTAL": wish.count, "SUCCEEDED": 0, "FAILED": wish.count}}
            self._end(task, "FAILED")
            return
        entries = self._entries(wish, task.fault)
        made = [entry for entry in entries if "url" in entry]
        task.images = len(made)
        if wish.is_new:
            task.output = {"finished": True, "choices": _choices(wish, made)}
        else:
            counts = {"TOTAL": len(entries), "SUCCEEDED": len(made), "FAILED": len(entries) - len(made)}
            task.output = {"results": entries, "task_metrics": counts}
        self._end(task, "SUCCEEDED")
        if task.fault is Fault.EXPIRED_TASK:
            del self._tasks[task.id]

    def _end(self, task: _Task, status: str) -> None:
        task.status, task.ended = status, time.time()
        self._shop.end(API, task.key)

    def _entries(self, wish: _Wish, fault: Fault | None) -> list[dict[str, Any]]:
        """What is made, each a link or an error, and charged now."""
        failed = dict[int, dict[str, Any]]()
        if fault is Fault.PARTIAL and wish.count > 1:
            failed[wish.count - 1] = _timed_out()
        if fault is Fault.UNSAFE:
            failed[0] = {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."}
        files = iter(self._shop.buy(API, wish.words, wish.count - len(failed), size=wish.size))
        return [
            failed[place] if place in failed else {"orig_prompt": wish.prompt, "url": self._shop.link(next(files))}
            for place in range(wish.count)
        ]


def _schedule(task: _Task) -> None:
    task.status, task.scheduled = "RUNNING", time.time()


def _timed_out() -> dict[str, Any]:
    return {"code": "InternalError.Timeout", "message": "An internal timeout error has occurred during execution."}


def _refusal(fault: Fault | None, wish: _Wish) -> web.Response | None:
    """
    The page of a proxy in between.

    Raises:
        ApiError: the service's own refusal.
    """
    match fault:
        case Fault.RATE_LIMITED:
            raise ApiError(429, "Throttling.RateQuota", "Requests rate limit exceeded, please try again later.")
        case Fault.ERROR:
            raise ApiError(500, "InternalError", "An internal error has occurred, please try again later.")
        case Fault.UNSAFE if wish.count == 1 or wish.is_new:
            raise ApiError(400, "DataInspectionFailed", "Input data may contain inappropriate content.")
        case Fault.HTML:
            return web.Response(status=502, text="<html><title>502 Bad Gateway</title></html>", content_type="text/html")
    return None


async def _cut(request: web.Request, fault: Fault | None) -> None:
    """Keep the answer back: what was asked is done."""
    if fault is Fault.RESET and request.transport is not None:
        request.transport.abort()
    elif fault is Fault.TIMEOUT:
        await asyncio.Event().wait()  # until the caller is gone


def _choices(wish: _Wish, made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Wan gives each image a choice of its own, Qwen puts them all into one."""
    parts = [{"type": "image", "image": entry["url"]} for entry in made]
    groups = [parts] if wish.model.startswith("qwen") else [[part] for part in parts]
    return [{"finish_reason": "stop", "message": {"role": "assistant", "content": group}} for group in groups]


def _row(task: _Task) -> dict[str, Any]:
    function = "generation" if task.wish.is_new else "image-synthesis"
    row: dict[str, Any] = {
        "api_key_id": hashlib.sha256(task.key.encode()).hexdigest()[:6],
        "caller_parent_id": "1000000000000001",
        "caller_uid": "1000000000000001",
        "gmt_create": round(task.submitted * 1000),
        "model_name": task.wish.model,
        "region": "cn-beijing",
        "request_id": task.request_id,
        "status": task.status,
        "task_id": task.id,
        "user_api_unique_key": f"apikey:v1:aigc:{task.wish.group}:{function}:{task.wish.model}",
    }
    moments = {"start_time": task.scheduled, "end_time": task.ended}
    return row | {name: round(moment * 1000) for name, moment in moments.items() if moment is not None}


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).astimezone(_BEIJING).isoformat(" ", "milliseconds").partition("+")[0]


def _whole(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise _wrong(f"{name} must be a positive integer")
    return int(text)


def _moment(query: Mapping[str, str], name: str) -> float | None:
    if not query.get(name):
        return None
    try:
        return datetime.strptime(query[name], "%Y%m%d%H%M%S").replace(tzinfo=_BEIJING).timestamp()
    except ValueError:
        raise _wrong(f"{name} must be YYYYMMDDhhmmss") from None


# Requests


async def _read(request: web.Request, uploads: Uploads) -> _Wish:
    """
    Raises:
        ApiError: a field is wrong, as the API would tell it.
    """
    group = request.match_info["group"]
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise _wrong("Required body invalid, please check the request body format.")
    name, content, parameters = body.get("model"), body.get("input"), body.get("parameters", {})
    if not isinstance(name, str) or not name:
        raise _wrong("Model can not be empty.")
    known = [beginning for beginning in _MODELS if name.startswith(beginning)]
    if not known:
        raise ApiError(404, "ModelNotFound", "Model not exist.")
    model = _MODELS[max(known, key=len)]
    if group not in model.groups:
        raise _wrong("url error, please check url！")
    if not isinstance(content, dict) or not isinstance(parameters, dict):
        raise _wrong("input and parameters must be objects.")
    prompt, photos = _messages(content) if group in _BOTH else _older_input(content, name)
    if not prompt.strip():
        raise _wrong("input.prompt can not be empty.")
    # Without the header an uploaded file's name is a URL that nobody can open.
    resolves = request.headers.get("X-DashScope-OssResourceResolve", "").lower() == "enable"
    for photo in photos:
        await _judge_photo(photo, uploads if resolves else Uploads(), model.sides)
    count = parameters.get("n", model.images)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= model.max_images:
        raise _wrong(f"num_images_per_prompt must be 1 to {model.max_images}.")
    seed = parameters.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 2_147_483_647:
        raise _wrong("seed must be 0 to 2147483647.")
    return _Wish(group, name, prompt, count, _size(parameters.get("size"), model))


def _older_input(content: Mapping[str, Any], model: str) -> tuple[str, Sequence[Any]]:
    prompt, photos = content.get("prompt"), content.get("images", [])
    if not isinstance(prompt, str) or not isinstance(photos, list):
        raise _wrong("input.prompt must be a string and input.images an array.")
    if model.startswith("wan2.5-i2i") and not 1 <= len(photos) <= _MAX_PHOTOS:
        raise _wrong(f"images must hold 1 to {_MAX_PHOTOS} images.")
    if model.startswith("wanx2.1-imageedit"):
        if not isinstance(content.get("function"), str):
            raise _wrong("function is required.")
        photos = [content.get("base_image_url")]
    return prompt, photos


def _messages(content: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """One message of the user's, with exactly one text."""
    messages = content.get("messages")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise _wrong("messages must hold exactly one message.")
    parts = messages[0].get("content")
    if messages[0].get("role") != "user" or not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _wrong("the message must be the user's, and its content an array.")
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if len(texts) != 1:
        raise _wrong("content must hold exactly one text.")
    return texts[0], [part["image"] for part in parts if "image" in part]


async def _judge_photo(photo: object, uploads: Uploads, sides: tuple[int, int]) -> None:
    if not isinstance(photo, str) or not photo:
        raise _wrong("image must be a URL or base64.")
    try:
        if uploads.has(photo):
            return  # its bytes were dropped
        if photo.startswith(("https://", "http://")):
            if not is_near(photo):
                return  # who asks for it would find out; here nobody does
            content = await fetched(photo, max_bytes=_MAX_FETCHED_BYTES)
        else:
            content = _decoded(photo)
        width, height = picture_size(content)
    except UnfetchableError as error:
        raise ApiError(400, "InvalidParameter.FileDownload", "The image format is illegal and cannot be opened.") from error
    if len(content) > _MAX_PHOTO_BYTES:
        raise _wrong("The image is larger than 10 MB.")
    if min(width, height) < sides[0] or max(width, height) > sides[1]:
        raise _wrong(f"The image has {width} * {height} pixels; each side must have {sides[0]} to {sides[1]}.")


def _decoded(data_url: str) -> bytes:
    encoded = _DATA_URL.fullmatch(data_url)
    if encoded is None:
        raise ApiError(400, "InvalidURL", "The provided URL does not appear to be valid.")
    try:
        return base64.b64decode(encoded[1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnfetchableError("no base64") from error


def _size(text: object, model: _Model) -> tuple[int, int] | None:
    if text is None or (model.letters and text in ("1K", "2K", "4K")):
        return None
    sides = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if sides is None:
        raise ApiError(400, "InvalidParameter.Size", "size must be width*height.")
    width, height = int(sides[1]), int(sides[2])
    if not model.pixels[0] <= width * height <= model.pixels[1] or not 0.25 <= width / height <= 4:
        raise ApiError(400, "InvalidParameter.Size", f"size must have {model.pixels[0]} to {model.pixels[1]} pixels.")
    return width, height


def _wrong(message: str) -> ApiError:
    return ApiError(400, "InvalidParameter", message)
