"""PhotoEnhanceAI in the sandbox, used as its public clients use it."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from PIL import Image

from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults

API = "photo_enhance"


def photo(shade: int = 90, media: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(buffer, media)
    return buffer.getvalue()


def part(content: bytes | None = None, name: str = "in.jpg", media_type: str = "image/jpeg") -> tuple[str, bytes, str]:
    return name, photo() if content is None else content, media_type


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(Behaviour(latency_s=0.06)) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server that answers as the code does."""
    async with httpx.AsyncClient(base_url=f"{sandbox.url}/photo-enhance/one/", trust_env=False) as client:
        yield client


async def upload(client: httpx.AsyncClient, *, query: Any = None, form: Any = None, file: Any = None) -> httpx.Response:
    return await client.post("api/v1/enhance", params=query, data=form, files={"file": file or part()})


async def told(client: httpx.AsyncClient, task_id: str) -> dict[str, Any]:
    body: dict[str, Any] = (await client.get(f"api/v1/status/{task_id}")).json()
    return body


async def over(client: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    """What *path* says, again and again, until it is over; what it said before stands before it."""
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while not seen or seen[-1].get("status") in ("queued", "pending", "processing"):
            body = (await client.get(path)).json()
            if not seen or body != seen[-1]:
                seen.append(body)
            await asyncio.sleep(0.002)
    return seen


async def test_a_photo_comes_back_four_times_as_wide(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """A task is queued, worked on and completed; its JPEG is larger than the photo, whatever its name says."""
    sandbox.behaviour.latency_s = 0.6
    blocker = (await upload(client)).json()["task_id"]
    accepted = (await upload(client, file=part(photo(100, "PNG"), "in.png", "image/png"))).json()
    assert accepted["status"] == "queued"
    assert isinstance(accepted["created_at"], float)
    early = await client.get(f"api/v1/download/{accepted['task_id']}")
    assert (early.status_code, early.json()["detail"]) == (400, "Task not completed. Current status: queued")
    seen = await over(client, f"api/v1/status/{accepted['task_id']}")
    told_of = {0.0: "queued", 0.1: "processing", 0.3: "processing", 1.0: "completed"}
    assert [body["status"] for body in seen] == [told_of[body["progress"]] for body in seen]
    assert [body["progress"] for body in seen] == sorted({body["progress"] for body in seen})
    assert len(seen) >= 3  # a machine out of breath may miss one
    assert {body["result_url"] for body in seen[:-1]} == {None}
    assert seen[-1]["result_url"] == f"/api/v1/download/{accepted['task_id']}"
    answer = await client.get(f"api/v1/download/{accepted['task_id']}")
    assert answer.headers["content-type"] == "image/jpeg"
    assert 'filename="in_enhanced.png"' in answer.headers["content-disposition"]
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("JPEG", (160, 120))
    assert (await told(client, blocker))["status"] == "completed"


async def test_wishes_count_in_the_query_only(client: httpx.AsyncClient) -> None:
    """The code reads tile_size and quality_level from the query and ignores a form's; the documentation says the form."""
    wrong = {"tile_size": "9"}
    assert (await upload(client, form=wrong)).status_code == 200
    refused = await upload(client, query=wrong)
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["query", "tile_size"])
    assert (await upload(client, query={"quality_level": "best"})).status_code == 422
    assert (await upload(client, query={"tile_size": "256", "quality_level": "fast"})).status_code == 200
    client.base_url = httpx.URL(str(client.base_url).replace("/one/", "/docs/"))
    assert (await upload(client, form=wrong)).status_code == 422
    assert (await upload(client, query=wrong)).status_code == 200


@pytest.mark.parametrize(
    ("file", "status", "words"),
    [
        (("in.jpg", bytes(50 * 1024 * 1024 + 1), "image/jpeg"), 413, "50MB"),
        (("in.jpg", b"x", "text/plain"), 400, "Invalid file type"),
        (("in.webp", b"x", "image/webp"), 400, "Unsupported file format"),
        (("in.tif", b"x", "image/tiff"), 400, "Unsupported file format"),
    ],
)
async def test_what_is_not_taken(client: httpx.AsyncClient, file: tuple[str, bytes, str], status: int, words: str) -> None:
    """Too large, no image, another extension: each is refused with a detail."""
    answer = await upload(client, file=file)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


async def test_a_form_without_a_file_is_refused(client: httpx.AsyncClient) -> None:
    """Validation answers 422 with a list."""
    answer = await client.post("api/v1/enhance", files={"photo": part()})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "file"]


