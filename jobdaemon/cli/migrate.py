"""``migrate``: bring the database up to date."""

from __future__ import annotations

from typing import Annotated

import typer

from jobdaemon.cli.output import print_json
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database


def migrate(
    pre: Annotated[bool, typer.Option("--pre", help="Only what may run before the daemons are the new program.")] = False,
    post: Annotated[bool, typer.Option("--post", help="Only what must wait until every daemon is the new program.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Create or update the database's schema, and insert the plans and queues it misses. Safe to run twice, or in two places."""
    from jobdaemon import app, schema
    from jobdaemon.cli.rows import write_rows
    from jobdaemon.schema_version import compare

    if pre and post:
        raise typer.BadParameter("--pre and --post exclude each other; without either both run")
    settings = load(config)
    with app.database_url(settings) as url:
        applied = schema.migrate(url, "pre" if pre else "post" if post else None)
        with open_database(settings, must_fit=False) as connection:
            write_rows(connection, settings)
            waiting = compare(schema.applied_migrations(connection)).pending_post
    if as_json:
        print_json({"applied": applied, "waiting": list(waiting)})
        return
    if applied:
        print(f"{len(applied)} {'migration' if len(applied) == 1 else 'migrations'} applied, the last is {applied[-1]}.")
    else:
        print("Nothing to do: the schema is up to date.")
    if waiting:
        print(f"{len(waiting)} more wait for `jobdaemon migrate --post`, once every daemon is the new program.")
