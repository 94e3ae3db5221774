"""
Where DashScope's SDK puts local files before it calls a model: it gets a policy, sends a form, and passes an ``oss://`` name on.

    GET  /api/v1/uploads?action=getPolicy&model=<model>    what the form must hold
    POST /dashscope-uploads                                the object store's form upload
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Any

from aiohttp import BodyPartReader, web

#: As the service tells it.
_EXPIRES_S, _MAX_FILE_MB = 300, 100
_PATH = "/dashscope-uploads"
_ACCESS_KEY_ID = "LTAI-sandbox"


class Uploads:
    """Files by name; their bytes are looked at and dropped."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)
        self._names: set[str] = set()

    def policy(self, request: web.Request, key: str, request_id: str) -> Mapping[str, Any] | None:
        """What the form must hold; None when the question is none."""
        if request.query.get("action") != "getPolicy" or not request.query.get("model"):
            return None
        folder = f"dashscope-instant/{hashlib.sha256(key.encode()).hexdigest()[:16]}/{request_id}"
        return {
            "policy": folder,
            "signature": self._signature(folder),
            "upload_dir": folder,
            "upload_host": f"{request.url.origin()}{_PATH}",
            "expire_in_seconds": _EXPIRES_S,
            "max_file_size_mb": _MAX_FILE_MB,
            "oss_access_key_id": _ACCESS_KEY_ID,
            "x_oss_object_acl": "private",
            "x_oss_forbid_overwrite": "true",
        }

    def routes(self) -> list[web.RouteDef]:
        """The object store."""
        return [web.post(_PATH, self._put)]

    def has(self, link: str) -> bool:
        """Whether an ``oss://`` name was uploaded."""
        return link.removeprefix("oss://") in self._names

    def _signature(self, policy: str) -> str:
        return hmac.new(self._secret, policy.encode(), hashlib.sha256).hexdigest()

    async def _put(self, request: web.Request) -> web.Response:
        fields: dict[str, str] = {}
        has_file = False
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader) or part.name is None:
                continue
            content = bytes(await part.read())
            if part.name == "file":
                has_file = bool(content)
            else:
                fields[part.name] = content.decode(errors="replace")
        policy, name = fields.get("policy", ""), fields.get("key", "")
        is_signed = hmac.compare_digest(self._signature(policy), fields.get("Signature", ""))
        if not is_signed or fields.get("OSSAccessKeyId") != _ACCESS_KEY_ID or not name.startswith(f"{policy}/"):
            return _refused(403, "SignatureDoesNotMatch")
        if not has_file:
            return _refused(400, "IncorrectNumberOfFilesInPOSTRequest")
        if name in self._names:
            return _refused(409, "FileAlreadyExists")
        self._names.add(name)
        return web.Response(status=200 if fields.get("success_action_status") == "200" else 204)


def _refused(status: int, code: str) -> web.Response:
    return web.Response(status=status, text=f"<Error><Code>{code}</Code></Error>", content_type="application/xml")