async def test_a_photo_that_cannot_be_opened_fails(client: httpx.AsyncClient) -> None:
    """Bytes that are no picture are taken, and their task fails with an error."""
    task_id = (await upload(client, file=part(b"no picture"))).json()["task_id"]
    last = (await over(client, f"api/v1/status/{task_id}"))[-1]
    assert (last["status"], last["result_url"]) == ("failed", None)
    assert last["error"]


async def test_the_documentation_s_dialect(client: httpx.AsyncClient) -> None:
    """It says pending, counts in percent and writes times as text."""
    client.base_url = httpx.URL(str(client.base_url).replace("/one/", "/docs/"))
    accepted = (await upload(client)).json()
    assert accepted["status"] == "pending"
    assert isinstance(accepted["created_at"], str)
    seen = await over(client, f"api/v1/status/{accepted['task_id']}")
    assert seen[-1]["progress"] == 100
    assert {body["status"] for body in seen} <= {"pending", "processing", "completed"}


async def test_a_restart_forgets_all_tasks(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """After a restart a task is unknown, one under way is never done, and its place is free."""
    sandbox.behaviour.latency_s = 60
    task_id = (await upload(client)).json()["task_id"]
    async with httpx.AsyncClient(trust_env=False) as control:
        assert (await control.post(f"{sandbox.url}/_sandbox/photo-enhance/one/restart")).status_code == 200
    answer = await client.get(f"api/v1/status/{task_id}")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})
    assert (await client.get(f"api/v1/download/{task_id}")).status_code == 404
    sandbox.behaviour.latency_s = 0.01
    task_id = (await upload(client)).json()["task_id"]
    assert (await over(client, f"api/v1/status/{task_id}"))[-1]["status"] == "completed"
    assert sandbox.shop.account(API, f"{API}/one").open == 0


