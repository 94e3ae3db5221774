"""
The daemon as a service: signals in, systemd's notifications out.

SIGTERM and SIGINT stop it, a second one cuts short what still runs, SIGHUP reloads the settings' team sizes. READY is sent
when the daemon can work, WATCHDOG only while its loops go round.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable
from datetime import timedelta

from jobdaemon import app
from jobdaemon.errors import SettingsError
from jobdaemon.events import DaemonReady, DaemonStopping, Event, Events, SettingsReloaded, UpkeepFailed
from jobdaemon.sdnotify import SystemdNotifier
from jobdaemon.settings import Settings

#: Asked of systemd at each failed try to reach the database, which come more often than this.
_START_EXTENSION = timedelta(seconds=30)


async def serve(
    settings: Settings, url: str, events: Events, *, reload: Callable[[], Settings], notifier: SystemdNotifier
) -> None:
    """
    Run a daemon until a signal stops it.

    Args:
        url: the database.
        reload: reads the settings again, for SIGHUP.

    Raises:
        SettingsError: a configured part cannot work on this machine.
        SchemaVersionError: the database's schema does not fit this program.
    """
    async with app.open_daemon(settings, url, events) as daemon:
        # What is there now stays: going through it again in each full collection would hold the event loop up, for 40 to 75 ms.
        gc.collect()
        gc.freeze()
        supervisor = daemon.supervisor
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop, number.name)
        loop.add_signal_handler(signal.SIGHUP, _reload, daemon, reload, events, notifier)
        unsubscribe = events.subscribe(lambda event: _tell_systemd(event, notifier, settings.engine.stop_grace))
        watchdog = asyncio.ensure_future(_feed_watchdog(daemon, notifier))
        try:
            await supervisor.run(wait_for_database=True)
        finally:
            watchdog.cancel()
            unsubscribe()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)


def _tell_systemd(event: Event, notifier: SystemdNotifier, stop_grace: timedelta) -> None:
    match event:
        case DaemonReady():
            notifier.ready("working")
        case DaemonStopping():
            notifier.stopping("finishing what runs")
            notifier.extend_timeout(stop_grace + _START_EXTENSION)
        case UpkeepFailed(chore="start"):
            notifier.extend_timeout(_START_EXTENSION)
            notifier.status(event.error)
        case _:
            pass


def _reload(daemon: app.Daemon, reload: Callable[[], Settings], events: Events, notifier: SystemdNotifier) -> None:
    notifier.reloading()
    try:
        daemon.supervisor.resize(app.team_sizes(reload()))
    except SettingsError as error:
        events.emit(SettingsReloaded(error=str(error)))
    else:
        events.emit(SettingsReloaded())
    notifier.ready("working")


async def _feed_watchdog(daemon: app.Daemon, notifier: SystemdNotifier) -> None:
    interval = notifier.watchdog_interval
    if interval is None:
        return
    while True:
        if daemon.supervisor.is_progressing():
            notifier.watchdog()
        await asyncio.sleep(interval.total_seconds() / 2)
