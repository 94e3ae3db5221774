"""
PhotoEnhanceAI: photos are uploaded, enhanced one after another, fetched and deleted. As many servers as are asked for, each
under ``/photo-enhance/<name>``: ``docs`` in the name answers as that service's documentation says and not as its code does,
``blocking`` answers nothing while a photo is worked on, as the code does too (``docs-blocking`` does both).

It has no keys. ``concurrency`` and ``qps`` are those of a proxy before it: a photo holds a place from its upload until it is
done. The report counts ``tasks``, ``duplicates`` (the same photo sent again), ``deleted`` and ``emptied``: how often a task of a
batch was deleted, which takes every result with it.

    photo_enhance_service.py   one server: its tasks, and what it does to a picture
"""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import BodyPartReader, web

from jobdaemon.sandbox import files
from jobdaemon.sandbox.faults import CALL_FAULTS, Fault
from jobdaemon.sandbox.photo_enhance_service import API, Batch, EnhanceServer, Task
from jobdaemon.sandbox.shop import Shop

Handler = Callable[[EnhanceServer, web.Request], Awaitable[web.StreamResponse]]
_MAX_BYTES = 50 * 1024 * 1024
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tiff")
_MAX_BATCH = 20
_QUALITIES = ("fast", "medium", "high")
#: Nobody here calls a photo unsafe.
_UPLOAD_FAULTS = CALL_FAULTS - {Fault.UNSAFE}
#: What may happen to a question; one that is never answered is what the blocking mode is for.
_POLL_FAULTS = frozenset({Fault.RATE_LIMITED, Fault.ERROR, Fault.RESET, Fault.HTML})


