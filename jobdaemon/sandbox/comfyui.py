"""
ComfyUI: as many servers as are asked for, each under ``/comfyui/<name>``, with and without the prefix ``/api``.

A server has no keys and no limits: what it cannot do now it queues. So ``concurrency`` and ``qps`` do not concern it, and a 429
is a proxy's. An image is bought, at no price, when its prompt succeeds and the server's cache has not got it already.

    comfyui_nodes.py   the nodes it has, and its judgement of workflows
    comfyui_engine.py  one server: queue, history, files, websockets
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web

from jobdaemon.sandbox import files
from jobdaemon.sandbox.comfyui_engine import API, ComfyEngine, Place
from jobdaemon.sandbox.comfyui_nodes import NODE_TYPES, judge, object_info
from jobdaemon.sandbox.faults import CALL_FAULTS, Fault
from jobdaemon.sandbox.shop import File, Shop

Handler = Callable[[ComfyEngine, web.Request], Awaitable[web.StreamResponse]]
#: Nobody here calls a prompt unsafe.
_FAULTS = CALL_FAULTS - {Fault.UNSAFE}
_KINDS = ("input", "output", "temp")


def routes(shop: Shop) -> list[web.RouteDef]:
    """Every route of every server."""
    engines: dict[str, ComfyEngine] = {}

    def bound(handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            name = request.match_info["server"]
            if name not in engines:
                engines[name] = ComfyEngine(shop, name)
            return await handler(engines[name], request)

        return handle

    table: list[tuple[str, str, Handler]] = [
        ("GET", "/prompt", _load),
        ("POST", "/prompt", _submit),
        ("GET", "/queue", _queue),
        ("POST", "/queue", _change_queue),
        ("POST", "/interrupt", _interrupt),
        ("GET", "/history", _history),
        ("GET", "/history/{prompt_id}", _history_of),
        ("POST", "/history", _change_history),
        ("POST", "/upload/image", _upload),
        ("GET", "/view", _view),
        ("GET", "/ws", _socket),
        ("GET", "/system_stats", _system_stats),
        ("GET", "/object_info", _object_infos),
        ("GET", "/object_info/{class_type}", _object_info),
    ]
    return [
        web.route(method, f"/{API}/{{server}}{prefix}{path}", bound(handler))
        for prefix in ("", "/api")
        for method, path, handler in table
    ]


async def _load(engine: ComfyEngine, _request: web.Request) -> web.Response:
    return web.json_response({"exec_info": {"queue_remaining": engine.remaining}})


async def _submit(engine: ComfyEngine, request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    nodes = body.get("prompt")
    if not isinstance(nodes, dict):
        return _refused("no_prompt", "No prompt provided")
    prompt_id = body.get("prompt_id") or str(uuid.uuid4())
    if not _is_canonical(prompt_id):
        return _refused("invalid_prompt_id", "prompt_id must be a valid UUID")
    fault = engine.call_fault(nodes, _FAULTS)
    if (broken := _broken(fault)) is not None:
        return broken
    verdict = judge(nodes, lambda name: ("input", *_place(name)) in engine.files)
    if verdict.error is not None:
        return web.json_response({"error": verdict.error, "node_errors": verdict.node_errors}, status=400)
    extra = dict(body.get("extra_data") or {}) | ({"client_id": body["client_id"]} if "client_id" in body else {})
    number = await engine.put(
        prompt_id, nodes, extra, verdict.outputs, number=body.get("number"), front=bool(body.get("front")), fault=fault
    )
    if fault is Fault.RESET:
        assert request.transport is not None
        request.transport.abort()
    if fault is Fault.TIMEOUT:
        await asyncio.Event().wait()
    return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})


def _broken(fault: Fault | None) -> web.Response | None:
    """What a proxy, or the server itself, answers before it has read the prompt."""
    match fault:
        case Fault.RATE_LIMITED:
            return web.Response(status=429, text="Too Many Requests", headers={"Retry-After": "1"})
        case Fault.ERROR:
            return web.Response(status=500, text="500 Internal Server Error\n\nServer got itself in trouble")
        case Fault.HTML:
            return web.Response(status=502, text="<html><body><h1>502 Bad Gateway</h1></body></html>", content_type="text/html")
    return None


async def _queue(engine: ComfyEngine, _request: web.Request) -> web.Response:
    running = [] if engine.running is None else [engine.running.row()]
    return web.json_response({"queue_running": running, "queue_pending": [item.row() for item in engine.pending]})


async def _change_queue(engine: ComfyEngine, request: web.Request) -> web.Response:
    body = await _body(request)
    if body.get("clear"):
        await engine.delete(None)
    if "delete" in body:
        await engine.delete(body["delete"])
    return web.Response()


async def _interrupt(engine: ComfyEngine, request: web.Request) -> web.Response:
    engine.interrupt((await _body(request)).get("prompt_id") if request.can_read_body else None)
    return web.Response()


async def _history(engine: ComfyEngine, request: web.Request) -> web.Response:
    entries = list(engine.history.items())
    most = int(request.query.get("max_items", len(entries)))
    start = int(request.query.get("offset", max(0, len(entries) - most)))
    return web.json_response(dict(entries[start : start + most]))


async def _history_of(engine: ComfyEngine, request: web.Request) -> web.Response:
    prompt_id = request.match_info["prompt_id"]
    return web.json_response({prompt_id: engine.history[prompt_id]} if prompt_id in engine.history else {})


async def _change_history(engine: ComfyEngine, request: web.Request) -> web.Response:
    body = await _body(request)
    if body.get("clear"):
        engine.history.clear()
    for prompt_id in body.get("delete", ()):
        engine.history.pop(prompt_id, None)
    return web.Response()


async def _upload(engine: ComfyEngine, request: web.Request) -> web.Response:
    form = await request.post()
    image, kind, subfolder = form.get("image"), str(form.get("type") or "input"), str(form.get("subfolder") or "")
    if not isinstance(image, web.FileField) or not image.filename or kind not in _KINDS or ".." in subfolder.split("/"):
        return web.Response(status=400)
    content, name = image.file.read(), image.filename.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    number = 0
    while form.get("overwrite") not in ("true", "1") and engine.files.get((kind, subfolder, name), content) != content:
        number += 1
        name = f"{stem} ({number}){dot}{suffix}"
    engine.files[kind, subfolder, name] = content
    return web.json_response({"name": name, "subfolder": subfolder, "type": kind})


async def _view(engine: ComfyEngine, request: web.Request) -> web.StreamResponse:
    name, subfolder = request.query.get("filename", ""), request.query.get("subfolder", "")
    if not name:
        return web.Response(status=404)
    if name.startswith("/") or ".." in name:
        return web.Response(status=400)
    if ".." in subfolder.split("/") or subfolder.startswith("/"):
        return web.Response(status=403)
    found = engine.files.get(_stored(request.query.get("type", "output"), subfolder, name))
    if found is None or (isinstance(found, File) and found.fault is Fault.EXPIRED_LINK):
        if isinstance(found, File):
            found.fault = None  # somebody is still writing it
        return web.Response(status=404)
    return web.Response(body=found, content_type="image/png") if isinstance(found, bytes) else await files.send(request, found)


def _stored(kind: str, subfolder: str, name: str) -> Place:
    return kind, subfolder, name


async def _socket(engine: ComfyEngine, request: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    client_id = request.query.get("clientId") or uuid.uuid4().hex
    engine.sockets[client_id] = socket
    try:
        await socket.send_json({"type": "status", "data": {**engine.status(), "sid": client_id}})
        if engine.running is not None and engine.running.client_id == client_id:
            await socket.send_json({"type": "executing", "data": {"node": engine.running.outputs[0]}})
        async for frame in socket:
            if frame.type is WSMsgType.ERROR:
                break
    finally:
        # A later socket of the same client has its place.
        if engine.sockets.get(client_id) is socket:
            del engine.sockets[client_id]
    return socket


async def _system_stats(_engine: ComfyEngine, _request: web.Request) -> web.Response:
    gibibyte = 2**30
    system = {
        "os": "linux",
        "ram_total": 16 * gibibyte,
        "ram_free": 8 * gibibyte,
        "comfyui_version": "0.3.60",
        "argv": ["main.py"],
    }
    system |= {"python_version": "3.11", "pytorch_version": "2.8.0", "embedded_python": False}
    sizes = dict.fromkeys(("vram_total", "vram_free", "torch_vram_total", "torch_vram_free"), 8 * gibibyte)
    return web.json_response({"system": system, "devices": [{"name": "cuda:0 sandbox", "type": "cuda", "index": 0, **sizes}]})


async def _object_infos(_engine: ComfyEngine, _request: web.Request) -> web.Response:
    return web.json_response({name: info for class_type in NODE_TYPES for name, info in object_info(class_type).items()})


async def _object_info(_engine: ComfyEngine, request: web.Request) -> web.Response:
    return web.json_response(object_info(request.match_info["class_type"]))


def _refused(kind: str, message: str) -> web.Response:
    error = {"type": kind, "message": message, "details": message, "extra_info": {}}
    return web.json_response({"error": error, "node_errors": {}}, status=400)


async def _body(request: web.Request) -> Mapping[str, Any]:
    """The body; one that is no JSON object breaks the real server too."""
    with suppress(ValueError):
        body = await request.json()
        if isinstance(body, dict):
            return body
    raise web.HTTPInternalServerError(text="500 Internal Server Error\n\nServer got itself in trouble")


def _is_canonical(prompt_id: object) -> bool:
    try:
        return isinstance(prompt_id, str) and str(uuid.UUID(prompt_id)) == prompt_id
    except ValueError:
        return False


def _place(name: str) -> tuple[str, str]:
    subfolder, _, last = name.rpartition("/")
    return subfolder, last
