"""The ComfyUI provider against the sandbox's servers, and against servers that are none."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from PIL import Image

from jobdaemon.domain.artifact import Artifact, source_key
from jobdaemon.errors import (
    DeviceMemoryError,
    JobdaemonError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
)
from jobdaemon.http import GuardedClient
from jobdaemon.ports import CallDone, GenerateRequest, ImageMade, ProviderCall, ProviderEvent, Submitting, TaskAccepted
from jobdaemon.providers.comfyui import ComfyUIProvider
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings_generate import ComfyUISettings
from tests.fakes import content_of

CONFIG = Path(__file__).parents[2] / "config"
EXAMPLE = CONFIG / "comfyui-example.json"
MAX_BYTES = 1024 * 1024


def _photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 48), "red").save(out, "PNG")
    return out.getvalue()


PHOTO = _photo()


async def _load() -> bytes:
    return PHOTO


def _request(*indexes: int, prompt: str = "a portrait", order_id: int = 1) -> GenerateRequest:
    digest = hashlib.sha256(PHOTO).hexdigest()
    photo = Artifact(source_key(digest, "png"), digest, len(PHOTO), "image/png")
    images = tuple((index, ordinal) for ordinal, index in enumerate(indexes or (1,)))
    return GenerateRequest(order_id, images, prompt, photo, _load)


@dataclass(slots=True)
class Seen:
    """What one call came to."""

    events: list[ProviderEvent] = field(default_factory=list)
    error: JobdaemonError | None = None

    @property
    def made(self) -> list[ImageMade]:
        return [event for event in self.events if isinstance(event, ImageMade)]

    @property
    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]

    @property
    def task_id(self) -> str:
        """The one noted last."""
        return [event.task_id for event in self.events if isinstance(event, TaskAccepted)][-1]


async def _seen(provider: ComfyUIProvider, request: GenerateRequest) -> Seen:
    seen = Seen()
    try:
        async with aclosing(provider.generate(request)) as events:
            async for event in events:
                if not isinstance(event, CallDone):
                    seen.events.append(event)
    except JobdaemonError as error:
        seen.error = error
    return seen


def _resumed(request: GenerateRequest, task_id: str, *indexes: int) -> GenerateRequest:
    images = indexes or tuple(index for index, _ in request.images)
    return replace(request, resume=ProviderCall(1, task_id, images, None, datetime.now(UTC)))


async def _cut_after(provider: ComfyUIProvider, request: GenerateRequest, kind: type[ProviderEvent]) -> Any:
    """Close the call after its first event of a kind, as an attempt that is handed back does."""
    async with aclosing(provider.generate(request)) as events:
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__}")


@dataclass(slots=True)
class Rig:
    """Servers and providers on them, closed in the end."""

    sandbox: Sandbox
    client: GuardedClient
    providers: list[ComfyUIProvider] = field(default_factory=list)

    def url(self, name: str = "one") -> str:
        return f"{self.sandbox.url}/comfyui/{name}"

    def provider(self, *urls: str, workflow: Path = EXAMPLE, **changes: Any) -> ComfyUIProvider:
        values: dict[str, Any] = {
            "images_per_call": 5,
            "width": 64,
            "height": 96,
            "poll": timedelta(milliseconds=30),
            "task_timeout": timedelta(seconds=10),
        }
        settings = ComfyUISettings(servers=urls or (self.url(),), workflow=workflow, **(values | changes))
        self.providers.append(
            ComfyUIProvider(settings, client=self.client, max_image_bytes=MAX_BYTES, call_timeout=timedelta(seconds=3))
        )
        return self.providers[-1]

    @property
    def report(self) -> dict[str, Any]:
        return dict(self.sandbox.shop.report().get("comfyui", {"images_bought": 0}))

    async def ask(self, path: str) -> Any:
        async with aiohttp.ClientSession() as http, http.get(self.sandbox.url + path) as answer:
            return await answer.json()


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    """A quick one."""
    async with Sandbox(Behaviour(latency_s=0.02)) as sandbox:
        client = GuardedClient(allowed_hosts=["127.0.0.1"])
        rig = Rig(sandbox, client)
        yield rig
        for provider in rig.providers:
            await provider.close()
        await client.close()


async def _until(rig: Rig, path: str, condition: Callable[[Any], bool]) -> Any:
    """What the sandbox answers once it is what is waited for; it gives no signal."""
    async with asyncio.timeout(10):
        while not condition(answer := await rig.ask(path)):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)
        return answer


# What goes well


async def test_a_batch_comes_from_one_prompt(rig: Rig) -> None:
    """Each index gets a whole picture of its own in the size of the settings, and all of them are bought once."""
    seen = await _seen(rig.provider(), _request(2, 5, 9))
    assert seen.error is None
    assert seen.kinds == ["Submitting", "TaskAccepted", *["ImageMade"] * 3]
    assert [image.index for image in seen.made] == [2, 5, 9]
    assert seen.events[0] == Submitting(seen.task_id)
    assert seen.task_id.endswith(f"@{rig.url()}")
    pictures = {content_of(image) for image in seen.made}
    assert len(pictures) == 3
    for image in seen.made:
        with Image.open(io.BytesIO(content_of(image))) as picture:
            assert (picture.size, image.media_type) == ((64, 96), "image/png")
    assert (rig.report["images_bought"], rig.report["money"]) == (3, 0)


async def test_the_model_workflow_runs_too(rig: Rig) -> None:
    """The other workflow that is shipped, with a model, is one that the servers take."""
    seen = await _seen(rig.provider(workflow=CONFIG / "comfyui-img2img.json"), _request(1, 2))
    assert seen.error is None
    assert len(seen.made) == 2


async def test_the_photo_lies_there_once(rig: Rig) -> None:
    """The same photo of two calls is one file, whose name comes from its content."""
    provider = rig.provider()
    await _seen(provider, _request(1))
    await _seen(provider, _request(2))
    entries = await rig.ask("/comfyui/one/history")
    used = {entry["prompt"][2]["1"]["inputs"]["image"] for entry in entries.values()}
    assert used == {f"jobdaemon/{hashlib.sha256(PHOTO).hexdigest()[:32]}.png"}


async def test_the_websocket_is_quicker_than_polling(rig: Rig) -> None:
    """With a poll far longer than the test, the end is known as soon as the server says it."""
    seen = await _seen(rig.provider(poll=timedelta(seconds=60)), _request(1))
    assert seen.error is None


async def test_a_retry_asks_for_the_same_picture(rig: Rig) -> None:
    """The same image again has its seed again but a new file name; another image has another seed."""
    provider = rig.provider()
    for index in (1, 1, 2):
        await _seen(provider, _request(index))
    prompts = [entry["prompt"][2] for entry in (await rig.ask("/comfyui/one/history")).values()]
    seeds = [nodes["4"]["inputs"]["seed"] for nodes in prompts]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len({nodes["5"]["inputs"]["filename_prefix"] for nodes in prompts}) == 3


# Several servers


async def test_the_least_busy_server_is_first(rig: Rig) -> None:
    """Calls that begin at the same moment are spread over the servers, and one server runs one prompt at a time."""
    rig.sandbox.behaviour.latency_s = 0.1
    names = ["a", "b", "c"]
    provider = rig.provider(*map(rig.url, names))
    calls = await asyncio.gather(*(_seen(provider, _request(index)) for index in range(1, 10)))
    assert all(call.error is None for call in calls)
    used = [call.task_id.rpartition("/")[2] for call in calls]
    assert [used.count(name) for name in names] == [3, 3, 3]
    assert rig.report["peak_concurrency"] == 1


async def test_other_people_s_prompts_count(rig: Rig) -> None:
    """A server that somebody else keeps busy is passed over."""
    rig.sandbox.behaviour.latency_s = 0.3
    cut = await _cut_after(rig.provider(rig.url("a")), _request(1), TaskAccepted)
    assert cut.task_id.endswith("/a")
    seen = await _seen(rig.provider(rig.url("a"), rig.url("b")), _request(2))
    assert seen.task_id.endswith("/b")


def _closed_url() -> str:
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def test_a_server_that_is_down_is_passed_over(rig: Rig) -> None:
    """One of two is enough; with none the error says so, costs nothing, and is no submit."""
    seen = await _seen(rig.provider(_closed_url(), rig.url()), _request(1))
    assert seen.error is None
    nobody = await _seen(rig.provider(_closed_url(), _closed_url()), _request(1))
    assert isinstance(nobody.error, ProviderUnavailableError)
    assert "none of 2 servers" in str(nobody.error)
    assert nobody.events == []


async def test_a_server_that_comes_back_is_asked_again(rig: Rig) -> None:
    """A rest ends at once when there is nobody else."""
    url = _closed_url()
    provider = rig.provider(f"{url}/comfyui/late")
    assert (await _seen(provider, _request(1))).error is not None
    async with Sandbox(Behaviour(latency_s=0.02), port=int(url.rpartition(":")[2])):
        assert (await _seen(provider, _request(1))).error is None


async def test_a_workflow_that_one_server_cannot_run_goes_to_another(rig: Rig, tmp_path: Path) -> None:
    """A refusal by one server is not the end: only when all have refused, the order is told."""
    nodes = json.loads(EXAMPLE.read_text())
    nodes["8"] = {"class_type": "SomebodysNode", "inputs": {}}
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(nodes))
    seen = await _seen(rig.provider(rig.url("a"), rig.url("b"), workflow=broken), _request(1))
    assert isinstance(seen.error, ProviderRefusedError)
    assert "SomebodysNode" in str(seen.error)
    assert seen.kinds == ["Submitting", "TaskOver"] * 2
    with_one_down = await _seen(rig.provider(rig.url("a"), _closed_url(), workflow=broken), _request(1))
    assert isinstance(with_one_down.error, ProviderUnavailableError)
    assert rig.report["images_bought"] == 0


# Going on with a call


async def test_a_handed_back_job_resumes_its_prompt(rig: Rig) -> None:
    """Closing a call leaves the prompt where it is; the next attempt fetches what it made, in that call's order."""
    provider, request = rig.provider(), _request(3, 4)
    accepted = await _cut_after(provider, request, TaskAccepted)
    seen = await _seen(rig.provider(), _resumed(replace(request, images=((4, 1),)), accepted.task_id, 3, 4))
    assert seen.error is None
    assert seen.kinds == ["ImageMade", "ImageMade"]
    assert [image.index for image in seen.made] == [3, 4]
    assert rig.report["images_bought"] == 2


