"""The providers whose sections have what they take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from jobdaemon.app.storage import spools
from jobdaemon.domain.job import generate_queue
from jobdaemon.errors import SettingsError
from jobdaemon.ports import ArtifactStore, PhotoLinks, Provider, UploadedPhotos
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.settings import Settings
from jobdaemon.settings_generate import PhotoLink, what_shapes_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import SecretStr

    from jobdaemon.http import GuardedClient
    from jobdaemon.settings_generate import ProviderKeySettings


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


def with_cache(
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
