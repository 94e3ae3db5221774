"""
OpenAI's image API: generations and edits as OpenAI's own models answer them, and as gateways do for models of other names.

    gpt-image-*, chatgpt-image-*   always base64, with usage; no response_format
    dall-e-*                       links unless base64 is asked for
    any other name                 a gateway: every field present and "" when unused, no "created", usage as of a chat

A call is synchronous, so it holds its key's slot until it is answered or its caller is gone. A 429, a 500, a proxy's page and a
refused prompt cost nothing; a call that is cut off or never answered does.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import BodyPartReader, web
from PIL import ExifTags, Image

from jobdaemon.sandbox.faults import CALL_FAULTS, Fault
from jobdaemon.sandbox.shop import NUMBER_KEYWORD, File, Shop, prompt_digest

API = "openai_images"
_MODELS = ("gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2", "gpt-image-2.5-flare", "dall-e-2", "dall-e-3")
_DEFAULT_MODEL = "gpt-image-2"
#: Longest prompts, in characters, by how the model's name begins; gateways take what the largest takes.
_PROMPT_CHARACTERS = {"dall-e-2": 1_000, "dall-e-3": 4_000}
_MAX_PROMPT_CHARACTERS = 32_000
_MAX_N, _MAX_PHOTOS, _MAX_PHOTO_BYTES = 10, 16, 50 * 1024 * 1024
_SIZES = {
    "dall-e-2": ("256x256", "512x512", "1024x1024"),
    "dall-e-3": ("1024x1024", "1792x1024", "1024x1792"),
    "gpt-image-1": ("1024x1024", "1536x1024", "1024x1536", "auto"),
}
#: Sides in pixels; gateways take ratios such as 2x3, too.
_SIDES = re.compile(r"([1-9]\d{2,4})x([1-9]\d{2,4})")
_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_PHOTO_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")


class ApiError(Exception):
    """An error as this API tells it."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a good request asks for; *output_format* and *as_url* say in which form."""

    model: str
    prompt: str
    count: int
    size: str
    quality: str
    output_format: str
    as_url: bool
    is_chat: bool = False

    @property
    def size_px(self) -> tuple[int, int] | None:
        """Width and height; None where the size is left open, or told by its ratio."""
        sides = _SIDES.fullmatch(self.size)
        return None if sides is None else (int(sides[1]), int(sides[2]))

    @property
    def is_gpt(self) -> bool:
        return _is_gpt(self.model)

    @property
    def is_gateway(self) -> bool:
        return not self.is_gpt and not self.model.startswith("dall-e")


def routes(shop: Shop) -> list[web.RouteDef]:
    """What stands behind base_url ``…/v1``."""
    api = _Api(shop)
    return [
        web.post("/v1/images/generations", api.answering(_read_generation)),
        web.post("/v1/images/edits", api.answering(_read_edit)),
        web.post("/v1/chat/completions", api.answering(_read_chat)),
        web.get("/v1/models", api.models),
    ]


