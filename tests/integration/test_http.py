"""The guarded HTTP client against a hostile server on loopback, and against addresses it must never reach."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import inspect
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jobdaemon.errors import (
    DownloadRefusedError,
    InvalidOrderError,
    PermanentError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
    StoreUnavailableError,
    UnsupportedImageError,
)
from jobdaemon.http import AllowedHosts, GuardedClient, is_public_address, parse_retry_after, shown_url
from jobdaemon.spool import Spool

SOON = timedelta(seconds=10)
SECRET = "X-Signature=topsecret"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server that sends whatever a test says, byte for byte."""

    port: int = 0
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sni: list[str | None] = field(default_factory=list)
    connections: int = 0
    tasks: set[asyncio.Task[object]] = field(default_factory=set)

    def answer(self, path: str, raw: bytes) -> None:
        async def send(writer: asyncio.StreamWriter) -> None:
            writer.write(raw)
            await writer.drain()

        self.answers[path] = send

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                await self.answers[head.split(" ")[1].partition("?")[0]](writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            self.tasks.discard(task)

    async def stop(self) -> None:
        """End what still sends: a drip without end must not outlive its test."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@asynccontextmanager
async def serving(context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        await listener.wait_closed()
        await server.stop()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[GuardedClient]:
    client = GuardedClient(allowed_hosts=[f"127.0.0.1:{server.port}"])
    yield client
    await client.close()


@pytest.fixture
async def strict() -> AsyncIterator[GuardedClient]:
    client = GuardedClient()
    yield client
    await client.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own authority, for localhost and photos.example."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.DNSName("photos.example")]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path_factory.mktemp("tls") / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return pem


@pytest.fixture
async def tls_server(certificate: Path) -> AsyncIterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with serving(context) as server:
        context.sni_callback = lambda _socket, name, _context: server.sni.append(name)
        yield server


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {line}", "Content-Length: 0", *headers]).encode() + b"\r\n\r\n"


def local(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.port}{path}"


# ---------------------------------------------------------------- what works


async def test_a_download_is_whole_and_typed(server: Server, client: GuardedClient) -> None:
    """A body within its bound comes back unchanged, with its media type freed of parameters."""
    body = bytes(range(256)) * 2000
    server.answer("/a.jpg", ok(body, "Content-Type: Image/JPEG; charset=x"))
    got = await client.download(local(server, "/a.jpg"), max_bytes=len(body), timeout=SOON)
    assert got.content == body
    assert got.media_type == "image/jpeg"


async def test_a_download_may_go_to_a_file(server: Server, client: GuardedClient) -> None:
    """A sink gets every byte of the body in its order, though in other blocks."""
    body = bytes(range(256)) * 5000
    server.answer("/a.jpg", ok(body))
    spool = Spool()
    await client.download_to(spool, local(server, "/a.jpg"), max_bytes=len(body), timeout=SOON)
    assert b"".join(spool.blocks()) == body


async def test_a_file_is_bounded_as_memory_is(server: Server, client: GuardedClient) -> None:
    """A sink gets nothing beyond the bound, with or without a declared length, and statuses are the errors they always are."""
    server.answer("/declared", ok(b"x" * 2_000_000))
    server.answer("/endless", b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2_000_000)
    server.answer("/gone", b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\ngone")
    for path, error in (
        ("/declared", UnsupportedImageError),
        ("/endless", UnsupportedImageError),
        ("/gone", DownloadRefusedError),
    ):
        spool = Spool()
        with pytest.raises(error):
            await client.download_to(spool, local(server, path), max_bytes=1_000_000, timeout=SOON)
        assert spool.size_bytes <= 1_000_000


async def test_a_sink_that_fails_ends_the_download(server: Server, client: GuardedClient) -> None:
    """What a sink raises reaches the caller as it is, and the next download works."""

    class Full:
        def write(self, block: bytes) -> None:
            raise StoreUnavailableError(f"no room for {len(block)} bytes")

    server.answer("/a", ok(b"x" * 500_000))
    with pytest.raises(StoreUnavailableError, match="no room"):
        await client.download_to(Full(), local(server, "/a"), max_bytes=500_000, timeout=SOON)
    assert len((await client.download(local(server, "/a"), max_bytes=500_000, timeout=SOON)).content) == 500_000


async def test_a_body_without_length_ends_with_the_connection(server: Server, client: GuardedClient) -> None:
    """An answer without Content-Length is read to its end, and no media type is None."""
    server.answer("/a", b"HTTP/1.1 200 OK\r\n\r\nabc")
    got = await client.download(local(server, "/a"), max_bytes=3, timeout=SOON)
    assert (got.content, got.media_type) == (b"abc", None)


async def test_nothing_compressed_is_asked_for_or_taken(server: Server, client: GuardedClient) -> None:
    """Identity encoding is requested, and a compression bomb sent all the same is refused unopened."""
    server.answer("/bomb", ok(gzip.compress(b"\0" * 10_000_000), "Content-Encoding: gzip"))
    with pytest.raises(UnsupportedImageError):
        await client.download(local(server, "/bomb"), max_bytes=1_000_000, timeout=SOON)
    assert "accept-encoding: identity" in server.requests[0].lower()


async def test_redirects_are_followed_relative_and_absolute(server: Server, client: GuardedClient) -> None:
    """A chain of redirects within one allowed host ends at the file."""
    server.answer("/1", status("302 Found", "Location: /2"))
    server.answer("/2", status("308 Permanent Redirect", f"Location: {local(server, '/3')}"))
    server.answer("/3", ok(b"x"))
    assert (await client.download(local(server, "/1"), max_bytes=1, timeout=SOON)).content == b"x"


async def test_cookies_are_not_carried_on(server: Server, client: GuardedClient) -> None:
    """A cookie set by one answer is never sent with the next request."""
    server.answer("/1", status("302 Found", "Location: /2", "Set-Cookie: id=1"))
    server.answer("/2", ok(b"x"))
    await client.download(local(server, "/1"), max_bytes=1, timeout=SOON)
    assert len(server.requests) == 2
    assert not any("cookie" in request.lower() for request in server.requests)


async def test_tls_keeps_the_name(tls_server: Server, certificate: Path) -> None:
    """Over https the server name, the Host header and the certificate check use the URL's name."""
    tls_server.answer("/a", ok(b"x"))
    client = GuardedClient(allowed_hosts=["localhost"], ssl_context=ssl.create_default_context(cafile=str(certificate)))
    got = await client.download(f"https://localhost:{tls_server.port}/a", max_bytes=1, timeout=SOON)
    await client.close()
    assert got.content == b"x"
    assert tls_server.sni == ["localhost"]
    assert f"Host: localhost:{tls_server.port}" in tls_server.requests[0]


async def test_an_unknown_authority_is_no_server(tls_server: Server) -> None:
    """A certificate that nobody trusts counts as no answer."""
    client = GuardedClient(allowed_hosts=["localhost"])
    with pytest.raises(ProviderUnavailableError):
        await client.download(f"https://localhost:{tls_server.port}/a", max_bytes=1, timeout=SOON)
    await client.close()
    assert tls_server.requests == []


# ---------------------------------------------------------------- the address guard


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "0.0.0.0",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "224.0.0.1",
        "255.255.255.255",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "2130706433",
        "0x7f000001",
        "127.1",
        "0177.0.0.1",
    ],
)
async def test_inner_addresses_are_refused_before_a_connection(host: str, strict: GuardedClient, server: Server) -> None:
    """No notation of a loopback, private, link-local, metadata or translated address is connected to."""
    with pytest.raises(InvalidOrderError) as error:
        await strict.download(f"https://{host}:{server.port}/a?{SECRET}", max_bytes=1, timeout=SOON)
    assert "topsecret" not in str(error.value)
    assert server.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://photos.example/a",
        "ftp://photos.example/a",
        "file:///etc/passwd",
        "https:///a",
        "photos.example/a",
        "",
        "https://user:word@photos.example/a",
        "https://photos.example:99999/a",
        "https://[::1/a",
        "http://127.0.0.1/a",
    ],
)
async def test_other_schemes_and_forms_are_refused(url: str, strict: GuardedClient) -> None:
    """Only https URLs with a host and no user are asked at all."""
    with pytest.raises(InvalidOrderError) as error:
        await strict.download(url, max_bytes=1, timeout=SOON)
    assert "word" not in str(error.value)


