"""
Whole orders through a real daemon whose services answer everything, but not well: each order ends soon, with one clear error of
the right kind, and no key, token or signed link is left in any line or row.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web
from PIL import Image

from jobdaemon.app import open_daemon
from jobdaemon.domain.order import NewOrder
from jobdaemon.enqueue import enqueue
from jobdaemon.events import DaemonReady, Events
from jobdaemon.logs import configure_logs, log_events
from jobdaemon.settings import load_settings
from tests.daemons import until

pytestmark = pytest.mark.newest_postgres

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.png"
WORKFLOW = Path(__file__).parents[2] / "config" / "comfyui-example.json"
SOURCE = "artifact:sources/portrait.png"
PROVIDERS = ("openai_images", "dashscope", "jimeng", "comfyui")
KEYS = {
    "openai": "sk-OPENAI-0123456789",
    "dashscope": "sk-DASHSCOPE-0123456789",
    "jimeng": "JIMENG0123456789==",
    "bed": "BED-0123456789",
}
SIGNED = "Signature=SIGNED0123456789&Expires=1999999999"
#: Nowhere to be found once all has ended; a link to a photo at Superbed is open to everybody.
SECRETS = (*KEYS.values(), "SIGNED0123456789", "/superbed/item/")


def _picture() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(out, "PNG")
    return out.getvalue()


PICTURE = _picture()
NO_PICTURE = b"These are words and no picture. " * 20


class Services:
    """Four APIs and Superbed, each just as far as its provider needs it; *mode* says what is wrong with their answers."""

    def __init__(self) -> None:
        self.mode = ""
        self.url = ""
        self._prompts: set[str] = set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=50 * 1024**2)
        app.add_routes(
            [
                web.post("/v1/images/edits", self.openai),
                web.post("/api/v1/services/aigc/image2image/image-synthesis", self.dashscope_submit),
                web.get("/api/v1/tasks/{id}", self.dashscope_poll),
                web.post("/", self.jimeng),
                web.post("/superbed/upload", self.superbed),
                web.post("/superbed/delete", self.deleted),
                web.get("/comfyui/prompt", self.comfyui_load),
                web.post("/comfyui/upload/image", self.comfyui_upload),
                web.post("/comfyui/prompt", self.comfyui_submit),
                web.get("/comfyui/history/{id}", self.comfyui_history),
                web.get("/comfyui/queue", self.comfyui_queue),
                web.get("/comfyui/view", self.image),
                web.get("/image/{name}", self.image),
            ]
        )
        return app

    def _instead(self, request: web.Request) -> web.StreamResponse | None:
        """What every call of an API is answered with in some modes."""
        if self.mode == "page":
            return web.Response(text="<html>Welcome to the hotel</html>", content_type="text/html")
        if self.mode == "inwards":
            return web.Response(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"})
        if self.mode == "endless":
            return web.Response(body=b'{"' + b"A" * (40 * 1024**2), content_type="application/json")
        if self.mode == "key":
            told = request.headers.get("Authorization", "")
            code = {"code": "InvalidApiKey", "message": f"no such key: {told}"}
            gateway = {"ResponseMetadata": {"Error": {"Code": "InvalidAccessKey", "Message": f"no such key: {told}"}}}
            return web.json_response({"error": code, **code, **gateway}, status=401)
        return None

    def _link(self) -> str:
        return f"{self.url}/image/{uuid.uuid4().hex}.png?{SIGNED}"

    async def image(self, request: web.Request) -> web.StreamResponse:
        if self.mode == "image inwards":
            return web.Response(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"})
        return web.Response(body=NO_PICTURE if self.mode == "no picture" else PICTURE, content_type="image/png")

    async def openai(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        if (instead := self._instead(request)) is not None:
            return instead
        if self.mode == "unsafe":
            told = {"code": "moderation_blocked", "message": "rejected by the safety system"}
            return web.json_response({"error": told}, status=400)
        content = base64.b64encode(NO_PICTURE if self.mode == "no picture" else PICTURE).decode()
        image = {"url": self._link()} if self.mode == "image inwards" else {"b64_json": content}
        return web.json_response({"data": [] if self.mode == "no image" else [image]})

    async def dashscope_submit(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        if (instead := self._instead(request)) is not None:
            return instead
        if self.mode == "unsafe":
            return web.json_response({"code": "DataInspectionFailed", "message": "inappropriate content"}, status=400)
        return web.json_response({"output": {"task_id": uuid.uuid4().hex, "task_status": "PENDING"}})

    async def dashscope_poll(self, request: web.Request) -> web.StreamResponse:
        status = "RUNNING" if self.mode == "never" else "SUCCEEDED"
        results = [] if self.mode == "no image" else [{"url": self._link()}]
        return web.json_response({"output": {"task_id": request.match_info["id"], "task_status": status, "results": results}})

    async def jimeng(self, request: web.Request) -> web.StreamResponse:
        if (instead := self._instead(request)) is not None:
            return instead
        data: dict[str, Any] = {"task_id": str(uuid.uuid4().int)[:18]}
        if request.query["Action"] == "CVSync2AsyncGetResult":
            images = [] if self.mode == "no image" else [self._link()]
            data = {"status": "generating" if self.mode == "never" else "done", "image_urls": images}
        elif self.mode == "unsafe":
            return web.json_response({"code": 50412, "data": None, "message": "Text Risk Not Pass"}, status=400)
        return web.json_response({"code": 10000, "data": data, "message": "Success"})

    async def superbed(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.json_response({"err": 0, "url": f"{self.url}/superbed/item/{uuid.uuid4().hex[:24]}.jpg"})

    async def deleted(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"err": 0})

    async def comfyui_load(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"exec_info": {"queue_remaining": 0}})

    async def comfyui_upload(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.json_response({"name": "photo.png", "subfolder": "jobdaemon", "type": "input"})

    async def comfyui_submit(self, request: web.Request) -> web.StreamResponse:
        if (instead := self._instead(request)) is not None:
            return instead
        prompt_id = (await request.json())["prompt_id"]
        self._prompts.add(prompt_id)
        return web.json_response({"prompt_id": prompt_id, "number": 1, "node_errors": {}})

    async def comfyui_history(self, request: web.Request) -> web.StreamResponse:
        prompt_id = request.match_info["id"]
        if self.mode == "never" or prompt_id not in self._prompts:
            return web.json_response({})
        images = [] if self.mode == "no image" else [{"filename": "0.png", "subfolder": "", "type": "output"}]
        status = {"status_str": "success", "completed": True, "messages": []}
        return web.json_response({prompt_id: {"outputs": {"5": {"images": images}}, "status": status}})

    async def comfyui_queue(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"queue_running": [[1, prompt_id] for prompt_id in self._prompts], "queue_pending": []})


@asynccontextmanager
async def serving() -> AsyncIterator[Services]:
    """Services on loopback."""
    services = Services()
    runner = web.AppRunner(services.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    services.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield services
    finally:
        await runner.cleanup()


def environ_for(url: str, folder: Path) -> dict[str, str]:
    """Every provider, at *url*, with two attempts."""
    generate = {
        "OPENAI_IMAGES__BASE_URL": f"{url}/v1",
        "OPENAI_IMAGES__API_KEY": KEYS["openai"],
        "DASHSCOPE__BASE_URL": url,
        "DASHSCOPE__API_KEY": KEYS["dashscope"],
        "DASHSCOPE__POLL": "20ms",
        "DASHSCOPE__TASK_TIMEOUT": "300ms",
        "JIMENG__BASE_URL": url,
        "JIMENG__ACCESS_KEY_ID": "AKhostile",
        "JIMENG__SECRET_ACCESS_KEY": KEYS["jimeng"],
        "JIMENG__PHOTO": "superbed",
        "JIMENG__POLL": "20ms",
        "JIMENG__TASK_TIMEOUT": "300ms",
        "COMFYUI__SERVERS": f'["{url}/comfyui"]',
        "COMFYUI__WORKFLOW": str(WORKFLOW),
        "COMFYUI__POLL": "20ms",
        "COMFYUI__TASK_TIMEOUT": "300ms",
    }
    return dict(os.environ) | {
        "JOBDAEMON_DATA_DIR": str(folder),
        "JOBDAEMON_ENGINE__POLL": "300ms",
        "JOBDAEMON_BEAUTIFY__STRENGTH": "0",
        "JOBDAEMON_PHOTOS__ALLOWED_HOSTS": url.removeprefix("http://"),
        "JOBDAEMON_SUPERBED__URL": f"{url}/superbed/upload",
        "JOBDAEMON_SUPERBED__TOKEN": KEYS["bed"],
        "JOBDAEMON_QUEUES__GENERATE__ATTEMPTS": "2",
        "JOBDAEMON_QUEUES__GENERATE__BACKOFF": "10ms",
        "JOBDAEMON_QUEUES__UPLOAD__ATTEMPTS": "2",
        "JOBDAEMON_QUEUES__UPLOAD__BACKOFF": "10ms",
        **{f"JOBDAEMON_GENERATE__{name}": value for name, value in generate.items()},
    }


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the daemon logs, all of it."""
    stream, root = io.StringIO(), logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    configure_logs("json", "debug", stream)
    yield stream
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.captureWarnings(capture=False)


