"""What the customer pays for."""

from __future__ import annotations

from dataclasses import dataclass
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
