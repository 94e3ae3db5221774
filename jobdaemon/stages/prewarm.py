"""Prewarming: a photo is beautified before anybody orders it, and an order for it copies what was made."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

from jobdaemon.domain.artifact import Artifact, prewarmed_key
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import PhotoPrewarmed
from jobdaemon.errors import (
    ArtifactMissingError,
    InvalidOrderError,
    NothingRetouchedError,
    StoreRefusedError,
    StoreUnavailableError,
    UnsupportedImageError,
)
from jobdaemon.ports import ArtifactStore, Attempt, BeautifiedPhoto, BeautifyBackend, Prewarmed, PrewarmedPhotos
from jobdaemon.stages.source import source_photo


class Prewarming:
    """What a daemon makes of photos beforehand, under its own settings only."""

    def __init__(
        self, rows: PrewarmedPhotos, store: ArtifactStore, backend: BeautifyBackend, *, strength: float, backend_key: str
    ) -> None:
        """
        Args:
            strength: 0.0 (untouched) to 1.0.
            backend_key: says what beautifies, and how: :func:`jobdaemon.domain.prewarm.backend_key`.
        """
        self._rows = rows
        self._store = store
        self._backend = backend
        self._strength = strength
        self._backend_key = backend_key

    async def beautified(self, photo: bytes) -> BeautifiedPhoto:
        """
        For an order: what was made of *photo* beforehand, else what the backend makes now.

        Nothing is waited for: where a prewarm of the photo runs at this moment, both make it. Raises what the store and the
        backend raise.
        """
        prewarmed = await self._taken(await _digest(photo))
        return prewarmed or await self._backend.beautify(photo, strength=self._strength)

    async def _taken(self, digest: str) -> BeautifiedPhoto | None:
        found = await self._rows.find(digest, self._backend_key)
        if found is None:
            return None
        try:
            content = await self._content(found)
        except (StoreUnavailableError, StoreRefusedError):
            return None  # without the copy the order is as well off as any other
        if content is None:
            return None
        await self._rows.used(found.id)
        return BeautifiedPhoto(
            content,
            found.artifact.media_type,
            found.width,
            found.height,
            found.faces,
            found.unrestored,
            found.model,
            found.device,
        )

    async def _content(self, found: Prewarmed) -> bytes | None:
        """What lies in the store, if it is what was made; else it is forgotten. Raises what the store raises."""
        try:
            content = await self._store.get(found.artifact.key, max_bytes=found.artifact.size_bytes)
        except (ArtifactMissingError, UnsupportedImageError):
            content = b""
        if await _digest(content) == found.artifact.sha256:
            return content
        await self._rows.forget(found.id)
        return None

    async def prewarm(self, photo: bytes, job_id: int, token: int) -> PhotoPrewarmed | None:
        """
        Beautify *photo* for whoever may order it; None where that was done before.

        Raises:
            NothingRetouchedError: every face came back as it was.
            What the store and the backend raise.
        """
        digest = await _digest(photo)
        found = await self._rows.find(digest, self._backend_key)
        if found is not None and await self._content(found) is not None:
            return None
        made = await self._backend.beautify(photo, strength=self._strength)
        if made.unrestored and not made.faces and self._strength > 0:
            # A device or a service short of memory does that. Kept, it would be the photo of every order for as long as it lies.
            faces = "face" if made.unrestored == 1 else f"{made.unrestored} faces"
            raise NothingRetouchedError(
                f"{self._backend.name} left the {faces} of the photo as before: there is nothing to keep."
            )
        key = prewarmed_key(digest, job_id, token)
        prewarmed = PhotoPrewarmed(
            digest,
            self._backend_key,
            Artifact(key, await _digest(made.content), len(made.content), made.media_type),
            width=made.width,
            height=made.height,
            faces=made.faces,
            unrestored=made.unrestored,
            model=made.model,
            device=made.device,
        )
        # Whoever stops or kills this attempt from here on leaves a portrait in the store, and a row that has it deleted.
        await self._rows.announce(prewarmed)
        await self._store.put(key, made.content, made.media_type)
        return prewarmed


class PrewarmStage:
    """One job per source that somebody had prewarmed; it belongs to no order."""

    def __init__(
        self, prewarming: Prewarming, store: ArtifactStore, fetch: Callable[[str], Awaitable[bytes]], *, max_photo_bytes: int
    ) -> None:
        """
        Args:
            fetch: downloads an https source, guarded and bounded.
        """
        self._prewarming = prewarming
        self._store = store
        self._fetch = fetch
        self._max_photo_bytes = max_photo_bytes

    async def run(self, attempt: Attempt) -> Done:
        """Raises what the store, the source's server and the backend raise, and InvalidOrderError for a job without a source."""
        source = attempt.job.args.get("source")
        if not isinstance(source, str):
            raise InvalidOrderError("this prewarm names no photo")
        photo = await source_photo(source, self._store, self._fetch, max_bytes=self._max_photo_bytes)
        assert attempt.job.token is not None  # it runs
        made = await self._prewarming.prewarm(photo, attempt.job.id, attempt.job.token)
        return Done() if made is None else Done(writes=(made,))


async def _digest(content: bytes) -> str:
    # Up to some 150 ms for the largest photo.
    return await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