async def test_a_call_cut_before_its_submit_is_submitted_anew(rig: Rig) -> None:
    """An id that was noted and never sent is known to nobody: the call is over, and made anew in the same attempt."""
    provider, request = rig.provider(), _request(1)
    submitting = await _cut_after(provider, request, Submitting)
    seen = await _seen(provider, _resumed(request, submitting.task_id))
    assert seen.kinds == ["TaskOver", "Submitting", "TaskAccepted", "ImageMade"]
    assert rig.report["images_bought"] == 1


async def test_a_server_that_is_not_set_any_more_has_nothing(rig: Rig) -> None:
    """A call at a server that was taken out of the settings is made anew elsewhere; nobody asks the old address."""
    seen = await _seen(rig.provider(), _resumed(_request(1), "x@http://gone.example:8188"))
    assert seen.error is None
    assert seen.kinds == ["TaskOver", "Submitting", "TaskAccepted", "ImageMade"]


async def test_an_id_that_is_none_of_ours_is_over(rig: Rig) -> None:
    """An id that names no server ends its call with an error, and nothing is made for it."""
    seen = await _seen(rig.provider(), _resumed(_request(1), "no-such-task"))
    assert (seen.kinds, type(seen.error)) == (["TaskOver"], ProviderUnavailableError)
    assert rig.report["images_bought"] == 0


