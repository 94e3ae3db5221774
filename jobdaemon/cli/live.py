"""What ``process`` shows while it works: a live table on a terminal, plain lines elsewhere, JSON at the end of each photo."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobdaemon.delivery import as_json
from jobdaemon.intake import printable
from jobdaemon.process import PhotoRun
from jobdaemon.progress import Pace

_MAX_ROWS = 20
#: What holds nobody up, as order_progress begins to say it: workers are busy with others, or about to take it.
_ORDINARY = re.compile(r"every worker |nothing is in its way|it is lifted|\d+\+? (lifted )?jobs? go(es)? first")


class Display:
    """Progress on standard error, results on standard output."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=False) if self._console.is_terminal else None
        self._pace = Pace(time.monotonic())
        self._said: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, runs: Sequence[PhotoRun]) -> None:
        """Show where every photo stands."""
        if self._live is not None:
            self._live.update(self._table(runs))
        elif not self._is_json:
            self._say_changes(runs)

    def finished(self, run: PhotoRun) -> None:
        """Say what became of one photo."""
        if self._is_json:
            sys.stdout.write(as_json(run.document()) + "\n")
            sys.stdout.flush()
        elif run.delivery is not None and run.delivered:
            print(f"{run.shown_photo}: {len(run.delivered)} images in {printable(run.delivery.folder)}", flush=True)
        if run.error is not None:
            # What the door says of a photo names it already.
            text = run.error if run.status == "refused" else f"{printable(run.photo)}: {run.error}"
            self._console.print(Text(text), soft_wrap=True)

    def _say_changes(self, runs: Sequence[PhotoRun]) -> None:
        names = [run.photo.name for run in runs]
        for run in runs:
            state = (_state(run), len(run.delivered))
            if self._said.get(str(run.photo)) != state and run.row:
                self._said[str(run.photo)] = state
                name = run.shown_photo if names.count(run.photo.name) == 1 else printable(run.photo)
                print(f"{name}: {state[0]}, {state[1]}/{run.row['images_total']} images", file=sys.stderr, flush=True)

    def _table(self, runs: Sequence[PhotoRun]) -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("photo", overflow="ellipsis", max_width=32)
        table.add_column("order", justify="right")
        table.add_column("stage")
        table.add_column("images", justify="right")
        table.add_column("", min_width=20)
        shown = sorted(runs, key=lambda run: run.is_finished)[:_MAX_ROWS]
        for run in shown:
            total = run.row.get("images_total", 0)
            failed = run.row.get("images_failed", 0)
            images = f"{len(run.delivered)}/{total}" + (f" ({failed} failed)" if failed else "") if total else ""
            bar = ProgressBar(total=max(total, 1), completed=len(run.delivered) + failed, width=24)
            table.add_row(Text(run.shown_photo), str(run.order_id or ""), Text(_state(run)), images, bar)
        if len(runs) > len(shown):
            table.add_row(f"… and {len(runs) - len(shown)} more", "", "", "", "")
        return Group(table, Text(self._total(runs)))

    def _total(self, runs: Sequence[PhotoRun]) -> str:
        done = sum(len(run.delivered) for run in runs)
        total = sum(run.row.get("images_total", 0) for run in runs)
        finished = sum(run.is_finished for run in runs)
        return f"{finished}/{len(runs)} photos, {done}/{total} images{self._pace.text(done, total, time.monotonic())}"


def _state(run: PhotoRun) -> str:
    """A photo's stage, and why it does not move when something holds it up."""
    if run.status == "completed" and not run.is_finished:
        return "delivering"
    waiting_for = run.row.get("waiting_for")
    return f"{run.status}: {waiting_for}" if waiting_for and not _ORDINARY.match(waiting_for) else run.status
