"""The benchmark of the daemon's memory, on a few images: all get through, within the bound that is promised for any number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "bench" / "memory"
#: What the daemon and the embedded Postgres may take while images of 2,048 pixels and 5 MB go through.
BOUND_MB = 400


@pytest.mark.slow
@pytest.mark.parametrize("case", ["openai_url", "openai_base64"])
def test_large_images_take_little_memory(case: str) -> None:
    """Linked or inline, five at a call and three calls at once, images lie on disk on their way: memory holds pieces of them."""
    command = [sys.executable, str(PROGRAM), "--only", case, "--images", "45", "--latency", "0.2", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)["case"][case]
    assert (figures["images"], figures["failed"]) == (45, 0)
    assert figures["with_postgres_mb"] < BOUND_MB
    assert figures["peak_mb"] - figures["idle_mb"] < 130
