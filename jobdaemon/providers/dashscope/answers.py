"""
What DashScope's answers say: bodies, errors, finished tasks and their images.

An error is ``{"code", "message", "request_id"}`` with a status of 4xx or 5xx; the compatible mode puts code and message under
``error``. What became of a task is always a 200: code and message then stand in ``output``, or in the entry of one image.

Source: Model Studio's error code page and the references of the tasks API, read 2026-11; the aliases are the compatible mode's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jobdaemon.errors import ProviderUnavailableError
from jobdaemon.http import Answer
from jobdaemon.ports import Charged, ImageMade, ImageRefused
from jobdaemon.providers.wire import Kind, error_of, kind_of_status
from jobdaemon.redact import MASK, redact

NAME = "dashscope"

#: Code, in lower case -> what it means. ``InvalidParameter.Size`` goes with ``InvalidParameter``; what is not here by its status.
KINDS: Mapping[str, Kind] = {
    # the request
    "invalidparameter": Kind.PERMANENT,
    "invalid_parameter": Kind.PERMANENT,
    "invalidurl": Kind.PHOTO,
    "invalidparameter.filedownload": Kind.PHOTO,
    "badrequest": Kind.PERMANENT,
    "unsupportedoperation": Kind.PERMANENT,
    "modelnotfound": Kind.PERMANENT,
    "model_not_found": Kind.PERMANENT,
    "workspacenotfound": Kind.PERMANENT,
    "notfound": Kind.PERMANENT,
    # moderation of prompt, photo or image
    "datainspectionfailed": Kind.PERMANENT,
    "data_inspection_failed": Kind.PERMANENT,
    # moderation could not fetch the photo in time
    "invalidparameter.datainspection": Kind.RETRY,
    # the key
    "invalidapikey": Kind.KEY,
    "invalid_api_key": Kind.KEY,
    "accessdenied": Kind.KEY,
    "access_denied": Kind.KEY,
    "model.accessdenied": Kind.KEY,
    "workspace.accessdenied": Kind.KEY,
    # its account
    "arrearage": Kind.MONEY,
    "allocationquota.freetieronly": Kind.MONEY,
    "commoditynotpurchased": Kind.MONEY,
    "prepaidbilloverdue": Kind.MONEY,
    "postpaidbilloverdue": Kind.MONEY,
    # how much at once
    "throttling": Kind.CAPACITY,  # .RateQuota, .BurstRate, .AllocationQuota, …
    "limitrequests": Kind.CAPACITY,
    "limit_requests": Kind.CAPACITY,
    "limit_burst_rate": Kind.CAPACITY,
    "insufficient_quota": Kind.CAPACITY,
    "modelservingerror": Kind.CAPACITY,
    "modelunavailable": Kind.CAPACITY,
    # their trouble
    "internalerror": Kind.RETRY,  # .Algo, .Timeout, .Upload
    "internal_error": Kind.RETRY,
    "systemerror": Kind.RETRY,
    "modelservicefailed": Kind.RETRY,
    "requesttimeout": Kind.RETRY,
    "rewritefailed": Kind.RETRY,
}
#: What messages say that their codes do not; parts of messages, in lower case.
_MESSAGES: Sequence[tuple[str, str, Kind]] = (
    ("throttling.allocationquota", "free allocated quota exceeded", Kind.MONEY),
    ("insufficient_quota", "free allocated quota exceeded", Kind.MONEY),
    # synchronous or asynchronous: the model's endpoint, not the key
    ("accessdenied", "synchronous calls", Kind.PERMANENT),
)
#: Task states after which nothing more comes.
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "UNKNOWN"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,80}")
#: Some models' examples show links without TLS, which nobody fetches here; the object store serves both, and signs neither.
_PLAIN_OSS = re.compile(r"\Ahttp://([\w.-]+\.aliyuncs\.com/)")
_MAX_URL_CHARACTERS = 8_192
_MAX_TASK_ID_CHARACTERS = 200
#: No call makes more; a larger count is none.
_MOST_IMAGES = 1_000


def kind_of(code: str, message: str, status: int | None, *, is_submit: bool = False) -> Kind:
    """
    What an error means.

    Args:
        code: empty when there is none.
        status: of the answer; None when the code stands in a task.
    """
    name, words = code.lower(), message.lower()
    for named, part, kind in _MESSAGES:
        if name == named and part in words:
            return kind
    while name:
        if name in KINDS:
            return KINDS[name]
        name = name.rpartition(".")[0]
    return Kind.RETRY if status is None else kind_of_status(status, is_submit=is_submit)


def read(answer: Answer, *, secret: str, is_submit: bool = False) -> Mapping[str, Any]:
    """
    The body of a good answer.

    Args:
        secret: the key, kept out of errors.
        is_submit: whether the request may have cost money.

    Raises:
        AnswerLostError: the service took a submit, and what it said cannot be read.
        What the error means that it holds.
    """
    try:
        body = answer.json()
    except ProviderUnavailableError as error:
        raise _error(_unreadable(answer.status, is_submit=is_submit), answer, {}, str(error), secret) from None
    if not isinstance(body, dict):
        raise _error(_unreadable(answer.status, is_submit=is_submit), answer, {}, "an answer that is no object", secret)
    code, message = _told(body)
    if answer.status // 100 == 2 and not code:
        return body
    kind = kind_of(code, message, answer.status, is_submit=is_submit)
    raise _error(kind, answer, body, f"{code}: {message}" if code else message or "no reason given", secret)


def unreadable(answer: Answer, what: str, *, secret: str) -> Exception:
    """The error of a submit's good answer in which *what* is missing."""
    return _error(Kind.LOST, answer, {}, f"an answer without {what}", secret)