@pytest.mark.parametrize("target", ["https://10.0.0.1/a", "https://localhost/a", "http://photos.example/a", "file:///etc/passwd"])
async def test_a_redirect_is_judged_like_the_first_url(target: str, server: Server, client: GuardedClient) -> None:
    """An allowed host cannot send us to an address or a scheme that is refused."""
    server.answer("/a", status("302 Found", f"Location: {target}?{SECRET}"))
    with pytest.raises(InvalidOrderError) as error:
        await client.download(local(server, "/a"), max_bytes=1, timeout=SOON)
    assert "topsecret" not in str(error.value)


async def test_redirects_end_after_five(server: Server, client: GuardedClient) -> None:
    """The sixth redirect is refused, so a loop ends."""
    server.answer("/a", status("302 Found", "Location: /a"))
    with pytest.raises(InvalidOrderError):
        await client.download(local(server, "/a"), max_bytes=1, timeout=SOON)
    assert len(server.requests) == 6


async def test_allowing_a_port_allows_that_port_only(server: Server) -> None:
    """``host:port`` lifts the guard for this port; ``host`` for all of them."""
    server.answer("/a", ok(b"x"))
    other = GuardedClient(allowed_hosts=[f"127.0.0.1:{server.port + 1}"])
    with pytest.raises(InvalidOrderError):
        await other.download(local(server, "/a"), max_bytes=1, timeout=SOON)
    whole = GuardedClient(allowed_hosts=["127.0.0.1"])
    assert (await whole.download(local(server, "/a"), max_bytes=1, timeout=SOON)).content == b"x"
    await other.close()
    await whole.close()


