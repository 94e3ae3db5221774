"""``enqueue``: one order from a photo or a URL, or many from JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from jobdaemon.cli.errors import ExitCode, explain, translate
from jobdaemon.cli.output import print_json
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database
from jobdaemon.cli.times import parse_moment

if TYPE_CHECKING:
    import psycopg

    from jobdaemon.domain.order import NewOrder
    from jobdaemon.enqueue import EnqueuedOrder
    from jobdaemon.ports import ArtifactStore
    from jobdaemon.settings import Settings

BAD_INPUT = "JD004"
#: Longer lines are refused unread: 10,000 prompts of an honest length fit.
MAX_LINE_BYTES = 8 * 1024 * 1024
_FIELDS = frozenset({"plan", "source", "photo", "customer", "key", "prompts", "images", "provider", "params", "at", "group"})


def enqueue(
    source: Annotated[
        str, typer.Argument(metavar="PHOTO|URL|-", help="A photo, an https address, or - for JSON lines.", show_default=False)
    ],
    plan: Annotated[str, typer.Option(help="What to buy: Free, Start, Pro or a plan of your own.")] = "Free",
    customer: Annotated[str, typer.Option(help="Whose order it is.", show_default=False)] = "",
    key: Annotated[str | None, typer.Option(help="The same key is the same order.", show_default=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to make; repeat it for several.", show_default=False)] = None,
    images: Annotated[int | None, typer.Option(help="Fewer images than the plan gives.", show_default=False)] = None,
    group: Annotated[str | None, typer.Option(help="A label to find orders by.", show_default=False)] = None,
    provider: Annotated[str | None, typer.Option(help="Who makes the images.", show_default=False)] = None,
    params: Annotated[str | None, typer.Option(metavar="JSON", help="An object for the provider.", show_default=False)] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Not before: 2026-05-01T09:00+02:00 or +10min.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end; exit code 1 unless it completes.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Enqueue an order; a daemon (`jobdaemon run`) works on it."""
    defaults: dict[str, Any] = {"plan": plan, "customer": customer, "images": images, "group": group, "provider": provider}
    defaults["prompts"] = prompt or None
    defaults["params"] = _json_object(params)
    defaults["at"] = _moment_option(at)
    if source == "-" and (key is not None or wait):
        raise typer.BadParameter("--key and --wait are for one order, not for JSON lines")
    settings = load(config)
    with open_database(settings) as connection, Desk(settings, connection) as desk:
        if source == "-":
            raise typer.Exit(_enqueue_lines(desk, defaults))
        wish = defaults | {"key": key} | source_or_photo(source)
        enqueued = _enqueue_or_refuse(desk, wish)
        if wait:
            _wait(settings, connection, enqueued, as_json=as_json)
        elif as_json:
            print_json({"order_id": enqueued.order_id, "created": enqueued.created})
        else:
            print(f"Order {enqueued.order_id} {'is enqueued' if enqueued.created else 'was there already'}.")


def _enqueue_or_refuse(desk: Desk, wish: dict[str, Any]) -> EnqueuedOrder:
    """Here every refusal is the door's: an unknown provider too, though it has the code of an unknown queue."""
    from jobdaemon.errors import RefusedError

    try:
        return desk.enqueue(wish)
    except RefusedError as error:
        print(explain(error)[1], file=sys.stderr)
        raise typer.Exit(ExitCode.REFUSED) from error


def _wait(settings: Settings, connection: psycopg.Connection[Any], enqueued: EnqueuedOrder, *, as_json: bool) -> None:
    from jobdaemon.cli import reading
    from jobdaemon.cli.following import follow
    from jobdaemon.cli.orders import print_order, require_completed

    try:
        follow(connection, enqueued.order_id, poll=settings.engine.poll, is_silent=as_json)
    except BaseException:
        # Ctrl-C, or the database is gone: a script that waited needs the order to ask again.
        if as_json:
            print_json({"order_id": enqueued.order_id, "created": enqueued.created})
        raise
    document = reading.order_document(connection, enqueued.order_id)
    error = None if as_json else reading.order_error(connection, enqueued.order_id)
    print_order(document | {"created": enqueued.created} if as_json else document, error, as_json=as_json)
    require_completed(document)


