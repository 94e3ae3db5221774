"""
Rests provider keys: tells ``domain/keys.py`` how attempts under a key ended, inside the transaction that ends them, and keeps
what it decides. And what an attempt took of the day's budget and did not buy it gives back, however it ended.

Attempts without a key cost nothing here, and successes two reads per group of commits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from jobdaemon import db
from jobdaemon.domain.job import provider_of
from jobdaemon.domain.keys import KeyEnds, KeyRest, rest
from jobdaemon.domain.outcome import End, Signal, Transition
from jobdaemon.events import KeyRested
from jobdaemon.queue import sql

_KEYS = sql.load("keys.sql")
_Name = tuple[str, str]


@dataclass(slots=True)
class _Tally:
    succeeded: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    is_out_of_money: bool = False
    waits: list[timedelta] = field(default_factory=list)
    #: whether the provider turned one away, for whatever reason
    is_turned_away: bool = False

    def ends(self) -> KeyEnds:
        return KeyEnds(tuple(self.succeeded), tuple(self.refused), self.is_out_of_money, max(self.waits, default=None))


async def rest_keys(connection: db.Connection, ended: Sequence[Transition]) -> list[KeyRested]:
    """
    Decide about the keys of these attempts, whose ends have just been written in the open transaction.

    Runs before the steering of their queues, since it locks the same queues in the same order.

    Args:
        ended: transitions that the fence accepted as their attempt's end.

    Returns:
        What to tell: the keys that were refused and rest now.
    """
    tallies = _tally(ended)
    concerned = {name for name, tally in tallies.items() if tally.is_turned_away} | await _recovered(connection, tallies)
    unbought = await _unbought(connection, ended)
    concerned |= {(row["provider"], row["alias"]) for row in unbought}
    if not concerned:
        return []
    queues = sorted({transition.job.queue for transition in ended})
    records = await connection.fetch(_KEYS["lock_keys"], queues, *_columns(concerned))
    resting: list[KeyRested] = []
    documents: list[dict[str, Any]] = []
    locked: set[_Name] = set()
    for record in records:
        name = (record["provider"], record["alias"])
        tally = tallies[name]
        before = KeyRest(record["rested_until"], record["rest_reason"], record["rests"], record["rest_token"])
        after = rest(before, tally.ends(), now=record["now"], token=record["newest_token"])
        if after != before:
            documents.append(_document(name, after))
        is_refused = bool(tally.refused) or tally.is_out_of_money
        if is_refused and after.until is not None and after.until != before.until and after.reason is not None:
            seconds = (after.until - record["now"]).total_seconds()
            resting.append(KeyRested(*name, seconds, after.reason))
        locked.add(name)
    if documents:
        await connection.execute(_KEYS["save_rests"], json.dumps(documents))
    if returned := [row for row in unbought if (row["provider"], row["alias"]) in locked]:
        await connection.execute(_KEYS["return_images"], json.dumps(returned))
    return resting


async def _unbought(connection: db.Connection, ended: Iterable[Transition]) -> list[dict[str, Any]]:
    """Images that attempts took of their keys' budgets and did not buy: {provider, alias, day, images}."""
    rows = [
        (job.id, provider_of(job.queue), job.key_alias, job.images_asked, _number(job.args.get("call")))
        for job in (transition.job for transition in ended)
        if job.key_alias is not None and not job.is_best_effort
    ]
    if not rows:
        return []
    records = await connection.fetch(_KEYS["unbought"], *map(list, zip(*rows, strict=True)))
    return [dict(record) | {"day": record["day"].isoformat()} for record in records]


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None


async def _recovered(connection: db.Connection, tallies: dict[_Name, _Tally]) -> set[_Name]:
    """Keys whose refusals are over: an attempt that was claimed after them succeeded."""
    succeeded = {name: max(tally.succeeded) for name, tally in tallies.items() if tally.succeeded}
    if not succeeded:
        return set()
    records = await connection.fetch(_KEYS["recovered_keys"], *_columns(succeeded), list(succeeded.values()))
    return {(record["provider"], record["alias"]) for record in records}


def _tally(ended: Iterable[Transition]) -> dict[_Name, _Tally]:
    tallies: dict[_Name, _Tally] = {}
    for transition in ended:
        job = transition.job
        if job.key_alias is None or job.is_best_effort:
            continue
        tally = tallies.setdefault((provider_of(job.queue), job.key_alias), _Tally())
        token = job.token or 0
        if transition.end is End.SUCCEEDED:
            tally.succeeded.append(token)
        elif transition.signal is Signal.KEY:
            tally.refused.append(token)
        elif transition.signal is Signal.MONEY:
            tally.is_out_of_money = True
        if transition.signal in (Signal.CAPACITY, Signal.KEY, Signal.MONEY):
            tally.is_turned_away = True
            if transition.retry_after is not None:
                tally.waits.append(transition.retry_after)
    return tallies


def _columns(names: Iterable[_Name]) -> tuple[list[str], list[str]]:
    names = list(names)
    return [provider for provider, _ in names], [alias for _, alias in names]


def _document(name: _Name, state: KeyRest) -> dict[str, Any]:
    until: datetime | None = state.until
    return {
        "provider": name[0],
        "alias": name[1],
        "rested_until": None if until is None else until.isoformat(),
        "rest_reason": state.reason,
        "rests": state.rests,
        "rest_token": state.token,
    }
