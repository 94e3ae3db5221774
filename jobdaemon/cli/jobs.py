"""``jobs`` and ``job``: below the orders, for who has to find out why one is stuck."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobdaemon.cli.output import print_fields, print_json, print_rows
from jobdaemon.cli.session import MAX_ID, AsJson, ConfigFile, load, open_database


class JobStatusOption(StrEnum):
    """procrastinate's own words."""

    TODO = "todo"
    DOING = "doing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABORTED = "aborted"


def jobs(
    queue: Annotated[str | None, typer.Option(help="Only this queue.", show_default=False)] = None,
    status: Annotated[JobStatusOption | None, typer.Option(help="Only this status.", show_default=False)] = None,
    order: Annotated[int | None, typer.Option(min=1, max=MAX_ID, help="Only this order's.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 50,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """List jobs, the newest first."""
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        rows = reading.jobs(connection, queue=queue, status=status, order_id=order, limit=limit)
    columns = ("job_id", "queue", "status", "order_id", "attempts", "priority", "scheduled_at", "daemon_id")
    print_rows(rows, columns, as_json=as_json, empty="There are no such jobs.")


def job(
    job_id: Annotated[int, typer.Argument(metavar="ID", min=1, max=MAX_ID, help="The job.", show_default=False)],
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Show one job: its arguments, its attempts that failed, and everything that happened to it."""
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        document = reading.job_document(connection, job_id)
    if as_json:
        print_json(document)
        return
    attempts, events = document.pop("failed_attempts"), document.pop("events")
    print_fields(document)
    print()
    columns = ("attempt", "outcome", "started_at", "ended_at", "daemon_id", "error_kind", "error")
    print_rows(attempts, columns, as_json=False, empty="No attempt has failed.")
    print()
    print_rows(events, ("type", "at"), as_json=False, empty="Nothing happened to it yet.")
