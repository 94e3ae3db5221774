"""Migrations: from zero, again, from two processes at once, staged; and procrastinate's own put back in their place."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import psycopg
import pytest
from procrastinate.schema import SchemaManager
from psycopg.rows import dict_row

from jobdaemon import schema, schema_version
from jobdaemon.errors import DatabaseUnavailableError, SchemaVersionError
from tests.factories import SOURCE, Sql

REPOSITORY = Path(__file__).parents[2]
STOCK_TRIGGERS = {
    "procrastinate_jobs_notify_queue_job_inserted_v1",
    "procrastinate_trigger_status_events_update_v1",
    "procrastinate_trigger_status_events_insert_v1",
    "procrastinate_trigger_scheduled_events_v1",
}


def _connect(url: str) -> Sql:
    return psycopg.connect(url, autocommit=True, row_factory=dict_row)


def _applied(url: str) -> list[str]:
    with schema.connect(url) as connection:
        return schema.applied_migrations(connection)


def _snapshot(sql: Sql) -> dict[str, list[str]]:
    """Everything that the schema is: columns, indexes, triggers, constraints, functions with their settings, grants."""
    questions = {
        "columns": "SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable, column_default)"
        " FROM information_schema.columns WHERE table_schema = 'jobdaemon'",
        "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'jobdaemon'",
        "triggers": "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
        "constraints": "SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'jobdaemon'::regnamespace",
        "functions": "SELECT pg_get_functiondef(oid) || coalesce(proacl::text, '') FROM pg_proc"
        " WHERE pronamespace = 'jobdaemon'::regnamespace AND prokind = 'f'",
        "grants": "SELECT oid::regclass || ' ' || coalesce(relacl::text, '') FROM pg_class"
        " WHERE relnamespace = 'jobdaemon'::regnamespace",
    }
    return {
        what: sorted(next(iter(row.values())) or "" for row in sql.execute(question.encode()).fetchall())
        for what, question in questions.items()
    }


def test_from_zero_and_again(empty_database: str) -> None:
    """The first run applies every known migration; the second finds nothing to do and changes nothing."""
    assert sorted(schema.migrate(empty_database)) == sorted(schema_version.known_migrations())
    with _connect(empty_database) as sql:
        before = _snapshot(sql)
        assert schema.migrate(empty_database) == []
        assert _snapshot(sql) == before
        assert sorted(_applied(empty_database)) == sorted(schema_version.known_migrations())


def test_second_run_waits_for_nobodys_lock(empty_database: str) -> None:
    """With nothing to do, migrate takes no lock that a running job or a claim could hold: it does not queue behind them."""
    schema.migrate(empty_database)
    with psycopg.connect(empty_database) as worker:
        worker.execute("LOCK TABLE jobdaemon.procrastinate_jobs, jobdaemon.procrastinate_events IN ROW EXCLUSIVE MODE")
        worker.execute("INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name) VALUES ('x', 'x')")
        with psycopg.connect(empty_database, autocommit=True) as owner:
            owner.execute(f"ALTER DATABASE {owner.info.dbname} SET lock_timeout = '3s'".encode())
        assert schema.migrate(empty_database) == []


def test_two_processes_at_once(empty_database: str) -> None:
    """Two machines that migrate at the same moment share the work; neither fails."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        first, second = pool.map(schema.migrate, [empty_database] * 2)
    assert sorted(first + second) == sorted(schema_version.known_migrations())
    assert [] in (first, second)