async def test_a_server_that_died_with_its_prompt_is_left_for_another(rig: Rig) -> None:
    """A resumed call whose server is silent goes elsewhere if it can, else it is kept and tried again: an outage as any other."""
    dead, request = _closed_url(), _request(1)
    task_id = f"0b8e8e4e-0000-4000-8000-000000000000@{dead}"
    seen = await _seen(rig.provider(dead, rig.url()), _resumed(request, task_id))
    assert seen.error is None
    assert seen.kinds == ["TaskOver", "Submitting", "TaskAccepted", "ImageMade"]
    alone = await _seen(rig.provider(dead), _resumed(request, task_id))
    assert type(alone.error) is ProviderUnavailableError
    assert alone.events == []


async def test_cancel_takes_a_waiting_prompt_and_interrupts_a_running_one(rig: Rig) -> None:
    """What waits leaves the queue, what runs stops, and neither is touched for another's sake."""
    rig.sandbox.behaviour.latency_s = 5.0
    provider = rig.provider()
    cut = [await _cut_after(provider, _request(index), TaskAccepted) for index in (1, 2, 3)]
    calls = [ProviderCall(1, event.task_id, (1,), None, datetime.now(UTC)) for event in cut]
    assert await provider.cancel(calls[1]) is True
    assert [len(rows) for rows in (await rig.ask("/comfyui/one/queue")).values()] == [1, 1]
    assert await provider.cancel(calls[0]) is True
    interrupted = await _seen(provider, _resumed(_request(1), cut[0].task_id))
    assert isinstance(interrupted.error, ProviderUnavailableError)
    assert "interrupted" in str(interrupted.error)
    assert interrupted.kinds == ["TaskOver"]
    assert await provider.cancel(calls[0]) is False
    assert await provider.cancel(replace(calls[0], task_id="x@http://gone.example")) is False
    assert await provider.cancel(calls[2]) is True


