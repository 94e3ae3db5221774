"""
Volcengine's request signature: HMAC-SHA256 over what is sent, as the official Python SDK 1.0.229 makes it. Pure.

Whoever signs must send exactly these bytes under exactly these headers, and no other header whose name begins with ``X-``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote

REGION = "cn-north-1"
SERVICE = "cv"
_ALGORITHM = "HMAC-SHA256"
_DEFAULT_PORTS = (":80", ":443")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """
    One access key.

    Attributes:
        secret_access_key: text as it is; that many of them end in ``==`` makes them no base64.
        session_token: of a temporary key.
    """

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)

    @classmethod
    def parsed(cls, text: str) -> KeyPair:
        """Both parts in one text, ``<access key id>:<secret access key>``; a part that is missing is empty."""
        access_key_id, _, secret_access_key = text.partition(":")
        return cls(access_key_id, secret_access_key)


def canonical_query(query: Mapping[str, str]) -> str:
    """*query* as it is signed, and as it must be sent."""
    return "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))


def signed_headers(
    keys: KeyPair, *, method: str, host: str, path: str, query: Mapping[str, str], body: bytes, now: datetime
) -> dict[str, str]:
    """
    The headers of a request with a JSON body, its signature among them.

    Args:
        host: with its port, if it has one.
        path: begins with a slash and needs no quoting.
        now: aware; the service refuses a clock that is off by more than some minutes.
    """
    moment = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "Content-Type": "application/json",
        "Host": host,
        "X-Content-Sha256": hashlib.sha256(body).hexdigest(),
        "X-Date": moment,
    }
    if keys.session_token is not None:
        headers["X-Security-Token"] = keys.session_token
    canonical, names = canonical_request(method, path, query, headers)
    scope = f"{moment[:8]}/{REGION}/{SERVICE}/request"
    to_sign = "\n".join([_ALGORITHM, moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signature = _hmac(signing_key(keys.secret_access_key, moment[:8]), to_sign).hex()
    credential = f"Credential={keys.access_key_id}/{scope}"
    return headers | {"Authorization": f"{_ALGORITHM} {credential}, SignedHeaders={names}, Signature={signature}"}


def canonical_request(method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> tuple[str, str]:
    """What is hashed, and the names of its headers; *headers* are exactly those that are signed."""
    signed = {name.lower(): value for name, value in headers.items()}
    if signed["host"].endswith(_DEFAULT_PORTS):
        signed["host"] = signed["host"].rpartition(":")[0]
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    return "\n".join([method, path, canonical_query(query), lines, names, signed["x-content-sha256"]]), names


def signing_key(secret: str, date: str) -> bytes:
    """The key of one day, *date* as YYYYMMDD."""
    key = secret.encode()
    for part in (date, REGION, SERVICE, "request"):
        key = _hmac(key, part)
    return key


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()
