"""NewOrder and the key of `process`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from jobdaemon.domain.order import NewOrder, derive_key
from jobdaemon.errors import InvalidOrderError

GOOD: dict[str, Any] = {"plan": "Free", "source": "https://photos.example/a.jpg"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"plan": None}, "plan must be a text"),
        ({"customer": 5}, "customer must be a text"),
        ({"customer": "a\x00b"}, "customer must not contain the character NUL"),
        ({"source": "\ud800"}, "source is not valid Unicode"),
        ({"prompts": "one"}, "prompts must be a list of texts"),
        ({"prompts": ["one", 2]}, "prompt 2 must be a text"),
        ({"images": True}, "images must be a whole number"),
        ({"images": 2.5}, "images must be a whole number"),
        ({"images": 2**31}, "images must be a whole number"),
        ({"params": []}, "params must be a JSON object"),
        ({"params": {"a": float("nan")}}, "nothing but JSON values"),
        ({"params": {"a": object()}}, "nothing but JSON values"),
        ({"params": {"a": "\x00"}}, "params must not contain the character NUL"),
        ({"params": {"a": "\udfff"}}, "params is not valid Unicode"),
        ({"at": "2026-05-01"}, "at must be a time with its zone"),
        ({"at": datetime(2026, 5, 1)}, "at must be a time with its zone"),  # noqa: DTZ001 - the point
    ],
)
def test_what_no_database_could_take_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    """A value that a driver would choke on is a permanent error that names it."""
    with pytest.raises(InvalidOrderError, match=words):
        NewOrder(**GOOD | values)


def test_a_good_order_is_frozen_and_whole() -> None:
    """A list of prompts becomes a tuple, and everything else stays as given."""
    at = datetime(2026, 5, 1, tzinfo=UTC)
    prompts: Any = ["one", "two"]
    order = NewOrder(**GOOD, prompts=prompts, params={"a": "é\\u0000"}, at=at)
    assert order.prompts == ("one", "two")
    assert order.params_json() == '{"a": "é\\\\u0000"}'
    assert order.at == at


def test_a_key_is_stable_and_tells_every_wish_apart() -> None:
    """The same wish has the same key for ever (old orders are found by it), and each part of it counts."""
    sha256 = "ab" * 32
    key = derive_key(sha256, "Free", None, "/out")
    assert key == "process-435033591ebb0c289591a2420933b3acbe9dfffb1ae7f8fec55bdd9464883bc2"
    assert key == derive_key(sha256, "Free", None, "/out")
    others = [
        derive_key("cd" * 32, "Free", None, "/out"),
        derive_key(sha256, "Pro", None, "/out"),
        derive_key(sha256, "Free", (), "/out"),
        derive_key(sha256, "Free", ("a", "b"), "/out"),
        derive_key(sha256, "Free", ('a", "b',), "/out"),
        derive_key(sha256, "Free", None, "/other"),
        derive_key(sha256, "Free", None, "/\udcff"),  # a folder whose name is no UTF-8
    ]
    assert len({key, *others}) == len(others) + 1
