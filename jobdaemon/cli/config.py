"""``config show`` and ``config apply``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.output import print_json
from jobdaemon.cli.session import AsJson, ConfigFile, load, open_database
from jobdaemon.units import format_duration

if TYPE_CHECKING:
    from jobdaemon.cli.rows import WrittenRows

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
        bool, typer.Option("--force", help="Also overwrite what the settings name in rows of plans and keys that differ.")
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
        print_json(_as_json(written))
    else:
        for line in [*_lines(written)] or ["Nothing to do: every plan and queue is there, and says what the settings say."]:
            print(line)


def _lines(written: WrittenRows) -> Iterator[str]:
    from jobdaemon.settings_rows import cure_of, instead_of_defaults, shown_value

    for what, names in written.inserted.items():
        if names:
            yield f"{what} inserted: {', '.join(names)}"
    for row in written.differing:
        is_overwritten = row.title in written.overwritten
        for it in row.named:
            was, wanted = shown_value(it, it.in_database), shown_value(it, it.in_settings)
            if is_overwritten:
                yield f"{row.title}: {it.column} was {was}, is now {wanted} as {it.setting} says"
            else:
                yield f"{row.title}: {it.column} stays {was}, not {wanted} as {it.setting} says: {cure_of(row)}"
        if row.unnamed:
            yield f"{row.title} is left alone: {instead_of_defaults(row)}"


def _as_json(written: WrittenRows) -> dict[str, Any]:
    """The names of what was inserted and overwritten, and each difference there was, durations and the like as in text."""
    document: dict[str, Any] = {f"{what}_inserted": names for what, names in written.inserted.items()}
    for kind in ("plan", "key"):
        rows = (row for row in written.differing if row.kind == kind and row.title in written.overwritten)
        document[f"{kind}s_overwritten"] = [row.name for row in rows]
    document["differences"] = [
        {
            "row": row.title,
            "column": it.column,
            "in_database": _plain(it.in_database),
            "in_settings": _plain(it.in_settings),
            "setting": it.setting,
            "done": "overwritten" if it.setting is not None and row.title in written.overwritten else "left",
        }
        for row in written.differing
        for it in row.differences
    ]
    return document


def _plain(value: object) -> object:
    return format_duration(value) if isinstance(value, timedelta) else value
