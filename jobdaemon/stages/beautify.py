"""beautify: source photo in, retouched photo into the store, one generate job per batch of images out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

from jobdaemon.domain.artifact import beautified_key
from jobdaemon.domain.expand import WantedImage, generate_jobs
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import OrderStarted, PhotoBeautified
from jobdaemon.errors import InvalidOrderError
from jobdaemon.ports import ArtifactStore, Attempt, OrderReader
from jobdaemon.stages.prewarm import Prewarming
from jobdaemon.stages.source import source_photo


class BeautifyStage:
    """One job per order."""

    def __init__(
        self,
        *,
        orders: OrderReader,
        store: ArtifactStore,
        prewarming: Prewarming,
        fetch: Callable[[str], Awaitable[bytes]],
        max_photo_bytes: int,
        images_per_call: Callable[[str], int],
    ) -> None:
        """
        Args:
            prewarming: beautifies, unless that was done before.
            fetch: downloads an https source, guarded and bounded.
            images_per_call: provider name -> how many images one call makes.
        """
        self._orders = orders
        self._store = store
        self._prewarming = prewarming
        self._fetch = fetch
        self._max_photo_bytes = max_photo_bytes
        self._images_per_call = images_per_call

    async def run(self, attempt: Attempt) -> Done:
        """Raises what the store, the source's server and the backend raise, and InvalidOrderError for an order that is gone."""
        order = await self._orders.load_order(attempt.job.args["order_id"])
        if order is None:
            raise InvalidOrderError(f"there is no order {attempt.job.args['order_id']}")
        await attempt.checkpoint(OrderStarted(order.id))
        photo = await source_photo(order.source, self._store, self._fetch, max_bytes=self._max_photo_bytes)
        result = await self._prewarming.beautified(photo)
        # Megabytes: the event loop has many photos to look after.
        digest = await asyncio.to_thread(lambda: hashlib.sha256(result.content).hexdigest())
        key = beautified_key(order.id, digest)
        artifact = await self._store.put(key, result.content, result.media_type)
        wanted = [WantedImage(image.index, image.prompt) for image in await self._orders.load_images(order.id)]
        jobs = generate_jobs(order.id, order.priority, order.provider, wanted, self._images_per_call(order.provider))
        return Done(
            writes=(
                PhotoBeautified(
                    order.id,
                    artifact,
                    width=result.width,
                    height=result.height,
                    faces=result.faces,
                    unrestored=result.unrestored,
                    model=result.model,
                    device=result.device,
                    then=jobs,
                ),
            )
        )
