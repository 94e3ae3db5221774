"""Events: everybody hears everything, and nobody can hurt the one who speaks."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from jobdaemon import events as module
from jobdaemon.events import DaemonReady, DatabaseBack, DatabaseLost, Event, Events, JobStarted, OrderSettled, SettingsReloaded
from jobdaemon.logs import LINES, line_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "configure.md"


def kinds() -> list[type[Event]]:
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass)]
    return [value for value in classes if issubclass(value, Event) and value is not Event]


def test_every_subscriber_hears_every_event() -> None:
    """Subscribers are told in the order of subscription, and of every event in the order of emission."""
    events = Events()
    heard: list[tuple[str, Event]] = []
    events.subscribe(lambda event: heard.append(("first", event)))
    events.subscribe(lambda event: heard.append(("second", event)))
    lost, back = DatabaseLost("gone"), DatabaseBack(1.5)
    events.emit(lost)
    events.emit(back)
    assert heard == [("first", lost), ("second", lost), ("first", back), ("second", back)]


def test_emit_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    """A subscriber that fails is logged, and the others are still told."""
    events = Events()
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError("listener")

    events.subscribe(broken)
    events.subscribe(heard.append)
    with caplog.at_level(logging.ERROR):
        events.emit(DaemonReady())
    assert heard == [DaemonReady()]
    assert [record.getMessage() for record in caplog.records] == ["a subscriber failed on DaemonReady"]


def test_unsubscribe() -> None:
    """Ending a subscription ends that one only, even when the same callback subscribed twice, and may be done twice."""
    events = Events()
    heard: list[Event] = []
    end = events.subscribe(heard.append)
    events.subscribe(heard.append)
    end()
    end()
    events.emit(DaemonReady())
    assert heard == [DaemonReady()]


def test_subscribers_may_subscribe_while_told() -> None:
    """A subscription made or ended inside a callback counts from the next event on."""
    events = Events()
    heard: list[Event] = []

    def once(event: Event) -> None:
        end()
        events.subscribe(heard.append)

    end = events.subscribe(once)
    events.emit(DatabaseLost("a"))
    events.emit(DatabaseLost("b"))
    assert heard == [DatabaseLost("b")]


async def test_wait_for_matches_kind_and_predicate() -> None:
    """Waiting ends with the first event of the kind that the predicate accepts."""
    events = Events()
    waiting = asyncio.ensure_future(events.wait_for(OrderSettled, lambda event: event.order_id == 2, timeout=5))
    await asyncio.sleep(0)
    for event in (DaemonReady(), OrderSettled(1, "failed"), OrderSettled(2, "completed"), OrderSettled(2, "failed")):
        events.emit(event)
    assert await waiting == OrderSettled(2, "completed")


async def test_expect_does_not_miss_what_happens_before_the_wait() -> None:
    """An expectation made before the cause holds the event until it is awaited, also twice."""
    events = Events()
    expected = events.expect(DatabaseBack)
    events.emit(DatabaseBack(3))
    assert await expected.wait(1) == DatabaseBack(3)
    assert await expected.wait(1) == DatabaseBack(3)


async def test_wait_for_names_what_did_not_come() -> None:
    """Running out of time names the event, and leaves no subscription behind."""
    events = Events()
    with pytest.raises(TimeoutError, match=r"no JobStarted within 0\.0 s"):
        await events.wait_for(JobStarted, timeout=0.0)
    assert events._callbacks == []


async def test_waiters_end_their_subscription_when_cancelled() -> None:
    """A cancelled wait leaves no subscription behind."""
    events = Events()
    waiting = asyncio.ensure_future(events.wait_for(JobStarted))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert events._callbacks == []


def test_events_are_frozen() -> None:
    """An event cannot be changed by a listener."""
    event: object = DatabaseLost("gone")
    with pytest.raises(FrozenInstanceError):
        event.error = "other"  # type: ignore[attr-defined]


def words_of(kind: type[Event]) -> frozenset[str]:
    """What a log line can say under ``event``."""
    words = {LINES[kind][1]}
    return frozenset(words | {line_of(SettingsReloaded(error="x"))[0]} if kind is SettingsReloaded else words)


def test_docs_list_every_event() -> None:
    """The table of events names each by the words that a log line carries, with usual level and fields, and nothing else."""
    table = DOCS.read_text(encoding="utf-8").partition("<!-- events -->")[2].partition("<!-- /events -->")[0]
    listed = {
        frozenset(re.findall(r"`([^`]+)`", names)): (level, set(re.findall(r"`(\w+)`", values)))
        for names, level, values in re.findall(r"^\| (`[^|]+) \| (\w+) \| ([^|]*) \|", table, re.MULTILINE)
    }
    assert listed == {words_of(kind): (LINES[kind][0], {field.name for field in fields(kind)}) for kind in kinds()}


def test_docs_name_no_event_as_the_code_does() -> None:
    """Whoever reads the docs searches logs, in which the names of our classes do not occur."""
    pages = [*DOCS.parent.glob("*.md"), DOCS.parents[1] / "README.md"]
    named = [f"{page.name}: {name}" for page in pages for name in re.findall(r"`([A-Z]\w+)`", page.read_text(encoding="utf-8"))]
    assert not {line.rpartition(" ")[2] for line in named} & {kind.__name__ for kind in kinds()}, named
