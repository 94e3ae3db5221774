"""
The engine's SQL: ``*.sql`` files of named statements.

A statement begins with ``-- name: <name>``, then one comment line that says what it does, then its text up to the next name.
"""

from __future__ import annotations

import re
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)\n-- .+\n", re.MULTILINE)


def load(file_name: str) -> dict[str, str]:
    """The statements of one file of this package, by name."""
    text = (resources.files(__name__) / file_name).read_text(encoding="utf-8")
    heads = list(_NAME.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {head[1]: text[head.end() : end].strip().rstrip(";") for head, end in zip(heads, ends, strict=True)}
