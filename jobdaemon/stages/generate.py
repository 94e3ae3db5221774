"""
generate: one provider call for a batch of images of one prompt.

What arrives is checkpointed at once, each image with its upload job (:mod:`jobdaemon.stages.arrivals`): the first image of an
order is stored while its siblings are still being made, and an attempt that dies has lost only what had not arrived. What becomes
of the call itself is :mod:`jobdaemon.stages.provider_call`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from decimal import Decimal

from jobdaemon.domain.artifact import ARTIFACT_SCHEME, Artifact, generated_key
from jobdaemon.domain.expand import upload_job
from jobdaemon.domain.fallback import FallbackRules, Move, Settle
from jobdaemon.domain.job import provider_of
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import ImageFailed, ImageGenerated, Write
from jobdaemon.errors import InvalidOrderError, ProviderUnavailableError, StoreUnavailableError, UnsupportedFeatureError
from jobdaemon.ports import (
    ArtifactStore,
    Attempt,
    CallDone,
    Charged,
    GenerateRequest,
    ImageMade,
    ImageRefused,
    ImageRow,
    OrderReader,
    OrderRow,
    Provider,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.spool import Spool
from jobdaemon.stages.arrivals import Arrivals
from jobdaemon.stages.photo_cache import PhotoCache
from jobdaemon.stages.provider_call import CallRecord

#: An image that came inline is paid for and nowhere else: a store that is away for a moment must not cost it.
_STORE_RESTS_S = (0.5, 1.0, 2.0, 4.0)


class GenerateStage:
    """One job per batch."""

    def __init__(
        self,
        *,
        orders: OrderReader,
        store: ArtifactStore,
        providers: Mapping[str, Provider],
        max_photo_bytes: int,
        fallback: FallbackRules | None = None,
        keys: Mapping[str, Collection[str]] | None = None,
        prices: Mapping[str, Decimal] | None = None,
        require_room: Callable[[int], None] = lambda images: None,  # noqa: ARG005 - how many
    ) -> None:
        """
        Args:
            keys: provider -> aliases of the keys that this daemon has, of those providers that know any.
            prices: provider -> price of one image, where the settings say it.
            fallback: who is asked when a provider has failed to the last attempt; nobody when None.
            require_room: raises when so many images more have no place here: nothing is bought then. Runs in a thread.
        """
        self._orders = orders
        self._store = store
        self._providers = providers
        self._photos = PhotoCache(store, max_photo_bytes=max_photo_bytes)
        self._fallback = fallback or FallbackRules()
        self._keys = keys or {}
        self._prices = prices or {}
        self._require_room = require_room

    async def run(self, attempt: Attempt) -> Done:
        """Raises what the provider raises, and ProviderUnavailableError when it left out an image without a word."""
        job = attempt.job
        batch = await self._orders.load_batch(job.args["order_id"], job.id, job.image_indexes)
        if batch is None or batch.order.beautified is None:
            raise InvalidOrderError(f"order {job.args['order_id']} has no beautified photo")
        order, rows = batch.order, batch.images
        provider = self._provider(provider_of(job.queue))
        wanted = set(job.args["images"])
        missing = {row.index: row.prompt for row in rows if row.index in wanted and row.status == "pending"}
        if not missing:
            return Done()
        name = provider.name
        call = CallRecord(attempt, provider, order.id, key=job.key_alias, held=self._keys.get(name), price=self._prices.get(name))
        move = self._fallback.move(order.plan, order.provider, provider.name)
        attempt.if_given_up(lambda: None if move is None else self._instead(move, attempt, call))
        request = self._request(order, batch.order.beautified, rows, missing, key=job.key_alias)
        request = await call.find(self._orders, request, batch.open_call)
        last: tuple[Write, ...] = ()
        try:
            if move is not None and attempt.is_spent:
                await call.settle()
            async with Arrivals(attempt, lambda: () if missing else call.ends("succeeded")) as arrivals:
                async with aclosing(provider.generate(request)) as events:
                    async for event in events:
                        if not isinstance(event, ImageMade | ImageRefused):
                            await self._note(event, attempt, call, arrivals, missing)
                        # A resumed call tells of all its images, of those too that arrived before.
                        elif missing.pop(event.index, None) is not None:
                            arrivals.take(self._arrived(event, attempt, order, provider.name, call))
                if not missing:
                    last = await arrivals.rest()
        except Exception as error:
            await call.failed(error, "failed" if len(missing) == len(request.images) else "partial")
            raise
        if missing:
            await call.close("partial" if len(missing) < len(request.images) else "failed")
            raise ProviderUnavailableError(f"{provider.name} sent no image for number {', '.join(map(str, sorted(missing)))}")
        return Done(writes=(*last, *call.ends("succeeded")))

    async def _note(
        self,
        event: Submitting | TaskAccepted | Charged | CallDone | TaskOver,
        attempt: Attempt,
        call: CallRecord,
        arrivals: Arrivals,
        missing: Collection[int],
    ) -> None:
        """What happened to the call itself."""
        if isinstance(event, CallDone):
            await attempt.free_slot()
            return
        if isinstance(event, Submitting):
            await asyncio.to_thread(self._require_room, len(missing))
        if not isinstance(event, Charged):
            # The rows of images name the call that is open when they are written.
            await arrivals.all_noted()
        await call.note(event, missing)

    def _provider(self, name: str) -> Provider:
        provider = self._providers.get(name)
        if provider is None:
            raise UnsupportedFeatureError(f"this daemon knows no provider {name}")
        return provider

    def _instead(self, move: Move, attempt: Attempt, call: CallRecord) -> Move | Settle:
        if not call.is_owed:
            return move
        if attempt.is_spent and provider_of(attempt.job.queue) in self._fallback.unpaid:
            # It was asked and did not say; waiting longer would save no money.
            return replace(move, writes=call.ends("cancelled"))
        return Settle()

    def _request(
        self, order: OrderRow, photo: Artifact, rows: Sequence[ImageRow], missing: Mapping[int, str], *, key: str | None
    ) -> GenerateRequest:
        [prompt] = set(missing.values())
        same_prompt = [row.index for row in rows if row.prompt == prompt]
        return GenerateRequest(
            order_id=order.id,
            images=tuple((index, same_prompt.index(index)) for index in sorted(missing)),
            prompt=prompt,
            photo=photo,
            load_photo=lambda: self._photos.get(photo),
            params=order.params,
            key=key,
        )

    async def _arrived(
        self, event: ImageMade | ImageRefused, attempt: Attempt, order: OrderRow, provider: str, call: CallRecord
    ) -> Write:
        if isinstance(event, ImageRefused):
            return ImageFailed(order.id, event.index, event.reason, was="pending")
        return ImageGenerated(
            order.id,
            event.index,
            provider,
            event.url or await self._keep(event, order.id),
            event.url_expires_at,
            job_id=attempt.job.id,
            call_id=None if call.resumed is None else call.resumed.id,
            then=(upload_job(order.id, order.priority, event.index),),
        )

    async def _keep(self, image: ImageMade, order_id: int) -> str:
        if image.content is None or image.media_type is None:
            raise ProviderUnavailableError("the provider sent neither an image nor its address")
        content, media_type = image.content, image.media_type
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content.sha256
        key = generated_key(order_id, image.index, digest, media_type)
        for rest_s in _STORE_RESTS_S:
            with suppress(StoreUnavailableError):
                return await self._put(key, content, media_type)
            await asyncio.sleep(rest_s)
        return await self._put(key, content, media_type)

    async def _put(self, key: str, content: bytes | Spool, media_type: str) -> str:
        if isinstance(content, bytes):
            artifact = await self._store.put(key, content, media_type)
        else:
            artifact = await self._store.put_file(key, content, media_type)
        return ARTIFACT_SCHEME + artifact.key
