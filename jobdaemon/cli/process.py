"""``jobdaemon process``: photos in, folders of finished images out, in the foreground."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobdaemon.cli.errors import ExitCode
from jobdaemon.cli.session import AsJson, ConfigFile, load

if TYPE_CHECKING:
    from jobdaemon.app import Daemon
    from jobdaemon.events import Events
    from jobdaemon.process import ForegroundRun, PhotoRun, Wish
    from jobdaemon.settings import Settings

#: Ctrl-C, a service manager, a terminal that is closed.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def process(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO|DIR...", help="Photos, or folders of photos.")],
    plan: Annotated[str, typer.Option(help="What to buy: Free, Start or Pro.")] = "Free",
    prompt: Annotated[list[str] | None, typer.Option(help="What to make; repeat it for several.", show_default=False)] = None,
    images: Annotated[int | None, typer.Option(help="Fewer images than the plan gives.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the folders of images go.")] = Path("jobdaemon-out"),
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Turn photos into finished images, here and now; the same call again finishes what is missing."""
    from jobdaemon import app
    from jobdaemon.delivery import find_photos, make_output_folder
    from jobdaemon.errors import SettingsError
    from jobdaemon.events import Events
    from jobdaemon.logs import configure_logs, log_events
    from jobdaemon.process import Wish

    settings = load(config)
    configure_logs(settings.log.format, "warning" if settings.log.level == "info" else settings.log.level)
    events = Events()
    log_events(events)
    if not all(photos):
        raise SettingsError("a PHOTO is empty: is a variable in your command not set?")
    wish = Wish(find_photos([Path(photo) for photo in photos]), out, plan, tuple(prompt) if prompt else None, images)
    make_output_folder(out)
    with app.database_url(settings, events) as url:
        if settings.database.url is None:
            asyncio.run(app.prepare_database(settings, url))
        code = asyncio.run(_process(settings, url, events, wish, as_json=as_json))
    raise typer.Exit(code)


async def _process(settings: Settings, url: str, events: Events, wish: Wish, *, as_json: bool) -> int:
    from jobdaemon import app
    from jobdaemon.cli.live import Display
    from jobdaemon.photo import PhotoLimits
    from jobdaemon.process import ForegroundRun
    from jobdaemon.watch import OrderDesk

    interrupted = asyncio.Event()
    async with app.open_daemon(settings, url, events) as daemon:
        app.require_schema(await daemon.store.applied_migrations())
        desk = OrderDesk(app.address(settings, url))
        with Display(is_json=as_json) as display:
            run = ForegroundRun(
                wish,
                desk=desk,
                artifacts=daemon.artifacts,
                limits=PhotoLimits(settings.photos.max_bytes, settings.photos.max_pixels),
                max_image_bytes=settings.photos.result_max_bytes,
                on_progress=display.show,
                on_finished=display.finished,
            )
            try:
                await _work(run, daemon, interrupted)
            finally:
                await desk.close()
            display.show(run.runs)
    if interrupted.is_set():
        _say_interrupted(run.runs)
        return ExitCode.INTERRUPTED
    return exit_code(run.runs)


async def _work(run: ForegroundRun, worker: Daemon, interrupted: asyncio.Event) -> None:
    """Run daemon and photos together until the photos are done, somebody interrupts, or one of the two fails."""
    supervisor = worker.supervisor
    loop = asyncio.get_running_loop()

    def interrupt(name: str) -> None:
        interrupted.set()
        supervisor.stop(name)

    for number in _STOPS:
        loop.add_signal_handler(number, interrupt, number.name)
    daemon = asyncio.ensure_future(supervisor.run(wait_for_database=False))
    photos = asyncio.ensure_future(run.run())
    try:
        await asyncio.wait({daemon, photos}, return_when=asyncio.FIRST_COMPLETED)
        if not photos.done():
            photos.cancel()
    finally:
        supervisor.stop("done")
        if not interrupted.is_set():
            supervisor.stop("done")  # our orders have ended; what else runs here is handed back
        results = await asyncio.gather(daemon, photos, return_exceptions=True)
        for number in _STOPS:
            loop.remove_signal_handler(number)
    for result in results:
        if isinstance(result, Exception):
            raise result


def exit_code(runs: Sequence[PhotoRun]) -> ExitCode:
    """0 when every photo got all its images; else that of the worst that happened."""
    if any(run.status not in ("completed", "refused") for run in runs):
        return ExitCode.FAILED
    return ExitCode.REFUSED if any(run.status == "refused" for run in runs) else ExitCode.DONE


def _say_interrupted(runs: Sequence[PhotoRun]) -> None:
    left = sum(not run.is_finished for run in runs)
    print(f"interrupted: {left} of {len(runs)} photos are not finished; the same call goes on with them", file=sys.stderr)
