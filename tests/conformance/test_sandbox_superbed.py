"""Superbed in the sandbox, used as its public clients use it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest_asyncio

from jobdaemon.sandbox import Behaviour, Sandbox

PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)
JPEG = b"\xff\xd8\xff" + bytes(50)
FILE = ("photo.png", PNG, "image/png")


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(Behaviour(latency_s=0.0)) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{sandbox.url}/superbed/", trust_env=False) as client:
        yield client


async def test_the_token_may_stand_in_the_form_or_the_query(client: httpx.AsyncClient) -> None:
    """Both are taken; without a token the answer is 200 with an error in it."""
    for query, fields in (({}, {"token": "t", "watermark": "false"}), ({"token": "t"}, {})):
        body = (await client.post("upload", params=query, data=fields, files={"file": FILE})).json()
        assert body["err"] == 0
    refused = await client.post("upload", files={"file": FILE})
    assert (refused.status_code, refused.json()["err"]) == (200, 1)


async def test_a_link_gives_the_photo_some_by_a_redirect(client: httpx.AsyncClient) -> None:
    """Of two links one answers 302, and both end in the bytes with their type."""
    statuses = set()
    for content, media_type in ((PNG, "image/png"), (JPEG, "image/jpeg")):
        link = (await client.post("upload", data={"token": "t"}, files={"file": ("x", content, media_type)})).json()["url"]
        statuses.add((await client.get(link)).status_code)
        answer = await client.get(link, follow_redirects=True)
        assert (answer.content, answer.headers["content-type"]) == (content, media_type)
    assert statuses == {200, 302}


async def test_several_photos_in_one_request(client: httpx.AsyncClient) -> None:
    """file0, file1, … give urls by field."""
    files = {"file0": FILE, "file1": ("b.jpg", JPEG, "image/jpeg")}
    body = (await client.post("upload", data={"token": "t"}, files=files)).json()
    assert set(body["urls"]) == {"file0", "file1"}
    assert len(body["ids"]) == 2


async def test_a_photo_that_is_fetched(client: httpx.AsyncClient) -> None:
    """A photo named by src is fetched; only this machine is asked for it."""
    link = (await client.post("upload", data={"token": "t"}, files={"file": FILE})).json()["url"]
    body = (await client.post("upload", data={"token": "t", "src": link})).json()
    assert (await client.get(body["url"], follow_redirects=True)).content == PNG
    for source in ("https://photos.example/a.png", "http://127.0.0.1:9/a.png", f"{client.base_url}item/none.png"):
        assert (await client.post("upload", data={"token": "t", "src": source})).json()["err"] != 0


async def test_no_picture_is_refused(client: httpx.AsyncClient) -> None:
    """Bytes that are no picture, and no bytes, are an error under 200."""
    for files in ({"file": ("x.png", b"hello", "image/png")}, {"nothing": FILE}):
        answer = await client.post("upload", data={"token": "t"}, files=files)
        assert answer.status_code == 200
        assert answer.json()["err"] != 0


async def test_a_photo_can_be_deleted(client: httpx.AsyncClient, sandbox: Sandbox) -> None:
    """A deleted photo is gone; deleting needs the token."""
    link = (await client.post("upload", data={"token": "t"}, files={"file": FILE})).json()["url"]
    assert (await client.post("delete", json={"urls": [link]})).json()["err"] != 0
    assert (await client.post("delete", content=b"no JSON")).json()["err"] != 0
    assert (await client.post("delete", json={"token": "t", "urls": [link]})).json() == {"err": 0}
    assert (await client.get(link, follow_redirects=True)).status_code == 404
    assert sandbox.report()["apis"]["superbed"]["calls"] == 1
