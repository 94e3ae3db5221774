"""
Images by way of a chat: the form in which gateways offer models that talk and draw, such as Gemini's. Pure.

    {"choices": [{"message": {"images": [{"image_url": {"url": …}}]}}]}         beside the text
    … "content": [{"type": "image_url", …} | {"inline_data": {"data": …}}]       as a part of it
    … "content": "… ![…](https://… or data:…) …"                                written in it, or nothing but a link

Sources, read 2026-11-22: openrouter.ai/docs/features/multimodal/image-generation, vercel.com/docs/ai-gateway/openai-compat/
image-generation; the other forms from public client code.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

_WRITTEN = re.compile(r"!\[[^\]]*\]\(\s*<?(https?://[^\s)>]+|data:image/[^\s)>]+)")
_BARE = re.compile(r"https?://[^\s<>\"')\]]+?\.(?:png|jpe?g|webp)(?:\?[^\s<>\"')\]]*[^\s<>\"')\].,;:!?])?", re.IGNORECASE)


def request_body(model: str, prompt: str, photo: tuple[bytes, str] | None) -> Mapping[str, Any]:
    """
    What asks for one image.

    Args:
        photo: its bytes and media type.
    """
    content: str | list[dict[str, Any]] = prompt
    if photo is not None:
        link = f"data:{photo[1]};base64,{base64.b64encode(photo[0]).decode()}"
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": link}}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "stream": False}


def images_and_words(body: Mapping[str, Any]) -> tuple[list[str], str]:
    """
    The images of an answer, as links or ``data:`` URLs, each once; and what the model said.

    The first form that holds any is believed: others repeat it.
    """
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(message, dict):
        return [], ""
    content = message.get("content")
    words = content if isinstance(content, str) else " ".join(_texts(content))
    for found in (_links(message.get("images")), _links(content), _written(words)):
        if links := list(dict.fromkeys(found)):
            return links, words
    return [], words


def _parts(value: object) -> Iterator[dict[str, Any]]:
    for part in value if isinstance(value, list) else ():
        if isinstance(part, dict):
            yield part


def _texts(content: object) -> Iterator[str]:
    for part in _parts(content):
        if isinstance(text := part.get("text"), str):
            yield text


def _links(value: object) -> Iterator[str]:
    """Of parts that are images."""
    for part in _parts(value):
        image = part.get("image_url")
        link = image.get("url") if isinstance(image, dict) else image
        inline = part.get("inline_data") or part.get("inlineData")
        if isinstance(link, str) and link.startswith(("https://", "http://", "data:")):
            yield link
        elif isinstance(inline, dict) and isinstance(data := inline.get("data"), str) and data:
            yield f"data:image/png;base64,{data}"


def _written(words: str) -> Iterator[str]:
    if words.strip().startswith("data:image/"):
        yield words.strip()
        return
    if written := _WRITTEN.findall(words):
        yield from written
        return
    yield from _BARE.findall(words)
