"""The DashScope provider: forms of requests, tasks and what becomes of them, errors, lost submits."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import ssl
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from PIL import Image

from jobdaemon.domain.artifact import Artifact, source_key
from jobdaemon.errors import (
    AnswerLostError,
    JobdaemonError,
    KeyMissingError,
    KeyRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    RetryableError,
    SettingsError,
)
from jobdaemon.http import GuardedClient
from jobdaemon.ports import (
    CallDone,
    Charged,
    GenerateRequest,
    ImageMade,
    ImageRefused,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.providers.dashscope import DashScopeProvider
from jobdaemon.providers.dashscope.answers import KINDS, kind_of
from jobdaemon.providers.dashscope.models import ROUTES, Form, Route, body_of, mark, route_of
from jobdaemon.providers.photo_links import InlineLinks
from jobdaemon.providers.wire import Kind, error_of
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.sandbox.shop import prompt_digest
from jobdaemon.settings_generate import DashScopeSettings
from tests.daemons import until

API = "dashscope"
SECRET = "sk-dashscope-0123456789abcdef"
PROMPT = "a portrait by a window"
SIGNED = "https://results.example/1.png?Expires=1&Signature=abcdef"


def photo() -> bytes:
    out = io.BytesIO()
    # No smaller than the pickiest model takes.
    Image.linear_gradient("L").convert("RGB").resize((384, 384)).save(out, "PNG")
    return out.getvalue()


def wanted(count: int = 2, *, order_id: int = 1, prompt: str = PROMPT, **changes: Any) -> GenerateRequest:
    """A request for images 7, 8 and so on."""
    content = photo()
    digest = hashlib.sha256(content).hexdigest()

    async def load() -> bytes:
        return content

    images = tuple((7 + ordinal, ordinal) for ordinal in range(count))
    artifact = Artifact(source_key(digest, "png"), digest, len(content), "image/png")
    return replace(GenerateRequest(order_id, images, prompt, artifact, load), **changes)


def call_of(request: GenerateRequest, task_id: str | None, *, at: datetime | None = None) -> ProviderCall:
    """The call that *request* was noted as."""
    return ProviderCall(1, task_id, tuple(index for index, _ in request.images), None, at or datetime.now(UTC))


def provider_at(url: str, client: GuardedClient, **settings: Any) -> DashScopeProvider:
    """A quick one."""
    chosen: dict[str, Any] = {
        "poll": timedelta(milliseconds=4),
        "polls_per_second": 1000,
        "task_timeout": timedelta(seconds=5),
    } | settings
    section = DashScopeSettings(base_url=url, **chosen)
    return DashScopeProvider(section, keys={"default": SECRET}, client=client, links=InlineLinks())


@dataclass(slots=True)
class Outcome:
    """What one call came to."""

    events: list[ProviderEvent] = field(default_factory=list)
    error: JobdaemonError | None = None

    @property
    def kinds(self) -> list[type]:
        return [type(event) for event in self.events]

    @property
    def made(self) -> list[int]:
        return [event.index for event in self.events if isinstance(event, ImageMade)]

    @property
    def task_id(self) -> str:
        return next(event.task_id for event in self.events if isinstance(event, TaskAccepted))


async def outcome(provider: DashScopeProvider, request: GenerateRequest) -> Outcome:
    seen = Outcome()
    try:
        async with aclosing(provider.generate(request)) as events:
            async for event in events:
                if not isinstance(event, Charged | CallDone):
                    seen.events.append(event)
    except JobdaemonError as error:
        seen.error = error
    return seen


async def accepted(provider: DashScopeProvider, request: GenerateRequest) -> str:
    """Submit, and stop when the task is known."""
    async with aclosing(provider.generate(request)) as events:
        async for event in events:
            if isinstance(event, TaskAccepted):
                return event.task_id
    raise AssertionError("no task")


#: What a submit is answered with.
ACCEPTED = (200, {"request_id": "r-0", "output": {"task_id": "t1", "task_status": "PENDING"}})


@dataclass(slots=True)
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(slots=True)
class Scripted:
    """
    A service that says what a test tells it.

    Attributes:
        submits, polls: answers in their order, status and body; the last one stays.
        listed: rows of the task list.
        headers: of every answer.
    """

    url: str = ""
    submits: list[tuple[int, Any]] = field(
        default_factory=lambda: [(200, {"output": {"task_id": "t1", "task_status": "PENDING"}})]
    )
    polls: list[tuple[int, Any]] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        self.asked.append(Asked(request.method, request.path, dict(request.headers), json.loads(text) if text else None))
        if request.path == "/api/v1/tasks":
            return web.json_response({"data": self.listed, "total": len(self.listed), "total_page": 1, "page_no": 1})
        answers = self.submits if "/services/" in request.path else self.polls
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(body, str):
            return web.Response(status=status, text=body, content_type="text/html")
        return web.json_response(body, status=status, headers=self.headers)


def ended(status: str = "SUCCEEDED", **output: Any) -> tuple[int, Any]:
    """A poll's answer."""
    return 200, {"request_id": "r-1", "output": {"task_id": "t1", "task_status": status, **output}}


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one with small pictures."""
    async with Sandbox(Behaviour(latency_s=0.01, image_px=(64, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def scripted() -> AsyncIterator[Scripted]:
    """A service that follows a script."""
    script = Scripted()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", script.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    script.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield script
    await runner.cleanup()


@pytest_asyncio.fixture
async def client() -> AsyncIterator[GuardedClient]:
    """A client that may reach servers on this machine."""
    # No certificates: reading the usual authorities takes longer than a test.
    client = GuardedClient(allowed_hosts=["127.0.0.1"], ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    yield client
    await client.close()


@pytest.fixture
def provider(sandbox: Sandbox, client: GuardedClient) -> DashScopeProvider:
    """At the sandbox, with the default model."""
    return provider_at(sandbox.url, client)


@pytest.fixture
def follower(scripted: Scripted, client: GuardedClient) -> DashScopeProvider:
    """At the scripted service."""
    return provider_at(scripted.url, client)


def bought(sandbox: Sandbox) -> int:
    return int(sandbox.report()["apis"].get(API, {}).get("images_bought", 0))


# Requests


@pytest.mark.parametrize("model", [*ROUTES, "qwen-image-edit-max-2026-01-16", "wan2.7-image-pro"])
async def test_every_model_is_called_as_the_service_wants_it(sandbox: Sandbox, client: GuardedClient, model: str) -> None:
    """Each family finds its path, its form and its mode, and exactly what was asked for is made and paid for."""
    provider = provider_at(sandbox.url, client, model=model)
    request = wanted(min(2, provider.max_images_per_call))
    seen = await outcome(provider, request)
    assert seen.error is None
    assert seen.made == [index for index, _ in request.images]
    is_async = route_of(model).is_async
    assert seen.kinds == [Submitting, *([TaskAccepted] if is_async else []), *[ImageMade] * len(request.images)]
    assert sandbox.report()["apis"][API]["bought"] == {prompt_digest(PROMPT): len(request.images)}
    images = [event for event in seen.events if isinstance(event, ImageMade)]
    for image in images:
        content = await client.download(image.url or "", max_bytes=100_000, timeout=timedelta(seconds=5))
        assert content.media_type == "image/png"


@pytest.mark.parametrize(
    ("model", "content"),
    [
        ("wan2.5-i2i-preview", {"prompt": PROMPT, "images": ["data:x"], "negative_prompt": "fog"}),
        (
            "wanx2.1-imageedit",
            {"prompt": PROMPT, "function": "description_edit", "base_image_url": "data:x", "negative_prompt": "fog"},
        ),
        ("wan2.5-t2i-preview", {"prompt": PROMPT, "negative_prompt": "fog"}),
        ("wan2.6-image", {"messages": [{"role": "user", "content": [{"image": "data:x"}, {"text": PROMPT}]}]}),
        ("wan2.6-t2i", {"messages": [{"role": "user", "content": [{"text": PROMPT}]}]}),
    ],
)
def test_a_body_has_the_form_of_its_model(model: str, content: dict[str, Any]) -> None:
    """Prompt, photo and negative prompt stand where the model looks for them; n is never left out."""
    route = route_of(model)
    body = body_of(
        route,
        model,
        wanted(3, params={"seed": 5, "watermark": False, "strength": 1, "prompt_extend": "yes"}),
        prompt=PROMPT,
        photo="data:x" if route.takes_photo else None,
        images=((8, 4), (9, 5)),
        size="1024*1536",
        negative_prompt="fog",
    )
    assert (body["model"], body["input"]) == (model, content)
    expected = {"n": 2, "seed": 9, "watermark": False, "size": "1024*1536"}
    assert body["parameters"] == expected | ({"negative_prompt": "fog"} if route.form is Form.MESSAGES else {})


async def test_what_is_sent(scripted: Scripted, client: GuardedClient) -> None:
    """Key, workspace and mode are headers; a base URL may end in the version; the photo is a data URL."""
    scripted.polls = [ended(results=[{"url": SIGNED}, {"url": SIGNED}])]
    provider = provider_at(f"{scripted.url}/api/v1/", client, workspace="llm-7")
    assert (await outcome(provider, wanted())).error is None
    submit, poll = scripted.asked
    assert submit.path == "/api/v1/services/aigc/image2image/image-synthesis"
    assert poll.path == "/api/v1/tasks/t1"
    for asked in (submit, poll):
        assert asked.headers["Authorization"] == f"Bearer {SECRET}"
        assert asked.headers["X-DashScope-WorkSpace"] == "llm-7"
    assert (submit.headers["X-DashScope-Async"], "X-DashScope-Async" in poll.headers) == ("enable", False)
    [image] = submit.body["input"]["images"]
    assert image.startswith("data:image/png;base64,iVBOR")
    assert "size" not in submit.body["parameters"]


async def test_more_than_the_model_makes_at_once_is_several_calls(sandbox: Sandbox, client: GuardedClient) -> None:
    """A batch that was cut for another model is asked for in parts, each of them noted before it is bought."""
    seen = await outcome(provider_at(sandbox.url, client, model="qwen-image-edit"), wanted(2))
    assert seen.kinds == [Submitting, ImageMade, Submitting, ImageMade]
    assert seen.made == [7, 8]
    assert bought(sandbox) == 2


def test_limits_of_the_model_bind(client: GuardedClient) -> None:
    """One call asks for no more than the model makes, nor than the settings say."""
    sizes = {
        model: provider_at("https://x.example", client, model=model, images_per_call=3).max_images_per_call
        for model in ("wan2.5-i2i-preview", "qwen-image-edit", "qwen-image-edit-plus")
    }
    assert sizes == {"wan2.5-i2i-preview": 3, "qwen-image-edit": 1, "qwen-image-edit-plus": 3}


@pytest.mark.parametrize(
    ("keys", "model", "named"),
    [({}, "wan2.6-image", "api_key"), ({"a": "sk-ä"}, "wan2.6-image", "key a"), ({"a": SECRET}, "wan9-x", "wan9-x")],
)
def test_what_cannot_work_is_told_at_the_start(client: GuardedClient, keys: dict[str, str], model: str, named: str) -> None:
    """No key, a key that no header can carry, and a model of no known family are errors of the settings, without the key."""
    settings = DashScopeSettings(model=model)
    with pytest.raises(SettingsError, match=named) as told:
        DashScopeProvider(settings, keys=keys, client=client, links=InlineLinks())
    assert "sk-" not in str(told.value)


async def test_an_unknown_alias_is_another_daemon_s(provider: DashScopeProvider) -> None:
    """A key that this daemon does not have is no refused one, and is found out before anything is noted."""
    seen = await outcome(provider, wanted(key="other"))
    assert isinstance(seen.error, KeyMissingError)
    assert seen.events == []


# Tasks


async def test_a_noted_task_is_gone_on_with(provider: DashScopeProvider, sandbox: Sandbox) -> None:
    """A later attempt asks for the task, makes every image it had in the order of its call, and buys nothing."""
    request = wanted(3)
    task_id = await accepted(provider, request)
    later = replace(request, images=request.images[1:], resume=call_of(request, task_id))
    seen = await outcome(provider, later)
    assert (seen.error, seen.kinds, seen.made) == (None, [ImageMade] * 3, [7, 8, 9])
    assert bought(sandbox) == 3
    report = sandbox.report()["apis"][API]
    assert report["calls"] == 1


async def test_links_are_good_for_a_day_from_the_submit(provider: DashScopeProvider) -> None:
    """What a link's end is counted from is the submit, which a later attempt knows from its row."""
    request = wanted(1)
    [*_, made] = (await outcome(provider, request)).events
    assert isinstance(made, ImageMade)
    assert made.url_expires_at is not None
    assert abs(made.url_expires_at - datetime.now(UTC) - timedelta(hours=24)) < timedelta(minutes=1)
    task_id = await accepted(provider, request)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    [made] = (await outcome(provider, replace(request, resume=call_of(request, task_id, at=at)))).events
    assert isinstance(made, ImageMade)
    assert made.url_expires_at == at + timedelta(hours=24)


