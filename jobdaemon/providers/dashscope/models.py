"""
The model decides where a request goes and what it looks like.

Sources: Alibaba Cloud's references of the image models (wan2-5-image-edit-api-reference, wan-image-generation-api-reference,
text-to-image-v2-api-reference, qwen-image-api, qwen-image-edit-api) and the Python SDK's choice of paths, read 2026-11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from jobdaemon.errors import SettingsError
from jobdaemon.ports import GenerateRequest
from jobdaemon.providers.photo_fit import PhotoBounds

_MAX_SEED = 2_147_483_647
_MARK_BITS = 24
#: What an order may say about its images; everything else in its parameters is for other providers.
_ORDER_PARAMETERS = ("prompt_extend", "watermark")


class Form(StrEnum):
    """Where prompt and photo stand in a request."""

    #: ``input.prompt``; no photo
    PROMPT = "prompt"
    #: ``input.prompt`` and ``input.images``
    IMAGES = "images"
    #: ``input.prompt``, ``input.base_image_url`` and a function
    BASE_IMAGE = "base_image"
    #: ``input.messages``
    MESSAGES = "messages"


#: 10 MB in every reference, which may be counted in thousands.
_MAX_PHOTO_BYTES = 10_000_000
_ANY_PHOTO = PhotoBounds(_MAX_PHOTO_BYTES)
_WAN25_PHOTO = PhotoBounds(_MAX_PHOTO_BYTES, longest_side=5000, shortest_side=384)
_WAN26_PHOTO = PhotoBounds(_MAX_PHOTO_BYTES, longest_side=8000, shortest_side=240)
_QWEN_PHOTO = PhotoBounds(_MAX_PHOTO_BYTES, longest_side=3072, shortest_side=384)
#: Its reference could not be read; a smaller photo than it might take does no harm.
_WANX_PHOTO = PhotoBounds(_MAX_PHOTO_BYTES, longest_side=4096)


@dataclass(frozen=True, slots=True)
class Route:
    """
    How a family of models is called.

    Attributes:
        path: below ``/api/v1/services/aigc/``.
        is_async: it makes tasks, and refuses calls without ``X-DashScope-Async``; else it answers when it is done and refuses
            calls with it.
        takes_photo: otherwise it makes images of the prompt alone.
        max_images: most ``n`` of one call.
        photo: what a photo may be.
    """

    path: str
    is_async: bool
    form: Form
    takes_photo: bool
    max_images: int = 4
    photo: PhotoBounds = _ANY_PHOTO

    @property
    def tells_prompts(self) -> bool:
        """Whether a finished task repeats the prompt that it was made of (``orig_prompt``)."""
        return self.is_async and self.form is not Form.MESSAGES


_TEXT_TASK = Route("text2image/image-synthesis", is_async=True, form=Form.PROMPT, takes_photo=False)
_MESSAGE_TASK = Route("image-generation/generation", is_async=True, form=Form.MESSAGES, takes_photo=True, photo=_WAN26_PHOTO)
_DIRECT = "multimodal-generation/generation"

#: Beginning of a model's name -> its route; the longest one counts, so that dated versions go with their model.
ROUTES: Mapping[str, Route] = {
    "wan2.5-i2i": Route("image2image/image-synthesis", is_async=True, form=Form.IMAGES, takes_photo=True, photo=_WAN25_PHOTO),
    "wanx2.1-imageedit": Route(
        "image2image/image-synthesis", is_async=True, form=Form.BASE_IMAGE, takes_photo=True, photo=_WANX_PHOTO
    ),
    "wan2.6-image": _MESSAGE_TASK,
    "wan2.7-image": _MESSAGE_TASK,
    "qwen-image-3.0": replace(_MESSAGE_TASK, photo=_QWEN_PHOTO),
    "qwen-image-2.0": Route(_DIRECT, is_async=False, form=Form.MESSAGES, takes_photo=True, photo=_QWEN_PHOTO),
    "qwen-image-edit-max": Route(_DIRECT, is_async=False, form=Form.MESSAGES, takes_photo=True, photo=_QWEN_PHOTO),
    "qwen-image-edit-plus": Route(_DIRECT, is_async=False, form=Form.MESSAGES, takes_photo=True, photo=_QWEN_PHOTO),
    "qwen-image-edit": Route(_DIRECT, is_async=False, form=Form.MESSAGES, takes_photo=True, photo=_QWEN_PHOTO, max_images=1),
    "wan2.6-t2i": Route("image-generation/generation", is_async=True, form=Form.MESSAGES, takes_photo=False),
    "wan2.5-t2i": _TEXT_TASK,
    "wan2.2-t2i": _TEXT_TASK,
    "wanx2.1-t2i": _TEXT_TASK,
    "wanx2.0-t2i": _TEXT_TASK,
    "wanx-v1": _TEXT_TASK,
    "qwen-image": Route("text2image/image-synthesis", is_async=True, form=Form.PROMPT, takes_photo=False, max_images=1),
    "qwen-image-max": Route(_DIRECT, is_async=False, form=Form.MESSAGES, takes_photo=False, max_images=1),
    "z-image": Route(_DIRECT, is_async=False, form=Form.MESSAGES, takes_photo=False, max_images=1),
}


def route_of(model: str) -> Route:
    """
    The route of *model*.

    Raises:
        SettingsError: of a family that is not in the table.
    """
    known = [beginning for beginning in ROUTES if model.startswith(beginning)]
    if not known:
        raise SettingsError(f"generate.dashscope.model: {model!r} is no known model; known are {', '.join(sorted(ROUTES))}")
    return ROUTES[max(known, key=len)]


def mark(request: GenerateRequest, indexes: Sequence[int]) -> str:
    """
    Blanks for the end of a prompt that tell one call from all others: the same order, photo and images give the same ones.

    A finished task repeats its prompt, and nothing else of it tells whose it is: most orders have the same prompts.
    """
    name = f"{request.order_id}:{request.photo.sha256}:{','.join(map(str, indexes))}"
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[: _MARK_BITS // 8])
    return "".join("\n" if number >> bit & 1 else " " for bit in range(_MARK_BITS))


def body_of(
    route: Route,
    model: str,
    request: GenerateRequest,
    *,
    prompt: str,
    photo: str | None,
    images: Sequence[tuple[int, int]],
    size: str | None,
    negative_prompt: str | None,
) -> dict[str, Any]:
    """
    What is sent.

    Args:
        prompt: with its mark, where the route tells prompts.
        photo: an https or ``data:`` URL; None where the route takes none.
        images: those of *request* that are asked for, ``(index, ordinal)``.
    """
    # Always n: most models make, and charge for, four when it is left out.
    parameters: dict[str, Any] = {"n": len(images)}
    parameters |= {name: request.params[name] for name in _ORDER_PARAMETERS if isinstance(request.params.get(name), bool)}
    seed = request.params.get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool):
        # Not the same one for what is asked for a second time: it would be the picture that is there already.
        parameters["seed"] = (seed + images[0][1]) % (_MAX_SEED + 1)
    if size is not None:
        parameters["size"] = size
    content: dict[str, Any]
    if route.form is Form.MESSAGES:
        parts = [{"text": prompt}] if photo is None else [{"image": photo}, {"text": prompt}]
        content = {"messages": [{"role": "user", "content": parts}]}
        if negative_prompt is not None:
            parameters["negative_prompt"] = negative_prompt
    else:
        content = {"prompt": prompt}
        if negative_prompt is not None:
            content["negative_prompt"] = negative_prompt
        if route.form is Form.IMAGES:
            content["images"] = [photo]
        elif route.form is Form.BASE_IMAGE:
            content |= {"function": "description_edit", "base_image_url": photo}
    return {"model": model, "input": content, "parameters": parameters}
