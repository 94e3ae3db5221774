"""What a ComfyUI server's answers mean."""

from __future__ import annotations

from typing import Any

import pytest

from jobdaemon.errors import (
    AnswerLostError,
    DeviceMemoryError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
)
from jobdaemon.http import Answer
from jobdaemon.providers.comfyui.answers import (
    NODE_ERRORS,
    SUBMIT_ERRORS,
    Finished,
    ImageFile,
    Waiting,
    finished,
    queue_place,
    status_error,
    submit_error,
)
from jobdaemon.providers.wire import Kind

ERRORS = {Kind.PERMANENT: ProviderRefusedError, Kind.RETRY: ProviderUnavailableError}
NODE_ERROR = {"type": "value_not_in_list", "message": "Value not in list", "details": "ckpt_name: 'x' not in []"}


@pytest.mark.parametrize("code", SUBMIT_ERRORS)
def test_each_refusal_of_a_prompt_is_its_kind(code: str) -> None:
    """The table of refusals holds, and the error says what the server said."""
    error = submit_error(
        {"error": {"type": code, "message": "no good", "details": "here"}, "node_errors": {}}, "http://gpu/prompt"
    )
    assert type(error) is ERRORS[SUBMIT_ERRORS[code]]
    assert str(error) == "comfyui: http://gpu/prompt: no good (here)"


@pytest.mark.parametrize("code", NODE_ERRORS)
def test_each_refusal_of_a_node_is_its_kind(code: str) -> None:
    """What a node complains of decides, and the sentence names the node."""
    error = submit_error(_refusal({"type": code, "message": "no good", "details": ""}), "http://gpu/prompt")
    assert type(error) is ERRORS[NODE_ERRORS[code]]
    assert "node 4 (Loader): no good" in str(error)


def _refusal(*errors: dict[str, Any]) -> dict[str, Any]:
    error = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation", "details": ""}
    return {"error": error, "node_errors": {"4": {"errors": list(errors), "dependent_outputs": ["9"], "class_type": "Loader"}}}


def test_what_will_never_work_outweighs_what_may() -> None:
    """Two complaints of which one is for good are for good; an unknown one is for good too."""
    passing = {"type": "exception_during_validation", "message": "boom"}
    assert isinstance(submit_error(_refusal(passing, NODE_ERROR), "x"), ProviderRefusedError)
    assert isinstance(submit_error(_refusal({"type": "new_in_2030"}), "x"), ProviderRefusedError)
    assert isinstance(submit_error({"error": "plain text of an old version"}, "x"), ProviderRefusedError)


def test_an_accepted_prompt_with_a_bad_output_is_refused() -> None:
    """node_errors beside a prompt_id say that one output was dropped: not all images would come."""
    body = {"prompt_id": "x", "number": 1, "node_errors": _refusal(NODE_ERROR)["node_errors"]}
    assert isinstance(submit_error(body, "x"), ProviderRefusedError)
    assert submit_error({"prompt_id": "x", "number": 1, "node_errors": {}}, "x") is None


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, RateLimitedError),
        (500, ProviderUnavailableError),
        (502, ProviderUnavailableError),
        (401, ProviderUnavailableError),
        (403, ProviderUnavailableError),
        (302, ProviderUnavailableError),
        (404, ProviderUnavailableError),
        (405, ProviderUnavailableError),
        (422, ProviderUnavailableError),
        (400, ProviderRefusedError),
        (413, ProviderRefusedError),
    ],
)
def test_each_status_is_its_kind(status: int, error: type[Exception]) -> None:
    """A status alone: ComfyUI itself refuses with 400 and 413 only; any other is somebody else's who is in the way."""
    made = status_error(Answer(status, {"retry-after": "3"}, b"", "http://gpu/queue"))
    assert type(made) is error
    assert str(status) in str(made)


@pytest.mark.parametrize("status", [408, 504, 524])
def test_a_gateway_that_gave_up_does_not_know(status: int) -> None:
    """A prompt may be queued all the same: that is asked before it is sent elsewhere. Any other question is just asked again."""
    answer = Answer(status, {}, b"", "http://gpu/prompt")
    assert type(status_error(answer, is_submit=True)) is AnswerLostError
    assert type(status_error(answer)) is ProviderUnavailableError


