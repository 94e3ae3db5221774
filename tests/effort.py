"""How much a test does: a little in every run, all of it in a thorough one."""

from __future__ import annotations

from hypothesis import settings

#: Set by ``scripts/test --slow``, through Hypothesis's profile; the profiles are made in conftest.py.
IS_THOROUGH = settings.default is not None and settings.default.max_examples >= 500


def examples(thorough: int) -> int:
    """How many examples a property is tried with: *thorough*, or a fifth of it in every run."""
    return thorough if IS_THOROUGH else max(thorough // 5, 10)
