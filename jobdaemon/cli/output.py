"""What verbs print: JSON documents for scripts, tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

Row = Mapping[str, Any]
#: Cells of up to so many characters are never folded.
_SHORT = 20


def print_json(document: object) -> None:
    """One document on standard output; ASCII, so that no locale can break it; indented on a terminal."""
    print(json.dumps(document, default=_plain, indent=2 if sys.stdout.isatty() else None), flush=True)


def print_rows(rows: Sequence[Row], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """
    Rows as a JSON array with all their keys, or as a table.

    Args:
        columns: of the table; those that are empty in every row are left out.
        empty: the sentence for people when there are no rows.
    """
    if as_json:
        print_json([dict(row) for row in rows])
    elif not rows:
        print(empty)
    else:
        columns = [name for name in columns if any(text(row[name]) for row in rows)]
        print_table([[text(row[name]) for name in columns] for row in rows], [name.replace("_", " ") for name in columns])


def print_table(cells: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    """A table: drawn by rich on a terminal, aligned plain text elsewhere."""
    if sys.stdout.isatty():
        _draw(cells, header)
        return
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    for line in [header, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_fields(row: Row) -> None:
    """One thing, a line per field that has a value."""
    fields = [(name.replace("_", " "), text(value)) for name, value in row.items() if value is not None and value != ""]
    if sys.stdout.isatty():
        _draw(fields, None)
        return
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name.ljust(width)}  {value}")


def _draw(cells: Sequence[Sequence[str]], header: Sequence[str] | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=header is not None, header_style="bold")
    for column, title in enumerate(header or ["", ""]):
        # A folded id or time is hard to read; what is long anyway takes the room that is left.
        widest = max((len(line[column]) for line in cells), default=0)
        table.add_column(title, overflow="fold", no_wrap=widest <= _SHORT)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)


def text(value: object) -> str:
    """A value for people: times to the second, nothing for None, no control characters (a customer's name may hold any)."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return iso(value.replace(microsecond=0))
        case float() | Decimal():
            return f"{value:.2f}".rstrip("0").rstrip(".")
        case dict() | list():
            return json.dumps(value, default=_plain)
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value))


def iso(moment: datetime) -> str:
    """ISO 8601, UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _plain(value: object) -> Any:
    match value:
        case datetime():
            return iso(value)
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return float(value)
    return str(value)
