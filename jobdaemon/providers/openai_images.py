"""
OpenAI's image API, and the gateways that speak it: one call makes a batch of images, and answers when they are made.

There is no task to ask for, and no id that the caller may choose: the whole call is the window in which an answer can be lost,
and what happened to such a call can be asked of nobody.

Sources, read 2026-11-22. [O] the official Python SDK 3.54.0 and OpenAI's OpenAPI description 2.3.0. [G] QuantumNous/new-api, the
software that many gateways run: types/error.go, service/billing_session.go, dto/openai_image.go. [C] seen in public client code.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from jobdaemon.domain.artifact import EXTENSIONS
from jobdaemon.errors import KeyMissingError, ProviderUnavailableError, SettingsError, StoreRefusedError, StoreUnavailableError
from jobdaemon.http import MAX_RETRY_AFTER, Answer, GuardedClient
from jobdaemon.ports import (
    CallDone,
    Charged,
    GenerateRequest,
    ImageMade,
    OnUnknownSubmit,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskOver,
)
from jobdaemon.providers import openai_chat as chat
from jobdaemon.providers.inline import InlineImages
from jobdaemon.providers.photo_fit import PhotoBounds, PhotoFitter
from jobdaemon.providers.wire import Kind, error_of, kind_of_status
from jobdaemon.redact import MASK, redact
from jobdaemon.settings_generate import OpenAIImagesSettings
from jobdaemon.spool import Spool

#: What an ``error.code``, or else an ``error.type``, means; what is not here goes by :data:`_UNSAFE`, then by the HTTP status.
KINDS: Mapping[str, Kind] = {
    # The account has no money left, though the status is often that of a rate limit. [O] codes of the SDK's error types
    "insufficient_quota": Kind.MONEY,
    "billing_hard_limit_reached": Kind.MONEY,  # [C] 400 from the image endpoints
    "billing_not_active": Kind.MONEY,
    "credit_balance_exhausted": Kind.MONEY,
    "project_spend_limit_exceeded": Kind.MONEY,
    "organization_spend_limit_exceeded": Kind.MONEY,
    "organization_usage_limit_exceeded": Kind.MONEY,
    "insufficient_user_quota": Kind.MONEY,  # [G] 403
    "pre_consume_token_quota_failed": Kind.MONEY,  # [G] 403: this key's own budget
    # The key. [O]
    "invalid_api_key": Kind.KEY,
    "authentication_error": Kind.KEY,
    "account_deactivated": Kind.KEY,  # [C]
    "access_denied": Kind.KEY,  # [G]
    # Too much at once.
    "rate_limit_exceeded": Kind.CAPACITY,  # [O]
    "server_overloaded": Kind.CAPACITY,  # [O]
    "token_concurrency_limit_reached": Kind.CAPACITY,  # [G]
    # Never.
    "model_not_found": Kind.PERMANENT,  # [O] 404, [G] too; see _NO_CHANNEL
    "invalid_request": Kind.PERMANENT,  # [G]
    "image_generation_user_error": Kind.PERMANENT,  # [C] the type of moderation_blocked, and of images it cannot read
    "prompt_blocked": Kind.PERMANENT,  # [G]
    # The gateway's own trouble with whoever makes the images; it charges nothing for an error. [G]
    "channel:no_available_key": Kind.RETRY,
    "channel:response_time_exceeded": Kind.RETRY,
    "do_request_failed": Kind.RETRY,
    "get_channel_failed": Kind.RETRY,
    # Whoever gave up waiting knows nothing of what became of the call. [O]
    "request_timeout": Kind.LOST,
}
#: The spelling of moderation codes differs (moderation_blocked, content_policy_violation, sensitive_words_detected, …).
_UNSAFE = re.compile(r"moderation|content_policy|content_filter|safety|sensitive|unsafe", re.IGNORECASE)
#: A gateway without a channel for the model now: its channels come back. [G] middleware/distributor.go
_NO_CHANNEL = ("model_not_found", 503)
#: OpenAI's own links are good for an hour. [O] Of gateways nothing is known.
_LINK_LIFETIME = timedelta(minutes=60)
#: Models that refuse n > 1. [O]
_ONE_AT_A_TIME = frozenset({"dall-e-3"})
#: Models that know no array of images. [O]
_ONE_PHOTO = frozenset({"dall-e-2"})
#: Under 50 MB, png, webp or jpg. [O] Sides have no bound there.
PHOTO_BOUNDS = PhotoBounds(max_bytes=50_000_000 - 1)
#: One square PNG under 4 MB. [O] It makes no larger image than 1024 pixels a side.
_DALL_E_2_BOUNDS = PhotoBounds(max_bytes=4_000_000 - 1, longest_side=1024, media_types=("image/png",), is_square=True)
_REQUEST_ID = re.compile(r"[\w.:-]{1,80}")


class OpenAIImagesProvider:
    """Implements :class:`jobdaemon.ports.Provider`."""

    name = "openai_images"
    is_paid = True

    def __init__(
        self,
        settings: OpenAIImagesSettings,
        *,
        keys: Mapping[str, str],
        client: GuardedClient,
        max_image_bytes: int,
        spool: Callable[[], Spool] = Spool,
    ) -> None:
        """
        Args:
            keys: alias -> secret; the first one serves requests that name none.
            client: shared, and left open.
            max_image_bytes: of one image; an answer that holds more is given up.
            spool: makes an empty one, for an image that comes inline.

        Raises:
            SettingsError: no key, or one that no header can carry.
        """
        if not keys:
            raise SettingsError("generate.openai_images.api_key must be set")
        for alias, key in keys.items():
            if not re.fullmatch(r"[!-~]+", key):
                raise SettingsError(f"generate.openai_images: the key {alias} has characters that no key has")
        is_single = settings.model in _ONE_AT_A_TIME or settings.api == "chat"
        self.max_images_per_call = 1 if is_single else settings.images_per_call
        self.on_unknown_submit: OnUnknownSubmit = settings.on_unknown_submit
        self._settings = settings
        self._keys = dict(keys)
        self._client = client
        self._max_image_bytes = max_image_bytes
        self._spool = spool
        self._photos = PhotoFitter(self.name, _DALL_E_2_BOUNDS if settings.model in _ONE_PHOTO else PHOTO_BOUNDS)
        host = urlsplit(settings.base_url).hostname or ""
        self._link_lifetime = _LINK_LIFETIME if f".{host}".endswith(".openai.com") else None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[ProviderEvent, None]:
        """
        Buy the images of *request*; a model that makes fewer than were asked for is asked for the rest, as long as it makes some.

        Raises:
            What the port says; a call to resume is over, since this API has no tasks.
        """
        if request.resume is not None:
            yield TaskOver()
            raise ProviderUnavailableError(f"{self.name} keeps no tasks: an answer that is gone cannot be had again")
        key = self._key(request.key)
        photo = await self._photo(request) if self._settings.endpoint == "edits" else None
        waiting = [index for index, _ in request.images]
        while waiting:
            yield Submitting()
            asked_at = datetime.now(UTC)
            count = min(len(waiting), self.max_images_per_call)
            inline = InlineImages(self._spool, most=count, max_bytes=self._max_image_bytes, provider=self.name)
            try:
                answer = await self._submit(request, photo, count, key, inline)
            except (StoreUnavailableError, StoreRefusedError):
                # Images came, and have no place here: they are paid for all the same.
                yield Charged(count, None)
                raise
            answer = replace(answer, content=answer.content or inline.rest())
            found = images_in(answer, secret=key)
            if len(found) >= len(waiting):
                yield CallDone()
            yield Charged(len(found), usage_in(answer))
            expires_at = None if self._link_lifetime is None else asked_at + self._link_lifetime
            broken: ProviderUnavailableError | None = None
            for index, image in zip(tuple(waiting), found, strict=False):
                try:
                    made = image.event(index, inline, expires_at)
                except ProviderUnavailableError as error:
                    broken = error
                    continue
                waiting.remove(index)
                yield made
            if broken is not None:
                # Bought, and of no use: its siblings are out, and only a later attempt may buy it again.
                raise broken

    async def find_task(self, request: GenerateRequest, call: ProviderCall) -> str | None:  # noqa: ARG002 - nobody can be asked
        return None

    async def cancel(self, call: ProviderCall) -> bool:  # noqa: ARG002 - a call ends with its connection
        return False

    async def close(self) -> None:
        """Nothing of its own to free."""

    def _key(self, alias: str | None) -> str:
        if alias is None:
            return next(iter(self._keys.values()))
        if alias not in self._keys:
            raise KeyMissingError(f"this daemon does not have the key {alias} of {self.name}")
        return self._keys[alias]

    async def _photo(self, request: GenerateRequest) -> tuple[bytes, str]:
        """The photo's bytes and their media type."""
        fitted = await self._photos.fit(request.photo, request.load_photo)
        return await fitted.load(), fitted.artifact.media_type

    async def _submit(
        self, request: GenerateRequest, photo: tuple[bytes, str] | None, count: int, key: str, inline: InlineImages
    ) -> Answer:
        settings = self._settings
        if settings.api == "chat":
            return await self._chat(request.prompt, photo, key, inline)
        fields: dict[str, Any] = {"model": settings.model, "prompt": request.prompt, "n": count}
        chosen = {"size": settings.size, "quality": settings.quality, "response_format": settings.response_format}
        fields |= {name: value for name, value in chosen.items() if value is not None}
        url = f"{settings.base_url}/images/{settings.endpoint}"
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        max_bytes = inline.max_answer_bytes
        if photo is None:
            return await self._client.call(
                "POST", url, headers=headers, payload=fields, max_bytes=max_bytes, timeout=settings.timeout, into=inline
            )
        # One photo as an array of one: gateways that take several expect this field, and those that take one know it too.
        field = "image" if settings.model in _ONE_PHOTO else "image[]"
        content, media_type = photo
        name = f"order-{request.order_id}.{EXTENSIONS.get(media_type, 'bin')}"
        return await self._client.call(
            "POST",
            url,
            headers=headers,
            data={name: str(value) for name, value in fields.items()},
            files=[(field, (name, content, media_type))],
            max_bytes=max_bytes,
            timeout=settings.timeout,
            into=inline,
        )

    async def _chat(self, prompt: str, photo: tuple[bytes, str] | None, key: str, inline: InlineImages) -> Answer:
        settings = self._settings
        payload = await asyncio.to_thread(chat.request_body, settings.model, prompt, photo)
        return await self._client.call(
            "POST",
            f"{settings.base_url}/chat/completions",
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            payload=payload,
            # The photo may come back beside the image.
            max_bytes=2 * inline.max_answer_bytes,
            timeout=settings.timeout,
        )


