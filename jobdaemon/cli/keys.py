"""``keys``, ``keys pause`` and ``keys resume``."""

from __future__ import annotations

from typing import Annotated

import typer

from jobdaemon.cli.control import answer, first_upper
from jobdaemon.cli.errors import sentence
from jobdaemon.cli.output import print_rows
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database

app = typer.Typer(help="Show the provider keys; pause and resume one.", invoke_without_command=True)

Provider = Annotated[str, typer.Argument(metavar="PROVIDER", help="As `jobdaemon keys` names it.", show_default=False)]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="The key's alias.", show_default=False)]


@app.callback()
def keys(ctx: typer.Context, as_json: AsJson = False, config: ConfigFile = None) -> None:
    """Show the provider keys, their limits and what runs under each; pause and resume one."""
    if ctx.invoked_subcommand is not None:
        return
    from jobdaemon.cli import reading

    with open_database(load(config)) as connection:
        rows = reading.keys(connection)
    columns = ("provider", "alias", "running", "concurrency", "rate", "daily_budget", "spent_today", "paused", "rested_until")
    print_rows(rows, (*columns, "rest_reason"), as_json=as_json, empty="There are no provider keys.")


@app.command()
def pause(provider: Provider, alias: Alias, config: ConfigFile = None) -> None:
    """Buy nothing more under a key; what was bought is still collected."""
    _change("SELECT jobdaemon.pause_key(%s, %s)", provider, alias, config)


@app.command()
def resume(provider: Provider, alias: Alias, config: ConfigFile = None) -> None:
    """Let a paused key go on, and end its rest."""
    _change("SELECT jobdaemon.resume_key(%s, %s)", provider, alias, config)


def _change(statement: str, provider: str, alias: str, config: ConfigFile) -> None:
    with open_database(load(config)) as connection:
        print(sentence(first_upper(answer(connection, statement, provider, alias))))
