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
#: A link at Superbed is given for so long; how long it works nobody says, and somebody may clear the album.
_REUSED_S = 3600.0
_NOTHING = object()
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

    async def forget(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> bool:  # noqa: ARG002 - there is no link
        return False


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
        self._kept: OrderedDict[str, object] = OrderedDict()
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

    async def forget(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> bool:  # noqa: ARG002 - it is put again
        return self._kept.pop(photo.key, _NOTHING) is not _NOTHING


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
        #: Digest of a photo -> its link, and when it was made, by the loop's clock.
        self._links: OrderedDict[str, tuple[str, float]] = OrderedDict()
        #: Digests whose link was given more than once: one that does not work may have worked before.
        self._reused: set[str] = set()
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
            now_s = asyncio.get_running_loop().time()
            known = self._links.get(photo.sha256)
            if known is not None and now_s - known[1] < _REUSED_S:
                self._links.move_to_end(photo.sha256)
                self._reused.add(photo.sha256)
                return known[0]
            link = await self._upload(photo, await load_photo())
            self._links[photo.sha256] = (link, now_s)
            self._reused.discard(photo.sha256)
            while len(self._links) > _REMEMBERED:
                self._reused.discard(self._links.popitem(last=False)[0])
            return link

    async def forget(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> bool:  # noqa: ARG002 - uploaded again
        is_reused = photo.sha256 in self._reused
        self._links.pop(photo.sha256, None)
        self._reused.discard(photo.sha256)
        return is_reused

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

    async def forget(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> bool:
        return await self._links.forget(photo, load_photo)
