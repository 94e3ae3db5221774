"""Which migrations this program knows, and whether it can work on a database that records others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from procrastinate.schema import SchemaManager

from jobdaemon.errors import SchemaVersionError


def migrations_path() -> Path:
    """The folder with our migrations: inside the package when installed, beside it in a checkout."""
    packaged = Path(__file__).parent / "_migrations"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "migrations"


def known_migrations() -> list[str]:
    """Ids of all migrations this program knows, procrastinate's first, each source in order."""
    ours = sorted(path.stem for path in migrations_path().glob("*.sql"))
    theirs = sorted(path.stem for path in Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    return theirs + ours


def is_post(migration: str) -> bool:
    """Whether a migration may only run once every daemon is the new program; legacy names without a stage count as pre."""
    return "_post_" in migration


@dataclass(frozen=True, slots=True)
class SchemaState:
    """
    How a database's schema compares with what this program knows.

    Attributes:
        pending_pre: known pre migrations not applied: the program cannot run.
        pending_post: known post migrations not applied: harmless.
        unknown_pre: applied pre migrations this program does not know: harmless, a newer program is being rolled out.
        unknown_post: applied post migrations this program does not know: it may rely on what they took away.
        is_empty: nothing was ever applied.
    """

    pending_pre: tuple[str, ...]
    pending_post: tuple[str, ...]
    unknown_pre: tuple[str, ...]
    unknown_post: tuple[str, ...]
    is_empty: bool

    def require_usable(self) -> None:
        """
        Raises:
            SchemaVersionError: the schema is older than this program needs, or past a post migration it does not know.
        """
        if self.unknown_post:
            raise SchemaVersionError(
                f"The database's schema is newer than this program (it has {self.unknown_post[0]}): "
                "upgrade jobdaemon on this machine."
            )
        if self.is_empty:
            raise SchemaVersionError("The database was never set up for jobdaemon: run `jobdaemon migrate`.")
        if self.pending_pre:
            raise SchemaVersionError(
                f"The database's schema is out of date ({len(self.pending_pre)} migrations are missing, the first is "
                f"{self.pending_pre[0]}): run `jobdaemon migrate`."
            )


def compare(applied: Iterable[str], known: Iterable[str] | None = None) -> SchemaState:
    """Compare the migrations a database records with those this program knows."""
    known = list(known_migrations() if known is None else known)
    applied = list(applied)
    pending = [name for name in known if name not in set(applied)]
    unknown = sorted(name for name in applied if name not in set(known))
    return SchemaState(
        pending_pre=tuple(name for name in pending if not is_post(name)),
        pending_post=tuple(name for name in pending if is_post(name)),
        unknown_pre=tuple(name for name in unknown if not is_post(name)),
        unknown_post=tuple(name for name in unknown if is_post(name)),
        is_empty=not applied,
    )