#: What is wrong -> for each provider the kind of error, and a word of what is said; None: it completes.
CASES: dict[str, dict[str, tuple[str, str]]] = {
    "page": dict.fromkeys(PROVIDERS[:3], ("AnswerLostError", "no JSON (text/html)"))
    | {"comfyui": ("ProviderUnavailableError", "no JSON (text/html)")},
    "inwards": dict.fromkeys(PROVIDERS, ("ProviderUnavailableError", "302")),
    "no image": {
        "openai_images": ("ProviderRefusedError", "without any image"),
        "dashscope": ("ProviderUnavailableError", "no image"),
        "jimeng": ("ProviderUnavailableError", "without any image"),
        "comfyui": ("ProviderUnavailableError", "no image"),
    },
    "no picture": {
        "openai_images": ("ProviderUnavailableError", "openai_images sent something that is neither"),
        "dashscope": ("SourceUnavailableError", "dashscope sent an image that cannot be used"),
        "jimeng": ("SourceUnavailableError", "jimeng sent an image that cannot be used"),
        "comfyui": ("ProviderUnavailableError", "sent something that is neither"),
    },
    "image inwards": dict.fromkeys(PROVIDERS[:3], ("UnsupportedImageError", "gave a link that is not followed"))
    | {"comfyui": ("ProviderUnavailableError", "302")},
    # A long string in the place of an image is not kept in memory, however long; what is left is no JSON.
    "endless": {"openai_images": ("AnswerLostError", "no JSON")}
    | dict.fromkeys(PROVIDERS[1:], ("AnswerLostError", "answered with more than")),
    "key": dict.fromkeys(PROVIDERS[:3], ("KeyRefusedError", "no such key")) | {"comfyui": ("ProviderUnavailableError", "401")},
    "unsafe": {
        "openai_images": ("ProviderRefusedError", "safety system"),
        "dashscope": ("ProviderRefusedError", "inappropriate content"),
        "jimeng": ("ProviderRefusedError", "Text Risk Not Pass"),
    },
    "never": dict.fromkeys(PROVIDERS[1:], ("ProviderUnavailableError", "after 0.3 s")),
}