class RefusedError(Exception):
    """A request that is answered with an error: its status and ``detail``."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(str(detail))
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Part:
    """A file of a form."""

    filename: str
    content_type: str
    content: bytes


def routes(shop: Shop) -> list[web.RouteDef]:
    """Every route of every server."""
    servers: dict[str, EnhanceServer] = {}

    def bound(handler: Handler, *, is_own: bool = False) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            name = request.match_info["server"]
            if name not in servers:
                servers[name] = EnhanceServer(shop, name)
            server = servers[name]
            if is_own:
                return await handler(server, request)
            await server.wait_for_turn()
            try:
                return await handler(server, request)
            except RefusedError as error:
                return web.json_response({"detail": error.detail}, status=error.status)

        return handle

    table: list[tuple[str, str, Handler]] = [
        ("GET", "/", _about),
        ("GET", "/health", _health),
        ("POST", "/api/v1/enhance", _enhance),
        ("GET", "/api/v1/status/{id}", _status),
        ("GET", "/api/v1/download/{id}", _download),
        ("GET", "/api/v1/tasks", _tasks),
        ("DELETE", "/api/v1/tasks/{id}", _delete),
        ("POST", "/api/v1/enhance/batch", _enhance_batch),
        ("GET", "/api/v1/batch/status/{id}", _batch_status),
        ("GET", "/api/v1/batch/download/{id}", _batch_download),
    ]
    place = "/photo-enhance/{server}"
    return [
        *(web.route(method, f"{place}{path}", bound(handler)) for method, path, handler in table),
        web.post(f"/_sandbox{place}/restart", bound(_restart, is_own=True)),
    ]


async def _restart(server: EnhanceServer, _request: web.Request) -> web.Response:
    server.restart()
    return web.json_response({})


async def _about(_server: EnhanceServer, _request: web.Request) -> web.Response:
    return web.json_response({"message": "PhotoEnhanceAI", "version": "1.0.0", "status": "running"})


async def _health(server: EnhanceServer, _request: web.Request) -> web.Response:
    open_tasks = sum(task.status in ("queued", "processing") for task in server.tasks.values())
    model = {"initialized": True, "cuda_available": False, "device": "cpu"}
    return web.json_response({"status": "healthy", "timestamp": 0.0, "active_tasks": open_tasks, "model_status": model})


# One photo


async def _enhance(server: EnhanceServer, request: web.Request) -> web.StreamResponse:
    fields, parts = await _form(request)
    _judge_wishes(fields if server.speaks_docs else request.query)
    found = parts.get("file")
    if found is None:
        raise RefusedError(422, [{"loc": ["body", "file"], "msg": "field required", "type": "value_error.missing"}])
    photo = found[0]
    _judge(photo)
    _take_places(server, 1)
    fault = server.upload_fault([photo.content], _UPLOAD_FAULTS)
    if (broken := _broken(fault)) is not None:
        server.shop.end(API, server.key)
        return broken
    task = server.add(photo.filename, photo.content, is_slow=fault is Fault.SLOW)
    await _leave(request, fault)
    told = {"message": "Task created", "created_at": server.told_time(task.created)}
    return web.json_response({"task_id": task.id, "status": server.told_status("queued"), **told})


async def _status(server: EnhanceServer, request: web.Request) -> web.StreamResponse:
    task = _named(server, request)
    task.polls += 1
    fault = server.shop.fault(API, server.key, f"poll:{task.name}:{task.polls}", _POLL_FAULTS)
    if (broken := _broken(fault)) is not None:
        return broken
    await _leave(request, fault)
    return web.json_response(server.told_task(task))


async def _download(server: EnhanceServer, request: web.Request) -> web.StreamResponse:
    task = _named(server, request)
    if task.status != "completed":
        raise RefusedError(400, f"Task not completed. Current status: {server.told_status(task.status)}")
    if task.result is None or task.file_fault is Fault.EXPIRED_LINK:
        task.file_fault = None
        raise RefusedError(404, "Result file not found")
    fault, task.file_fault = task.file_fault, None
    stem, dot, extension = task.filename.rpartition(".")
    named = {"Content-Disposition": f'attachment; filename="{stem}_enhanced{dot}{extension}"'}
    return await files.send_content(request, task.result, "image/jpeg", fault, headers=named)


async def _tasks(server: EnhanceServer, _request: web.Request) -> web.Response:
    rows = [
        {name: server.told_task(task)[name] for name in ("task_id", "status", "created_at", "updated_at")}
        for task in server.tasks.values()
    ]
    return web.json_response({"total_tasks": len(rows), "tasks": rows})


async def _delete(server: EnhanceServer, request: web.Request) -> web.Response:
    if not server.delete(_named(server, request)):
        raise RefusedError(500, "Failed to delete task: [Errno 39] Directory not empty")
    return web.json_response({"message": "Task deleted successfully"})


# Several


async def _enhance_batch(server: EnhanceServer, request: web.Request) -> web.StreamResponse:
    fields, parts = await _form(request)
    _judge_wishes(fields if server.speaks_docs else request.query)
    photos = parts.get("files", [])
    if not photos:
        raise RefusedError(422, [{"loc": ["body", "files"], "msg": "field required", "type": "value_error.missing"}])
    if len(photos) > _MAX_BATCH:
        raise RefusedError(400, f"最多支持{_MAX_BATCH}张图片")
    for photo in photos:
        _judge(photo)
    _take_places(server, len(photos))
    fault = server.upload_fault([photo.content for photo in photos], _UPLOAD_FAULTS)
    if (broken := _broken(fault)) is not None:
        for _ in photos:
            server.shop.end(API, server.key)
        return broken
    batch_id = server.new_id()
    is_slow = fault is Fault.SLOW
    tasks = [server.add(photo.filename, photo.content, batch=batch_id, is_slow=is_slow) for photo in photos]
    server.batches[batch_id] = batch = Batch(batch_id, tasks)
    await _leave(request, fault)
    told = {"total_files": len(tasks), "status": server.told_status("queued"), "message": "Batch created"}
    told |= {"created_at": server.told_time(batch.created), "sub_tasks": [task.id for task in tasks]}
    return web.json_response({"batch_task_id": batch_id, **told})


async def _batch_status(server: EnhanceServer, request: web.Request) -> web.Response:
    return web.json_response(server.told_batch(_named_batch(server, request)))


async def _batch_download(server: EnhanceServer, request: web.Request) -> web.Response:
    batch = _named_batch(server, request)
    if batch.status not in ("completed", "partial_completed"):
        raise RefusedError(400, "批量任务未完成")
    archive = await asyncio.to_thread(_zipped, batch)
    named = {"Content-Disposition": f'attachment; filename="batch_results_{batch.id}.zip"'}
    return web.Response(body=archive, content_type="application/zip", headers=named)


def _zipped(batch: Batch) -> bytes:
    """The results under their photos' names; of two with the same name one is left."""
    contents = {task.filename: task.result for task in batch.tasks if task.result is not None}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# What a request says


