"""
generate: one provider call for a batch of images of one prompt.

What arrives is checkpointed at once, image by image, each with its upload job: the first image of an order is stored while its
siblings are still being made, and an attempt that dies has lost only what had not arrived. A task id is noted before the first
poll, so a later attempt asks for that task instead of buying another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import aclosing

from jobdaemon.domain.artifact import Artifact, generated_key
from jobdaemon.domain.expand import upload_job
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import CallSubmitted, ImageFailed, ImageGenerated, Write
from jobdaemon.errors import InvalidOrderError, ProviderUnavailableError, UnsupportedFeatureError
from jobdaemon.ports import (
    ArtifactStore,
    Attempt,
    GenerateRequest,
    ImageMade,
    ImageRefused,
    ImageRow,
    OrderReader,
    OrderRow,
    Provider,
    ProviderEvent,
    TaskAccepted,
)
from jobdaemon.stages.source import ARTIFACT_SCHEME


class GenerateStage:
    """One job per batch."""

    def __init__(
        self, *, orders: OrderReader, store: ArtifactStore, providers: Mapping[str, Provider], max_photo_bytes: int
    ) -> None:
        self._orders = orders
        self._store = store
        self._providers = providers
        self._max_photo_bytes = max_photo_bytes

    async def run(self, attempt: Attempt) -> Done:
        """Raises what the provider raises, and ProviderUnavailableError when it left out an image without a word."""
        job = attempt.job
        order = await self._orders.load_order(job.args["order_id"])
        if order is None or order.beautified is None:
            raise InvalidOrderError(f"order {job.args['order_id']} has no beautified photo")
        provider = self._provider(job.queue.removeprefix("generate."))
        rows = await self._orders.load_images(order.id)
        wanted = set(job.args["images"])
        missing = {row.index: row.prompt for row in rows if row.index in wanted and row.status == "pending"}
        if not missing:
            return Done()
        task_id = await self._orders.open_call(job.id)
        request = self._request(order, order.beautified, rows, missing, task_id=task_id, key=job.key_alias)
        async with aclosing(provider.generate(request)) as events:
            async for event in events:
                await attempt.checkpoint(await self._note(event, attempt, order, provider.name))
                if isinstance(event, ImageMade | ImageRefused):
                    missing.pop(event.index, None)
        if missing:
            raise ProviderUnavailableError(f"{provider.name} sent no image for number {', '.join(map(str, sorted(missing)))}")
        return Done()

    def _provider(self, name: str) -> Provider:
        provider = self._providers.get(name)
        if provider is None:
            raise UnsupportedFeatureError(f"this daemon knows no provider {name}")
        return provider

    def _request(
        self,
        order: OrderRow,
        photo: Artifact,
        rows: Sequence[ImageRow],
        missing: Mapping[int, str],
        *,
        task_id: str | None,
        key: str | None,
    ) -> GenerateRequest:
        [prompt] = set(missing.values())
        same_prompt = [row.index for row in rows if row.prompt == prompt]
        return GenerateRequest(
            order_id=order.id,
            images=tuple((index, same_prompt.index(index)) for index in sorted(missing)),
            prompt=prompt,
            photo=photo,
            load_photo=lambda: self._store.get(photo.key, max_bytes=self._max_photo_bytes),
            params=order.params,
            task_id=task_id,
            key=key,
        )

    async def _note(self, event: ProviderEvent, attempt: Attempt, order: OrderRow, provider: str) -> Write:
        match event:
            case TaskAccepted():
                job = attempt.job
                return CallSubmitted(order.id, job.id, min(job.args["images"]), provider, event.task_id, job.key_alias)
            case ImageRefused():
                return ImageFailed(order.id, event.index, event.reason, was="pending")
            case ImageMade():
                locator = event.url or await self._keep(event, order.id)
                then = (upload_job(order.id, order.priority, event.index),)
                return ImageGenerated(order.id, event.index, provider, locator, event.url_expires_at, then=then)

    async def _keep(self, image: ImageMade, order_id: int) -> str:
        if image.content is None or image.media_type is None:
            raise ProviderUnavailableError("the provider sent neither an image nor its address")
        digest = hashlib.sha256(image.content).hexdigest()
        artifact = await self._store.put(
            generated_key(order_id, image.index, digest, image.media_type), image.content, image.media_type
        )
        return ARTIFACT_SCHEME + artifact.key
