"""One ComfyUI server: its HTTP calls, and what it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

from jobdaemon.errors import ProviderUnavailableError
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.providers.comfyui.answers import (
    NAME,
    UPLOAD_FOLDER,
    Finished,
    ImageFile,
    Waiting,
    finished,
    queue_place,
    status_error,
    submit_error,
)
from jobdaemon.providers.comfyui.sockets import PromptSocket, Sockets
from jobdaemon.providers.wire import media_type_of
from jobdaemon.spool import Spool

#: The queue and the history repeat whole workflows. Ten calls may be told as much at once, and a daemon has 400 MB.
_MAX_JSON_BYTES = 16 * 1024 * 1024
_MAX_PROBE_BYTES = 64 * 1024
#: Longer than this to tell its load, and a server is taken to be down.
_PROBE_TIMEOUT = timedelta(seconds=5)
#: A file that did not come whole, or is not there yet, is asked for again after so many seconds.
_FETCH_RESTS_S = (0.2, 1.0)
_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp"}


class FileGoneError(ProviderUnavailableError):
    """The server has no such file any more: asking again is no use, making the image again is."""


class ComfyServer:
    """
    One server.

    Attributes:
        url: its address, without a slash at the end.
        calls: of this process that it has or will get.
        queued_calls: those among them that are in its queue.
    """

    def __init__(
        self, url: str, *, client: GuardedClient, sockets: Sockets, call_timeout: timedelta, spool: Callable[[], Spool]
    ) -> None:
        """
        Args:
            spool: makes an empty one, for an image.
        """
        self.url = url
        self.calls = self.queued_calls = 0
        self._client = client
        self._sockets = sockets
        self._timeout = call_timeout
        self._new_spool = spool

    async def load(self) -> int:
        """
        How many prompts it has to do, those of other people too.

        Raises:
            ProviderUnavailableError: it is down, or is no ComfyUI. Retryable.
        """
        answer = await self._call("GET", "/prompt", max_bytes=_MAX_PROBE_BYTES, timeout=min(_PROBE_TIMEOUT, self._timeout))
        facts = _object(answer).get("exec_info")
        remaining = facts.get("queue_remaining") if isinstance(facts, dict) else None
        if answer.status != 200 or not isinstance(remaining, int):
            raise ProviderUnavailableError(f"{NAME}: {answer.shown} answered {answer.status}, and not as ComfyUI does")
        return remaining

    async def upload(self, photo: bytes, *, digest: str, media_type: str) -> str:
        """
        Give it the photo; one that it has is sent in vain but not written again.

        Args:
            digest: of the photo, hexadecimal: two photos never share a name.

        Returns:
            What LoadImage takes.

        Raises:
            ProviderUnavailableError: Retryable.
            ProviderRefusedError: too large for it, for instance. Permanent.
        """
        name = f"{digest[:32]}{_SUFFIXES.get(media_type, '.png')}"
        answer = await self._call(
            "POST",
            "/upload/image",
            data={"type": "input", "subfolder": UPLOAD_FOLDER},
            files=[("image", (name, photo, media_type))],
        )
        if answer.status != 200:
            raise status_error(answer)
        body = _object(answer)
        stored, subfolder = body.get("name"), body.get("subfolder")
        if not isinstance(stored, str) or not stored:
            raise ProviderUnavailableError(f"{NAME}: {answer.shown} does not say where it put the photo")
        return f"{subfolder}/{stored}" if isinstance(subfolder, str) and subfolder else stored

    async def submit(self, prompt_id: str, nodes: Mapping[str, Any]) -> str:
        """
        Queue a prompt.

        Returns:
            Its id: *prompt_id*, or one of the server's own choice where it is too old to take ours.

        Raises:
            AnswerLostError: it may be queued. Retryable.
            ProviderUnavailableError, RateLimitedError: it is not. Retryable.
            ProviderRefusedError: the workflow cannot run there. Permanent.
        """
        answer = await self._call("POST", "/prompt", payload={"prompt": nodes, "prompt_id": prompt_id, "client_id": prompt_id})
        if answer.status not in (200, 400):
            raise status_error(answer, is_submit=True)
        body = _object(answer)
        accepted = body.get("prompt_id")
        if (error := submit_error(body, answer.shown)) is not None:
            if isinstance(accepted, str):
                # One of its outputs was valid: it was queued all the same.
                await self.stop(accepted)
            raise error
        if answer.status != 200:
            raise status_error(answer)
        return accepted if isinstance(accepted, str) and accepted else prompt_id

    async def look(self, prompt_id: str) -> Finished | Waiting | None:
        """
        What became of a prompt; None when the server knows nothing of it.

        Raises:
            ProviderUnavailableError, RateLimitedError: it cannot say now. Retryable.
        """
        if (end := await self._end(prompt_id)) is not None:
            return end
        if (place := queue_place(await self._asked("/queue"), prompt_id)) is not None:
            return place
        # Between the two questions it may have moved from there to here.
        return await self._end(prompt_id)

    async def _end(self, prompt_id: str) -> Finished | None:
        entry = (await self._asked(f"/history/{prompt_id}")).get(prompt_id)
        return finished(entry, self.url) if isinstance(entry, dict) else None

    async def stop(self, prompt_id: str) -> bool:
        """
        Take a prompt out of the queue or interrupt it; whether it was there.

        Raises:
            ProviderUnavailableError, RateLimitedError: Retryable.
        """
        place = queue_place(await self._asked("/queue"), prompt_id)
        if place is None:
            return False
        if not place.is_running:
            await self._told("/queue", {"delete": [prompt_id]})
            place = queue_place(await self._asked("/queue"), prompt_id)
        # Only when it is the running one: old versions interrupt whatever runs.
        if place is not None and place.is_running:
            await self._told("/interrupt", {"prompt_id": prompt_id})
        return True

    async def fetch(self, image: ImageFile, *, max_bytes: int) -> tuple[Spool, str]:
        """
        The bytes and the media type of an image that it made.

        Raises:
            FileGoneError: it is not there any more. Retryable, by making it again.
            ProviderUnavailableError: not whole, no image, or larger than *max_bytes*. Retryable.
        """
        for rest_s in _FETCH_RESTS_S:
            try:
                return await self._fetch(image, max_bytes)
            except ProviderUnavailableError:
                await asyncio.sleep(rest_s)
        return await self._fetch(image, max_bytes)

    async def _fetch(self, image: ImageFile, max_bytes: int) -> tuple[Spool, str]:
        spool = self._new_spool()
        query = urlencode({"filename": image.filename, "subfolder": image.subfolder, "type": image.kind})
        answer = await self._call("GET", f"/view?{query}", max_bytes=max_bytes, into=spool)
        if answer.status == 404:
            raise FileGoneError(f"{NAME}: {answer.shown} has no {image.filename} any more")
        if answer.status != 200:
            raise status_error(answer)
        media_type = media_type_of(spool.head(16))
        if media_type is None:
            raise ProviderUnavailableError(f"{NAME}: {answer.shown} sent something that is neither PNG, JPEG nor WebP")
        if not _is_whole(spool, media_type):
            raise ProviderUnavailableError(f"{NAME}: {answer.shown} sent an image that ends in the middle")
        return spool, media_type

    @asynccontextmanager
    async def listening(self, prompt_id: str) -> AsyncIterator[PromptSocket]:
        """Its websocket for one prompt, if it opens one."""
        async with self._sockets.open(self.url, prompt_id) as socket:
            yield socket

    async def _asked(self, path: str) -> Mapping[str, Any]:
        answer = await self._call("GET", path)
        if answer.status != 200:
            raise status_error(answer)
        return _object(answer)

    async def _told(self, path: str, body: Mapping[str, Any]) -> None:
        answer = await self._call("POST", path, payload=body)
        if answer.status != 200:
            raise status_error(answer)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int = _MAX_JSON_BYTES,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - one for everything
        **body: Any,
    ) -> Answer:
        return await self._client.call(method, self.url + path, max_bytes=max_bytes, timeout=timeout or self._timeout, **body)


def _object(answer: Answer) -> Mapping[str, Any]:
    body = answer.json()
    if not isinstance(body, dict):
        raise ProviderUnavailableError(f"{NAME}: {answer.shown} answered {answer.status} with JSON, but not as ComfyUI does")
    return body


def _is_whole(image: Spool, media_type: str) -> bool:
    """Whether the end of an image is there; a file that is being written, or was cut, has none."""
    match media_type:
        case "image/png":
            return b"IEND" in image.tail(32)
        case "image/webp":
            return image.size_bytes >= int.from_bytes(image.head(8)[4:], "little") + 8
        case _:
            return b"\xff\xd9" in image.tail(1024)