@pytest.mark.parametrize(
    ("entry", "host", "port", "covered"),
    [
        ("a.example", "A.example.", 8443, True),
        ("a.example", "b.a.example", 443, False),
        ("a.example:8443", "a.example", 443, False),
        ("10.0.0.5", "10.0.0.5", 80, True),
        ("::1", "::1", 443, True),
        ("[::1]", "::1", 443, True),
        ("[::1]:80", "::1", 80, True),
        ("[::1]:80", "::1", 443, False),
    ],
)
def test_an_allowance_covers_exactly_its_host(entry: str, host: str, port: int, covered: bool) -> None:
    """An entry covers its host in any letter case, no subdomain, and with a port that port only."""
    assert AllowedHosts([entry]).covers(host, port) is covered


@pytest.mark.parametrize("entry", ["", "http://a", "a/b", "user@a", "a:port"])
def test_a_wrong_allowance_is_a_settings_error(entry: str) -> None:
    """What is neither host nor host:port is refused when the client is made."""
    with pytest.raises(SettingsError):
        GuardedClient(allowed_hosts=[entry])


@dataclass
class Resolver:
    """Answers the event loop's look-ups from a script, and keeps the connections on loopback."""

    answers: list[list[str]]
    lookups: int = 0
    connected: list[str] = field(default_factory=list)

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        addresses = self.answers[min(self.lookups, len(self.answers) - 1)]
        self.lookups += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch, tls_server: Server) -> Resolver:
    resolver = Resolver([])
    real = httpcore.AnyIOBackend.connect_tcp

    async def connect(self: httpcore.AnyIOBackend, host: str, port: int, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        resolver.connected.append(host)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", genuine)
        return await real(self, "127.0.0.1", tls_server.port, **kwargs)

    loop = asyncio.get_event_loop_policy().get_event_loop()
    genuine = loop.getaddrinfo
    monkeypatch.setattr(loop, "getaddrinfo", resolver.getaddrinfo)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    return resolver


@pytest.fixture
async def outside(certificate: Path) -> AsyncIterator[GuardedClient]:
    client = GuardedClient(ssl_context=ssl.create_default_context(cafile=str(certificate)))
    yield client
    await client.close()


async def test_a_rebinding_name_gets_one_look_up(resolver: Resolver, outside: GuardedClient, tls_server: Server) -> None:
    """The connection goes to the very address that was judged; what the name means a moment later does not matter."""
    resolver.answers = [["93.184.215.14"], ["127.0.0.1"]]
    tls_server.answer("/a", ok(b"x"))
    assert (await outside.download("https://photos.example/a", max_bytes=1, timeout=SOON)).content == b"x"
    assert (resolver.lookups, resolver.connected, tls_server.sni) == (1, ["93.184.215.14"], ["photos.example"])


async def test_of_mixed_addresses_only_public_ones_are_used(
    resolver: Resolver, outside: GuardedClient, tls_server: Server
) -> None:
    """A name with inner and public addresses is connected to by a public one."""
    resolver.answers = [["10.0.0.1", "127.0.0.1", "93.184.215.14"]]
    tls_server.answer("/a", ok(b"x"))
    await outside.download("https://photos.example/a", max_bytes=1, timeout=SOON)
    assert resolver.connected == ["93.184.215.14"]


async def test_a_name_with_inner_addresses_only_is_refused(
    resolver: Resolver, outside: GuardedClient, tls_server: Server
) -> None:
    """A harmless-looking name that resolves to inner addresses is refused without a connection."""
    resolver.answers = [["127.0.0.1", "10.1.2.3"]]
    with pytest.raises(InvalidOrderError):
        await outside.download("https://photos.example/a", max_bytes=1, timeout=SOON)
    assert (resolver.connected, tls_server.connections) == ([], 0)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::5e", "100.128.0.1"])
def test_public_addresses_pass(address: str) -> None:
    """Addresses of the public internet are public."""
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "::",
        "::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "ff02::1",
        "fc00::1",
        "fe80::1%1",
        "x",
    ],
)
def test_other_addresses_do_not_pass(address: str) -> None:
    """Special, translated and malformed addresses are not public."""
    assert not is_public_address(address)


