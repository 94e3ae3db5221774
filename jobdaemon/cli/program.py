"""The typer application: the verbs, the options before them, and what becomes of every error."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobdaemon.cli import cache, check, config, control, enqueue, jobs, keys, migrate, orders, queues
from jobdaemon.cli.errors import ExitCode, explain, sentence
from jobdaemon.cli.explain import explain as explain_order
from jobdaemon.cli.prewarm import prewarm
from jobdaemon.cli.process import process
from jobdaemon.cli.run import run
from jobdaemon.cli.sandbox import sandbox
from jobdaemon.cli.session import show_version

PROGRAM = "jobdaemon"

_is_debugging: ContextVar[bool] = ContextVar("is_debugging", default=False)


class Program(TyperGroup):
    """Runs one verb. Whatever happens ends as one sentence on standard error and an exit code; a traceback only with --debug."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """As click's, with our errors; a verb may return its exit code."""
        _is_debugging.set(False)
        try:
            extra["prog_name"] = PROGRAM
            code = super().main(args, standalone_mode=False, **extra)
            code = code if isinstance(code, int) else ExitCode.DONE
            sys.stdout.flush()
        except BrokenPipeError as error:
            code = _fail(error)
        except Exception as error:  # noqa: BLE001 - usage errors; typer's own classes have no common public base
            code = _fail(error)
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Errors of the verb are met here: click would turn Ctrl-C and a closed pipe into exit codes of its own."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence: no traceback for a user
            return int(_fail(error))


def _fail(error: BaseException) -> ExitCode:
    """Say what went wrong and return the exit code."""
    if _is_debugging.get():
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        # What is still buffered would fail again, loudly, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.INTERRUPTED
    if isinstance(error, typer.Abort):
        return ExitCode.INTERRUPTED
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else PROGRAM
        told = sentence(format_message().replace("Value error, ", "")).removesuffix(".")
        code, text = ExitCode.USAGE, told if told.endswith("?") else f"{told}; see `{path} --help`."
    else:
        code, text = explain(error)
    print(text, file=sys.stderr, flush=True)
    return code


app = typer.Typer(
    cls=Program,
    name=PROGRAM,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A Postgres job queue that turns one portrait photo into a set of finished images.",
)


@app.callback(invoke_without_command=True)
def program(
    ctx: typer.Context,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings file; every verb takes it too.", show_default=False)
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Options that stand before the verb."""
    _is_debugging.set(debug)
    if config_file is not None:
        ctx.default_map = _config_for_all(ctx.command, config_file)
    if version:
        show_version()
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(ExitCode.USAGE)


def _config_for_all(group: Any, file: Path) -> dict[str, Any]:
    """The default_map (click's) that makes *file* the --config of every verb below *group*."""
    return {
        name: (_config_for_all(command, file) if hasattr(command, "commands") else {}) | {"config": str(file)}
        for name, command in group.commands.items()
    }


for verb, name in (
    (process, "process"),
    (run, "run"),
    (enqueue.enqueue, "enqueue"),
    (prewarm, "prewarm"),
    (orders.orders, "orders"),
    (orders.order, "order"),
    (orders.cancel, "cancel"),
    (orders.redrive, "redrive"),
    (explain_order, "explain"),
    (queues.queues, "queues"),
    (control.pause, "pause"),
    (control.resume, "resume"),
    (jobs.jobs, "jobs"),
    (jobs.job, "job"),
    (queues.daemons, "daemons"),
    (control.drain, "drain"),
    (migrate.migrate, "migrate"),
    (check.check, "check"),
    (sandbox, "sandbox"),
    (show_version, "version"),
):
    app.command(name)(verb)
app.command("resize", context_settings=control.NEGATIVE_NUMBERS)(control.resize)
app.command("prioritize", context_settings=control.NEGATIVE_NUMBERS)(control.prioritize)
app.add_typer(keys.app, name="keys")
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")


def run_program() -> int:
    """Run the verb in ``sys.argv`` and return the exit code."""
    # psycopg warns as it closes a connection that Ctrl-C took in the middle of a statement: that tells a user nothing. A verb
    # that keeps a log has it there.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that is not UTF-8 must not turn a customer's name into an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return int(app(standalone_mode=False))
