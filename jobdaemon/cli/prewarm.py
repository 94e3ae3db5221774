"""``prewarm``: have a photo beautified before anybody orders it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.enqueue import Desk, source_or_photo
from jobdaemon.cli.errors import ExitCode, sentence
from jobdaemon.cli.output import print_json, text
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database

if TYPE_CHECKING:
    import psycopg

#: Nothing tells of a prewarm's end.
_LOOK_S = 0.2
_OPEN = ("todo", "doing")


def prewarm(
    source: Annotated[str, typer.Argument(metavar="PHOTO|URL", help="A photo, or an https address.", show_default=False)],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end; exit code 1 unless the photo is there then.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Have a photo beautified in a slot that no order wants; an order for it then begins with generating."""
    settings = load(config)
    with open_database(settings) as connection:
        with Desk(settings, connection) as desk:
            job_id, created = _asked(connection, _source(desk, source))
        if not wait:
            _tell(job_id, created, as_json=as_json)
            return
        try:
            status, error = _awaited(connection, job_id)
        except BaseException:
            # Ctrl-C, or the database is gone: whoever waited needs the job, to ask again or to cancel it.
            if as_json:
                _tell(job_id, created, as_json=True)
            else:
                print(f"Job {job_id} goes on without you.")
            raise
    if as_json:
        print_json({"job_id": job_id, "created": created, "status": status, "error": error})
    elif status == "succeeded":
        print("The photo is prewarmed.")
    else:
        print(text(sentence(f"The photo was not prewarmed: {error or f'its job {job_id} was {status}'}")), file=sys.stderr)
    if status != "succeeded":
        raise typer.Exit(ExitCode.FAILED)


def _source(desk: Desk, argument: str) -> str:
    from jobdaemon.errors import InvalidOrderError

    if not argument:
        raise InvalidOrderError("Bad source: it must be the path of a photo, or https://…")
    wish = source_or_photo(argument)
    if "photo" in wish:
        return desk.stored(wish["photo"])
    try:
        argument.encode()
    except UnicodeEncodeError as error:  # what Python makes of arguments that are no UTF-8
        raise InvalidOrderError("Bad source: it is not valid Unicode text.") from error
    return argument


def _asked(connection: psycopg.Connection[Any], source: str) -> tuple[int, bool]:
    row = connection.execute("SELECT job_id, created FROM jobdaemon.prewarm(%s)", [source]).fetchone()
    assert row is not None
    return row[0], row[1]


def _tell(job_id: int, created: bool, *, as_json: bool) -> None:
    if as_json:
        print_json({"job_id": job_id, "created": created})
    elif created:
        print(f"The photo waits for an idle slot (job {job_id}).")
    else:
        print(f"The photo waited for an idle slot already (job {job_id}).")


def _awaited(connection: psycopg.Connection[Any], job_id: int) -> tuple[str, str | None]:
    """The job's last status, and why it failed."""
    from jobdaemon.cli import reading

    while True:
        document = reading.job_document(connection, job_id)
        if document["status"] not in _OPEN:
            attempts = document["failed_attempts"]
            return document["status"], attempts[-1]["error"] if attempts and document["status"] != "succeeded" else None
        time.sleep(_LOOK_S)