@pytest.mark.parametrize("mode", list(CASES))
async def test_each_order_ends_with_one_clear_error(
    mode: str, database: str, connection: psycopg.Connection[Any], lines: io.StringIO, tmp_path: Path
) -> None:
    """Whatever is wrong with a service, its order fails with a reason of the right kind, others complete; no secret is told."""
    source = tmp_path / "artifacts" / SOURCE.removeprefix("artifact:")
    source.parent.mkdir(parents=True)
    source.write_bytes(PORTRAIT.read_bytes())
    events = Events()
    ready = events.expect(DaemonReady)
    async with serving() as services:
        services.mode = mode
        async with open_daemon(load_settings(environ=environ_for(services.url, tmp_path)), database, events) as daemon:
            stop_logging = log_events(events)
            task = asyncio.ensure_future(daemon.supervisor.run(wait_for_database=True))
            try:
                await ready.wait(60)
                orders = {
                    name: enqueue(
                        connection, NewOrder(plan="Start", source=SOURCE, prompts=("by a window",), images=1, provider=name)
                    ).order_id
                    for name in PROVIDERS
                }
                await until(lambda: _count(connection, "jobdaemon.orders WHERE finished_at IS NULL") == 0)
                await until(lambda: _count(connection, "jobdaemon.photo_links") == 0)
            finally:
                daemon.supervisor.stop("the test is over")
                daemon.supervisor.stop("the test is over")
                async with asyncio.timeout(30):
                    await task
                stop_logging()
    for provider, order_id in orders.items():
        expected = CASES[mode].get(provider)
        row = connection.execute("SELECT status, error FROM jobdaemon.orders WHERE id = %s", [order_id]).fetchone()
        assert row is not None
        if expected is None:
            assert row == ("completed", None), provider
            continue
        kind, words = expected
        assert row[0] == "failed", provider
        assert words in row[1], provider
        kinds = connection.execute(
            "SELECT DISTINCT error_kind FROM jobdaemon.attempts WHERE order_id = %s AND outcome <> 'snooze'", [order_id]
        ).fetchall()
        assert kinds == [(kind,)], provider
    told = lines.getvalue() + _everything(connection)
    assert "by a window" in told
    assert [secret for secret in SECRETS if secret in told] == []
    assert re.findall(r"(?i)signature=(?!\*)\S+", told) == []


def _count(connection: psycopg.Connection[Any], of: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {of}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def _everything(connection: psycopg.Connection[Any]) -> str:
    """Every row of every table and view of ours, as text."""
    names = connection.execute(
        "SELECT c.oid::regclass::text FROM pg_class c WHERE relnamespace = 'jobdaemon'::regnamespace AND relkind IN ('r', 'v')"
    ).fetchall()
    rows = (connection.execute(f"SELECT to_jsonb(t) FROM {name} t".encode()).fetchall() for [name] in names)
    return json.dumps([[row for [row] in found] for found in rows])