@dataclass(frozen=True, slots=True)
class FoundImage:
    """
    One item of an answer that holds an image, in one of the forms in use.

    Attributes:
        inline: base64, bare or as a ``data:`` URL, or what stands for it in the rest of an answer.
        url: where it can be fetched.
    """

    inline: str | None
    url: str | None

    def event(self, index: int, images: InlineImages, expires_at: datetime | None) -> ImageMade:
        """
        Args:
            images: of the same answer.

        Raises:
            ProviderUnavailableError: the bytes are no image, and there is no link.
        """
        if self.inline is not None:
            try:
                content, media_type = images.decoded(self.inline)
            except ProviderUnavailableError:
                if self.url is None:
                    raise
            else:
                return ImageMade(index, content=content, media_type=media_type)
        return ImageMade(index, url=self.url, url_expires_at=expires_at)


def images_in(answer: Answer, *, secret: str) -> Sequence[FoundImage]:
    """
    The images of an answer, at least one; there may be more or fewer than were asked for.

    Args:
        secret: the key of the call, kept out of errors: some gateways repeat it.

    Raises:
        AnswerLostError: it cannot be read, though the service took the call.
        ProviderRefusedError: a good answer without any image: what a gateway makes of a model's refusal.
        What the error means that it holds.
    """
    try:
        body = answer.json()
    except ProviderUnavailableError as error:
        kind = Kind.LOST if answer.status // 100 == 2 else kind_of_error(answer.status, "", "", _should_retry(answer))
        raise _error(kind, answer, str(error), secret) from None
    told = body if isinstance(body, dict) else {}
    if answer.status // 100 != 2 or told.get("error"):
        raise _told_error(answer, told, secret)
    if "choices" in told:
        found, words = chat.images_and_words(told)
        if not found:
            raise _error(Kind.PERMANENT, answer, f"an answer without any image: {words or 'no words either'}", secret)
        return [
            FoundImage(link if link.startswith("data:") else None, None if link.startswith("data:") else link) for link in found
        ]
    items = told.get("data")
    if not isinstance(items, list):
        raise _error(Kind.LOST, answer, "an answer without a list of images", secret)
    found_images = [image for image in map(_found, items) if image is not None]
    if not found_images:
        raise _error(Kind.PERMANENT, answer, "an answer without any image", secret)
    return found_images


