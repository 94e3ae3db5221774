"""Prewarming with real daemons: an order that finds its photo retouched, idle slots only, and what survives a kill."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from jobdaemon import app
from jobdaemon.app import Daemon
from jobdaemon.backends.opencv import OpenCVBackend
from jobdaemon.domain.artifact import source_key
from jobdaemon.domain.job import PREWARM_PRIORITY, Task
from jobdaemon.events import JobFinished
from jobdaemon.ports import Attempt, BeautifiedPhoto, BeautifyBackend
from jobdaemon.settings import Settings, load_settings
from tests.daemons import NO_POLL, Stages, running_daemon, until
from tests.factories import Orders, Row, Sql
from tests.integration.test_orders_openai_images import PORTRAIT, daemon

QUICK = {"JOBDAEMON_ENGINE__HEARTBEAT": "200ms", "JOBDAEMON_ENGINE__LEASE": "20s", "JOBDAEMON_ENGINE__POLL": "300ms"}


class CountingBackend:
    """The real backend, and how often it was asked."""

    def __init__(self, backend: BeautifyBackend) -> None:
        self.name = backend.name
        self.model = backend.model
        self.backend = backend
        self.calls: list[float] = []

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        self.calls.append(strength)
        return await self.backend.beautify(photo, strength=strength)

    async def close(self) -> None:
        await self.backend.close()


class Studio:
    """A database and a folder for daemons that work here; the portrait lies in the store."""

    def __init__(self, url: str, folder: Path, sql: Sql) -> None:
        self.url = url
        self.folder = folder
        self.sql = sql
        self.orders = Orders(sql)
        self.backends: list[CountingBackend] = []
        self.digest = hashlib.sha256(PORTRAIT.read_bytes()).hexdigest()
        self.source = f"artifact:{source_key(self.digest, 'png')}"
        self.store(self.source, PORTRAIT.read_bytes())

    def path(self, key: str) -> Path:
        return self.folder / "artifacts" / key

    def store(self, source: str, content: bytes) -> None:
        target = self.path(source.removeprefix("artifact:"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def settings(self, **variables: str) -> Settings:
        environ = dict(os.environ) | QUICK | {"JOBDAEMON_DATA_DIR": str(self.folder)}
        return load_settings(environ=environ | {f"JOBDAEMON_{name}": value for name, value in variables.items()})

    @asynccontextmanager
    async def at_work(self, **variables: str) -> AsyncIterator[Daemon]:
        """A daemon whose customers are served by nobody after beautify, unless a test lets it."""
        async with daemon(self.settings(**variables), self.url) as running:
            await asyncio.to_thread(self.sql.execute, "SELECT jobdaemon.pause_queue('generate.local')")
            yield running

    @property
    def calls(self) -> int:
        """How often a backend was asked, over all daemons."""
        return sum(len(backend.calls) for backend in self.backends)

    def prewarm(self, source: str | None = None) -> int:
        row = self.sql.execute("SELECT job_id FROM jobdaemon.prewarm(%s)", [source or self.source]).fetchone()
        assert row is not None
        return int(row["job_id"])

    def prewarm_past_the_door(self, source: str) -> int:
        """Of a source that only an allowed host may have."""
        row = self.sql.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, priority, args)"
            " VALUES ('beautify', %s, %s, jsonb_build_object('source', %s::text)) RETURNING id",
            [Task.PREWARM, PREWARM_PRIORITY, source],
        ).fetchone()
        assert row is not None
        return int(row["id"])

    def job(self, job_id: int) -> Row:
        row = self.sql.execute("SELECT * FROM jobdaemon.procrastinate_jobs WHERE id = %s", [job_id]).fetchone()
        assert row is not None
        return row

    async def ended(self, job_id: int, status: str = "succeeded") -> None:
        await until(lambda: self.job(job_id)["status"] not in ("todo", "doing"), timeout_s=60)
        assert self.job(job_id)["status"] == status

    async def beautified(self, order_id: int) -> Row:
        """What the order has once beautify is over."""
        await until(lambda: self.orders.row(order_id)["beautified"] is not None, timeout_s=60)
        row: Row = self.orders.row(order_id)["beautified"]
        return row

    def stats(self) -> tuple[int, int]:
        row = self.sql.execute("SELECT kept, used FROM jobdaemon.prewarm_stats").fetchone()
        assert row is not None
        return row["kept"], row["used"]

    def copies(self) -> list[Path]:
        """What lies in the store for no order."""
        return [path for path in self.path("prewarmed").rglob("*") if path.is_file()]


@pytest.fixture
def studio(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    """Its daemons' backends count."""
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as sql:
        studio = Studio(database, tmp_path, sql)
        open_backend = app.open_backend

        def counting(settings: Settings) -> BeautifyBackend:
            studio.backends.append(CountingBackend(open_backend(settings)))
            return studio.backends[-1]

        monkeypatch.setattr(app.backends, "open_backend", counting)
        yield studio


