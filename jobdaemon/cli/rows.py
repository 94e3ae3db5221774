"""The rows of plans and queues that are made of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.settings import Settings

_COLUMNS = "images, priority, lift_after, expires_after, max_open_orders, max_open_orders_per_customer, prompts, provider"
_INSERT_PLAN = f"""
INSERT INTO jobdaemon.plans (name, {_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (name) DO NOTHING RETURNING name
"""  # noqa: S608 - one constant
_UPDATE_PLAN = f"""
UPDATE jobdaemon.plans AS p SET ({_COLUMNS}) = (n.images, n.priority, n.lift_after, n.expires_after, n.max_open_orders,
    n.max_open_orders_per_customer, n.prompts, n.provider)
FROM (VALUES (%s::text, %s::integer, %s::integer, %s::interval, %s::interval, %s::integer, %s::integer, %s::text[], %s::text))
    AS n (name, {_COLUMNS})
WHERE p.name = n.name AND (p.images, p.priority, p.lift_after, p.expires_after, p.max_open_orders,
    p.max_open_orders_per_customer, p.prompts, p.provider)
    IS DISTINCT FROM (n.images, n.priority, n.lift_after, n.expires_after, n.max_open_orders,
    n.max_open_orders_per_customer, n.prompts, n.provider)
RETURNING p.name
"""  # noqa: S608 - one constant
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
            values = [plan.name, plan.images, plan.priority, plan.lift_after, plan.expires_after, plan.max_open_orders]
            values += [plan.max_open_orders_per_customer, list(plan.prompts), plan.provider]
            if not write("plans_inserted", _INSERT_PLAN, values) and overwrite_plans:
                write("plans_overwritten", _UPDATE_PLAN, values)
        for name in app.queue_names(settings):
            write("queues_inserted", _INSERT_QUEUE, [name])
    return written
