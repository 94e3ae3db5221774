"""A whole daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobdaemon.app.backends import start_backend
from jobdaemon.app.clients import open_http_client, open_service_client
from jobdaemon.app.database import address, ensure_rows, require_schema
from jobdaemon.app.providers import open_providers, with_cache
from jobdaemon.app.rules import fallback_rules, images_per_call, program_version, queue_rules
from jobdaemon.app.stages import build_stages
from jobdaemon.app.storage import open_store, require_spools, spools
from jobdaemon.errors import JobdaemonError
from jobdaemon.events import Events, UpkeepFailed
from jobdaemon.ports import ArtifactStore
from jobdaemon.queue.image_cache import CacheKeeper
from jobdaemon.queue.photo_links import PhotoLinkKeeper
from jobdaemon.queue.prewarmed import PrewarmedKeeper
from jobdaemon.queue.pruner import Pruner
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.supervisor import EngineRules, Supervisor
from jobdaemon.settings import Settings

if TYPE_CHECKING:
    from jobdaemon.http import GuardedClient


@dataclass(frozen=True, slots=True)
class Daemon:
    """A wired daemon and the parts a caller may want of it."""

    supervisor: Supervisor
    store: PostgresJobStore
    artifacts: ArtifactStore


@asynccontextmanager
async def open_daemon(settings: Settings, url: str, events: Events) -> AsyncIterator[Daemon]:
    """
    Build a daemon on the database at *url*; run it with ``daemon.supervisor.run()``.

    Raises:
        SettingsError: a configured part cannot work on this machine.
    """
    require_spools(settings)
    async with AsyncExitStack() as stack:
        store = PostgresJobStore(address(settings, url))
        stack.push_async_callback(store.close)
        artifacts = open_store(settings)
        stack.push_async_callback(artifacts.close)
        backend = await start_backend(settings)
        stack.push_async_callback(backend.close)
        client = open_http_client(settings)
        stack.push_async_callback(client.close)
        services = open_service_client(settings)
        stack.push_async_callback(services.close)
        providers = open_providers(settings, services, artifacts, store.photo_links)
        for provider in providers.values():
            stack.push_async_callback(provider.close)
        providers = with_cache(settings, store, artifacts, providers)
        engine = settings.engine
        supervisor = Supervisor(
            store=store,
            stages=build_stages(settings, store, artifacts, backend, providers, client),
            queues=queue_rules(settings, providers),
            engine=EngineRules(engine.heartbeat, engine.lease, engine.poll, engine.stop_grace),
            events=events,
            version=program_version(),
            require_schema=require_schema,
            ensure_rows=lambda: ensure_rows(store, settings, events),
            discard=lambda keys: _discard(artifacts, keys, events),
            images_per_call=images_per_call(settings, providers),
            fallback=fallback_rules(settings, providers),
            companions=(
                _cache_keeper(settings, store, artifacts, events).run,
                _prewarmed_keeper(settings, store, artifacts, events).run,
                Pruner(
                    store.retention, artifacts, events, photos=settings.retention.photos, orders=settings.retention.orders
                ).run,
                *_photo_link_keepers(settings, store, services, events),
            ),
        )
        yield Daemon(supervisor, store, artifacts)


def _cache_keeper(settings: Settings, store: PostgresJobStore, artifacts: ArtifactStore, events: Events) -> CacheKeeper:
    return CacheKeeper(
        store.cache,
        artifacts,
        events,
        is_on=bool(settings.cache.providers),
        ttl=settings.cache.ttl,
        max_bytes=settings.cache.max_bytes,
        max_image_bytes=settings.photos.result_max_bytes,
        poll=settings.engine.poll,
        spool=spools(settings),
    )


def _prewarmed_keeper(settings: Settings, store: PostgresJobStore, artifacts: ArtifactStore, events: Events) -> PrewarmedKeeper:
    return PrewarmedKeeper(store.prewarmed, artifacts, events, ttl=settings.prewarm.ttl, max_bytes=settings.prewarm.max_bytes)


def _photo_link_keepers(
    settings: Settings, store: PostgresJobStore, services: GuardedClient, events: Events
) -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
    """What deletes photos at Superbed; nothing without a token for it."""
    if settings.superbed.token is not None:
        from jobdaemon.providers.superbed import Superbed

        superbed = Superbed(settings.superbed, services)
        yield PhotoLinkKeeper(store.photo_links, superbed.delete, events, poll=settings.engine.poll).run


async def _discard(artifacts: ArtifactStore, keys: tuple[str, ...], events: Events) -> None:
    for key in keys:
        try:
            await artifacts.delete(key)
        except JobdaemonError as error:
            events.emit(UpkeepFailed(error=f"{key} was not deleted: {error}", chore="discard"))