@pytest.mark.newest_postgres
async def test_an_order_finds_its_photo_retouched(studio: Studio) -> None:
    """After a prewarm an order for the same bytes, under whatever key, asks no backend and has a copy of its own to the end."""
    async with studio.at_work():
        await studio.ended(studio.prewarm())
        assert (studio.calls, studio.stats()) == (1, (1, 0))
        first = studio.orders("Free", studio.source, images=1)
        copied = await studio.beautified(first)
        studio.store("artifact:elsewhere/the-same.png", PORTRAIT.read_bytes())
        second = studio.orders("Pro", "artifact:elsewhere/the-same.png")
        assert (await studio.beautified(second))["sha256"] == copied["sha256"]
        assert studio.calls == 1
        assert studio.stats() == (1, 1)
        assert (copied["model"], copied["faces"], copied["device"]) == ("opencv-1", 1, "cpu")
        [kept] = studio.copies()
        assert hashlib.sha256(kept.read_bytes()).hexdigest() == copied["sha256"]
        # Each has its own: the order goes on without the prewarmed photo, and that without the order's.
        studio.path((await studio.beautified(second))["key"]).unlink()
        third = studio.orders("Free", studio.source)
        await studio.beautified(third)
        kept.unlink()
        await asyncio.to_thread(studio.sql.execute, "SELECT jobdaemon.resume_queue('generate.local')")
        await until(lambda: studio.orders.row(first)["finished_at"] is not None, timeout_s=60)
        assert studio.orders.row(first)["status"] == "completed"
        # Nothing is left to copy: the next order retouches the photo itself.
        await studio.beautified(studio.orders("Free", studio.source))
        assert (studio.calls, studio.stats()) == (2, (0, 0))


@pytest.mark.newest_postgres
async def test_a_copy_that_cannot_be_read_fails_no_order(studio: Studio) -> None:
    """Where the prewarmed file is nobody's to read (a link here, since tests may be root), the photo is made anew."""
    async with studio.at_work():
        await studio.ended(studio.prewarm())
        [kept] = studio.copies()
        kept.rename(kept.with_name("elsewhere.jpg"))
        kept.symlink_to("elsewhere.jpg")
        order = studio.orders("Free", studio.source)
        await until(lambda: studio.orders.row(order)["beautified"] is not None or studio.orders.row(order)["error"] is not None)
        assert studio.orders.row(order)["error"] is None
        assert (studio.calls, studio.stats()) == (2, (1, 0))


@pytest.mark.newest_postgres
async def test_a_prewarm_makes_what_is_gone(studio: Studio) -> None:
    """Asked for again after its file was deleted, a photo is prewarmed again, and an order finds it."""
    async with studio.at_work():
        await studio.ended(studio.prewarm())
        [kept] = studio.copies()
        kept.unlink()
        await studio.ended(studio.prewarm())
        await studio.beautified(studio.orders("Free", studio.source))
        assert (studio.calls, studio.stats()) == (2, (1, 1))


