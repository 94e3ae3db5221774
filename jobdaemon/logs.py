"""
Logs: structlog and the standard library's logging on standard error, secrets masked; and one line for each event.

The same processors shape both, so a library's line looks like ours. Nothing here knows who emits.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields
from datetime import timedelta
from typing import Any, Literal, TextIO, cast

import structlog

from jobdaemon.events import (
    CheckpointCommitted,
    CircuitTurned,
    CommitFailed,
    DaemonReady,
    DaemonStarted,
    DaemonStopped,
    DaemonStopping,
    DatabaseBack,
    DatabaseLost,
    Event,
    Events,
    JobFinished,
    JobIsolated,
    JobsRescued,
    JobStarted,
    KeyMissing,
    KeyRested,
    LeaseInDoubt,
    LeaseLost,
    LimitAdapted,
    OrderMended,
    OrderSettled,
    OrdersLifted,
    OrdersRemoved,
    OrdersRetired,
    PhotoLeft,
    ProviderChanged,
    QueueRests,
    SettingsOverruled,
    SettingsReloaded,
    SilentSessionsEnded,
    UpkeepFailed,
)
from jobdaemon.redact import MASK, is_secret_name, redact

Level = Literal["debug", "info", "warning", "error"]
EventDict = MutableMapping[str, Any]

#: How important a line is, and what it says under ``event``, by event; a test holds docs/configure.md equal.
#: Levels that depend on the event's outcome are in level_of().
LINES: Mapping[type[Event], tuple[Level, str]] = {
    DaemonStarted: ("info", "daemon started"),
    DaemonReady: ("info", "daemon ready"),
    DaemonStopping: ("info", "daemon stopping"),
    DaemonStopped: ("info", "daemon stopped"),
    SettingsReloaded: ("info", "settings reloaded"),
    SettingsOverruled: ("warning", "settings overruled"),
    JobStarted: ("debug", "job started"),
    JobFinished: ("info", "job finished"),
    JobIsolated: ("warning", "job runs alone"),
    CheckpointCommitted: ("debug", "checkpoint committed"),
    LeaseLost: ("warning", "lease lost"),
    LeaseInDoubt: ("warning", "lease in doubt"),
    JobsRescued: ("warning", "jobs rescued"),
    SilentSessionsEnded: ("warning", "silent sessions ended"),
    CircuitTurned: ("info", "circuit turned"),
    LimitAdapted: ("info", "limit adapted"),
    QueueRests: ("info", "queue rests"),
    ProviderChanged: ("warning", "provider changed"),
    OrdersLifted: ("info", "orders lifted"),
    OrdersRetired: ("info", "orders retired"),
    OrdersRemoved: ("info", "orders removed"),
    OrderMended: ("warning", "order mended"),
    OrderSettled: ("info", "order settled"),
    DatabaseLost: ("error", "database lost"),
    DatabaseBack: ("info", "database back"),
    UpkeepFailed: ("warning", "upkeep failed"),
    CommitFailed: ("warning", "commit failed"),
    KeyRested: ("warning", "key rests"),
    KeyMissing: ("warning", "key missing"),
    PhotoLeft: ("warning", "photo left"),
}
_NAME = "jobdaemon"
#: These libraries tell each request, or more, at levels that are ours for what an operator must see.
_CHATTY = ("asyncio", "aiobotocore", "boto3", "botocore", "httpcore", "httpx", "PIL", "procrastinate", "urllib3", "yoyo")
#: Larger texts are a dump of something, and a line nobody can read; tracebacks are exempt.
_MAX_TEXT = 4_000


def level_of(event: Event) -> Level:
    """How important the line of *event* is."""
    match event:
        case JobFinished(outcome="failed") | CommitFailed(is_dropped=True):
            return "error"
        case CircuitTurned(circuit="open", in_a_row=1):
            return "warning"
        case LimitAdapted(was=int(), limit=int()):
            return "debug"
        case QueueRests(in_a_row=count) if count > 1:
            return "debug"
        case JobFinished(outcome="retry") | OrderSettled(status="failed" | "partial"):
            return "warning"
        case SettingsReloaded(error=str()):
            return "error"
    return LINES.get(type(event), ("info", ""))[0]


def line_of(event: Event) -> tuple[str, dict[str, Any]]:
    """The words of the line of *event*, and its fields; fields without a value are left out."""
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    words = LINES.get(type(event), ("info", type(event).__name__))[1]
    if isinstance(event, SettingsReloaded) and event.error is not None:
        words = "settings not reloaded"
    return words, {name: _rounded(value) for name, value in values.items() if value is not None and value != ""}


def _rounded(value: object) -> object:
    return round(value, 3) if isinstance(value, float) else dict(value) if isinstance(value, Mapping) else value


def log_events(events: Events) -> Callable[[], None]:
    """Write one line for each event from now on; returns what ends it."""
    logger = structlog.stdlib.get_logger(_NAME)
    filter_of_lines = logging.getLogger(_NAME)

    def write(event: Event) -> None:
        level = logging.getLevelNamesMapping()[level_of(event).upper()]
        if filter_of_lines.isEnabledFor(level):  # asked here, so that lines nobody wants cost almost nothing
            words, values = line_of(event)
            logger.log(level, words, **values)

    return events.subscribe(write)


def configure_logs(format: str = "auto", level: str = "info", stream: TextIO | None = None) -> None:  # noqa: A002 - the setting's name
    """
    Set up structlog and the standard library's logging; may be called again, as a reload does.

    Args:
        format: ``text``, ``json``, or ``auto``: text on a terminal, json elsewhere.
        level: the least important lines to show: ``debug``, ``info``, ``warning`` or ``error``.
        stream: instead of standard error.
    """
    stream = sys.stderr if stream is None else stream
    is_terminal = stream.isatty()
    is_text = format == "text" or (format == "auto" and is_terminal)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            # Before masking: a traceback becomes text here, and its text is what must be masked.
            structlog.processors.format_exc_info,
            mask_secrets,
            *_renderer(is_text=is_text, has_colours=is_terminal),
        ],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in [old for old in root.handlers if getattr(old, "is_of_jobdaemon", False)]:
        root.removeHandler(old)
    handler.is_of_jobdaemon = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a reload changes the level and the format of loggers that exist
    )


def _renderer(*, is_text: bool, has_colours: bool) -> list[structlog.typing.Processor]:
    if is_text:
        return [structlog.dev.ConsoleRenderer(colors=has_colours, pad_event_to=24, sort_keys=False)]
    return [_json_order, structlog.processors.JSONRenderer(default=str, ensure_ascii=False)]


def _json_order(_logger: object, _method: str, line: EventDict) -> EventDict:
    """The fields every line has come first, under the names log collectors look for."""
    first = {"timestamp": line.pop("timestamp", None), "level": line.pop("level", None), "event": line.pop("event", "")}
    return {**first, **line}


def mask_secrets(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Processor: mask passwords, keys, authorization values and the queries of URLs in everything a line holds."""
    return {name: masked(value, name) for name, value in line.items()}


def masked(value: object, name: str = "") -> Any:
    """*value* with its secrets masked, through mappings and sequences; *name* is the field it stands under."""
    if value is not None and not isinstance(value, bool | int | float) and is_secret_name(name):
        return MASK
    match value:
        case str():
            text = redact(value)
            return text if len(text) <= _MAX_TEXT or name in ("exception", "stack") else f"{text[:_MAX_TEXT]}…"
        case None | bool() | int() | float():
            return value
        case timedelta():
            return round(value.total_seconds(), 3)
        case Mapping():
            return {str(key): masked(item, str(key)) for key, item in cast("Mapping[object, object]", value).items()}
        case list() | tuple() | set() | frozenset():
            return [masked(item, name) for item in value]
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"
    return redact(str(value))
