"""
How many jobs of a queue may run: what its provider bears, learnt from what it answers. Pure; `queue/steering.py` applies it.

Two answers steer a queue over all daemons:

- A **capacity signal** (429) lowers the adaptive limit to what was being accepted at that moment. It grows back by one step after
  many successes, and faster and faster once a step has held. One claim's burst of refusals counts once: only attempts that were
  claimed since the last change (their token is newer) say anything about the limit in force.
- An **outage** (no answer, a server's error), several times in a row, opens the circuit: nothing starts for a time that doubles
  up to a cap, then one job at a time over all daemons, until one succeeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

#: A step up costs about one refused call, so this many successes before it keep refusals near 3 % ...
GROW_AFTER = 30
#: ... unless calls are so slow that this time passes first; then this many do, and refusals stay below 10 %.
GROW_AFTER_TIME = timedelta(seconds=15)
GROW_AFTER_AT_LEAST = 10
#: What a second refusal in a row leaves of the limit, when nothing succeeded in between.
SHRINK = 0.7
#: The rest of a queue that is refused although nothing else of it runs; doubles up to the cap.
FIRST_REST = timedelta(seconds=0.5)
LONGEST_REST = timedelta(seconds=10)
#: A server's Retry-After is obeyed up to this long.
LONGEST_RETRY_AFTER = timedelta(hours=1)
#: How long a limit that does not bind any more, or a circuit that was open, is remembered.
CALM = timedelta(seconds=30)
#: An adaptive limit without a signal for this long is forgotten, whatever it is.
STALE = timedelta(minutes=10)
#: Outages further apart than this are not "in a row".
OUTAGE_WINDOW = timedelta(minutes=1)

#: How often the circuit's rest doubles at most, so that no power overflows.
_MOST_DOUBLINGS = 20


class Circuit(StrEnum):
    """The circuit of a queue, as kept in ``queues.circuit``."""

    CLOSED = "closed"
    OPEN = "open"
    #: one job at a time over all daemons
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class CircuitRules:
    """
    Attributes:
        after: outages in a row that open the circuit; 0 switches it off.
        rest: how long it stays open at first; doubles each time.
        rest_cap: no rest is longer.
    """

    after: int = 5
    rest: timedelta = timedelta(seconds=5)
    rest_cap: timedelta = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class QueueState:
    """
    What is remembered of a queue.

    Attributes:
        limit: most jobs at once; None when nothing ever refused us.
        limit_token: attempts with this token or an older one were claimed under another limit.
        limit_changed_at: when the limit last changed.
        successes: attempts that were claimed under this limit and succeeded.
        step: by how much the limit last grew; 0 when it last shrank.
        signalled_at: when the last capacity signal came.
        rests: rests in a row that brought nothing.
        rested_until: nothing starts before.
        circuit_until: an open circuit lets nothing start before.
        circuit_token: attempts with this token or an older one were claimed before the circuit last opened.
        opened: how often in a row the circuit opened.
        outages: outages in a row.
        outage_at: when the last outage was seen.
    """

    limit: int | None = None
    limit_token: int = 0
    limit_changed_at: datetime | None = None
    successes: int = 0
    step: int = 0
    signalled_at: datetime | None = None
    rests: int = 0
    rested_until: datetime | None = None
    circuit: Circuit = Circuit.CLOSED
    circuit_until: datetime | None = None
    circuit_token: int = 0
    opened: int = 0
    outages: int = 0
    outage_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Ends:
    """
    How attempts of a queue ended, by their tokens.

    Attributes:
        succeeded, refused, outages: tokens of attempts that succeeded, met a capacity signal, met an outage.
        others: attempts of this commit that were not refused, whatever became of them: they had been let in.
        retry_after: the longest wait that a signal asked for.
        keys_rest: what was refused asked for a wait of its provider key: that key rests, and the queue does not.
    """

    succeeded: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    outages: tuple[int, ...] = ()
    others: int = 0
    retry_after: timedelta | None = None
    keys_rest: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """
    The queue at the moment of the decision.

    Attributes:
        now: by the database's clock.
        running: jobs that run now, over all daemons.
        most: what could run without an adaptive limit: the cluster limit, or what all daemons' teams hold.
        token: newer than every token given out so far.
    """

    now: datetime
    running: int
    most: int
    token: int
    rules: CircuitRules = CircuitRules()


def capacity(
    state: QueueState, asked: int, *, running: int, probes: int, cluster_limit: int | None, paused: bool, now: datetime
) -> int:
    """
    How many of *asked* jobs may start now; the SQL function ``queue_capacity`` says the same.

    Args:
        running: jobs of the queue that run now.
        probes: those among them that were claimed since the circuit last opened.
    """
    if paused or (state.rested_until is not None and state.rested_until > now):
        return 0
    if state.circuit is not Circuit.CLOSED:
        if state.circuit is Circuit.OPEN and state.circuit_until is not None and state.circuit_until > now:
            return 0
        asked = min(asked, 1 - probes)
    limits = [limit for limit in (cluster_limit, state.limit) if limit is not None]
    return max(min([asked, *(limit - running for limit in limits)]), 0)


def steer(state: QueueState, ends: Ends, scene: Scene) -> QueueState:
    """The queue's state after *ends*."""
    state = _turn_circuit(state, ends, scene)
    if ends.refused:
        return _shrink(state, ends, scene)
    return _grow(state, ends, scene)


