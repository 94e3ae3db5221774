"""
Superbed: photos are uploaded under a token and lie there until they are deleted; about every second link is a redirect.

It has no limits, and nothing goes wrong, except under a token that begins with ``faulty``: there, uploads and deletions have the
faults of the image APIs. Under one that begins with ``older``, photos are deleted in the older way only. An upload
takes a fortieth of the behaviour's latency.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import BodyPartReader, web

from jobdaemon.sandbox.faults import CALL_FAULTS, Fault
from jobdaemon.sandbox.fetching import UnfetchableError, fetched, is_picture
from jobdaemon.sandbox.shop import Shop

API = "superbed"
_TAKES_SHARE = 1 / 40
_MAX_PHOTO_BYTES = 50 * 1024 * 1024
#: Photos that are kept; older ones are gone.
_MAX_ITEMS = 200
_TYPES = {"png": "image/png", "jpg": "image/jpeg"}


class SuperbedError(Exception):
    """An error as Superbed tells it: under 200, with a number that nobody explains."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True, slots=True)
class _Upload:
    """A form that was read; *files* are named by their fields."""

    fields: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def routes(shop: Shop) -> list[web.RouteDef]:
    """Everything under /superbed."""
    api = _Api(shop)
    return [
        web.post("/superbed/upload", api.upload),
        web.post("/superbed/delete", api.delete),
        web.post("/superbed/info/{id}", api.info),
        web.get("/superbed/item/{name}", api.item),
        web.get("/superbed/file/{name}", api.file),
    ]


class _Api:
    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._items: dict[str, bytes] = {}
        self._numbers = itertools.count(1)
        self._tries: Counter[str] = Counter()

    async def upload(self, request: web.Request) -> web.Response:
        """POST /superbed/upload: ``file``, several ``file0`` …, or ``src``."""
        form = await _form(request)
        token = form.fields.get("token") or request.query.get("token") or ""
        account = self._shop.account(API, token)
        if not token:
            account.unauthorised += 1
            return web.json_response({"err": 1, "msg": "token 无效"})
        account.calls += 1
        account.open += 1
        account.peak = max(account.peak, account.open)
        try:
            await asyncio.sleep(self._shop.behaviour.latency_s * _TAKES_SHARE)
            return await self._kept(request, token, form)
        except SuperbedError as error:
            return web.json_response({"err": error.number, "msg": str(error)})
        finally:
            account.open -= 1

    async def _kept(self, request: web.Request, token: str, form: _Upload) -> web.Response:
        files = dict(form.files)
        if not files and "src" in form.fields:
            files["file"] = await _fetched(form.fields["src"])
        if not files:
            raise SuperbedError(2, "没有图片")
        if not all(map(is_picture, files.values())):
            raise SuperbedError(3, "图片格式不支持")
        fault = self._fault(token, files)
        if (broken := _broken(fault)) is not None:
            return broken
        if fault is Fault.UNSAFE:
            raise SuperbedError(4, "图片违规")
        kept = {name: self._keep(content) for name, content in files.items()}
        await _leave(request, fault)
        links = {name: f"{request.url.origin()}/superbed/item/{item}" for name, item in kept.items()}
        if set(links) == {"file"}:
            return web.json_response({"err": 0, "url": links["file"]})
        return web.json_response({"err": 0, "ids": [item.partition(".")[0] for item in kept.values()], "urls": links})

    def _fault(self, token: str, files: Mapping[str, bytes]) -> Fault | None:
        if not token.startswith("faulty"):
            return None
        digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
        self._tries[digest] += 1
        return self._shop.fault(API, token, f"{digest}:{self._tries[digest]}", CALL_FAULTS)

    def _keep(self, content: bytes) -> str:
        number = next(self._numbers)
        extension = "png" if content.startswith(b"\x89PNG") else "jpg"
        # The same photo twice is two items; the last digit says which links redirect.
        name = f"{hashlib.sha256(content).hexdigest()[:20]}{number:04x}.{extension}"
        self._items[name] = content
        while len(self._items) > _MAX_ITEMS:
            del self._items[next(iter(self._items))]
        return name

    async def delete(self, request: web.Request) -> web.Response:
        """POST /superbed/delete {token, urls}."""
        try:
            body: Any = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or not body.get("token") or not isinstance(body.get("urls"), list):
            return web.json_response({"err": 1, "msg": "token 无效"})
        if str(body["token"]).startswith("older"):
            return web.Response(status=404, text="Not Found")
        names = [str(link).rpartition("/")[2] for link in body["urls"]]
        return await self._deleted(request, str(body["token"]), names)

    async def info(self, request: web.Request) -> web.Response:
        """POST /superbed/info/<id> {token, action=delete}: the older way."""
        form, item = await request.post(), request.match_info["id"]
        if not form.get("token") or form.get("action") != "delete":
            return web.json_response({"err": 1, "msg": "token 无效"})
        names = [name for name in self._items if name.partition(".")[0] == item]
        return await self._deleted(request, str(form["token"]), names)

    async def _deleted(self, request: web.Request, token: str, names: list[str]) -> web.Response:
        fault = self._fault(token, {name: name.encode() for name in names})
        if (broken := _broken(fault)) is not None:
            return broken
        for name in names:
            self._items.pop(name, None)
        await _leave(request, fault)
        return web.json_response({"err": 0})

    async def item(self, request: web.Request) -> web.Response:
        """GET /superbed/item/…: the photo, or where it lies."""
        name = request.match_info["name"]
        if name in self._items and int(name.partition(".")[0][-1], 16) % 2:
            return web.Response(status=302, headers={"Location": f"/superbed/file/{name}"})
        return await self.file(request)

    async def file(self, request: web.Request) -> web.Response:
        """GET /superbed/file/…: the photo."""
        name = request.match_info["name"]
        if name not in self._items:
            return web.Response(status=404, text="Not Found")
        return web.Response(body=self._items[name], content_type=_TYPES[name.rpartition(".")[2]])


def _broken(fault: Fault | None) -> web.Response | None:
    """What comes instead of an answer, before anything is done."""
    match fault:
        case Fault.RATE_LIMITED:
            return web.Response(status=429, text="Too Many Requests", headers={"Retry-After": "1"})
        case Fault.ERROR:
            return web.Response(status=500, text="Internal Server Error")
        case Fault.HTML:
            return web.Response(status=502, text="<html><title>502 Bad Gateway</title></html>", content_type="text/html")
    return None


async def _leave(request: web.Request, fault: Fault | None) -> None:
    """Nobody hears what was done."""
    if fault is Fault.RESET and request.transport is not None:
        request.transport.abort()
    if fault is Fault.TIMEOUT:
        await asyncio.Event().wait()  # until the caller is gone


async def _form(request: web.Request) -> _Upload:
    if not request.content_type.startswith("multipart/"):
        return _Upload({name: value for name, value in (await request.post()).items() if isinstance(value, str)})
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or part.name is None:
            continue
        content = bytes(await part.read())
        if part.name.startswith("file") and part.name != "filename":
            files[part.name] = content
        else:
            fields[part.name] = content.decode(errors="replace")
    return _Upload(fields, files)


async def _fetched(link: str) -> bytes:
    try:
        return await fetched(link, max_bytes=_MAX_PHOTO_BYTES)
    except UnfetchableError as error:
        raise SuperbedError(5, f"图片下载失败 {error}") from error
