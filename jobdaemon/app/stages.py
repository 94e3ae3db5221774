"""The stages, wired to what they work with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from jobdaemon.app.rules import fallback_rules, images_per_call, key_aliases, prewarming_key
from jobdaemon.app.storage import room_guard, spools
from jobdaemon.domain.job import Task
from jobdaemon.ports import ArtifactStore, BeautifyBackend, Provider, Stage
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.settings import Settings

if TYPE_CHECKING:
    from jobdaemon.http import GuardedClient
    from jobdaemon.spool import Spool

#: A prewarm fetches its photo within this time: an order may be waiting for its slot.
_PREWARM_FETCH = timedelta(seconds=5)


def build_stages(
    settings: Settings,
    store: PostgresJobStore,
    artifacts: ArtifactStore,
    backend: BeautifyBackend,
    providers: Mapping[str, Provider],
    client: GuardedClient,
) -> dict[str, Stage]:
    """Task name -> stage."""
    from jobdaemon.photo import PhotoLimits, inspect_image
    from jobdaemon.stages.abandon import AbandonStage
    from jobdaemon.stages.beautify import BeautifyStage
    from jobdaemon.stages.generate import GenerateStage
    from jobdaemon.stages.prewarm import Prewarming, PrewarmStage
    from jobdaemon.stages.upload import RemoveStage, UploadStage

    photos = settings.photos
    result_limits = PhotoLimits(photos.result_max_bytes, photos.max_pixels)

    async def fetch(url: str, max_bytes: int, most: timedelta = photos.source_timeout) -> bytes:
        return (await client.download(url, max_bytes=max_bytes, timeout=min(most, photos.source_timeout))).content

    async def fetch_to(url: str, spool: Spool) -> None:
        await client.download_to(spool, url, max_bytes=photos.result_max_bytes, timeout=photos.source_timeout)

    prewarming = Prewarming(
        store.prewarmed,
        artifacts,
        backend,
        strength=settings.beautify.strength,
        backend_key=prewarming_key(settings, backend.name, backend.model),
    )
    return {
        Task.BEAUTIFY: BeautifyStage(
            orders=store.orders,
            store=artifacts,
            prewarming=prewarming,
            fetch=lambda url: fetch(url, photos.max_bytes),
            max_photo_bytes=photos.max_bytes,
            images_per_call=images_per_call(settings, providers),
        ),
        Task.PREWARM: PrewarmStage(
            prewarming, artifacts, lambda url: fetch(url, photos.max_bytes, _PREWARM_FETCH), max_photo_bytes=photos.max_bytes
        ),
        Task.GENERATE: GenerateStage(
            orders=store.orders,
            store=artifacts,
            providers=providers,
            max_photo_bytes=photos.result_max_bytes,
            fallback=fallback_rules(settings, providers),
            keys=key_aliases(settings),
            prices=settings.generate.prices(),
            require_room=room_guard(settings),
        ),
        Task.UPLOAD: UploadStage(
            orders=store.orders,
            store=artifacts,
            spool=spools(settings),
            fetch=fetch_to,
            inspect=lambda file: inspect_image(file, limits=result_limits),
            max_image_bytes=photos.result_max_bytes,
        ),
        Task.REMOVE: RemoveStage(orders=store.orders, store=artifacts),
        Task.ABANDON: AbandonStage(orders=store.orders, providers=providers, keys=key_aliases(settings)),
    }
