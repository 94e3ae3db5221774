"""Volcengine's own Python SDK, unchanged, against the sandbox: what it takes for Jimeng is good enough to test against."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from PIL import Image
from volcengine.visual.VisualService import VisualService

from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults

API = "jimeng"
PROMPT = "a portrait by a window"
V40 = {"req_key": "jimeng_t2i_v40", "prompt": PROMPT, "force_single": True}


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one with small pictures."""
    async with Sandbox(Behaviour(latency_s=0.02, image_px=(48, 64))) as sandbox:
        yield sandbox


class Sdk:
    """The SDK's visual service, told where to go and which key to use; its calls block, so each has a thread."""

    def __init__(self, service: Any) -> None:
        self.service = service

    async def submit(self, form: dict[str, Any]) -> dict[str, Any]:
        return dict(await asyncio.to_thread(self.service.cv_sync2async_submit_task, form))

    async def result(self, form: dict[str, Any]) -> dict[str, Any]:
        return dict(await asyncio.to_thread(self.service.cv_sync2async_get_result, form))

    async def cancel(self, form: dict[str, Any]) -> dict[str, Any]:
        return dict(await asyncio.to_thread(self.service.cv_cancel_task, form))

    async def task(self, **form: Any) -> str:
        """The id of a new task."""
        answer = await self.submit(V40 | form)
        assert (answer["code"], answer["status"], answer["message"]) == (10000, 10000, "Success")
        assert answer["request_id"]
        assert answer["time_elapsed"].endswith("ms")
        return str(answer["data"]["task_id"])

    async def done(self, task_id: str, *, req_key: str = "jimeng_t2i_v40", **options: Any) -> tuple[list[str], dict[str, Any]]:
        """Every status that was told, and the data of the last."""
        statuses: list[str] = []
        while True:
            answer = await self.result({"req_key": req_key, "task_id": task_id, "req_json": json.dumps(options)})
            assert answer["code"] == 10000
            if statuses[-1:] != [answer["data"]["status"]]:
                statuses.append(answer["data"]["status"])
            if statuses[-1] not in ("in_queue", "generating"):
                return statuses, answer["data"]


@pytest.fixture
def sdk(sandbox: Sandbox) -> Iterator[Sdk]:
    service = VisualService()
    service.set_host(sandbox.url.removeprefix("http://"))
    service.set_ak("AKsdk-test")
    service.set_sk("SKsdk-test==")
    yield Sdk(service)
    service.session.close()


def refusal(caught: pytest.ExceptionInfo[Exception]) -> dict[str, Any]:
    """The body of an error answer: the SDK raises its bytes as they are printed."""
    text = str(caught.value)
    return dict(json.loads(text[2:-1].encode().decode("unicode_escape")))


async def test_a_task_goes_through_its_statuses_and_gives_a_link(sdk: Sdk, sandbox: Sandbox) -> None:
    """Submit, in the queue, being made, done; with return_url the image is a link."""
    sandbox.behaviour.latency_s = 0.3
    task_id = await sdk.task()
    assert len(task_id) == 19
    statuses, data = await sdk.done(task_id, return_url=True, logo_info={"add_logo": False})
    assert statuses == ["in_queue", "generating", "done"]
    assert data["binary_data_base64"] is None
    [link] = data["image_urls"]
    async with httpx.AsyncClient(trust_env=False) as client:
        picture = (await client.get(link)).content
    assert size_of(picture) == (48, 64)
    assert sandbox.report()["apis"][API]["images_bought"] == 1


async def test_without_options_images_come_inline(sdk: Sdk) -> None:
    """Base64 is the default, and the answer is the same each time it is asked for."""
    task_id = await sdk.task()
    _, data = await sdk.done(task_id)
    assert data["image_urls"] is None
    [text] = data["binary_data_base64"]
    assert size_of(base64.b64decode(text)) == (48, 64)
    assert (await sdk.done(task_id))[1] == data


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({"width": 1104, "height": 1472}, (1104, 1472)), ({"size": 1_440_000}, (1200, 1200)), ({}, (512, 768))],
)
async def test_images_have_the_size_that_was_asked_for(
    sdk: Sdk, sandbox: Sandbox, asked: dict[str, int], expected: tuple[int, int]
) -> None:
    """Width and height, or an area, which is a square's."""
    sandbox.behaviour.image_px = None
    _, data = await sdk.done(await sdk.task(**asked))
    assert size_of(base64.b64decode(data["binary_data_base64"][0])) == expected


