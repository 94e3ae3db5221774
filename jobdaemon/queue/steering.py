"""
Steering: tells ``domain/capacity.py`` how attempts ended, inside the transaction that ends them, and keeps what it decides.

Costs nothing while all goes well: only queues that met a signal or an outage are looked at, once per group of commits, and their
successes at most every quarter of a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jobdaemon import db
from jobdaemon.domain.capacity import Circuit, CircuitRules, Ends, QueueState, Scene, is_calm, steer
from jobdaemon.domain.outcome import End, Signal, Transition
from jobdaemon.events import CircuitTurned, Event, LimitAdapted, QueueRests
from jobdaemon.queue import sql

_CAPACITY = sql.load("capacity.sql")
#: A queue's row must not be rewritten by every commit of every daemon.
_PACE_S = 0.25
#: Where nobody serves a queue nothing bounds it but the table's own check.
_NO_BOUND = 100_000


@dataclass(slots=True)
class _Tally:
    """What a group of commits says of one queue."""

    succeeded: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    outages: list[int] = field(default_factory=list)
    others: int = 0
    retry_after: list[Any] = field(default_factory=list)
    reason: str | None = None
    keys_rest: bool = False


class Steering:
    """Steers queues by the ends of this daemon's attempts; one per store, used by its finish connection alone."""

    def __init__(self) -> None:
        self._watched: set[str] = set()
        self._unreported: dict[str, list[int]] = {}
        self._reported_s: dict[str, float] = {}

    def watch(self, queues: Iterable[str], *, among: Iterable[str]) -> None:
        """Count the successes of *queues* from now on, and of no other queue *among* these."""
        self._watched = (self._watched - set(among)) | set(queues)
        self._unreported = {name: tokens for name, tokens in self._unreported.items() if name in self._watched}

    async def apply(self, connection: db.Connection, ended: Iterable[Transition]) -> list[Event]:
        """
        Decide about the queues of these attempts, whose ends have just been written in the open transaction.

        Args:
            ended: transitions that the fence accepted as their attempt's end.

        Returns:
            What to tell once that transaction is committed.
        """
        tallies = self._tally(ended)
        now_s = time.monotonic()
        troubled = [name for name, tally in tallies.items() if tally.refused or tally.outages]
        due = [name for name in tallies if name in self._watched and now_s - self._reported_s.get(name, 0.0) >= _PACE_S]
        for name, tally in tallies.items():
            if name in self._watched or tally.refused or tally.outages:
                self._unreported.setdefault(name, []).extend(tally.succeeded)
        if not troubled and not due:
            return []
        records = await connection.fetch(_CAPACITY["lock_steering"], [*{*troubled, *due}], troubled)
        if not records:
            return []
        documents: list[dict[str, Any]] = []
        news: list[Event] = []
        for record in records:
            name = record["queue"]
            tally = tallies[name]
            ends = Ends(
                succeeded=tuple(self._unreported.pop(name, ())),
                refused=tuple(tally.refused),
                outages=tuple(tally.outages),
                others=tally.others,
                retry_after=max(tally.retry_after, default=None),
                keys_rest=tally.keys_rest,
            )
            scene = _scene(record)
            before = _state(record)
            after = steer(before, ends, scene)
            documents.append(_document(name, after, scene.now))
            news += _news(name, before, after, scene.now, tally.reason)
            self._reported_s[name] = now_s
        await connection.execute(_CAPACITY["save_steering"], json.dumps(documents))
        return news

    @staticmethod
    def _tally(ended: Iterable[Transition]) -> dict[str, _Tally]:
        tallies: dict[str, _Tally] = {}
        for transition in ended:
            tally = tallies.setdefault(transition.job.queue, _Tally())
            token = transition.job.token or 0
            if transition.job.is_best_effort:
                tally.others += 1
                continue
            if transition.signal is not None:
                tally.reason = transition.error
            if transition.signal is Signal.CAPACITY:
                tally.refused.append(token)
                if transition.retry_after is not None and transition.job.key_alias is not None:
                    tally.keys_rest = True
                elif transition.retry_after is not None:
                    tally.retry_after.append(transition.retry_after)
                continue
            if transition.signal in (Signal.KEY, Signal.MONEY, Signal.ELSEWHERE):
                continue  # says nothing of what the queue bears
            tally.others += 1
            if transition.signal is Signal.OUTAGE:
                tally.outages.append(token)
            elif transition.end is End.SUCCEEDED:
                tally.succeeded.append(token)
        return tallies


def _news(queue: str, before: QueueState, after: QueueState, now: datetime, reason: str | None) -> Iterator[Event]:
    if after.limit != before.limit:
        yield LimitAdapted(queue, before.limit, after.limit)
    until = after.rested_until
    if until is not None and until > now and (before.rested_until is None or before.rested_until <= now):
        yield QueueRests(queue, (until - now).total_seconds(), max(after.rests, 1), reason)
    if after.circuit is Circuit.OPEN and after.circuit_until is not None and after.circuit_until != before.circuit_until:
        yield CircuitTurned(queue, "open", (after.circuit_until - now).total_seconds(), after.opened, reason)
    if after.circuit is Circuit.CLOSED and before.circuit is not Circuit.CLOSED:
        yield CircuitTurned(queue, "closed")


def _state(record: Any) -> QueueState:
    return QueueState(
        limit=record["adaptive_limit"],
        limit_token=record["limit_token"],
        limit_changed_at=record["limit_changed_at"],
        successes=record["successes"],
        step=record["step"],
        signalled_at=record["signalled_at"],
        rests=record["rests"],
        rested_until=record["rested_until"],
        circuit=Circuit(record["circuit"]),
        circuit_until=record["circuit_until"],
        circuit_token=record["circuit_token"],
        opened=record["opened"],
        outages=record["outages"],
        outage_at=record["outage_at"],
    )


def _scene(record: Any) -> Scene:
    return Scene(
        now=record["now"],
        running=record["running"],
        most=_NO_BOUND if record["most"] is None else int(record["most"]),
        token=record["newest_token"],
        rules=CircuitRules(record["circuit_after"], record["circuit_rest"], record["circuit_rest_cap"]),
    )


def _document(queue: str, state: QueueState, now: datetime) -> dict[str, Any]:
    return {
        "queue": queue,
        "adaptive_limit": state.limit,
        "limit_token": state.limit_token,
        "limit_changed_at": _text(state.limit_changed_at),
        "successes": state.successes,
        "step": state.step,
        "signalled_at": _text(state.signalled_at),
        "rests": state.rests,
        "rested_until": _text(state.rested_until),
        "circuit": state.circuit.value,
        "circuit_until": _text(state.circuit_until),
        "circuit_token": state.circuit_token,
        "opened": state.opened,
        "outages": state.outages,
        "outage_at": _text(state.outage_at),
        "is_calm": is_calm(state, now),
    }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