class Desk:
    """Turns wishes into orders: stores the photo where there is one, then calls the SQL function."""

    def __init__(self, settings: Settings, connection: psycopg.Connection[Any]) -> None:
        self._settings = settings
        self._connection = connection
        # One store, and one event loop for it, over all lines; neither is made for orders by URL.
        self._runner = asyncio.Runner()
        self._store: ArtifactStore | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._store is not None:
            self._runner.run(self._store.close())
        self._runner.close()

    def enqueue(self, wish: dict[str, Any]) -> EnqueuedOrder:
        """
        Enqueue one order.

        Args:
            wish: the SQL function's parameters by name; ``photo``, a path, may stand for ``source``.

        Raises:
            RefusedError: JD001 to JD005.
            InvalidOrderError, UnsupportedImageError: the wish or the photo is no good. Permanent.
        """
        from jobdaemon.enqueue import enqueue

        return enqueue(self._connection, self._order(wish))

    def _order(self, wish: dict[str, Any]) -> NewOrder:
        from jobdaemon.domain.order import NewOrder
        from jobdaemon.errors import InvalidOrderError

        values = {name: value for name, value in wish.items() if value is not None and name in _FIELDS}
        if unknown := sorted(wish.keys() - _FIELDS):
            raise InvalidOrderError(f"Bad order: there is no parameter {unknown[0]!r}, only {', '.join(sorted(_FIELDS))}.")
        photo = values.pop("photo", None)
        if (photo is None) == ("source" not in values):
            raise InvalidOrderError("Bad order: give either photo or source.")
        if "at" in values:
            values["at"] = self._moment(values["at"])
        # Everything that can be judged without the photo comes first, so that a bad order leaves no photo in the store.
        order = NewOrder(**values if photo is None else values | {"source": "artifact:photo"})
        if photo is None:
            return order
        return NewOrder(**values | {"source": self.stored(photo)})

    def stored(self, photo: object) -> str:
        """
        Check and store the photo at this path; returns the source that it is then.

        Raises:
            InvalidOrderError, UnsupportedImageError: it is no good. Permanent.
        """
        from jobdaemon import app
        from jobdaemon.errors import InvalidOrderError
        from jobdaemon.intake import read_photo_file, store_photo
        from jobdaemon.photo import PhotoLimits

        if not isinstance(photo, str) or not photo:
            raise InvalidOrderError("Bad order: photo must be the path of a file.")
        limits = PhotoLimits(self._settings.photos.max_bytes, self._settings.photos.max_pixels)
        file = read_photo_file(Path(photo).expanduser(), limits=limits)
        if self._store is None:
            self._store = app.open_store(self._settings)
        return self._runner.run(store_photo(self._store, file, self._hold_source))

    async def _hold_source(self, source: str) -> bool:
        row = self._connection.execute("SELECT jobdaemon.hold_source(%s)", [source]).fetchone()
        assert row is not None
        return bool(row[0])

    def _moment(self, at: object) -> datetime:
        """A wait counts by the database's clock, which decides when the order starts."""
        from jobdaemon.errors import InvalidOrderError

        try:
            moment = parse_moment(at) if isinstance(at, str) else at
        except ValueError as error:
            raise InvalidOrderError(f"Bad order: at {error}.") from error
        if isinstance(moment, timedelta):
            row = self._connection.execute("SELECT now() + %s", [moment]).fetchone()
            assert row is not None
            moment = row[0]
        if not isinstance(moment, datetime):
            raise InvalidOrderError("Bad order: at must be a time as text.")
        return moment


def source_or_photo(argument: str) -> dict[str, str]:
    """What has a scheme is a source, and the database says which ones it takes; everything else is a file here."""
    return {"source": argument} if "://" in argument or argument.startswith("artifact:") else {"photo": argument}


def _json_object(params: str | None) -> dict[str, Any] | None:
    if params is None:
        return None
    try:
        value = json.loads(params)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter("--params is not valid JSON") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("--params must be a JSON object")
    return value


def _moment_option(at: str | None) -> datetime | timedelta | None:
    try:
        return None if at is None else parse_moment(at)
    except ValueError as error:
        raise typer.BadParameter(f"--at {error}") from error


# -- JSON lines -------------------------------------------------------------------------------------------------------------


def _enqueue_lines(desk: Desk, defaults: dict[str, Any]) -> ExitCode:
    """
    One order per line of standard input, each in a transaction of its own; one answer per line on standard output.

    Returns:
        REFUSED when at least one line was refused; the others are enqueued all the same.
    """
    code = ExitCode.DONE
    for line in _lines():
        try:
            enqueued = desk.enqueue(defaults | _wish_of(line))
            answer: dict[str, Any] = {"order_id": enqueued.order_id, "created": enqueued.created}
        except Exception as error:
            line_code, told = explain(error)
            sqlstate = _refusal_code(error)
            if sqlstate is None:  # nothing is wrong with the line, so the next ones would fare no better
                raise
            code = max(code, line_code, ExitCode.REFUSED)
            answer = {"error": told, "code": sqlstate}
        print(json.dumps(answer), flush=True)
    return code


def _refusal_code(error: Exception) -> str | None:
    """The SQLSTATE of a refusal; what is refused before it reaches the database is bad input too."""
    from jobdaemon.errors import InvalidOrderError, RefusedError, UnsupportedImageError

    match translate(error):
        case RefusedError(sqlstate=sqlstate):
            return sqlstate
        case InvalidOrderError() | UnsupportedImageError():
            return BAD_INPUT
    return None


def _lines() -> Iterator[bytes]:
    """The lines of standard input that are not blank; of one that is too long only the beginning, which is no JSON."""
    stream = sys.stdin.buffer
    while line := stream.readline(MAX_LINE_BYTES):
        is_whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
        while not is_whole and (rest := stream.readline(MAX_LINE_BYTES)):
            is_whole = rest.endswith(b"\n")
        if line.strip():
            yield line


def _wish_of(line: bytes) -> dict[str, Any]:
    from jobdaemon.errors import InvalidOrderError

    if len(line) >= MAX_LINE_BYTES:
        raise InvalidOrderError(f"Bad order: the line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        wish = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidOrderError("Bad order: the line is not valid JSON.") from error
    if not isinstance(wish, dict):
        raise InvalidOrderError("Bad order: the line is no JSON object.")
    # null means "not given", as in the SQL function; it does not take a default away.
    return {name: value for name, value in wish.items() if value is not None}
