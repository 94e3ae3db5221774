"""
Rows of the database that the settings speak of too, and where the two differ.

Who wins is decided elsewhere, and simple: the row, always. A value that somebody wrote into the settings and that does not hold
is worth telling; a default is nobody's wish, and an operator who changed it by SQL has said the only word there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

RowKind = Literal["plan", "key", "queue"]

#: Column -> SQL type of what the settings say of a plan, but for its name.
PLAN_COLUMNS = {
    "images": "integer",
    "priority": "integer",
    "stage_priority": "jsonb",
    "lift_after": "interval",
    "expires_after": "interval",
    "max_open_orders": "integer",
    "max_open_orders_per_customer": "integer",
    "prompts": "text[]",
    "provider": "text",
}
#: The same of a provider key: an operator may change its limits; all else in its row is the engine's.
KEY_COLUMNS = {"concurrency": "integer", "rate": "float8", "daily_budget": "integer"}


@dataclass(frozen=True, slots=True)
class WantedRow:
    """
    What the settings say of one row.

    Attributes:
        name: a key's is ``provider/alias``.
        values: column -> value.
        named: columns that a file or a variable gives -> the setting's dotted key; the values of all others are defaults.
    """

    kind: RowKind
    name: str
    values: Mapping[str, object]
    named: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """
    One column in which a row is not what the settings say.

    Attributes:
        setting: dotted key; None where the settings do not name it, and *in_settings* is a default.
    """

    column: str
    in_database: object
    in_settings: object
    setting: str | None


@dataclass(frozen=True, slots=True)
class DifferingRow:
    """A row that differs from the settings, in one column at least."""

    kind: RowKind
    name: str
    differences: tuple[Difference, ...]

    @property
    def named(self) -> tuple[Difference, ...]:
        """What somebody wrote into the settings, and does not hold."""
        return tuple(difference for difference in self.differences if difference.setting is not None)

    @property
    def unnamed(self) -> tuple[Difference, ...]:
        """What holds instead of a default."""
        return tuple(difference for difference in self.differences if difference.setting is None)

    @property
    def title(self) -> str:
        """As in ``plan Free``."""
        return f"{self.kind} {self.name}"


def differing_rows(wanted: Iterable[WantedRow], rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[DifferingRow]:
    """
    The rows that are not what the settings say, in the order of *wanted*; rows that are missing differ in nothing.

    Args:
        rows: kind and name -> column -> value as JSON has it, intervals in seconds.
    """
    for row in wanted:
        there = rows.get((row.kind, row.name))
        if there is None:
            continue
        found = ((column, _in_kind_of(value, there[column]), value) for column, value in row.values.items())
        differences = tuple(
            Difference(column, is_, wished, row.named.get(column)) for column, is_, wished in found if is_ != wished
        )
        # A queue's row that says nothing leaves it to the settings.
        differences = tuple(it for it in differences if row.kind != "queue" or it.in_database is not None)
        if differences:
            yield DifferingRow(row.kind, row.name, differences)


def _in_kind_of(wished: object, value: Any) -> object:
    """*value* as the settings would hold it; as it is where they could not."""
    if isinstance(wished, timedelta) and isinstance(value, int | float):
        try:
            return timedelta(seconds=value)
        except (OverflowError, ValueError):
            return value
    return tuple(value) if isinstance(wished, tuple) and isinstance(value, list) else value
