"""Values that cannot be, written past the functions: one sentence, nothing changed, and no daemon that stumbles over them."""

from __future__ import annotations

import psycopg
import pytest

from jobdaemon.queue.store import PostgresJobStore
from tests.factories import Claimed, Row, Sql

ENDLESS = "rested_until and circuit_until must be a moment; pause_queue('upload') lasts until it is undone"
RESTS = "circuit_rest and circuit_rest_cap must be more than 0 and a year at most"


def _queue(sql: Sql) -> Row | None:
    return sql.execute("SELECT * FROM jobdaemon.queues WHERE name = 'upload'").fetchone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("team_size = 10001", "a team size must be 0 to 10000, not 10001"),
        ("cluster_limit = -1", "a cluster limit must be 0 to 100000, not -1"),
        ("cluster_limit = 100001", "a cluster limit must be 0 to 100000, not 100001"),
        ("fair_share = -1", "a fair share must be 1 to 100000, not -1"),
        ("fair_share = 2147483647", "a fair share must be 1 to 100000, not 2147483647"),
        ("adaptive_limit = -1", "an adaptive limit must be 0 or more, not -1"),
        ("circuit = NULL", "a circuit must be closed, open or probing, not NULL"),
        ("circuit = 'ajar'", 'a circuit must be closed, open or probing, not "ajar"'),
        ("circuit_after = -1", "circuit_after must be 0 to 100000, not -1"),
        ("circuit_after = NULL", "circuit_after must be 0 to 100000, not NULL"),
        ("circuit_rest = '0'", RESTS),
        ("circuit_rest = NULL", RESTS),
        ("circuit_rest_cap = '-1 second'", RESTS),
        ("circuit_rest_cap = '2000 years'", RESTS),
        ("rested_until = 'infinity'", ENDLESS),
        ("rested_until = '-infinity'", ENDLESS),
        ("circuit = 'open', circuit_until = 'infinity'", ENDLESS),
    ],
)
def test_a_plain_update_of_a_queue(sql: Sql, change: str, words: str) -> None:
    """Limits below 0, beyond all sense, NULL where there must be a value, and times without end are refused."""
    before = _queue(sql)
    with pytest.raises(psycopg.Error) as caught:
        sql.execute(f"UPDATE jobdaemon.queues SET {change} WHERE name = 'upload'".encode())
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == ("JD004", words)
    assert _queue(sql) == before


def test_null_takes_away_what_was_learnt(sql: Sql) -> None:
    """An operator may clear what limits follow from, as docs/operate.md says."""
    sql.execute("UPDATE jobdaemon.queues SET adaptive_limit = 0, rested_until = now(), circuit = 'open', circuit_until = now()")
    sql.execute(
        "UPDATE jobdaemon.queues SET adaptive_limit = NULL, rested_until = NULL, circuit = 'closed', circuit_until = NULL"
    )
    row = _queue(sql)
    assert row is not None
    assert (row["adaptive_limit"], row["rested_until"], row["circuit"]) == (None, None, "closed")


async def test_the_farthest_values_hurt_no_daemon(store: PostgresJobStore, claimed_job_factory: Claimed, sql: Sql) -> None:
    """With every value at the end of what is allowed, daemons read their queues, upkeep looks and orders are taken."""
    sql.execute(
        "UPDATE jobdaemon.queues SET team_size = 10000, cluster_limit = 100000, fair_share = 100000, adaptive_limit = 2147483647,"
        " circuit_after = 100000, circuit_rest = '1 year', circuit_rest_cap = '1 microsecond', rested_until = '294276-01-01',"
        " circuit = 'open', circuit_until = '4713-01-01 BC'"
    )
    sql.execute("UPDATE jobdaemon.plans SET priority = 1000000, lift_after = '100 years', expires_after = '100 years'")
    [row] = await store.queue_rows(["upload"], claimed_job_factory.daemon_id)
    assert row.opens_in is not None
    assert row.opens_in.days == 1  # looked at again within a day
    order_id = claimed_job_factory.orders("Free", customer="ada")
    assert not (await store.promote()).has_overdue
    assert await claimed_job_factory.claim("beautify") == []
    told = sql.execute("SELECT waiting_for FROM jobdaemon.order_progress WHERE order_id = %s", [order_id]).fetchone()
    assert told == {"waiting_for": "queue beautify rests until 294276-01-01T00:00:00Z, as its provider asked"}
    sql.execute("UPDATE jobdaemon.queues SET rested_until = NULL")
    assert len(await claimed_job_factory.claim("beautify")) == 1
