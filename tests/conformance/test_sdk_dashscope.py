"""DashScope's own Python SDK, unchanged, against the sandbox: what it takes for DashScope is good enough to test against."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import dashscope
import pytest
import pytest_asyncio
from dashscope.aigc.image_generation import ImageGeneration
from PIL import Image

from jobdaemon.http import GuardedClient
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults

API = "dashscope"
KEY = "sk-sdk-test-0123456789"
PROMPT = "a portrait by a window"
#: Its types leave out what its classes inherit.
ImageSynthesis: Any = dashscope.ImageSynthesis
MultiModalConversation: Any = dashscope.MultiModalConversation
ASYNC = {"X-DashScope-Async": "enable"}


@pytest_asyncio.fixture
async def sandbox(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sandbox]:
    """A sandbox that makes at once, since the SDK asks once a second, and the SDK told where it is and nothing else."""
    async with Sandbox(Behaviour(latency_s=0.0, image_px=(48, 64))) as sandbox:
        monkeypatch.setattr(dashscope, "base_http_api_url", f"{sandbox.url}/api/v1")
        monkeypatch.setattr(dashscope, "api_key", KEY)
        yield sandbox


async def sdk(call: Callable[..., Any], **arguments: Any) -> Any:
    """The SDK blocks: in a thread."""
    return await asyncio.to_thread(lambda: call(**arguments))


def data_url() -> str:
    out = io.BytesIO()
    Image.new("RGB", (400, 400), "red").save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def message(*parts: dict[str, str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"text": PROMPT}]}]


async def is_picture(url: str) -> bool:
    """Whether a whole picture can be fetched there."""
    client = GuardedClient(allowed_hosts=["127.0.0.1"])
    content = (await client.download(url, max_bytes=100_000, timeout=timedelta(seconds=5))).content
    await client.close()
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
    return True


async def test_an_edit_is_called_and_waited_for(sandbox: Sandbox) -> None:
    """One call of the SDK submits, polls and gives as many links as were asked for, with prompts and usage in place."""
    answer = await sdk(
        ImageSynthesis.call, model="wan2.5-i2i-preview", prompt=PROMPT, images=[data_url()], n=2, size="1024*1024", seed=7
    )
    assert (answer.status_code, answer.output.task_status) == (200, "SUCCEEDED")
    assert [result.orig_prompt for result in answer.output.results] == [PROMPT] * 2
    assert all([await is_picture(result.url) for result in answer.output.results])
    assert answer.usage.image_count == 2
    assert answer.output.submit_time <= answer.output.end_time
    assert sandbox.report()["apis"][API]["images_bought"] == 2


async def test_older_models_of_either_path(sandbox: Sandbox) -> None:
    """The SDK picks its paths by the model's name; four images come, and cost, when nobody says how many."""
    drawn = await sdk(ImageSynthesis.call, model="wan2.2-t2i-flash", prompt=PROMPT)
    assert len(drawn.output.results) == 4
    edited = await sdk(
        ImageSynthesis.call,
        model="wanx2.1-imageedit",
        prompt=PROMPT,
        function="description_edit",
        base_image_url="https://x.example/a.png",
        n=1,
    )
    assert len(edited.output.results) == 1
    assert sandbox.report()["apis"][API]["images_bought"] == 5


async def test_a_task_can_be_fetched_and_listed(sandbox: Sandbox) -> None:
    """A submitted task has an id, passes through its states, stands in the list, and is its own account's only."""
    sandbox.behaviour.latency_s = 30
    submitted = await sdk(ImageSynthesis.async_call, model="wan2.5-t2i-preview", prompt=PROMPT, n=1)
    assert submitted.output.task_status == "PENDING"
    task_id = submitted.output.task_id
    fetched = await sdk(ImageSynthesis.fetch, task=submitted)
    assert (fetched.output.task_id, fetched.output.task_status) == (task_id, "PENDING")
    other = await sdk(ImageSynthesis.fetch, task=task_id, api_key="sk-of-another-account")
    assert (other.status_code, other.output.task_status) == (200, "UNKNOWN")

    listed = await sdk(ImageSynthesis.list, model_name="wan2.5-t2i-preview", status="PENDING", page_size=5)
    assert (listed.status_code, listed.output["total"], listed.output["total_page"]) == (200, 1, 1)
    [row] = listed.output["data"]
    assert (row["task_id"], row["status"], row["request_id"]) == (task_id, "PENDING", submitted.request_id)
    assert row["user_api_unique_key"] == "apikey:v1:aigc:text2image:image-synthesis:wan2.5-t2i-preview"
    day = await sdk(ImageSynthesis.list, start_time="20200101000000", end_time="20200102000000")
    assert (day.output["data"], day.output["total"]) == ([], 0)
    assert (await sdk(ImageSynthesis.list, start_time="yesterday")).status_code == 400


