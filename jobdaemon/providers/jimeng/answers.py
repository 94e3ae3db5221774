"""
What Jimeng answers, understood: errors, tasks, images. Pure.

Sources, read 2026-11-22. [D] the product's pages for image 4.0 (volcengine.com/docs/85621/1817045). [C] several public clients.
[G] the gateway's common error codes (volcengine.com/docs/6369/68677; docs.byteplus.com, common error codes). [S] the official
Python SDK 1.0.229.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from jobdaemon.errors import ProviderRefusedError, ProviderUnavailableError
from jobdaemon.http import Answer
from jobdaemon.ports import ImageMade
from jobdaemon.providers.inline import InlineImages
from jobdaemon.providers.jimeng.signature import KeyPair
from jobdaemon.providers.wire import Kind, error_of, kind_of_status
from jobdaemon.redact import MASK, redact

NAME = "jimeng"
#: What a ``code`` means; what is not here goes by the HTTP status.
KINDS: Mapping[int, Kind] = {
    # Content that will never pass: the photo, the prompt, what was made of it, somebody's copyright. [D]
    50411: Kind.PERMANENT,
    50412: Kind.PERMANENT,
    50413: Kind.PERMANENT,
    50512: Kind.PERMANENT,
    50518: Kind.PERMANENT,
    # The picture that came out did not pass; the next one may. [D]
    50511: Kind.RETRY,
    50519: Kind.RETRY,
    # The review itself failed. The page says not to ask again at once; a later attempt may.
    50520: Kind.RETRY,
    50521: Kind.RETRY,
    50522: Kind.RETRY,
    # Too many a second, too many at once. [D]
    50429: Kind.CAPACITY,
    50430: Kind.CAPACITY,
    # Trouble of its own; the pages of its products disagree on whether asking again helps.
    50500: Kind.RETRY,
    50501: Kind.RETRY,
    50215: Kind.PHOTO,  # [C] a parameter it does not take, the photo's link among them; on a poll: a task it does not know
    50400: Kind.KEY,  # [C] the product is not opened for this account, or the key has no rights
}
#: What the gateway in front means, by ``ResponseMetadata.Error.Code``; what is not here goes by the HTTP status. [G]
GATEWAY_KINDS: Mapping[str, Kind] = {
    "MissingAuthenticationToken": Kind.KEY,
    "MissingSignature": Kind.KEY,
    "InvalidAuthorization": Kind.KEY,
    "InvalidCredential": Kind.KEY,
    "InvalidAccessKey": Kind.KEY,
    "SignatureDoesNotMatch": Kind.KEY,
    "InvalidSecretToken": Kind.KEY,
    "LackPolicy": Kind.KEY,
    "AccessDenied": Kind.KEY,
    # This machine's clock; see _CLOCK
    "InvalidTimestamp": Kind.RETRY,
    "FlowLimitExceeded": Kind.CAPACITY,
    "MissingParameter": Kind.PERMANENT,
    "MissingRequestInfo": Kind.PERMANENT,
    "ServiceNotFound": Kind.PERMANENT,
    "InvalidActionOrVersion": Kind.PERMANENT,
    "InternalError": Kind.RETRY,
    "InternalServiceError": Kind.RETRY,
    "ServiceUnavailableTemp": Kind.RETRY,
    "InternalServiceTimeout": Kind.LOST,
}
#: In answer to a poll these say what became of the task, as every PERMANENT one does, and not that the question went wrong.
VERDICTS = frozenset({50511, 50519, 50520, 50521, 50522})
#: A poll is answered so when its task is not known any more. [C]
_STALE_TASK = 50215
_SUCCESS = 10000
_CLOCK = "InvalidTimestamp"
#: The gateway allows some minutes; a clock this far off explains any signature that does not match.
_CLOCK_TOLERANCE = timedelta(minutes=5)
_REQUEST_ID = re.compile(r"[\w.:-]{1,80}")


@dataclass(frozen=True, slots=True)
class Told:
    """
    An answer, understood.

    Attributes:
        code: the service's own; None when something in front of it answered.
        data: of a good answer; empty where it has none.
        error: what another one means.
        drift: by how much the service's clock is ahead of the time that the request was signed with, where that was refused.
    """

    code: int | None
    data: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    drift: timedelta | None = None

    @property
    def is_verdict(self) -> bool:
        """Whether, in answer to a poll, the error is what became of the task."""
        return self.code is not None and (self.code in VERDICTS or isinstance(self.error, ProviderRefusedError))

    @property
    def end(self) -> TaskEnd:
        """What became of the task, by such an error."""
        if self.code == _STALE_TASK:
            # What was asked passed when it was submitted, so this is about the task, and a new one may do.
            return TaskEnd(error=ProviderUnavailableError(str(self.error)))
        return TaskEnd(error=self.error)


def told_in(answer: Answer, *, is_submit: bool, pair: KeyPair, now: datetime) -> Told:
    """
    What an answer says; never raises.

    Args:
        is_submit: whether it answers a request that costs money: then what cannot be read is lost.
        pair: signed the request; kept out of errors.
        now: what the request was signed with, aware.
    """
    try:
        body = answer.json()
    except ProviderUnavailableError as error:
        return Told(None, error=_error(_unread(answer, is_submit=is_submit), answer, "", str(error), pair))
    body = body if isinstance(body, dict) else {}
    metadata = body.get("ResponseMetadata")
    if isinstance(metadata, dict) and isinstance(told := metadata.get("Error"), dict):
        drift = _drift(answer, now)
        if _is_the_clock(told, answer, drift, is_submit=is_submit):
            return Told(None, error=_clock_error(drift), drift=drift)
        return Told(None, error=_gateway_error(told, answer, metadata, is_submit=is_submit, pair=pair))
    code = _whole(body.get("code"))
    asked = body.get("request_id")
    if code is None:
        return Told(None, error=_error(_unread(answer, is_submit=is_submit), answer, asked, "an answer without a code", pair))
    if code != _SUCCESS:
        kind = KINDS.get(code, kind_of_status(answer.status, is_submit=is_submit))
        return Told(code, error=_error(kind, answer, asked, f"{body.get('message') or 'no reason given'} [{code}]", pair))
    data = body.get("data")
    return Told(code, data if isinstance(data, dict) else {})


def _unread(answer: Answer, *, is_submit: bool) -> Kind:
    if answer.status // 100 == 2:
        return Kind.LOST if is_submit else Kind.RETRY
    return kind_of_status(answer.status, is_submit=is_submit)


def _gateway_kind(told: Mapping[str, Any], answer: Answer, *, is_submit: bool) -> Kind:
    return GATEWAY_KINDS.get(str(told.get("Code") or ""), kind_of_status(answer.status, is_submit=is_submit))


def _is_the_clock(told: Mapping[str, Any], answer: Answer, drift: timedelta | None, *, is_submit: bool) -> bool:
    """Whether the gateway refused the time that the request was signed with, whatever it calls that."""
    if told.get("Code") == _CLOCK:
        return True
    is_key = _gateway_kind(told, answer, is_submit=is_submit) is Kind.KEY
    return is_key and drift is not None and abs(drift) > _CLOCK_TOLERANCE


def _clock_error(drift: timedelta | None) -> Exception:
    if drift is None:
        return ProviderUnavailableError(
            f"{NAME}: the clock of this machine is off, and the service accepts no request until it is right"
        )
    by = round(abs(drift).total_seconds() / 60)
    return ProviderUnavailableError(
        f"{NAME}: the clock of this machine is off by about {by} min: set it right; until then the service's is used"
    )


def _gateway_error(
    told: Mapping[str, Any], answer: Answer, metadata: Mapping[str, Any], *, is_submit: bool, pair: KeyPair
) -> Exception:
    kind = _gateway_kind(told, answer, is_submit=is_submit)
    if kind is Kind.LOST and not is_submit:
        kind = Kind.RETRY
    code = str(told.get("Code") or "")
    return _error(kind, answer, metadata.get("RequestId"), f"{told.get('Message') or 'no reason given'} [{code[:60]}]", pair)


def _drift(answer: Answer, now: datetime) -> timedelta | None:
    """How far ahead of *now* the clock is that answered."""
    try:
        there = parsedate_to_datetime(answer.headers.get("date", ""))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return (there if there.tzinfo else there.replace(tzinfo=UTC)) - now


def _error(kind: Kind, answer: Answer, asked: object, message: str, pair: KeyPair) -> Exception:
    """
    Args:
        asked: the request's id, if it looks like one.
    """
    for secret in filter(None, (pair.secret_access_key, pair.session_token, pair.access_key_id)):
        message = message.replace(secret, MASK)
    request = f", request {asked}" if isinstance(asked, str) and _REQUEST_ID.fullmatch(asked) else ""
    return error_of(kind, f"{NAME} ({answer.status}{request})", redact(message), retry_after=answer.retry_after)


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:18])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True, slots=True)
class FoundImage:
    """One result, as a link or as base64."""

    url: str | None = None
    inline: str | None = None

    def event(self, index: int, images: InlineImages, expires_at: datetime) -> ImageMade:
        """
        Args:
            images: of the same answer.

        Raises:
            ProviderUnavailableError: the bytes are no image.
        """
        if self.url is not None:
            return ImageMade(index, url=self.url, url_expires_at=expires_at)
        content, media_type = images.decoded(self.inline or "")
        return ImageMade(index, content=content, media_type=media_type)


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """What became of a task: images, or why there are none."""

    images: Sequence[FoundImage] = ()
    error: Exception | None = None


def end_in(data: Mapping[str, Any]) -> TaskEnd | None:
    """
    What *data* of a good answer to a poll says; None while the task is under way.

    Raises:
        ProviderUnavailableError: nothing that can be understood.
    """
    status = data.get("status")
    if not isinstance(status, str) or not status:
        raise ProviderUnavailableError(f"{NAME} told nothing about the task")
    if status in ("not_found", "expired"):
        return TaskEnd(error=ProviderUnavailableError(f"{NAME} does not know the task any more ({status})"))
    if status != "done":
        return None
    # With return_url, too, some models send base64 and null for the links.
    links = [FoundImage(url=link) for link in _texts(data.get("image_urls")) if link.startswith(("https://", "http://"))]
    images = links or [FoundImage(inline=text) for text in _texts(data.get("binary_data_base64"))]
    if not images:
        return TaskEnd(error=ProviderUnavailableError(f"{NAME} finished the task without any image"))
    return TaskEnd(images)


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list) else []
