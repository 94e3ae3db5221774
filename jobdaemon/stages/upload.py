"""upload: a generated image to where people can have it, after it proved to be a whole image."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import IO

from jobdaemon.domain.artifact import ARTIFACT_SCHEME, image_key
from jobdaemon.domain.expand import collect_job
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import ImageFailed, ImageLost, ImagesRemoved, ImageStored
from jobdaemon.errors import (
    ArtifactMissingError,
    DownloadRefusedError,
    InvalidOrderError,
    SourceUnavailableError,
    UnsupportedImageError,
)
from jobdaemon.ports import ArtifactStore, Attempt, ImageFacts, ImageRow, OrderReader
from jobdaemon.spool import Spool
from jobdaemon.stages.source import fetched

#: Images decoded at once: each takes four bytes a pixel, and more of them at a time than there are cores are no faster.
DECODED_AT_ONCE = 2


class UploadStage:
    """One job per image, which lies on disk on its way: memory holds blocks of it, and its pixels while it is checked."""

    def __init__(
        self,
        *,
        orders: OrderReader,
        store: ArtifactStore,
        spool: Callable[[], Spool],
        fetch: Callable[[str, Spool], Awaitable[None]],
        inspect: Callable[[IO[bytes]], ImageFacts],
        max_image_bytes: int,
    ) -> None:
        """
        Args:
            spool: makes an empty one.
            fetch: downloads a provider's URL, guarded and bounded.
            inspect: decodes the whole image; raises UnsupportedImageError when it is none. Runs in a thread.
        """
        self._orders = orders
        self._store = store
        self._spool = spool
        self._fetch = fetch
        self._inspect = inspect
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)
        self._max_image_bytes = max_image_bytes

    async def run(self, attempt: Attempt) -> Done:
        """
        Raises what the store and the provider's server raise, UnsupportedImageError for an artifact that is no image and for a
        link that is not to be followed, and SourceUnavailableError for a download that is no image.
        """
        order_id, index = attempt.job.args["order_id"], attempt.job.args["image"]
        image = await self._orders.load_image(order_id, index)
        if image is None:
            raise InvalidOrderError(f"order {order_id} has no image {index}")
        if image.status != "generated":
            return Done()  # stored by an earlier attempt, failed or cancelled
        if image.locator is None:
            raise ArtifactMissingError("the provider's link to this image is gone")
        work_key = image.locator.removeprefix(ARTIFACT_SCHEME) if image.locator.startswith(ARTIFACT_SCHEME) else None
        spool = self._spool()
        maker = image.provider or "the provider"
        if work_key is None:
            try:
                await fetched(lambda url: self._fetch(url, spool), image.locator)
            except DownloadRefusedError as error:
                return await self._ask_again(order_id, image, str(error))
            except InvalidOrderError as error:
                raise UnsupportedImageError(f"{maker} gave a link that is not followed: {error}") from error
        else:
            await self._store.get_to_file(work_key, spool, max_bytes=self._max_image_bytes)
        try:
            async with self._decoding:
                facts = await asyncio.to_thread(lambda: self._inspect(spool.opened()))
        except UnsupportedImageError as error:
            # Not the customer's photo, which the same words are used of.
            told = f"{maker} sent an image that cannot be used: {error}"
            if work_key is not None:
                raise UnsupportedImageError(told) from error
            # It is paid for, and what came was perhaps cut short on its way: fetched once more it may be whole.
            raise SourceUnavailableError(told) from error
        digest = spool.sha256
        if work_key is not None and digest[:16] not in work_key:
            raise ArtifactMissingError(f"the bytes under {work_key} are not those that were generated")
        key = image_key(order_id, index, digest, facts.media_type)
        stored = await self._store.put_file(key, spool, facts.media_type)
        return Done(
            writes=(
                ImageStored(
                    order_id,
                    index,
                    object_key=stored.key,
                    url=self._store.url(stored.key),
                    sha256=digest,
                    size_bytes=spool.size_bytes,
                    width=facts.width,
                    height=facts.height,
                    media_type=facts.media_type,
                ),
            ),
            obsolete=() if work_key is None else (work_key,),
            created=(stored.key,),
        )

    async def _ask_again(self, order_id: int, image: ImageRow, reason: str) -> Done:
        """The provider's link no longer gives the image: have it made available again, or fail it when that was no help."""
        order = await self._orders.load_order(order_id)
        if order is None or image.provider is None:
            raise ArtifactMissingError(reason)
        again = collect_job(order_id, order.priority, image.provider, image.index, image.call_id)
        return Done(
            writes=(ImageLost(order_id, image.index, then=(again,)), ImageFailed(order_id, image.index, reason, was="generated"))
        )


class RemoveStage:
    """Deletes the stored images of a cancelled order whose customer wants them gone."""

    def __init__(self, *, orders: OrderReader, store: ArtifactStore) -> None:
        self._orders = orders
        self._store = store

    async def run(self, attempt: Attempt) -> Done:
        """Raises what the store raises."""
        order_id = attempt.job.args["order_id"]
        for image in await self._orders.load_images(order_id):
            if image.status == "stored" and image.object_key is not None:
                await self._store.delete(image.object_key)
        return Done(writes=(ImagesRemoved(order_id),))