@pytest.mark.newest_postgres
async def test_other_settings_find_nothing(studio: Studio) -> None:
    """A daemon with another strength retouches the photo itself; one with other threads does not have to."""
    async with studio.at_work():
        await studio.ended(studio.prewarm())
    async with studio.at_work(BEAUTIFY__STRENGTH="0.3"):
        await studio.beautified(studio.orders("Free", studio.source))
        assert studio.backends[-1].calls == [0.3]
    async with studio.at_work(BEAUTIFY__THREADS="2"):
        await studio.beautified(studio.orders("Free", studio.source))
        assert studio.backends[-1].calls == []


@pytest.mark.newest_postgres
async def test_other_weights_under_the_same_name_find_nothing(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings name a file, and on another machine it may be another one: an order's photo is made by what its daemon has."""
    async with studio.at_work():
        await studio.ended(studio.prewarm())
    monkeypatch.setattr(OpenCVBackend, "model", "opencv-2")
    async with studio.at_work():
        await studio.beautified(studio.orders("Free", studio.source))
        assert studio.backends[-1].calls == [0.7]


@pytest.mark.newest_postgres
async def test_a_photo_is_prewarmed_once(studio: Studio) -> None:
    """The same photo twice, one after the other and under two keys, is retouched once."""
    studio.store("artifact:elsewhere/the-same.png", PORTRAIT.read_bytes())
    async with studio.at_work():
        await studio.ended(studio.prewarm())
        await studio.ended(studio.prewarm())
        await studio.ended(studio.prewarm("artifact:elsewhere/the-same.png"))
        assert (studio.calls, studio.stats(), len(studio.copies())) == (1, (1, 0), 1)


@pytest.mark.newest_postgres
@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("artifact:sources/nothing.jpg", "ArtifactMissingError"),
        ("artifact:sources/no-picture.jpg", "UnsupportedImageError"),
        ("artifact:sources/too-big.jpg", "UnsupportedImageError"),
        ("https://127.0.0.1/a.jpg", "InvalidOrderError"),
        ("https://169.254.169.254/latest/meta-data", "InvalidOrderError"),
        ("https://localhost/a.jpg", "InvalidOrderError"),
    ],
)
async def test_bad_photos_fail_at_once(studio: Studio, source: str, kind: str) -> None:
    """A photo that is missing, none or too big, or on an address that is nobody's business, is given up after one attempt."""
    studio.store("artifact:sources/no-picture.jpg", b"<html>")
    studio.store("artifact:sources/too-big.jpg", b"x" * 20_000)
    async with studio.at_work(PHOTOS__MAX_BYTES="10 kB"):
        job_id = studio.prewarm(source)
        await studio.ended(job_id, "failed")
    [row] = studio.sql.execute("SELECT outcome, error_kind, attempt, order_id FROM jobdaemon.attempts").fetchall()
    assert row == {"outcome": "failed", "error_kind": kind, "attempt": 1, "order_id": None}
    assert (studio.stats(), studio.copies()) == ((0, 0), [])


@asynccontextmanager
async def photo_host(content: bytes | None) -> AsyncIterator[str]:
    """Serves *content* to everybody, or nothing for ever; gives its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if content is not None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(content) + content)
        else:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.newest_postgres
async def test_photos_are_the_same_by_their_bytes(studio: Studio) -> None:
    """What was fetched from a host and what lies in the store is one photo when the bytes are."""
    async with photo_host(PORTRAIT.read_bytes()) as host, studio.at_work(PHOTOS__ALLOWED_HOSTS=host):
        await studio.ended(studio.prewarm_past_the_door(f"http://{host}/portrait"))
        await studio.beautified(studio.orders("Free", studio.source))
        assert (studio.calls, studio.stats()) == (1, (1, 1))


@pytest.mark.newest_postgres
async def test_a_slow_host_holds_no_slot(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that says nothing has a prewarm for a short while only; then an order goes first."""
    monkeypatch.setattr(app.stages, "_PREWARM_FETCH", timedelta(milliseconds=200))
    async with photo_host(None) as host, studio.at_work(PHOTOS__ALLOWED_HOSTS=host):
        job_id = studio.prewarm_past_the_door(f"http://{host}/portrait")
        await until(lambda: studio.job(job_id)["status"] == "doing")
        await studio.beautified(studio.orders("Free", studio.source))
        assert studio.job(job_id)["attempts"] == 1
        [attempt] = studio.sql.execute("SELECT outcome, error FROM jobdaemon.attempts").fetchall()
        assert attempt == {"outcome": "retry", "error": f"http://{host}/portrait was not fetched within 0.2 s."}


