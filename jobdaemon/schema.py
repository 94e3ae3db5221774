"""
Bringing a database's schema up to date.

Migrations are run by yoyo on one psycopg connection whose search_path is our schema. Two sources: procrastinate's own
migrations (a fresh database gets its current schema instead, and all of them are recorded as applied) and ours in
``migrations/``. After either, the tune step runs. yoyo's lock table is not used: a killed migration would leave it locked,
while an advisory lock ends with its connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import psycopg
import psycopg.conninfo
import psycopg.sql
from procrastinate.schema import SchemaManager
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.migrations import read_migrations

from jobdaemon.errors import DatabaseUnavailableError, SchemaVersionError, SettingsError
from jobdaemon.schema_version import compare, is_post, migrations_path

SCHEMA = "jobdaemon"
#: Any number that no other advisory lock in the database uses.
_MIGRATION_LOCK = 7_236_451_100_231
_MIGRATION_TABLE = "_yoyo_migration"

Stage = Literal["pre", "post"]


def applied_migrations(connection: psycopg.Connection[Any]) -> list[str]:
    """What the database behind *connection* records as applied; nothing when it was never migrated."""
    row = connection.execute("SELECT to_regclass(%s)", [f"{SCHEMA}.{_MIGRATION_TABLE}"]).fetchone()
    if row is None or row[0] is None:
        return []
    table = psycopg.sql.Identifier(SCHEMA, _MIGRATION_TABLE)
    return [name for (name,) in connection.execute(psycopg.sql.SQL("SELECT migration_id FROM {}").format(table))]


def connect(url: str, *, connect_timeout_s: int = 5) -> psycopg.Connection[Any]:
    """
    An autocommit psycopg connection.

    Raises:
        DatabaseUnavailableError: one sentence; the password is never part of it.
        SettingsError: *url* is no URL.
    """
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        # libpq quotes the part it cannot read, which may be the password.
        raise SettingsError("database.url: is not a URL that Postgres can read") from None
    try:
        return psycopg.connect(url, autocommit=True, connect_timeout=connect_timeout_s, application_name="jobdaemon")
    except psycopg.Error as error:
        raise DatabaseUnavailableError(_one_sentence(error)) from error


def _one_sentence(error: psycopg.Error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"The database cannot be reached: {lines[0] if lines else type(error).__name__}"


@dataclass(frozen=True, slots=True)
class _Address:
    """What yoyo wants to know of a URL; libpq, which knows every form of one, reads the rest."""

    url: str
    database: str = ""


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]  # yoyo has no types
    """yoyo on connections of ours, inside our schema. It opens a second one for each migration it runs."""

    def connect(self, dburi: _Address) -> psycopg.Connection[Any]:
        connection = connect(dburi.url)
        connection.execute(f"SET search_path = {SCHEMA}, pg_temp")
        connection.execute("SET client_min_messages = warning")
        # A migration that cannot have its lock soon gives up instead of making everybody queue behind it.
        connection.execute("SET lock_timeout = '10s'")
        return connection


def migrate(url: str, stage: Stage | None = None) -> list[str]:
    """
    Bring a database's schema up to what this program knows; safe to run twice and from two machines at once.

    Args:
        url: any URL libpq takes; its role must own (or may create) schema ``jobdaemon``.
        stage: only pre migrations, only post migrations, or both.

    Returns:
        Ids of the migrations applied now; empty when there was nothing to do.

    Raises:
        DatabaseUnavailableError: cannot connect.
        SchemaVersionError: the schema is newer than this program, or a migration failed (it was rolled back).
    """
    try:
        with _backend(url) as backend:
            applied = _apply(backend, stage)
            backend.connection.execute((resources.files("jobdaemon.queue.sql") / "tune.sql").read_text(encoding="utf-8"))
            return applied
    except psycopg.OperationalError as error:
        raise DatabaseUnavailableError(_one_sentence(error)) from error
    except psycopg.Error as error:
        raise SchemaVersionError(f"The migration failed and was rolled back: {str(error).splitlines()[0]}") from error


@contextmanager
def _backend(url: str) -> Iterator[Any]:
    with connect(url) as lock:
        lock.execute("SELECT pg_advisory_lock(%s)", [_MIGRATION_LOCK])
        lock.execute(psycopg.sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(psycopg.sql.Identifier(SCHEMA)))
        backend = _Backend(_Address(url), _MIGRATION_TABLE)
        try:
            backend.init_database()
            yield backend
        finally:
            backend.connection.close()


def _require_empty_schema(connection: psycopg.Connection[Any]) -> None:
    """A schema of our name that records no migration of ours must hold nothing: it may be somebody else's."""
    row = connection.execute(
        "SELECT count(*) FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r' AND relname NOT LIKE %s",
        [SCHEMA, "%yoyo%"],
    ).fetchone()
    if row is not None and row[0] > 0:
        raise SchemaVersionError(
            f"Schema {SCHEMA} of this database belongs to something else: it has {row[0]} tables that are not ours."
        )


def _apply(backend: Any, stage: Stage | None) -> list[str]:
    connection: psycopg.Connection[Any] = backend.connection
    applied = applied_migrations(connection)
    if not applied:
        _require_empty_schema(connection)
    state = compare(applied)
    if state.unknown_post:
        state.require_usable()
    if stage == "post" and state.pending_pre:
        raise SchemaVersionError(f"{state.pending_pre[0]} comes first: run `jobdaemon migrate --pre`.")
    # yoyo takes Python files for migrations too, and procrastinate's folder is a package.
    theirs = read_migrations(SchemaManager.get_migrations_path()).filter(lambda migration: migration.path.endswith(".sql"))
    done: list[str] = []
    row = connection.execute("SELECT to_regclass('procrastinate_jobs')").fetchone()
    # A migration and the note that it was applied are one transaction: a run that is killed can simply be run again.
    backend.ensure_internal_schema_updated()
    if row is None or row[0] is None:
        with connection.transaction():
            connection.execute(SchemaManager.get_schema())
            for migration in theirs:
                backend.mark_one(migration)
        done += sorted(migration.id for migration in theirs)
    for migrations in (theirs, read_migrations(str(migrations_path()))):
        for migration in backend.to_apply(migrations):
            if stage is None or is_post(migration.id) == (stage == "post"):
                _apply_one(backend, migration)
                done.append(migration.id)
    return done


def _apply_one(backend: Any, migration: Any) -> None:
    migration.load()
    if not migration.use_transactions:
        backend.apply_one(migration)
        return
    with backend.connection.transaction():
        backend.connection.execute(Path(migration.path).read_bytes())
        backend.mark_one(migration)
