"""``check``: is everything there that a daemon needs, and what to do if not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from jobdaemon.cli.errors import ExitCode
from jobdaemon.cli.output import print_json, print_table
from jobdaemon.cli.session import AsJson, ConfigFile

if TYPE_CHECKING:
    from jobdaemon.cli.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def check(as_json: AsJson = False, config: ConfigFile = None) -> None:
    """Check settings, database, schema, store and backend; exit code 1 when something is an error."""
    from jobdaemon.cli.findings import all_findings
    from jobdaemon.logs import configure_logs

    configure_logs(level="warning")  # what a part says when it is tried; unformatted it would be told without its contents
    findings = all_findings(config)
    if as_json:
        print_json([finding.as_row() for finding in findings])
    else:
        _show(findings)
    if any(finding.state == "error" for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


def _show(findings: list[Finding]) -> None:
    if not sys.stdout.isatty():
        print_table([[finding.check, finding.state, finding.told] for finding in findings], ["check", "state", "what"])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "state", "what", box=None, pad_edge=False, header_style="bold")
    for finding in findings:
        table.add_row(finding.check, Text(finding.state, style=_COLOURS[finding.state]), Text(finding.told))
    Console().print(table)
