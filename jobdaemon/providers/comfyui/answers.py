"""What a ComfyUI server's answers mean. Pure: parsed JSON in, values and errors out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobdaemon.errors import DeviceMemoryError, ProviderUnavailableError
from jobdaemon.http import Answer
from jobdaemon.providers.wire import Kind, error_of, kind_of_status

NAME = "comfyui"

#: ``error.type`` of an answer to POST /prompt (server.py and execution.py of ComfyUI, read 2026).
SUBMIT_ERRORS: Mapping[str, Kind] = {
    "no_prompt": Kind.PERMANENT,
    "invalid_prompt": Kind.PERMANENT,  # versions before missing_node_type
    "invalid_prompt_id": Kind.PERMANENT,
    "missing_node_type": Kind.PERMANENT,  # a custom node is not installed there
    "prompt_no_outputs": Kind.PERMANENT,
    "prompt_outputs_failed_validation": Kind.PERMANENT,
}
#: ``node_errors.*.errors[].type`` (execution.py, validate_inputs).
NODE_ERRORS: Mapping[str, Kind] = {
    "required_input_missing": Kind.PERMANENT,
    "bad_linked_input": Kind.PERMANENT,
    "return_type_mismatch": Kind.PERMANENT,
    "invalid_input_type": Kind.PERMANENT,
    "value_smaller_than_min": Kind.PERMANENT,
    "value_bigger_than_max": Kind.PERMANENT,
    "value_not_in_list": Kind.PERMANENT,  # a model file is not there
    "custom_validation_failed": Kind.PERMANENT,  # but see _kind_of
    "dependency_cycle": Kind.PERMANENT,
    "exception_during_validation": Kind.RETRY,  # a node broke down, over a file for instance
    "exception_during_inner_validation": Kind.RETRY,
}
#: Statuses with which a server refuses what it was sent (/prompt, /upload/image and /view: server.py, read 2026). Any other from
#: 400 to 499, but for /view's own 404, is a proxy's, or of something else that has taken its port.
_REFUSALS = (400, 413)
#: Where photos are put, below the server's folder for inputs.
UPLOAD_FOLDER = "jobdaemon"
#: How the memory errors of torch, HIP and Python end (model_management.py, OOM_EXCEPTION).
_MEMORY_ERRORS = ("OutOfMemoryError", "MemoryError")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image as /view is asked for it."""

    filename: str
    subfolder: str
    kind: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """The prompt is in the queue."""

    is_running: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """
    The prompt is over.

    Attributes:
        images: what it made, in the order in which it made it.
        error: why it made no more.
    """

    images: tuple[ImageFile, ...]
    error: Exception | None


def status_error(answer: Answer, *, is_submit: bool = False) -> Exception:
    """
    What an answer other than 200 means; these servers have no keys, so a proxy that asks for one is in the way.

    Args:
        is_submit: whether a prompt was sent: a gateway that gave up waiting does not know whether it is queued.
    """
    kind = kind_of_status(answer.status, is_submit=is_submit)
    if kind in (Kind.KEY, Kind.MONEY) or (kind is Kind.PERMANENT and answer.status not in _REFUSALS):
        kind = Kind.RETRY
    return error_of(kind, NAME, f"{answer.shown} answered with status {answer.status}", retry_after=answer.retry_after)


def submit_error(body: Mapping[str, Any], shown: str) -> Exception | None:
    """What the body of an answer to POST /prompt complains of, if anything; with 200 too, when only one output was valid."""
    error, found = body.get("error"), list(_node_errors(body.get("node_errors")))
    if not error and not found:
        return None
    # Versions differ: an object, and a plain text in the oldest.
    facts = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else "the workflow is not valid"}
    words = [_words(facts), *(f"node {number} ({class_type}): {_words(details)}" for number, class_type, details in found[:3])]
    kinds = {_kind_of(details) for _, _, details in found}
    if not kinds:
        kinds = {SUBMIT_ERRORS.get(str(facts.get("type")), Kind.PERMANENT)}
    return error_of(Kind.PERMANENT if Kind.PERMANENT in kinds else Kind.RETRY, NAME, f"{shown}: {'; '.join(words)}")


