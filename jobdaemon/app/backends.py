"""The beautify backend, as it is set or as this machine allows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from urllib.parse import urlsplit

from jobdaemon.errors import SettingsError
from jobdaemon.ports import BeautifyBackend
from jobdaemon.settings import Settings

logger = logging.getLogger(__name__)


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
