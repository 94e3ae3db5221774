"""
The provider: one prompt of one server for each call.

The prompt's id is ours, chosen before the submit and noted with the server's address, so no submit is ever unknown: whoever goes
on with a call asks that server for that id. A prompt that its server knows nothing of never arrived, or died with the server; it
is submitted anew, which costs time and no money. An attempt that ends leaves its prompt where it is: the next fetches its result.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from jobdaemon.errors import (
    AnswerLostError,
    PermanentError,
    ProviderUnavailableError,
    RateLimitedError,
    RetryableError,
    SettingsError,
)
from jobdaemon.http import GuardedClient
from jobdaemon.ports import (
    CallDone,
    GenerateRequest,
    ImageMade,
    OnUnknownSubmit,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.providers.comfyui.answers import NAME, Finished, Waiting
from jobdaemon.providers.comfyui.pool import ServerPool
from jobdaemon.providers.comfyui.server import ComfyServer, FileGoneError
from jobdaemon.providers.comfyui.sockets import PromptSocket, Sockets
from jobdaemon.providers.comfyui.workflow import parse_workflow, seed_of
from jobdaemon.providers.photo_fit import PhotoBounds, PhotoFitter
from jobdaemon.settings_generate import ComfyUISettings
from jobdaemon.spool import Spool

#: So many failed questions in a row, and a server counts as gone.
_STRIKES = 3
#: A server takes 100 MB (--max-upload-size), the form around the photo included. LoadImage has no bound of its own.
PHOTO_BOUNDS = PhotoBounds(max_bytes=100_000_000)


class ComfyUIProvider:
    """See the module docstring."""

    name = NAME
    #: Work is lost at worst, no money: the prompt goes on when its attempt is cut, and its result is fetched later.
    is_paid = False
    on_unknown_submit: OnUnknownSubmit = "retry"

    def __init__(
        self,
        settings: ComfyUISettings,
        *,
        client: GuardedClient,
        max_image_bytes: int,
        spool: Callable[[], Spool] = Spool,
        call_timeout: timedelta = timedelta(seconds=60),
    ) -> None:
        """
        Args:
            client: may reach the servers.
            spool: makes an empty one, for an image.
            call_timeout: the longest any one HTTP call may take.

        Raises:
            SettingsError: no server, or a workflow that cannot serve orders; one sentence.
        """
        if not settings.servers or settings.workflow is None:
            raise SettingsError("generate.comfyui needs servers and workflow")
        try:
            text = settings.workflow.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise SettingsError(f"generate.comfyui.workflow: {settings.workflow} cannot be read: {reason}") from None
        self.max_images_per_call = settings.images_per_call
        try:
            self._workflow = parse_workflow(text, name=str(settings.workflow), images_per_call=settings.images_per_call)
        except SettingsError as error:
            raise SettingsError(f"generate.comfyui.workflow: {error}") from None
        self._settings = settings
        self._max_image_bytes = max_image_bytes
        self._photos = PhotoFitter(NAME, PHOTO_BOUNDS)
        self._sockets = Sockets()
        urls = dict.fromkeys(settings.servers)
        self._pool = ServerPool(
            [ComfyServer(url, client=client, sockets=self._sockets, call_timeout=call_timeout, spool=spool) for url in urls]
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Follow the prompt that an earlier attempt left, else submit one to the least busy server that takes it.

        Raises:
            ProviderUnavailableError: no server is up, or the prompt failed, was lost or is not done in time. Retryable.
            DeviceMemoryError: the server's device could not hold it. Retryable.
            RateLimitedError: the prompt still waits behind others after all that time.
            ProviderRefusedError: no server can run the workflow. Permanent.
        """
        if request.resume is not None:
            left = await self._left(request.resume)
            if left is not None:
                yield CallDone()
                async with aclosing(self._collected(*left, request.resume.images)) as events:
                    async for event in events:
                        yield event
                return
            yield TaskOver()
            if "@" not in (request.resume.task_id or ""):
                raise ProviderUnavailableError(f"{NAME}: the call of an earlier attempt has an id that names no server")
        fitted = await self._photos.fit(request.photo, request.load_photo)
        photo, artifact = await fitted.load(), fitted.artifact
        images = [index for index, _ in request.images]
        tried: dict[ComfyServer, Exception] = {}
        while True:
            async with self._pool.place(tried) as place:
                server, prompt_id = place.server, str(uuid.uuid4())
                try:
                    name = await server.upload(photo, digest=artifact.sha256, media_type=artifact.media_type)
                except (RetryableError, PermanentError) as error:
                    tried[server] = error
                    continue
                async with server.listening(prompt_id) as socket:
                    yield Submitting(_task_id(server, prompt_id))
                    try:
                        socket.prompt_id = await _submitted(server, prompt_id, self._nodes(request, name, prompt_id))
                    except AnswerLostError:
                        raise  # the next attempt asks that server for it
                    except (RetryableError, PermanentError) as error:
                        tried[server] = error
                        yield TaskOver()
                        continue
                    place.queued()
                    yield TaskAccepted(_task_id(server, socket.prompt_id))
                    try:
                        end = await self._followed(server, socket, is_new=True)
                    except _SilentServerError as error:
                        raise ProviderUnavailableError(str(error)) from error
            if end is None:
                yield TaskOver()
                raise ProviderUnavailableError(f"{NAME}: {server.url} lost the prompt: was it restarted, or its queue cleared?")
            yield CallDone()
            async with aclosing(self._collected(server, end, images)) as events:
                async for event in events:
                    yield event
            return

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:  # noqa: ARG002 - the id is known before
        return None

    async def cancel(self, call: ProviderCall) -> bool:
        server, prompt_id = self._task(call)
        return server is not None and await server.stop(prompt_id)

    async def close(self) -> None:
        """Close the websockets; the shared client is its owner's."""
        await self._sockets.close()

    def _task(self, call: ProviderCall) -> tuple[ComfyServer | None, str]:
        """The server and the prompt of ``<prompt id>@<server>``; no server when the settings do not name it any more."""
        prompt_id, _, url = (call.task_id or "").partition("@")
        return self._pool.named(url), prompt_id

    def _nodes(self, request: GenerateRequest, image: str, prompt_id: str) -> dict[str, Any]:
        first = request.images[0][0]
        return self._workflow.filled(
            {
                "prompt": request.prompt,
                "image": image,
                "seed": seed_of(request.order_id, first, request.prompt),
                "width": self._settings.width,
                "height": self._settings.height,
                "count": len(request.images),
                # Another one for every try: ComfyUI skips nodes that it ran before with the same inputs and names their old
                # files, which somebody may have cleared away. So only the saving is done again.
                "filename_prefix": f"jobdaemon/{request.order_id}-{first:03d}-{prompt_id[:8]}",
            }
        )

    async def _left(self, call: ProviderCall) -> tuple[ComfyServer, Finished] | None:
        """What became of an earlier attempt's prompt, once it is over; None when nothing will come of it."""
        server, prompt_id = self._task(call)
        if server is None:
            return None
        async with server.listening(prompt_id) as socket:
            try:
                end = await self._followed(server, socket, is_new=False)
            except _SilentServerError as error:
                if await self._pool.is_any_up(without=server):
                    return None
                raise ProviderUnavailableError(str(error)) from error
        return None if end is None else (server, end)

    async def _followed(self, server: ComfyServer, socket: PromptSocket, *, is_new: bool) -> Finished | None:
        """
        Wait until the prompt is over; None when its server knows nothing of it.

        Args:
            is_new: it was submitted just now, so that asking at once is too early.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.task_timeout.total_seconds()
        place, failures, is_too_early = Waiting(is_running=False), 0, is_new
        while True:
            if is_too_early:
                await socket.listen(min(self._settings.poll.total_seconds(), max(0.0, deadline - loop.time())))
            is_too_early = True
            try:
                state = await server.look(socket.prompt_id)
            except RetryableError as error:
                failures += 1
                if failures == _STRIKES:
                    raise _SilentServerError(str(error)) from error
            else:
                if not isinstance(state, Waiting):
                    return state
                place, failures = state, 0
            if loop.time() >= deadline:
                raise _late(server, place, self._settings.task_timeout)

    async def _collected(
        self, server: ComfyServer, end: Finished, images: Sequence[int]
    ) -> AsyncGenerator[ImageMade | TaskOver, None]:
        """
        Fetch what a prompt made, and say what went wrong with the rest.

        Args:
            images: the indexes that were asked for, in the order in which they were.
        """
        failure: Exception | None = None
        # What is not done yet cannot be told from what never will be: a prompt that ended makes nothing more.
        for index, file in zip(images, end.images, strict=False):
            try:
                content, media_type = await server.fetch(file, max_bytes=self._max_image_bytes)
            except (RetryableError, PermanentError) as error:
                failure = failure or error
            else:
                yield ImageMade(index, content, media_type)
        if end.error is not None or isinstance(failure, FileGoneError):
            yield TaskOver()
        if failure := end.error or failure:
            raise failure


class _SilentServerError(ProviderUnavailableError):
    """A server that has a prompt of ours does not answer."""


def _task_id(server: ComfyServer, prompt_id: str) -> str:
    return f"{prompt_id}@{server.url}"


async def _submitted(server: ComfyServer, prompt_id: str, nodes: Mapping[str, Any]) -> str:
    """The id under which the server has the prompt, asked for when its answer was lost."""
    try:
        return await server.submit(prompt_id, nodes)
    except AnswerLostError:
        if await server.look(prompt_id) is None:
            raise
        return prompt_id


def _late(server: ComfyServer, place: Waiting, patience: timedelta) -> RetryableError:
    """A prompt that never got its turn says that too many were sent, not that this one is at fault."""
    if place.is_running:
        return ProviderUnavailableError(f"{NAME}: {server.url} has not finished the prompt after {patience.total_seconds():g} s")
    return RateLimitedError(f"{NAME}: {server.url} has not come to the prompt after {patience.total_seconds():g} s")
