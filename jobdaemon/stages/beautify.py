"""beautify: source photo in, retouched photo into the store, one generate job per batch of images out."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from jobdaemon.domain.artifact import beautified_key
from jobdaemon.domain.expand import WantedImage, generate_jobs
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import OrderStarted, PhotoBeautified
from jobdaemon.errors import InvalidOrderError
from jobdaemon.ports import ArtifactStore, Attempt, BeautifyBackend, OrderReader
from jobdaemon.stages.source import ARTIFACT_SCHEME, fetched


class BeautifyStage:
    """One job per order."""

    def __init__(
        self,
        *,
        orders: OrderReader,
        store: ArtifactStore,
        backend: BeautifyBackend,
        fetch: Callable[[str], Awaitable[bytes]],
        strength: float,
        max_photo_bytes: int,
        images_per_call: Callable[[str], int],
    ) -> None:
        """
        Args:
            fetch: downloads an https source, guarded and bounded.
            strength: 0.0 (untouched) to 1.0.
            images_per_call: provider name -> how many images one call makes.
        """
        self._orders = orders
        self._store = store
        self._backend = backend
        self._fetch = fetch
        self._strength = strength
        self._max_photo_bytes = max_photo_bytes
        self._images_per_call = images_per_call

    async def run(self, attempt: Attempt) -> Done:
        """Raises what the store, the source's server and the backend raise, and InvalidOrderError for an order that is gone."""
        order = await self._orders.load_order(attempt.job.args["order_id"])
        if order is None:
            raise InvalidOrderError(f"there is no order {attempt.job.args['order_id']}")
        await attempt.checkpoint(OrderStarted(order.id))
        result = await self._backend.beautify(await self._photo(order.source), strength=self._strength)
        key = beautified_key(order.id, hashlib.sha256(result.content).hexdigest())
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

    async def _photo(self, source: str) -> bytes:
        if source.startswith(ARTIFACT_SCHEME):
            return await self._store.get(source.removeprefix(ARTIFACT_SCHEME), max_bytes=self._max_photo_bytes)
        return await fetched(self._fetch, source)