async def test_a_blocking_server_answers_nothing_while_it_works(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """Status and health hang until the photo is done, so that processing is never seen."""
    sandbox.behaviour.latency_s = 1.5
    client.base_url = httpx.URL(str(client.base_url).replace("/one/", "/blocking/"))
    task_id = (await upload(client)).json()["task_id"]
    await asyncio.sleep(0)
    for path in ("health", f"api/v1/status/{task_id}"):
        with pytest.raises(httpx.ReadTimeout):
            await client.get(path, timeout=0.05)
    assert (await told(client, task_id))["status"] == "completed"


async def test_a_task_that_is_deleted_is_gone(client: httpx.AsyncClient) -> None:
    """Deleting answers a message, and 404 the second time."""
    task_id = (await upload(client)).json()["task_id"]
    await over(client, f"api/v1/status/{task_id}")
    assert (await client.delete(f"api/v1/tasks/{task_id}")).json() == {"message": "Task deleted successfully"}
    assert (await client.delete(f"api/v1/tasks/{task_id}")).status_code == 404
    assert (await client.get("api/v1/tasks")).json() == {"total_tasks": 0, "tasks": []}


async def test_a_batch_with_a_bad_photo_is_partly_completed(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """Every photo is a task without a link of its own; the archive holds what was made, one of each name."""
    sandbox.behaviour.latency_s = 0.4
    names = ("a.jpg", "b.jpg", "a.jpg")
    contents = (photo(90), b"no picture", photo(120))
    batch_of = [("files", part(content, name)) for name, content in zip(names, contents, strict=True)]
    accepted = (await client.post("api/v1/enhance/batch", files=batch_of)).json()
    place = f"api/v1/batch/status/{accepted['batch_task_id']}"
    assert (await client.get(f"api/v1/batch/download/{accepted['batch_task_id']}")).status_code == 400
    last = (await over(client, place))[-1]
    assert (last["status"], last["completed_files"], last["failed_files"]) == ("partial_completed", 2, 1)
    assert [row["status"] for row in last["sub_tasks"]] == ["completed", "failed", "completed"]
    assert (await told(client, accepted["sub_tasks"][0]))["result_url"] is None
    assert (await client.get(f"api/v1/download/{accepted['sub_tasks'][0]}")).status_code == 200
    archive = await client.get(f"api/v1/batch/download/{accepted['batch_task_id']}")
    assert zipfile.ZipFile(io.BytesIO(archive.content)).namelist() == ["a.jpg"]
    assert (await client.get("api/v1/batch/status/none")).status_code == 404


async def test_one_bad_file_or_too_many_reject_a_batch(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """Nothing of such a batch is taken."""
    for batch_of in ([("files", part())] * 21, [("files", part()), ("files", part(name="x.webp"))]):
        assert (await client.post("api/v1/enhance/batch", files=batch_of)).status_code == 400
    assert "tasks" not in sandbox.report()["apis"].get(API, {})


async def test_deleting_a_task_of_a_batch_empties_the_server(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """The answer is an error, and every result is gone, other people's too: nobody may do that."""
    own = (await upload(client)).json()["task_id"]
    accepted = (await client.post("api/v1/enhance/batch", files=[("files", part(photo(60)))])).json()
    await over(client, f"api/v1/batch/status/{accepted['batch_task_id']}")
    assert (await client.delete(f"api/v1/tasks/{accepted['sub_tasks'][0]}")).status_code == 500
    answer = await client.get(f"api/v1/download/{own}")
    assert (answer.status_code, answer.json()["detail"]) == (404, "Result file not found")
    assert sandbox.report()["apis"][API]["emptied"] == 1


async def test_calls_are_counted(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """Calls, tasks, photos sent again, and the most that were open at once; above the concurrency a proxy answers 429."""
    sandbox.behaviour.concurrency, sandbox.behaviour.latency_s = 2, 60
    answers = [await upload(client, file=part(photo(shade))) for shade in (10, 10, 20)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"] == "1"
    report = sandbox.report()["apis"][API]
    assert {name: report[name] for name in ("calls", "rejected", "tasks", "duplicates", "peak_concurrency")} == {
        "calls": 3,
        "rejected": 1,
        "tasks": 2,
        "duplicates": 1,
        "peak_concurrency": 2,
    }


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("429", 429), ("500", 500), ("html", 502), ("reset", None), ("slow", 200)],
)
async def test_faults_of_an_upload(client: httpx.AsyncClient, sandbox: Sandbox, fault: str, expected: int | None) -> None:
    """A proxy's refusal or page, the service's own 500 with a detail, a cut connection whose task exists, a slow one."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    if expected is None:
        with pytest.raises(httpx.TransportError):
            await upload(client)
    else:
        assert (await upload(client)).status_code == expected
    assert sandbox.report()["apis"][API].get("tasks", 0) == (fault in ("reset", "slow"))


@pytest.mark.parametrize(
    ("fault", "status", "code"), [("failed", "failed", 400), ("expired", None, 404), ("link", "completed", 404)]
)
async def test_faults_of_a_task(client: httpx.AsyncClient, sandbox: Sandbox, fault: str, status: str | None, code: int) -> None:
    """A task fails for want of memory, is forgotten, or its file is."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    task_id = (await upload(client)).json()["task_id"]
    body = (await over(client, f"api/v1/status/{task_id}"))[-1]
    assert body.get("status") == status
    assert ("memory" in str(body.get("error"))) == (fault == "failed")
    assert (await client.get(f"api/v1/download/{task_id}")).status_code == code
