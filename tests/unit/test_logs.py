"""Logs: one line for each event, the same shape for libraries' lines, and no secret in any of them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon import events as module
from jobdaemon.events import (
    CommitFailed,
    DaemonStarted,
    DatabaseLost,
    Event,
    Events,
    JobFinished,
    JobStarted,
    OrderSettled,
    SettingsReloaded,
)
from jobdaemon.logs import LINES, configure_logs, level_of, log_events
from jobdaemon.redact import MASK, mask_url, redact

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the logs go; the process's logging is put back afterwards."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    yield io.StringIO()
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    configure_logs("json", "debug", stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_event_is_one_line(lines: Lines) -> None:
    """Each event becomes one line with its level and its fields; fields without a value are left out."""
    events = Events()
    log_events(events)
    events.emit(DaemonStarted(7, {"upload": 5}))
    events.emit(JobFinished(3, "upload", "retry", 1.23456, error="the store is full"))
    first, second = lines()
    assert {key: first[key] for key in ("level", "event", "daemon_id", "queues")} == {
        "level": "info",
        "event": "daemon started",
        "daemon_id": 7,
        "queues": {"upload": 5},
    }
    assert second == {
        "timestamp": second["timestamp"],
        "level": "warning",
        "event": "job finished",
        "job_id": 3,
        "queue": "upload",
        "outcome": "retry",
        "seconds": 1.235,
        "error": "the store is full",
        "logger": "jobdaemon",
    }


def test_every_event_has_its_words() -> None:
    """No event is logged under its class name."""
    kinds = {
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Event) and value is not Event
    }
    assert set(LINES) == kinds


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (JobStarted(1, "upload", "x", 1), "debug"),
        (JobFinished(1, "upload", "succeeded", 1), "info"),
        (JobFinished(1, "upload", "snooze", 1), "info"),
        (JobFinished(1, "upload", "retry", 1), "warning"),
        (JobFinished(1, "upload", "failed", 1), "error"),
        (OrderSettled(1, "completed"), "info"),
        (OrderSettled(1, "partial"), "warning"),
        (DatabaseLost("gone"), "error"),
        (CommitFailed("gone"), "warning"),
        (CommitFailed("gone", is_dropped=True), "error"),
        (SettingsReloaded(), "info"),
        (SettingsReloaded("wrong"), "error"),
    ],
)
def test_levels(event: Event, level: str) -> None:
    """What an operator must act on is an error, what may need a look a warning, what is usual info."""
    assert level_of(event) == level


def test_level_setting(stream: io.StringIO) -> None:
    """Lines below the level are not written, ours and the libraries', and a second call changes that."""
    configure_logs("json", "warning", stream)
    logger = structlog.stdlib.get_logger("jobdaemon")
    logger.info("quiet")
    logging.getLogger("some.library").info("quiet")
    assert stream.getvalue() == ""
    configure_logs("json", "info", stream)
    logger.info("loud")
    assert len(stream.getvalue().splitlines()) == 1


def test_libraries_lines_have_our_shape(lines: Lines) -> None:
    """A line of the standard library's logging, extras included, and a warning of Python look like ours."""
    logging.getLogger("some.library").warning("got %s", "https://u:hunter2@h/x", extra={"attempt": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    first, second = lines()
    assert first["event"] == f"got https://u:{MASK}@h/x"
    assert (first["level"], first["logger"], first["attempt"]) == ("warning", "some.library", 2)
    assert second["logger"] == "py.warnings"


def test_chatty_libraries_are_quiet(lines: Lines) -> None:
    """HTTP clients log whole requests at debug and info: only their warnings pass."""
    for name in ("httpx", "botocore.endpoint", "httpcore.http11"):
        logging.getLogger(name).info("GET https://h/?sig=hunter2")
    assert lines() == []


def test_tracebacks_are_masked(lines: Lines) -> None:
    """An exception's traceback stays in the line, without the secret in its message."""

    def fail() -> None:
        raise ValueError("could not reach postgresql://app:hunter2@db/jobs with token=hunter2")

    try:
        fail()
    except ValueError:
        structlog.stdlib.get_logger("jobdaemon").exception("broken")
    (line,) = lines()
    assert "Traceback" in line["exception"]
    assert "hunter2" not in json.dumps(line)


def test_fields_are_masked(lines: Lines) -> None:
    """Secrets are masked by the name of their field and by their shape, at any depth; harmless fields stay."""
    structlog.stdlib.get_logger("jobdaemon").info(
        "call",
        headers={"Authorization": "Bearer hunter2", "X-Api-Key": "hunter2", "Accept": "image/png"},
        provider_api_key="hunter2",
        urls=["https://cdn.example/a.png?X-Amz-Signature=hunter2", "https://cdn.example/b.png"],
        content=b"hunter2",
        error=RuntimeError("password=hunter2"),
        token=12,
    )
    (line,) = lines()
    assert "hunter2" not in json.dumps(line)
    assert line["headers"]["Accept"] == "image/png"
    assert line["urls"] == [f"https://cdn.example/a.png?{MASK}", "https://cdn.example/b.png"]
    assert (line["content"], line["token"]) == ("7 bytes", 12)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Authorization: Bearer hunter2", "Authorization:"),
        ("{'Authorization': 'Basic aHVudGVyMg hunter2'}", "'Authorization':"),
        ('{"api_key": "hunter2", "n": 3}', '"n": 3'),
        ("Bearer hunter2hunter2 was refused", "was refused"),
        ("GET https://h/p.jpg?Expires=1&Signature=hunter2 failed", "GET https://h/p.jpg?******** failed"),
        ("(https://h/p.jpg?sig=hunter2)", "https://h/p.jpg?"),
        ("SignedHeaders=host;x-date, Signature=hunter2 [SignatureDoesNotMatch]", "[SignatureDoesNotMatch]"),
        ("/a.png?X-Tos-Signature=hunter2", "/a.png?X-Tos-Signature="),
        ("postgres://u:hun@ter2hunter2@h:5/d", "postgres://u:********@h:5/d"),
        ("postgres://u:hunter2/x@h:5/d", "@h:5/d"),
        ("password=hunter2 host=h", "host=h"),
        ("aws_secret_access_key = hunter2;", "aws_"),
        ("PGPASSWORD=hunter2 psql", "psql"),
        ("key sk-hunter2hunter2hunter2 refused", "refused"),
        ("id AKIAHUNTER2HUNTER2XX refused", "refused"),
        ("https://h/cb#access_token=hunter2", "https://h/cb#"),
    ],
)
def test_redact(text: str, kept: str) -> None:
    """Every usual way to write a secret is masked, and the rest of the text stays."""
    result = redact(text)
    assert "hunter2" not in result.lower()
    assert "ter2" not in result
    assert kept in result


