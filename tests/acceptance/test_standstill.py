"""scripts/standstill: a command and all that it started stand still at the same moments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "standstill"
#: Writes the longest time between two looks at the clock, in seconds.
WATCH = """
import sys, time
was, longest, end = time.monotonic(), 0.0, time.monotonic() + 3
while was < end:
    time.sleep(0.01)
    now = time.monotonic()
    was, longest = now, max(longest, now - was)
open(sys.argv[1], "w").write(str(longest))
"""
#: Leaves a watch behind that is nobody's child and in a session of its own, and watches, too; then ends with 7.
COMMAND = f"""
import os, subprocess, sys, time
WATCH = {WATCH!r}
left, own = sys.argv[1:]
subprocess.run(["setsid", "-f", sys.executable, "-c", WATCH, left], check=True)
subprocess.run([sys.executable, "-c", WATCH, own], check=True)
while not os.path.exists(left) or not open(left).read():
    time.sleep(0.05)
raise SystemExit(7)
"""


def test_all_that_a_command_started_stands_still(tmp_path: Path) -> None:
    """Its child, and a process that it has left behind, each for as long as was asked for; its exit code comes through."""
    left, own = tmp_path / "left", tmp_path / "own"
    options = ["--every", "0.5-1", "--for", "0.4", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, "--", sys.executable, "-c", COMMAND, left, own], timeout=60, check=False
    )
    assert done.returncode == 7
    assert min(float(watched.read_text()) for watched in (left, own)) >= 0.4


def test_no_command_is_a_wrong_usage() -> None:
    """One sentence, exit code 2."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "which command?" in done.stderr) == (2, True)
