"""
Buys images at DashScope.

    POST /api/v1/services/aigc/<path>     submit; :mod:`.models` says where and what
    GET  /api/v1/tasks/<id>               poll
    GET  /api/v1/tasks                    look for a submit whose answer was lost
    POST /api/v1/tasks/<id>/cancel        while it is PENDING

Tasks and links live for a day; a task that is only slow is never submitted again. Models without tasks answer when they are
done: of their lost answers nothing can be found out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

from jobdaemon.errors import KeyMissingError, PhotoRefusedError, ProviderRefusedError, ProviderUnavailableError, SettingsError
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.ports import (
    CallDone,
    GenerateRequest,
    ImageMade,
    OnUnknownSubmit,
    PhotoLinks,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.providers.dashscope import answers
from jobdaemon.providers.dashscope.models import body_of, mark, route_of
from jobdaemon.providers.photo_fit import FittedLinks, PhotoFitter
from jobdaemon.providers.wire import polled
from jobdaemon.settings_generate import DashScopeSettings

#: Of a link and of a task, from the submit on. Source: every model's reference.
_LIFETIME = timedelta(hours=24)
#: Answers are addresses and counts.
_MAX_ANSWER_BYTES = 1024 * 1024
_SUBMIT_TIMEOUT = timedelta(seconds=60)
_QUESTION_TIMEOUT = timedelta(seconds=30)
#: A lost submit is looked for among the tasks made so long before or after it: two clocks are compared.
_SEARCH_WINDOW = timedelta(minutes=15)
_SEARCH_PAGES, _SEARCH_PAGE_SIZE, _SEARCH_TASKS = 10, 100, 20


class DashScopeProvider:
    """Implements :class:`jobdaemon.ports.Provider`."""

    name = answers.NAME
    is_paid = True

    def __init__(
        self,
        settings: DashScopeSettings,
        *,
        keys: Mapping[str, str],
        client: GuardedClient,
        links: PhotoLinks,
    ) -> None:
        """
        Args:
            keys: alias -> secret; the first one serves requests that name none.
            client: shared, and left open.
            links: how the service gets the photo.

        Raises:
            SettingsError: no key, one that no header can carry, or an unknown model.
        """
        if not keys:
            raise SettingsError("generate.dashscope.api_key must be set")
        for alias, key in keys.items():
            if not re.fullmatch(r"[!-~]+", key):
                raise SettingsError(f"generate.dashscope: the key {alias} has characters that no key has")
        self._route = route_of(settings.model)
        self.max_images_per_call = min(settings.images_per_call, self._route.max_images)
        self.on_unknown_submit: OnUnknownSubmit = settings.on_unknown_submit
        self._settings = settings
        self._api = settings.base_url.rstrip("/").removesuffix("/api/v1") + "/api/v1"
        self._keys = dict(keys)
        self._client = client
        self._links = FittedLinks(links, PhotoFitter(self.name, self._route.photo))
        self._pace = _Pace(settings.polls_per_second)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Buy the images of *request*, in one call unless they are more than the model makes at once; or go on with a task.

        Raises:
            What the port says.
        """
        secret = self._key(request.key)
        photo = None
        if request.resume is None and self._route.takes_photo:
            photo = await self._links.link(request.photo, request.load_photo)
        going = self._bought(request, photo, secret) if request.resume is None else self._resumed(request.resume, secret)
        try:
            async with aclosing(going) as events:
                async for event in events:
                    yield event
        except PhotoRefusedError as error:
            if not self._route.takes_photo or not await self._links.forget(request.photo, request.load_photo):
                raise
            raise ProviderUnavailableError(f"{error}; the photo's link is made anew") from error

    async def _resumed(self, call: ProviderCall, secret: str) -> AsyncGenerator[ProviderEvent, None]:
        events, error = await self._ended(call.task_id or "", call.images, call.submitted_at, secret)
        yield CallDone()
        for event in events:
            yield event
        if error is not None:
            raise error

    async def _bought(self, request: GenerateRequest, photo: str | None, secret: str) -> AsyncGenerator[ProviderEvent, None]:
        for start in range(0, len(request.images), self.max_images_per_call):
            images = request.images[start : start + self.max_images_per_call]
            is_last = start + len(images) == len(request.images)
            indexes = [index for index, _ in images]
            body = self._body(request, images, photo)
            yield Submitting()
            submitted_at = datetime.now(UTC)
            answer = await self._submit(body, secret)
            told = answers.read(answer, secret=secret, is_submit=True)
            if not self._route.is_async:
                if not (output := answers.output_of(told)):
                    raise answers.unreadable(answer, "an output", secret=secret)
                if is_last:
                    yield CallDone()
                made = list(answers.images_of(output, indexes, submitted_at + _LIFETIME, secret=secret))
                yield answers.charged_in(told, sum(isinstance(event, ImageMade) for event in made))
                for image in made:
                    yield image
                continue
            task_id = answers.task_id_of(told)
            if task_id is None:
                raise answers.unreadable(answer, "a task's id", secret=secret)
            yield TaskAccepted(task_id)
            events, error = await self._ended(task_id, indexes, submitted_at, secret)
            if is_last:
                yield CallDone()
            for event in events:
                yield event
            if error is not None:
                raise error

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:
        """
        The task whose prompt is that of *call*, mark and all; other tasks of the model tell nothing, however alone they are.

        Waits for tasks that are not finished, since only a finished one tells its prompt.

        Raises:
            What the port says.
        """
        if not self._route.tells_prompts:
            return None
        secret = self._key(call.key)
        # The call may have asked for the first of its images only.
        asked = call.images[: self.max_images_per_call]
        prompt = request.prompt + mark(request, asked)
        try:
            left = await self._tasks_near(call.submitted_at, secret)
        except ProviderRefusedError:
            return None  # a gateway without a list

        async def ask() -> str | None:
            for task_id in tuple(left):
                output = answers.output_of(await self._task(task_id, secret))
                if output["task_status"] in answers.ENDED:
                    left.remove(task_id)
                    if prompt in answers.prompts_of(output):
                        return task_id
            return None if left else ""

        found = await polled(
            ask, every=self._settings.poll, patience=self._settings.task_timeout, what=f"{self.name}: the search for a lost task"
        )
        return found or None

    async def cancel(self, call: ProviderCall) -> bool:
        if call.task_id is None:
            return False
        secret = self._key(call.key)
        try:
            await self._ask("POST", f"tasks/{quote(call.task_id, safe='')}/cancel", secret)
        except ProviderRefusedError:
            return False  # it runs, has ended, or is unknown
        return True

    async def close(self) -> None:
        """Nothing of its own to free."""

    def _key(self, alias: str | None) -> str:
        if alias is None:
            return next(iter(self._keys.values()))
        if alias not in self._keys:
            raise KeyMissingError(f"this daemon does not have the key {alias} of {self.name}")
        return self._keys[alias]

    def _body(self, request: GenerateRequest, images: Sequence[tuple[int, int]], photo: str | None) -> dict[str, Any]:
        settings = self._settings
        is_marked = self._route.tells_prompts
        return body_of(
            self._route,
            settings.model,
            request,
            prompt=request.prompt + (mark(request, [index for index, _ in images]) if is_marked else ""),
            photo=photo,
            images=images,
            size=settings.size,
            negative_prompt=settings.negative_prompt,
        )

    async def _submit(self, body: Mapping[str, Any], secret: str) -> Answer:
        is_async = self._route.is_async
        return await self._client.call(
            "POST",
            f"{self._api}/services/aigc/{self._route.path}",
            headers=self._headers(secret) | ({"X-DashScope-Async": "enable"} if is_async else {}),
            payload=body,
            max_bytes=_MAX_ANSWER_BYTES,
            timeout=_SUBMIT_TIMEOUT if is_async else self._settings.task_timeout,
        )

    async def _ended(
        self, task_id: str, indexes: Sequence[int], submitted_at: datetime, secret: str
    ) -> tuple[Sequence[ProviderEvent], Exception | None]:
        """Wait for the task's end: what it came to, and the error to raise after that."""

        async def ask() -> Mapping[str, Any] | None:
            body = await self._task(task_id, secret)
            return body if answers.output_of(body)["task_status"] in answers.ENDED else None

        settings = self._settings
        body = await polled(ask, every=settings.poll, patience=settings.task_timeout, what=f"{self.name}: task {task_id}")
        output = answers.output_of(body)
        images = list(answers.images_of(output, indexes, submitted_at + _LIFETIME, secret=secret))
        charged = answers.charged_in(body, sum(isinstance(event, ImageMade) for event in images))
        events: list[ProviderEvent] = [charged, *images]
        if output["task_status"] == "SUCCEEDED":
            return events, None
        return [*events, TaskOver()], answers.failure_of(task_id, output, secret=secret)

    async def _task(self, task_id: str, secret: str) -> Mapping[str, Any]:
        """
        What is said of a task; its ``output`` has a ``task_status``.

        Raises:
            RetryableError: and nothing else: what is wrong with a question says nothing of the task.
        """
        try:
            body = await self._ask("GET", f"tasks/{quote(task_id, safe='')}", secret)
        except ProviderRefusedError as error:
            raise ProviderUnavailableError(str(error)) from error
        output = answers.output_of(body)
        if not isinstance(output.get("task_status"), str):
            raise ProviderUnavailableError(f"{self.name}: an answer without a status of task {task_id}")
        return body

    async def _tasks_near(self, moment: datetime, secret: str) -> list[str]:
        """Ids of this model's tasks that may have been made at *moment*, the nearest ones first."""
        ids: dict[str, float] = {}
        for page in range(1, _SEARCH_PAGES + 1):
            # Without times: which zone they would be read in is not said. The list covers the last day.
            query = urlencode({"page_no": page, "page_size": _SEARCH_PAGE_SIZE, "model_name": self._settings.model})
            body = await self._ask("GET", f"tasks?{query}", secret)
            rows = [row for row in body.get("data") or () if isinstance(row, dict)]
            for row in rows:
                made, task_id = row.get("gmt_create"), row.get("task_id")
                if (
                    not isinstance(made, int | float)
                    or not isinstance(task_id, str)
                    or row.get("status") in ("FAILED", "CANCELED")
                ):
                    continue
                if (distance_s := abs(made / 1000 - moment.timestamp())) <= _SEARCH_WINDOW.total_seconds():
                    ids[task_id] = distance_s
            pages = body.get("total_page")
            if not rows or not isinstance(pages, int) or page >= pages:
                break
        return sorted(ids, key=lambda task_id: ids[task_id])[:_SEARCH_TASKS]

    async def _ask(self, method: str, path: str, secret: str) -> Mapping[str, Any]:
        await self._pace.turn()
        answer = await self._client.call(
            method,
            f"{self._api}/{path}",
            headers=self._headers(secret),
            max_bytes=_MAX_ANSWER_BYTES,
            timeout=_QUESTION_TIMEOUT,
        )
        return answers.read(answer, secret=secret)

    def _headers(self, secret: str) -> dict[str, str]:
        workspace = self._settings.workspace
        return {
            "Authorization": f"Bearer {secret}",
            "Accept": "application/json",
            **({} if workspace is None else {"X-DashScope-WorkSpace": workspace}),
        }


class _Pace:
    """Turns at an even distance, for whoever asks; in the order in which they ask."""

    def __init__(self, per_s: float) -> None:
        self._gap_s = 1.0 / per_s
        self._next_s = float("-inf")

    async def turn(self) -> None:
        """Wait for one's turn."""
        now_s = asyncio.get_running_loop().time()
        turn_s = self._next_s = max(now_s, self._next_s + self._gap_s)
        await asyncio.sleep(turn_s - now_s)
