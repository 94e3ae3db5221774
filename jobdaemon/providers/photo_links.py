"""
How a provider that does not take the photo's bytes gets the photo: :class:`jobdaemon.ports.PhotoLinks`.

    InlineLinks     in the request itself, as a data: URL
    StoreLinks      a signed link into the artifact store
    SuperbedLinks   uploaded to Superbed, the first time that a photo is asked for; deleted there once its order has ended
    one_at_a_time   any of them, for a provider that does not stand parallel uploads
"""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from weakref import WeakValueDictionary

from jobdaemon.domain.artifact import EXTENSIONS, Artifact
from jobdaemon.errors import DatabaseUnavailableError, JobdaemonError
from jobdaemon.ports import PhotoLinks, UploadedPhotos
from jobdaemon.providers.superbed import Superbed

#: A task may stand in a provider's queue for a while before its photo is fetched.
LINK_LIFETIME = timedelta(hours=2)
#: Links that are remembered, the oldest forgotten first.
_REMEMBERED = 1_000
#: A link at Superbed is given for so long; how long it works nobody says, and somebody may clear the album.
_REUSED = timedelta(hours=1)
#: An upload that nobody wants any more is waited for so long.
_LINGER_S = 5.0
_NOTHING = object()


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
    A link at Superbed; one photo of an order is uploaded once, however many calls want it, on however many daemons.

    A lost answer is asked again, since nobody can be asked what became of it: then the photo lies there twice.
    """

    def __init__(self, superbed: Superbed, photos: UploadedPhotos | None) -> None:
        """
        Args:
            photos: knows what lies there, so that somebody deletes it; None where no link will be asked for.
        """
        self._superbed = superbed
        self._known = photos
        #: One lock per photo for as long as somebody wants it: a failed upload is tried again by the next in line.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def link(
        self,
        photo: Artifact,
        load_photo: Callable[[], Awaitable[bytes]],
        *,
        is_kept: bool = True,  # noqa: ARG002 - nobody can fetch from where it is kept
    ) -> str:
        lock = self._locks.setdefault(photo.key, asyncio.Lock())
        async with lock:
            known = await self._photos.find(photo.key, max_age=_REUSED)
            if known is not None:
                return known
            content = await load_photo()
            upload = asyncio.ensure_future(self._uploaded(photo, content))
            try:
                return await asyncio.shield(upload)
            except asyncio.CancelledError:
                # What arrives there is a customer's photo: it is noted, so that it is deleted.
                await asyncio.wait({upload}, timeout=_LINGER_S)
                raise
            finally:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)

    async def forget(self, photo: Artifact, load_photo: Callable[[], Awaitable[bytes]]) -> bool:  # noqa: ARG002 - uploaded again
        return await self._photos.forget(photo.key)

    @property
    def _photos(self) -> UploadedPhotos:
        if self._known is None:
            raise RuntimeError("these links are for looking at the settings only")
        return self._known

    async def _uploaded(self, photo: Artifact, content: bytes) -> str:
        name = f"{photo.sha256[:16]}.{EXTENSIONS.get(photo.media_type, 'bin')}"
        link = await self._superbed.upload(name, content, photo.media_type)
        try:
            await self._photos.note(photo.key, link)
        except DatabaseUnavailableError:
            with suppress(JobdaemonError):
                await self._superbed.delete(link)
            raise
        return link


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