@pytest.mark.newest_postgres
async def test_upkeep_runs_in_every_daemon(studio: Studio) -> None:
    """A daemon gives up, as it starts, what has become older than prewarm.ttl: row and file."""
    async with studio.at_work():
        await studio.ended(studio.prewarm())
    assert len(studio.copies()) == 1
    async with studio.at_work(PREWARM__TTL="1ms"):
        await until(lambda: not studio.sql.execute("SELECT FROM jobdaemon.prewarmed").fetchall())
    assert (studio.stats(), studio.copies()) == ((0, 0), [])


# -- idle slots


async def test_prewarms_run_when_no_order_waits(engine_database: str, sql: Sql, order_factory: Orders) -> None:
    """Of ten prewarms that were there before twenty orders, none starts on two daemons of two slots while an order waits."""

    async def gate(attempt: Attempt) -> None:
        if attempt.job.queue == "beautify":
            await asyncio.sleep(0.03)

    for n in range(10):
        sql.execute("SELECT jobdaemon.prewarm(%s)", [f"artifact:{n}"])
    for _ in range(20):
        order_factory("Pro")
    async with running_daemon(engine_database, Stages(gate)), running_daemon(engine_database, Stages(gate)):
        await until(lambda: sql.execute("SELECT kept FROM jobdaemon.prewarm_stats").fetchone() == {"kept": 10})
    row = sql.execute(
        "SELECT count(*) FILTER (WHERE j.task_name = 'jobdaemon.beautify') AS orders,"
        " max(e.at) FILTER (WHERE j.task_name = 'jobdaemon.beautify') AS last_order,"
        " min(e.at) FILTER (WHERE j.task_name = 'jobdaemon.prewarm') AS first_prewarm"
        " FROM jobdaemon.procrastinate_events e JOIN jobdaemon.procrastinate_jobs j ON j.id = e.job_id"
        " WHERE e.type = 'started' AND j.queue_name = 'beautify'"
    ).fetchone()
    assert row is not None
    assert row["orders"] == 20
    # at is when a claim began, and a claim may begin an instant before another one and see what that has done
    assert row["first_prewarm"] > row["last_order"] - timedelta(milliseconds=20)


async def test_an_order_waits_for_no_prewarm_of_its_photo(engine_database: str, sql: Sql, order_factory: Orders) -> None:
    """While a prewarm of its photo runs, an order takes the next free slot, goes on to its end, and leaves the prewarm alone."""
    source = "artifact:sources/a.jpg"
    release, begun = asyncio.Event(), asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        if attempt.job.task == Task.PREWARM:
            begun.set()
            await release.wait()

    async with running_daemon(engine_database, Stages(gate), team_size=2):
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.prewarm(%s)", [source])
        await asyncio.wait_for(begun.wait(), 20)
        order = order_factory("Free", source)
        await until(lambda: order_factory.row(order)["finished_at"] is not None)
        assert order_factory.row(order)["status"] == "completed"
        assert sql.execute("SELECT running FROM jobdaemon.prewarm_stats").fetchone() == {"running": 1}
        release.set()
        await until(lambda: sql.execute("SELECT kept FROM jobdaemon.prewarm_stats").fetchone() == {"kept": 1})


