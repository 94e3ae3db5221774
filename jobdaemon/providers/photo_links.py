"""
How a provider that does not take the photo's bytes gets the photo: :class:`jobdaemon.ports.PhotoLinks`.

    InlineLinks     in the request itself, as a data: URL
    StoreLinks      a signed link into the artifact store
    SuperbedLinks   uploaded to Superbed, the first time that a photo is asked for
    one_at_a_time   any of them, for a provider that does not stand parallel uploads

Superbed's API is known from its public clients only; what they agree on is relied on, its error numbers are not.
"""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

from jobdaemon.domain.artifact import EXTENSIONS, Artifact
from jobdaemon.errors import (
    AnswerLostError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
    StoreRefusedError,
)
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.ports import PhotoLinks
from jobdaemon.redact import MASK, redact
from jobdaemon.settings_generate import SuperbedSettings

#: A task may stand in a provider's queue for a while before its photo is fetched.
LINK_LIFETIME = timedelta(hours=2)
#: Links that are remembered, the oldest forgotten first.
_REMEMBERED = 1_000
_MAX_ANSWER_BYTES = 64 * 1024
_QUOTED_CHARACTERS = 200


class InlineLinks:
    """The photo itself as a ``data:`` URL."""

    async def link(
        self,
        photo: Artifact,
        load_photo: Callable[[], Awaitable[bytes]],
        *,
        is_kept: bool = True,  # noqa: ARG002 - it is sent anyway
    ) -> str:
        content = await load_photo()
        encoded = await asyncio.to_thread(base64.b64encode, content)
        return f"data:{photo.media_type};base64,{encoded.decode()}"


class StoreLinks:
    """A link into the artifact store that is signed for some hours; a photo that is not there is put there first, once."""

    def __init__(
        self, presign: Callable[[str, timedelta], Awaitable[str]], put: Callable[[str, bytes, str], Awaitable[Artifact]]
    ) -> None:
        """
        Args:
            presign: makes a URL that anybody can get a key with, for so long.
            put: stores bytes of a media type under a key; the same bytes again are a success.
        """
        self._presign = presign
        self._put = put
        self._kept: OrderedDict[str, None] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def link(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]], *, is_kept: bool = True) -> str:
        if not is_kept:
            lock = self._locks.setdefault(photo.key, asyncio.Lock())
            async with lock:
                if photo.key not in self._kept:
                    await self._put(photo.key, await load_photo(), photo.media_type)
                self._kept[photo.key] = None
                self._kept.move_to_end(photo.key)
                while len(self._kept) > _REMEMBERED:
                    self._kept.popitem(last=False)
        return await self._presign(photo.key, LINK_LIFETIME)


class SuperbedLinks:
    """
    A link at Superbed; one photo is uploaded once per daemon, however many calls want it at once.

    A lost answer is asked again, since nobody can be asked what became of it: then the photo lies there twice.
    """

    def __init__(self, settings: SuperbedSettings, client: GuardedClient) -> None:
        """
        Args:
            client: shared, and left open.

        Raises:
            SettingsError: no token.
        """
        if settings.token is None:
            raise SettingsError("superbed.token must be set")
        self._settings = settings
        self._token = settings.token.get_secret_value()
        self._client = client
        self._links: OrderedDict[str, str] = OrderedDict()
        #: One lock per photo for as long as somebody wants it: a failed upload is tried again by the next in line.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def link(
        self,
        photo: Artifact,
        load_photo: Callable[[], Awaitable[bytes]],
        *,
        is_kept: bool = True,  # noqa: ARG002 - nobody can fetch from where it is kept
    ) -> str:
        lock = self._locks.setdefault(photo.sha256, asyncio.Lock())
        async with lock:
            if photo.sha256 not in self._links:
                self._links[photo.sha256] = await self._upload(photo, await load_photo())
                while len(self._links) > _REMEMBERED:
                    self._links.popitem(last=False)
            self._links.move_to_end(photo.sha256)
            return self._links[photo.sha256]

    async def _upload(self, photo: Artifact, content: bytes) -> str:
        # The token as a field: in the URL, where most clients put it, it would end up in logs along the way.
        fields = {"token": self._token, "compress": "false", "watermark": "false", "webp": "false"}
        if self._settings.album is not None:
            fields["categories"] = self._settings.album
        name = f"{photo.sha256[:16]}.{EXTENSIONS.get(photo.media_type, 'bin')}"
        try:
            answer = await self._client.call(
                "POST",
                self._settings.url,
                data=fields,
                files=[("file", (name, content, photo.media_type))],
                max_bytes=_MAX_ANSWER_BYTES,
                timeout=self._settings.timeout,
            )
        except AnswerLostError as error:
            # Costs nothing to do twice; it must not look like a provider's call whose answer was lost.
            raise ProviderUnavailableError(f"superbed: {error}") from None
        return link_in(answer, secret=self._token)


def link_in(answer: Answer, *, secret: str) -> str:
    """
    The link that Superbed gave.

    Args:
        secret: the token, kept out of errors.

    Raises:
        ProviderRefusedError: it will not take this photo. Permanent.
        StoreRefusedError: it does not accept the token. Permanent.
        RateLimitedError, ProviderUnavailableError: Retryable.
    """
    shown = f"superbed ({answer.status})"
    if answer.status == 429:
        raise RateLimitedError(f"{shown}: we upload too often", retry_after=answer.retry_after)
    if answer.status in (401, 403):
        raise StoreRefusedError(f"{shown} does not accept the token: check superbed.token")
    if answer.status >= 500 or answer.status in (408, 425):
        raise ProviderUnavailableError(f"{shown} cannot take the photo now", retry_after=answer.retry_after)
    body = _object(answer, shown)
    words = redact(" ".join(str(body.get("msg") or "no reason given").replace(secret, MASK).split()))[:_QUOTED_CHARACTERS]
    if answer.status // 100 != 2 or body.get("err") != 0:
        # Its numbers are documented nowhere.
        raise ProviderRefusedError(f"{shown} did not take the photo: {words}")
    link = body.get("url") or _first(body.get("urls"))
    if not isinstance(link, str) or not link.startswith(("https://", "http://")):
        raise ProviderUnavailableError(f"{shown} took the photo without saying where it is")
    return link


def _object(answer: Answer, shown: str) -> dict[str, Any]:
    try:
        body = answer.json()
    except ProviderUnavailableError as error:
        if answer.status // 100 in (2, 3):
            raise
        raise ProviderRefusedError(f"{shown} did not take the photo: {error}") from None
    if not isinstance(body, dict):
        raise ProviderUnavailableError(f"{shown} answered with something else than an object")
    return body


def _first(urls: object) -> object:
    """Several links come as an object, or as a list."""
    values = list(urls.values()) if isinstance(urls, dict) else urls
    return values[0] if isinstance(values, list) and values else None


def one_at_a_time(links: PhotoLinks) -> PhotoLinks:
    """*links*, asked for one after another: who uploads references in parallel has connections reset."""
    return _OneAtATime(links)


class _OneAtATime:
    def __init__(self, links: PhotoLinks) -> None:
        self._links = links
        self._turn = asyncio.Lock()

    async def link(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]], *, is_kept: bool = True) -> str:
        async with self._turn:
            return await self._links.link(photo, load_photo, is_kept=is_kept)
