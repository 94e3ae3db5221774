"""
Superbed (聚合图床), where photos are put for providers that fetch them: upload and deletion.

Its API is known from its public clients only; what they agree on is relied on, its error numbers are not.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urljoin, urlsplit

from jobdaemon.errors import (
    AnswerLostError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
    StoreRefusedError,
)
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.redact import MASK, redact
from jobdaemon.settings_generate import SuperbedSettings

_MAX_ANSWER_BYTES = 64 * 1024
_QUOTED_CHARACTERS = 200


class Superbed:
    """One account. Every error is without the token and without any link."""

    def __init__(self, settings: SuperbedSettings, client: GuardedClient) -> None:
        """
        Args:
            client: shared, and left open.

        Raises:
            SettingsError: no token.
        """
        if settings.token is None:
            raise SettingsError("superbed.token must be set")
        self._settings = settings
        self._token = settings.token.get_secret_value()
        self._client = client

    async def upload(self, name: str, content: bytes, media_type: str) -> str:
        """
        The link of a photo that anybody can fetch from now on. Uploading it twice gives two.

        Raises what :func:`link_in` raises, and ProviderUnavailableError.
        """
        # The token as a field: in the URL, where most clients put it, it would end up in logs along the way.
        fields = {"token": self._token, "compress": "false", "watermark": "false", "webp": "false"}
        if self._settings.album is not None:
            fields["categories"] = self._settings.album
        return link_in(
            await self._call(self._settings.url, data=fields, files=[("file", (name, content, media_type))]), self._token
        )

    async def delete(self, link: str) -> None:
        """
        What *link* gives is deleted; where it is known no more, that is a success if Superbed says so.

        Raises:
            ProviderRefusedError, StoreRefusedError, RateLimitedError, ProviderUnavailableError: it may still be there.
        """
        item = re.fullmatch(r"([\w-]+)(?:\.\w+)?", urlsplit(link).path.rpartition("/")[2])
        try:
            answer = await self._call(urljoin(self._settings.url, "delete"), payload={"token": self._token, "urls": [link]})
            _answered(answer, self._token, did="delete the photo")
        except ProviderRefusedError:
            # Few clients delete at all; older ones ask so.
            if item is None:
                raise
            url = urljoin(self._settings.url, f"info/{item[1]}")
            answer = await self._call(url, data={"token": self._token, "action": "delete"}, secret=item[1])
            _answered(answer, self._token, did="delete the photo")

    async def _call(self, url: str, *, secret: str | None = None, **body: Any) -> Answer:
        """
        Args:
            secret: what errors must not show of *url*.
        """
        try:
            return await self._client.call("POST", url, max_bytes=_MAX_ANSWER_BYTES, timeout=self._settings.timeout, **body)
        except (AnswerLostError, ProviderUnavailableError) as error:
            # Costs nothing to do twice; a lost answer must not look like that of a provider.
            told = str(error) if secret is None else str(error).replace(secret, MASK)
            raise ProviderUnavailableError(f"superbed: {told}") from None


def link_in(answer: Answer, secret: str) -> str:
    """
    The link that Superbed gave.

    Args:
        secret: the token, kept out of errors.

    Raises:
        ProviderRefusedError: it will not take this photo. Permanent.
        StoreRefusedError: it does not accept the token. Permanent.
        RateLimitedError, ProviderUnavailableError: Retryable.
    """
    body = _answered(answer, secret, did="take the photo")
    link = body.get("url") or _first(body.get("urls"))
    if not isinstance(link, str) or not link.startswith(("https://", "http://")):
        raise ProviderUnavailableError(f"superbed ({answer.status}) took the photo without saying where it is")
    return link


def _answered(answer: Answer, secret: str, *, did: str) -> dict[str, Any]:
    """The body of a good answer. Raises as :func:`link_in` does; *did* is what was asked for."""
    shown = f"superbed ({answer.status})"
    if answer.status == 429:
        raise RateLimitedError(f"{shown}: we ask too often", retry_after=answer.retry_after)
    if answer.status in (401, 403):
        raise StoreRefusedError(f"{shown} does not accept the token: check superbed.token")
    if answer.status >= 500 or answer.status in (408, 425):
        raise ProviderUnavailableError(f"{shown} cannot {did} now", retry_after=answer.retry_after)
    body = _object(answer, shown, did)
    words = redact(" ".join(str(body.get("msg") or "no reason given").replace(secret, MASK).split()))[:_QUOTED_CHARACTERS]
    if answer.status // 100 != 2 or body.get("err") != 0:
        # Its numbers are documented nowhere.
        raise ProviderRefusedError(f"{shown} did not {did}: {words}")
    return body


def _object(answer: Answer, shown: str, did: str) -> dict[str, Any]:
    try:
        body = answer.json()
    except ProviderUnavailableError:
        if answer.status // 100 in (2, 3):
            raise ProviderUnavailableError(f"{shown} answered with something that is no JSON") from None
        raise ProviderRefusedError(f"{shown} did not {did}, and said so with something that is no JSON") from None
    if not isinstance(body, dict):
        raise ProviderUnavailableError(f"{shown} answered with something else than an object")
    return body


def _first(urls: object) -> object:
    """Several links come as an object, or as a list."""
    values = list(urls.values()) if isinstance(urls, dict) else urls
    return values[0] if isinstance(values, list) and values else None
