"""
The composition root: settings in, a wired daemon out.

Heavy libraries are imported where they are chosen, so that a command that only reads loads none of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobdaemon import schema_version
from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.fallback import FallbackRules
from jobdaemon.domain.job import BEAUTIFY_QUEUE, UPLOAD_QUEUE, Task, generate_queue
from jobdaemon.domain.prewarm import backend_key
from jobdaemon.domain.retry import RetryPolicy
from jobdaemon.domain.rows import differing_rows
from jobdaemon.errors import DatabaseUnavailableError, JobdaemonError, SettingsError, StoreRefusedError, StoreUnavailableError
from jobdaemon.events import DatabaseLost, Event, Events, SettingsOverruled, UpkeepFailed
from jobdaemon.ports import ArtifactStore, BeautifyBackend, PhotoLinks, Provider, Stage, UploadedPhotos
from jobdaemon.queue.attempt import AttemptRules
from jobdaemon.queue.image_cache import CacheKeeper
from jobdaemon.queue.photo_links import PhotoLinkKeeper
from jobdaemon.queue.prewarmed import PrewarmedKeeper
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.queue.supervisor import EngineRules, QueueRules, Supervisor
from jobdaemon.settings import Settings
from jobdaemon.settings_generate import PhotoLink, what_shapes_images
from jobdaemon.settings_rows import SELECT_ROWS, overruled, plans, provider_keys, queue_names, wanted_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import SecretStr

    from jobdaemon.http import GuardedClient
    from jobdaemon.settings_generate import ProviderKeySettings
    from jobdaemon.spool import Spool


logger = logging.getLogger(__name__)

#: A prewarm fetches its photo within this time: an order may be waiting for its slot.
_PREWARM_FETCH = timedelta(seconds=5)
#: The images of a call are announced in the moment in which that call's slot is filled again. Uploads that began at once would
#: take the processor from it, and a provider's slot is the scarcer thing. Short of the 50 ms within which a free slot is used.
_UPLOADS_WAIT = timedelta(milliseconds=30)
#: Between two tries to start an embedded server that died.
_REVIVE_S = 1.0


def program_version() -> str:
    """This program's version."""
    return version("jobdaemon")


@contextmanager
def database_url(settings: Settings, events: Events | None = None) -> Iterator[str]:
    """
    The configured database, or the embedded one, kept running for as long as the block.

    Args:
        events: when they say that the database was lost, the embedded one is started again.

    Raises:
        DatabaseUnavailableError: the embedded server does not start.
    """
    if settings.database.url is not None:
        yield settings.database.url.get_secret_value()
        return
    from jobdaemon.embedded import EmbeddedPostgres

    server = EmbeddedPostgres(settings.data_dir)
    url = server.acquire()
    closing = threading.Event()
    unsubscribe = None if events is None else events.subscribe(lambda event: _revive(event, server.acquire, closing))
    try:
        yield url
    finally:
        closing.set()
        if unsubscribe is not None:
            unsubscribe()
        server.release()


def _revive(event: Event, acquire: Callable[[], str], closing: threading.Event) -> None:
    """Start a server that died, in a thread: the event loop must go on."""

    def keep_trying() -> None:
        while not closing.wait(_REVIVE_S):
            try:
                acquire()
            except DatabaseUnavailableError:
                continue
            return

    if isinstance(event, DatabaseLost):
        threading.Thread(target=keep_trying, name="revive-postgres", daemon=True).start()


def address(settings: Settings, url: str) -> DatabaseAddress:
    """How asyncpg reaches *url*."""
    return DatabaseAddress(
        url,
        connect_timeout=settings.database.connect_timeout,
        idle_in_transaction=settings.engine.lease,
        use_statement_cache=settings.database.statement_cache,
    )


