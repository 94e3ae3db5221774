"""
The rows that are made of the settings: plans, queues and provider keys; and the words for one that says something else.

Rows are inserted where they are missing, and win over the settings where they are there (:mod:`jobdaemon.domain.rows`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta

from jobdaemon.domain.job import BEAUTIFY_QUEUE, UPLOAD_QUEUE, generate_queue
from jobdaemon.domain.keys import ProviderKey
from jobdaemon.domain.plan import Plan
from jobdaemon.domain.rows import KEY_COLUMNS, PLAN_COLUMNS, Difference, DifferingRow, WantedRow
from jobdaemon.settings import Settings
from jobdaemon.units import format_duration

#: Selects every row that settings speak of too, by kind and name; intervals in seconds, as ``differing_rows`` wants them.
SELECT_ROWS = """
SELECT 'plan' AS kind, name, to_jsonb(p) || jsonb_build_object('lift_after', extract(epoch FROM lift_after)::float8,
    'expires_after', extract(epoch FROM expires_after)::float8) AS columns FROM jobdaemon.plans p
UNION ALL SELECT 'key', provider || '/' || alias, to_jsonb(k) FROM jobdaemon.provider_keys k
UNION ALL SELECT 'queue', name, to_jsonb(q) FROM jobdaemon.queues q
"""
_EXCERPT = 40


def plans(settings: Settings) -> list[Plan]:
    """The plans as rows."""
    return [
        Plan(
            name=name,
            images=plan.images,
            priority=plan.priority,
            stage_priority=plan.stage_priority.named(),
            lift_after=plan.lift_after,
            expires_after=plan.expires_after,
            max_open_orders=plan.max_open_orders,
            max_open_orders_per_customer=plan.max_open_orders_per_customer,
            prompts=settings.orders.prompts[name],
            provider=settings.orders.provider,
        )
        for name, plan in settings.plans.items()
    ]


def queue_names(settings: Settings) -> list[str]:
    """Every queue these settings know, worked by this daemon or not."""
    known = {BEAUTIFY_QUEUE, UPLOAD_QUEUE, generate_queue(settings.orders.provider)}
    known |= {generate_queue(name) for name in settings.generate.usable()}
    return sorted(known | {name for name in settings.queues if name != "generate"})


def provider_keys(settings: Settings) -> list[ProviderKey]:
    """The provider keys as rows, without their secrets."""
    return [
        ProviderKey(provider, key.alias, key.concurrency, key.rate, key.daily_budget)
        for provider, keys in settings.provider_keys().items()
        for key in keys
    ]


def wanted_rows(settings: Settings) -> list[WantedRow]:
    """What the settings say of every row that they may speak of, and which of that somebody wrote there."""
    return [*_wanted_plans(settings), *_wanted_keys(settings), *_wanted_queues(settings)]


def _wanted_plans(settings: Settings) -> Iterator[WantedRow]:
    orders = settings.orders
    for plan in plans(settings):
        section = getattr(settings.plans, plan.name)
        named = {column: f"plans.{plan.name}.{column}" for column in PLAN_COLUMNS if column in section.model_fields_set}
        if plan.name in orders.prompts.model_fields_set:
            named["prompts"] = f"orders.prompts.{plan.name}"
        if "provider" in orders.model_fields_set:
            named["provider"] = "orders.provider"
        values = {column: getattr(plan, column) for column in PLAN_COLUMNS}
        yield WantedRow("plan", plan.name, values | {"stage_priority": dict(plan.stage_priority)}, named)


def _wanted_keys(settings: Settings) -> Iterator[WantedRow]:
    for provider, keys in settings.provider_keys().items():
        for number, key in enumerate(keys):
            place = f"generate.{provider}.keys.{number}"
            named = {column: f"{place}.{column}" for column in KEY_COLUMNS if column in key.model_fields_set}
            yield WantedRow("key", f"{provider}/{key.alias}", {column: getattr(key, column) for column in KEY_COLUMNS}, named)


def _wanted_queues(settings: Settings) -> Iterator[WantedRow]:
    """Team sizes that are written down; of a queue that this daemon does not work the row's means nothing to it."""
    for name in queue_names(settings):
        levels = (level for level in (name, name.partition(".")[0]) if level in settings.queues)
        named_by = next((level for level in levels if settings.queues[level].team_size is not None), None)
        if named_by is not None and (size := settings.queue(name).team_size) > 0:
            yield WantedRow("queue", name, {"team_size": size}, {"team_size": f"queues.{named_by}.team_size"})


def shown_value(difference: Difference, value: object) -> str:
    """One side of *difference* for people, short."""
    match value:
        case None:
            return "none"
        case timedelta():
            return format_duration(value)
        case Mapping():
            return f"{{{', '.join(f'{name} = {item}' for name, item in value.items())}}}"
        case tuple():
            return _shown_prompts(value, difference)
    return json.dumps(value, ensure_ascii=False)


def _shown_prompts(prompts: tuple[object, ...], difference: Difference) -> str:
    """How many there are, and the beginning of the first that the other side does not have."""
    other = difference.in_settings if prompts is difference.in_database else difference.in_database
    others = other if isinstance(other, tuple) else ()
    count = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"
    own = next((prompt for index, prompt in enumerate(prompts) if others[index : index + 1] != (prompt,)), None)
    return count if own is None else f"{count} with {json.dumps(_excerpt(str(own)), ensure_ascii=False)}"


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"


def overruled(row: DifferingRow) -> tuple[str, str]:
    """What the settings say of *row* in vain, and how to change that; two halves of a sentence."""
    told = (
        f"{it.column} is {shown_value(it, it.in_database)}, not {shown_value(it, it.in_settings)} as {it.setting} says"
        for it in row.named
    )
    return f"{'; '.join(told)}; rows win over settings", cure_of(row)


def cure_of(row: DifferingRow) -> str:
    """How the settings' values come to hold."""
    if row.kind == "queue":
        return f"`jobdaemon resize {row.name} none` leaves it to each daemon's settings"
    return "`jobdaemon config apply --force` overwrites it"


def instead_of_defaults(row: DifferingRow) -> str:
    """What holds in *row* that the settings do not name."""
    return "; ".join(
        f"{it.column} is {shown_value(it, it.in_database)}, which the settings do not name"
        f" (default {shown_value(it, it.in_settings)})"
        for it in row.unnamed
    )
