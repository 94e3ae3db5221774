"""``resize``, ``pause``, ``resume``, ``drain`` and ``prioritize``: what every daemon follows within a second."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobdaemon.cli.errors import ExitCode, explain, sentence, translate
from jobdaemon.cli.session import MAX_ID, ConfigFile, load, open_database

if TYPE_CHECKING:
    import psycopg

_NONE = "none"
_MAX_PRIORITY = 1_000_000
#: A number may be negative: it is no option.
NEGATIVE_NUMBERS = {"ignore_unknown_options": True}


def _limit(value: str) -> str:
    """What stands for a limit: a whole number, checked by the database, or ``none``."""
    if value == _NONE or (value.isascii() and value.removeprefix("-").isdigit() and len(value) < len(str(MAX_ID))):
        return value
    raise typer.BadParameter(f"{value!r} is neither a whole number nor {_NONE}")


def resize(
    queue: Annotated[str, typer.Argument(metavar="QUEUE", help="As `jobdaemon queues` names it.", show_default=False)],
    team_size: Annotated[
        str | None,
        typer.Argument(
            metavar="[N|none]",
            parser=_limit,
            help="Jobs at once in each daemon; none: what its settings say.",
            show_default=False,
        ),
    ] = None,
    cluster_limit: Annotated[
        str | None,
        typer.Option("--cluster", metavar="N|none", parser=_limit, help="Jobs at once over all daemons.", show_default=False),
    ] = None,
    fair_share: Annotated[
        str | None,
        typer.Option(
            "--fair-share",
            metavar="N|none",
            parser=_limit,
            help="Most of them for one customer while others wait.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Change how many jobs of a queue run at once, on every daemon."""
    given = {"team_size": team_size, "cluster_limit": cluster_limit, "fair_share": fair_share}
    unset = [name for name, value in given.items() if value == _NONE]
    values = [None if value is None or value == _NONE else int(value) for value in given.values()]
    if not unset and values == [None] * len(values):
        raise typer.BadParameter("say what to change: N, --cluster or --fair-share")
    statement = "SELECT jobdaemon.resize_queue(%s, %s, %s, %s, %s)"
    with open_database(load(config)) as connection:
        print(sentence(first_upper(answer(connection, statement, queue, *values, unset))))


def pause(
    queues: Annotated[list[str], typer.Argument(metavar="QUEUE...", help="Queues.", show_default=False)],
    config: ConfigFile = None,
) -> None:
    """Start no more jobs of these queues; what runs, runs out."""
    raise typer.Exit(_for_each("SELECT jobdaemon.pause_queue(%s)", queues, config))


def resume(
    queues: Annotated[list[str], typer.Argument(metavar="QUEUE...", help="Queues.", show_default=False)],
    config: ConfigFile = None,
) -> None:
    """Let paused queues go on."""
    raise typer.Exit(_for_each("SELECT jobdaemon.resume_queue(%s)", queues, config))


def _for_each(statement: str, names: list[str], config: Any) -> ExitCode:
    """One queue after another: an unknown one stops no other."""
    import psycopg

    code = ExitCode.DONE
    with open_database(load(config)) as connection:
        for name in names:
            try:
                print(sentence(first_upper(answer(connection, statement, name))))
            except psycopg.Error as error:
                if not str(getattr(translate(error), "sqlstate", "")).startswith("JD"):
                    raise
                code, told = explain(error)
                print(told, file=sys.stderr)
    return code


def drain(
    daemon_id: Annotated[
        int, typer.Argument(metavar="DAEMON", min=1, max=MAX_ID, help="As `jobdaemon daemons` lists it.", show_default=False)
    ],
    undo: Annotated[bool, typer.Option("--undo", help="Let it claim again.")] = False,
    config: ConfigFile = None,
) -> None:
    """Let a daemon claim nothing more; what it runs, runs out, and it lives on."""
    with open_database(load(config)) as connection:
        status = answer(connection, "SELECT jobdaemon.drain_daemon(%s, %s)", daemon_id, undo)
        running = connection.execute("SELECT running FROM jobdaemon.workers WHERE daemon_id = %s", [daemon_id]).fetchone()
    match status:
        case "draining":
            left = 0 if running is None else running[0]
            still = "; nothing of its own runs" if left == 0 else f"; {left} of its jobs still {'runs' if left == 1 else 'run'}"
            print(f"Daemon {daemon_id} claims nothing more{still}.")
        case "running":
            print(f"Daemon {daemon_id} claims jobs again.")
        case _:
            print(f"Daemon {daemon_id} is {status}: it claims nothing more anyway.")


def prioritize(
    order_id: Annotated[int, typer.Argument(metavar="ORDER", min=1, max=MAX_ID, help="An open order.", show_default=False)],
    priority: Annotated[
        int,
        typer.Argument(
            metavar="N", min=-_MAX_PRIORITY, max=_MAX_PRIORITY, help="Its priority; higher goes first.", show_default=False
        ),
    ],
    config: ConfigFile = None,
) -> None:
    """Set the priority of an order and of all its jobs, those that follow too."""
    with open_database(load(config)) as connection:
        waiting = int(answer(connection, "SELECT jobdaemon.prioritize_order(%s, %s)", order_id, priority))
    told = {0: "none of its jobs waits right now", 1: "one of its jobs waits"}.get(waiting, f"{waiting} of its jobs wait")
    print(f"Order {order_id} has priority {priority}; {told}.")


def answer(connection: psycopg.Connection[Any], statement: str, *values: object) -> str:
    """What the database's function says it has done."""
    row = connection.execute(statement.encode(), values).fetchone()
    assert row is not None
    return str(row[0])


def first_upper(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]
