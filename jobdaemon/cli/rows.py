"""The rows of plans and queues that are made of the settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.settings import Settings

#: Column -> type of what the settings say of a plan, but for its name.
_COLUMNS = {
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
_VALUES = ", ".join(f"%s::{type_}" for type_ in ("text", *_COLUMNS.values()))
_NAMES, _OLD, _NEW = (", ".join(alias + name for name in _COLUMNS) for alias in ("", "p.", "n."))
_INSERT_PLAN = f"""
INSERT INTO jobdaemon.plans (name, {_NAMES}) VALUES ({_VALUES}) ON CONFLICT (name) DO NOTHING RETURNING name
"""  # noqa: S608 - constants
_UPDATE_PLAN = f"""
UPDATE jobdaemon.plans AS p SET ({_NAMES}) = ({_NEW}) FROM (VALUES ({_VALUES})) AS n (name, {_NAMES})
WHERE p.name = n.name AND ({_OLD}) IS DISTINCT FROM ({_NEW}) RETURNING p.name
"""  # noqa: S608 - constants
_INSERT_QUEUE = "INSERT INTO jobdaemon.queues (name) VALUES (%s) ON CONFLICT (name) DO NOTHING RETURNING name"


def write_rows(connection: psycopg.Connection[Any], settings: Settings, *, overwrite_plans: bool = False) -> dict[str, list[str]]:
    """
    Insert what is missing, in one transaction.

    Args:
        overwrite_plans: also make the plans' rows what the settings say. Queues are never overwritten: theirs are an
            operator's switches.

    Returns:
        Names under ``plans_inserted``, ``plans_overwritten`` and ``queues_inserted``.
    """
    from jobdaemon import app

    written: dict[str, list[str]] = {"plans_inserted": [], "plans_overwritten": [], "queues_inserted": []}

    def write(what: str, statement: str, values: list[Any]) -> bool:
        row = connection.execute(statement, values).fetchone()
        if row is not None:
            written[what].append(row[0])
        return row is not None

    with connection.transaction():
        for plan in app.plans(settings):
            row: dict[str, Any] = {name: getattr(plan, name) for name in _COLUMNS}
            row |= {"stage_priority": json.dumps(dict(plan.stage_priority)), "prompts": list(plan.prompts)}
            values = [plan.name, *row.values()]
            if not write("plans_inserted", _INSERT_PLAN, values) and overwrite_plans:
                write("plans_overwritten", _UPDATE_PLAN, values)
        for name in app.queue_names(settings):
            write("queues_inserted", _INSERT_QUEUE, [name])
    return written