async def test_a_cancelled_prewarm_stops(engine_database: str, sql: Sql) -> None:
    """The daemon that runs it hears of it without a poll, and the slot is free; the log says what happened."""
    begun = asyncio.Event()

    async def gate(attempt: Attempt) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with running_daemon(engine_database, Stages(gate), engine=NO_POLL, team_size=1) as member:
        row = (await asyncio.to_thread(sql.execute, "SELECT job_id FROM jobdaemon.prewarm('artifact:sources/a.jpg')")).fetchone()
        assert row is not None
        await asyncio.wait_for(begun.wait(), 20)
        started = time.monotonic()
        await asyncio.to_thread(sql.execute, "SELECT jobdaemon.cancel_prewarm(%s)", [row["job_id"]])
        await until(lambda: sql.execute("SELECT running FROM jobdaemon.prewarm_stats").fetchone() == {"running": 0})
        assert time.monotonic() - started < 20  # the poll is a minute away
        await until(lambda: any(isinstance(event, JobFinished) for event in member.seen))
        assert [event.error for event in member.seen if isinstance(event, JobFinished)] == ["it was cancelled"]
    job = sql.execute("SELECT status FROM jobdaemon.procrastinate_jobs").fetchone()
    assert job == {"status": "aborted"}


async def test_free_takes_the_very_next_slot(engine_database: str, sql: Sql, order_factory: Orders) -> None:
    """An order that comes while a prewarm holds the only slot starts as that ends, however many other prewarms wait."""
    release: asyncio.Queue[None] = asyncio.Queue()
    begun: asyncio.Queue[str] = asyncio.Queue()

    async def gate(attempt: Attempt) -> None:
        if attempt.job.queue == "beautify":
            await begun.put(attempt.job.task)
            await release.get()

    for n in range(3):
        sql.execute("SELECT jobdaemon.prewarm(%s)", [f"artifact:{n}"])
    async with running_daemon(engine_database, Stages(gate), team_size=1):
        assert await asyncio.wait_for(begun.get(), 20) == Task.PREWARM
        order_factory("Free")
        started = []
        for _ in range(3):
            release.put_nowait(None)
            started.append(await asyncio.wait_for(begun.get(), 20))
        assert started == [Task.BEAUTIFY, Task.PREWARM, Task.PREWARM]
        release.put_nowait(None)


# -- deaths


@pytest.fixture
def crew(studio: Studio) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in a process of its own, whose attempts never end."""
    command = [sys.executable, "-m", "tests.integration.crew_member", studio.url, "1", "600"]
    member = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    yield member
    member.kill()
    member.wait()


@pytest.mark.newest_postgres
async def test_killed_while_it_prewarms(studio: Studio, crew: subprocess.Popen[bytes]) -> None:
    """A daemon that is SIGKILLed in a prewarm: another one does it, as its first attempt, and an order finds the photo."""
    query = "SELECT FROM jobdaemon.running_jobs r JOIN jobdaemon.workers w USING (daemon_id) WHERE r.job_id = %s AND w.pid = %s"
    registered = "SELECT FROM jobdaemon.workers WHERE pid = %s AND status = 'running'"
    await until(lambda: bool(studio.sql.execute(registered, [crew.pid]).fetchall()), timeout_s=60)
    job_id = studio.prewarm()
    await until(lambda: bool(studio.sql.execute(query, [job_id, crew.pid]).fetchall()), timeout_s=60)
    crew.send_signal(signal.SIGKILL)
    studio.sql.execute("UPDATE jobdaemon.procrastinate_workers SET lease = interval '1 second'")
    async with studio.at_work(ENGINE__LEASE="1s"):
        await studio.ended(job_id)
        row = studio.job(job_id)
        assert (row["attempts"], row["deaths"], studio.calls, studio.stats()) == (1, 1, 1, (1, 0))
        await studio.beautified(studio.orders("Free", studio.source))
        assert (studio.calls, studio.stats()) == (1, (1, 1))
