"""
The command line: parse, call, print.

Importing this package loads nothing but the standard library, and ``--help`` nothing but typer and rich: what a verb needs is
imported when it runs.
"""

from __future__ import annotations


def main() -> int:
    """The console script: run the verb in ``sys.argv`` and return the exit code."""
    try:
        from jobdaemon.cli.program import run_program

        return run_program()
    except KeyboardInterrupt:  # during the import
        return 5