async def test_a_prompt_that_never_ends_is_kept(rig: Rig) -> None:
    """After the patience of one attempt: running is an error that keeps the call, waiting a sign that too many were sent."""
    rig.sandbox.behaviour.latency_s = 5.0
    provider = rig.provider(task_timeout=timedelta(milliseconds=100))
    running = await _seen(provider, _request(1))
    waiting = await _seen(provider, _request(2))
    assert (type(running.error), type(waiting.error)) == (ProviderUnavailableError, RateLimitedError)
    assert running.kinds == waiting.kinds == ["Submitting", "TaskAccepted"]
    # It was slow, not dead: the next attempt has it.
    rig.sandbox.behaviour.latency_s = 0.02
    provider_of_next = rig.provider(task_timeout=timedelta(seconds=10))
    assert (await _seen(provider_of_next, _resumed(_request(2), waiting.task_id))).error is None


# Faults


@pytest.mark.parametrize(
    ("fault", "error", "kinds"),
    [
        ("429", RateLimitedError, ["Submitting", "TaskOver"]),
        ("500", ProviderUnavailableError, ["Submitting", "TaskOver"]),
        ("html", ProviderUnavailableError, ["Submitting", "TaskOver"]),
        ("expired", ProviderUnavailableError, ["Submitting", "TaskAccepted", "TaskOver"]),
        ("failed", DeviceMemoryError, ["Submitting", "TaskAccepted", "TaskOver"]),
    ],
)
async def test_each_fault_is_its_error(rig: Rig, fault: str, error: type[Exception], kinds: list[str]) -> None:
    """What goes wrong for good at the server closes the call, so that the next attempt submits anew."""
    rig.sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    seen = await _seen(rig.provider(), _request(1))
    assert type(seen.error) is error
    assert seen.kinds == kinds
    assert rig.report["images_bought"] == 0


@pytest.mark.parametrize("fault", ["reset", "timeout", "slow", "truncated", "length", "link"])
async def test_each_passing_fault_is_got_over(rig: Rig, fault: str) -> None:
    """A lost answer is looked for, a file that did not come whole is fetched again: no attempt is spent, nothing made twice."""
    rig.sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    seen = await _seen(rig.provider(), _request(1, 2))
    assert seen.error is None
    assert [image.index for image in seen.made] == [1, 2]
    assert rig.report["images_bought"] == 2


async def test_a_file_that_drips_is_given_up(rig: Rig) -> None:
    """A file that takes for ever is asked for again when its time is over."""
    rig.sandbox.behaviour.faults = parse_faults("drip=1")
    rig.sandbox.behaviour.image_bytes = 20_000
    seen = await _seen(rig.provider(), _request(1))
    assert seen.error is None


