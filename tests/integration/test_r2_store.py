"""R2's client against a server that answers as R2 does, and against moto's S3. The common promises: tests/conformance."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from jobdaemon.domain.artifact import image_key
from jobdaemon.errors import (
    ArtifactMissingError,
    JobdaemonError,
    SettingsError,
    StoreRefusedError,
    StoreUnavailableError,
    UnsupportedImageError,
)
from jobdaemon.storage.r2 import R2Store

KEY = "orders/1/000.jpg"
ACCESS_KEY_ID = "AKTOPSECRET"
SECRET_ACCESS_KEY = "sk-topsecret"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """
    One prepared answer instead of the right one.

    ``stored`` lets the request take effect first, ``closes`` ends the connection behind the answer; status 0 is no answer.
    """

    status: int = 0
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    stored: bool = False
    closes: bool = False


@dataclass
class FakeR2:
    """The checklist of R2's behaviour that the store leans on, plus the faults a test puts in line."""

    port: int = 0
    objects: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    tasks: set[asyncio.Task[object]] = field(default_factory=set)
    etag: Callable[[bytes], str] = lambda body: hashlib.md5(body).hexdigest()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._converse(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self.tasks.discard(task)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await self._request(reader)
            fault = self.faults.pop(0) if self.faults else None
            writer.write(self._answer(request, fault))
            await writer.drain()
            if fault and (fault.closes or not fault.status):
                break

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _request(self, reader: asyncio.StreamReader) -> Request:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        method, path, _ = lines[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(method, unquote(path.partition("?")[0]), headers, body)
        self.requests.append(request)
        return request

    def _answer(self, request: Request, fault: Fault | None) -> bytes:
        if fault is None:
            return self._right(request)
        if fault.stored:
            self._right(request)
        if not fault.status:
            return b""
        return self._error(request, fault.status, fault.code, fault.headers, fault.body)

    def _right(self, request: Request) -> bytes:
        if "aws-chunked" in request.headers.get("content-encoding", "") or "expect" in request.headers:
            return self._error(request, 501, "NotImplemented")
        if not request.path.startswith("/photos/"):
            return self._error(request, 404, "NoSuchBucket")
        if request.method == "PUT":
            return self._put(request)
        if request.method == "DELETE":
            self.objects.pop(request.path, None)
            return self._reply(204, {})
        if request.path not in self.objects:
            return self._error(request, 404, "NoSuchKey")
        body, headers = self.objects[request.path]
        return self._reply(200, {**headers, "Content-Length": str(len(body))}) + (body if request.method == "GET" else b"")

    def _put(self, request: Request) -> bytes:
        if request.headers["x-amz-content-sha256"] != hashlib.sha256(request.body).hexdigest():
            return self._error(request, 400, "BadDigest")
        if request.headers["content-md5"] != base64.b64encode(hashlib.md5(request.body).digest()).decode():
            return self._error(request, 400, "BadDigest")
        if request.headers.get("if-none-match") == "*" and request.path in self.objects:
            return self._error(request, 412, "PreconditionFailed")
        kept = {
            name: value for name, value in request.headers.items() if name.startswith("x-amz-meta-") or name == "content-type"
        }
        kept["ETag"] = f'"{self.etag(request.body)}"'
        self.objects[request.path] = (request.body, kept)
        return self._reply(200, {"ETag": kept["ETag"], "Content-Length": "0"})

    def _error(
        self, request: Request, status: int, code: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> bytes:
        if body is None:
            # A hostile message: it repeats what was sent, and must not get into ours.
            message = f"{code} for {ACCESS_KEY_ID} {SECRET_ACCESS_KEY}"
            body = (
                f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
            )
        if request.method == "HEAD":
            body = b""
        length = {"Content-Length": str(len(body)), "Content-Type": "application/xml"}
        return self._reply(status, {**length, **(headers or {})}) + body

    @staticmethod
    def _reply(status: int, headers: dict[str, str]) -> bytes:
        return "\r\n".join([f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's AWS settings must not decide a test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
async def r2() -> AsyncIterator[FakeR2]:
    fake = FakeR2()
    listener = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = listener.sockets[0].getsockname()[1]
    yield fake
    listener.close()
    await listener.wait_closed()
    await fake.stop()


StoreFactory = Callable[..., R2Store]


@pytest.fixture
async def store_factory(r2: FakeR2) -> AsyncIterator[StoreFactory]:
    """Makes stores on the fake; one try per call unless a test says otherwise."""
    stores = []

    def make(**settings: Any) -> R2Store:
        url = settings.pop("endpoint_url", f"http://127.0.0.1:{r2.port}")
        bucket = settings.pop("bucket", "photos")
        store = R2Store(url, bucket, ACCESS_KEY_ID, SECRET_ACCESS_KEY, **{"tries": 1, **settings})
        stores.append(store)
        return store

    yield make
    for store in stores:
        await store.close()


@pytest.fixture
def store(store_factory: StoreFactory) -> R2Store:
    return store_factory()


# ---------------------------------------------------------------- what is sent


async def test_a_put_is_one_plain_signed_request(store: R2Store, r2: FakeR2) -> None:
    """One PUT with a plain body, its real digests, type, caching and our digest as metadata; no checksum trailer."""
    content = b"photo" * 1000
    await store.put(KEY, content, "image/jpeg")
    (request,) = r2.requests
    assert (request.method, request.path, request.body) == ("PUT", f"/photos/{KEY}", content)
    headers = request.headers
    assert headers["x-amz-content-sha256"] == hashlib.sha256(content).hexdigest()
    assert headers["content-md5"] == base64.b64encode(hashlib.md5(content).digest()).decode()
    assert headers["content-type"] == "image/jpeg"
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["x-amz-meta-sha256"] == hashlib.sha256(content).hexdigest()
    assert headers["if-none-match"] == "*"
    assert "/auto/s3/aws4_request" in headers["authorization"]
    assert not {"transfer-encoding", "content-encoding", "x-amz-trailer", "x-amz-acl", "expect"} & set(headers)
    assert not any(name.startswith(("x-amz-checksum", "x-amz-sdk")) for name in headers)


async def test_over_https_the_body_stays_signed(store_factory: StoreFactory) -> None:
    """Also where TLS would let botocore sign UNSIGNED-PAYLOAD, the signature covers the body's digest."""
    sent = []

    def stop(request: Any, **_: object) -> None:
        sent.append(dict(request.headers))
        raise ConnectionAbortedError

    store = store_factory(endpoint_url="https://r2.invalid")
    (await store._client()).meta.events.register("before-send.s3", stop)
    with pytest.raises(StoreUnavailableError):
        await store.put(KEY, b"photo", "image/jpeg")
    assert sent[0]["X-Amz-Content-SHA256"].decode() == hashlib.sha256(b"photo").hexdigest()


async def test_the_same_bytes_are_not_written_again(store: R2Store, r2: FakeR2) -> None:
    """A repeated put sends a conditional PUT and a HEAD, and changes nothing."""
    await store.put(KEY, b"photo", "image/jpeg")
    kept = r2.objects[f"/photos/{KEY}"]
    await store.put(KEY, b"photo", "image/jpeg")
    assert r2.objects[f"/photos/{KEY}"] is kept
    assert [request.method for request in r2.requests] == ["PUT", "PUT", "HEAD"]


async def test_other_bytes_are_written_over(store: R2Store, r2: FakeR2) -> None:
    """When the key holds other bytes, they are replaced by an unconditional PUT."""
    await store.put(KEY, b"first", "image/jpeg")
    await store.put(KEY, b"other", "image/jpeg")
    assert r2.objects[f"/photos/{KEY}"][0] == b"other"
    assert "if-none-match" not in r2.requests[-1].headers


async def test_a_prefix_goes_before_every_key(store_factory: StoreFactory, r2: FakeR2) -> None:
    """With a prefix the bucket can be shared; keys in artifacts stay without it."""
    store = store_factory(prefix="/team/a/", public_url="https://img.example.com/")
    artifact = await store.put("x=1.jpg", b"photo", "image/jpeg")
    assert artifact.key == "x=1.jpg"
    assert list(r2.objects) == ["/photos/team/a/x=1.jpg"]
    assert await store.get("x=1.jpg", max_bytes=5) == b"photo"
    assert store.url("x=1.jpg") == "https://img.example.com/team/a/x%3D1.jpg"
    await store.delete("x=1.jpg")
    assert r2.objects == {}


def test_without_a_public_host_there_is_no_url(store: R2Store) -> None:
    """The API host is never passed off as a public URL."""
    assert store.url(KEY) is None


async def test_an_order_of_seventy_images(tmp_path: Path) -> None:
    """Seventy images of half a megabyte are stored on an S3 server, and every one reads back with its digest."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bucket = urllib.request.Request(f"http://{host}:{port}/photos", method="PUT")
    with await asyncio.to_thread(urllib.request.urlopen, bucket, timeout=10):
        pass
    images = [index.to_bytes(4, "big") * 125_000 for index in range(70)]
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    keys = [image_key(7, index, digest, "image/jpeg") for index, digest in enumerate(digests)]
    store = R2Store(f"http://{host}:{port}", "photos", ACCESS_KEY_ID, SECRET_ACCESS_KEY)
    artifacts = await asyncio.gather(*(store.put(key, image, "image/jpeg") for key, image in zip(keys, images, strict=True)))
    assert [artifact.sha256 for artifact in artifacts] == digests
    read = await asyncio.gather(*(store.get(key, max_bytes=500_000) for key in keys))
    assert [hashlib.sha256(content).hexdigest() for content in read] == digests
    await store.close()
    await asyncio.to_thread(server.stop)


# ---------------------------------------------------------------- errors


Call = Callable[[], Awaitable[object]]


def calls(store: R2Store) -> list[Call]:
    """Every way to ask the store for something."""
    return [
        lambda: store.put(KEY, b"photo", "image/jpeg"),
        lambda: store.get(KEY, max_bytes=10),
        lambda: store.delete(KEY),
        lambda: store.delete_folder("work/1"),
        store.check,
    ]


async def outcome(call: Call) -> JobdaemonError:
    with pytest.raises(JobdaemonError) as error:
        await call()
    message = str(error.value)
    assert "topsecret" not in message.lower()
    assert "\n" not in message
    assert message.endswith(".")
    return error.value


REFUSALS = [
    (401, "Unauthorized", "access_key_id"),
    (403, "InvalidAccessKeyId", "access_key_id"),
    (403, "SignatureDoesNotMatch", "secret_access_key"),
    (403, "AccessDenied", "API token"),
    (403, "NotEntitled", "subscription"),
    (404, "NoSuchBucket", "bucket"),
    (400, "InvalidBucketName", "bucket"),
    (400, "AuthorizationHeaderMalformed", "region"),
    (501, "NotImplemented", "endpoint_url"),
    (400, "InvalidDigest", "InvalidDigest"),
    (400, "EntityTooLarge", "EntityTooLarge"),
]
PASSING = [
    (500, "InternalError"),
    (503, "ServiceUnavailable"),
    (503, "SlowDown"),
    (502, ""),
    (400, "BadDigest"),
    (400, "IncompleteBody"),
    (400, "ClientDisconnect"),
    (400, "ExpiredRequest"),
    (403, "RequestTimeTooSkewed"),
    (409, "ConditionalRequestConflict"),
    (408, "RequestTimeout"),
]


async def test_refusals_are_permanent_and_name_the_setting(store: R2Store, r2: FakeR2) -> None:
    """What only an operator can mend is permanent, in one sentence that names what to look at and no secret."""
    for status, code, setting in REFUSALS:
        for call in calls(store):
            r2.faults = [Fault(status, code)]
            error = await outcome(call)
            assert isinstance(error, StoreRefusedError), code
            assert setting in str(error)
            assert code in str(error)


async def test_passing_trouble_is_retryable(store: R2Store, r2: FakeR2) -> None:
    """What may pass by itself is retryable."""
    for status, code in PASSING:
        for call in calls(store):
            r2.faults = [Fault(status, code)]
            assert isinstance(await outcome(call), StoreUnavailableError), code


async def test_429_says_how_long_to_wait(store_factory: StoreFactory, r2: FakeR2) -> None:
    """429 is left to the engine at once, with at least R2's one second, or what the answer asks for."""
    store = store_factory(tries=4)
    for asked, wait_s in ((None, 1), ("0", 1), ("5", 5), ("99999999999", 3600), ("soon", 1)):
        for call in calls(store):
            r2.requests.clear()
            r2.faults = [Fault(429, "TooManyRequests", {} if asked is None else {"Retry-After": asked})]
            error = await outcome(call)
            assert isinstance(error, StoreUnavailableError)
            assert error.retry_after == timedelta(seconds=wait_s)
            assert len(r2.requests) == 1


async def test_answers_without_xml_are_understood(store: R2Store, r2: FakeR2) -> None:
    """An HTML page of some proxy in between is judged by its status."""
    for status, expected in (
        (401, StoreRefusedError),
        (403, StoreRefusedError),
        (404, ArtifactMissingError),
        (500, StoreUnavailableError),
        (503, StoreUnavailableError),
    ):
        r2.faults = [Fault(status, body=b"<html><body>no</body>")]
        assert isinstance(await outcome(lambda: store.get(KEY, max_bytes=1)), expected), status


async def test_a_server_error_is_retried_within_the_call(store_factory: StoreFactory, r2: FakeR2) -> None:
    """One 500 costs a pause, not the call."""
    store = store_factory(tries=2)
    r2.faults = [Fault(500, "InternalError")]
    await store.put(KEY, b"photo", "image/jpeg")
    assert len(r2.requests) == 2


async def test_an_answer_lost_after_storing_is_a_success(store_factory: StoreFactory, r2: FakeR2) -> None:
    """When the connection drops after R2 has stored, the repeated PUT meets its own bytes and succeeds."""
    store = store_factory(tries=2)
    r2.faults = [Fault(stored=True)]
    await store.put(KEY, b"photo", "image/jpeg")
    assert [request.method for request in r2.requests] == ["PUT", "PUT", "HEAD"]


async def test_a_connection_lost_before_storing_costs_nothing(store: R2Store, r2: FakeR2) -> None:
    """A request that got lost is repeated with its whole body."""
    content = b"photo" * 100_000
    r2.faults = [Fault()]
    await store.put(KEY, content, "image/jpeg")
    assert r2.objects[f"/photos/{KEY}"][0] == content


async def test_an_unknown_outcome_is_retryable_and_repeatable(store: R2Store, r2: FakeR2) -> None:
    """When all tries are lost the error is retryable, and the next attempt finds the bytes stored."""
    # Two, because the HTTP library quietly repeats an idempotent request once.
    r2.faults = [Fault(stored=True), Fault()]
    assert isinstance(await outcome(lambda: store.put(KEY, b"photo", "image/jpeg")), StoreUnavailableError)
    kept = r2.objects[f"/photos/{KEY}"]
    await store.put(KEY, b"photo", "image/jpeg")
    assert r2.objects[f"/photos/{KEY}"] is kept


async def test_an_etag_of_another_kind_is_checked_by_head(store: R2Store, r2: FakeR2) -> None:
    """A bucket whose ETag is no MD5 is verified by size and our own digest."""
    r2.etag = lambda body: "opaque-1"
    await store.put(KEY, b"photo", "image/jpeg")
    assert [request.method for request in r2.requests] == ["PUT", "HEAD"]


async def test_bytes_that_were_not_kept_are_noticed(store: R2Store, r2: FakeR2) -> None:
    """A put that R2 confirms without keeping the object is no success."""
    r2.faults = [Fault(200, headers={"ETag": '"0"'}, body=b"")]
    assert isinstance(await outcome(lambda: store.put(KEY, b"photo", "image/jpeg")), StoreUnavailableError)


async def test_damaged_bytes_are_noticed(store: R2Store, r2: FakeR2) -> None:
    """An object that no longer fits the digest it was stored with is never handed out."""
    await store.put(KEY, b"photo", "image/jpeg")
    r2.objects[f"/photos/{KEY}"] = (b"phony", r2.objects[f"/photos/{KEY}"][1])
    assert isinstance(await outcome(lambda: store.get(KEY, max_bytes=5)), StoreUnavailableError)


async def test_a_body_that_breaks_off_is_retryable(store: R2Store, r2: FakeR2) -> None:
    """A connection lost in the middle of an object is retryable, never half an object."""
    r2.faults = [Fault(200, headers={"Content-Length": "1000"}, body=b"abc", closes=True)]
    assert isinstance(await outcome(lambda: store.get(KEY, max_bytes=5000)), StoreUnavailableError)


async def test_a_large_object_is_not_read(store: R2Store, r2: FakeR2) -> None:
    """An object above the bound costs a look at its header, and the next call works."""
    await store.put(KEY, b"x" * 3_000_000, "image/jpeg")
    assert isinstance(await outcome(lambda: store.get(KEY, max_bytes=10)), UnsupportedImageError)
    assert len(await store.get(KEY, max_bytes=3_000_000)) == 3_000_000


async def test_a_server_that_is_gone_is_retryable(store_factory: StoreFactory) -> None:
    """A refused connection is retryable and names the endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = store_factory(endpoint_url=f"http://127.0.0.1:{port}")
    for call in calls(store):
        error = await outcome(call)
        assert isinstance(error, StoreUnavailableError)
        assert str(port) in str(error)


async def test_a_silent_server_is_retryable(store_factory: StoreFactory, r2: FakeR2) -> None:
    """A server that accepts and does not answer is given up after the read timeout."""
    silence = asyncio.Event()

    async def wait(_: asyncio.StreamReader) -> Request:
        await silence.wait()
        raise ConnectionResetError

    r2._request = wait  # type: ignore[method-assign,assignment]
    store = store_factory(read_timeout=timedelta(seconds=0.3))
    assert isinstance(await asyncio.wait_for(outcome(lambda: store.get(KEY, max_bytes=1)), 20), StoreUnavailableError)
    silence.set()


async def test_a_connection_that_cannot_be_secured_is_retryable(store_factory: StoreFactory) -> None:
    """When no TLS connection comes about, the error names endpoint_url."""

    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(no_tls, "127.0.0.1", 0)
    store = store_factory(endpoint_url=f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    error = await outcome(lambda: store.get(KEY, max_bytes=1))
    assert isinstance(error, StoreUnavailableError)
    assert "check endpoint_url" in str(error)
    listener.close()
    await listener.wait_closed()


async def test_a_wrong_bucket_fails_the_check(store_factory: StoreFactory) -> None:
    """The check names the bucket that is not there, also when its name is none."""
    for bucket in ("absent", "not a bucket"):
        error = await outcome(store_factory(bucket=bucket).check)
        assert isinstance(error, StoreRefusedError)
        assert "bucket" in str(error)


# ---------------------------------------------------------------- settings and secrets


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint_url": "r2.example"},
        {"endpoint_url": "ftp://r2.example"},
        {"endpoint_url": "https://user:word@r2.example"},
        {"endpoint_url": "https://[::1"},
        {"bucket": ""},
        {"prefix": "a b"},
        {"prefix": "../a"},
        {"public_url": "img.example.com"},
        {"public_url": "https://0123.r2.cloudflarestorage.com/photos"},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(store_factory: StoreFactory, wrong: dict[str, str]) -> None:
    """What needs no network to be found wrong is a settings error."""
    with pytest.raises(SettingsError) as error:
        store_factory(**wrong)
    assert "word" not in str(error.value)


@pytest.mark.parametrize(("access", "secret"), [("", "secret"), ("key", "")])
def test_an_empty_key_is_refused(access: str, secret: str) -> None:
    """Half a credential never makes the S3 library look for another one elsewhere."""
    with pytest.raises(SettingsError):
        R2Store("https://r2.example", "photos", access, secret)


async def test_no_secret_is_shown_or_logged(store: R2Store, r2: FakeR2, caplog: pytest.LogCaptureFixture) -> None:
    """The secret is in no repr, no traceback of ours and no log line."""
    caplog.set_level(logging.DEBUG)
    assert "topsecret" not in repr(store).lower()
    assert "topsecret" not in repr(vars(store).get("_credentials", "")).lower()
    await store.put(KEY, b"photo", "image/jpeg")
    assert SECRET_ACCESS_KEY not in caplog.text
    r2.faults = [Fault(403, "SignatureDoesNotMatch")]
    error = await outcome(lambda: store.get(KEY, max_bytes=1))
    assert SECRET_ACCESS_KEY not in "".join(traceback.format_exception(error, chain=False))


def test_the_library_is_loaded_on_first_use_only() -> None:
    """Importing the module and making a store loads neither aioboto3 nor aiohttp."""
    code = (
        "import sys; from jobdaemon.storage.r2 import R2Store; R2Store('https://r2.example', 'b', 'k', 's');"
        "print([name for name in ('aioboto3', 'aiobotocore', 'aiohttp', 'boto3') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
