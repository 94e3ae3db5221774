"""The settings of what retouches photos: ``[beautify]``. A new backend adds its section here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from jobdaemon.settings_sources import Problem
from jobdaemon.settings_values import (
    Cores,
    Duration,
    LongerThanZero,
    Name,
    OptionalPath,
    Section,
    Share,
    Size,
    WebUrl,
    Whole,
    blank,
    lower,
)
from jobdaemon.units import format_duration

#: What can be chosen; jobdaemon.app builds each.
BACKENDS = ("auto", "opencv", "gfpgan", "photo_enhance")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BatchSize = Annotated[Whole, Field(ge=1, le=64)]


def _without_version(value: str | None) -> str | None:
    """As with DashScope's address: who gives it with the version means the same."""
    address = value and value.removesuffix("/api/v1")
    if address and "/api/v1/" in f"{urlsplit(address).path}/":
        raise ValueError('must be the address of the service alone, such as "http://10.0.0.7:8000": "/api/v1/…" is added to it')
    return address


class PhotoEnhanceSettings(Section):
    """
    A photo enhance service (PhotoEnhanceAI) on another machine.

    Attributes:
        url: its address; ``/api/v1`` at its end is taken away.
        poll: how often a photo's task is asked for.
        timeout: for one photo, from upload to result; shorter than the queue's run_timeout.
        max_pixels: of what is sent; a larger photo is sent smaller. The service makes 16 times as many.
        max_result_bytes: largest result that is fetched.
    """

    url: Annotated[WebUrl, AfterValidator(_without_version)] = None
    poll: LongerThanZero = timedelta(seconds=2)
    timeout: LongerThanZero = timedelta(seconds=240)
    max_pixels: Annotated[Whole, Field(ge=65_536, le=12_000_000)] = 6_000_000
    max_result_bytes: Size = 100_000_000


class BeautifySettings(Section):
    """
    How photos are retouched.

    Attributes:
        backend: what retouches the photo; auto is gfpgan where its weights, torch and a CUDA device are, else opencv.
        strength: 0.0 (untouched) to 1.0.
        threads: photos worked on by the CPU at the same time.
        weights: GFPGAN's file.
        weights_sha256: of that file; needed unless GFPGAN's authors released it.
        device: where gfpgan runs.
        dtype: auto is the best that the device has.
        batch: faces computed at once; None: 1 on a CPU, else up to 16, as memory allows.
        max_wait: how long a face waits for company while the device has nothing to do.
        timeout: a process that has had one batch for longer hangs, and is killed.
        compile: whether to fuse the network at each start.
        photo_enhance: the service of the backend of that name.
    """

    backend: Name = "auto"
    strength: Share = 0.7
    threads: Annotated[Cores, Field(ge=1, le=1024)] = 1
    weights: OptionalPath = None
    weights_sha256: Annotated[Sha256 | None, BeforeValidator(lower), BeforeValidator(blank)] = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]{1,2})?)$")] = "cuda"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(lower)] = "auto"
    batch: Annotated[BatchSize | None, BeforeValidator(blank)] = None
    max_wait: Duration = timedelta(milliseconds=20)
    timeout: LongerThanZero = timedelta(seconds=60)
    compile: bool = False
    photo_enhance: PhotoEnhanceSettings = PhotoEnhanceSettings()


def beautify_contradictions(section: BeautifySettings, run_timeout: timedelta) -> Iterator[Problem]:
    """
    What the chosen backend lacks.

    Args:
        run_timeout: of the queue ``beautify``.
    """
    if section.backend == "gfpgan" and section.weights is None:
        yield Problem("beautify.weights", 'must be set, because beautify.backend is "gfpgan"')
    if section.backend not in BACKENDS:
        text = f"there is no backend {section.backend!r}; there is {', '.join(BACKENDS)}"
        yield Problem("beautify.backend", text, is_alone=True)
    if section.backend != "photo_enhance":
        return
    service = section.photo_enhance
    if service.url is None:
        yield Problem("beautify.photo_enhance.url", 'must be set, because beautify.backend is "photo_enhance"')
    if service.timeout >= run_timeout:
        shown = format_duration(run_timeout)
        yield Problem("beautify.photo_enhance.timeout", f"must be shorter than queues.beautify.run_timeout, that is {shown}")


def idle_device(section: BeautifySettings, team_size: int) -> Iterator[tuple[str, str]]:
    """
    What leaves the device of gfpgan idle most of the time, where gfpgan is asked for or may be picked: key and sentence.

    Args:
        team_size: of the queue ``beautify``.
    """
    is_picked = section.backend == "auto" and section.weights is not None
    if section.device == "cpu" or not (section.backend == "gfpgan" or is_picked):
        return
    if team_size == 1:
        yield "queues.beautify.team_size", "is 1: one photo at a time leaves the device idle most of the time"
    if section.threads == 1:
        yield "beautify.threads", 'is 1: the device waits while one core reads and writes photos; "cores" takes them all'
