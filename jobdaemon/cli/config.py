"""``config show`` and ``config apply``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from jobdaemon.cli.output import print_json
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database

app = typer.Typer(help="The settings, and the rows made of them.")


@app.command()
def show(as_json: AsJson = False, config: ConfigFile = None) -> None:
    """Show what holds and where each value comes from; secrets are masked."""
    settings = load(config)
    rows = [{"key": key, "value": value, "origin": settings.origin(key)} for key, value in _flat(settings.shown())]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['key']} = {_toml(row['value'])}  # {row['origin']}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _toml(value: object) -> str:
    """As it could stand in the file."""
    match value:
        case bool():
            return str(value).lower()
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{ {', '.join(f'{name} = {_toml(item)}' for name, item in value.items())} }}"
        case str():
            from json import dumps

            return dumps(value, ensure_ascii=False)
    return str(value)


@app.command()
def apply(
    force: Annotated[
        bool, typer.Option("--force", help="Also overwrite the rows of plans and keys with what the settings say.")
    ] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
) -> None:
    """Insert the plans, queues and keys that the database does not have; rows that an operator changed stay, unless --force."""
    from jobdaemon.cli.rows import write_rows

    settings = load(config)
    with open_database(settings) as connection:
        written = write_rows(connection, settings, overwrite=force)
    if as_json:
        print_json(written)
        return
    for what, names in written.items():
        if names:
            print(f"{what.replace('_', ' ')}: {', '.join(names)}")
    if not any(written.values()):
        print("Nothing to do: every plan and queue is there.")