def test_stages(empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--pre leaves post migrations for later and the program already works; --post applies them; each once."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for path in schema_version.migrations_path().glob("*.sql"):
        (folder / path.name).write_text(path.read_text())
    (folder / "9001_post_contract.sql").write_text("CREATE TABLE contracted ();")
    monkeypatch.setattr(schema, "migrations_path", lambda: folder)
    monkeypatch.setattr(schema_version, "migrations_path", lambda: folder)
    applied = schema.migrate(empty_database, "pre")
    assert "9001_post_contract" not in applied
    state = schema_version.compare(_applied(empty_database))
    state.require_usable()
    assert state.pending_post == ("9001_post_contract",)
    assert schema.migrate(empty_database, "pre") == []
    assert schema.migrate(empty_database, "post") == ["9001_post_contract"]
    assert schema.migrate(empty_database) == []


@pytest.mark.parametrize(("name", "refused"), [("9001_post_future", True), ("9001_pre_future", False)])
def test_newer_schema(empty_database: str, name: str, refused: bool) -> None:
    """A newer program's post migration stops this one with a sentence; its pre migration does not."""
    schema.migrate(empty_database)
    with _connect(empty_database) as sql:
        sql.execute(
            "INSERT INTO jobdaemon._yoyo_migration (migration_hash, migration_id, applied_at_utc) VALUES (%s, %s, now())",
            [name, name],
        )
        state = schema_version.compare(_applied(empty_database))
    if not refused:
        state.require_usable()
        assert schema.migrate(empty_database) == []
        return
    for act in (state.require_usable, lambda: schema.migrate(empty_database)):
        with pytest.raises(SchemaVersionError, match=r"newer than this program.*9001_post_future.*upgrade jobdaemon"):
            act()


def test_older_schema_is_refused(empty_database: str) -> None:
    """A database that lacks a pre migration, or any, is refused with the command to run."""
    assert _applied(empty_database) == []
    with pytest.raises(SchemaVersionError, match="run `jobdaemon migrate`"):
        schema_version.compare([]).require_usable()
    known = schema_version.known_migrations()
    with pytest.raises(SchemaVersionError, match="1 migrations are missing, the first is 0004"):
        schema_version.compare([name for name in known if not name.startswith("0004")]).require_usable()


def test_unreachable_database() -> None:
    """A server that is not there is one sentence, and the password is no part of it."""
    with pytest.raises(DatabaseUnavailableError, match="cannot be reached") as caught:
        schema.migrate("postgresql://u:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in str(caught.value)


def test_failed_migration_leaves_what_was(empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that fails is rolled back and named nowhere as applied; the next run tries it again."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for path in schema_version.migrations_path().glob("*.sql"):
        (folder / path.name).write_text(path.read_text())
    broken = folder / "9001_pre_broken.sql"
    broken.write_text("CREATE TABLE half (); SELECT 1 / 0;")
    monkeypatch.setattr(schema, "migrations_path", lambda: folder)
    monkeypatch.setattr(schema_version, "migrations_path", lambda: folder)
    with pytest.raises(SchemaVersionError, match="division by zero"):
        schema.migrate(empty_database)
    with _connect(empty_database) as sql:
        assert sql.execute("SELECT to_regclass('jobdaemon.half') AS half").fetchone() == {"half": None}
    broken.write_text("CREATE TABLE half ();")
    assert schema.migrate(empty_database) == ["9001_pre_broken"]


@pytest.mark.parametrize("after", [2, len(list(Path(SchemaManager.get_migrations_path()).glob("*.sql"))) + 2])
def test_run_killed_before_it_noted_what_it_did(empty_database: str, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A run that dies between a migration and the note of it, procrastinate's or ours, is simply finished by the next one."""
    mark_one = schema._Backend.mark_one
    calls: list[str] = []

    def dies(backend: schema._Backend, migration: Any, **how: Any) -> None:
        calls.append(migration.id)
        if len(calls) > after:
            raise KeyboardInterrupt
        mark_one(backend, migration, **how)

    with monkeypatch.context() as patch:
        patch.setattr(schema._Backend, "mark_one", dies)
        with pytest.raises(KeyboardInterrupt):
            schema.migrate(empty_database)
    assert calls[-1] in schema.migrate(empty_database)
    assert schema.migrate(empty_database) == []
    assert sorted(_applied(empty_database)) == sorted(schema_version.known_migrations())


def test_procrastinates_migrations_again_on_a_tuned_database(empty_database: str) -> None:
    """Procrastinate's migrations bring back row triggers and functions without a path; migrate puts everything right again."""
    schema.migrate(empty_database)
    folder = Path(SchemaManager.get_migrations_path())
    again = sorted(folder.glob("03.0[34].*.sql"))
    assert again
    with _connect(empty_database) as sql:
        before = _snapshot(sql)
        sql.execute("SET search_path = jobdaemon")
        for path in again:
            text = path.read_text().replace("ADD VALUE", "ADD VALUE IF NOT EXISTS")
            text = re.sub(r"^CREATE (FUNCTION|TRIGGER)", r"CREATE OR REPLACE \1", text, flags=re.MULTILINE)
            text = re.sub(r"^DROP (FUNCTION|TRIGGER|INDEX) (?!IF EXISTS)", r"DROP \1 IF EXISTS ", text, flags=re.MULTILINE)
            sql.execute(text.encode())
        sql.execute("RESET search_path")
        assert _snapshot(sql) != before
        schema.migrate(empty_database)
        after = _snapshot(sql)
        assert after["triggers"] == before["triggers"]
        assert after["indexes"] == before["indexes"]
        assert after["functions"] == before["functions"]
        _check_tuned(sql)


def _check_tuned(sql: Sql) -> None:
    triggers = {row["tgname"] for row in sql.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal").fetchall()}
    assert not triggers & STOCK_TRIGGERS
    loose = sql.execute(
        "SELECT oid::regprocedure::text AS name FROM pg_proc WHERE pronamespace = 'jobdaemon'::regnamespace"
        " AND NOT coalesce('search_path=jobdaemon, pg_temp' = ANY (proconfig), false)"
    ).fetchall()
    assert loose == []
    sql.execute("INSERT INTO jobdaemon.queues (name) VALUES ('upload')")
    sql.execute("INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name) VALUES ('upload', 'x')")
    worker = sql.execute("SELECT * FROM jobdaemon.procrastinate_register_worker_v1()").fetchone()
    assert worker is not None
    sql.execute("SELECT * FROM jobdaemon.claim_jobs('upload', %s, 1)", list(worker.values()))
    rows = sql.execute("SELECT type::text FROM jobdaemon.procrastinate_events ORDER BY id").fetchall()
    assert [row["type"] for row in rows] == ["deferred", "started"]


def test_tuned_from_the_start(empty_database: str) -> None:
    """One event row per transition, every function with its path, no stock trigger, right after the first run."""
    schema.migrate(empty_database)
    with _connect(empty_database) as sql:
        _check_tuned(sql)
        idle = sql.execute(
            "SELECT indexname FROM pg_indexes WHERE schemaname = 'jobdaemon' AND indexdef LIKE '%WHERE false' ORDER BY 1"
        ).fetchall()
        keys = sql.execute(
            "SELECT count(*) AS n FROM pg_constraint"
            " WHERE conrelid = 'jobdaemon.procrastinate_events'::regclass AND contype = 'f'"
        )
        assert keys.fetchone() == {"n": 0}
    assert len(idle) == 4


def test_file_names() -> None:
    """Migrations are named NNNN_pre|post_what.sql and count up from 1 without a gap."""
    names = sorted(path.name for path in (REPOSITORY / "migrations").glob("*.sql"))
    assert all(re.fullmatch(r"\d{4}_(pre|post)_[a-z0-9_]+\.sql", name) for name in names)
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


def test_every_function_of_ours_has_its_own_path() -> None:
    """No function of ours depends on the caller's search_path."""
    for path in [*(REPOSITORY / "migrations").glob("*.sql"), REPOSITORY / "jobdaemon/queue/sql/tune.sql"]:
        text = path.read_text()
        made = len(re.findall(r"^CREATE (?:OR REPLACE )?FUNCTION", text, re.MULTILINE))
        assert (
            text.count("SET search_path = jobdaemon, pg_temp\n") + text.count("SET search_path = jobdaemon, pg_temp SET") == made
        )


@pytest.mark.slow
def test_wheel_brings_the_migrations(tmp_path: Path, empty_database: str) -> None:
    """An installed copy finds its migrations inside the package and migrates a database with them."""
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-c", "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import jobdaemon.schema as s, jobdaemon.schema_version as v;"
        "assert v.__file__.startswith(sys.argv[1]), v.__file__; print(v.migrations_path()); print(len(s.migrate(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed), empty_database], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].endswith("jobdaemon/_migrations")


def test_works_after_migrating(empty_database: str) -> None:
    """A migrated database without rows refuses an order with a sentence that says what to do."""
    schema.migrate(empty_database)
    with _connect(empty_database) as sql, pytest.raises(psycopg.Error, match="none: run jobdaemon migrate"):
        sql.execute("SELECT jobdaemon.enqueue_order('Free', %s)", [SOURCE])
