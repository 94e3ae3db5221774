"""
What the HTTP providers share: kinds of errors, images that come inline, waiting for a task.

A provider module has one table, code -> :class:`Kind`, with the source of each line; what is not in it goes by its HTTP status.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable
from datetime import timedelta
from enum import StrEnum
from typing import TypeVar

from jobdaemon.errors import (
    AnswerLostError,
    KeyRefusedError,
    PhotoRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    RetryableError,
)

T = TypeVar("T")
#: A message of a provider is quoted, never repeated whole.
_QUOTED_CHARACTERS = 300


class Kind(StrEnum):
    """What an error of a provider means for the attempt."""

    #: may work later; spends an attempt
    RETRY = "retry"
    #: the provider is at capacity: later, no attempt spent
    CAPACITY = "capacity"
    #: will never work: content policy, bad parameters
    PERMANENT = "permanent"
    #: will never work, unless the link to the photo has gone bad
    PHOTO = "photo"
    #: this key is refused: another one may serve
    KEY = "key"
    #: this key's account is out of money
    MONEY = "money"
    #: what was asked may have been done all the same
    LOST = "lost"


def error_of(kind: Kind, provider: str, message: str, *, retry_after: timedelta | None = None) -> Exception:
    """
    The error that *kind* is.

    Args:
        provider: whose words *message* are.
        message: quoted, cut, on one line; must hold no secret.
    """
    words = " ".join(message.split())
    text = f"{provider}: {words if len(words) <= _QUOTED_CHARACTERS else words[: _QUOTED_CHARACTERS - 1] + '…'}"
    match kind:
        case Kind.RETRY:
            return ProviderUnavailableError(text, retry_after=retry_after)
        case Kind.CAPACITY:
            return RateLimitedError(text, retry_after=retry_after)
        case Kind.KEY | Kind.MONEY:
            return KeyRefusedError(text, is_out_of_money=kind is Kind.MONEY)
        case Kind.LOST:
            return AnswerLostError(text, retry_after=retry_after)
        case Kind.PHOTO:
            return PhotoRefusedError(text)
        case Kind.PERMANENT:
            return ProviderRefusedError(text)


def kind_of_status(status: int, *, is_submit: bool = False) -> Kind:
    """
    What an HTTP status alone means.

    Args:
        is_submit: whether the request asked for something that costs money: then a gateway that gave up waiting (504, 524, 408)
            tells nothing of what became of it.
    """
    if status == 429:
        return Kind.CAPACITY
    if status in (401, 403):
        return Kind.KEY
    if status == 402:
        return Kind.MONEY
    if status in (408, 504, 524):
        return Kind.LOST if is_submit else Kind.RETRY
    return Kind.PERMANENT if 400 <= status < 500 and status not in (409, 425) else Kind.RETRY


def media_type_of(content: bytes) -> str | None:
    """What image format these bytes begin like, or None; whether they are whole is for upload to find out."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return None


def inline_image(text: str, *, max_bytes: int, provider: str) -> tuple[bytes, str]:
    """
    The bytes and media type of an image that came as base64, bare or as a ``data:`` URL.

    Raises:
        ProviderUnavailableError: no base64, no image, or larger than *max_bytes*.
    """
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    if len(encoded) > max_bytes * 4 // 3 + 4:
        raise ProviderUnavailableError(f"{provider} sent an image of more than {max_bytes} bytes")
    try:
        content = base64.b64decode(encoded, validate=False)
    except (binascii.Error, ValueError) as error:
        raise ProviderUnavailableError(f"{provider} sent an image that is no base64") from error
    media_type = media_type_of(content)
    if media_type is None:
        raise ProviderUnavailableError(f"{provider} sent something that is neither PNG, JPEG nor WebP")
    return content, media_type


async def polled(
    ask: Callable[[], Awaitable[T | None]], *, every: timedelta, patience: timedelta, what: str, strikes: int = 3
) -> T:
    """
    Ask until there is an answer.

    Args:
        ask: None means not yet. Its RetryableErrors are overcome *strikes* - 1 times in a row, longer after each; a
            RateLimitedError of a poll says nothing about new calls, so it only slows the polling down; it ends a row of failures.
        every: from one question to the next, the time of its answer included, as long as that takes no more than half of it.
        what: for the error.

    Raises:
        ProviderUnavailableError: not done after *patience*; asking again later is right, buying again is not.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience.total_seconds()
    failures = 0
    due = loop.time()
    while loop.time() < deadline:
        rest_s = every.total_seconds()
        try:
            answer = await ask()
        except RateLimitedError as error:
            failures = 0
            rest_s = max(every * 2, error.retry_after or every).total_seconds()
        except RetryableError:
            failures += 1
            if failures >= strikes:
                raise
            rest_s *= 2**failures
        else:
            failures = 0
            if answer is not None:
                return answer
            due = max(due, loop.time() - rest_s / 2) + rest_s
            rest_s = due - loop.time()
        await asyncio.sleep(max(0.0, min(rest_s, deadline - loop.time())))
    raise ProviderUnavailableError(f"{what} is not done after {patience.total_seconds():g} s")
