"""What the HTTP providers share."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from jobdaemon.errors import (
    AnswerLostError,
    KeyRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
)
from jobdaemon.providers.wire import Kind, error_of, inline_image, kind_of_status, media_type_of, polled

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
SOON, NOW = timedelta(seconds=5), timedelta(milliseconds=1)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Kind.RETRY, ProviderUnavailableError),
        (Kind.CAPACITY, RateLimitedError),
        (Kind.PERMANENT, ProviderRefusedError),
        (Kind.KEY, KeyRefusedError),
        (Kind.MONEY, KeyRefusedError),
        (Kind.LOST, AnswerLostError),
    ],
)
def test_each_kind_is_one_error(kind: Kind, error: type[Exception]) -> None:
    """A kind becomes its error, whose sentence names the provider and is cut to one bounded line."""
    made = error_of(kind, "acme", "bad\nthing " + "x" * 1000)
    assert type(made) is error
    assert str(made).startswith("acme: bad thing x")
    assert len(str(made)) < 320


def test_only_an_empty_account_is_out_of_money() -> None:
    """A refused key and an empty account are told apart."""
    refused, empty = error_of(Kind.KEY, "acme", "no"), error_of(Kind.MONEY, "acme", "no")
    assert isinstance(refused, KeyRefusedError)
    assert isinstance(empty, KeyRefusedError)
    assert (refused.is_out_of_money, empty.is_out_of_money) == (False, True)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "permanent"), (401, "key"), (402, "money"), (409, "retry"), (429, "capacity"), (500, "retry"), (502, "retry")],
)
def test_a_status_alone_has_a_meaning(status: int, kind: str) -> None:
    """What is in no table is judged by its HTTP status."""
    assert kind_of_status(status) == kind


def test_a_gateway_that_gave_up_tells_nothing_of_a_submit() -> None:
    """504 to a submit is a lost answer, to a question a reason to ask again."""
    assert kind_of_status(504, is_submit=True) is Kind.LOST
    assert kind_of_status(504) is Kind.RETRY


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF0000WEBPVP8 ", "image/webp"),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_formats_are_told_by_their_first_bytes(content: bytes, media_type: str | None) -> None:
    """What a provider calls an image counts for nothing; how it begins does."""
    assert media_type_of(content) == media_type


def test_inline_images_come_bare_or_as_data_urls() -> None:
    """Both forms give the same bytes."""
    encoded = base64.b64encode(PNG).decode()
    assert inline_image(encoded, max_bytes=100, provider="acme") == (PNG, "image/png")
    assert inline_image(f"data:image/jpeg;base64,{encoded}", max_bytes=100, provider="acme") == (PNG, "image/png")


@pytest.mark.parametrize("text", ["", "x", base64.b64encode(b"<html>").decode(), base64.b64encode(PNG + bytes(200)).decode()])
def test_inline_nonsense_is_no_image(text: str) -> None:
    """No base64, no image, or too large: one sentence, retryable."""
    with pytest.raises(ProviderUnavailableError, match="acme"):
        inline_image(text, max_bytes=100, provider="acme")


def _script(*steps: Exception | str | None) -> Callable[[], Awaitable[str | None]]:
    left = list(steps)

    async def ask() -> str | None:
        step = left.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    return ask


async def test_polling_goes_on_over_trouble() -> None:
    """Not yet, a busy poll and two failures in a row do not end the waiting; busy is an answer, too."""
    busy, away = RateLimitedError("busy"), ProviderUnavailableError("away")
    ask = _script(None, busy, away, away, None, away, away, busy, away, away, "done")
    assert await polled(ask, every=NOW, patience=SOON, what="task 1") == "done"


async def test_polling_ends_with_the_third_failure_or_with_patience() -> None:
    """A provider that stays away, and a task that never ends, are errors that a later attempt may get over."""
    away = ProviderUnavailableError("away")
    with pytest.raises(ProviderUnavailableError, match="away"):
        await polled(_script(away, away, away), every=NOW, patience=SOON, what="task 1")
    with pytest.raises(ProviderUnavailableError, match=r"task 1 is not done after 0\.02 s"):
        await polled(_script(*[None] * 100), every=NOW, patience=timedelta(seconds=0.02), what="task 1")


async def test_polling_does_not_hide_a_refusal() -> None:
    """A permanent error ends the waiting at once."""
    with pytest.raises(ProviderRefusedError):
        await polled(_script(ProviderRefusedError("unsafe")), every=NOW, patience=SOON, what="task 1")
