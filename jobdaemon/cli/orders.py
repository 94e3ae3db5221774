"""``orders``, ``order``, ``cancel`` and ``redrive``."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.errors import ExitCode, explain, translate
from jobdaemon.cli.output import print_fields, print_json, print_rows
from jobdaemon.cli.session import MAX_ID, AsJson, ConfigFile, load, open_database

if TYPE_CHECKING:
    from jobdaemon.cli.reading import Row


class OrderStatusOption(StrEnum):
    """As in ``order_progress``."""

    QUEUED = "queued"
    BEAUTIFYING = "beautifying"
    GENERATING = "generating"
    UPLOADING = "uploading"
    COMPLETED = "completed"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"


def orders(
    status: Annotated[OrderStatusOption | None, typer.Option(help="Only this status.", show_default=False)] = None,
    customer: Annotated[str | None, typer.Option(help="Only this customer's.", show_default=False)] = None,
    group: Annotated[str | None, typer.Option(help="Only this group.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 50,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """List orders, the newest first."""
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        rows = reading.orders(connection, status=status, customer=customer, group=group, limit=limit)
    if as_json:
        print_json(rows)
        return
    columns = ("order_id", "customer", "plan", "status", "images", "created_at", "waiting_for")
    shown = [row | {"images": _counts(row)} for row in rows]
    print_rows(shown, columns, as_json=False, empty="There are no such orders.")


def _counts(row: Row) -> str:
    failed = f", {row['images_failed']} failed" if row["images_failed"] else ""
    return f"{row['images_stored']}/{row['images_total']}{failed}"


def order(
    order_id: Annotated[int, typer.Argument(metavar="ID", min=1, max=MAX_ID, help="The order.", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end; exit code 1 unless it completes.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Show one order and its images."""
    from jobdaemon.cli import reading
    from jobdaemon.cli.following import follow

    settings = load(config)
    with open_database(settings) as connection:
        if watch:
            follow(connection, order_id, poll=settings.engine.poll, is_silent=as_json)
        document = reading.order_document(connection, order_id)
        error = None if as_json else reading.order_error(connection, order_id)
    print_order(document, error, as_json=as_json)
    if watch:
        require_completed(document)


def print_order(document: Row, error: str | None, *, as_json: bool) -> None:
    """An order's document, for a script or for people."""
    if as_json:
        print_json(document)
        return
    fields = {name: value for name, value in document.items() if name != "images"}
    print_fields(fields | {"progress": f"{fields['progress']:.0%}", "error": error})
    print()
    images = [image | {"where": image["url"] or image["object_key"], "size": _size(image)} for image in document["images"]]
    print_rows(images, ("index", "status", "size", "where", "error", "prompt"), as_json=False, empty="It has no images.")


def _size(image: dict[str, Any]) -> str:
    return f"{image['width']}x{image['height']}" if image["width"] else ""


def require_completed(document: Row) -> None:
    """Exit code 1 unless the order completed."""
    if document["status"] != "completed":
        raise typer.Exit(ExitCode.FAILED)


def cancel(
    any_ids: Annotated[list[int], typer.Argument(metavar="ID...", min=1, max=MAX_ID, help="Orders.", show_default=False)],
    remove_images: Annotated[bool, typer.Option("--remove-images", help="Also delete the images it has stored.")] = False,
    are_jobs: Annotated[bool, typer.Option("--job", help="IDs are prewarms' jobs.")] = False,
    config: ConfigFile = None,
) -> None:
    """Cancel orders: what waits is dropped, what runs ends unrecorded. An order that has ended stays as it is."""
    import psycopg

    if are_jobs and remove_images:
        raise typer.BadParameter("--remove-images is for orders, not for --job")
    statement = f"SELECT jobdaemon.{'cancel_prewarm(%s)' if are_jobs else 'cancel_order(%s, %s)'}"
    code = ExitCode.DONE
    with open_database(load(config)) as connection:
        for any_id in any_ids:
            try:
                row = connection.execute(statement, [any_id] if are_jobs else [any_id, remove_images]).fetchone()
            except psycopg.Error as error:
                if not str(getattr(translate(error), "sqlstate", "")).startswith("JD"):
                    raise
                code, told = explain(error)
                print(told, file=sys.stderr)
                continue
            assert row is not None
            print(f"{'Prewarm' if are_jobs else 'Order'} {any_id} {_cancelled(row[0])}.")
    raise typer.Exit(code)


def _cancelled(status: str) -> str:
    """What became of it, from what the database's function returned."""
    match status:
        case "cancelled" | "aborted":
            return "is cancelled"
        case "doing":
            return "is being stopped"
    return f"had ended before: it is {status}, and so it stays"


def redrive(
    any_id: Annotated[int, typer.Argument(metavar="ID", min=1, max=MAX_ID, help="An order.", show_default=False)],
    is_job: Annotated[bool, typer.Option("--job", help="ID is a job's: only this one.")] = False,
    config: ConfigFile = None,
) -> None:
    """Give the failed jobs of an order new attempts."""
    statement = f"SELECT jobdaemon.redrive({'job_id' if is_job else 'order_id'} => %s)"
    with open_database(load(config)) as connection:
        row = connection.execute(statement, [any_id]).fetchone()
    assert row is not None
    count = row[0]
    if count == 0:
        print(f"{'Job' if is_job else 'Order'} {any_id} has nothing to redrive: no job of it has failed.")
    else:
        print(f"{count} {'job gets' if count == 1 else 'jobs get'} new attempts.")
