"""A small network's weights for tests of what is around it; made in a process of its own, so that torch stays out of this one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["narrow_weights"]

_MAKE = """
import sys
from pathlib import Path
from tests.face_network import random_network, save_weights
print(save_weights(random_network(narrow=True), Path(sys.argv[1])))
"""


@dataclass(frozen=True, slots=True)
class Weights:
    """A file and its digest."""

    path: Path
    sha256: str

    def settings(self) -> dict[str, str]:
        """Variables that make a command use it, on the CPU."""
        return {
            "JOBDAEMON_BEAUTIFY__BACKEND": "gfpgan",
            "JOBDAEMON_BEAUTIFY__WEIGHTS": str(self.path),
            "JOBDAEMON_BEAUTIFY__WEIGHTS_SHA256": self.sha256,
            "JOBDAEMON_BEAUTIFY__DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }


@pytest.fixture(scope="session")
def narrow_weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Random weights of the narrow network."""
    if not all(importlib.util.find_spec(package) for package in ("torch", "spandrel")):
        pytest.skip("torch or spandrel is not installed (scripts/test installs them)")
    path = tmp_path_factory.mktemp("weights") / "narrow.pth"
    root = Path(__file__).parents[1]
    made = subprocess.run([sys.executable, "-c", _MAKE, str(path)], cwd=root, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return Weights(path, made.stdout.split()[-1])