def _unreadable(status: int, *, is_submit: bool) -> Kind:
    if status // 100 == 2:
        return Kind.LOST if is_submit else Kind.RETRY
    return kind_of_status(status, is_submit=is_submit)


def _told(body: Mapping[str, Any]) -> tuple[str, str]:
    """Code and message of an error, each empty when there is none."""
    within = body.get("error")
    told = within if isinstance(within, dict) else body
    return _text(told, "code"), _text(told, "message")


def _text(told: Mapping[str, Any], name: str) -> str:
    value = told.get(name)
    return value if isinstance(value, str) else ""


def _error(kind: Kind, answer: Answer, body: Mapping[str, Any], words: str, secret: str) -> Exception:
    request_id = _text(body, "request_id")
    asked = f", request {request_id}" if _REQUEST_ID.fullmatch(request_id) else ""
    shown = _shown(words, secret)
    return error_of(kind, f"{NAME} ({answer.status}{asked})", shown, retry_after=answer.retry_after)


def _shown(words: str, secret: str) -> str:
    """Their words without keys and without the queries of links, which they repeat."""
    return redact(words.replace(secret, MASK) if secret else words)


# Tasks


def task_id_of(body: Mapping[str, Any]) -> str | None:
    """The id of the task that a submit made, if it says so."""
    output = body.get("output")
    task_id = output.get("task_id") if isinstance(output, dict) else None
    return task_id if isinstance(task_id, str) and 0 < len(task_id) <= _MAX_TASK_ID_CHARACTERS else None


def output_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """``output``, empty when there is none."""
    output = body.get("output")
    return output if isinstance(output, dict) else {}


def charged_in(body: Mapping[str, Any], made: int) -> Charged:
    """
    What an answer says of what it costs; only images that were made are charged for.

    Args:
        made: how many it holds, in case it does not say.
    """
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) and usage else None
    count = None if usage is None else usage.get("image_count")
    is_count = isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= _MOST_IMAGES
    return Charged(count if is_count and count is not None else made, usage)


def prompts_of(output: Mapping[str, Any]) -> set[str]:
    """The prompts, word for word, that a finished task says it was made of; empty when it says nothing."""
    return {prompt for entry in list_of(output, "results") if isinstance(entry, dict) and (prompt := _text(entry, "orig_prompt"))}


def failure_of(task_id: str, output: Mapping[str, Any], *, secret: str) -> Exception:
    """Why a task gave nothing that ended otherwise than well."""
    status = _text(output, "task_status")
    if status == "UNKNOWN":
        return error_of(Kind.RETRY, NAME, f"task {task_id} is unknown: it is older than a day, or another account's")
    code, message = _told(output)
    if status == "CANCELED" and not code:
        return error_of(Kind.RETRY, NAME, f"task {task_id} was cancelled")
    words = _shown(f"{code}: {message}" if code else message or "no reason given", secret)
    return error_of(kind_of(code, message, None), NAME, f"task {task_id} failed: {words}")


def images_of(
    output: Mapping[str, Any], indexes: Sequence[int], expires_at: datetime, *, secret: str
) -> Iterator[ImageMade | ImageRefused]:
    """
    What became of the images asked for, in the order in which they were asked for.

    One that failed for a reason that may pass is left out, so that it is asked for again; entries beyond *indexes* are nobody's.
    """
    for index, entry in zip(indexes, _entries(output), strict=False):
        code, message = _told(entry)
        url = _text(entry, "url")
        if url.startswith(("https://", "http://")) and len(url) <= _MAX_URL_CHARACTERS:
            yield ImageMade(index, url=_PLAIN_OSS.sub(r"https://\1", url), url_expires_at=expires_at)
        elif code and kind_of(code, message, None) in (Kind.PERMANENT, Kind.PHOTO):
            yield ImageRefused(index, str(error_of(Kind.PERMANENT, NAME, _shown(f"{code}: {message}", secret))))


def _entries(output: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One for each image of either form of result: ``{"url"}`` or ``{"code", "message"}``."""
    for entry in list_of(output, "results"):
        yield entry if isinstance(entry, dict) else {}
    for choice in list_of(output, "choices"):
        message = choice.get("message") if isinstance(choice, dict) else None
        for part in list_of(message, "content") if isinstance(message, dict) else ():
            # Text stands between images where the model was told to write, and is no image.
            if isinstance(part, dict) and "image" in part:
                yield {"url": part["image"]}


def list_of(told: Mapping[str, Any], name: str) -> Sequence[Any]:
    """The list called *name*, empty when there is none."""
    value = told.get(name)
    return value if isinstance(value, list) else ()
