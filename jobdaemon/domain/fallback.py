"""
Who makes the images when an order's provider does not: pure; `docs/providers.md` tells it to users.

    a batch is out of attempts ──► nothing bought is outstanding ──────────────► Move: the next provider's, cut to its calls
                              └──► the provider took a call and may still
                                   give something for it ──► Settle: ask it, until it stopped, gave or forgot it ──► Move
                                                             (once, where calls cost nothing)
    a circuit is open, or no key can start a call, for longer than `after` ──► upkeep moves what waits and has bought nothing

A chain belongs to the order's own provider, or to its plan, and is walked forwards only, so that a batch never comes back and its
place in the chain is the queue it waits in. What a provider refuses for good (a prompt against its rules) is refused: to ask
another one would be to look for somebody with other rules. What our own store or a customer's host is to blame for would fail
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from jobdaemon.domain.write import Write
from jobdaemon.errors import PermanentError, SourceUnavailableError, StoreUnavailableError


@dataclass(frozen=True, slots=True)
class Move:
    """
    A batch goes to another provider.

    Attributes:
        provider: its name.
        images_per_call: what is pending of the batch is cut to this.
        writes: what is committed with it.
    """

    provider: str
    images_per_call: int
    writes: tuple[Write, ...] = ()


@dataclass(frozen=True, slots=True)
class Settle:
    """The provider took a call: before it has said what became of it, nobody else is asked."""


@dataclass(frozen=True, slots=True)
class FallbackRules:
    """
    Attributes:
        chains: provider of an order -> who is asked after it, in this order.
        plans: plan -> the same for its orders, whatever their provider; instead of *chains*.
        after: a provider in trouble for longer sends what waits for it to the next one.
        unpaid: providers whose calls cost time and no money.
        images_per_call: of a provider, by its name.
    """

    chains: Mapping[str, Sequence[str]] = field(default_factory=dict)
    plans: Mapping[str, Sequence[str]] = field(default_factory=dict)
    after: timedelta = timedelta(minutes=2)
    unpaid: Collection[str] = ()
    images_per_call: Callable[[str], int] = lambda provider: 1  # noqa: ARG005 - a provider's name

    @property
    def is_any(self) -> bool:
        """Whether any order ever falls back."""
        return any(self.chains.values()) or any(self.plans.values())

    def next_provider(self, plan: str, ordered: str, current: str, *, avoid: Collection[str] = ()) -> str | None:
        """
        Who is asked after *current*; None when nobody is left.

        Args:
            plan: the order's.
            ordered: the order's own provider.
            current: whose queue the batch waits in.
            avoid: passed over.
        """
        chain = [name for name in self.plans.get(plan, self.chains.get(ordered, ())) if name != ordered]
        # Somebody who is not in the chain (any more) is before its beginning: the order's own, or one of older settings.
        ahead = chain[chain.index(current) + 1 :] if current in chain else chain
        return next((name for name in ahead if name not in avoid), None)

    def move(self, plan: str, ordered: str, current: str, *, avoid: Collection[str] = ()) -> Move | None:
        """The same as a move."""
        provider = self.next_provider(plan, ordered, current, avoid=avoid)
        return None if provider is None else Move(provider, self.images_per_call(provider))


@dataclass(frozen=True, slots=True)
class Trouble:
    """
    Nothing of a provider can start now.

    Attributes:
        is_long: for longer than :attr:`FallbackRules.after`.
        reason: a clause about the provider.
    """

    provider: str
    is_long: bool
    reason: str


def stranded(troubles: Iterable[Trouble]) -> tuple[dict[str, str], set[str]]:
    """
    Whose batches are to be sent on, with the reason; and who takes none over.

    Args:
        troubles: any number of each provider.
    """
    troubles = list(troubles)
    return {trouble.provider: trouble.reason for trouble in troubles if trouble.is_long}, {each.provider for each in troubles}


def may_help(error: BaseException) -> bool:
    """Whether another provider might do better where one failed with *error* to the last attempt."""
    return not isinstance(error, PermanentError | StoreUnavailableError | SourceUnavailableError)


def moved_sentence(was: str, provider: str, reason: str) -> str:
    """What ``attempts`` says of a move."""
    return f"moved from {was} to {provider}: {reason}"
