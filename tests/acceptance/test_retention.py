"""Orders that ended long ago, as operators meet them: a daemon clears them away, and commands say what is left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobdaemon.embedded import EmbeddedPostgres
from tests.acceptance.conftest import PORTRAIT, Command

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    return Path(shutil.copyfile(PORTRAIT, tmp_path / "ada.png"))


def processed(jobdaemon: Command, portrait: Path, code: int = 0) -> dict[str, Any]:
    result = jobdaemon("process", portrait, "--out", portrait.parent / "out", "--json")
    assert result.returncode == code, result.stderr
    order: dict[str, Any] = json.loads(result.stdout)
    return order


def retire(start: Start, work: Path) -> None:
    """Let a daemon look that keeps photos for a moment only, until that folder is gone."""
    daemon = start("run", JOBDAEMON_RETENTION__PHOTOS="1ms")
    until_gone(work)
    daemon.send_signal(signal.SIGTERM)
    _, errors = daemon.communicate(timeout=60)
    assert daemon.returncode == 0
    assert "orders retired" in errors


def until_gone(folder: Path) -> None:
    give_up = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_retired_order_is_still_told_of(jobdaemon: Command, start: Start, portrait: Path, data_dir: Path) -> None:
    """Its work is gone; it is listed as before, its images are given out again, and `redrive` says why it does nothing."""
    first = processed(jobdaemon, portrait)
    order_id = first["order_id"]
    work = data_dir / "artifacts" / "work" / str(order_id)
    assert work.exists()
    retire(start, work)
    shown = json.loads(jobdaemon("order", order_id, "--json").stdout)
    assert (shown["status"], shown["images_stored"]) == ("completed", 2)
    result = jobdaemon("redrive", order_id)
    assert result.returncode == 1
    assert result.stderr == f"Order {order_id} ended so long ago that its photos are gone, and cannot be redriven.\n"
    shutil.rmtree(portrait.parent / "out")
    assert processed(jobdaemon, portrait)["order_id"] == order_id
    assert len(list((portrait.parent / "out" / "ada").glob("0*"))) == 2


@pytest.mark.parametrize(("stored", "is_made_anew"), [(0, True), (1, False)])
def test_processing_again_what_failed_long_ago(
    jobdaemon: Command, start: Start, portrait: Path, data_dir: Path, stored: int, is_made_anew: bool
) -> None:
    """A photo whose order failed and was retired is ordered anew; one that has some of its images costs nothing more."""
    first = processed(jobdaemon, portrait)
    with EmbeddedPostgres(data_dir) as server, psycopg.connect(server.acquire()) as connection:
        connection.execute(
            "UPDATE jobdaemon.images SET status = 'failed', error = 'the provider was away', object_key = NULL, url = NULL"
            " WHERE order_id = %s AND index > %s",
            [first["order_id"], stored],
        )
        connection.execute(
            "UPDATE jobdaemon.orders SET status = %s, images_stored = %s, images_failed = 2 - %s WHERE id = %s",
            ["partial" if stored else "failed", stored, stored, first["order_id"]],
        )
        connection.commit()
        retire(start, data_dir / "artifacts" / "work" / str(first["order_id"]))
    again = processed(jobdaemon, portrait, code=0 if is_made_anew else 1)
    assert (again["order_id"] != first["order_id"]) is is_made_anew
    assert again["status"] == ("completed" if is_made_anew else "partial")