@pytest.mark.parametrize("form", ["results", "choices"])
async def test_results_belong_to_images_by_their_order(scripted: Scripted, follower: DashScopeProvider, form: str) -> None:
    """The first result is the first image asked for, in either form; what was not asked for is nobody's."""
    urls = [f"https://results.example/{number}.png" for number in range(4)]
    parts = [[{"type": "text", "text": "done"}, {"type": "image", "image": urls[0]}], *([{"image": url}] for url in urls[1:])]
    told: dict[str, dict[str, Any]] = {
        "results": {"results": [{"url": url} for url in urls]},
        "choices": {"finished": True, "choices": [{"message": {"role": "assistant", "content": part}} for part in parts]},
    }
    scripted.polls = [ended("RUNNING"), ended(**told[form])]
    seen = await outcome(follower, wanted(3))
    images = [event for event in seen.events if isinstance(event, ImageMade)]
    assert [(image.index, image.url) for image in images] == [(7, urls[0]), (8, urls[1]), (9, urls[2])]


async def test_links_into_their_store_are_fetched_with_tls(scripted: Scripted, follower: DashScopeProvider) -> None:
    """A plain link into Aliyun's object store is one with TLS as well; others stay as they are."""
    oss = "dashscope-result-sh.oss-cn-shanghai.aliyuncs.com/1.png?Expires=1&Signature=a%2Fb"
    scripted.polls = [ended(results=[{"url": f"http://{oss}"}, {"url": "http://x.example/a.aliyuncs.com/"}])]
    images = [event for event in (await outcome(follower, wanted())).events if isinstance(event, ImageMade)]
    assert [image.url for image in images] == [f"https://{oss}", "http://x.example/a.aliyuncs.com/"]


