"""Which calls go wrong and how: by seed, the same for the same job's same try however calls interleave."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jobdaemon.errors import SettingsError


class Fault(StrEnum):
    """What may become of a call."""

    #: the API's own answer for "too many", before any work; 429 with Retry-After at the engine's endpoint
    RATE_LIMITED = "429"
    #: 500 after the latency
    ERROR = "500"
    #: the connection is reset after half the latency; what was asked may have been done
    RESET = "reset"
    #: takes SLOW_FACTOR times the latency, then succeeds
    SLOW = "slow"
    # The following are for the image APIs only.
    #: a proxy's HTML page with status 502
    HTML = "html"
    #: no answer at all until the caller gives up; what was asked is done
    TIMEOUT = "timeout"
    #: an image file that ends in the middle
    TRUNCATED = "truncated"
    #: an image file that says one length and sends another
    WRONG_LENGTH = "length"
    #: an image file that comes a few bytes at a time
    DRIP = "drip"
    #: the link to an image has expired already
    EXPIRED_LINK = "link"
    #: the task is forgotten before it is asked for
    EXPIRED_TASK = "expired"
    #: the task fails
    FAILED_TASK = "failed"
    #: fewer images than were asked for
    PARTIAL = "partial"
    #: the prompt, or an image of it, is called unsafe
    UNSAFE = "unsafe"
    #: a photo comes back larger, and no face in it restored
    UNRESTORED = "unrestored"


SLOW_FACTOR = 10.0
_ENGINE_FAULTS = frozenset({Fault.RATE_LIMITED, Fault.ERROR, Fault.RESET, Fault.SLOW})
#: Faults of the calls that ask for work, of the tasks they make, and of the files they end in.
CALL_FAULTS = frozenset({Fault.RATE_LIMITED, Fault.ERROR, Fault.RESET, Fault.SLOW, Fault.HTML, Fault.TIMEOUT, Fault.UNSAFE})
TASK_FAULTS = frozenset({Fault.EXPIRED_TASK, Fault.FAILED_TASK, Fault.PARTIAL})
FILE_FAULTS = frozenset({Fault.TRUNCATED, Fault.WRONG_LENGTH, Fault.DRIP, Fault.EXPIRED_LINK})
#: What ``mixed=SHARE`` spreads its share over, evenly: what a retry gets over.
MIXED = (
    Fault.RATE_LIMITED,
    Fault.ERROR,
    Fault.RESET,
    Fault.HTML,
    Fault.TRUNCATED,
    Fault.WRONG_LENGTH,
    Fault.EXPIRED_LINK,
    Fault.EXPIRED_TASK,
    Fault.FAILED_TASK,
    Fault.PARTIAL,
)


@dataclass(frozen=True, slots=True)
class Faults:
    """
    Attributes:
        shares: fault -> share of calls, 0.0 to 1.0; together at most 1.0.
        seed: the same seed, job and try give the same fault.
    """

    shares: Mapping[Fault, float] = field(default_factory=dict)
    seed: int = 0

    def of(self, job_id: int, attempt: int) -> Fault | None:
        """What goes wrong with this job's call number *attempt* (from 1), if anything."""
        return self.drawn(f"{job_id}:{attempt}", _ENGINE_FAULTS)

    def drawn(self, name: str, among: Collection[Fault] | None = None) -> Fault | None:
        """
        What goes wrong with the thing called *name*, if anything; the same name gives the same answer.

        Args:
            among: only these can happen to it; shares of the others do not count.
        """
        dice = random.Random(f"{self.seed}:{name}").random()
        for fault, share in self.shares.items():
            if among is not None and fault not in among:
                continue
            if dice < share:
                return fault
            dice -= share
        return None


def parse_faults(text: str, *, seed: int = 0) -> Faults:
    """
    Read ``429=0.02,500=0.01,reset=0.01,slow=0.05``, or ``mixed=0.2`` for a bit of everything.

    Raises:
        SettingsError: not of that form, an unknown fault, or shares outside 0.0 to 1.0 or above 1.0 together.
    """
    shares: dict[Fault, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, written = part.partition("=")
        try:
            share = float(written)
            kinds = MIXED if name.strip() == "mixed" else (Fault(name.strip()),)
        except ValueError:
            names = ", ".join(Fault)
            raise SettingsError(f'faults: "{part[:40]}" is not FAULT=SHARE with a fault of {names}, mixed') from None
        if not 0.0 <= share <= 1.0:
            raise SettingsError(f"faults: the share of {name.strip()} must lie between 0.0 and 1.0")
        shares |= {kind: shares.get(kind, 0.0) + share / len(kinds) for kind in kinds}
    if sum(shares.values()) > 1.0 + 1e-9:
        raise SettingsError("faults: the shares add up to more than 1.0")
    return Faults(shares, seed)