async def test_a_waiting_task_can_be_cancelled(sandbox: Sandbox) -> None:
    """A cancelled task is not made or charged, and cannot be cancelled twice."""
    sandbox.behaviour.latency_s = 30
    submitted = await sdk(ImageSynthesis.async_call, model="wan2.5-t2i-preview", prompt=PROMPT, n=1)
    assert (await sdk(ImageSynthesis.cancel, task=submitted)).status_code == 200
    again = await sdk(ImageSynthesis.cancel, task=submitted)
    assert (again.status_code, again.code) == (400, "UnsupportedOperation")
    waited = await sdk(ImageSynthesis.wait, task=submitted)
    assert waited.output.task_status == "CANCELED"
    report = sandbox.report()["apis"][API]
    assert (report["images_bought"], sandbox.shop.account(API, KEY).open) == (0, 0)


async def test_newer_models_answer_in_choices(sandbox: Sandbox) -> None:
    """Messages in, choices out: as a task, and at once."""
    submitted = await sdk(ImageGeneration.async_call, model="wan2.6-image", messages=message({"image": data_url()}), n=2)
    ended = await sdk(ImageGeneration.wait, task=submitted)
    assert (ended.output.task_status, ended.output.finished) == ("SUCCEEDED", True)
    links = [part["image"] for choice in ended.output.choices for part in choice["message"]["content"]]
    assert len(links) == 2
    assert all([await is_picture(link) for link in links])

    direct = await sdk(MultiModalConversation.call, model="qwen-image-edit-plus", messages=message({"image": data_url()}), n=3)
    [choice] = direct.output.choices
    assert len(choice.message.content) == 3
    drawn = await sdk(MultiModalConversation.call, model="z-image-turbo", messages=message())
    assert await is_picture(drawn.output.choices[0].message.content[0]["image"])
    assert sandbox.report()["apis"][API]["images_bought"] == 6


async def test_partial_and_failed_tasks(sandbox: Sandbox) -> None:
    """Half a success is a success with an error among its results; no success is a failure with a code."""
    sandbox.behaviour.faults = parse_faults("partial=1")
    partial = await sdk(ImageSynthesis.call, model="wan2.5-t2i-preview", prompt=PROMPT, n=3)
    assert partial.output.task_status == "SUCCEEDED"
    assert partial.output.task_metrics == {"TOTAL": 3, "SUCCEEDED": 2, "FAILED": 1}
    assert [result.get("code") for result in partial.output.results] == [None, None, "InternalError.Timeout"]
    assert partial.usage.image_count == 2
    sandbox.behaviour.faults = parse_faults("failed=1")
    failed = await sdk(ImageSynthesis.call, model="wan2.5-t2i-preview", prompt=PROMPT, n=3)
    assert (failed.output.task_status, failed.output.code) == ("FAILED", "InternalError.Timeout")
    sandbox.behaviour.faults = parse_faults("expired=1")
    forgotten = await sdk(ImageSynthesis.call, model="wan2.5-t2i-preview", prompt=PROMPT, n=1)
    assert forgotten.output.task_status == "UNKNOWN"
    assert sandbox.report()["apis"][API]["images_bought"] == 3


async def test_local_files_are_uploaded_first(sandbox: Sandbox, tmp_path: Path) -> None:
    """The SDK's way with a file: a policy, a signed form, and a name that only calls which say so may use."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (400, 400), "red").save(path)
    arguments = {"model": "wan2.5-i2i-preview", "prompt": PROMPT, "n": 1}
    answer = await sdk(ImageSynthesis.call, images=[f"file://{path}"], **arguments)
    assert (answer.status_code, answer.output.task_status) == (200, "SUCCEEDED")
    unknown = await sdk(ImageSynthesis.async_call, images=["oss://dashscope-instant/x/photo.png"], **arguments)
    assert (unknown.status_code, unknown.code) == (400, "InvalidURL")
    async with aiohttp.ClientSession(sandbox.url) as session:
        async with session.get("/api/v1/uploads", headers={"Authorization": f"Bearer {KEY}"}) as refused:
            assert refused.status == 400
        question = session.get("/api/v1/uploads?action=getPolicy&model=x", headers={"Authorization": f"Bearer {KEY}"})
        async with question as answered:
            policy = (await answered.json())["data"]
        form = aiohttp.FormData({"policy": policy["policy"], "key": f"{policy['upload_dir']}/a.png", "Signature": "0" * 64})
        form.add_field("file", b"x", filename="a.png")
        async with session.post(policy["upload_host"], data=form) as forged:
            assert forged.status == 403


async def test_limits_are_throttling(sandbox: Sandbox) -> None:
    """Above a key's limits the answer is 429 with a Throttling code; another key is another account."""
    sandbox.behaviour.latency_s, sandbox.behaviour.concurrency = 30, 1
    arguments = {"model": "wan2.5-t2i-preview", "prompt": PROMPT, "n": 1}
    first, second = [await sdk(ImageSynthesis.async_call, **arguments) for _ in range(2)]
    other = await sdk(ImageSynthesis.async_call, api_key="sk-of-another-account", **arguments)
    assert [answer.status_code for answer in (first, second, other)] == [200, 429, 200]
    assert second.code == "Throttling"
    sandbox.behaviour.concurrency, sandbox.behaviour.qps = None, 1
    codes = [(await sdk(ImageSynthesis.async_call, **arguments)).code for _ in range(2)]
    assert codes[-1] == "Throttling.RateQuota"
    report = sandbox.report()["apis"][API]
    assert (report["rejected"], report["peak_concurrency"]) == (2, 2)


