"""
From an error to what a person and a script get: one sentence and an exit code.

The only place that names a database driver's errors. Exit codes are a contract (docs/sql.md has the SQLSTATEs behind them).
"""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import TYPE_CHECKING

from jobdaemon.errors import (
    DatabaseUnavailableError,
    InvalidOrderError,
    JobdaemonError,
    RefusedError,
    SchemaVersionError,
    SettingsError,
    UnsupportedImageError,
)

if TYPE_CHECKING:
    import psycopg


class ExitCode(IntEnum):
    """What the process returns."""

    DONE = 0
    #: An order or a check failed; an unknown order, job or queue; a store that does not work; a bug.
    FAILED = 1
    #: Wrong command line or settings.
    USAGE = 2
    #: The database cannot be reached, or its schema does not fit.
    DATABASE = 3
    #: Full, unknown plan, bad photo or prompts.
    REFUSED = 4
    #: Ctrl-C, or nobody reads the output any more.
    INTERRUPTED = 5


UNKNOWN_OBJECT = "JD005"
SCHEMA_OUT_OF_DATE = "JD006"

#: SQLSTATEs and their classes after which the database is not usable for us: lost or refused connections, missing databases,
#: resources, operator intervention, read-only standbys, corruption.
_UNAVAILABLE = ("08", "28", "3D", "53", "57", "58", "25006", "XX")
#: Tables, columns, functions, types or the schema are not there.
_OTHER_SCHEMA = ("42P01", "42703", "42883", "42704", "3F000")
_NOT_ALLOWED = "42501"
_CONSTRAINT = "23"


def explain(error: BaseException) -> tuple[ExitCode, str]:
    """The exit code and the sentence for *error*; several lines only for settings, one per problem."""
    error = translate(error)
    match error:
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "Interrupted."
        case SettingsError():
            return ExitCode.USAGE, str(error).strip()
        case RefusedError(sqlstate=sqlstate):
            code = {UNKNOWN_OBJECT: ExitCode.FAILED, SCHEMA_OUT_OF_DATE: ExitCode.DATABASE}.get(sqlstate, ExitCode.REFUSED)
            return code, sentence(str(error)[:1].upper() + str(error)[1:])
        case DatabaseUnavailableError() | SchemaVersionError():
            return ExitCode.DATABASE, sentence(str(error))
        case InvalidOrderError() | UnsupportedImageError():
            return ExitCode.REFUSED, sentence(str(error))
        case JobdaemonError():
            return ExitCode.FAILED, sentence(str(error))
        case OSError():
            place = f"{error.filename}: " if error.filename is not None else ""
            return ExitCode.FAILED, sentence(f"{place}{error.strerror or type(error).__name__}")
    from jobdaemon.redact import redact

    told = redact(f"{type(error).__name__}: {error}")
    return ExitCode.FAILED, sentence(f"internal error: {told} (`jobdaemon --debug` shows where)")


def translate(error: BaseException) -> BaseException:
    """A psycopg error as one of ours; anything else as it is."""
    # Where psycopg was never imported, no error is psycopg's.
    psycopg = sys.modules.get("psycopg")
    if psycopg is None or not isinstance(error, psycopg.Error):
        return error
    return _translated(error)


def _translated(error: psycopg.Error) -> JobdaemonError:
    import psycopg

    sqlstate = error.sqlstate or ""
    message = error.diag.message_primary or first_line(str(error)) or type(error).__name__
    if sqlstate.startswith("JD"):
        return RefusedError(message, sqlstate=sqlstate)
    if sqlstate in _OTHER_SCHEMA:
        return SchemaVersionError(f"The database's schema is not ours ({message}): run `jobdaemon migrate`.")
    if sqlstate == _NOT_ALLOWED:
        return DatabaseUnavailableError(
            f"The database does not let this user do that ({message}): grant it one of jobdaemon's roles."
        )
    if sqlstate.startswith(_UNAVAILABLE) or (not sqlstate and isinstance(error, psycopg.OperationalError)):
        return DatabaseUnavailableError(f"The connection to the database was lost: {message}")
    if sqlstate.startswith(_CONSTRAINT):
        return SettingsError(f"the database refuses these values: {message}")
    return JobdaemonError(f"The database answered with an error: {message}")


def first_line(text: str) -> str:
    """The first line that says anything."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def sentence(text: str) -> str:
    """*text* on one line, without control characters, ended by a full stop."""
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if line.endswith((".", "!", "?", "…")) else f"{line}."
