"""sd_notify: each message as the manager receives it, on a real socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from jobdaemon.sdnotify import SystemdNotifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The manager's end and the value of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        name = f"@jobdaemon-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
        receiver.bind(name.replace("@", "\0", 1) if request.param == "abstract" else name)
        yield receiver, name


def test_messages(manager: tuple[socket.socket, str]) -> None:
    """Each call is one datagram in the protocol's words."""
    receiver, name = manager
    with SystemdNotifier({"NOTIFY_SOCKET": name}) as notifier:
        calls: list[tuple[Callable[[], bool], bytes]] = [
            (notifier.ready, b"READY=1"),
            (lambda: notifier.ready("working"), b"READY=1\nSTATUS=working"),
            (lambda: notifier.status("waiting for\nREADY=1 the database"), b"STATUS=waiting for READY=1 the database"),
            (lambda: notifier.stopping("draining"), b"STOPPING=1\nSTATUS=draining"),
            (notifier.watchdog, b"WATCHDOG=1"),
            (lambda: notifier.extend_timeout(timedelta(seconds=90)), b"EXTEND_TIMEOUT_USEC=90000000"),
        ]
        for call, message in calls:
            assert call() is True
            assert receiver.recv(4096) == message


def test_reloading_carries_the_monotonic_time(manager: tuple[socket.socket, str]) -> None:
    """A reload says when it began, in microseconds of the monotonic clock."""
    receiver, name = manager
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    with SystemdNotifier({"NOTIFY_SOCKET": name}) as notifier:
        assert notifier.reloading()
    first, second = receiver.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "relative"}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    """Without a socket of a kind we speak to, every call does nothing."""
    with SystemdNotifier(environ) as notifier:
        assert not any((notifier.ready(), notifier.status("x"), notifier.stopping(), notifier.reloading(), notifier.watchdog()))


def test_a_manager_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    """A socket nobody listens on is not an error, and one that comes back is used again."""
    path = tmp_path / "notify"
    with SystemdNotifier({"NOTIFY_SOCKET": str(path)}) as notifier:
        assert notifier.ready() is False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(str(path))
            assert notifier.ready() is True


def test_a_manager_that_does_not_read_never_blocks(manager: tuple[socket.socket, str]) -> None:
    """When the manager's queue is full the message is dropped at once."""
    _, name = manager
    with SystemdNotifier({"NOTIFY_SOCKET": name}) as notifier:
        assert not all(notifier.watchdog() for _ in range(100_000))


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "60000000"}, timedelta(seconds=60)),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, timedelta(seconds=60)),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval: timedelta | None) -> None:
    """The watchdog counts only when it waits for this very process."""
    assert SystemdNotifier(environ).watchdog_interval == interval