@pytest.mark.parametrize(("fault", "status", "code"), [("429", 429, "Throttling.RateQuota"), ("500", 500, "InternalError")])
async def test_errors_are_told_as_the_service_tells_them(sandbox: Sandbox, fault: str, status: int, code: str) -> None:
    """The SDK reads status, code, message and the request's id."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    answer = await sdk(ImageSynthesis.async_call, model="wan2.5-t2i-preview", prompt=PROMPT, n=1)
    assert (answer.status_code, answer.code) == (status, code)
    assert answer.message
    assert answer.request_id


PHOTO = "data:image/png;base64,aGVsbG8="
EDIT = {"model": "wan2.5-i2i-preview", "input": {"prompt": PROMPT, "images": ["https://x.example/a.png"]}}
TEXT = {"model": "wan2.5-t2i-preview", "input": {"prompt": PROMPT}}
CHAT = {"model": "wan2.6-image", "input": {"messages": message()}}


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "code"),
    [
        ("image2image/image-synthesis", {}, EDIT, 403, "AccessDenied"),
        ("multimodal-generation/generation", ASYNC, CHAT, 403, "AccessDenied"),
        ("image2image/image-synthesis", ASYNC | {"Authorization": "Bearer "}, EDIT, 401, "InvalidApiKey"),
        ("image2image/image-synthesis", ASYNC | {"Authorization": "Basic eDp5"}, EDIT, 401, "InvalidApiKey"),
        ("text2image/image-synthesis", ASYNC, EDIT, 400, "InvalidParameter"),
        ("image-generation/generation", ASYNC, EDIT, 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"model": "gpt-image-1"}, 404, "ModelNotFound"),
        ("text2image/image-synthesis", ASYNC, [], 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, {"model": "wan2.5-t2i-preview"}, 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"input": {"prompt": " "}}, 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"parameters": {"n": 5}}, 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"parameters": {"n": "1"}}, 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"parameters": {"seed": -1}}, 400, "InvalidParameter"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"parameters": {"size": "1280x1280"}}, 400, "InvalidParameter.Size"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"parameters": {"size": "512*512"}}, 400, "InvalidParameter.Size"),
        ("text2image/image-synthesis", ASYNC, TEXT | {"parameters": {"size": "2K"}}, 400, "InvalidParameter.Size"),
        ("image2image/image-synthesis", ASYNC, EDIT | {"input": {"prompt": PROMPT}}, 400, "InvalidParameter"),
        ("image2image/image-synthesis", ASYNC, EDIT | {"input": {"prompt": PROMPT, "images": ["x"]}}, 400, "InvalidURL"),
        (
            "image2image/image-synthesis",
            ASYNC,
            EDIT | {"input": {"prompt": PROMPT, "images": [PHOTO]}},
            400,
            "InvalidParameter.FileDownload",
        ),
        ("image2image/image-synthesis", ASYNC, EDIT | {"model": "wanx2.1-imageedit"}, 400, "InvalidParameter"),
        ("image-generation/generation", ASYNC, CHAT | {"input": {"messages": message() * 2}}, 400, "InvalidParameter"),
        ("image-generation/generation", ASYNC, CHAT | {"input": {"messages": message({"text": "x"})}}, 400, "InvalidParameter"),
    ],
)
async def test_wrong_requests_are_refused(
    sandbox: Sandbox, path: str, headers: dict[str, str], body: Any, status: int, code: str
) -> None:
    """What the service does not take is refused with its own code, before any slot is taken or money spent."""
    url = f"{sandbox.url}/api/v1/services/aigc/{path}"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"} | headers) as answer,
    ):
        told = await answer.json()
    assert (answer.status, told["code"]) == (status, code)
    assert told["message"]
    assert told["request_id"]
    assert sandbox.report()["apis"].get(API, {}).get("calls", 0) == 0