async def test_an_image_fails_alone(scripted: Scripted, follower: DashScopeProvider) -> None:
    """What is called unsafe is refused, what their trouble prevented is left out to be asked for again, the rest is made."""
    results = [
        {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."},
        {"code": "InternalError.Timeout", "message": "An internal timeout error"},
        {"code": "Throttling.RateQuota", "message": "Requests rate limit exceeded"},
        {"orig_prompt": PROMPT, "url": SIGNED},
    ]
    scripted.polls = [ended(results=results)]
    seen = await outcome(follower, wanted(4))
    assert seen.error is None
    refused, made = seen.events[2:]
    assert isinstance(refused, ImageRefused)
    assert (refused.index, "DataInspectionFailed" in refused.reason) == (7, True)
    assert isinstance(made, ImageMade)
    assert (made.index, made.url) == (10, SIGNED)


@pytest.mark.parametrize(
    "results",
    [[], "x", [None, 3, {}], [{"url": ""}, {"url": "file:///etc/passwd"}, {"url": 7}, {"url": "https://x/" + "y" * 9000}]],
    ids=["none", "text", "no objects", "no links"],
)
async def test_results_that_are_none_make_nothing(scripted: Scripted, follower: DashScopeProvider, results: Any) -> None:
    """A good task without usable images leaves all of them out, to be asked for again."""
    scripted.polls = [ended(results=results)]
    seen = await outcome(follower, wanted(4))
    assert (seen.error, seen.kinds) == (None, [Submitting, TaskAccepted])


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (ended("UNKNOWN"), ProviderUnavailableError, "task t1 is unknown"),
        (ended("CANCELED"), ProviderUnavailableError, "cancelled"),
        (ended("FAILED", code="DataInspectionFailed", message="unsafe input"), ProviderRefusedError, "unsafe input"),
        (ended("FAILED", code="InvalidParameter.Image", message="too small"), ProviderRefusedError, "too small"),
        (ended("FAILED", code="InternalError.Timeout", message="slow"), ProviderUnavailableError, "slow"),
        (ended("FAILED", code="Throttling.RateQuota", message="much"), RateLimitedError, "much"),
        (ended("FAILED", code="Arrearage", message="unpaid"), KeyRefusedError, "unpaid"),
        (ended("FAILED", code="SomethingNew", message="what"), ProviderUnavailableError, "what"),
        (ended("FAILED"), ProviderUnavailableError, "no reason"),
    ],
)
async def test_a_task_that_failed_is_over(
    scripted: Scripted, follower: DashScopeProvider, answer: tuple[int, Any], error: type[Exception], words: str
) -> None:
    """A task that ended badly gives nothing more, which is said before the error that its code means."""
    scripted.polls = [answer]
    seen = await outcome(follower, wanted())
    assert seen.kinds == [Submitting, TaskAccepted, TaskOver]
    assert type(seen.error) is error
    assert words in str(seen.error)


