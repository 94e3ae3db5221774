"""
The nodes that the sandbox's ComfyUI has, and its judgement of a workflow. Pure.

Nothing is computed: of a workflow only its pictures' number and size matter here, and whether ComfyUI would run it at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Nodes = Mapping[str, Any]
Failure = dict[str, Any]
#: The model that is installed.
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
_SIDE = 16_384
_SEED = 2**64 - 1
_NUMBERS = {"INT": int, "FLOAT": float}


@dataclass(frozen=True, slots=True)
class Input:
    """
    One input of a node.

    Attributes:
        kind: ``IMAGE``, ``INT``, … as ComfyUI names types; ``*`` takes any, ``COMBO`` one of *choices*.
    """

    kind: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeType:
    """A class of nodes; *count* names the input that multiplies the pictures, *size* those that decide their size."""

    inputs: Mapping[str, Input]
    outputs: tuple[str, ...] = ()
    is_output: bool = False
    count: str | None = None
    size: tuple[str, str] | None = None


def _side(least: int = 16) -> Input:
    return Input("INT", least, _SIDE)


_IMAGE, _LATENT, _TEXT = Input("IMAGE"), Input("LATENT"), Input("STRING")
_METHODS = Input("COMBO", choices=("nearest-exact", "bilinear", "area", "bicubic", "lanczos"))
NODE_TYPES: Mapping[str, NodeType] = {
    "LoadImage": NodeType({"image": Input("FILE")}, ("IMAGE", "MASK")),
    "ImageScale": NodeType(
        {
            "image": _IMAGE,
            "upscale_method": _METHODS,
            "width": _side(0),
            "height": _side(0),
            "crop": Input("COMBO", choices=("disabled", "center")),
        },
        ("IMAGE",),
        size=("width", "height"),
    ),
    "ImageInvert": NodeType({"image": _IMAGE}, ("IMAGE",)),
    "ImageAddNoise": NodeType({"image": _IMAGE, "seed": Input("INT", 0, _SEED), "strength": Input("FLOAT", 0, 1)}, ("IMAGE",)),
    "RepeatImageBatch": NodeType({"image": _IMAGE, "amount": Input("INT", 1, 4096)}, ("IMAGE",), count="amount"),
    "EmptyImage": NodeType(
        {"width": _side(1), "height": _side(1), "batch_size": Input("INT", 1, 4096), "color": Input("INT", 0, 0xFFFFFF)},
        ("IMAGE",),
        count="batch_size",
        size=("width", "height"),
    ),
    "SaveImage": NodeType({"images": _IMAGE, "filename_prefix": _TEXT}, is_output=True),
    "PreviewImage": NodeType({"images": _IMAGE}, is_output=True),
    "PrimitiveString": NodeType({"value": _TEXT}, ("STRING",)),
    "PrimitiveStringMultiline": NodeType({"value": _TEXT}, ("STRING",)),
    "PreviewAny": NodeType({"source": Input("*")}, ("STRING",), is_output=True),
    "CheckpointLoaderSimple": NodeType({"ckpt_name": Input("COMBO", choices=(CHECKPOINT,))}, ("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": NodeType({"text": _TEXT, "clip": Input("CLIP")}, ("CONDITIONING",)),
    "VAEEncode": NodeType({"pixels": _IMAGE, "vae": Input("VAE")}, ("LATENT",)),
    "VAEDecode": NodeType({"samples": _LATENT, "vae": Input("VAE")}, ("IMAGE",)),
    "EmptyLatentImage": NodeType(
        {"width": _side(), "height": _side(), "batch_size": Input("INT", 1, 4096)},
        ("LATENT",),
        count="batch_size",
        size=("width", "height"),
    ),
    "RepeatLatentBatch": NodeType({"samples": _LATENT, "amount": Input("INT", 1, 64)}, ("LATENT",), count="amount"),
    "KSampler": NodeType(
        {
            "model": Input("MODEL"),
            "seed": Input("INT", 0, _SEED),
            "steps": Input("INT", 1, 10_000),
            "cfg": Input("FLOAT", 0, 100),
            "sampler_name": Input("COMBO", choices=("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "uni_pc")),
            "scheduler": Input("COMBO", choices=("simple", "sgm_uniform", "karras", "exponential", "normal", "beta")),
            "positive": Input("CONDITIONING"),
            "negative": Input("CONDITIONING"),
            "latent_image": _LATENT,
            "denoise": Input("FLOAT", 0, 1),
        },
        ("LATENT",),
    ),
}


@dataclass(slots=True)
class Verdict:
    """
    What ComfyUI says of a workflow.

    Attributes:
        error: why nothing of it runs; None when at least one output does.
        node_errors: by node id.
        outputs: the output nodes that run.
    """

    error: Failure | None = None
    node_errors: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


def judge(nodes: Nodes, has_file: Callable[[str], bool]) -> Verdict:
    """
    Validate a workflow.

    Args:
        has_file: whether LoadImage finds a file of that name.
    """
    for number, node in nodes.items():
        class_type = node.get("class_type") if isinstance(node, dict) else None
        if class_type not in NODE_TYPES:
            message = f"Node '{class_type}' not found. The custom node may not be installed."
            if class_type is None:
                message = f"Node '{number}' is missing the class_type property."
            return Verdict(_failure("missing_node_type", message, f"Node ID '#{number}'", node_id=number, class_type=class_type))
    outputs = [number for number, node in nodes.items() if NODE_TYPES[node["class_type"]].is_output]
    if not outputs:
        return Verdict(_failure("prompt_no_outputs", "Prompt has no outputs", ""))
    verdict = Verdict()
    for number in outputs:
        failures: dict[str, list[Failure]] = {}
        _check(nodes, number, has_file, failures, ())
        if not failures:
            verdict.outputs.append(number)
        for failed, errors in failures.items():
            known = verdict.node_errors.setdefault(
                failed, {"errors": errors, "dependent_outputs": [], "class_type": nodes[failed]["class_type"]}
            )
            known["dependent_outputs"].append(number)
    if not verdict.outputs:
        details = "\n".join(
            f"* {entry['class_type']} {number}:\n  - {error['message']}: {error['details']}"
            for number, entry in verdict.node_errors.items()
            for error in entry["errors"]
        )
        verdict.error = _failure("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
    return verdict


def _check(
    nodes: Nodes,
    number: str,
    has_file: Callable[[str], bool],
    failures: dict[str, list[Failure]],
    path: tuple[str, ...],
) -> None:
    """Judge a node and all that it depends on."""
    node = nodes[number]
    given = node.get("inputs", {})
    errors = failures.setdefault(number, [])
    for name, wanted in NODE_TYPES[node["class_type"]].inputs.items():
        if name not in given:
            errors.append(_failure("required_input_missing", "Required input is missing", name, input_name=name))
            continue
        value = given[name]
        if isinstance(value, list):
            _check_link(nodes, name, wanted, value, has_file, failures, (*path, number))
        elif (error := _value_error(name, wanted, value, has_file)) is not None:
            errors.append(error)
    if not errors:
        del failures[number]


def _check_link(
    nodes: Nodes,
    name: str,
    wanted: Input,
    link: list[Any],
    has_file: Callable[[str], bool],
    failures: dict[str, list[Failure]],
    path: tuple[str, ...],
) -> None:
    errors = failures[path[-1]]
    if len(link) != 2 or link[0] not in nodes:
        text = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
        errors.append(_failure("bad_linked_input", text, name, input_name=name))
        return
    if link[0] in path:
        text = "Dependency cycle detected"
        errors.append(_failure("dependency_cycle", text, " -> ".join((*path, link[0]))))
        return
    offered = NODE_TYPES[nodes[link[0]]["class_type"]].outputs
    received = offered[link[1]] if isinstance(link[1], int) and 0 <= link[1] < len(offered) else "?"
    if wanted.kind not in ("*", received):
        details = f"{name}, received_type({received}) mismatch input_type({wanted.kind})"
        text = "Return type mismatch between linked nodes"
        errors.append(_failure("return_type_mismatch", text, details, input_name=name))
        return
    if link[0] not in failures:
        _check(nodes, link[0], has_file, failures, path)


def _value_error(name: str, wanted: Input, value: Any, has_file: Callable[[str], bool]) -> Failure | None:
    """What is wrong with a value that is written in the workflow itself."""
    if wanted.kind == "FILE":
        if isinstance(value, str) and has_file(value):
            return None
        details = f"{name} - Invalid image file: {value}"
        return _failure("custom_validation_failed", "Custom validation failed for node", details, input_name=name)
    if wanted.kind == "COMBO":
        if value in wanted.choices:
            return None
        details = f"{name}: '{value}' not in {list(wanted.choices)}"
        return _failure("value_not_in_list", "Value not in list", details, input_name=name, received_value=value)
    if wanted.kind not in _NUMBERS:
        return None
    try:
        number = _NUMBERS[wanted.kind](value)
    except (ValueError, TypeError):
        details = f"{name}, {value}, invalid literal"
        text = f"Failed to convert an input value to a {wanted.kind} value"
        return _failure("invalid_input_type", text, details, input_name=name)
    if wanted.least is not None and number < wanted.least:
        text = f"Value {number} smaller than min of {wanted.least}"
        return _failure("value_smaller_than_min", text, name, input_name=name)
    if wanted.most is not None and number > wanted.most:
        text = f"Value {number} bigger than max of {wanted.most}"
        return _failure("value_bigger_than_max", text, name, input_name=name)
    return None


def _failure(kind: str, message: str, details: str, **extra: Any) -> Failure:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def pictures(nodes: Nodes, number: str) -> tuple[int, tuple[int, int] | None]:
    """How many pictures a node gives, and their width and height where the workflow decides it."""
    node = nodes[number]
    kind, inputs = NODE_TYPES[node["class_type"]], node.get("inputs", {})
    count, size = 1, None
    for name, value in inputs.items():
        if name in kind.inputs and kind.inputs[name].kind in ("IMAGE", "LATENT") and isinstance(value, list):
            before, size = pictures(nodes, value[0])
            count *= before
    if kind.count is not None:
        count *= int(inputs[kind.count])
    if kind.size is not None:
        width, height = (int(inputs[name]) for name in kind.size)
        size = (width or height or 512, height or width or 512)
    return count, size


def signature(nodes: Nodes, number: str, file_digest: Callable[[str], str]) -> str:
    """The same for nodes that must give the same result: ComfyUI runs only the first of them."""
    node = nodes[number]
    inputs = {
        name: signature(nodes, value[0], file_digest) + f":{value[1]}" if isinstance(value, list) else value
        for name, value in node.get("inputs", {}).items()
    }
    if node["class_type"] == "LoadImage":
        inputs["image"] = file_digest(str(inputs["image"]))
    return hashlib.sha256(json.dumps([node["class_type"], inputs], sort_keys=True).encode()).hexdigest()


def wish(nodes: Nodes) -> str:
    """What the workflow's pictures are to show: the first text of a node that takes one."""
    for node in nodes.values():
        for name in ("text", "value"):
            text = node.get("inputs", {}).get(name)
            if isinstance(text, str) and text.strip():
                return text
    return ""


def object_info(class_type: str) -> dict[str, Any]:
    """The answer of /object_info for one class; empty when it is unknown."""
    kind = NODE_TYPES.get(class_type)
    if kind is None:
        return {}
    return {
        class_type: {
            "input": {"required": {name: _described(wanted) for name, wanted in kind.inputs.items()}},
            "input_order": {"required": list(kind.inputs)},
            "output": list(kind.outputs),
            "output_is_list": [False] * len(kind.outputs),
            "output_name": list(kind.outputs),
            "name": class_type,
            "display_name": class_type,
            "description": "",
            "python_module": "nodes",
            "category": "sandbox",
            "output_node": kind.is_output,
        }
    }


def _described(wanted: Input) -> list[Any]:
    if wanted.kind == "FILE":
        return [[], {"image_upload": True}]
    if wanted.kind == "COMBO":
        return [list(wanted.choices)]
    bounds = {name: value for name, value in (("min", wanted.least), ("max", wanted.most)) if value is not None}
    return [wanted.kind, bounds] if bounds else [wanted.kind]
