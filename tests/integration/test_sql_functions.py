"""What operators steer by SQL, and that daemons hear of it."""

from __future__ import annotations

import psycopg
import pytest

from tests.factories import Sql


def _queue(sql: Sql, name: str = "upload") -> dict[str, object]:
    row = sql.execute("SELECT paused, team_size, cluster_limit FROM jobdaemon.queues WHERE name = %s", [name]).fetchone()
    assert row is not None
    return row


def test_pause_resume_resize(sql: Sql) -> None:
    """Each function changes its own column; what resize leaves out stays."""
    sql.execute("SELECT jobdaemon.pause_queue('upload')")
    sql.execute("SELECT jobdaemon.resize_queue('upload', team_size => 7)")
    sql.execute("SELECT jobdaemon.resize_queue('upload', cluster_limit => 9)")
    assert _queue(sql) == {"paused": True, "team_size": 7, "cluster_limit": 9}
    sql.execute("SELECT jobdaemon.resume_queue('upload')")
    assert _queue(sql)["paused"] is False
    assert _queue(sql, "beautify") == {"paused": False, "team_size": None, "cluster_limit": None}


@pytest.mark.parametrize("call", ["pause_queue('x')", "resume_queue('x')", "resize_queue('x', 1)", "pause_queue(NULL)"])
def test_unknown_queue(sql: Sql, call: str) -> None:
    """JD005 names the queue that is not there."""
    with pytest.raises(psycopg.Error, match="unknown queue") as caught:
        sql.execute(f"SELECT jobdaemon.{call}".encode())
    assert caught.value.sqlstate == "JD005"


@pytest.mark.parametrize("call", ["team_size => -1", "cluster_limit => -1", "team_size => 2000000"])
def test_impossible_sizes(sql: Sql, call: str) -> None:
    """A size that cannot be is refused and nothing changes."""
    with pytest.raises(psycopg.Error, match="must be 0 to") as caught:
        sql.execute(f"SELECT jobdaemon.resize_queue('upload', {call})".encode())
    assert caught.value.sqlstate == "JD004"
    assert _queue(sql) == {"paused": False, "team_size": None, "cluster_limit": None}


def test_every_change_of_a_queue_is_told(engine_database: str, sql: Sql) -> None:
    """Functions and plain UPDATEs alike notify jobdaemon_control with the queue's name and touch updated_at."""
    with psycopg.connect(engine_database, autocommit=True) as listener:
        listener.execute("LISTEN jobdaemon_control")
        before = sql.execute("SELECT updated_at FROM jobdaemon.queues WHERE name = 'upload'").fetchone()
        sql.execute("SELECT jobdaemon.pause_queue('upload')")
        sql.execute("UPDATE jobdaemon.queues SET cluster_limit = 3 WHERE name = 'beautify'")
        assert [notify.payload for notify in listener.notifies(timeout=60, stop_after=2)] == ["upload", "beautify"]
        after = sql.execute("SELECT updated_at FROM jobdaemon.queues WHERE name = 'upload'").fetchone()
    assert before is not None
    assert after is not None
    assert after["updated_at"] > before["updated_at"]


def test_a_transaction_tells_once_per_queue(engine_database: str, sql: Sql) -> None:
    """Inserted jobs of ours wake by one notification per queue and statement; foreign queues keep procrastinate's channels."""
    with psycopg.connect(engine_database, autocommit=True) as listener:
        listener.execute("LISTEN jobdaemon_jobs; LISTEN jobdaemon_scheduled")
        listener.execute('LISTEN "procrastinate_queue_v1#mail"; LISTEN procrastinate_any_queue_v1')
        sql.execute(
            "INSERT INTO jobdaemon.procrastinate_jobs (queue_name, task_name, scheduled_at) VALUES ('upload', 'x', NULL),"
            " ('upload', 'x', NULL), ('beautify', 'x', now() + interval '1 hour'), ('mail', 'x', NULL)"
        )
        heard = [(notify.channel, notify.payload) for notify in listener.notifies(timeout=60, stop_after=4)]
    ours = sorted(notify for notify in heard if notify[0].startswith("jobdaemon"))
    assert ours == [("jobdaemon_jobs", "upload"), ("jobdaemon_scheduled", "beautify")]
    assert {channel for channel, _ in heard if channel.startswith("procrastinate")} == {
        "procrastinate_queue_v1#mail",
        "procrastinate_any_queue_v1",
    }
