"""The rows of plans, queues and provider keys that are made of the settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobdaemon.domain.rows import KEY_COLUMNS, PLAN_COLUMNS
from jobdaemon.errors import SettingsError

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.domain.rows import DifferingRow, WantedRow
    from jobdaemon.settings import Settings

_INSERT_QUEUE = "INSERT INTO jobdaemon.queues (name) VALUES (%s) ON CONFLICT (name) DO NOTHING RETURNING name"
#: Kind of row -> table, the columns that name it, and the type of every other that settings speak of.
_TABLES = {"plan": ("plans", ("name",), PLAN_COLUMNS), "key": ("provider_keys", ("provider", "alias"), KEY_COLUMNS)}
#: What is about to be overwritten stays as it was read until then.
_LOCKS = (
    "SELECT FROM jobdaemon.plans ORDER BY name FOR NO KEY UPDATE",
    "SELECT FROM jobdaemon.provider_keys ORDER BY provider, alias FOR NO KEY UPDATE",
)


@dataclass(slots=True)
class WrittenRows:
    """
    What ``config apply`` did.

    Attributes:
        inserted: ``plans``, ``queues`` and ``keys`` -> names; a key's is ``provider/alias``.
        differing: rows that were not what the settings say, as they were.
        overwritten: titles of those of them that are now, in what the settings name.
    """

    inserted: dict[str, list[str]] = field(default_factory=lambda: {"plans": [], "queues": [], "keys": []})
    differing: list[DifferingRow] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)


def read_rows(connection: psycopg.Connection[Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every row that settings speak of too: kind and name -> column -> value as JSON has it, intervals in seconds."""
    from jobdaemon.settings_rows import SELECT_ROWS

    return {(kind, name): columns for kind, name, columns in connection.execute(SELECT_ROWS)}


def write_rows(connection: psycopg.Connection[Any], settings: Settings, *, overwrite: bool = False) -> WrittenRows:
    """
    Insert what is missing, in one transaction, and find what differs.

    Args:
        overwrite: also write what the settings name over the rows of plans, and over the limits of keys. What they do not name
            stays: a budget that an operator set must not go because a file is silent about it. Queues are never overwritten:
            theirs are an operator's switches, and so are a key's pause and rest.

    Raises:
        SettingsError: what is named makes no plan together with what stays; nothing was written.
    """
    from jobdaemon.domain.rows import differing_rows
    from jobdaemon.settings_rows import queue_names, wanted_rows

    written = WrittenRows()
    wanted = wanted_rows(settings)
    with connection.transaction():
        for row in wanted:
            if row.kind != "queue" and _insert(connection, row):
                written.inserted[f"{row.kind}s"].append(row.name)
        for name in queue_names(settings):
            if connection.execute(_INSERT_QUEUE, [name]).fetchone() is not None:
                written.inserted["queues"].append(name)
        for lock in _LOCKS if overwrite else ():
            connection.execute(lock)
        written.differing = list(differing_rows(wanted, read_rows(connection)))
        for differing in written.differing if overwrite else ():
            if differing.kind != "queue" and differing.named:
                _overwrite(connection, differing)
                written.overwritten.append(differing.title)
    return written


def _insert(connection: psycopg.Connection[Any], row: WantedRow) -> bool:
    table, names, types = _TABLES[row.kind]
    values = ", ".join(["%s"] * len(names) + [f"%s::{types[column]}" for column in row.values])
    columns = ", ".join([*names, *row.values])
    statement = f"""
        INSERT INTO jobdaemon.{table} ({columns}) VALUES ({values})
        ON CONFLICT ({", ".join(names)}) DO NOTHING RETURNING 1
    """  # noqa: S608 - constants
    parameters = [*_names_of(row.kind, row.name), *map(_parameter, row.values.values())]
    return connection.execute(statement, parameters).fetchone() is not None


def _overwrite(connection: psycopg.Connection[Any], row: DifferingRow) -> None:
    from psycopg.errors import CheckViolation

    table, names, types = _TABLES[row.kind]
    changes = ", ".join(f"{it.column} = %s::{types[it.column]}" for it in row.named)
    which = " AND ".join(f"{name} = %s" for name in names)
    parameters = [*(_parameter(it.in_settings) for it in row.named), *_names_of(row.kind, row.name)]
    try:
        connection.execute(f"UPDATE jobdaemon.{table} SET {changes} WHERE {which}", parameters)  # noqa: S608 - constants
    except CheckViolation as error:
        named = ", ".join(str(it.setting) for it in row.named)
        text = f"{row.title} was not overwritten, nor was any other row: {named} would not fit what the settings do not name"
        raise SettingsError(f"{text} (a plan has at least as many images as prompts)") from error


def _names_of(kind: str, name: str) -> list[str]:
    return name.split("/", 1) if kind == "key" else [name]


def _parameter(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value)
    return list(value) if isinstance(value, tuple) else value
