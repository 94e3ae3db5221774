"""Writes as rows of JSON."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.write import ImageFailed, OrderFailed, OrderStarted, Write
from jobdaemon.queue import writes
from tests.factories import beautified, generated, stored

EVERY: list[Write] = [
    stored(1, 2),
    ImageFailed(1, 3, "x", "pending"),
    OrderStarted(1),
    generated(1, 4),
    beautified(1),
    OrderFailed(2, "y"),
]


def test_writes_run_in_the_order_of_an_orders_life() -> None:
    """Whatever order attempts bring them in, the statements run from start to failure, each once."""
    names = [name for name, _ in writes.by_statement(EVERY)]
    assert names == ["order_started", "photo_beautified", "image_generated", "image_stored", "image_failed", "order_failed"]


def test_every_write_is_json_and_has_a_key() -> None:
    """Each row can be sent, and its key is what its statement returns."""
    for write in EVERY:
        json.dumps(writes.row(write))
    assert [writes.key(write) for write in EVERY] == [(1, 2), (1, 3), (1,), (1, 4), (1,), (2,)]


@given(st.text(max_size=5000))
def test_sentences_can_be_stored(text: str) -> None:
    """No NUL, no lone surrogate, bounded; what Postgres can hold is kept as it is."""
    kept = writes.storable(text)
    assert "\x00" not in kept
    kept.encode()
    assert len(kept) <= writes.MAX_ERROR_CHARS
    if "\x00" not in text and len(text) <= writes.MAX_ERROR_CHARS and not any(0xD800 <= ord(char) < 0xE000 for char in text):
        assert kept == text


def test_a_locator_is_never_shortened() -> None:
    """Every character of an address counts."""
    url = "https://p.example/" + "x" * 10_000
    assert writes.row(generated(1, 1, locator=url))["locator"] == url
