"""Fixtures for the engine: a database with plans and queues, a store on it, and the factories. Imported by folders' conftest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from psycopg.rows import dict_row

from jobdaemon.db import DatabaseAddress
from jobdaemon.queue import store as store_module
from jobdaemon.queue.store import PostgresJobStore
from tests.factories import PLANS, QUEUES, Claimed, Jobs, Orders, Sql

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


async def ensure_rows(url: str) -> None:
    """Insert the tests' plans and queues."""
    store = PostgresJobStore(DatabaseAddress(url))
    try:
        await store.ensure_rows(QUEUES, PLANS)
    finally:
        await store.close()


@pytest.fixture(scope="session")
def engine_template(postgres: Any, migrated_template: str) -> str:
    """Name of a migrated database with plans and queues, to be cloned and never connected to."""
    name: str = postgres.create_database(template=migrated_template)
    asyncio.run(ensure_rows(postgres.url(name)))
    return name


@pytest.fixture
def engine_database(postgres: Any, engine_template: str) -> Iterator[str]:
    """URL of a database that is ready for work."""
    name = postgres.create_database(template=engine_template)
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture
def sql(engine_database: str) -> Iterator[Sql]:
    """
    An autocommit connection with no search_path of ours.

    A daemon of the same event loop cannot end its transaction while a statement here waits for a lock: what writes beside one
    goes through ``asyncio.to_thread``. A statement that waits anyway fails soon, and says what for.
    """
    with psycopg.connect(engine_database, autocommit=True, row_factory=dict_row, options="-c lock_timeout=10s") as connection:
        yield connection


@pytest.fixture
def patient_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that are made now wait for a lock for as long as it takes: who races others must not lose to a standstill."""
    for patience in ("_CLAIM_PATIENCE", "_COMMIT_PATIENCE"):
        monkeypatch.setattr(store_module, patience, timedelta(minutes=1))


@pytest_asyncio.fixture
async def store(engine_database: str) -> AsyncIterator[PostgresJobStore]:
    """A store of the test's own."""
    store = PostgresJobStore(DatabaseAddress(engine_database))
    yield store
    await store.close()


@pytest_asyncio.fixture
async def daemon_id(store: PostgresJobStore) -> int:
    """A registered daemon."""
    return await store.register(host="test", pid=os.getpid(), version="0", queues=dict.fromkeys(QUEUES, 1))


@pytest.fixture
def order_factory(sql: Sql) -> Orders:
    """Enqueues orders."""
    return Orders(sql)


@pytest.fixture
def job_factory(sql: Sql) -> Jobs:
    """Inserts bare jobs."""
    return Jobs(sql)


@pytest.fixture
def claimed_job_factory(store: PostgresJobStore, order_factory: Orders, daemon_id: int) -> Claimed:
    """Claims jobs."""
    return Claimed(store, order_factory, daemon_id)