@pytest.mark.parametrize(
    "network",
    [*ipaddress._IPv4Constants._private_networks, ipaddress._IPv4Constants._multicast_network],  # type: ignore[attr-defined]
    ids=str,
)
def test_the_guard_is_no_laxer_than_the_standard_library(network: ipaddress.IPv4Network) -> None:
    """Every IPv4 network that Python knows as private or multicast is refused, at both ends."""
    assert not is_public_address(str(network[0]))
    assert not is_public_address(str(network[-1]))


async def test_a_proxied_client_still_refuses_inner_literals(server: Server) -> None:
    """Through a proxy, literal inner addresses are refused here, and names are left to the proxy."""
    client = GuardedClient(proxy=f"http://127.0.0.1:{server.port}")
    server.answers["photos.example:443"] = lambda writer: asyncio.sleep(0)
    for host in ("127.0.0.1", "2130706433", "[::1]"):
        with pytest.raises(InvalidOrderError):
            await client.download(f"https://{host}/a", max_bytes=1, timeout=SOON)
    assert server.connections == 0
    with pytest.raises(ProviderUnavailableError):
        await client.download("https://photos.example/a", max_bytes=1, timeout=SOON)
    assert server.requests[0].startswith("CONNECT photos.example:443")
    await client.close()


async def test_the_environments_proxy_is_ignored(server: Server, client: GuardedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not used."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server.answer("/a", ok(b"x"))
    assert (await client.download(local(server, "/a"), max_bytes=1, timeout=SOON)).content == b"x"


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("headers", [b"Content-Length: 4", b"Content-Length: 99999999999999", b"X: no length"])
async def test_a_body_beyond_the_limit_is_given_up(headers: bytes, server: Server, client: GuardedClient) -> None:
    """More than max_bytes is permanent, declared or not."""
    server.answer("/a", b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\nabcd")
    with pytest.raises(UnsupportedImageError):
        await client.download(local(server, "/a"), max_bytes=3, timeout=SOON)


async def test_an_endless_body_is_cut_at_the_limit(server: Server, client: GuardedClient) -> None:
    """A chunked body without end is left as soon as it passes the limit."""
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent += 65536
            await writer.drain()

    server.answers["/a"] = endless
    with pytest.raises(UnsupportedImageError):
        await client.download(local(server, "/a"), max_bytes=1_000_000, timeout=SOON)
    assert sent < 50_000_000


async def test_a_slow_drip_ends_at_the_deadline(server: Server, client: GuardedClient) -> None:
    """A server that always sends a little, so that no read times out, is given up at the total deadline."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    server.answers["/a"] = drip
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(ProviderUnavailableError, match=r"within 0\.3 s"):
        await client.download(local(server, "/a"), max_bytes=100_000, timeout=timedelta(seconds=0.3))
    assert loop.time() - started < 5


async def test_a_silent_server_ends_at_the_idle_timeout(server: Server) -> None:
    """A server that accepts and never answers is given up when nothing was read for the idle timeout."""
    silence = asyncio.Event()
    server.answers["/a"] = lambda writer: silence.wait()  # type: ignore[assignment,return-value]
    client = GuardedClient(allowed_hosts=["127.0.0.1"], idle_timeout=timedelta(seconds=0.2))
    with pytest.raises(ProviderUnavailableError, match="ReadTimeout"):
        await client.download(local(server, "/a"), max_bytes=1, timeout=timedelta(seconds=30))
    silence.set()
    await client.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200",
        b"not http at all\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
async def test_a_truncated_or_broken_answer_is_no_answer(raw: bytes, server: Server, client: GuardedClient) -> None:
    """A body shorter than declared and anything that is not HTTP are retryable, never half a file."""
    server.answer("/a", raw)
    with pytest.raises(ProviderUnavailableError):
        await client.download(local(server, f"/a?{SECRET}"), max_bytes=1000, timeout=SOON)


async def test_many_downloads_share_the_pool(server: Server) -> None:
    """More downloads than connections all end."""
    server.answer("/a", ok(b"x" * 100_000))
    client = GuardedClient(allowed_hosts=["127.0.0.1"], max_connections=4)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client.download(local(server, "/a"), max_bytes=100_000, timeout=SOON)) for _ in range(40)]
    assert all(len(task.result().content) == 100_000 for task in tasks)
    await client.close()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "line", ["500 Oops", "502 Bad Gateway", "503 Busy", "504 Late", "408 Timeout", "204 No Content", "304 Same"]
)
async def test_server_errors_are_retryable(line: str, server: Server, client: GuardedClient) -> None:
    """5xx, timeouts and answers that make no sense are worth another attempt."""
    server.answer("/a", status(line))
    with pytest.raises(ProviderUnavailableError) as error:
        await client.download(local(server, f"/a?{SECRET}"), max_bytes=1, timeout=SOON)
    assert "topsecret" not in str(error.value)
    assert f"127.0.0.1:{server.port}/a" in str(error.value)


@pytest.mark.parametrize("line", ["400 Bad", "401 Who", "403 Forbidden", "404 Missing", "410 Gone", "451 Law"])
async def test_client_errors_are_permanent(line: str, server: Server, client: GuardedClient) -> None:
    """4xx is permanent and carries the status, from which a caller tells an expired URL."""
    server.answer("/a", status(line))
    with pytest.raises(DownloadRefusedError) as error:
        await client.download(local(server, f"/a?{SECRET}"), max_bytes=1, timeout=SOON)
    assert isinstance(error.value, PermanentError)
    assert error.value.status == int(line[:3])
    assert "topsecret" not in str(error.value)


async def test_429_is_a_capacity_signal(server: Server, client: GuardedClient) -> None:
    """429 carries the wait that the server asked for."""
    server.answer("/a", status("429 Slow down", "Retry-After: 7"))
    with pytest.raises(RateLimitedError) as error:
        await client.download(local(server, "/a"), max_bytes=1, timeout=SOON)
    assert error.value.retry_after == timedelta(seconds=7)


async def test_nobody_there_is_retryable(client: GuardedClient, unused_port: int) -> None:
    """A refused connection and a name that does not resolve are worth another attempt."""
    away = GuardedClient(allowed_hosts=["127.0.0.1"])
    with pytest.raises(ProviderUnavailableError):
        await away.download(f"http://127.0.0.1:{unused_port}/a", max_bytes=1, timeout=SOON)
    await away.close()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_url_is_never_logged(server: Server, client: GuardedClient, caplog: pytest.LogCaptureFixture) -> None:
    """Even with everything logged, the query of a URL appears in no line."""
    caplog.set_level(logging.DEBUG)
    server.answer("/a", ok(b"x"))
    await client.download(local(server, f"/a?{SECRET}"), max_bytes=1, timeout=SOON)
    assert "topsecret" not in caplog.text


async def test_the_transport_serves_an_async_client(server: Server, client: GuardedClient) -> None:
    """A provider's own AsyncClient on the shared transport gets answers, and the guard."""
    server.answer("/a", ok(b'{"a": 1}'))
    api = httpx.AsyncClient(transport=client.transport)
    assert (await api.get(local(server, "/a"))).json() == {"a": 1}
    with pytest.raises(InvalidOrderError):
        await api.get("https://10.0.0.1/")


def test_every_httpcore_error_has_a_twin_in_httpx() -> None:
    """Each exception of httpcore is translated to httpx's of the same name, so none gets past the adapters."""
    ours = [error for _, error in inspect.getmembers(httpcore, inspect.isclass) if issubclass(error, Exception)]
    covered = (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.ProxyError,
        httpcore.UnsupportedProtocol,
    )
    for error in ours:
        if error is not httpcore.ConnectionNotAvailable:  # the pool's own signal; it never leaves the pool
            assert issubclass(error, covered)
            assert issubclass(getattr(httpx, error.__name__), httpx.HTTPError)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("0", timedelta(0)),
        (" 120 ", timedelta(seconds=120)),
        ("99999999999999999999", timedelta(days=1)),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", timedelta(seconds=30)),
        ("Wed, 21 Oct 2026 07:28:30 -0000", timedelta(seconds=30)),
        ("Wed, 21 Oct 2020 07:28:00 GMT", timedelta(0)),
        ("Wed, 99 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: timedelta | None) -> None:
    """Retry-After is read in both its forms, bounded to a day, and nonsense is none."""
    assert parse_retry_after(value, datetime(2026, 10, 21, 7, 28, tzinfo=dt.UTC)) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.example/b/c.jpg?sig=1#f", "https://a.example/b/c.jpg"),
        ("https://u:p@a.example:8443/b?x", "https://a.example:8443/b"),
        ("https://[2606:4700::1]/b", "https://[2606:4700::1]/b"),
        ("https://a.example/" + "x" * 200, "https://a.example/" + "x" * 79 + "…"),
        ("https://[::1/", "The URL"),
    ],
)
def test_a_shown_url_has_no_secret(url: str, expected: str) -> None:
    """People see scheme, host and path; no user, query or fragment."""
    assert shown_url(url) == expected
