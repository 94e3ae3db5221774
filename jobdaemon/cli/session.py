"""What every verb begins with: settings, and a database that is up to date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.settings import Settings

ConfigFile: TypeAlias = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings file.", show_default=False)
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
#: Ids are Postgres bigints.
MAX_ID = 2**63 - 1


def load(config: Path | None) -> Settings:
    """
    The settings.

    Raises:
        SettingsError: wrong.
    """
    from jobdaemon.settings import load_settings

    return load_settings(config)


@contextmanager
def open_database(settings: Settings, *, must_fit: bool = True) -> Iterator[psycopg.Connection[Any]]:
    """
    An autocommit connection to the configured database, or to the embedded one, which is started and brought up to date.

    Args:
        must_fit: False for who looks at the schema itself.

    Raises:
        DatabaseUnavailableError: cannot connect.
        SchemaVersionError: the schema of a configured database does not fit: only its operator migrates it.
    """
    from jobdaemon import app
    from jobdaemon.schema import connect

    with app.database_url(settings) as url:
        seconds = max(1, round(settings.database.connect_timeout.total_seconds()))
        with connect(url, connect_timeout_s=seconds) as connection:
            if not settings.database.statement_cache:
                connection.prepare_threshold = None
            if settings.database.url is None:
                _bring_up_to_date(connection, settings, url)
            if must_fit:
                _require_fitting_schema(connection)
            yield connection


def _bring_up_to_date(connection: psycopg.Connection[Any], settings: Settings, url: str) -> None:
    import asyncio

    from jobdaemon import app
    from jobdaemon.schema import applied_migrations
    from jobdaemon.schema_version import compare

    state = compare(applied_migrations(connection))
    if state.pending_pre or state.pending_post or missing_rows(connection, settings) != ([], []):
        asyncio.run(app.prepare_database(settings, url))


def missing_rows(connection: psycopg.Connection[Any], settings: Settings) -> tuple[list[str], list[str]]:
    """Names of plans and of queues that the settings know and the database does not."""
    from jobdaemon import settings_rows

    plans = {name for (name,) in connection.execute("SELECT name FROM jobdaemon.plans")}
    queues = {name for (name,) in connection.execute("SELECT name FROM jobdaemon.queues")}
    return (
        [plan.name for plan in settings_rows.plans(settings) if plan.name not in plans],
        [name for name in settings_rows.queue_names(settings) if name not in queues],
    )


def _require_fitting_schema(connection: psycopg.Connection[Any]) -> None:
    import psycopg.errors

    from jobdaemon.schema import applied_migrations
    from jobdaemon.schema_version import compare

    try:
        applied = applied_migrations(connection)
    except psycopg.errors.InsufficientPrivilege:
        return  # a producer's or reader's login may not look; what it may do answers for itself
    compare(applied).require_usable()


def show_version() -> None:
    """Show the version."""
    from importlib.metadata import version

    print(f"jobdaemon {version('jobdaemon')}")
