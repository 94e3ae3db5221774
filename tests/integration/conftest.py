"""The engine's fixtures."""

from __future__ import annotations

from tests.fixtures_engine import (
    claimed_job_factory,
    daemon_id,
    engine_database,
    engine_template,
    job_factory,
    order_factory,
    patient_locks,
    sql,
    store,
)

__all__ = [
    "claimed_job_factory",
    "daemon_id",
    "engine_database",
    "engine_template",
    "job_factory",
    "order_factory",
    "patient_locks",
    "sql",
    "store",
]
