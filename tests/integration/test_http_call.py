"""Calls of services through the guarded client: what came of a request that was not answered well, and what errors may tell."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import struct
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from email import message_from_bytes

import pytest

from jobdaemon.errors import AnswerLostError, InvalidOrderError, ProviderUnavailableError, UnreachableError
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.spool import Spool

SOON = timedelta(seconds=10)
SECRET = "sk-topsecret-0123456789"
SIGNED = "?X-Signature=topsecret"

Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Does what a test says with each connection."""

    act: Act
    port: int = 0
    connections: int = 0
    tasks: set[asyncio.Task[object]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self.act(reader, writer)
        finally:
            self.tasks.discard(task)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/images"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server that never answers, until a test says otherwise."""

    async def never(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server = Server(never)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    yield server
    listener.close()
    await listener.wait_closed()
    for task in server.tasks:
        task.cancel()
    await asyncio.gather(*server.tasks, return_exceptions=True)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[GuardedClient]:
    """May reach that server."""
    client = GuardedClient(allowed_hosts=[f"127.0.0.1:{server.port}"])
    yield client
    await client.close()


async def call(client: GuardedClient, url: str, *, content: bytes = b"{}", within: timedelta = SOON) -> Answer:
    headers = {"Authorization": f"Bearer {SECRET}"}
    return await client.call("POST", url + SIGNED, headers=headers, content=content, max_bytes=1000, timeout=within)


async def request_of(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Head and body of one request."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(int(line.partition(":")[2]) for line in head.split("\r\n") if line.lower().startswith("content-length:"))
    return head, await reader.readexactly(length)


def answering(raw: bytes, seen: list[tuple[str, bytes]] | None = None) -> Act:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await request_of(reader)
        if seen is not None:
            seen.append(request)
        writer.write(raw)
        await writer.drain()

    return act


def reset(writer: asyncio.StreamWriter) -> None:
    """Drop the connection at once: the other side sees a reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("line", ["200 OK", "404 Not Found", "429 Too Many Requests", "500 Internal Server Error"])
async def test_an_answer_comes_back_whatever_its_status(line: str, server: Server, client: GuardedClient) -> None:
    """Status, headers and body are the caller's to judge; the address is shown without its query."""
    server.act = answering(f"HTTP/1.1 {line}\r\nContent-Length: 7\r\nRetry-After: 3\r\nX-A: b\r\n\r\n".encode() + b'{"a":1}')
    answer = await call(client, server.url)
    assert answer.status == int(line[:3])
    assert (answer.json(), answer.headers["x-a"]) == ({"a": 1}, "b")
    assert answer.retry_after == timedelta(seconds=3)
    assert answer.shown == server.url


@pytest.mark.parametrize(("line", "to_sink"), [("200 OK", True), ("201 Created", True), ("429 Too Many Requests", False)])
async def test_a_sink_takes_good_answers(line: str, to_sink: bool, server: Server, client: GuardedClient) -> None:
    """The body of a good answer goes to the sink alone; an error's stays with the answer; both are bounded."""
    body = b'{"a":"' + b"x" * 600_000 + b'"}'
    server.act = answering(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    spool = Spool()
    answer = await client.call("POST", server.url, content=b"{}", max_bytes=len(body), timeout=SOON, into=spool)
    assert (answer.content, b"".join(spool.blocks())) == ((b"", body) if to_sink else (body, b""))
    with pytest.raises(AnswerLostError):
        await client.call("POST", server.url, content=b"{}", max_bytes=len(body) - 1, timeout=SOON, into=Spool())


async def test_json_and_forms_are_sent_as_such(server: Server, client: GuardedClient) -> None:
    """A payload becomes JSON; fields and files become a form in which repeated names stay apart; nothing asks for compression."""
    seen: list[tuple[str, bytes]] = []
    server.act = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", seen)
    await client.call("POST", server.url, payload={"a": ["ü"]}, max_bytes=1000, timeout=SOON)
    files = [("image[]", (f"{name}.png", name.encode(), "image/png")) for name in ("one", "two")]
    await client.call("POST", server.url, data={"n": "2"}, files=files, max_bytes=1000, timeout=SOON)
    (plain_head, plain), (form_head, form) = seen
    assert json.loads(plain) == {"a": ["ü"]}
    assert "application/json" in plain_head
    content_type = next(line for line in form_head.split("\r\n") if line.lower().startswith("content-type:"))
    parts = message_from_bytes(content_type.encode() + b"\r\n\r\n" + form).get_payload()
    assert isinstance(parts, list)
    names = [part.get_param("name", header="content-disposition") for part in parts if not isinstance(part, str)]
    assert names == ["n", "image[]", "image[]"]
    assert "accept-encoding: identity" in plain_head.lower()


async def test_a_redirect_is_an_answer_and_not_followed(server: Server, client: GuardedClient) -> None:
    """Where a redirect leads, nobody goes: neither inwards nor anywhere else."""
    for target in ("http://169.254.169.254/latest/meta-data/", f"{server.url}/elsewhere"):
        before = server.connections
        server.act = answering(
            f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        answer = await call(client, server.url)
        assert answer.status == 307
        assert server.connections == before + 1
        with pytest.raises(ProviderUnavailableError, match="answered 307, a redirect, which is not followed") as caught:
            answer.json()
        assert target not in str(caught.value)


# ---------------------------------------------------------------- what does not


async def test_an_inner_address_is_refused_before_a_connection(server: Server) -> None:
    """Without an allowance no inner address, no plain http and no other scheme is called."""
    strict = GuardedClient()
    for url in (server.url, server.url.replace("http://", "https://"), "https://169.254.169.254/", "ftp://a.example/"):
        with pytest.raises(InvalidOrderError):
            await strict.call("POST", url, content=b"{}", max_bytes=1000, timeout=SOON)
    assert server.connections == 0
    await strict.close()


@pytest.mark.parametrize("head", [b"Content-Length: 1001\r\n", b"Transfer-Encoding: chunked\r\n"], ids=["declared", "chunked"])
async def test_an_answer_beyond_its_bound_is_given_up(head: bytes, server: Server, client: GuardedClient) -> None:
    """More than max_bytes is a lost answer, whether the server said so or not; exactly as many are an answer."""
    body = b"x" * 1001 if b"Length" in head else b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n"
    server.act = answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n" + body)
    with pytest.raises(AnswerLostError, match="more than 1000 bytes"):
        await call(client, server.url)
    server.act = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n" + b"x" * 1000)
    assert len((await call(client, server.url)).content) == 1000


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_what_was_given_up_is_not_kept(chunked: bool, server: Server, client: GuardedClient) -> None:
    """An error that somebody keeps holds nothing of the body it is about; one that is declared too large is not even read."""
    size_bytes, sent_bytes = 8 * 1024 * 1024, 0

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        await reader.readuntil(b"\r\n\r\n")
        head = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (4 * size_bytes)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        block = b"x" * 65_536
        for _ in range(4 * size_bytes // len(block)):
            writer.write(b"10000\r\n" + block + b"\r\n" if chunked else block)
            await writer.drain()
            sent_bytes += len(block)

    server.act = send
    kept = []
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(4):
            with pytest.raises(AnswerLostError, match="more than") as caught:
                await client.call("POST", server.url, content=b"{}", max_bytes=size_bytes, timeout=SOON)
            kept.append(caught.value)
        assert tracemalloc.get_traced_memory()[0] < size_bytes
    finally:
        tracemalloc.stop()
        gc.enable()
    # What was on its way when the connection was cut, on loopback.
    assert chunked or sent_bytes < 4 * size_bytes


async def test_no_answer_in_time_is_a_lost_one(server: Server, client: GuardedClient) -> None:
    """A service that took the request and says nothing may have done what was asked."""
    with pytest.raises(AnswerLostError, match=r"within 0\.2 s"):
        await call(client, server.url, within=timedelta(seconds=0.2))


async def test_a_drip_ends_at_the_deadline(server: Server, client: GuardedClient) -> None:
    """An answer that comes byte by byte does not outlast the timeout, which is for everything together."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    server.act = drip
    with pytest.raises(AnswerLostError):
        await call(client, server.url, within=timedelta(seconds=0.3))


async def test_nobody_there_took_nothing(client: GuardedClient, server: Server) -> None:
    """A refused connection is an outage, not a lost answer, and told apart from a connection that broke."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    other = GuardedClient(allowed_hosts=[f"127.0.0.1:{port}"])
    with pytest.raises(UnreachableError):
        await call(other, f"http://127.0.0.1:{port}/v1")
    await other.close()


async def test_half_a_request_took_nothing(server: Server, client: GuardedClient) -> None:
    """A connection that breaks, or a deadline that passes, before all of the request was sent: nobody can have carried it out."""

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reset(writer)

    async def stop_reading(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.Event().wait()

    acts: list[tuple[Act, timedelta]] = [(break_off, SOON), (stop_reading, timedelta(seconds=0.5))]
    for server.act, timeout in acts:
        with pytest.raises(ProviderUnavailableError) as caught:
            # A photo, but larger than what any socket buffers.
            await call(client, server.url, content=bytes(64 * 1024 * 1024), within=timeout)
        assert type(caught.value) is ProviderUnavailableError


async def test_a_large_body_may_take_longer_than_a_silence(server: Server) -> None:
    """The idle timeout is for a service that takes nothing any more, and not for all of a photo on a slow line."""

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        left = next(int(line.partition(":")[2]) for line in head.split("\r\n") if line.lower().startswith("content-length:"))
        while left > 0:
            left -= len(await reader.read(1 << 19))
            await asyncio.sleep(0.03)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()

    server.act = slow
    client = GuardedClient(allowed_hosts=[f"127.0.0.1:{server.port}"], idle_timeout=timedelta(seconds=2))
    assert (await call(client, server.url, content=bytes(24 * 1024 * 1024), within=timedelta(seconds=60))).json() == {}
    await client.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nhalf", b"nonsense\r\n\r\n"],
    ids=["none", "half a head", "half a body", "no http"],
)
async def test_a_whole_request_without_a_whole_answer_is_lost(answer: bytes, server: Server, client: GuardedClient) -> None:
    """Once the request is out, a reset or a broken answer leaves open what became of it; the error names host and path only."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(answer)
        await writer.drain()
        reset(writer)

    server.act = act
    with pytest.raises(AnswerLostError, match="/v1/images gave no whole answer"):
        await call(client, server.url)


async def test_an_early_answer_counts(server: Server, client: GuardedClient) -> None:
    """A service that answers before it has read everything (too large, wrong key) is heard."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        while await reader.read(65_536):  # else the kernel resets what it has not read
            pass

    server.act = act
    assert (await call(client, server.url, content=bytes(4 * 1024 * 1024))).status == 413


@pytest.mark.parametrize("raw", [b"<html>", b"[" * 100_000, b"\xff\xfe\x00{", b""], ids=["page", "depth", "no text", "nothing"])
def test_what_is_no_json_is_one_error(raw: bytes) -> None:
    """A body that no parser takes, too deep ones too, is a retryable error that names who answered and what it called it."""
    answer = Answer(200, {"content-type": "text/html; charset=x"}, raw, "https://a.example/v1")
    with pytest.raises(ProviderUnavailableError, match=r"https://a\.example/v1 answered 200 .*text/html"):
        answer.json()


async def test_no_secret_is_told(server: Server, client: GuardedClient, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the key nor the query of a URL reaches an error, what caused it, or a log line."""
    caplog.set_level(logging.DEBUG)
    texts = []
    for timeout, raw in ((0.2, None), (10, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000), (10, b"")):
        if raw is not None:
            server.act = answering(raw)
        with pytest.raises(ProviderUnavailableError) as caught:
            await call(client, server.url, within=timedelta(seconds=timeout))
        texts.append(told(caught.value))
    with pytest.raises(InvalidOrderError) as refused:
        await call(client, "https://127.0.0.1:1/v1")
    for text in (*texts, told(refused.value), caplog.text):
        assert SECRET not in text
        assert "topsecret" not in text
