"""``explain``: why the jobs of an order wait."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.output import print_json, text
from jobdaemon.cli.session import MAX_ID, AsJson, ConfigFile, load, open_database

if TYPE_CHECKING:
    from jobdaemon.cli.reading import Row


def explain(
    any_id: Annotated[int, typer.Argument(metavar="ORDER", min=1, max=MAX_ID, help="An order.", show_default=False)],
    is_job: Annotated[bool, typer.Option("--job", help="ORDER is a job's id: only this one.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Say why an order waits: each job that is open or was given up, with all that stands in its way."""
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        order = None if is_job else reading.order_progress(connection, any_id)
        jobs = _jobs(reading.explained(connection, any_id, is_job=is_job))
    if order is None:
        if as_json:
            print_json(jobs[0])
        else:
            _print_jobs(jobs)
        return
    if as_json:
        print_json({name: order[name] for name in ("order_id", "status", "waiting_for")} | {"jobs": jobs})
        return
    waits = f"; it waits for: {order['waiting_for']}" if order["waiting_for"] else ""
    print(text(f"Order {any_id} is {order['status']}{waits}."))
    _print_jobs(jobs)


def _jobs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One document for each job, its reasons in order."""
    names = ("job_id", "queue", "task", "status")
    documents = []
    for job, reasons in groupby(rows, key=lambda row: tuple(row[name] for name in names)):
        told = [{"reason": row["reason"], "told": row["told"], **row["numbers"]} for row in reasons]
        documents.append({**dict(zip(names, job, strict=True)), "reasons": told})
    return documents


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        print(text(f"Job {job['job_id']} ({job['task'].removeprefix('jobdaemon.')}, {job['status']}):"))
        for reason in job["reasons"]:
            print(text(f"  {reason['told']}"))
