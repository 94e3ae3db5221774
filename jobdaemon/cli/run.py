"""``jobdaemon run``: the daemon."""

from __future__ import annotations

import asyncio

from jobdaemon.cli.session import ConfigFile, load


def run(config: ConfigFile = None) -> None:
    """Work the queues until SIGTERM or Ctrl-C; a second one cuts short what still runs. SIGHUP reloads the settings."""
    from jobdaemon import allocator, app
    from jobdaemon.cli.service import serve
    from jobdaemon.events import Events
    from jobdaemon.logs import configure_logs, log_events
    from jobdaemon.sdnotify import SystemdNotifier

    allocator.keep_little()
    settings = load(config)
    configure_logs(settings.log.format, settings.log.level)
    events = Events()
    log_events(events)
    with SystemdNotifier() as notifier, app.database_url(settings, events) as url:
        if settings.database.url is None:
            asyncio.run(app.prepare_database(settings, url))
        asyncio.run(serve(settings, url, events, reload=lambda: load(config), notifier=notifier))