async def test_what_a_failed_task_made_is_kept(scripted: Scripted, follower: DashScopeProvider) -> None:
    """Images that come with a failure come before it."""
    scripted.polls = [ended("FAILED", code="InternalError", message="half", results=[{"url": SIGNED}])]
    assert (await outcome(follower, wanted())).kinds == [Submitting, TaskAccepted, ImageMade, TaskOver]


THROTTLED = [
    (429, {"code": code, "message": "Requests rate limit exceeded", "request_id": "r"})
    for code in ("Throttling", "Throttling.RateQuota", "Throttling.BurstRate", "Throttling.AllocationQuota")
]


async def test_trouble_with_polling_says_nothing_of_the_task(scripted: Scripted, follower: DashScopeProvider) -> None:
    """Throttled polls, a page of a proxy and a service that is away for a moment neither end nor fail a task."""
    away: list[tuple[int, Any]] = [(502, "<html>"), (503, {"code": "ModelUnavailable"}), (404, {"code": "NotFound"})]
    scripted.polls = [*THROTTLED, *away[:2], ended("PENDING"), *away[1:], ended(results=[{"url": SIGNED}] * 2)]
    seen = await outcome(follower, wanted())
    assert (seen.error, seen.made) == (None, [7, 8])


@pytest.mark.parametrize("answer", [(404, {"code": "NotFound"}), (403, "<html>"), (200, []), (200, {"output": {}})])
async def test_a_task_that_cannot_be_asked_for_stays_open(
    scripted: Scripted, follower: DashScopeProvider, answer: tuple[int, Any]
) -> None:
    """When asking fails again and again the attempt ends, and the task is left to the next one."""
    scripted.polls = [answer]
    seen = await outcome(follower, wanted())
    assert seen.kinds == [Submitting, TaskAccepted]
    assert isinstance(seen.error, RetryableError)
    assert len(scripted.asked) == 4


