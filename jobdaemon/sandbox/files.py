"""Serves the images that were bought, as badly as their faults say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from jobdaemon.sandbox.faults import Fault
from jobdaemon.sandbox.shop import File, Shop

#: A drip sends so much, so often: slower than anybody should wait for.
_DRIP_BYTES, _DRIP_S = 64, 0.2


def routes(shop: Shop) -> list[web.RouteDef]:
    """GET /files/<name>."""

    async def serve(request: web.Request) -> web.StreamResponse:
        file = shop.find_file(request.match_info["name"])
        if file is None or file.fault is Fault.EXPIRED_LINK:
            if file is not None:
                # Asked for again, the API gives a link that works.
                file.fault = None
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        return await send(request, file)

    return [web.get("/files/{name}", serve)]


async def send(request: web.Request, file: File) -> web.StreamResponse:
    """Answer with the bytes of *file*, as badly as its fault says; only the first time."""
    content = await asyncio.to_thread(file.content)
    fault, file.fault = file.fault, None
    return await send_content(request, content, "image/png", fault)


async def send_content(
    request: web.Request, content: bytes, media_type: str, fault: Fault | None, *, headers: Mapping[str, str] | None = None
) -> web.StreamResponse:
    """Answer with *content*, as badly as *fault* says."""
    named = {**(headers or {}), "Content-Type": media_type}
    match fault:
        case Fault.TRUNCATED:
            return web.Response(body=content[: len(content) // 2], headers=named)
        case Fault.WRONG_LENGTH:
            return await _streamed(request, content[: len(content) // 2], named, declared=len(content))
        case Fault.DRIP:
            return await _streamed(request, content, named, declared=len(content), drip=True)
    return web.Response(body=content, headers=named)


async def _streamed(
    request: web.Request, content: bytes, headers: Mapping[str, str], *, declared: int, drip: bool = False
) -> web.StreamResponse:
    response = web.StreamResponse(headers={**headers, "Content-Length": str(declared)})
    await response.prepare(request)
    step = _DRIP_BYTES if drip else len(content)
    for start in range(0, len(content), max(1, step)):
        await response.write(content[start : start + step])
        if drip:
            await asyncio.sleep(_DRIP_S)
    if request.transport is not None and len(content) < declared:
        request.transport.close()
    return response