async def test_a_partial_batch_brings_what_it_has(rig: Rig) -> None:
    """Fewer images than asked for: the first indexes have them, and the rest is left out."""
    rig.sandbox.behaviour.faults = parse_faults("partial=1")
    seen = await _seen(rig.provider(), _request(1, 2, 3))
    assert [image.index for image in seen.made] == [1, 2]
    assert seen.error is None


async def test_a_file_that_is_gone_is_made_again(rig: Rig) -> None:
    """A result that somebody cleared away ends the call, after the images that are still there."""
    provider, request = rig.provider(), _request(1, 2)
    accepted = await _cut_after(provider, request, TaskAccepted)
    prompt_id = accepted.task_id.partition("@")[0]
    entry = await _until(rig, f"/comfyui/one/history/{prompt_id}", bool)
    entry[prompt_id]["outputs"]["5"]["images"][0]["filename"] = "gone.png"

    async def history(request: web.Request) -> web.Response:
        return web.json_response(entry)

    async with _in_front_of(rig.url(), {f"/history/{prompt_id}": history}) as url:
        seen = await _seen(rig.provider(url), _resumed(request, f"{prompt_id}@{url}"))
    assert seen.kinds == ["ImageMade", "TaskOver"]
    assert [image.index for image in seen.made] == [2]
    assert isinstance(seen.error, ProviderUnavailableError)
    assert "gone.png" in str(seen.error)


# Servers that are not quite ComfyUI


Answering = Callable[[web.Request], Any]


@asynccontextmanager
async def _in_front_of(target: str, own: dict[str, Answering], *, hides_sockets: bool = False) -> AsyncIterator[str]:
    """A server that passes everything on to *target* except for the paths it answers itself."""
    async with aiohttp.ClientSession() as http:

        async def handle(request: web.Request) -> web.StreamResponse:
            for path in (request.path, f"{request.method} {request.path}"):
                if path in own:
                    response: web.StreamResponse = await own[path](request)
                    return response
            if hides_sockets and request.path == "/ws":
                return web.Response(status=404)
            headers = {"Content-Type": request.headers.get("Content-Type", "application/octet-stream")}
            body = await request.read()
            async with http.request(request.method, target + request.path_qs, data=body, headers=headers) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

        app = web.Application(client_max_size=MAX_BYTES)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def test_without_a_websocket_there_is_polling(rig: Rig) -> None:
    """A proxy that lets no websocket through costs some milliseconds, nothing else."""
    async with _in_front_of(rig.url(), {}, hides_sockets=True) as url:
        seen = await _seen(rig.provider(url), _request(1))
    assert seen.error is None


async def test_a_websocket_that_breaks_off_is_not_missed(rig: Rig) -> None:
    """A socket that talks nonsense and closes leaves polling."""

    async def nonsense(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for text in ("{", "[]", "null", '{"type": 3, "data": {"prompt_id": []}}', '{"type": "executing", "data": null}'):
            await socket.send_str(text)
        await socket.send_bytes(b"\0\0\0\1")
        await socket.close()
        return socket

    async with _in_front_of(rig.url(), {"/ws": nonsense}) as url:
        seen = await _seen(rig.provider(url), _request(1))
    assert seen.error is None


async def test_a_websocket_that_redirects_is_not_followed(rig: Rig) -> None:
    """Nobody is sent to another machine: the socket is done without."""
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=404)

    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/elsewhere"})

    async with _in_front_of(rig.url(), {"/ws": redirect, "/elsewhere": elsewhere}) as url:
        seen = await _seen(rig.provider(url), _request(1))
    assert (seen.error, asked) == (None, [])