async def test_a_task_that_never_ends_is_left_to_the_next_attempt(sandbox: Sandbox, client: GuardedClient) -> None:
    """Patience ends the attempt and not the task."""
    sandbox.behaviour.latency_s = 60
    provider = provider_at(sandbox.url, client, task_timeout=timedelta(seconds=0.05))
    seen = await outcome(provider, wanted())
    assert seen.kinds == [Submitting, TaskAccepted]
    assert isinstance(seen.error, ProviderUnavailableError)
    assert "not done" in str(seen.error)


async def test_closing_leaves_the_task_alone(provider: DashScopeProvider, sandbox: Sandbox) -> None:
    """An attempt that is cut off while it polls leaves the task at work for the next one."""
    sandbox.behaviour.latency_s = 0.1
    call = asyncio.ensure_future(outcome(provider, wanted()))
    await until(lambda: sandbox.shop.account(API, SECRET).open == 1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(lambda: bought(sandbox) == 2)
    assert sandbox.shop.account(API, SECRET).open == 0


async def test_questions_keep_their_distance(scripted: Scripted, client: GuardedClient) -> None:
    """However many tasks are asked for at once, questions go out at the daemon's pace."""
    section = DashScopeSettings(base_url=scripted.url, polls_per_second=50)
    provider = DashScopeProvider(section, keys={"a": SECRET}, client=client, links=InlineLinks())
    scripted.polls = [(200, {"request_id": "r"})]
    began = asyncio.get_running_loop().time()
    assert await asyncio.gather(*(provider.cancel(call_of(wanted(), f"t{number}")) for number in range(5))) == [True] * 5
    assert asyncio.get_running_loop().time() - began >= 0.075


# Errors

#: Status, code, message and what they mean. Source: Model Studio's error code page, read 2026-11.
ERRORS: list[tuple[int, str, str, Kind]] = [
    (400, "InvalidParameter", "num_images_per_prompt must be 1", Kind.PERMANENT),
    (400, "InvalidParameter.Size", "size", Kind.PERMANENT),
    (400, "InvalidParameter.FileDownload", "Failed to download the file", Kind.PHOTO),
    (400, "InvalidParameter.DataInspection", "Unable to download the media resource", Kind.RETRY),
    (400, "InvalidURL", "not valid", Kind.PHOTO),
    (400, "BadRequest.UnsupportedFileFormat", "format", Kind.PERMANENT),
    (400, "UnsupportedOperation", "not PENDING", Kind.PERMANENT),
    (400, "DataInspectionFailed", "Input data may contain inappropriate content", Kind.PERMANENT),
    (400, "data_inspection_failed", "the same", Kind.PERMANENT),
    (400, "Arrearage", "Access denied, please make sure your account is in good standing", Kind.MONEY),
    (401, "InvalidApiKey", "Invalid API-key provided", Kind.KEY),
    (401, "invalid_api_key", "Incorrect API key provided", Kind.KEY),
    (403, "AccessDenied", "Access denied", Kind.KEY),
    (403, "access_denied", "the same", Kind.KEY),
    (403, "AccessDenied", "current user api does not support synchronous calls.", Kind.PERMANENT),
    (403, "AccessDenied", "current user api does not support asynchronous calls.", Kind.PERMANENT),
    (403, "AccessDenied.Unpurchased", "not purchased", Kind.KEY),
    (403, "Model.AccessDenied", "Model access denied", Kind.KEY),
    (403, "Workspace.AccessDenied", "Workspace access denied", Kind.KEY),
    (403, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted", Kind.MONEY),
    (404, "ModelNotFound", "Model not exist", Kind.PERMANENT),
    (404, "model_not_found", "the same", Kind.PERMANENT),
    (404, "WorkSpaceNotFound", "not found", Kind.PERMANENT),
    (404, "NotFound", "not found", Kind.PERMANENT),
    (429, "Throttling", "too many requests", Kind.CAPACITY),
    (429, "Throttling.RateQuota", "Requests rate limit exceeded", Kind.CAPACITY),
    (429, "LimitRequests", "You exceeded your current requests list", Kind.CAPACITY),
    (429, "limit_requests", "the same", Kind.CAPACITY),
    (429, "Throttling.BurstRate", "Request rate increased too quickly", Kind.CAPACITY),
    (429, "limit_burst_rate", "the same", Kind.CAPACITY),
    (429, "Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit", Kind.CAPACITY),
    (429, "insufficient_quota", "You exceeded your current quota", Kind.CAPACITY),
    (429, "Throttling.AllocationQuota", "Free allocated quota exceeded.", Kind.MONEY),
    (429, "insufficient_quota", "Free allocated quota exceeded. For details see …", Kind.MONEY),
    (429, "CommodityNotPurchased", "Commodity has not been purchased yet", Kind.MONEY),
    (429, "PrepaidBillOverdue", "The prepaid bill is overdue", Kind.MONEY),
    (429, "PostpaidBillOverdue", "The postpaid bill is overdue", Kind.MONEY),
    (500, "InternalError", "An internal error has occurred", Kind.RETRY),
    (500, "InternalError.Algo", "inference error", Kind.RETRY),
    (500, "InternalError.Timeout", "timeout", Kind.RETRY),
    (500, "InternalError.Upload", "upload", Kind.RETRY),
    (500, "internal_error", "the same", Kind.RETRY),
    (500, "SystemError", "system error", Kind.RETRY),
    (500, "ModelServiceFailed", "failed", Kind.RETRY),
    (500, "RequestTimeOut", "timed out", Kind.RETRY),
    (500, "RewriteFailed", "rewrite", Kind.RETRY),
    (503, "ModelServingError", "Too many requests", Kind.CAPACITY),
    (503, "ModelUnavailable", "unavailable", Kind.CAPACITY),
    # not in the table: by status
    (400, "SomethingNew", "?", Kind.PERMANENT),
    (429, "SomethingNew", "?", Kind.CAPACITY),
    (500, "SomethingNew", "?", Kind.RETRY),
    (504, "SomethingNew", "?", Kind.LOST),
]


async def test_each_code_is_one_kind_of_error(scripted: Scripted, follower: DashScopeProvider) -> None:
    """An error of a submit is what its code means, however it is spelled and wherever it stands, and names its request."""
    request = wanted()
    for status, code, message, kind in ERRORS:
        expected = error_of(kind, "x", "x")
        for shape in ({"code": code, "message": message}, {"error": {"code": code.upper(), "message": message}}):
            scripted.submits = [(status, {**shape, "request_id": "req-7"})]
            seen = await outcome(follower, request)
            assert (code, seen.kinds, type(seen.error)) == (code, [Submitting], type(expected))
            assert getattr(seen.error, "is_out_of_money", None) == getattr(expected, "is_out_of_money", None), code
            assert f"dashscope ({status}, request req-7): " in str(seen.error)
            assert code.lower() in str(seen.error).lower()


def test_every_line_of_the_table_is_walked() -> None:
    """No code is in the table without a case above."""
    walked = {code.lower() for _, code, _, _ in ERRORS} | {code.lower().rpartition(".")[0] for _, code, _, _ in ERRORS}
    assert set(KINDS) - walked == {"invalid_parameter"}
    assert kind_of("invalid_parameter", "", 400) is Kind.PERMANENT


async def test_a_wait_that_is_asked_for_is_told(scripted: Scripted, follower: DashScopeProvider) -> None:
    """No Retry-After is documented; one that comes is passed on."""
    scripted.submits, scripted.headers = [(429, {"code": "Throttling"})], {"Retry-After": "7"}
    error = (await outcome(follower, wanted())).error
    assert isinstance(error, RateLimitedError)
    assert error.retry_after == timedelta(seconds=7)


@pytest.mark.parametrize("model", ["wan2.5-i2i-preview", "qwen-image-edit-plus"])
@pytest.mark.parametrize("body", ["<html>", [], {}, {"output": 3}, {"output": {}}, {"code": "", "data": []}])
async def test_a_good_answer_that_says_nothing_is_a_lost_one(
    scripted: Scripted, client: GuardedClient, model: str, body: Any
) -> None:
    """The service took the submit, and nobody knows what became of it."""
    scripted.submits = [(200, body)]
    seen = await outcome(provider_at(scripted.url, client, model=model), wanted())
    assert seen.kinds == [Submitting]
    assert isinstance(seen.error, AnswerLostError)


async def test_no_secret_is_repeated(scripted: Scripted, follower: DashScopeProvider) -> None:
    """Keys and signed links that the service repeats stay out of errors and reasons."""
    message = f"bad key {SECRET} for {SIGNED} " + "x" * 5000
    scripted.submits = [(400, {"code": "InvalidParameter", "message": message})]
    texts = ["".join(traceback.format_exception((await outcome(follower, wanted())).error))]
    scripted.submits = [ACCEPTED]
    scripted.polls = [ended(results=[{"code": "InvalidParameter", "message": message}])]
    [*_, refused] = (await outcome(follower, wanted())).events
    assert isinstance(refused, ImageRefused)
    for text in (*texts, refused.reason):
        assert "bad key" in text
        assert SECRET not in text
        assert "Signature=abcdef" not in text
    assert len(refused.reason) < 400


# Lost submits


async def lost(provider: DashScopeProvider, sandbox: Sandbox, request: GenerateRequest) -> ProviderCall:
    """A submit that the service took and whose answer never came."""
    sandbox.behaviour.faults = parse_faults("reset=1")
    at = datetime.now(UTC)
    seen = await outcome(provider, request)
    sandbox.behaviour.faults = parse_faults("")
    assert isinstance(seen.error, AnswerLostError)
    return call_of(request, None, at=at)


@pytest.mark.parametrize("skew_min", [0, -10, 10], ids=["clocks agree", "ours is behind", "ours is ahead"])
async def test_a_lost_submit_is_found(provider: DashScopeProvider, sandbox: Sandbox, skew_min: int) -> None:
    """The task of a lost answer is found by its prompt's mark, waited for, and gone on with: nothing is bought again."""
    sandbox.behaviour.latency_s = 0.05
    request = wanted(2)
    for other in (wanted(2, order_id=2), wanted(1), wanted(2, prompt="another")):
        await accepted(provider, other)
    call = await lost(provider, sandbox, request)
    call = replace(call, submitted_at=call.submitted_at + timedelta(minutes=skew_min))
    task_id = await provider.find_task(request, call)
    assert task_id is not None
    seen = await outcome(provider, replace(request, resume=replace(call, task_id=task_id)))
    assert (seen.error, seen.made) == (None, [7, 8])
    assert bought(sandbox) == 7


async def test_another_order_s_task_is_never_taken(provider: DashScopeProvider, sandbox: Sandbox) -> None:
    """The only task there is, of the same prompt and moment, is another customer's picture: it is not ours."""
    await accepted(provider, wanted(2, order_id=2))
    assert await provider.find_task(wanted(2), call_of(wanted(2), None)) is None
    other_photo = wanted(2)
    other_photo = replace(other_photo, photo=replace(other_photo.photo, sha256="0" * 64))
    await accepted(provider, other_photo)
    assert await provider.find_task(wanted(2), call_of(wanted(2), None)) is None


async def test_tasks_of_another_hour_are_not_asked_for(scripted: Scripted, follower: DashScopeProvider) -> None:
    """Only tasks made about then are looked at, and none that failed; rows that make no sense are passed over."""
    now = datetime.now(UTC)

    def row(**changes: Any) -> dict[str, Any]:
        return {"task_id": "t9", "gmt_create": round(now.timestamp() * 1000), "status": "SUCCEEDED"} | changes

    early = round((now - timedelta(hours=1)).timestamp() * 1000)
    scripted.listed = [row(gmt_create=early), row(status="FAILED"), row(gmt_create="x"), row(task_id=None), {}]
    assert await follower.find_task(wanted(), call_of(wanted(), None, at=now)) is None
    assert [asked.path for asked in scripted.asked] == ["/api/v1/tasks"]
    request = wanted()
    scripted.listed = [row()]
    scripted.polls = [ended(results=[{"orig_prompt": PROMPT + mark(request, [7, 8]), "url": SIGNED}])]
    assert await follower.find_task(request, call_of(request, None, at=now)) == "t9"


@pytest.mark.parametrize("model", ["wan2.6-image", "qwen-image-edit-plus"])
async def test_where_tasks_tell_no_prompt_nothing_is_found(scripted: Scripted, client: GuardedClient, model: str) -> None:
    """Models whose results do not repeat the prompt are not asked about: any answer would be a guess."""
    provider = provider_at(scripted.url, client, model=model)
    assert await provider.find_task(wanted(), call_of(wanted(), None)) is None
    assert scripted.asked == []


async def test_a_search_that_gets_no_answer_is_made_again(provider: DashScopeProvider, sandbox: Sandbox) -> None:
    """While the service cannot say, the call stays lost and is not bought again."""
    call = await lost(provider, sandbox, wanted())
    sandbox.behaviour.faults = parse_faults("500=1")
    with pytest.raises(RetryableError):
        await provider.find_task(wanted(), call)


def test_a_mark_is_blank_and_of_one_call_only() -> None:
    """A mark shows nothing, and differs between orders, photos and images."""
    request = wanted()
    other_photo = replace(request, photo=replace(request.photo, sha256="0" * 64))
    marks = [mark(request, [7, 8]), mark(request, [7]), mark(wanted(order_id=2), [7, 8]), mark(other_photo, [7, 8])]
    assert len(set(marks)) == 4
    assert {text.strip() for text in marks} == {""}
    assert mark(wanted(), [7, 8]) == marks[0]


# Cancelling


async def test_only_a_waiting_task_is_cancelled(provider: DashScopeProvider, sandbox: Sandbox) -> None:
    """A task that has not begun is stopped, is not paid for and gives its slot back; any other is not, which is no error."""
    sandbox.behaviour.latency_s = 30
    task_id = await accepted(provider, wanted())
    call = call_of(wanted(), task_id)
    assert await provider.cancel(call) is True
    assert sandbox.shop.account(API, SECRET).open == 0
    assert await provider.cancel(call) is False
    assert await provider.cancel(replace(call, task_id=None)) is False
    seen = await outcome(provider, replace(wanted(), resume=call))
    assert seen.kinds == [TaskOver]
    assert isinstance(seen.error, ProviderUnavailableError)
    assert bought(sandbox) == 0


async def test_a_cancel_that_cannot_be_told_is_retryable(scripted: Scripted, follower: DashScopeProvider) -> None:
    """A service that is away has not cancelled anything."""
    scripted.polls = [(500, {"code": "InternalError"})]
    with pytest.raises(RetryableError):
        await follower.cancel(call_of(wanted(), "t/1"))
    [asked] = scripted.asked
    assert asked.method == "POST"


# Faults of the sandbox


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("429", lambda seen: isinstance(seen.error, RateLimitedError)),
        ("500", lambda seen: isinstance(seen.error, ProviderUnavailableError)),
        ("html", lambda seen: isinstance(seen.error, ProviderUnavailableError)),
        ("reset", lambda seen: isinstance(seen.error, AnswerLostError)),
        ("slow", lambda seen: seen.made == [7, 8]),
        ("unsafe", lambda seen: seen.kinds == [Submitting, TaskAccepted, ImageRefused, ImageMade]),
        ("expired", lambda seen: seen.kinds == [Submitting, TaskAccepted, TaskOver]),
        ("failed", lambda seen: seen.kinds == [Submitting, TaskAccepted, TaskOver]),
        ("partial", lambda seen: seen.error is None and seen.made == [7]),
    ],
)
async def test_faults(provider: DashScopeProvider, sandbox: Sandbox, fault: str, check: Callable[[Outcome], bool]) -> None:
    """Each fault of the sandbox comes to what the service's own would, and gives the slot back."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    seen = await outcome(provider, wanted())
    assert check(seen)
    await until(lambda: sandbox.shop.account(API, SECRET).open == 0)


async def test_an_unsafe_prompt_is_refused(provider: DashScopeProvider, sandbox: Sandbox) -> None:
    """A single image that is called unsafe is a refusal of the submit, permanent and free."""
    sandbox.behaviour.faults = parse_faults("unsafe=1")
    seen = await outcome(provider, wanted(1))
    assert isinstance(seen.error, ProviderRefusedError)
    assert bought(sandbox) == 0


def test_the_docs_name_every_model_and_code() -> None:
    """docs/providers.md has each family of models, and each code that an error table line begins with."""
    text = (Path(__file__).parents[2] / "docs" / "providers.md").read_text().partition("## DashScope")[2].partition("\n## ")[0]
    assert [beginning for beginning in ROUTES if f"`{beginning}" not in text] == []
    told = text.lower().replace("_", "")
    assert [code for code in KINDS if code.replace("_", "").partition(".")[0] not in told] == []


def test_routes_are_what_they_say() -> None:
    """The longest beginning decides, so that a dated or longer name goes with its own family."""
    assert route_of("qwen-image-edit-plus-2025-10-30") is ROUTES["qwen-image-edit-plus"]
    assert route_of("qwen-image-plus") is ROUTES["qwen-image"]
    assert isinstance(route_of("wan2.5-i2i-preview"), Route)
    with pytest.raises(SettingsError, match=r"wan2\.5-i2i"):
        route_of("gpt-image-1")