@pytest.mark.parametrize(
    "text",
    ["order 7 of plan Pro", "https://h/a/b.png", "postgresql://db:5432/jobs", "took 3.5 s: 12 of 70", "user@example.com wrote"],
)
def test_redact_leaves_the_rest(text: str) -> None:
    """Text without a secret is not touched."""
    assert redact(text) == text


@given(st.text(max_size=300))
def test_redact_takes_any_text(text: str) -> None:
    """Any text can be redacted, and doing it twice changes nothing more."""
    assert redact(redact(text)) == redact(text)


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1, max_size=30))
def test_passwords_of_urls_never_show(password: str) -> None:
    """Whatever a password consists of, escaped or not, no part of it is left."""
    url = f"postgresql://app:{password}-hunter2-{password}@db/jobs"
    assert "hunter2" not in mask_url(url)
    assert "hunter2" not in redact(f"cannot reach {url}").replace(password, "") or any(mark in password for mark in "\"'<>`|\\")


def test_redact_is_linear() -> None:
    """A hostile text of a megabyte does not hold up the daemon."""
    for hostile in (
        "a" * 1_000_000,
        "https://" * 100_000,
        "token=" * 150_000,
        "?&" * 500_000,
        "https://" + "@" * 500_000,
        "-" * 1_000_000,
    ):
        redact(hostile)


def test_terminal_gets_text_and_colour() -> None:
    """The format auto is coloured text on a terminal; text elsewhere has no colour."""
    code = (
        "import io, sys, structlog\nfrom jobdaemon.logs import configure_logs\n"
        "class Terminal(io.StringIO):\n    def isatty(self): return True\n"
        "for format, stream in (('auto', Terminal()), ('text', io.StringIO()), ('auto', io.StringIO()), ('json', Terminal())):\n"
        "    configure_logs(format, 'info', stream)\n"
        "    structlog.stdlib.get_logger('jobdaemon').info('hello', order_id=7)\n"
        "    print(ascii(stream.getvalue()))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    auto, text, pipe, forced = output.stdout.splitlines()
    assert "\\x1b[" in auto
    assert "hello" in auto
    assert "\\x1b[" not in text
    assert "order_id=7" in text
    assert '"order_id": 7' in pipe
    assert '"order_id": 7' in forced


def test_long_texts_are_cut(lines: Lines) -> None:
    """A field that holds a whole document is cut, so that a line stays a line."""
    structlog.stdlib.get_logger("jobdaemon").info("answer", body="x" * 100_000)
    assert len(lines()[0]["body"]) == 4_001


def test_closed_stream_does_not_reach_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    """A log that cannot be written does not fail the work it tells about."""
    code = (
        "import sys, io, structlog\nfrom jobdaemon.logs import configure_logs\nstream = io.StringIO()\n"
        "configure_logs('json', 'info', stream)\nstream.close()\n"
        "structlog.stdlib.get_logger('jobdaemon').info('x')\nprint('still here')"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert output.stdout == "still here\n"
