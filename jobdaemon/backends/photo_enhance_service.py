"""
The HTTP side of a photo enhance service: one photo up, its task asked for, the result down, the task deleted.

The service (PhotoEnhanceAI and what speaks like it) has two dialects, that of its code and that of its documentation; both are
understood. It computes inside its event loop: while it works on a photo, anybody's, it answers nothing at all. So silence is no
failure here, and only an answer, or a connection that ends at once, says anything.

What is away is told apart from what dies of a photo. Where no connection can be made, or a gateway has nobody behind it, the
photo is innocent. Where the photo was sent and the connection broke, it may not be; but whether the service is back is asked
before it, or any other, is sent again.

Source: api/main.py and docs/API_REFERENCE.md of github.com/Rsers/PhotoEnhanceAI, read 2025-10.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from jobdaemon.errors import (
    AnswerLostError,
    BackendAwayError,
    DeviceMemoryError,
    JobdaemonError,
    PermanentError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    RetryableError,
    UnreachableError,
)
from jobdaemon.http import Answer, GuardedClient, shown_url
from jobdaemon.redact import redact

NAME = "photo_enhance"
#: What the service takes: api/main.py, MAX_FILE_SIZE.
MAX_UPLOAD_BYTES = 50 * 1024 * 1024
_MAX_JSON_BYTES = 256 * 1024
#: It becomes part of a URL.
_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
#: A question that was open for longer and then failed met a service at work, not one that is gone.
_SILENCE_S = 5.0
#: A message of the service is quoted, never repeated whole.
_QUOTED_CHARACTERS = 200
#: A gateway that gave up waiting: the same silence, told by somebody else.
_GAVE_UP_WAITING = (408, 504, 524)
#: The longest a service in doubt is asked whether it is there; silent for so long, it is.
_DOUBT = timedelta(seconds=10)
#: Answers to an upload that this photo will get again.
_REFUSALS = (400, 413, 415, 422)
#: What is not there, or not open to us: a proxy before a service that is being replaced, or a wrong address. Any photo gets that.
_NOT_THERE = (401, 404, 405, 407, 503)


class TaskGoneError(Exception):
    """The service does not know the task, or has lost its result: it was restarted, or somebody cleared it."""


@dataclass(frozen=True, slots=True)
class TaskState:
    """
    What the service says of a task.

    Attributes:
        is_done: it can be fetched.
        error: what it failed with, if it did.
    """

    is_done: bool
    error: RetryableError | None = None


_UNDER_WAY = TaskState(is_done=False)


class EnhanceService:
    """One service, by its address."""

    def __init__(self, url: str, client: GuardedClient, *, max_result_bytes: int) -> None:
        """
        Args:
            url: without a slash at the end and without ``/api/v1``.
            client: may reach it; closed with this.
        """
        self.url = url
        self._client = client
        self._max_result_bytes = max_result_bytes
        #: What was last heard of it was trouble.
        self._is_in_doubt = False

    async def close(self) -> None:
        """Free the connections."""
        await self._client.close()

    async def check(self, *, within: timedelta) -> None:
        """
        Ask whether it is well; one that takes the question and stays silent is at work.

        Raises:
            ProviderUnavailableError: it is not there, or not well.
        """
        if not (answer := await self._answer_unless_at_work("GET", "/health", within)):
            return
        if answer.status != 200 or _object(answer).get("status") not in ("healthy", "ok"):
            raise ProviderUnavailableError(f"{answer.shown} does not say that it is well ({answer.status}).")

    async def submit(self, photo: bytes, *, within: timedelta) -> str:
        """
        Upload a JPEG; returns its task's id.

        Raises:
            ProviderRefusedError: it will not take this photo. Permanent.
            RateLimitedError: it is at capacity. Retryable.
            BackendAwayError: it is away, and has not seen the photo. Retryable.
            ProviderUnavailableError: no answer, or none that makes sense. Retryable.
        """
        if self._is_in_doubt:
            await self._require_there(min(_DOUBT, within))
        # Extension and type both count, and the name becomes part of a path over there.
        files = [("file", ("photo.jpg", photo, "image/jpeg"))]
        try:
            answer = await self._call("POST", "/api/v1/enhance", within, files=files)
        except UnreachableError as error:
            raise BackendAwayError(str(error)) from error
        if not 200 <= answer.status < 300:
            raise _upload_error(answer)
        task_id = _object(answer).get("task_id")
        if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id):
            raise ProviderUnavailableError(f"{answer.shown} took a photo and named no task.")
        return task_id

    async def ask(self, task_id: str, *, within: timedelta) -> TaskState:
        """
        How a task is getting on; a service that is silent is at work.

        Raises:
            TaskGoneError: it does not know the task.
            RateLimitedError, ProviderUnavailableError: Retryable.
        """
        answer = await self._answer_unless_at_work("GET", f"/api/v1/status/{task_id}", within)
        if answer is None:
            return _UNDER_WAY
        if answer.status == 404:
            raise TaskGoneError
        if answer.status != 200:
            raise _status_error(answer)
        return _state(_object(answer))

    async def fetch(self, task_id: str, *, within: timedelta) -> bytes | None:
        """
        The result of a task that is done, as it was sent: who knows what it is. None when the service was silent for all of
        *within*: it has begun to work on another photo.

        Raises:
            TaskGoneError: there is none any more.
            RateLimitedError, ProviderUnavailableError: Retryable; also when it is too large.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + 0.9 * within.total_seconds()
        try:
            answer = await self._call("GET", f"/api/v1/download/{task_id}", within, max_bytes=self._max_result_bytes)
        except ProviderUnavailableError:
            # What broke off before that may be too large, and would be so again.
            if loop.time() >= ends_at:
                return None
            raise
        if answer.status in _GAVE_UP_WAITING:
            return None
        if answer.status == 404:
            raise TaskGoneError
        if answer.status != 200:
            raise _status_error(answer)
        return answer.content

    async def delete(self, task_id: str, *, within: timedelta) -> None:
        """
        Have a task of one photo forgotten, with its files. Never one of a batch: with that the service deletes everything.

        Raises:
            ProviderUnavailableError: nobody knows whether it was. Retryable.
        """
        await self._call("DELETE", f"/api/v1/tasks/{task_id}", within)

    async def _require_there(self, within: timedelta) -> None:
        """
        Raises:
            RateLimitedError: it, or what is before it, is at capacity.
            BackendAwayError: it is not there, or a gateway says so.
        """
        try:
            answer = await self._answer_unless_at_work("GET", "/health", within)
        except ProviderUnavailableError as error:
            raise BackendAwayError(str(error)) from error
        # One that has no such address answers, too.
        if answer is not None and answer.status >= 500:
            told = _status_error(answer)
            raise told if isinstance(told, RateLimitedError) else BackendAwayError(str(told))

    async def _answer_unless_at_work(self, method: str, path: str, within: timedelta) -> Answer | None:
        """The answer; None when there was silence, or a gateway tells of it."""
        loop = asyncio.get_running_loop()
        silent_from = loop.time() + min(_SILENCE_S, 0.9 * within.total_seconds())
        try:
            answer = await self._call(method, path, within)
        except ProviderUnavailableError:
            if loop.time() >= silent_from:
                return None
            raise
        return None if answer.status in _GAVE_UP_WAITING else answer

    async def _call(
        self, method: str, path: str, within: timedelta, *, max_bytes: int = _MAX_JSON_BYTES, files: Any = None
    ) -> Answer:
        # No redirect is followed: a service that sends us elsewhere is not what the settings name.
        url = f"{self.url}{path}"
        try:
            answer = await self._client.call(method, url, files=files, max_bytes=max_bytes, timeout=within)
        except ProviderUnavailableError as error:
            self._is_in_doubt = True
            if isinstance(error, AnswerLostError):
                # Nothing was bought: that it may have done what was asked costs nobody anything.
                raise ProviderUnavailableError(str(error), retry_after=error.retry_after) from error
            raise
        except PermanentError as error:
            # What the guard refuses is the operator's address, and none of the order's business.
            raise ProviderUnavailableError(f"{shown_url(url)} may not be called: {error}") from error
        self._is_in_doubt = answer.status >= 500
        return answer


