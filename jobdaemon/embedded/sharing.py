"""Sharing one server among commands that may be killed at any moment: two file locks that the kernel keeps."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from jobdaemon.embedded.account import binaries, cannot_use, home_of, reachable_binaries
from jobdaemon.embedded.server import Server
from jobdaemon.errors import DatabaseUnavailableError


class EmbeddedPostgres:
    """
    One user's hold on the embedded server of a data directory.

    Any number of processes, and of objects in one process, may hold the same server. Thread-safe.

    Args:
        data_dir: jobdaemon's data directory; the cluster lies in its folder ``postgres``. Made when missing.
        bin_dir: PostgreSQL programs other than the wheel's.
        options: server settings for a start by this object (``{"fsync": "off"}`` in tests); a running server keeps its own.
    """

    def __init__(self, data_dir: Path, *, bin_dir: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        self._data_dir = Path(os.path.realpath(data_dir))
        self._bin_dir = bin_dir
        self._options = dict(options or {})
        self._thread_lock = threading.Lock()
        self._server: Server | None = None
        self._users_lock: int | None = None

    def __enter__(self) -> Self:
        """Acquire."""
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release."""
        self.release()

    @property
    def log_path(self) -> Path:
        """Where the server writes its log; exists after the first :meth:`acquire`."""
        with self._thread_lock:
            return self._found_server().log_path

    def acquire(self) -> str:
        """
        Hold the server, starting it (and first making its cluster) when it does not run.

        Calling it again while holding is allowed: it starts a server that has died meanwhile.

        Returns:
            A URL that libpq and asyncpg understand; the same one for the lifetime of the data directory.

        Raises:
            DatabaseUnavailableError: it cannot be made or started; the message says why.
        """
        with self._thread_lock:
            try:
                server = self._found_server()
                server.make_home()
                with _exclusively(server.home / "start.lock"):
                    users_lock = self._users_lock
                    if users_lock is None:
                        users_lock = _open_lock(server.home / "users.lock")
                    try:
                        # Never waits: the exclusive lock is taken under start.lock only.
                        fcntl.flock(users_lock, fcntl.LOCK_SH)
                        server.ensure_cluster()
                        server.ensure_running()
                    except BaseException:
                        if users_lock != self._users_lock:
                            os.close(users_lock)
                        raise
                    self._users_lock = users_lock
            except OSError as error:
                raise DatabaseUnavailableError(cannot_use(self._data_dir, error)) from error
            return server.url

    def release(self) -> None:
        """
        Let go of the server; the last user stops it (fast shutdown: open transactions are rolled back). Harmless when not held.

        Raises:
            DatabaseUnavailableError: the server does not stop.
        """
        with self._thread_lock:
            if self._users_lock is None:
                return
            users_lock, self._users_lock = self._users_lock, None
            server = self._found_server()
            try:
                with _exclusively(server.home / "start.lock"):
                    try:
                        fcntl.flock(users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return  # others use it
                    server.stop()
            except OSError as error:
                raise DatabaseUnavailableError(cannot_use(self._data_dir, error)) from error
            finally:
                os.close(users_lock)

    def _found_server(self) -> Server:
        if self._server is None:
            home, account = home_of(self._data_dir)
            self._server = Server(home, account, reachable_binaries(binaries(self._bin_dir), account), self._options)
        return self._server


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """Hold the lock file *path*, waiting for it."""
    lock = _open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _open_lock(path: Path) -> int:
    """Open a lock file; one that root makes belongs to the folder's owner, who must be able to open it later."""
    flags = os.O_RDWR | os.O_NOFOLLOW  # never inherited: Python opens with O_CLOEXEC
    try:
        lock = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    owner = path.parent.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(lock, owner.st_uid, owner.st_gid)
    return lock
