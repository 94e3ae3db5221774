"""The benchmark of the cluster limit's cost, on a few jobs: that it runs and judges, not what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "bench" / "limits"


@pytest.mark.slow
def test_every_case_is_drained_by_real_daemons_and_compared() -> None:
    """Each case is drained in each round, and each ratio comes with the line that it is held against."""
    command = [sys.executable, str(PROGRAM), "--jobs", "200", "--rounds", "2", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    assert {name: len([speed for speed in rounds if speed > 0]) for name, rounds in figures["rounds"].items()} == dict.fromkeys(
        [
            "one_process_no_limit",
            "one_process_limit_far",
            "four_processes_no_limit",
            "four_processes_limit_far",
            "four_processes_limit_binds",
        ],
        2,
    )
    assert figures["at_least"] == {"not_binding_1": 0.9, "not_binding_4": 0.6, "binding_4": 0.4}
    assert figures["ratios"].keys() == figures["at_least"].keys()
