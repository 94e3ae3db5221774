"""
The sandbox's ComfyUI, used as ComfyUI's users use the real one.

There is no official Python SDK; ComfyUI shows by example how to use it: urllib for the calls, websocket-client for the events.
The client here does the same, knows nothing of the provider, and is given plain workflows. The rest looks at the API's own words.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import websocket
from PIL import Image

from jobdaemon.sandbox import Behaviour, Sandbox
from jobdaemon.sandbox.comfyui_nodes import NODE_TYPES

IMG2IMG = Path(__file__).parents[2] / "config" / "comfyui-img2img.json"
#: Text to image as the example of ComfyUI has it: a sampler between a model, two texts and an empty latent.
TEXT_TO_IMAGE: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
            "seed": 5,
            "steps": 20,
            "cfg": 8,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1,
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 96, "batch_size": 2}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a person by the sea", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "hands", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "example"}},
}


class ExampleClient:
    """Calls one server and waits for its events, with nothing but urllib and websocket-client."""

    def __init__(self, server: str, prefix: str = "") -> None:
        self.base = f"{server}{prefix}"
        self.client_id = str(uuid.uuid4())

    def get(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.base}{path}?{urllib.parse.urlencode(query)}", timeout=10) as response:
            return json.loads(response.read())

    def post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(f"{self.base}{path}", data=json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read() or b"null")

    def queue(self, nodes: dict[str, Any], **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.post("/prompt", {"prompt": nodes, "client_id": self.client_id, **more})
        return answer

    def image(self, file: dict[str, str]) -> bytes:
        with urllib.request.urlopen(f"{self.base}/view?{urllib.parse.urlencode(file)}", timeout=10) as response:
            content: bytes = response.read()
            return content

    def upload(self, name: str, content: bytes, **fields: str) -> dict[str, str]:
        boundary = uuid.uuid4().hex
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{fields[key]}\r\n' for key in fields]
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        )
        body = "".join([*parts, head]).encode() + content + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.base}/upload/image", body, headers), timeout=10) as response:
            answer: dict[str, str] = json.loads(response.read())
            return answer

    def connect(self) -> websocket.WebSocket:
        return websocket.create_connection(f"ws{self.base.removeprefix('http')}/ws?clientId={self.client_id}", timeout=10)

    def run(self, nodes: dict[str, Any]) -> tuple[list[bytes], list[dict[str, Any]]]:
        """The images of a prompt, and every event until it was over."""
        socket = self.connect()
        events: list[dict[str, Any]] = []
        try:
            prompt_id = self.queue(nodes)["prompt_id"]
            while True:
                frame = socket.recv()
                if not isinstance(frame, str):
                    continue
                events.append(json.loads(frame))
                data = events[-1]["data"]
                if events[-1]["type"] == "executing" and data["node"] is None and data["prompt_id"] == prompt_id:
                    break
        finally:
            socket.close()
        outputs = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return [self.image(file) for output in outputs.values() for file in output.get("images", [])], events


@pytest.fixture
def behaviour() -> Behaviour:
    """Changed by tests while the sandbox runs."""
    return Behaviour(latency_s=0.02)


@pytest.fixture
def server(behaviour: Behaviour) -> Iterator[Sandbox]:
    """A sandbox in a thread of its own: the client waits as plain programs do."""
    started: Future[tuple[Sandbox, Callable[[], object]]] = Future()

    async def serve() -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        async with Sandbox(behaviour) as sandbox:
            started.set_result((sandbox, lambda: loop.call_soon_threadsafe(stopping.set)))
            await stopping.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    sandbox, stop = started.result(10)
    yield sandbox
    stop()
    thread.join(10)


@pytest.fixture
def client(server: Sandbox) -> ExampleClient:
    """A client of one of its servers."""
    return ExampleClient(f"{server.url}/comfyui/one")


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_the_example_runs(server: Sandbox, prefix: str) -> None:
    """Queue, listen, look into the history, fetch: with and without the prefix, and all of it in the documented words."""
    images, events = ExampleClient(f"{server.url}/comfyui/one", prefix).run(TEXT_TO_IMAGE)
    assert [Image.open(io.BytesIO(content)).size for content in images] == [(64, 96)] * 2
    kinds = [event["type"] for event in events]
    assert kinds[0] == "status"
    assert events[0]["data"]["sid"]
    assert [kind for kind in kinds if kind != "status"] == [
        "execution_start",
        "execution_cached",
        "executing",
        *["progress"] * 4,
        "executed",
        "execution_success",
        "executing",
    ]


def test_a_photo_goes_in_by_its_given_name(client: ExampleClient) -> None:
    """What an upload returns is what LoadImage takes, also in a subfolder; another content under the same name gets another."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    stored = client.upload("a.png", content.getvalue(), type="input", subfolder="people")
    assert stored == {"name": "a.png", "subfolder": "people", "type": "input"}
    assert client.upload("a.png", content.getvalue(), type="input", subfolder="people") == stored
    other = client.upload("a.png", b"another", type="input", subfolder="people")
    assert other["name"] == "a (1).png"
    assert client.upload("a.png", b"another", type="input", subfolder="people", overwrite="true")["name"] == "a.png"
    values = {
        "{{image}}": "people/a (1).png",
        "{{prompt}}": "x",
        "{{width}}": 64,
        "{{height}}": 64,
        "{{count}}": 1,
        "{{seed}}": 1,
    }
    nodes = json.loads(IMG2IMG.read_text())
    for node in nodes.values():
        node["inputs"] = {name: values.get(str(value), value) for name, value in node["inputs"].items()}
    images, _ = client.run(nodes)
    assert len(images) == 1