async def test_a_lie_of_the_websocket_is_not_believed(rig: Rig) -> None:
    """That a prompt is over is asked, not believed: a socket that says so too early costs a question."""
    rig.sandbox.behaviour.latency_s = 0.1

    async def early(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        data = {"node": None, "prompt_id": request.query["clientId"]}
        await socket.send_json({"type": "executing", "data": data})
        async for _ in socket:
            pass
        return socket

    async with _in_front_of(rig.url(), {"/ws": early}) as url:
        seen = await _seen(rig.provider(url), _request(1))
    assert seen.error is None
    assert len(seen.made) == 1


async def test_an_old_server_s_own_id_is_noted(rig: Rig) -> None:
    """A version that gives ids of its own is followed under its own."""

    async def submit(request: web.Request) -> web.Response:
        body = await request.json()
        del body["prompt_id"]
        async with aiohttp.ClientSession() as http, http.post(f"{rig.url()}/prompt", json=body) as answer:
            return web.json_response(await answer.json())

    async with _in_front_of(rig.url(), {"POST /prompt": submit}) as url:
        seen = await _seen(rig.provider(url), _request(1))
        assert seen.error is None
        assert seen.events[0] != Submitting(seen.task_id)
        again = await _seen(rig.provider(url), _resumed(_request(1), seen.task_id))
    assert again.kinds == ["ImageMade"]


async def test_a_prompt_with_a_bad_output_is_taken_back(rig: Rig, tmp_path: Path) -> None:
    """Accepted, but one of its outputs is not valid: refused, and not left in the queue."""
    rig.sandbox.behaviour.latency_s = 5.0
    nodes = json.loads(EXAMPLE.read_text())
    nodes["8"] = {"class_type": "SaveImage", "inputs": {"images": ["4", 0]}}
    workflow = tmp_path / "half.json"
    workflow.write_text(json.dumps(nodes))
    seen = await _seen(rig.provider(workflow=workflow), _request(1))
    assert isinstance(seen.error, ProviderRefusedError)
    assert "filename_prefix" in str(seen.error)
    await _until(rig, "/comfyui/one/prompt", lambda answer: answer["exec_info"]["queue_remaining"] == 0)
    assert rig.report["images_bought"] == 0


@pytest.mark.parametrize("path", ["GET /prompt", "POST /upload/image", "POST /prompt", "/view"])
@pytest.mark.parametrize(
    "answer",
    [
        {"status": 200, "text": "<html>the hotel's network</html>", "content_type": "text/html"},
        {"status": 200, "text": "[]", "content_type": "application/json"},
        {"status": 302, "headers": {"Location": "http://169.254.169.254/latest/meta-data/"}},
        {"status": 200, "body": b"A" * (2 * MAX_BYTES)},
    ],
    ids=["html", "list", "redirect", "huge"],
)
async def test_nonsense_is_one_clear_error(rig: Rig, path: str, answer: dict[str, Any]) -> None:
    """Whatever a server says in place of ComfyUI's words is retryable, and no redirect is followed."""

    async def nonsense(request: web.Request) -> web.Response:
        return web.Response(**answer)

    async with _in_front_of(rig.url(), {path: nonsense}) as url:
        seen = await _seen(rig.provider(url), _request(1))
    assert isinstance(seen.error, ProviderUnavailableError)
    assert seen.made == []


async def test_a_cancelled_call_leaves_nothing_open(rig: Rig) -> None:
    """A call that is cancelled while it waits ends at once, closes its websocket and leaves its prompt running."""
    rig.sandbox.behaviour.latency_s = 5.0
    accepted = asyncio.Event()

    async def call() -> None:
        async with aclosing(provider.generate(_request(1))) as events:
            async for event in events:
                if isinstance(event, TaskAccepted):
                    accepted.set()

    provider = rig.provider()
    task = asyncio.ensure_future(call())
    await asyncio.wait_for(accepted.wait(), 10)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)
    assert (await rig.ask("/comfyui/one/prompt"))["exec_info"]["queue_remaining"] == 1


@pytest.mark.parametrize("content", [None, "{", b"\xff\xfe", json.dumps({"1": {"class_type": "SaveImage", "inputs": {}}})])
async def test_a_wrong_workflow_is_told_at_start(rig: Rig, tmp_path: Path, content: str | bytes | None) -> None:
    """A missing, broken or incomplete file is one sentence that names the setting and the file."""
    workflow = tmp_path / "flow.json"
    if content is not None:
        workflow.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SettingsError) as refused:
        rig.provider(workflow=workflow)
    assert str(refused.value).startswith(f"generate.comfyui.workflow: {workflow} ")
    assert "\n" not in str(refused.value)