def _node_errors(value: object) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for number, node in value.items() if isinstance(value, dict) else ():
        errors = node.get("errors") if isinstance(node, dict) else None
        for details in errors if isinstance(errors, list) else ():
            if isinstance(details, dict):
                yield str(number), str(node.get("class_type", "?")), details


def _kind_of(details: Mapping[str, Any]) -> Kind:
    """What a node's complaint means. A photo that was put there a moment ago, and is gone, is put there again next time."""
    code, told = str(details.get("type")), str(details.get("details"))
    if code == "custom_validation_failed" and f"Invalid image file: {UPLOAD_FOLDER}/" in told:
        return Kind.RETRY
    return NODE_ERRORS.get(code, Kind.PERMANENT)


def _words(facts: Mapping[str, Any]) -> str:
    message, details = str(facts.get("message") or facts.get("type") or "no reason given"), str(facts.get("details") or "")
    return f"{message} ({details})" if details else message


def queue_place(queue: Mapping[str, Any], prompt_id: str) -> Waiting | None:
    """Where a prompt stands in the answer of GET /queue, if it does."""
    for name in ("queue_running", "queue_pending"):
        items = queue.get(name)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, list) and len(item) > 1 and item[1] == prompt_id:
                return Waiting(is_running=name == "queue_running")
    return None


def finished(entry: Mapping[str, Any], shown: str) -> Finished:
    """What a prompt's entry in /history says."""
    status = entry.get("status")
    status = status if isinstance(status, dict) else {}
    error = None if status.get("status_str", "success") == "success" else _execution_error(status.get("messages"), shown)
    return Finished(tuple(_images(entry)), error)


def _execution_error(messages: object, shown: str) -> Exception:
    for message in messages if isinstance(messages, list) else ():
        match message:
            case ["execution_interrupted", *_]:
                return ProviderUnavailableError(f"{NAME}: {shown}: somebody interrupted the prompt")
            case ["execution_error", dict(facts)]:
                words = f"{shown}: node {facts.get('node_id', '?')} ({facts.get('node_type', '?')}): "
                words += str(facts.get("exception_message") or facts.get("exception_type") or "no reason given")
                error = error_of(Kind.RETRY, NAME, words)
                return DeviceMemoryError(str(error)) if _is_memory_error(facts) else error
    return ProviderUnavailableError(f"{NAME}: {shown}: the prompt failed without a reason")


def _is_memory_error(facts: Mapping[str, Any]) -> bool:
    kind, message = str(facts.get("exception_type", "")), str(facts.get("exception_message", "")).lower()
    return kind.endswith(_MEMORY_ERRORS) or "out of memory" in message


def _images(entry: Mapping[str, Any]) -> list[ImageFile]:
    """The images of the output nodes: those that are kept, else previews; node by node as the workflow lists them."""
    outputs = entry.get("outputs")
    outputs = outputs if isinstance(outputs, dict) else {}
    order = {number: place for place, number in enumerate(_workflow(entry))}
    found: list[ImageFile] = []
    for number in sorted(outputs, key=lambda number: order.get(number, len(order))):
        images = outputs[number].get("images") if isinstance(outputs[number], dict) else None
        found.extend(
            ImageFile(image["filename"], str(image.get("subfolder") or ""), str(image.get("type") or "output"))
            for image in (images if isinstance(images, list) else ())
            if isinstance(image, dict) and isinstance(image.get("filename"), str)
        )
    return [image for image in found if image.kind == "output"] or found


def _workflow(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The nodes of ``[number, prompt_id, nodes, …]``."""
    prompt = entry.get("prompt")
    nodes = prompt[2] if isinstance(prompt, list) and len(prompt) > 2 else {}
    return nodes if isinstance(nodes, dict) else {}