def _upload_error(answer: Answer) -> JobdaemonError:
    if answer.status not in _REFUSALS:
        error = _status_error(answer)
        is_away = answer.status in _NOT_THERE or 300 <= answer.status < 400
        return BackendAwayError(str(error)) if is_away and isinstance(error, ProviderUnavailableError) else error
    hint = " Lower beautify.photo_enhance.max_pixels, or raise the limit of the proxy before it." if answer.status == 413 else ""
    return ProviderRefusedError(f"{answer.shown} refused the photo ({answer.status}{_detail(answer)}).{hint}")


def _status_error(answer: Answer) -> RetryableError:
    wait = answer.retry_after
    if answer.status == 429 or (answer.status == 503 and wait is not None):
        return RateLimitedError(f"{answer.shown} is at capacity ({answer.status}).", retry_after=wait)
    hint = " Is beautify.photo_enhance.url right?" if 300 <= answer.status < 500 else ""
    return ProviderUnavailableError(f"{answer.shown} answered {answer.status}{_detail(answer)}.{hint}", retry_after=wait)


def _detail(answer: Answer) -> str:
    """What a JSON answer says of an error, after a colon; nothing of a page."""
    try:
        body = answer.json()
    except ProviderUnavailableError:
        return ""
    detail = body.get("detail") if isinstance(body, dict) else None
    return f": {_quoted(detail)}" if isinstance(detail, str) and detail else ""


def _quoted(text: str) -> str:
    words = redact(" ".join(text.split())).rstrip(".")
    return words if len(words) <= _QUOTED_CHARACTERS else words[: _QUOTED_CHARACTERS - 1] + "…"


def _object(answer: Answer) -> dict[str, Any]:
    body = answer.json()
    if not isinstance(body, dict):
        raise ProviderUnavailableError(f"{answer.shown} answered with JSON that is no object.")
    return body


def _state(body: dict[str, Any]) -> TaskState:
    """Whatever is neither done nor over goes on: ``queued``, ``pending``, ``processing``, and words nobody knows yet."""
    match body.get("status"):
        case "completed":
            return TaskState(is_done=True)
        case "failed" | "cancelled" | "canceled" as status:
            return TaskState(is_done=False, error=_task_error(str(status), body.get("error")))
    return _UNDER_WAY


def _task_error(status: str, told: object) -> RetryableError:
    """The photo was a clean JPEG of our own making, so what failed is the service."""
    why = f": {_quoted(told)}" if isinstance(told, str) and told.strip() else ""
    text = f"The task of {NAME} {'failed' if status == 'failed' else 'was cancelled'}{why}."
    return DeviceMemoryError(text) if "out of memory" in why.lower() else ProviderUnavailableError(text)
