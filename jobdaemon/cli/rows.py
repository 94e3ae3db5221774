"""The rows of plans, queues and provider keys that are made of the settings."""

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
_INSERT_KEY = """
INSERT INTO jobdaemon.provider_keys (provider, alias, concurrency, rate, daily_budget) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (provider, alias) DO NOTHING RETURNING provider || '/' || alias
"""
_UPDATE_KEY = """
UPDATE jobdaemon.provider_keys AS k SET (concurrency, rate, daily_budget) = (n.concurrency, n.rate, n.daily_budget)
FROM (VALUES (%s::text, %s::text, %s::integer, %s::float8, %s::integer)) AS n (provider, alias, concurrency, rate, daily_budget)
WHERE k.provider = n.provider AND k.alias = n.alias
    AND (k.concurrency, k.rate, k.daily_budget) IS DISTINCT FROM (n.concurrency, n.rate, n.daily_budget)
RETURNING k.provider || '/' || k.alias
"""


def write_rows(connection: psycopg.Connection[Any], settings: Settings, *, overwrite: bool = False) -> dict[str, list[str]]:
    """
    Insert what is missing, in one transaction.

    Args:
        overwrite: also make the rows of plans, and the limits of keys, what the settings say. Queues are never overwritten:
            theirs are an operator's switches, and so are a key's pause and rest.

    Returns:
        Names under ``plans_inserted``, ``plans_overwritten``, ``queues_inserted``, ``keys_inserted`` and ``keys_overwritten``;
        a key's is ``provider/alias``.
    """
    from jobdaemon import app

    kinds = ("plans_inserted", "plans_overwritten", "queues_inserted", "keys_inserted", "keys_overwritten")
    written: dict[str, list[str]] = {kind: [] for kind in kinds}

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
            if not write("plans_inserted", _INSERT_PLAN, values) and overwrite:
                write("plans_overwritten", _UPDATE_PLAN, values)
        for name in app.queue_names(settings):
            write("queues_inserted", _INSERT_QUEUE, [name])
        for key in app.provider_keys(settings):
            values = [key.provider, key.alias, key.concurrency, key.rate, key.daily_budget]
            if not write("keys_inserted", _INSERT_KEY, values) and overwrite:
                write("keys_overwritten", _UPDATE_KEY, values)
    return written