def is_calm(state: QueueState, now: datetime) -> bool:
    """Whether there is nothing left to remember."""
    return (
        state.limit is None
        and state.circuit is Circuit.CLOSED
        and (state.rested_until is None or state.rested_until <= now)
        and (state.outage_at is None or now - state.outage_at > OUTAGE_WINDOW)
        and (state.circuit_until is None or now - state.circuit_until > OUTAGE_WINDOW)
    )


def _shrink(state: QueueState, ends: Ends, scene: Scene) -> QueueState:
    # What runs beside the refused ones was let in: the best guess of what the provider bears.
    accepted = scene.running + ends.others
    is_fresh = state.limit is None or any(token > state.limit_token for token in ends.refused)
    limit = max(accepted, 1)
    if state.limit is not None:
        limit = min(limit, state.limit)
        if is_fresh and accepted > 0:
            # Refused within the limit: it is too high by one at least, whatever ran. Twice in a row with nothing gained, what
            # runs is left over from better times and says little.
            again = state.step == 0 and state.successes == 0
            limit = max(min(limit, int(SHRINK * state.limit) if again else state.limit - 1), 1)
    rests, rested_until = state.rests, state.rested_until
    if accepted == 0 and (is_fresh or rests == 0) and not ends.keys_rest:
        rests += 1
        rested_until = _later(rested_until, scene.now + min(FIRST_REST * 2.0 ** min(rests - 1, _MOST_DOUBLINGS), LONGEST_REST))
    if ends.retry_after is not None:
        rested_until = _later(rested_until, scene.now + min(ends.retry_after, LONGEST_RETRY_AFTER))
    state = replace(state, signalled_at=scene.now, rests=rests, rested_until=rested_until)
    if limit == state.limit and not is_fresh:
        return state
    return replace(state, limit=limit, limit_token=scene.token, limit_changed_at=scene.now, successes=0, step=0)


def _grow(state: QueueState, ends: Ends, scene: Scene) -> QueueState:
    limit = state.limit
    if limit is None:
        return state
    # An operator who sets a limit by hand leaves the rest empty.
    changed_at = state.limit_changed_at or scene.now
    fresh = sum(token > state.limit_token for token in ends.succeeded)
    state = replace(state, limit_changed_at=changed_at, successes=state.successes + fresh, rests=0 if fresh else state.rests)
    quiet = scene.now - (state.signalled_at or changed_at)
    if quiet >= STALE or (limit >= scene.most and quiet >= CALM):
        return replace(state, limit=None, limit_token=scene.token, limit_changed_at=None, successes=0, step=0)
    # A limit that nobody comes near proves nothing.
    is_needed = limit < scene.most and 2 * (scene.running + ends.others) >= limit
    if not is_needed or state.successes < _successes_wanted(limit, state.step, scene.now - changed_at):
        return state
    step = min(max(2 * state.step, 1), scene.most - limit)
    return replace(state, limit=limit + step, limit_token=scene.token, limit_changed_at=scene.now, successes=0, step=step)


def _successes_wanted(limit: int, step: int, age: timedelta) -> int:
    if step > 0:
        return limit  # one round: as many as ran at once
    return GROW_AFTER_AT_LEAST if age >= GROW_AFTER_TIME else GROW_AFTER


def _turn_circuit(state: QueueState, ends: Ends, scene: Scene) -> QueueState:
    # A refusal is an answer: whoever refuses us is there.
    answered = any(token > state.circuit_token for token in (*ends.succeeded, *ends.refused))
    failed = sum(token > state.circuit_token for token in ends.outages)
    if state.circuit is not Circuit.CLOSED and scene.rules.after == 0:
        return replace(state, circuit=Circuit.CLOSED, circuit_until=None, outages=0)
    if answered:
        if state.circuit is Circuit.CLOSED:
            return replace(state, outages=0, outage_at=None)
        return replace(state, circuit=Circuit.CLOSED, circuit_until=scene.now, outages=0, outage_at=None)
    if not failed:
        return state
    is_in_a_row = state.outage_at is not None and scene.now - state.outage_at <= OUTAGE_WINDOW
    state = replace(state, outages=failed + (state.outages if is_in_a_row else 0), outage_at=scene.now)
    if scene.rules.after == 0 or (state.circuit is Circuit.CLOSED and state.outages < scene.rules.after):
        return state
    # One that closed a moment ago goes on with the rest where it was.
    goes_on = state.circuit_until is not None and scene.now - state.circuit_until <= OUTAGE_WINDOW
    opened = state.opened + 1 if goes_on else 1
    rest = min(scene.rules.rest * 2.0 ** min(opened - 1, _MOST_DOUBLINGS), scene.rules.rest_cap)
    return replace(
        state, circuit=Circuit.OPEN, circuit_until=scene.now + rest, circuit_token=scene.token, opened=opened, outages=0
    )


def _later(one: datetime | None, other: datetime) -> datetime:
    return other if one is None else max(one, other)