class _Api:
    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._calls_of_prompt: Counter[str] = Counter()
        self._numbers = itertools.count(1)

    def answering(self, read: Callable[[web.Request], Awaitable[_Wish]]) -> Callable[[web.Request], Awaitable[web.Response]]:
        """The handler of an endpoint whose requests *read* understands."""

        async def handle(request: web.Request) -> web.Response:
            try:
                response = await self._call(request, read)
            except ApiError as error:
                response = web.json_response(error.body, status=error.status, headers=error.headers)
            response.headers["x-request-id"] = f"req_{next(self._numbers):032x}"
            return response

        return handle

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        try:
            self._key(request)
        except ApiError as error:
            return web.json_response(error.body, status=error.status)
        models = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "openai"} for name in _MODELS]
        return web.json_response({"object": "list", "data": models})

    async def _call(self, request: web.Request, read: Callable[[web.Request], Awaitable[_Wish]]) -> web.Response:
        began_at = asyncio.get_running_loop().time()
        key = self._key(request)
        with self._shop.enter(API, key) as full:
            if full is not None:
                raise _rate_limited(full.retry_after_s)
            return await self._make(request, key, await read(request), began_at)

    def _key(self, request: web.Request) -> str:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
        self._shop.account(API, "").unauthorised += 1
        raise ApiError(401, "You didn't provide an API key.", code="invalid_api_key")

    async def _make(self, request: web.Request, key: str, wish: _Wish, began_at: float) -> web.Response:
        """The answer with what was bought, or that of a proxy in between."""
        shop, digest = self._shop, prompt_digest(wish.prompt)
        self._calls_of_prompt[digest] += 1
        among = CALL_FAULTS | ({Fault.PARTIAL} if wish.count > 1 else set())
        fault = shop.fault(API, key, f"{digest}:{self._calls_of_prompt[digest]}", among)
        match fault:
            case Fault.RATE_LIMITED:
                raise _rate_limited(1)
            case Fault.HTML:
                return web.Response(status=502, text="<html><title>502 Bad Gateway</title></html>", content_type="text/html")
            case Fault.UNSAFE:
                told = "Your request was rejected by the safety system."
                raise ApiError(400, told, kind="image_generation_user_error", code="moderation_blocked")
            case Fault.RESET:
                await asyncio.sleep(shop.behaviour.latency_s / 2)
                shop.buy(API, wish.prompt, wish.count, size=wish.size_px)
                if request.transport is not None:
                    request.transport.abort()
                return web.Response()
        if fault is Fault.ERROR:
            await shop.work(fault, began_at=began_at, size=wish.size_px)
            raise ApiError(500, "The server had an error while processing your request.", kind="server_error")
        count = wish.count // 2 if fault is Fault.PARTIAL else wish.count
        # Written within the time that the work takes: a call is to last as long as it was told to.
        answer = await self._answer(wish, shop.make(API, count, size=wish.size_px))
        await shop.work(fault, began_at=began_at, size=wish.size_px)
        shop.charge(API, wish.prompt, count)
        if fault is Fault.TIMEOUT:
            await asyncio.Event().wait()  # until the caller is gone
        return answer

    async def _answer(self, wish: _Wish, files: list[File]) -> web.Response:
        if wish.is_chat:
            return web.json_response(await asyncio.to_thread(self._chat, wish, files))
        data = await asyncio.to_thread(lambda: [self._item(wish, file) for file in files])
        if wish.is_gateway:
            usage = {"prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 100}
            return web.json_response({"data": data, "model": wish.model, "usage": usage})
        body: dict[str, Any] = {"created": int(time.time()), "data": data}
        if wish.is_gpt:
            body |= {"background": "opaque", "output_format": wish.output_format, "quality": wish.quality, "size": wish.size}
            details = {"text_tokens": 10, "image_tokens": 40}
            body["usage"] = {"total_tokens": 100, "input_tokens": 50, "output_tokens": 50, "input_tokens_details": details}
        return web.json_response(body)

    def _chat(self, wish: _Wish, files: list[File]) -> dict[str, Any]:
        """Links in the text, or images beside it, as gateways do for different models."""
        message: dict[str, Any] = {"role": "assistant", "content": "Here it is."}
        if wish.as_url:
            message["content"] = "\n".join(["Here it is:", *(f"![image]({self._shop.link(file)})" for file in files)])
        else:
            links = ["data:image/png;base64," + base64.b64encode(file.content()).decode() for file in files]
            message["images"] = [{"type": "image_url", "image_url": {"url": link}} for link in links]
        usage = {"prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 100}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": wish.model, "choices": [choice], "usage": usage}

    def _item(self, wish: _Wish, file: File) -> dict[str, str]:
        item = {"url": "", "b64_json": "", "revised_prompt": ""} if wish.is_gateway else {}
        if wish.model == "dall-e-3":
            item["revised_prompt"] = wish.prompt
        if wish.as_url:
            return item | {"url": self._shop.link(file)}
        content = _in_format(file.content(), wish.output_format)
        return item | {"b64_json": base64.b64encode(content).decode()}


def _rate_limited(seconds: int) -> ApiError:
    error = ApiError(429, "Rate limit reached for images per minute.", kind="requests", code="rate_limit_exceeded")
    error.headers = {"retry-after": str(seconds), "retry-after-ms": str(seconds * 1000)}
    return error


def _is_gpt(model: str) -> bool:
    return model.startswith(("gpt-image", "chatgpt-image"))


async def _read_generation(request: web.Request) -> _Wish:
    return _wish(await _json(request))


async def _read_edit(request: web.Request) -> _Wish:
    if request.content_type == "application/json":
        body = await _json(request)
        images = body.get("images")
        if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
            raise ApiError(400, "Missing required parameter: 'images'.", code="missing_required_parameter", param="images")
        return _wish(body)
    if not request.content_type.startswith("multipart/"):
        raise ApiError(400, f"Unsupported content type: '{request.content_type}'.", code="unsupported_content_type")
    fields, photos = await _form(request)
    wish = _wish(fields)
    if not photos:
        raise ApiError(400, "Missing required parameter: 'image'.", code="missing_required_parameter", param="image")
    if len(photos) > (1 if wish.model == "dall-e-2" else _MAX_PHOTOS):
        raise ApiError(400, "Too many images.", code="array_above_max_length", param="image")
    for photo in photos:
        if len(photo) >= _MAX_PHOTO_BYTES:
            raise ApiError(413, "The image is too large.", code="image_too_large", param="image")
        if wish.model == "dall-e-2" and not _is_square_png(photo):
            told = "Uploaded image must be a square PNG and less than 4 MB."
            raise ApiError(400, told, code="invalid_image_format", param="image")
        if not photo.startswith(_PHOTO_BEGINNINGS):
            raise ApiError(
                400, "Invalid image file.", kind="image_generation_user_error", code="invalid_image_file", param="image"
            )
    return wish


def _is_square_png(photo: bytes) -> bool:
    is_png = photo.startswith(_PHOTO_BEGINNINGS[0])
    return is_png and len(photo) < 4 * 1024 * 1024 and photo[16:20] == photo[20:24]


async def _read_chat(request: web.Request) -> _Wish:
    """One image for the last message; models named after OpenAI's answer with a link, others with the image."""
    body = await _json(request)
    messages = body.get("messages")
    message = messages[-1] if isinstance(messages, list) and messages else None
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts or not isinstance(body.get("model"), str):
        raise ApiError(400, "Missing required parameter: 'messages'.", code="missing_required_parameter", param="messages")
    return _Wish(body["model"], " ".join(texts), 1, "auto", "auto", "png", body["model"].startswith("gpt-"), is_chat=True)


async def _json(request: web.Request) -> Mapping[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.")
    return body


async def _form(request: web.Request) -> tuple[dict[str, Any], list[bytes]]:
    """The fields as they would stand in JSON, and the photos in either spelling of their field."""
    fields: dict[str, Any] = {}
    photos: list[bytes] = []
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or part.name is None:
            raise ApiError(400, "Invalid multipart body.")
        content = bytes(await part.read())
        if part.name in ("image", "image[]"):
            photos.append(content)
        elif part.name != "mask":
            text = content.decode(errors="replace")
            fields[part.name] = int(text) if part.name == "n" and re.fullmatch(r"\d{1,9}", text) else text
    return fields, photos


def _wish(body: Mapping[str, Any]) -> _Wish:
    """
    Raises:
        ApiError: a field is wrong, as the API would tell it.
    """
    model = body.get("model") or _DEFAULT_MODEL
    if not isinstance(model, str):
        raise _wrong("model", "invalid_type")
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ApiError(400, "Missing required parameter: 'prompt'.", code="missing_required_parameter", param="prompt")
    if len(prompt) > _PROMPT_CHARACTERS.get(model, _MAX_PROMPT_CHARACTERS):
        raise _wrong("prompt", "string_above_max_length")
    count = 1 if body.get("n") is None else body["n"]
    if not isinstance(count, int) or isinstance(count, bool):
        raise _wrong("n", "invalid_type")
    if not 1 <= count <= (1 if model == "dall-e-3" else _MAX_N):
        raise _wrong("n", "integer_above_max_value" if count > 1 else "integer_below_min_value")
    for problem in _problems(model, body):
        raise problem
    as_url = not _is_gpt(model) and body.get("response_format") != "b64_json"
    return _Wish(
        model,
        prompt,
        count,
        body.get("size") or "auto",
        body.get("quality") or "auto",
        body.get("output_format") or "png" if _is_gpt(model) else "png",
        as_url,
    )


def _problems(model: str, body: Mapping[str, Any]) -> Iterator[ApiError]:
    """What a model of OpenAI's own does not take; what a gateway takes nobody knows."""
    if "response_format" in body:
        if _is_gpt(model):
            yield ApiError(400, "Unknown parameter: 'response_format'.", code="unknown_parameter", param="response_format")
        if body["response_format"] not in ("url", "b64_json", None):
            yield _wrong("response_format", "invalid_value")
    if (size := body.get("size")) is not None and not _takes_size(model, size):
        yield _wrong("size", "invalid_value")
    if _is_gpt(model) and body.get("output_format", "png") not in _FORMATS:
        yield _wrong("output_format", "invalid_value")
    if _is_gpt(model) and body.get("quality", "auto") not in ("auto", "low", "medium", "high", "xhigh", "max"):
        yield _wrong("quality", "invalid_value")


def _takes_size(model: str, size: object) -> bool:
    if not isinstance(size, str):
        return False
    for beginning, sizes in _SIZES.items():
        if model.startswith(beginning):
            return size in sizes
    sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if not _is_gpt(model) or size == "auto":
        return True
    if sides is None:
        return False
    width, height = int(sides[1]), int(sides[2])
    is_fine = width % 16 == 0 and height % 16 == 0 and 1 / 3 <= width / height <= 3
    return is_fine and max(width, height) <= 3840 and min(width, height) <= 2160


def _wrong(param: str, code: str) -> ApiError:
    return ApiError(400, f"Invalid '{param}'.", code=code, param=param)


def _in_format(png: bytes, wanted: str) -> bytes:
    if wanted == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        # Without the PNG's text chunk, every file would be like every other.
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = picture.info[NUMBER_KEYWORD]
        picture.save(out, _FORMATS[wanted], exif=exif)
    return out.getvalue()