def test_an_identical_prompt_is_not_computed_again(client: ExampleClient, server: Sandbox) -> None:
    """The same nodes give their old files; a new prefix only saves again; a new seed is a new picture."""
    first, _ = client.run(TEXT_TO_IMAGE)
    again, events = client.run(TEXT_TO_IMAGE)
    assert again == first
    assert [event["data"]["nodes"] for event in events if event["type"] == "execution_cached"] == [["9"]]
    renamed = json.loads(json.dumps(TEXT_TO_IMAGE))
    renamed["9"]["inputs"]["filename_prefix"] = "other/name"
    assert client.run(renamed)[0] == first
    renamed["3"]["inputs"]["seed"] = 6
    assert client.run(renamed)[0] != first
    assert server.shop.report()["comfyui"]["images_bought"] == 4
    last = list(client.get("/history", max_items=1).values())
    assert last[0]["outputs"]["9"]["images"][0] == {"filename": "name_00003_.png", "subfolder": "other", "type": "output"}


def _refusal(call: Callable[[], object]) -> tuple[int, Any]:
    with pytest.raises(urllib.error.HTTPError) as refused:
        call()
    with refused.value as answer:
        body = answer.read()
        return answer.code, json.loads(body) if body.startswith(b"{") else body.decode()


def _changed(number: str, **inputs: Any) -> dict[str, Any]:
    nodes: dict[str, Any] = json.loads(json.dumps(TEXT_TO_IMAGE))
    nodes[number]["inputs"] |= inputs
    return nodes


