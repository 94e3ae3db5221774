"""Workflows with placeholders: what is accepted at start, and what a call makes of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobdaemon.errors import SettingsError
from jobdaemon.providers.comfyui.workflow import PLACEHOLDERS, parse_workflow, seed_of

CONFIG = Path(__file__).parents[2] / "config"
VALUES: dict[str, str | int] = {
    "prompt": "a portrait",
    "image": "jobdaemon/a.png",
    "seed": 7,
    "width": 64,
    "height": 96,
    "count": 2,
    "filename_prefix": "jobdaemon/1-001-abc",
}


def _nodes(**inputs: Any) -> dict[str, Any]:
    given = {"text": "{{prompt}}", "image": "{{image}}", "amount": "{{count}}"} | inputs
    return {"1": {"class_type": "Any", "inputs": given}, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}


def _refusal(nodes: object, *, images_per_call: int = 1) -> str:
    text = nodes if isinstance(nodes, str) else json.dumps(nodes)
    with pytest.raises(SettingsError) as refused:
        parse_workflow(text, name="flow.json", images_per_call=images_per_call)
    return str(refused.value)


def test_a_whole_value_is_typed_and_a_part_is_text() -> None:
    """A value that is one placeholder becomes the value itself, one inside a text becomes text, at any depth."""
    nodes = _nodes(seed="{{seed}}", name="{{ seed }}x{{width}}", deep=[{"a": ["{{height}}"]}], plain=1.5)
    filled = parse_workflow(json.dumps(nodes), name="x", images_per_call=2).filled(VALUES)
    inputs = filled["1"]["inputs"]
    assert (inputs["seed"], inputs["name"], inputs["deep"], inputs["plain"]) == (7, "7x64", [{"a": [96]}], 1.5)
    assert (inputs["text"], inputs["image"], inputs["amount"]) == ("a portrait", "jobdaemon/a.png", 2)
    assert filled["2"] == nodes["2"]


@given(st.text())
def test_a_prompt_is_never_read_as_a_placeholder(prompt: str) -> None:
    """What a customer writes arrives as it was written, whatever it holds."""
    workflow = parse_workflow(json.dumps(_nodes(more="so: {{prompt}}")), name="x", images_per_call=1)
    for text in (prompt, f"{prompt}{{{{image}}}}\\1"):
        inputs = workflow.filled(VALUES | {"prompt": text})["1"]["inputs"]
        assert (inputs["text"], inputs["more"]) == (text, f"so: {text}")


def test_filling_leaves_the_workflow_alone() -> None:
    """Two calls get their own values from one workflow."""
    workflow = parse_workflow(json.dumps(_nodes()), name="x", images_per_call=1)
    first, second = workflow.filled(VALUES), workflow.filled(VALUES | {"prompt": "another"})
    assert (first["1"]["inputs"]["text"], second["1"]["inputs"]["text"]) == ("a portrait", "another")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "API format"),
        ({}, "API format"),
        ({"nodes": [], "links": []}, "Export (API)"),
        ({"1": {"class_type": "SaveImage"}}, "node 1 has no class_type or no inputs"),
        (_nodes(text="fixed"), "has no {{prompt}}"),
        (_nodes(image="fixed.png"), "has no {{image}}"),
        (_nodes(text="{{promt}} {{prompt}}"), "has the placeholder {{promt}}"),
        (_nodes(model=["9", 0]), "has no node 9"),
        ({"1": _nodes()["1"]}, "no output node"),
        ({"1": _nodes()["1"], "2": {"class_type": "SaveImageWebsocket", "inputs": {}}}, "no output node"),
        ({"1": _nodes()["1"], "2": {"class_type": "PreviewAny", "inputs": {}}}, "no output node"),
    ],
)
def test_a_workflow_that_cannot_serve_is_refused_at_start(nodes: object, words: str) -> None:
    """Each fault of a workflow is one sentence that names the file and what is missing."""
    refusal = _refusal(nodes)
    assert refusal.startswith("flow.json ")
    assert words in refusal
    assert "\n" not in refusal


def test_a_batch_needs_a_count() -> None:
    """More than one image per call needs {{count}}."""
    nodes = _nodes(amount=1)
    assert "{{count}}" in _refusal(nodes, images_per_call=2)
    parse_workflow(json.dumps(nodes), name="x", images_per_call=1)


def test_a_title_is_no_input() -> None:
    """A placeholder counts where it is filled in: in the inputs."""
    nodes = _nodes(text="fixed")
    nodes["1"]["_meta"] = {"title": "{{prompt}}"}
    assert "has no {{prompt}}" in _refusal(nodes)


@pytest.mark.parametrize("name", ["comfyui-example.json", "comfyui-img2img.json"])
def test_the_shipped_workflows_are_accepted(name: str) -> None:
    """What the documentation offers works, and uses every placeholder there is."""
    text = (CONFIG / name).read_text()
    filled = json.dumps(parse_workflow(text, name=name, images_per_call=5).filled(VALUES))
    assert "{{" not in filled
    assert all(f"{{{{{placeholder}}}}}" in text for placeholder in PLACEHOLDERS)


def test_a_retry_has_its_seed_again_and_siblings_have_others() -> None:
    """The seed follows from order, index and prompt, and is small enough for numpy."""
    seeds = {seed_of(order, index, prompt) for order in (1, 2) for index in range(1, 71) for prompt in ("a", "b")}
    assert len(seeds) == 2 * 70 * 2
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of(1, 1, "a") == seed_of(1, 1, "a")


def test_the_documented_placeholders_are_those_there_are() -> None:
    """The table of docs/providers.md lists every placeholder once."""
    table = (CONFIG.parent / "docs" / "providers.md").read_text().partition("<!-- placeholders -->")[2].partition("<!--")[0]
    assert re.findall(r"^\| `\{\{(\w+)\}\}` \|", table, re.MULTILINE) == list(PLACEHOLDERS)