async def test_the_prompt_decides_how_many_come(sdk: Sdk, sandbox: Sandbox) -> None:
    """Not held to one, a call makes as many as its prompt says, and each costs."""
    task_id = await sdk.task(prompt="生成一组3张图片", force_single=False)
    assert len((await sdk.done(task_id, return_url=True))[1]["image_urls"]) == 3
    assert sandbox.report()["apis"][API]["images_bought"] == 3


@pytest.mark.parametrize(
    "form",
    [
        {"width": 1104, "height": 1472},
        {"size": 4_194_304, "scale": 0.7},
        {"req_key": "jimeng_t2i_v31", "width": 1328, "height": 1328, "seed": -1, "use_pre_llm": True},
        {"req_key": "jimeng_seedream46_cvtob", "scale": 50},
        {"image_urls": ["https://img.example/somewhere/else.jpg"]},
    ],
)
async def test_forms_that_clients_send_are_taken(sdk: Sdk, form: dict[str, Any]) -> None:
    """Sizes, scales and references as the models' pages have them; links outside this machine are believed."""
    await sdk.task(**form)


async def test_a_reference_may_travel_in_the_request(sdk: Sdk) -> None:
    """The older model takes a photo as base64, and answers so."""
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "JPEG")
    photo = base64.b64encode(out.getvalue()).decode()
    task_id = await sdk.task(req_key="jimeng_i2i_v30", binary_data_base64=[photo], width=1024, height=1024)
    _, data = await sdk.done(task_id, req_key="jimeng_i2i_v30", return_url=True)
    assert data["image_urls"] is None
    assert len(data["binary_data_base64"]) == 1


@pytest.mark.parametrize(
    "form",
    [
        {"req_key": "no_such_model"},
        {"prompt": ""},
        {"prompt": "x" * 801},
        {"image_urls": ["https://x.example/a.jpg"] * 11},
        {"image_urls": ["ftp://x.example/a.jpg"]},
        {"image_urls": ["http://127.0.0.1:9/nothing.jpg"]},
        {"binary_data_base64": ["aGVsbG8="]},
        {"width": 1104},
        {"width": 512, "height": 512},
        {"width": 4096, "height": 1024},
        {"size": 100},
        {"scale": 2},
        {"force_single": "yes"},
        {"req_key": "jimeng_i2i_v30"},
        {"req_key": "jimeng_i2i_v30", "binary_data_base64": ["aGVsbG8="]},
        {"req_key": "jimeng_t2i_v30", "image_urls": ["https://x.example/a.jpg"]},
    ],
)
async def test_wrong_requests_are_refused(sdk: Sdk, sandbox: Sandbox, form: dict[str, Any]) -> None:
    """A field that is wrong is the service's own error, data null, nothing bought, no slot kept."""
    with pytest.raises(Exception, match="50215") as caught:
        await sdk.submit(V40 | form)
    body = refusal(caught)
    assert (body["code"], body["status"], body["data"]) == (50215, 50215, None)
    account = sandbox.report()["apis"][API]
    assert (account["images_bought"], sandbox.shop.account(API, "AKsdk-test").open) == (0, 0)


async def test_unknown_tasks_are_not_found(sdk: Sdk) -> None:
    """A task of another model or key, and one that never was, is a good answer that says so."""
    task_id = await sdk.task()
    for form in ({"req_key": "jimeng_t2i_v40", "task_id": "1"}, {"req_key": "jimeng_t2i_v31", "task_id": task_id}):
        assert (await sdk.result(form))["data"]["status"] == "not_found"
    sdk.service.set_ak("AKother")
    sdk.service.set_sk("SKother==")
    assert (await sdk.result({"req_key": "jimeng_t2i_v40", "task_id": task_id}))["data"]["status"] == "not_found"


@pytest.mark.parametrize(("fault", "status"), [("expired", "expired"), ("partial", "done"), ("slow", "done")])
async def test_faults_of_tasks(sdk: Sdk, sandbox: Sandbox, fault: str, status: str) -> None:
    """A task may expire, give fewer images, or take ten times as long."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    task_id = await sdk.task(prompt="2 images", force_single=False)
    _, data = await sdk.done(task_id, return_url=True)
    assert data["status"] == status
    assert sandbox.report()["apis"][API]["images_bought"] == {"expired": 0, "partial": 1, "slow": 2}[fault]


@pytest.mark.parametrize(("fault", "code"), [("429", 50429), ("500", 50500), ("unsafe", 50412)])
async def test_faults_of_calls_are_the_service_s_errors(sdk: Sdk, sandbox: Sandbox, fault: str, code: int) -> None:
    """Each with its HTTP status, its code and data null."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    with pytest.raises(Exception, match=str(code)) as caught:
        await sdk.submit(V40)
    assert refusal(caught)["code"] == code


