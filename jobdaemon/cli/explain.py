"""``explain``: why the jobs of an order wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.output import print_json, text
from jobdaemon.cli.session import MAX_ID, AsJson, ConfigFile, load, open_database

if TYPE_CHECKING:
    from jobdaemon.cli.reading import Row

_BEHIND = "behind"
_MAX_IDS = 5


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
    print(text(_headline(order, jobs)))
    _print_jobs(jobs)


def _headline(order: Row, jobs: list[dict[str, Any]]) -> str:
    """How the order is, in a sentence or two."""
    is_so = f"Order {order['order_id']} is {order['status']}"
    if order["waiting_for"]:
        return f"{is_so}. Why it waits: {order['waiting_for'].rstrip('.')}."
    statuses = Counter(job["status"] for job in jobs)
    running, waiting = statuses["doing"], statuses["todo"]
    if not running:
        return f"{is_so}."
    runs = f"{running} of its jobs {'runs' if running == 1 else 'run'}"
    return f"{is_so}: {runs}, {waiting} {'waits' if waiting == 1 else 'wait'}." if waiting else f"{is_so}: {runs}."


def _jobs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One document for each job, its reasons in order."""
    names = ("job_id", "queue", "task", "status")
    documents = []
    for job, reasons in groupby(rows, key=lambda row: tuple(row[name] for name in names)):
        told = [{"reason": row["reason"], "told": row["told"], **row["numbers"]} for row in reasons]
        documents.append({**dict(zip(names, job, strict=True)), "reasons": told})
    return documents


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    """Neighbours for which the same holds stand together: a large order would be a hundred times the same lines."""
    for _, group in groupby(jobs, key=_alike):
        same = list(group)
        ids = ", ".join(str(job["job_id"]) for job in same[:_MAX_IDS])
        more = f" and {len(same) - _MAX_IDS} more" if len(same) > _MAX_IDS else ""
        first = same[0]
        what = f"{first['task'].removeprefix('jobdaemon.')}, {first['status']}"
        print(text(f"{'Job' if len(same) == 1 else 'Jobs'} {ids}{more} ({what}):"))
        for reason in first["reasons"]:
            of_first = f"before job {first['job_id']}: " if len(same) > 1 and reason["reason"] == _BEHIND else ""
            print(text(f"  {of_first}{reason['told']}"))


def _alike(job: dict[str, Any]) -> tuple[object, ...]:
    """Equal for jobs that are told in one go: how many go first is another number for each."""
    return (job["queue"], job["task"], job["status"], [r["told"] for r in job["reasons"] if r["reason"] != _BEHIND])