@pytest.mark.parametrize(
    ("details", "error"),
    [
        ("image - Invalid image file: jobdaemon/0123.png", ProviderUnavailableError),
        ("image - Invalid image file: mask.png", ProviderRefusedError),
        (None, ProviderRefusedError),
    ],
)
def test_a_photo_that_is_gone_is_put_there_again(details: str | None, error: type[Exception]) -> None:
    """Somebody cleared the folder after the upload; a file that the workflow itself names does not come by trying again."""
    refused = {"type": "custom_validation_failed", "message": "Custom validation failed for node", "details": details}
    assert type(submit_error(_refusal(refused), "x")) is error


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"exception_type": "torch.OutOfMemoryError", "exception_message": "Allocation on device"}, DeviceMemoryError),
        ({"exception_type": "torch.cuda.OutOfMemoryError", "exception_message": "x"}, DeviceMemoryError),
        ({"exception_type": "MemoryError", "exception_message": ""}, DeviceMemoryError),
        ({"exception_type": "RuntimeError", "exception_message": "CUDA error: out of memory"}, DeviceMemoryError),
        ({"exception_type": "ValueError", "exception_message": "bad tensor"}, ProviderUnavailableError),
        ({}, ProviderUnavailableError),
    ],
)
def test_a_prompt_that_broke_may_work_next_time(facts: dict[str, Any], error: type[Exception]) -> None:
    """A memory error is told apart from the rest; both are retried."""
    details = {"node_id": "8", "node_type": "KSampler"} | facts
    end = finished(_entry("error", [["execution_start", {}], ["execution_error", details]]), "http://gpu")
    assert type(end.error) is error
    assert "node 8 (KSampler)" in str(end.error)


def _entry(status: str, messages: object, outputs: object = None) -> dict[str, Any]:
    nodes: dict[str, Any] = {"9": {}, "10": {}, "11": {}}
    return {
        "prompt": [3, "id", nodes, {}, ["9"]],
        "outputs": outputs or {},
        "status": {"status_str": status, "completed": status == "success", "messages": messages},
    }


def test_an_interrupted_prompt_is_tried_again() -> None:
    """Somebody pressed the button: that says nothing about the prompt."""
    end = finished(_entry("error", [["execution_interrupted", {"node_id": "8"}]]), "http://gpu")
    assert type(end.error) is ProviderUnavailableError
    assert "interrupted" in str(end.error)


@pytest.mark.parametrize("messages", [None, [], [["execution_error"]], [3], [[]], "x"])
def test_a_failure_without_a_reason_is_one_all_the_same(messages: object) -> None:
    """Whatever form the messages have, a prompt that failed has failed."""
    assert type(finished(_entry("error", messages), "http://gpu").error) is ProviderUnavailableError


def test_images_come_in_the_order_of_the_workflow() -> None:
    """Kept images by the workflow's nodes and each node's list; previews only when nothing is kept."""
    preview = {"images": [{"filename": "p.png", "subfolder": "", "type": "temp"}]}
    kept = {"images": [{"filename": f"{name}.png", "subfolder": "s", "type": "output", "new": 1} for name in "ab"]}
    late = {"images": [{"filename": "c.png"}]}
    end = finished(_entry("success", [], {"11": late, "10": kept, "9": preview, "12": {"text": ["x"]}}), "http://gpu")
    assert end == Finished(
        (ImageFile("a.png", "s", "output"), ImageFile("b.png", "s", "output"), ImageFile("c.png", "", "output")), None
    )
    assert finished(_entry("success", [], {"9": preview}), "x").images == (ImageFile("p.png", "", "temp"),)


@pytest.mark.parametrize("outputs", [[], {"9": 3}, {"9": {"images": "x"}}, {"9": {"images": [3, {"filename": 4}]}}])
def test_an_output_of_another_form_is_no_image(outputs: object) -> None:
    """What is not a list of files gives none; the stage then says which image is missing."""
    assert finished(_entry("success", [], outputs), "x").images == ()


def test_a_place_in_the_queue() -> None:
    """Running, pending, and neither; rows of another form are passed over."""
    queue = {"queue_running": [[1, "a", {}, {}, []]], "queue_pending": [3, [], [2, "b", {}, {}, []]]}
    assert queue_place(queue, "a") == Waiting(is_running=True)
    assert queue_place(queue, "b") == Waiting(is_running=False)
    assert queue_place(queue, "c") is None
    assert queue_place({"queue_running": None}, "a") is None
