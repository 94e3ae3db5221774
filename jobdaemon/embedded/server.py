"""One server: its cluster made, its postmaster started, found again and stopped. Who may ask for that is decided in sharing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from jobdaemon.embedded.account import Account, digest_of, make_folders, user_name
from jobdaemon.errors import DatabaseUnavailableError

SUPERUSER = "jobdaemon"
DATABASE = "jobdaemon"

#: Only names the socket file; nothing listens on TCP.
_PORT = 5432
#: The kernel's limit for a socket's path is 107 bytes on Linux and 103 on macOS.
_MAX_SOCKET_PATH_BYTES = 103
_MAX_LOG_BYTES = 10 * 1024 * 1024
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0
#: How long processes that a killed postmaster left behind may take to notice it.
_LEFT_OVER_TIMEOUT_S = 20.0
_POLL_S = 0.02

#: Written once into the new cluster's postgresql.conf, where an operator may change them.
_DEFAULTS = """
# jobdaemon's defaults for the embedded server
max_connections = 100
shared_buffers = 64MB
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] '
"""


class Server:
    """The server of one home folder. Every method but the properties needs the home's start.lock."""

    def __init__(self, home: Path, account: Account, bin_dir: Path, options: Mapping[str, str]) -> None:
        self.home = home
        self.account = account
        self.cluster = home / "cluster"
        self.log_path = home / "server.log"
        self._postgres = bin_dir / "postgres"
        self._initdb = bin_dir / "initdb"
        self._options = [f"--{name}={value}" for name, value in options.items()]
        self._is_durable = options.get("fsync") != "off"
        self._socket_dir = _socket_dir(home, account)
        self._log_offset = 0

    @property
    def url(self) -> str:
        """For libpq and asyncpg."""
        # The port is named because PGPORT in the environment would change it.
        return f"postgresql://{SUPERUSER}@/{DATABASE}?host={quote(str(self._socket_dir), safe='/')}&port={_PORT}"

    @property
    def _socket(self) -> Path:
        return self._socket_dir / f".s.PGSQL.{_PORT}"

    @property
    def _pid_file(self) -> Path:
        return self.cluster / "postmaster.pid"

    def make_home(self) -> None:
        """Make the home folder and its missing parents: ours alone, or passable where another account must get through."""
        make_folders(self.home, 0o711 if self.account.is_other else 0o700)

    def ensure_cluster(self) -> None:
        """Make the cluster when there is none, and refuse one that these programs cannot run."""
        for leftover in self.home.glob("cluster.new-*"):  # of a command that was killed while it made one
            shutil.rmtree(leftover, ignore_errors=True)
        if self.cluster.is_dir() and not any(self.cluster.iterdir()):
            self.cluster.rmdir()
        if not self.cluster.exists():
            self._make_cluster()
        try:
            major = (self.cluster / "PG_VERSION").read_text().strip()
        except FileNotFoundError as error:
            raise DatabaseUnavailableError(f"{self.cluster} exists but is no Postgres cluster; move it away.") from error
        version = self.account.run([str(self._postgres), "-V"]).stdout.strip()
        ours = re.search(r"\b(\d+)(?:\.\d+|beta|rc)", version)
        if ours is None or ours[1] != major:
            raise DatabaseUnavailableError(
                f"The embedded database in {self.cluster} was made by PostgreSQL {major}, but the programs here are "
                f"{version or 'unusable'}. Move its contents with pg_dump of the old version, or choose another data directory."
            )

    def _make_cluster(self) -> None:
        new = Path(tempfile.mkdtemp(prefix="cluster.new-", dir=self.home))
        try:
            self.account.give(new)
            how = [f"--username={SUPERUSER}", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            if not self._is_durable:
                how.append("--no-sync")
            made = self.account.run([str(self._initdb), "-D", str(new), *how])
            if made.returncode != 0:
                raise DatabaseUnavailableError(self._sentence("could not be set up", made.stderr))
            with (new / "postgresql.conf").open("a") as config:
                config.write(_DEFAULTS)
            # The single-user server ends with 0 whatever its statements did; only its words tell.
            single = [str(self._postgres), "--single", *self._options, "-D", str(new), "postgres"]
            made = self.account.run(single, stdin=f"CREATE DATABASE {DATABASE}\n")
            if made.returncode != 0 or re.search(r"\b(ERROR|FATAL|PANIC):", made.stderr):
                raise DatabaseUnavailableError(self._sentence("could not be set up", made.stderr))
            new.rename(self.cluster)
            if self._is_durable:
                _sync_folder(self.home)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def ensure_running(self) -> None:
        """Start the server unless it runs, and wait until it takes connections (crash recovery included)."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        patience = time.monotonic() + _LEFT_OVER_TIMEOUT_S
        spawned: int | None = None
        while not self._answers():
            if time.monotonic() > deadline:
                raise DatabaseUnavailableError(
                    f"The embedded Postgres took no connection within {_START_TIMEOUT_S:.0f} s; see {self.log_path}."
                )
            if self._postmaster() is not None:
                if not self._socket.exists() and self._says_ready():
                    self.stop()  # somebody removed its socket: nobody can reach it any more
            elif spawned is None:
                spawned = self._spawn()
            elif not _is_alive(spawned):
                reason = self._words_of_this_start()
                # Postgres rightly refuses to start beside what is left of a killed postmaster, which goes in a moment, or beside
                # the server of a command that was killed while it started it, which will answer.
                if not re.search(r"still in use|already exists", reason) or time.monotonic() > patience:
                    raise DatabaseUnavailableError(self._sentence("did not start", reason, f"; see {self.log_path}"))
                spawned = None
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop the server if it runs: fast, then immediate; both leave nothing that recovery does not mend."""
        for stop_signal in (signal.SIGINT, signal.SIGQUIT):
            pid = self._postmaster()
            if pid is None:
                return
            with suppress(ProcessLookupError):
                os.kill(pid, stop_signal)
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            while self._postmaster() == pid and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        if self._postmaster() is not None:
            raise DatabaseUnavailableError(f"The embedded Postgres in {self.home} does not stop; see {self.log_path}.")

    def _spawn(self) -> int:
        """Start the postmaster in a session of its own, so that Ctrl-C does not reach it, and return its process id."""
        self._clear_stale_files()
        self._make_socket_dir()
        self._rotate_log()
        # An entry of this list may be quoted like an identifier: commas and blanks in a path stay part of it.
        socket_dirs = '"' + str(self._socket_dir).replace('"', '""') + '"'
        settings = ["--listen_addresses=", f"--unix_socket_directories={socket_dirs}", f"--port={_PORT}", *self._options]
        # The shell goes at once, so the server is nobody's child here: no zombie, and no Popen that must be waited for.
        # The account opens its log itself: root never writes to a file in a folder that another user may own.
        script = 'exec 2>>"$1"; shift; "$@" >&2 & echo $!'
        arguments = [str(self.log_path), str(self._postgres), "-D", str(self.cluster), *settings]
        started = self.account.run(["/bin/sh", "-c", script, "sh", *arguments], new_session=True)
        if not started.stdout.strip().isdigit():
            raise DatabaseUnavailableError(self._sentence("did not start", started.stderr))
        return int(started.stdout)

    def _answers(self) -> bool:
        """Whether a server behind the socket takes connections now: the start of a login, answered by anything but "not yet"."""
        words = ("user", SUPERUSER, "database", DATABASE, "application_name", "jobdaemon start", "")
        body = struct.pack("!i", 3 << 16) + b"".join(word.encode() + b"\0" for word in words)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            try:
                connection.connect(str(self._socket))
                connection.sendall(struct.pack("!i", len(body) + 4) + body)
                answer = connection.recv(4096)
                with suppress(OSError):
                    connection.sendall(b"X" + struct.pack("!i", 4))
            except OSError:
                return False
        return answer != b"" and not (answer.startswith(b"E") and b"C57P03\0" in answer)  # 57P03: starting up, shutting down

    def _pid_file_lines(self) -> list[str]:
        try:
            return self._pid_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _says_ready(self) -> bool:
        return any(line.startswith("ready") for line in self._pid_file_lines()[7:])

    def _postmaster(self) -> int | None:
        """The process id of this cluster's living postmaster; a number that was given to another process does not count."""
        lines = self._pid_file_lines()
        if not lines or not lines[0].strip().isdigit():
            return None
        pid = int(lines[0])
        return pid if _is_alive(pid) and _works_in(pid, self.cluster) else None

    def _clear_stale_files(self) -> None:
        """
        Remove what would keep Postgres from starting after a reboot.

        Postgres sees by itself that the process in its pid file is gone, but not that the number now belongs to something else
        (the rule in containers, where numbers start over). The file also guards against processes left of a killed postmaster,
        so it goes only when none is there.
        """
        lines = self._pid_file_lines()
        if lines and lines[0].strip().isdigit() and _is_alive(int(lines[0])) and not _left_over(self.cluster):
            self._pid_file.unlink(missing_ok=True)
        self._socket.unlink(missing_ok=True)
        self._socket.with_name(self._socket.name + ".lock").unlink(missing_ok=True)

    def _make_socket_dir(self) -> None:
        with suppress(FileExistsError):
            self._socket_dir.mkdir(0o700)
            self.account.give(self._socket_dir)
        found = self._socket_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != self.account.uid or found.st_mode & 0o077:
            raise DatabaseUnavailableError(
                f"{self._socket_dir} must be a folder that user {user_name(self.account.uid)} alone can enter; remove it."
            )

    def _rotate_log(self) -> None:
        with suppress(FileNotFoundError):
            if self.log_path.lstat().st_size > _MAX_LOG_BYTES:
                self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with suppress(FileExistsError):
            os.close(os.open(self.log_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            self.account.give(self.log_path)
        self._log_offset = self.log_path.stat().st_size

    def _words_of_this_start(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_offset)
            return log.read(64 * 1024).decode(errors="replace")

    def _sentence(self, what: str, output: str, end: str = "") -> str:
        """One sentence for people out of a program's output: the first line that names an error, else the last one."""
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
        told = next((line for line in lines if re.search(r"\b(error|ERROR|FATAL|PANIC): ", line)), lines[-1])
        reason = re.sub(r"^.*?\b(?:error|ERROR|FATAL|PANIC): +", "", told).rstrip(".")
        return f"The embedded Postgres {what} in {self.home}: {reason}{end}."


def _socket_dir(home: Path, account: Account) -> Path:
    """
    The folder of the socket: the home's own, or a short one in /tmp.

    Not below XDG_RUNTIME_DIR: that goes at logout, while a daemon may stay, and is not the same for cron and a login.
    """
    own = home / "run"
    path = own / f".s.PGSQL.{_PORT}"
    # A comma separates hosts in a connection URL; a file name that is no UTF-8 (surrogates) is not printable either.
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES and "," not in str(path) and str(path).isprintable():
        return own
    return Path("/tmp") / f"jobdaemon-{account.uid}-{digest_of(home)}"  # noqa: S108 its owner and mode are checked before use


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and only not yet waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    return True


def _works_in(pid: int, cluster: Path) -> bool:
    """Whether the process's working directory is the cluster: true for a postmaster and its children, and for nothing else."""
    if not Path("/proc/self/cwd").exists():
        listed = subprocess.run(["/bin/ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return str(cluster) in listed.stdout
    try:
        return Path(f"/proc/{pid}/cwd").samefile(cluster)
    except OSError:
        return False


def _left_over(cluster: Path) -> bool:
    """Whether any process still works in the cluster; where that cannot be known, yes."""
    if not Path("/proc/self/cwd").exists():
        return True
    return any(_works_in(int(entry.name), cluster) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _sync_folder(folder: Path) -> None:
    """Make a rename in *folder* survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
