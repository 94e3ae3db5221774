"""Following one order to its end: LISTEN for its changes, and a slow poll below it, since a notification may be lost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from jobdaemon.cli import reading
from jobdaemon.cli.output import text
from jobdaemon.domain.order import ENDED_STATUSES

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.cli.reading import Row

_CHANNEL = "jobdaemon_orders"


def follow(connection: psycopg.Connection[Any], order_id: int, *, poll: timedelta, is_silent: bool) -> None:
    """
    Show the order's progress until it has ended.

    Raises:
        RefusedError: JD005, there is no such order.
    """
    # Listening comes first: what changes between the look and the wait is heard.
    connection.execute(f"LISTEN {_CHANNEL}")
    with _display(is_silent=is_silent) as show:
        while True:
            row = reading.order_progress(connection, order_id)
            show(row)
            if row["status"] in ENDED_STATUSES:
                break
            _wait_for_change(connection, order_id, poll)
    connection.execute(f"UNLISTEN {_CHANNEL}")


def _wait_for_change(connection: psycopg.Connection[Any], order_id: int, poll: timedelta) -> None:
    # Other orders' notifications must not put the poll off for ever.
    deadline = time.monotonic() + poll.total_seconds()
    while (left_s := deadline - time.monotonic()) > 0:
        for notification in connection.notifies(timeout=left_s, stop_after=1):
            if _order_of(notification.payload) == order_id:
                return


def _order_of(payload: str) -> object:
    try:
        return json.loads(payload)["order_id"]
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def _display(*, is_silent: bool) -> Iterator[Callable[[Row], None]]:
    if is_silent:
        yield lambda _row: None
    elif sys.stdout.isatty():
        with _live_bar() as show:
            yield show
    else:
        said: list[str] = []

        def say(row: Row) -> None:
            line = _line(row)
            if said[-1:] != [line]:
                said.append(line)
                print(line, flush=True)

        yield say


def _line(row: Row) -> str:
    failed = f", {row['images_failed']} failed" if row["images_failed"] else ""
    waiting = f"; waits: {row['waiting_for']}" if row["waiting_for"] else ""
    images = f"{row['images_stored']} of {row['images_total']} images"
    return text(f"order {row['order_id']}: {row['status']}, {images}{failed}{waiting}")


@contextmanager
def _live_bar() -> Iterator[Callable[[Row], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # markup=False: what the database says is text, not markup.
    with Progress(BarColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=None)

        def show(row: Row) -> None:
            done = row["images_stored"] + row["images_failed"]
            progress.update(task, total=row["images_total"], completed=done, description=_line(row))

        yield show
