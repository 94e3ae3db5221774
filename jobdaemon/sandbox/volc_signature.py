"""
The gateway in front of Volcengine's services: who may come in, and its envelope of errors.

Any access key id ``AK<name>`` is known, and its secret is ``SK<name>==``. Requests must be signed within five minutes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import parse_qsl, quote

from aiohttp import web

_REGION, _SERVICE = "cn-north-1", "cv"
_TOLERANCE_S = 300.0
_AUTHORIZATION = re.compile(r"HMAC-SHA256 Credential=([^,\s]+), ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})")
#: Without these a signature says too little.
_NEEDED = frozenset({"host", "x-date"})
#: The gateway's numbers of its errors.
_NUMBERS = {
    "MissingAuthenticationToken": 100003,
    "InvalidTimestamp": 100006,
    "InvalidActionOrVersion": 100008,
    "InvalidAccessKey": 100009,
    "SignatureDoesNotMatch": 100010,
}


class GatewayError(Exception):
    """A request that does not reach the service."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def response(self, request: web.Request) -> web.Response:
        """As the gateway tells it."""
        error = {"Code": self.code, "Message": str(self)} | ({"CodeN": _NUMBERS[self.code]} if self.code in _NUMBERS else {})
        metadata = {
            "RequestId": request_id(),
            "Action": request.query.get("Action", ""),
            "Version": request.query.get("Version", ""),
            "Service": _SERVICE,
            "Region": _REGION,
            "Error": error,
        }
        return web.json_response({"ResponseMetadata": metadata}, status=self.status)


def request_id() -> str:
    """A new one, as the services write them: the moment, then chance."""
    return datetime.now(UTC).strftime("%Y%m%d%H%M%S") + secrets.token_hex(9).upper()


def secret_of(access_key_id: str) -> str | None:
    """The secret that belongs to an access key id; None for one that nobody was given."""
    return f"SK{access_key_id[2:]}==" if re.fullmatch(r"AK.+", access_key_id) else None


def verified(request: web.Request, body: bytes, *, clock: Callable[[], float] = time.time) -> str:
    """
    The access key id that *request* is signed with.

    Args:
        clock: seconds since 1970.

    Raises:
        GatewayError: it is not signed as it should be.
    """
    header = request.headers.get("Authorization")
    if header is None:
        raise GatewayError(401, "MissingAuthenticationToken", "Request is missing Authentication Token.")
    parts = _AUTHORIZATION.fullmatch(header)
    if parts is None:
        raise GatewayError(400, "InvalidAuthorization", "The authorization header is invalid.")
    access_key_id, _, scope = parts[1].partition("/")
    moment = request.headers.get("X-Date", "")
    if scope != f"{moment[:8]}/{_REGION}/{_SERVICE}/request":
        raise GatewayError(400, "InvalidCredential", "The credential's date, region or service is invalid.")
    if not _is_recent(moment, clock()):
        raise GatewayError(400, "InvalidTimestamp", "The signature of the request is expired or not yet valid.")
    secret = secret_of(access_key_id)
    if secret is None:
        raise GatewayError(401, "InvalidAccessKey", f"The accesskey [{access_key_id}] included in the request is invalid.")
    names = parts[2].split(";")
    claimed = request.headers.get("X-Content-Sha256")
    digest = hashlib.sha256(body).hexdigest()
    is_whole = names == sorted(set(names)) and set(names) >= _NEEDED and claimed in (None, digest)
    if not is_whole or not hmac.compare_digest(_signature(request, secret, names, digest, scope, moment), parts[3]):
        raise GatewayError(401, "SignatureDoesNotMatch", "The request signature we calculated does not match yours.")
    return access_key_id


def _is_recent(moment: str, now_s: float) -> bool:
    try:
        signed = datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return False
    return abs(signed.timestamp() - now_s) <= _TOLERANCE_S


def _signature(request: web.Request, secret: str, names: list[str], digest: str, scope: str, moment: str) -> str:
    query = sorted(parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True))
    written = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in query)
    headers = {name: request.headers.get(name, "").strip() for name in names}
    headers["host"] = re.sub(r":(80|443)\Z", "", headers["host"])
    block = "".join(f"{name}:{headers[name]}\n" for name in names)
    canonical = f"{request.method}\n{request.rel_url.raw_path}\n{written}\n{block}\n{';'.join(names)}\n{digest}"
    to_sign = f"HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = secret.encode()
    for part in (*scope.split("/"), to_sign):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()