async def test_a_failed_task_tells_so_when_it_is_asked_for(sdk: Sdk, sandbox: Sandbox) -> None:
    """The outer code of the answer to a poll says what became of the task."""
    sandbox.behaviour.faults = parse_faults("failed=1")
    task_id = await sdk.task()
    sandbox.behaviour.faults = parse_faults("")
    with pytest.raises(Exception, match="Post Img Risk Not Pass"):
        await sdk.done(task_id)


@pytest.mark.parametrize(("limit", "code"), [("concurrency", 50430), ("qps", 50429)])
async def test_limits_hold_per_key(sdk: Sdk, sandbox: Sandbox, limit: str, code: int) -> None:
    """A task holds its key's slot while it is made; another key has limits of its own."""
    sandbox.behaviour.latency_s = 0.3
    setattr(sandbox.behaviour, limit, 1)
    await sdk.task()
    with pytest.raises(Exception, match=str(code)):
        await sdk.submit(V40)
    sdk.service.set_ak("AKother")
    sdk.service.set_sk("SKother==")
    await sdk.task()
    assert sandbox.report()["apis"][API]["rejected"] == 1


async def test_a_task_can_be_cancelled_while_it_is_made(sdk: Sdk, sandbox: Sandbox) -> None:
    """CVCancelTask stops it; what is over or unknown cannot be cancelled."""
    sandbox.behaviour.latency_s = 5
    form = {"req_key": "jimeng_t2i_v40", "task_id": await sdk.task()}
    assert (await sdk.cancel(form))["code"] == 10000
    with pytest.raises(Exception, match="50215"):
        await sdk.cancel(form)
    assert sandbox.report()["apis"][API]["images_bought"] == 0


@pytest.mark.parametrize(
    ("access_key_id", "secret", "code"),
    [("AKsdk-test", "SKwrong==", "SignatureDoesNotMatch"), ("LTAIsomebody", "SKsdk-test==", "InvalidAccessKey")],
)
async def test_wrong_keys_meet_the_gateway(sdk: Sdk, sandbox: Sandbox, access_key_id: str, secret: str, code: str) -> None:
    """Another envelope, without a code of the service."""
    sdk.service.set_ak(access_key_id)
    sdk.service.set_sk(secret)
    with pytest.raises(Exception, match=code) as caught:
        await sdk.submit(V40)
    body = refusal(caught)
    assert "code" not in body
    assert body["ResponseMetadata"]["Error"]["Code"] == code
    assert body["ResponseMetadata"]["Action"] == "CVSync2AsyncSubmitTask"
    assert sandbox.report()["apis"][API]["unauthorised"] == 1


async def test_a_session_token_is_signed_too(sdk: Sdk) -> None:
    """Temporary keys sign one header more."""
    sdk.service.set_session_token("STStoken")
    await sdk.task()


async def test_unsigned_and_unknown_requests_meet_the_gateway(sandbox: Sandbox) -> None:
    """No signature, a broken one, and one that is not what was sent."""
    query = {"Action": "CVSync2AsyncSubmitTask", "Version": "2022-08-31"}
    broken = {"Authorization": "HMAC-SHA256 whatever"}
    async with httpx.AsyncClient(base_url=sandbox.url, trust_env=False) as client:
        answers = [
            await client.post("/", params=query, json={}),
            await client.post("/", params=query, json={}, headers=broken),
            await client.post(
                "/", params=query, json={}, headers={"Authorization": signed("20200101"), "X-Date": "20200101T000000Z"}
            ),
            await client.post(
                "/", params=query, json={}, headers={"Authorization": signed("20200102"), "X-Date": "20200101T000000Z"}
            ),
        ]
    told = [(answer.status_code, answer.json()["ResponseMetadata"]["Error"]["Code"]) for answer in answers]
    assert told == [
        (401, "MissingAuthenticationToken"),
        (400, "InvalidAuthorization"),
        (400, "InvalidTimestamp"),
        (400, "InvalidCredential"),
    ]


async def test_an_unknown_action_meets_the_gateway(sdk: Sdk) -> None:
    """An action of another product is not here."""
    with pytest.raises(Exception, match="InvalidActionOrVersion"):
        await asyncio.to_thread(sdk.service.cv_process, {"req_key": "x"})


def signed(date: str) -> str:
    return f"HMAC-SHA256 Credential=AKx/{date}/cn-north-1/cv/request, SignedHeaders=host;x-date, Signature={'0' * 64}"


def size_of(content: bytes) -> tuple[int, int]:
    """The sides of a whole picture."""
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        return picture.size