def _key_aliases(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The keys of each provider that has any."""
    return {name: tuple(key.alias for key in keys) for name, keys in settings.provider_keys().items()}


async def ensure_rows(store: PostgresJobStore, settings: Settings, events: Events | None = None) -> None:
    """
    Insert the plans, queues and provider keys that are missing; an operator's rows stay as they are.

    Args:
        events: tell where such a row says something else than the settings.
    """
    await store.ensure_rows(queue_names(settings), plans(settings), provider_keys(settings))
    if events is None:
        return
    for row in differing_rows(wanted_rows(settings), await store.rows(SELECT_ROWS)):
        if row.named:
            events.emit(SettingsOverruled(row=row.title, reason=": ".join(overruled(row))))


def require_schema(applied: list[str]) -> None:
    """
    Raises:
        SchemaVersionError: a database that records these migrations does not fit this program.
    """
    schema_version.compare(applied).require_usable()


async def prepare_database(settings: Settings, url: str) -> list[str]:
    """
    Bring the embedded database up to date, and insert missing rows; quick where there is nothing to do.

    Returns:
        Ids of the migrations applied now.
    """
    applied: list[str] = []
    store = PostgresJobStore(address(settings, url))
    try:
        state = schema_version.compare(await store.applied_migrations())
        if state.pending_pre or state.pending_post:
            from jobdaemon.schema import migrate

            applied = await asyncio.to_thread(migrate, url)
        await ensure_rows(store, settings)
    finally:
        await store.close()
    return applied


def open_store(settings: Settings) -> ArtifactStore:
    """
    The artifact store.

    Raises:
        SettingsError: its section is incomplete.
    """
    if settings.store.kind == "files":
        from jobdaemon.storage.files import FilesStore

        return FilesStore(settings.store.files.root, settings.store.files.public_url)
    from jobdaemon.storage.r2 import R2Store

    r2 = settings.store.r2
    if r2.endpoint_url is None or r2.bucket is None or r2.access_key_id is None or r2.secret_access_key is None:
        raise SettingsError("store.r2 needs endpoint_url, bucket, access_key_id and secret_access_key")
    return R2Store(
        r2.endpoint_url,
        r2.bucket,
        r2.access_key_id.get_secret_value(),
        r2.secret_access_key.get_secret_value(),
        prefix=r2.prefix,
        public_url=r2.public_url,
    )


def spools(settings: Settings) -> Callable[[], Spool]:
    """Makes the files in which images lie while they are on their way."""
    from jobdaemon.spool import Spool

    # Not the system's folder for temporary files: that one is often in memory.
    return partial(Spool, settings.data_dir / "spool")


def _require_room(settings: Settings) -> Callable[[int], None]:
    """For one image more or several, as :func:`jobdaemon.spool.require_room` says."""
    from jobdaemon.spool import require_room

    # The same disk, often; a store elsewhere says by itself that it is full.
    folders = [settings.data_dir / "spool", *([settings.store.files.root] if settings.store.kind == "files" else [])]
    return partial(require_room, folders)


def require_spools(settings: Settings) -> None:
    """
    Raises:
        SettingsError: images cannot lie in data_dir on their way. That there is no room now is none.
    """
    try:
        spools(settings)()
    except StoreRefusedError as error:
        raise SettingsError(f"data_dir: {error}") from error
    except StoreUnavailableError:
        return


def open_backend(settings: Settings) -> BeautifyBackend:
    """
    The beautify backend.

    Raises:
        SettingsError: unknown, or it cannot work on this machine.
    """
    if settings.beautify.backend == "photo_enhance":
        return _photo_enhance_backend(settings)
    if settings.beautify.backend not in ("auto", "opencv"):
        raise SettingsError(f"beautify.backend: there is no backend {settings.beautify.backend!r}; there is opencv")
    from jobdaemon.backends.opencv import OpenCVBackend
    from jobdaemon.photo import PhotoLimits

    limits = PhotoLimits(settings.photos.max_bytes, settings.photos.max_pixels)
    return OpenCVBackend(threads=settings.beautify.threads, limits=limits)


def _photo_enhance_backend(settings: Settings) -> BeautifyBackend:
    from jobdaemon.backends.photo_enhance import PhotoEnhanceBackend
    from jobdaemon.http import GuardedClient
    from jobdaemon.photo import PhotoLimits

    section = settings.beautify.photo_enhance
    if section.url is None:
        raise SettingsError('beautify.photo_enhance.url must be set, because beautify.backend is "photo_enhance"')
    return PhotoEnhanceBackend(
        section.url,
        # A client of its own: at work, the service takes nothing for minutes, which elsewhere is a lost connection.
        GuardedClient(allowed_hosts={urlsplit(section.url).netloc}, idle_timeout=section.timeout),
        poll=section.poll,
        timeout=section.timeout,
        max_pixels=section.max_pixels,
        max_result_bytes=section.max_result_bytes,
        threads=settings.beautify.threads,
        limits=PhotoLimits(settings.photos.max_bytes, settings.photos.max_pixels),
    )


@dataclass(frozen=True, slots=True)
class ChosenBackend:
    """
    The beautify backend, able to work.

    Attributes:
        why_not_gfpgan: where ``auto`` may choose and chose another one; else empty.
        is_wish_unmet: weights are set, so somebody wants gfpgan.
    """

    backend: BeautifyBackend
    why_not_gfpgan: str = ""
    is_wish_unmet: bool = False


async def start_backend(settings: Settings) -> BeautifyBackend:
    """
    The beautify backend, able to work; the log says why it is not gfpgan where that is wanted.

    Raises:
        SettingsError: it cannot work on this machine as it is set.
        DeviceFailedError: it could, but did not come up.
    """
    chosen = await choose_backend(settings)
    if chosen.is_wish_unmet:
        logger.warning("beautify.backend is %s, because %s", chosen.backend.name, chosen.why_not_gfpgan)
    return chosen.backend


async def choose_backend(settings: Settings) -> ChosenBackend:
    """
    The beautify backend, able to work, and why it is not a better one.

    Raises:
        SettingsError, DeviceFailedError: as :func:`start_backend`.
    """
    if settings.beautify.backend not in ("auto", "gfpgan"):
        return ChosenBackend(open_backend(settings))
    gfpgan = await _start_gfpgan(settings, may_be_other=settings.beautify.backend == "auto")
    if isinstance(gfpgan, str):
        return ChosenBackend(open_backend(settings), gfpgan, is_wish_unmet=settings.beautify.weights is not None)
    return ChosenBackend(gfpgan)


async def _start_gfpgan(settings: Settings, *, may_be_other: bool) -> BeautifyBackend | str:
    """The backend gfpgan; where it may be another one, and something that gfpgan needs is not here, what that is."""
    section = settings.beautify
    from jobdaemon.backends.gfpgan.backend import GfpganBackend, GfpganRules, what_is_missing
    from jobdaemon.backends.gfpgan.process import RefusedError
    from jobdaemon.photo import PhotoLimits

    missing = what_is_missing(section.weights)
    # That weights are set where gfpgan is asked for is the settings' business; a file that is not there the child's.
    if section.weights is None or (may_be_other and missing is not None):
        return str(missing)
    if may_be_other and section.device == "cpu":
        # Without a GPU it is no match for opencv in speed.
        return 'beautify.device is "cpu", on which gfpgan has to be asked for: beautify.backend = "gfpgan"'
    rules = GfpganRules(
        weights=section.weights,
        sha256=section.weights_sha256,
        device=section.device,
        dtype=None if section.dtype == "auto" else section.dtype,
        batch=section.batch,
        compile=section.compile,
        max_wait=section.max_wait,
        timeout=section.timeout,
    )
    limits = PhotoLimits(settings.photos.max_bytes, settings.photos.max_pixels)
    backend = GfpganBackend(rules, threads=section.threads, limits=limits)
    try:
        await backend.start()
    except BaseException as error:
        await backend.close()
        if may_be_other and isinstance(error, RefusedError) and error.lacks_device:
            return f"gfpgan cannot work here: {error}"
        raise
    return backend


def what_is_wrong_with_weights(settings: Settings) -> str | None:
    """Why the file with GFPGAN's weights could not be used, where there is one; reads all of it, about half a second."""
    from jobdaemon.backends.gfpgan.weights import identify

    weights = settings.beautify.weights
    if weights is None or not weights.exists():
        return None
    try:
        identify(weights, sha256=settings.beautify.weights_sha256)
    except SettingsError as error:
        return str(error)
    return None


def open_providers(
    settings: Settings, services: GuardedClient, artifacts: ArtifactStore, uploaded: UploadedPhotos | None = None
) -> dict[str, Provider]:
    """
    The providers this daemon can call, by name: those whose section has what it takes.

    Args:
        services: calls them.
        artifacts: where providers that fetch the photo may be sent.
        uploaded: knows the photos that lie elsewhere for them; None for who only judges the settings.

    Raises:
        SettingsError: one cannot work as it is set.
    """
    providers: dict[str, Provider] = {"local": _local_provider(settings)}
    usable = settings.generate.usable()
    if "openai_images" in usable:
        providers["openai_images"] = _openai_images_provider(settings, services)
    if "comfyui" in usable:
        providers["comfyui"] = _comfyui_provider(settings, services)
    if "dashscope" in usable:
        providers["dashscope"] = _dashscope_provider(settings, services, artifacts, uploaded)
    if "jimeng" in usable:
        providers["jimeng"] = _jimeng_provider(settings, services, artifacts, uploaded)
    return providers


def _local_provider(settings: Settings) -> Provider:
    from jobdaemon.backends.faces import FaceDetector
    from jobdaemon.photo import PhotoLimits
    from jobdaemon.providers.local import LocalProvider

    detector = FaceDetector()

    def find_faces(pixels: NDArray[np.uint8]) -> list[tuple[float, float, float, float]]:
        boxes = (face.box for face in detector.detect(pixels))
        return [(left, top, right - left, bottom - top) for left, top, right, bottom in boxes]

    return LocalProvider(
        threads=settings.generate.local.threads,
        limits=PhotoLimits(settings.photos.result_max_bytes, settings.photos.max_pixels),
        images_per_call=settings.orders.images_per_call,
        find_faces=find_faces,
    )


def _comfyui_provider(settings: Settings, services: GuardedClient) -> Provider:
    from jobdaemon.providers.comfyui import ComfyUIProvider

    return ComfyUIProvider(
        settings.generate.comfyui,
        client=services,
        max_image_bytes=settings.photos.result_max_bytes,
        spool=spools(settings),
    )


def _secrets(single: SecretStr | None, keys: Iterable[ProviderKeySettings]) -> dict[str, str]:
    """Alias -> key; a single one needs no alias."""
    secrets = {"default": single} if single is not None else {key.alias: key.key for key in keys}
    return {alias: secret.get_secret_value() for alias, secret in secrets.items() if secret is not None}


def _openai_images_provider(settings: Settings, services: GuardedClient) -> Provider:
    from jobdaemon.providers.openai_images import OpenAIImagesProvider

    section = settings.generate.openai_images
    return OpenAIImagesProvider(
        section,
        keys=_secrets(section.api_key, section.keys),
        client=services,
        max_image_bytes=settings.photos.result_max_bytes,
        spool=spools(settings),
    )


def _dashscope_provider(
    settings: Settings, services: GuardedClient, artifacts: ArtifactStore, uploaded: UploadedPhotos | None
) -> Provider:
    from jobdaemon.providers.dashscope import DashScopeProvider

    section = settings.generate.dashscope
    return DashScopeProvider(
        section,
        keys=_secrets(section.api_key, section.keys),
        client=services,
        links=photo_links(settings, section.photo, services, artifacts, uploaded),
    )


def _jimeng_provider(
    settings: Settings, services: GuardedClient, artifacts: ArtifactStore, uploaded: UploadedPhotos | None
) -> Provider:
    from jobdaemon.providers.jimeng import JimengProvider, KeyPair
    from jobdaemon.providers.photo_links import one_at_a_time

    section = settings.generate.jimeng
    if section.access_key_id is not None and section.secret_access_key is not None:
        pair = KeyPair(section.access_key_id.get_secret_value(), section.secret_access_key.get_secret_value())
        keys = {"default": pair}
    else:
        keys = {alias: KeyPair.parsed(text) for alias, text in _secrets(None, section.keys).items()}
    return JimengProvider(
        section,
        keys=keys,
        client=services,
        links=one_at_a_time(photo_links(settings, section.photo, services, artifacts, uploaded)),
        max_image_bytes=settings.photos.result_max_bytes,
        spool=spools(settings),
    )


def photo_links(
    settings: Settings, choice: PhotoLink, services: GuardedClient, artifacts: ArtifactStore, uploaded: UploadedPhotos | None
) -> PhotoLinks:
    """
    How a provider gets the photo, *choice* being what its section says; the rest as for :func:`open_providers`.

    Raises:
        SettingsError: what the choice needs is not set.
    """
    from jobdaemon.providers.photo_links import InlineLinks, StoreLinks, SuperbedLinks

    if choice == "inline":
        return InlineLinks()
    if choice == "superbed":
        from jobdaemon.providers.superbed import Superbed

        return SuperbedLinks(Superbed(settings.superbed, services), uploaded)
    if settings.store.kind != "r2":
        raise SettingsError('photo is "store", but providers can fetch nothing from a folder: set store.kind to "r2"')
    from jobdaemon.storage.r2 import R2Store

    assert isinstance(artifacts, R2Store)
    return StoreLinks(artifacts.signed_url, artifacts.put)


@dataclass(frozen=True, slots=True)
class Daemon:
    """A wired daemon and the parts a caller may want of it."""

    supervisor: Supervisor
    store: PostgresJobStore
    artifacts: ArtifactStore


def _queue_rules(settings: Settings, providers: Mapping[str, Provider]) -> dict[str, QueueRules]:
    served = [BEAUTIFY_QUEUE, *(generate_queue(name) for name in providers), UPLOAD_QUEUE]
    paid = {generate_queue(name) for name, provider in providers.items() if provider.is_paid}
    aliases = {generate_queue(name): keys for name, keys in _key_aliases(settings).items()}
    rules: dict[str, QueueRules] = {}
    for name in served:
        queue = settings.queue(name)
        policy = RetryPolicy(queue.attempts, queue.backoff, queue.backoff_cap, queue.jitter)
        if queue.team_size > 0:
            # An upload knows what it has stored only when it ends.
            attempt = AttemptRules(queue.run_timeout, policy, is_abortable=name != UPLOAD_QUEUE, is_paid=name in paid)
            calm = _UPLOADS_WAIT if name == UPLOAD_QUEUE else timedelta(0)
            rules[name] = QueueRules(queue.team_size, attempt, aliases.get(name), calm)
    return rules


def team_sizes(settings: Settings) -> dict[str, int]:
    """Queue name -> team size, for every queue these settings know."""
    return {name: settings.queue(name).team_size for name in queue_names(settings)}


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
        providers = _with_cache(settings, store, artifacts, providers)
        engine = settings.engine
        supervisor = Supervisor(
            store=store,
            stages=build_stages(settings, store, artifacts, backend, providers, client),
            queues=_queue_rules(settings, providers),
            engine=EngineRules(engine.heartbeat, engine.lease, engine.poll, engine.stop_grace),
            events=events,
            version=program_version(),
            require_schema=require_schema,
            ensure_rows=lambda: ensure_rows(store, settings, events),
            discard=lambda keys: _discard(artifacts, keys, events),
            images_per_call=_images_per_call(settings, providers),
            fallback=_fallback_rules(settings, providers),
            companions=(
                _cache_keeper(settings, store, artifacts, events).run,
                _prewarmed_keeper(settings, store, artifacts, events).run,
                *_photo_link_keepers(settings, store, services, events),
            ),
        )
        yield Daemon(supervisor, store, artifacts)


def _with_cache(
    settings: Settings, store: PostgresJobStore, artifacts: ArtifactStore, providers: Mapping[str, Provider]
) -> dict[str, Provider]:
    """*providers*, those that the settings name with the cache before them."""
    wrapped = dict(providers)
    for name in providers.keys() & set(settings.cache.providers):
        from jobdaemon.stages.cached import CachingProvider

        shaping = what_shapes_images(getattr(settings.generate, name))
        if name == "comfyui" and settings.generate.comfyui.workflow is not None:
            shaping["workflow"] = hashlib.sha256(settings.generate.comfyui.workflow.read_bytes()).hexdigest()
        wrapped[name] = CachingProvider(
            providers[name],
            store.cache,
            artifacts,
            spool=spools(settings),
            settings=shaping,
            hold=settings.queue(generate_queue(name)).run_timeout,
            ttl=settings.cache.ttl,
            max_image_bytes=settings.photos.result_max_bytes,
        )
    return wrapped


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


def _backend_key(settings: Settings, chosen: str) -> str:
    """
    Whose prewarmed photos are ours too. What is not left out counts: a new setting costs a few hits, and no wrong photo.

    Args:
        chosen: the backend's name: where it is found out at the start, the same settings give another one on another machine.
    """
    shaping = settings.beautify.model_dump(mode="json", exclude={"threads", "max_wait", "timeout"})
    return backend_key(program_version(), shaping | {"backend": chosen, "max_pixels": settings.photos.max_pixels})


def _images_per_call(settings: Settings, providers: Mapping[str, Provider]) -> Callable[[str], int]:
    return lambda name: min(settings.orders.images_per_call, providers[name].max_images_per_call if name in providers else 1)


def _fallback_rules(settings: Settings, providers: Mapping[str, Provider]) -> FallbackRules:
    plans: dict[str, tuple[str, ...]] = {
        name: plan.fallback for name, plan in settings.plans.items() if plan.fallback is not None
    }
    return FallbackRules(
        chains=settings.orders.fallback,
        plans=plans,
        after=settings.orders.fallback_after,
        unpaid={name for name, provider in providers.items() if not provider.is_paid},
        images_per_call=_images_per_call(settings, providers),
    )


def open_http_client(settings: Settings) -> GuardedClient:
    """The client that fetches sources and results."""
    from jobdaemon.http import GuardedClient

    return GuardedClient(allowed_hosts=settings.photos.allowed_hosts)


def open_service_client(settings: Settings) -> GuardedClient:
    """
    The client that calls the services which the settings name.

    Not the one that fetches sources: a customer must not reach a ComfyUI of ours because we may.
    """
    from jobdaemon.http import GuardedClient

    generate = settings.generate
    urls = (generate.openai_images.base_url, generate.dashscope.base_url, generate.jimeng.base_url, *generate.comfyui.servers)
    return GuardedClient(allowed_hosts={urlsplit(url).netloc for url in (*urls, settings.superbed.url)}, max_connections=200)


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
        backend_key=_backend_key(settings, backend.name),
    )
    return {
        Task.BEAUTIFY: BeautifyStage(
            orders=store.orders,
            store=artifacts,
            prewarming=prewarming,
            fetch=lambda url: fetch(url, photos.max_bytes),
            max_photo_bytes=photos.max_bytes,
            images_per_call=_images_per_call(settings, providers),
        ),
        Task.PREWARM: PrewarmStage(
            prewarming, artifacts, lambda url: fetch(url, photos.max_bytes, _PREWARM_FETCH), max_photo_bytes=photos.max_bytes
        ),
        Task.GENERATE: GenerateStage(
            orders=store.orders,
            store=artifacts,
            providers=providers,
            max_photo_bytes=photos.result_max_bytes,
            fallback=_fallback_rules(settings, providers),
            keys=_key_aliases(settings),
            prices=settings.generate.prices(),
            require_room=_require_room(settings),
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
        Task.ABANDON: AbandonStage(orders=store.orders, providers=providers, keys=_key_aliases(settings)),
    }


async def _discard(artifacts: ArtifactStore, keys: tuple[str, ...], events: Events) -> None:
    for key in keys:
        try:
            await artifacts.delete(key)
        except JobdaemonError as error:
            events.emit(UpkeepFailed(error=f"{key} was not deleted: {error}", chore="discard"))
