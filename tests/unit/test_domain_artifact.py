"""Keys of artifacts: what may become a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.domain.artifact import (
    MAX_KEY_BYTES,
    beautified_key,
    fitted_key,
    generated_key,
    image_key,
    is_valid_key,
    order_of,
    source_key,
)


@pytest.mark.parametrize("key", ["a", "orders/1/001-ab.jpg", "a=b/c_d-e.f", "...", "a/..b", "x" * MAX_KEY_BYTES])
def test_good_keys(key: str) -> None:
    """URL-safe path segments make a key."""
    assert is_valid_key(key)


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a/.", "a b", "a\n", "a\x00", "ä", "a\\b", "~/a", "x" * (MAX_KEY_BYTES + 1)],
)
def test_bad_keys(key: str) -> None:
    """Nothing that could leave the store's folder or confuse a URL."""
    assert not is_valid_key(key)


@given(st.text("./a\\ \n\x00", max_size=12))
def test_no_key_leaves_its_folder(key: str) -> None:
    """Whatever is accepted stays below the root and names a file."""
    if is_valid_key(key):
        parts = key.split("/")
        assert not key.startswith("/")
        assert all(part not in ("", ".", "..") for part in parts)


@given(st.integers(1, 2**63 - 1), st.integers(1, 1000))
def test_our_own_keys_are_good(order_id: int, index: int) -> None:
    """Every key we make ourselves may name an artifact, and differs by content."""
    digest, other = "ab" * 32, "cd" * 32
    for key in (source_key(digest), beautified_key(order_id, digest), generated_key(order_id, index, digest, "image/png")):
        assert is_valid_key(key)
    assert image_key(order_id, index, digest, "image/jpeg") != image_key(order_id, index, other, "image/jpeg")
    assert image_key(1, 2, digest, "image/webp") == f"orders/1/002-{digest[:16]}.webp"
    assert image_key(1, 2, digest, "what/ever").endswith(".bin")


@pytest.mark.parametrize("key", ["sources/ab/abcd.jpg", "orders/7/001-ab.png", "work/x/a.jpg", "work", ""])
def test_a_key_of_no_work_has_no_order(key: str) -> None:
    """Photos, copies of them and raw images name their order by their key; anything else names none."""
    photo = beautified_key(17, "ab" * 32)
    assert {order_of(photo), order_of(fitted_key(photo, 4096, "cd" * 32))} == {17}
    with pytest.raises(ValueError, match="no order's"):
        order_of(key)
