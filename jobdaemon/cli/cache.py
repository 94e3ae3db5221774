"""``cache`` and ``cache clear``."""

from __future__ import annotations

from typing import Annotated

import typer

from jobdaemon.cli.control import answer
from jobdaemon.cli.output import print_rows
from jobdaemon.cli.session import MAX_ID, AsJson, ConfigFile, load, open_database

app = typer.Typer(help="Show what the cache keeps and how often it helps; clear it.", invoke_without_command=True)


@app.callback()
def cache(ctx: typer.Context, as_json: AsJson = False, config: ConfigFile = None) -> None:
    """Show what the cache keeps, by provider, and its hits and misses of the last 24 hours; clear it."""
    if ctx.invoked_subcommand is not None:
        return
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        rows = reading.cache_stats(connection)
    columns = ("provider", "entries", "bytes", "hits", "misses", "hit_rate")
    print_rows(rows, columns, as_json=as_json, empty="The cache is empty.")


@app.command()
def clear(
    provider: Annotated[
        str | None, typer.Argument(metavar="[PROVIDER]", help="Only images of this one.", show_default=False)
    ] = None,
    order_id: Annotated[
        int | None, typer.Option("--order", min=1, max=MAX_ID, metavar="ID", help="Only images made for it.", show_default=False)
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Give up what the cache keeps; running daemons delete the copies within a minute."""
    with open_database(load(config)) as connection:
        count = answer(connection, "SELECT jobdaemon.clear_cache(%s, %s)", provider, order_id)
    print(f"The cache gave up {count} image{'' if count == '1' else 's'}.")
