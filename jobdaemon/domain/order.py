"""An order as somebody asks for it, and the key under which the same wish is the same order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jobdaemon.errors import InvalidOrderError

#: Orders in these statuses have ended; only a redrive opens ``partial`` and ``failed`` ones again.
ENDED_STATUSES = frozenset({"completed", "partial", "failed", "cancelled"})
ORDER_STATUSES = ("queued", "beautifying", "generating", "uploading", "completed", "partial", "failed", "cancelled")

#: After an even number of backslashes, which stand for themselves.
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True, slots=True)
class NewOrder:
    """
    What ``enqueue_order`` takes, under the same names.

    Checked here is only what a database driver would choke on; what an order may be is the SQL function's to say, so that
    every client hears the same.

    Attributes:
        plan: Free, Start, Pro or the operator's own.
        source: ``https://…`` or ``artifact:<key>``; never a path.
        customer: '' when unknown.
        key: the same key of the same customer is the same order.
        prompts: None means the plan's own.
        images: None means as many as the plan gives.
        provider: None means the plan's own.
        params: JSON object for the provider.
        at: aware; not before. None, or a time that has passed, means now.
        group: a label to find orders by.

    Raises:
        InvalidOrderError: a value that no database could take. Permanent.
    """

    plan: str
    source: str
    customer: str = ""
    key: str | None = None
    prompts: tuple[str, ...] | None = None
    images: int | None = None
    provider: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    at: datetime | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        for name in ("plan", "source", "customer"):
            _require_text(name, getattr(self, name))
        for name in ("key", "provider", "group"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name))
        object.__setattr__(self, "prompts", _texts(self.prompts))
        if self.images is not None and (type(self.images) is not int or self.images not in _INT32):
            raise InvalidOrderError("Bad order: images must be a whole number of a sensible size.")
        _require_moment(self.at)
        self.params_json()

    def params_json(self) -> str:
        """
        *params* as JSON text.

        Raises:
            InvalidOrderError: it is no JSON object that Postgres can hold. Permanent.
        """
        if not isinstance(self.params, Mapping):
            raise InvalidOrderError("Bad order: params must be a JSON object.")
        try:
            text = json.dumps(dict(self.params), allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidOrderError("Bad order: params must hold nothing but JSON values.") from error
        _require_text("params", text)
        if _ESCAPED_NUL.search(text):
            raise InvalidOrderError("Bad order: params must not contain the character NUL.")
        return text


def _texts(prompts: object) -> tuple[str, ...] | None:
    if prompts is None:
        return None
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidOrderError("Bad order: prompts must be a list of texts.")
    for number, prompt in enumerate(prompts, start=1):
        _require_text(f"prompt {number}", prompt)
    return tuple(prompts)


def _require_moment(at: object) -> None:
    if at is not None and (not isinstance(at, datetime) or at.tzinfo is None):
        raise InvalidOrderError("Bad order: at must be a time with its zone.")


def _require_text(name: str, value: object) -> None:
    """Postgres holds no NUL, and UTF-8 no lone surrogate (what Python makes of bytes that were no UTF-8)."""
    if not isinstance(value, str):
        raise InvalidOrderError(f"Bad order: {name} must be a text.")
    if "\x00" in value:
        raise InvalidOrderError(f"Bad order: {name} must not contain the character NUL.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidOrderError(f"Bad order: {name} is not valid Unicode text.") from error


def derive_key(photo_sha256: str, plan: str, prompts: Sequence[str] | None, output_folder: str) -> str:
    """
    The key of an order that ``process`` makes: the same call again is the same order.

    Args:
        photo_sha256: lower-case hex digest of the photo's bytes.
        plan: its name.
        prompts: those that were asked for; None for the plan's own.
        output_folder: absolute; another folder is another order, since its images go elsewhere.

    Returns:
        72 ASCII characters.
    """
    wish = [photo_sha256, plan, None if prompts is None else list(prompts), output_folder]
    # json.dumps escapes the lone surrogates of a folder name that is no UTF-8.
    return "process-" + hashlib.sha256(json.dumps(wish).encode()).hexdigest()
