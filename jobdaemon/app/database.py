"""The database: the configured one or the embedded one, its schema, and the rows that the settings ask for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobdaemon import schema_version
from jobdaemon.db import DatabaseAddress
from jobdaemon.domain.rows import differing_rows
from jobdaemon.errors import DatabaseUnavailableError
from jobdaemon.events import DatabaseLost, Event, Events, SettingsOverruled
from jobdaemon.queue.store import PostgresJobStore
from jobdaemon.settings import Settings
from jobdaemon.settings_rows import SELECT_ROWS, overruled, plans, provider_keys, queue_names, wanted_rows

#: Between two tries to start an embedded server that died.
_REVIVE_S = 1.0


@contextmanager
def database_url(settings: Settings, events: Events | None = None) -> Iterator[str]:
    """
    The configured database, or the embedded one, kept running for as long as the block.

    Args:
        events: when they say that the database was lost, the embedded one is started again.

    Raises:
        DatabaseUnavailableError: the embedded server does not start.
    """
    if settings.database.url is not None:
        yield settings.database.url.get_secret_value()
        return
    from jobdaemon.embedded import EmbeddedPostgres

    server = EmbeddedPostgres(settings.data_dir)
    url = server.acquire()
    closing = threading.Event()
    unsubscribe = None if events is None else events.subscribe(lambda event: _revive(event, server.acquire, closing))
    try:
        yield url
    finally:
        closing.set()
        if unsubscribe is not None:
            unsubscribe()
        server.release()


def _revive(event: Event, acquire: Callable[[], str], closing: threading.Event) -> None:
    """Start a server that died, in a thread: the event loop must go on."""

    def keep_trying() -> None:
        while not closing.wait(_REVIVE_S):
            try:
                acquire()
            except DatabaseUnavailableError:
                continue
            return

    if isinstance(event, DatabaseLost):
        threading.Thread(target=keep_trying, name="revive-postgres", daemon=True).start()


def address(settings: Settings, url: str) -> DatabaseAddress:
    """How asyncpg reaches *url*."""
    return DatabaseAddress(
        url,
        connect_timeout=settings.database.connect_timeout,
        idle_in_transaction=settings.engine.lease,
        use_statement_cache=settings.database.statement_cache,
    )


async def ensure_rows(store: PostgresJobStore, settings: Settings, events: Events | None = None) -> None:
    """
    Insert the plans, queues and provider keys that are missing; an operator's rows stay as they are.

    Args:
        events: tell where such a row says something else than the settings.
    """
    await store.ensure_rows(queue_names(settings), plans(settings), provider_keys(settings))
    if events is None:
        return
    for row in differing_rows(wanted_rows(settings), await store.rows(SELECT_ROWS)):
        if row.named:
            events.emit(SettingsOverruled(row=row.title, reason=": ".join(overruled(row))))


def require_schema(applied: list[str]) -> None:
    """
    Raises:
        SchemaVersionError: a database that records these migrations does not fit this program.
    """
    schema_version.compare(applied).require_usable()


async def prepare_database(settings: Settings, url: str) -> list[str]:
    """
    Bring the embedded database up to date, and insert missing rows; quick where there is nothing to do.

    Returns:
        Ids of the migrations applied now.
    """
    applied: list[str] = []
    store = PostgresJobStore(address(settings, url))
    try:
        state = schema_version.compare(await store.applied_migrations())
        if state.pending_pre or state.pending_post:
            from jobdaemon.schema import migrate

            applied = await asyncio.to_thread(migrate, url)
        await ensure_rows(store, settings)
    finally:
        await store.close()
    return applied
