"""Claimed jobs: attempts counted, and arguments that anybody may have written."""

from __future__ import annotations

from typing import Any

import pytest

from jobdaemon.domain.job import Job, Task, generate_queue


@pytest.mark.parametrize(
    ("value", "order_id"),
    [(7, 7), (2**63 - 1, 2**63 - 1), (2**63, None), (0, None), (-1, None), (True, None), ("7", None), (None, None)],
)
def test_order_id_is_a_number_that_a_row_can_have(value: object, order_id: int | None) -> None:
    """What cannot be an order's id is no order: it never reaches a statement."""
    assert Job(1, "q", "t", 0, {"order_id": value}).order_id == order_id


@pytest.mark.parametrize(
    ("args", "indexes"),
    [
        ({"images": [1, 2]}, (1, 2)),
        ({"image": 3}, (3,)),
        ({"images": [1, "2", None, -3, True, 2**70]}, (1,)),
        ({"images": "12"}, ()),
        ({}, ()),
    ],
)
def test_image_indexes(args: dict[str, Any], indexes: tuple[int, ...]) -> None:
    """The images a job works for, what is no index left out."""
    assert Job(1, "q", "t", 0, args).image_indexes == indexes


def test_attempts_count_from_one() -> None:
    """The column counts finished attempts, the attempt that runs is one more."""
    assert Job(1, "q", "t", 0, attempts=0).attempt == 1
    assert Job(1, "q", "t", 0, attempts=2).attempt == 3


def test_only_cleaning_up_outlives_its_order() -> None:
    """Every job of an ended order is dropped but those that remove its images and stop its calls."""
    assert [task for task in Task if Job(1, "q", task, 0).outlives_its_order] == [Task.REMOVE, Task.ABANDON]


def test_queue_of_a_provider() -> None:
    """Each provider has a queue of its own."""
    assert generate_queue("local") == "generate.local"