def _named(server: EnhanceServer, request: web.Request) -> Task:
    task = server.find(request.match_info["id"])
    if task is None:
        raise RefusedError(404, "Task not found")
    return task


def _named_batch(server: EnhanceServer, request: web.Request) -> Batch:
    batch = server.batches.get(request.match_info["id"])
    if batch is None:
        raise RefusedError(404, "批量任务不存在")
    return batch


async def _form(request: web.Request) -> tuple[dict[str, str], dict[str, list[_Part]]]:
    """Text fields, and files by field."""
    fields: dict[str, str] = {}
    parts: dict[str, list[_Part]] = {}
    if not request.content_type.startswith("multipart/"):
        return fields, parts
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or part.name is None:
            continue
        content = bytearray()
        while block := await part.read_chunk(65_536):
            content += block
            if len(content) > _MAX_BYTES:
                raise RefusedError(413, "File too large. Maximum size: 50MB")
        if part.filename is None:
            fields[part.name] = content.decode(errors="replace")
        else:
            media_type = part.headers.get("Content-Type", "application/octet-stream")
            parts.setdefault(part.name, []).append(_Part(part.filename, media_type, bytes(content)))
    return fields, parts


def _judge_wishes(wishes: Mapping[str, str]) -> None:
    tile, quality = wishes.get("tile_size", "400"), wishes.get("quality_level", "high")
    if not (tile.isascii() and tile.isdigit() and 256 <= int(tile[:9]) <= 512):
        raise RefusedError(422, [{"loc": ["query", "tile_size"], "msg": "must lie from 256 to 512", "type": "value_error"}])
    if quality not in _QUALITIES:
        raise RefusedError(422, [{"loc": ["query", "quality_level"], "msg": "unexpected value", "type": "value_error.const"}])


def _judge(photo: _Part) -> None:
    if not photo.content_type.startswith("image/"):
        raise RefusedError(400, "Invalid file type. Only image files are allowed.")
    if not photo.filename.lower().endswith(_EXTENSIONS):
        raise RefusedError(400, f"Unsupported file format. Supported: {', '.join(_EXTENSIONS)}")


# What goes wrong


def _take_places(server: EnhanceServer, count: int) -> None:
    """A place for each photo; a proxy refuses when there is none."""
    for taken in range(count):
        full = server.shop.begin(API, server.key)
        if full is not None:
            for _ in range(taken):
                server.shop.end(API, server.key)
            raise web.HTTPTooManyRequests(text="Too Many Requests", headers={"Retry-After": str(full.retry_after_s)})


def _broken(fault: Fault | None) -> web.Response | None:
    """What comes instead of an answer, before anything is done."""
    match fault:
        case Fault.RATE_LIMITED:
            return web.Response(status=429, text="Too Many Requests", headers={"Retry-After": "1"})
        case Fault.ERROR:
            body = json.dumps({"detail": "Failed to process request: [Errno 28] No space left on device"})
            return web.Response(status=500, text=body, content_type="application/json")
        case Fault.HTML:
            return web.Response(status=502, text="<html><title>502 Bad Gateway</title></html>", content_type="text/html")
    return None


async def _leave(request: web.Request, fault: Fault | None) -> None:
    """Nobody hears what was done."""
    if fault is Fault.RESET and request.transport is not None:
        request.transport.abort()
    if fault is Fault.TIMEOUT:
        await asyncio.Event().wait()  # until the caller is gone
