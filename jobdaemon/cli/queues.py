"""``queues`` and ``daemons``."""

from __future__ import annotations

from typing import Annotated

import typer

from jobdaemon.cli.output import print_rows
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database


def queues(as_json: AsJson = False, config: ConfigFile = None) -> None:
    """Show how much waits and runs in each queue."""
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        rows = reading.queues(connection)
    columns = ("queue", "ready", "scheduled", "running", "failed", "oldest_ready_seconds", "paused", "team_size", "cluster_limit")
    print_rows(rows, columns, as_json=as_json, empty="There are no queues.")


def daemons(
    include_stopped: Annotated[bool, typer.Option("--all", help="Also those that were stopped.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Show the daemons that share this database."""
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        rows = reading.daemons(connection, include_stopped=include_stopped)
    columns = ("daemon_id", "host", "pid", "version", "status", "running", "queues", "started_at", "last_heartbeat")
    print_rows(rows, columns, as_json=as_json, empty="No daemon is running: start one with `jobdaemon run`.")