@pytest.mark.parametrize(
    ("nodes", "kind", "node_kind"),
    [
        ({}, "prompt_no_outputs", None),
        ({"1": {"class_type": "Nobodys", "inputs": {}}}, "missing_node_type", None),
        ({"1": {"inputs": {}}}, "missing_node_type", None),
        (_changed("4", ckpt_name="absent.safetensors"), None, "value_not_in_list"),
        (_changed("3", steps=0), None, "value_smaller_than_min"),
        (_changed("3", denoise=1.5), None, "value_bigger_than_max"),
        (_changed("3", seed="x"), None, "invalid_input_type"),
        (_changed("3", model=["99", 0]), None, "bad_linked_input"),
        (_changed("3", model=["5", 0]), None, "return_type_mismatch"),
        (_changed("8", samples=["8", 0]), None, "dependency_cycle"),
        ({"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}, None, "required_input_missing"),
        (
            {
                "1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            },
            None,
            "custom_validation_failed",
        ),
    ],
)
def test_a_workflow_that_cannot_run_is_400(client: ExampleClient, nodes: dict[str, Any], kind: str, node_kind: str) -> None:
    """Each fault has ComfyUI's own type, of the prompt or of a node, and nothing is queued."""
    status, body = _refusal(lambda: client.queue(nodes))
    assert status == 400
    assert body["error"]["type"] == (kind or "prompt_outputs_failed_validation")
    assert {error["type"] for node in body["node_errors"].values() for error in node["errors"]} == ({node_kind} - {None})
    assert client.get("/prompt") == {"exec_info": {"queue_remaining": 0}}


def test_a_prompt_needs_a_body_and_may_bring_an_id(client: ExampleClient) -> None:
    """No prompt and an id that is no canonical UUID are 400, a body that is no JSON is 500, a good id is kept."""
    assert _refusal(lambda: client.post("/prompt", {}))[1]["error"]["type"] == "no_prompt"
    wrong = str(uuid.uuid4()).upper()
    assert _refusal(lambda: client.queue(TEXT_TO_IMAGE, prompt_id=wrong))[1]["error"]["type"] == "invalid_prompt_id"
    assert _refusal(lambda: client.post("/prompt", "text"))[0] == 500
    own = str(uuid.uuid4())
    assert client.queue(TEXT_TO_IMAGE, prompt_id=own) == {"prompt_id": own, "number": 0, "node_errors": {}}


def test_one_prompt_at_a_time(client: ExampleClient, behaviour: Behaviour) -> None:
    """The others wait in the queue, by number; they can be deleted, and what runs interrupted, each by its id only."""
    behaviour.latency_s = 30.0
    ids = [client.queue(_changed("3", seed=seed))["prompt_id"] for seed in range(3)]
    urgent = client.queue(_changed("3", seed=9), front=True)["prompt_id"]
    queue = client.get("/queue")
    assert [row[1] for row in queue["queue_running"]] == ids[:1]
    assert [row[1] for row in queue["queue_pending"]] == [urgent, *ids[1:]]
    assert queue["queue_running"][0][2:] == [_changed("3", seed=0), {"client_id": client.client_id}, ["9"]]
    client.post("/queue", {"delete": [ids[1], "unknown"]})
    client.post("/interrupt", {"prompt_id": ids[2]})
    assert client.get("/prompt") == {"exec_info": {"queue_remaining": 3}}
    socket = client.connect()
    try:
        client.post("/interrupt", {"prompt_id": ids[0]})
        while (event := json.loads(socket.recv()))["type"] != "execution_interrupted":
            pass
        assert event["data"]["prompt_id"] == ids[0]
    finally:
        socket.close()
    status = client.get(f"/history/{ids[0]}")[ids[0]]["status"]
    assert (status["status_str"], status["completed"], status["messages"][-1][0]) == ("error", False, "execution_interrupted")
    client.post("/queue", {"clear": True})
    client.post("/interrupt", {})
    assert client.get(f"/history/{uuid.uuid4()}") == {}
    client.post("/history", {"delete": [ids[0]]})
    assert client.get(f"/history/{ids[0]}") == {}


def test_files_and_facts(client: ExampleClient) -> None:
    """A missing file is 404, one outside the folder 400 or 403; the server describes itself and its nodes."""
    for path, status in (("a.png", 404), ("../a.png", 400), ("/etc/passwd", 400)):
        assert _refusal(partial(client.image, {"filename": path}))[0] == status
    assert _refusal(lambda: client.image({"filename": "a.png", "subfolder": "../.."}))[0] == 403
    assert client.get("/system_stats")["devices"][0]["type"] == "cuda"
    assert client.get("/object_info/Nobodys") == {}
    assert client.get("/object_info").keys() == NODE_TYPES.keys()
    loader = client.get("/object_info/CheckpointLoaderSimple")["CheckpointLoaderSimple"]
    assert loader["input"]["required"]["ckpt_name"] == [["v1-5-pruned-emaonly.safetensors"]]
    assert loader["output"] == ["MODEL", "CLIP", "VAE"]
