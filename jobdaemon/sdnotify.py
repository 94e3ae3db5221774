"""
Telling systemd how the daemon is: the sd_notify protocol over a datagram socket, and nothing else.

Without ``NOTIFY_SOCKET`` (no systemd, or Type= other than notify) every call does nothing. No call blocks or raises: a
message that does not reach the manager must not hurt the work; the watchdog then does what it is for.

Source: sd_notify(3) and sd_watchdog_enabled(3), systemd 252.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self


class SystemdNotifier:
    """One connection to the service manager; close it, or use it as a context manager."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """*environ* replaces the process's environment, which is read once, here."""
        environ = os.environ if environ is None else environ
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        #: The longest time between two calls of :meth:`watchdog`, so call it twice as often; None when nobody waits for them.
        self.watchdog_interval = _watchdog_interval(environ)
        self._socket: socket.socket | None = None

    def ready(self, status: str | None = None) -> bool:
        """The daemon does its work now; also ends a reload."""
        return self._send("READY=1", _status(status))

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``."""
        return self._send(_status(text))

    def stopping(self, status: str | None = None) -> bool:
        """The daemon has begun to stop."""
        return self._send("STOPPING=1", _status(status))

    def reloading(self) -> bool:
        """Settings are being read again; :meth:`ready` must follow."""
        # The manager compares this with its own clock to tell this reload's READY=1 from an older one.
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def watchdog(self) -> bool:
        """The daemon is alive: its event loop turns."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, by: timedelta) -> bool:
        """Starting or stopping goes on for up to *by* from now; say it again before that time is over."""
        return self._send(f"EXTEND_TIMEOUT_USEC={by // timedelta(microseconds=1)}")

    def _send(self, *lines: str) -> bool:
        """Send one message; returns whether the manager has it."""
        message = "\n".join(line for line in lines if line)
        if self._address is None or not message:
            return False
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            # Not connected: the manager may come back with a new socket of the same name after a re-execution.
            self._socket.sendto(message.encode(errors="replace"), self._address)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the socket; a later call opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _address(name: str) -> str | None:
    if name.startswith("@"):
        return f"\0{name[1:]}"
    return name if name.startswith("/") else None  # vsock addresses are for virtual machines' managers


def _status(text: str | None) -> str:
    return "" if text is None else f"STATUS={' '.join(text.split())}"  # a line break would begin another assignment


def _watchdog_interval(environ: Mapping[str, str]) -> timedelta | None:
    microseconds, process = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0 or (process and process != str(os.getpid())):
        return None
    return timedelta(microseconds=int(microseconds))
