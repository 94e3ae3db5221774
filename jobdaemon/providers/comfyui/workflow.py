"""
A workflow with named placeholders, and what it becomes for one call. Pure: text in, values out.

A placeholder stands in the inputs of a node as ``{{name}}``. A value that is nothing but one placeholder becomes the value
itself, a number for instance; inside a longer text it becomes text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobdaemon.errors import SettingsError

#: Name -> what it stands for.
PLACEHOLDERS = {
    "prompt": "what the customer asked for",
    "image": "the photo, as LoadImage takes it",
    "seed": "a number that is another one for every image",
    "width": "pixels",
    "height": "pixels",
    "count": "how many images this call is to make",
    "filename_prefix": "a name that no other call has",
}
_REQUIRED = ("prompt", "image")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w{1,40})\s*\}\}")
#: Many nodes hand their seed to numpy, which takes no larger one.
_SEEDS = 2**32


@dataclass(frozen=True, slots=True)
class Workflow:
    """
    A workflow in API format.

    Attributes:
        nodes: node id -> node, placeholders and all; never changed.
    """

    nodes: Mapping[str, Any]

    def filled(self, values: Mapping[str, str | int]) -> dict[str, Any]:
        """The nodes with *values* in place of the placeholders; what a value holds is never read as a placeholder again."""
        return {number: {**node, "inputs": _filled(node["inputs"], values)} for number, node in self.nodes.items()}


def parse_workflow(text: str, *, name: str, images_per_call: int) -> Workflow:
    """
    Read a workflow and check that it can serve orders.

    Args:
        text: the file.
        name: of the file, for the error.
        images_per_call: how many images a call may ask for.

    Raises:
        SettingsError: one sentence about the first thing that is wrong.
    """
    nodes = _nodes(text, name)
    used = {found for node in nodes.values() for found in _placeholders(node["inputs"])}
    if unknown := sorted(used - PLACEHOLDERS.keys()):
        raise SettingsError(f"{name} has the placeholder {{{{{unknown[0]}}}}}, but there are only {', '.join(PLACEHOLDERS)}")
    for needed in _REQUIRED:
        if needed not in used:
            raise SettingsError(f"{name} has no {{{{{needed}}}}}: {PLACEHOLDERS[needed]} would not reach the model")
    if images_per_call > 1 and "count" not in used:
        raise SettingsError(
            f"{name} has no {{{{count}}}}, so that one call makes one image: add it, or set generate.comfyui.images_per_call to 1"
        )
    if not any(_saves_images(node["class_type"]) for node in nodes.values()):
        raise SettingsError(f"{name} has no output node that keeps images, such as SaveImage")
    return Workflow(nodes)


def seed_of(order_id: int, index: int, prompt: str) -> int:
    """
    The seed of one image: the same for its every try, another one for its siblings.

    Returns:
        From 0 to 2**32 - 1.
    """
    digest = hashlib.sha256(f"{order_id}:{index}:{prompt}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8]) % _SEEDS


def _nodes(text: str, name: str) -> dict[str, Any]:
    try:
        nodes = json.loads(text)
    except (ValueError, RecursionError):
        raise SettingsError(f"{name} is not JSON") from None
    if isinstance(nodes, dict) and isinstance(nodes.get("nodes"), list):
        raise SettingsError(f"{name} is a workflow as ComfyUI saves it, not in API format: export it with Export (API)")
    if not isinstance(nodes, dict) or not nodes:
        raise SettingsError(f"{name} is not a workflow in API format: an object of nodes")
    for number, node in nodes.items():
        is_node = isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        if not is_node:
            raise SettingsError(f"{name} is not in API format: node {number[:40]} has no class_type or no inputs")
    for number, node in nodes.items():
        for link in filter(_is_link, node["inputs"].values()):
            if link[0] not in nodes:
                raise SettingsError(f"{name} has no node {link[0][:40]}, which node {number[:40]} takes an input from")
    return nodes


def _is_link(value: object) -> bool:
    """Whether an input is ``[node id, number of its output]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def _saves_images(class_type: str) -> bool:
    """
    Whether a node keeps images where /view finds them.

    By its name: custom nodes are known to the servers alone, and these need not run when the daemon starts.
    """
    name = class_type.lower()
    return "image" in name and re.search("save|preview|output", name) is not None and "websocket" not in name


def _placeholders(value: object) -> Iterator[str]:
    match value:
        case str():
            yield from _PLACEHOLDER.findall(value)
        case list():
            for item in value:
                yield from _placeholders(item)
        case dict():
            for item in value.values():
                yield from _placeholders(item)


def _filled(value: Any, values: Mapping[str, str | int]) -> Any:
    match value:
        case str():
            whole = _PLACEHOLDER.fullmatch(value)
            return values[whole[1]] if whole else _PLACEHOLDER.sub(lambda found: str(values[found[1]]), value)
        case list():
            return [_filled(item, values) for item in value]
        case dict():
            return {key: _filled(item, values) for key, item in value.items()}
        case _:
            return value
