"""What the customer pays for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Plan:
    """
    One row of ``plans``.

    Attributes:
        name: Free, Start, Pro or the operator's own.
        images: how many images an order gets at most, and when it does not say.
        priority: higher goes first, as in procrastinate.
        lift_after: work that waited longer is lifted.
        expires_after: an order that is still open then ends with a reason.
        max_open_orders: open orders before the door says full; 0 is no limit.
        max_open_orders_per_customer: the same for each customer.
        prompts: used when an order brings none.
        provider: used when an order names none.
        stage_priority: the priority in a stage (beautify, generate, upload) that has one of its own.
    """

    name: str
    images: int
    priority: int
    lift_after: timedelta
    expires_after: timedelta
    max_open_orders: int
    max_open_orders_per_customer: int
    prompts: tuple[str, ...]
    provider: str
    stage_priority: Mapping[str, int] = field(default_factory=dict)

    def priority_in(self, queue: str) -> int:
        """
        The priority of this plan's jobs in a queue: that of its stage, else the plan's.

        An order keeps what its plan had when it was made; an operator's own priority and lifting come on top. SQL decides the
        same (``job_priority``), and a test holds the two equal.
        """
        return self.stage_priority.get(queue.partition(".")[0], self.priority)


def top_priority(plans: Iterable[Plan], queue: str) -> int:
    """The highest priority that one of *plans*, at least one, has in *queue*: what lifted work there has to share with."""
    return max(plan.priority_in(queue) for plan in plans)
