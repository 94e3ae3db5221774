"""A provider whose images are bought once: what was made before is copied, and of several orders for one image one buys it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

from jobdaemon.domain.cache import cache_key, may_be_cached
from jobdaemon.errors import ArtifactMissingError, JobdaemonError, PermanentError, PutOffError, UnsupportedImageError
from jobdaemon.ports import (
    ArtifactStore,
    CachedImage,
    GenerateRequest,
    ImageCache,
    ImageMade,
    Provider,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.spool import Spool


class CachingProvider:
    """
    Implements :class:`jobdaemon.ports.Provider` around another one.

    Hits come before anything is submitted, so that a call asks for exactly what the cache does not have. For the same reason
    nothing is bought while another order is having one of the images made: the job is put off, and finds it later.
    """

    def __init__(
        self,
        provider: Provider,
        cache: ImageCache,
        store: ArtifactStore,
        *,
        spool: Callable[[], Spool],
        settings: Mapping[str, Any],
        hold: timedelta,
        ttl: timedelta,
        max_image_bytes: int,
    ) -> None:
        """
        Args:
            spool: makes an empty one.
            settings: those that shape the provider's images, as JSON has them.
            hold: as long as an attempt may take: others wait for so long for what one is having made.
            ttl: nothing older is given.
        """
        self.name = provider.name
        self.max_images_per_call = provider.max_images_per_call
        self.is_paid = provider.is_paid
        self.on_unknown_submit = provider.on_unknown_submit
        self._provider = provider
        self._cache = cache
        self._store = store
        self._spool = spool
        self._settings = settings
        self._hold = hold
        self._ttl = ttl
        self._max_image_bytes = max_image_bytes

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        What the cache has, then what the provider makes.

        Raises:
            PutOffError: another order is having an image made; or one that was kept is gone, and has to be made anew.
            What the provider and the store raise.
        """
        if request.resume is not None or not may_be_cached(request.params):
            # What was bought is fetched; what this order claimed for it still is, unless its time is over.
            async with aclosing(self._provider.generate(request)) as events:
                async for event in events:
                    yield event
            return
        keys = {index: self._key(request, ordinal) for index, ordinal in request.images}
        taken = await self._cache.take(self.name, request.key, request.order_id, keys, hold=self._hold, ttl=self._ttl)
        claims = _Claims(set(taken.claimed))
        try:
            async with aclosing(self._hits(taken.hits)) as hits:
                async for hit in hits:
                    yield hit
            if taken.ask_again_in is not None:
                raise PutOffError("another order is having the same image made", retry_after=taken.ask_again_in)
            if not claims.waiting:
                return
            rest = tuple(pair for pair in request.images if pair[0] in claims.waiting)
            async with aclosing(self._provider.generate(replace(request, images=rest))) as events:
                async for event in events:
                    claims.follow(event)
                    yield event
        except PermanentError:
            claims.has_task = False
            raise
        finally:
            # A task that goes on without us is still being made for this order: its next attempt fetches it.
            if claims.waiting and not claims.has_task:
                with suppress(JobdaemonError):
                    await self._cache.release(request.order_id, claims.waiting)

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:
        """The provider's."""
        return await self._provider.find_task(request, call)

    async def cancel(self, call: ProviderCall) -> bool:
        """The provider's."""
        return await self._provider.cancel(call)

    async def close(self) -> None:
        """The provider's."""
        await self._provider.close()

    def _key(self, request: GenerateRequest, ordinal: int) -> str:
        return cache_key(
            self.name,
            self._settings,
            request.params,
            prompt=request.prompt,
            photo_sha256=request.photo.sha256,
            ordinal=ordinal,
        )

    async def _hits(self, hits: Mapping[int, CachedImage]) -> AsyncGenerator[ImageMade, None]:
        are_all_there = True
        for index, image in hits.items():
            content = await self._content(image)
            if content is None:
                await self._cache.forget(image.entry_id)
                are_all_there = False
            else:
                yield ImageMade(index, content=content, media_type=image.media_type)
        if not are_all_there:
            raise PutOffError("what the cache kept is gone or damaged; it has to be made anew")

    async def _content(self, image: CachedImage) -> Spool | None:
        spool = self._spool()
        try:
            await self._store.get_to_file(image.artifact, spool, max_bytes=self._max_image_bytes)
        except (ArtifactMissingError, UnsupportedImageError):
            return None
        return spool if spool.sha256 == image.sha256 else None


class _Claims:
    """What this order is to have made: *waiting*, the indexes that did not come yet; *has_task* says that a task is at it."""

    def __init__(self, waiting: set[int]) -> None:
        self.waiting = waiting
        self.has_task = False

    def follow(self, event: ProviderEvent) -> None:
        match event:
            case ImageMade():
                self.waiting.discard(event.index)
            case Submitting():
                self.has_task = event.task_id is not None
            case TaskAccepted():
                self.has_task = True
            case TaskOver():
                self.has_task = False
