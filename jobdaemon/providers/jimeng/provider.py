"""
Volcengine Jimeng: a task is submitted, asked for until it is done, and gives links to its images, or the images themselves.

There is no list of tasks and no id that the caller may choose, so what became of a submit whose answer was lost can be asked of
nobody. A task is known for twelve hours, its links for twenty-four.

Its answers and errors: :mod:`jobdaemon.providers.jimeng.answers`. [D] and [C] as there.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from jobdaemon.errors import KeyMissingError, PhotoRefusedError, ProviderRefusedError, ProviderUnavailableError, SettingsError
from jobdaemon.http import GuardedClient
from jobdaemon.ports import (
    CallDone,
    Charged,
    GenerateRequest,
    ImageMade,
    ImageRefused,
    OnUnknownSubmit,
    PhotoLinks,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.providers.inline import InlineImages
from jobdaemon.providers.jimeng.answers import NAME, TaskEnd, Told, end_in, told_in
from jobdaemon.providers.jimeng.signature import KeyPair, canonical_query, signed_headers
from jobdaemon.providers.photo_fit import FittedLinks, PhotoBounds, PhotoFitter
from jobdaemon.providers.wire import Kind, error_of, polled
from jobdaemon.settings_generate import JimengSettings
from jobdaemon.spool import Spool

_LINK_LIFETIME = timedelta(hours=24)
_SUBMIT, _RESULT, _CANCEL = "CVSync2AsyncSubmitTask", "CVSync2AsyncGetResult", "CVCancelTask"
_VERSIONS = {_SUBMIT: "2022-08-31", _RESULT: "2022-08-31", _CANCEL: "2024-06-06"}
#: Of one request; a photo may travel in it.
_CALL_TIMEOUT = timedelta(seconds=60)
_MAX_FRAME_BYTES = 1024 * 1024
#: What a photo may be: 15 MB, which may be counted in thousands; 4096 x 4096; from 1:3 to 3:1. [D] for 4.0
PHOTO_BOUNDS = PhotoBounds(max_bytes=15_000_000, longest_side=4096, max_ratio=3.0, media_types=("image/jpeg", "image/png"))


@dataclass(frozen=True, slots=True)
class Model:
    """
    How one ``req_key`` wants its request.

    Attributes:
        takes_photo: else it makes images of the prompt alone.
        takes_inline: the photo may come in the request.
        makes_many: one call may make several images, unless it is told to make one.
        is_percent: ``scale`` is 1 to 100 and not 0.0 to 1.0.
    """

    takes_photo: bool = True
    takes_inline: bool = False
    makes_many: bool = False
    is_percent: bool = False


#: What is not here is asked as the newest one is. [D] for 4.0, [C] for the others.
MODELS: Mapping[str, Model] = {
    "jimeng_t2i_v40": Model(makes_many=True),
    "jimeng_seedream46_cvtob": Model(makes_many=True, is_percent=True),
    "jimeng_i2i_v30": Model(takes_inline=True),
    "jimeng_t2i_v31": Model(takes_photo=False),
    "jimeng_t2i_v30": Model(takes_photo=False),
    "jimeng_high_aes_general_v21_L": Model(takes_photo=False),
}


class JimengProvider:
    """Implements :class:`jobdaemon.ports.Provider`."""

    name = NAME
    is_paid = True

    def __init__(
        self,
        settings: JimengSettings,
        *,
        keys: Mapping[str, KeyPair],
        client: GuardedClient,
        links: PhotoLinks,
        max_image_bytes: int,
        spool: Callable[[], Spool] = Spool,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            keys: alias -> key pair; the first one serves requests that name none.
            client: shared, and left open.
            links: makes the photo available to the service.
            max_image_bytes: of one image that comes inline; an answer that holds more is given up.
            spool: makes an empty one, for an image that comes inline.
            clock: aware; what requests are signed with.

        Raises:
            SettingsError: no key, one that no header can carry, or a model that does not take the photo as it is set.
        """
        if not keys:
            raise SettingsError("generate.jimeng.access_key_id and secret_access_key must be set")
        for alias, pair in keys.items():
            if not re.fullmatch(r"[!-.0-~]+", pair.access_key_id) or not pair.secret_access_key:
                raise SettingsError(f"generate.jimeng: the key {alias} is not the two parts of an access key")
        self._model = MODELS.get(settings.req_key, MODELS["jimeng_t2i_v40"])
        if settings.photo == "inline" and self._model.takes_photo and not self._model.takes_inline:
            raise SettingsError(
                f'generate.jimeng.photo is "inline", but {settings.req_key} takes links only: set "store" or "superbed", or'
                " req_key to jimeng_i2i_v30"
            )
        self.max_images_per_call = settings.images_per_call if self._model.makes_many else 1
        self.on_unknown_submit: OnUnknownSubmit = settings.on_unknown_submit
        self._settings = settings
        self._keys = dict(keys)
        self._client = client
        self._links = FittedLinks(links, PhotoFitter(NAME, PHOTO_BOUNDS))
        self._max_image_bytes = max_image_bytes
        self._spool = spool
        self._clock = clock
        #: What this machine's clock lacks, as far as a refused request told: who signs by a wrong one is refused for ever.
        self._skew = timedelta(0)
        base = urlsplit(settings.base_url)
        self._host, self._path = base.netloc, f"{base.path}/"

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Buy the images of *request*, or ask for those of the task that it resumes.

        How many images a call makes that is not held to one is the prompt's affair: the rest is asked for in further calls, one
        after another, as long as each makes some.
        """
        if request.resume is not None:
            call = request.resume
            results = self._results(call.task_id or "", call.images, self._key(call.key), is_resumed=True)
            async with aclosing(results) as events:
                async for event in events:
                    if isinstance(event, Charged):
                        yield CallDone()
                    yield event
            return
        pair = self._key(request.key)
        photo = await self._photo(request)
        waiting = [index for index, _ in request.images]
        while waiting:
            batch = waiting[: self.max_images_per_call]
            yield Submitting()
            try:
                task_id = await self._submit(self._wish(request.prompt, photo, is_single=len(batch) == 1), pair)
            except PhotoRefusedError as error:
                if not photo or not await self._links.forget(request.photo, request.load_photo):
                    raise
                raise ProviderUnavailableError(f"{error}; the photo's link is made anew") from error
            yield TaskAccepted(task_id)
            async with aclosing(self._results(task_id, batch, pair)) as events:
                async for event in events:
                    if isinstance(event, Charged) and min(event.images, len(batch)) >= len(waiting):
                        yield CallDone()
                    if isinstance(event, ImageMade | ImageRefused):
                        waiting.remove(event.index)
                    yield event

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:  # noqa: ARG002 - nobody can be asked
        return None

    async def cancel(self, call: ProviderCall) -> bool:
        """Whether a model lets its tasks be cancelled is not documented; what it does not know it refuses."""
        told = await self._call(_CANCEL, self._named(call.task_id or ""), self._key(call.key))
        if told.error is not None and not isinstance(told.error, ProviderRefusedError):
            raise told.error
        return told.error is None

    async def close(self) -> None:
        """Nothing of its own to free."""

    def _key(self, alias: str | None) -> KeyPair:
        if alias is None:
            return next(iter(self._keys.values()))
        if alias not in self._keys:
            raise KeyMissingError(f"this daemon does not have the key {alias} of {self.name}")
        return self._keys[alias]

    async def _photo(self, request: GenerateRequest) -> Mapping[str, Any]:
        """The fields that give the photo."""
        if not self._model.takes_photo:
            return {}
        link = await self._links.link(request.photo, request.load_photo)
        if link.startswith("data:"):
            return {"binary_data_base64": [link.partition(",")[2]]}
        return {"image_urls": [link]}

    def _wish(self, prompt: str, photo: Mapping[str, Any], *, is_single: bool) -> Mapping[str, Any]:
        settings, model = self._settings, self._model
        wish: dict[str, Any] = {"req_key": settings.req_key, "prompt": prompt, **photo}
        wish |= {"width": settings.width, "height": settings.height}
        if model.takes_photo:
            wish["scale"] = max(1, round(settings.strength * 100)) if model.is_percent else settings.strength
        if model.makes_many:
            wish["force_single"] = is_single
        return wish

    def _named(self, task_id: str) -> dict[str, Any]:
        """A task is asked for with the model that it was submitted to, whatever is set by now."""
        req_key, _, number = task_id.rpartition(":")
        return {"req_key": req_key or self._settings.req_key, "task_id": number}

    async def _submit(self, wish: Mapping[str, Any], pair: KeyPair) -> str:
        """The new task, by a name that :meth:`_named` understands."""
        told = await self._call(_SUBMIT, wish, pair)
        if told.error is not None:
            raise told.error
        number = told.data.get("task_id")
        if not isinstance(number, str | int) or not re.fullmatch(r"[\w.-]{1,100}", str(number)):
            raise error_of(Kind.LOST, self.name, "it took the call without giving a task's id")
        return f"{self._settings.req_key}:{number}"

    async def _results(
        self, task_id: str, images: Sequence[int], pair: KeyPair, *, is_resumed: bool = False
    ) -> AsyncGenerator[ProviderEvent, None]:
        """
        What a task comes to, its results in the order of *images*.

        Raises:
            ProviderRefusedError: the content of a task of several images; for one image that is an event.
            RetryableError: after TaskOver where nothing more will come of it; else it is worth asking again.
        """
        trouble: Exception | None = None
        inline = self._inline(images)

        async def ask() -> TaskEnd | None:
            nonlocal trouble, inline
            inline = self._inline(images)
            named = self._named(task_id) | {"req_json": json.dumps({"return_url": True})}
            told = await self._call(_RESULT, named, pair, inline=inline)
            if told.error is None:
                return end_in(told.data)
            if told.is_verdict:
                return told.end
            trouble = told.error if told.code is not None else None
            if isinstance(told.error, ProviderRefusedError):
                # Some proxy's or gateway's no: it says nothing about the task.
                raise ProviderUnavailableError(str(told.error))
            raise told.error

        what = f"{self.name}: task {task_id[:100]}"
        try:
            end = await polled(ask, every=self._settings.poll, patience=self._settings.task_timeout, what=what)
        except ProviderUnavailableError as error:
            # Whether the service or this task is in trouble nobody can tell: a later attempt asks again before it buys again.
            if error is not trouble or not is_resumed:
                raise
            end = TaskEnd(error=error)
        if isinstance(end.error, ProviderRefusedError) and len(images) == 1:
            yield ImageRefused(images[0], str(end.error))
            return
        broken = end.error
        yield Charged(len(end.images))
        expires_at = self._clock() + _LINK_LIFETIME
        for index, image in zip(images, end.images, strict=False):
            try:
                made = image.event(index, inline, expires_at)
            except ProviderUnavailableError as error:
                broken = error
                continue
            yield made
        if broken is not None:
            yield TaskOver()
            raise broken

    def _inline(self, images: Sequence[int]) -> InlineImages:
        return InlineImages(self._spool, most=max(1, len(images)), max_bytes=self._max_image_bytes, provider=self.name)

    async def _call(self, action: str, body: Mapping[str, Any], pair: KeyPair, *, inline: InlineImages | None = None) -> Told:
        """
        Ask, signed with *pair*.

        Args:
            inline: takes the images that may come in the answer.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        query = {"Action": action, "Version": _VERSIONS[action]}
        skew = self._skew
        now = self._clock() + skew
        headers = signed_headers(pair, method="POST", host=self._host, path=self._path, query=query, body=content, now=now)
        answer = await self._client.call(
            "POST",
            f"{self._settings.base_url}/?{canonical_query(query)}",
            headers=headers,
            content=content,
            max_bytes=_MAX_FRAME_BYTES if inline is None else inline.max_answer_bytes,
            timeout=_CALL_TIMEOUT,
            into=inline,
        )
        if inline is not None:
            answer = replace(answer, content=answer.content or inline.rest())
        told = told_in(answer, is_submit=action == _SUBMIT, pair=pair, now=now)
        if told.drift is not None:
            # From what this request was signed with: others under way may have been told the same.
            self._skew = skew + told.drift
        return told