def usage_in(answer: Answer) -> Mapping[str, Any] | None:
    """The tokens of a good answer, in its own words; gateways name them as for chats."""
    usage = answer.json().get("usage")
    return usage if isinstance(usage, dict) and usage else None


def _found(item: object) -> FoundImage | None:
    """What an item holds; gateways send every field and leave the unused ones empty ([G])."""
    if not isinstance(item, dict):
        return None
    inline, url = (value if isinstance(value := item.get(name), str) and value else None for name in ("b64_json", "url"))
    if url is not None and url.startswith("data:"):
        inline, url = inline or url, None
    if url is not None and not url.startswith(("https://", "http://")):
        url = None
    return None if inline is None and url is None else FoundImage(inline, url)


def _told_error(answer: Answer, body: Mapping[str, Any], secret: str) -> Exception:
    """The error that an answer is, told in any of the shapes in use."""
    told = body.get("error") or body
    if not isinstance(told, dict):
        told = {"message": told}
    code, type_ = (str(told.get(name) or "") for name in ("code", "type"))
    message = str(told.get("message") or told.get("detail") or " ".join(filter(None, (code, type_))) or "no reason given")
    return _error(kind_of_error(answer.status, code, type_, _should_retry(answer)), answer, message, secret)


def kind_of_error(status: int, code: str, type_: str, should_retry: str = "") -> Kind:
    """
    What an error means.

    Args:
        code: ``error.code`` as text, empty when there is none; a number is a gateway's and says nothing.
        type_: ``error.type``, empty when there is none.
        should_retry: the header ``x-should-retry``. Where it says no, a limit costs attempts, so that the job ends.
    """
    if (code, status) == _NO_CHANNEL:
        return Kind.RETRY
    for word in (code, type_):
        if word in KINDS:
            return KINDS[word]
        if _UNSAFE.search(word):
            return Kind.PERMANENT
    kind = kind_of_status(status, is_submit=True)
    # The service's own word on trying again: over what goes by the status alone, and only there. [O] x-should-retry
    match should_retry.strip().lower(), kind:
        case "true", Kind.PERMANENT:
            return Kind.RETRY
        case "false", Kind.RETRY:
            return Kind.PERMANENT
        case "false", Kind.CAPACITY:
            return Kind.RETRY
    return kind


def _error(kind: Kind, answer: Answer, message: str, secret: str) -> Exception:
    request_id = answer.headers.get("x-request-id", "")
    asked = f", request {request_id}" if _REQUEST_ID.fullmatch(request_id) else ""
    words = redact(message.replace(secret, MASK))
    return error_of(kind, f"{OpenAIImagesProvider.name} ({answer.status}{asked})", words, retry_after=_retry_after(answer))


def _should_retry(answer: Answer) -> str:
    return answer.headers.get("x-should-retry", "")


def _retry_after(answer: Answer) -> timedelta | None:
    """What the service asks us to wait: milliseconds before seconds, both with fractions, or a date ([O])."""
    for header, unit in (("retry-after-ms", timedelta(milliseconds=1)), ("retry-after", timedelta(seconds=1))):
        try:
            count = float(answer.headers.get(header, ""))
        except ValueError:
            continue
        if math.isfinite(count) and count >= 0:
            return min(count * unit, MAX_RETRY_AFTER) if count < 1e9 else MAX_RETRY_AFTER
    return answer.retry_after
