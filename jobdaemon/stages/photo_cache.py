"""The photos of the orders at work, in memory: all calls of an order send the same one, and a slot waits for it each time."""

from __future__ import annotations

from collections import OrderedDict

from jobdaemon.domain.artifact import Artifact
from jobdaemon.ports import ArtifactStore

#: Some ten photos of twelve megapixels. A larger one than this is fetched each time.
_KEPT_BYTES = 32_000_000


class PhotoCache:
    """The photos that were used last, as far as they have room."""

    def __init__(self, store: ArtifactStore, *, max_photo_bytes: int, kept_bytes: int = _KEPT_BYTES) -> None:
        """
        Args:
            max_photo_bytes: none is larger.
            kept_bytes: all together.
        """
        self._store = store
        self._max_photo_bytes = max_photo_bytes
        self._kept_bytes = self._room_bytes = kept_bytes
        self._photos: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    async def get(self, photo: Artifact) -> bytes:
        """Its bytes. Raises what the store raises."""
        name = photo.key, photo.sha256
        content = self._photos.get(name)
        if content is None:
            content = await self._store.get(photo.key, max_bytes=self._max_photo_bytes)
            # What is not what the store was given (a folder over a network that gave part of it) is this call's trouble alone.
            if len(content) == photo.size_bytes:
                self._keep(name, content)
        else:
            self._photos.move_to_end(name)
        return content

    def _keep(self, name: tuple[str, str], content: bytes) -> None:
        if len(content) > self._kept_bytes or name in self._photos:
            return
        self._photos[name] = content
        self._room_bytes -= len(content)
        while self._room_bytes < 0:
            _, oldest = self._photos.popitem(last=False)
            self._room_bytes += len(oldest)
