"""How an attempt ends, and the one transaction that says so."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from jobdaemon.domain.fallback import Move
from jobdaemon.domain.job import Job
from jobdaemon.domain.write import CallAccepted, CallEnded, CallSubmitted, Write


class End(StrEnum):
    """What becomes of the job."""

    #: a commit in the middle of an attempt; the job goes on running
    CHECKPOINT = "checkpoint"
    SUCCEEDED = "succeeded"
    #: later, one attempt spent
    RETRY = "retry"
    #: later, no attempt spent: a capacity signal
    SNOOZE = "snooze"
    #: at once, no attempt spent: this worker stops
    HANDED_BACK = "handed_back"
    #: at once or after a rest, no attempt spent, one death counted: its worker died
    INTERRUPTED = "interrupted"
    #: at once, in another provider's queue, with new attempts
    MOVED = "moved"
    #: a dead letter
    FAILED = "failed"


class Signal(StrEnum):
    """What an attempt's error says of the queue as a whole, or of the provider key it ran under."""

    #: the other side is at capacity
    CAPACITY = "capacity"
    #: the other side does not answer, or is broken
    OUTAGE = "outage"
    #: the other side refuses this key
    KEY = "key"
    #: the account behind this key is out of money
    MONEY = "money"
    #: nothing was asked: another daemon has the key that this is to be asked with
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True, slots=True)
class Transition:
    """
    What one attempt (or checkpoint) commits, fenced by the job's token.

    Attributes:
        delay: for a retry or snooze, from the commit, by the database's clock; None is at once.
        writes: what changes besides the job itself.
        error_kind: class of the error that ended the attempt, for ``attempts``.
        error: its sentence.
        seconds: how long the attempt ran.
        frees_elsewhere: the slot this frees is another daemon's to use.
        signal: what the error says of the queue, or of the key.
        retry_after: how long the other side asked us to wait, with a signal.
        ran_by: the daemon whose attempt this was, where another one ends it.
        last_beat: where another daemon ends it: only if that one's last heartbeat is still this one, ``""`` for none.
        move: where the job goes on, when it is moved.
    """

    job: Job
    end: End
    delay: timedelta | None = None
    writes: tuple[Write, ...] = ()
    error_kind: str | None = None
    error: str | None = None
    seconds: float = 0.0
    frees_elsewhere: bool = False
    signal: Signal | None = None
    retry_after: timedelta | None = None
    ran_by: int | None = None
    last_beat: str | None = None
    move: Move | None = None

    @property
    def only_notes_calls(self) -> bool:
        """Whether it is a checkpoint of nothing but provider calls: nothing of its order changes, or is counted."""
        are_of_calls = all(isinstance(write, CallAccepted | CallEnded | CallSubmitted) for write in self.writes)
        return self.end is End.CHECKPOINT and are_of_calls and self.writes != ()


@dataclass(frozen=True, slots=True)
class Done:
    """
    What a stage returns when it succeeded.

    Attributes:
        writes: what to commit with the job's end.
        obsolete: artifact keys that nobody needs once that is committed.
        created: artifact keys that nobody needs if the order turns out to have ended meanwhile.
    """

    writes: tuple[Write, ...] = ()
    obsolete: tuple[str, ...] = ()
    created: tuple[str, ...] = ()


class Verdict(StrEnum):
    """What the fence said of a transition."""

    #: committed now, or by an earlier try whose answer was lost
    ACCEPTED = "accepted"
    #: the token no longer holds: nothing was written
    LEASE_LOST = "lease_lost"
    #: the order had been cancelled: the job ended, its writes were dropped
    ORDER_ENDED = "order_ended"
