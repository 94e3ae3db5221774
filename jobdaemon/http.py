"""
The shared HTTP client: one pool, timeouts, size limits, and a guard over the addresses that are connected to.

URLs come from customers and from providers' answers, so every one is hostile: it may name a machine of our own network, redirect
to one, resolve to one only the second time it is asked for, or send for ever. The guard therefore sits where the connection is
made: a name is resolved once, each address is judged, and the connection goes to the judged address, while TLS and ``Host`` keep
the name. Redirects are followed here, one hop at a time, each judged like the first URL.

Nothing here logs, and no error shows more of a URL than scheme, host and path: signed URLs carry their signature in the query.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import httpcore
import httpx

from jobdaemon.errors import (
    AnswerLostError,
    DownloadRefusedError,
    InvalidOrderError,
    JobdaemonError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
    UnreachableError,
    UnsupportedImageError,
)

MAX_REDIRECTS = 5
#: Longer waits are not believed: nobody's rate limit lasts longer, and the order would expire first.
MAX_RETRY_AFTER = timedelta(days=1)

_REDIRECTS = {301, 302, 303, 307, 308}
#: Client errors that a later attempt may not get: timeout, conflict with itself, too early.
_TRANSIENT_STATUSES = {408, 425}
_SHOWN_PATH_CHARACTERS = 80
#: What is handed to a sink at once: a thread for each block of the network would cost more than the writing.
_POUR_BYTES = 1 << 18
#: A body up to this size is put together first: a form comes in twenty parts, and each would be a write of its own.
_JOINED_BYTES = 1 << 23
#: And no write is larger: each may take as long as a silence, which on a slow line is too little for a whole photo.
_WRITTEN_BYTES = 1 << 20

_REFUSED_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network; Linux connects it to loopback
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, and a cloud's metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's host agent, on an address that looks public
        "169.254.0.0/16",  # link-local: most clouds' metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments, and a cloud's metadata service
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
#: Only here do public IPv6 addresses lie. Outside: loopback, unique local, link-local, multicast, IPv4-mapped, NAT64.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments; Teredo carries an IPv4 address
        "2001:db8::/32",
        "2002::/16",  # 6to4 carries an IPv4 address
        "3fff::/20",
    )
]


class Sink(Protocol):
    """Takes a body as it arrives, so that it is never in memory as a whole."""

    def write(self, block: bytes, /) -> None:
        """Take the next bytes; called in a thread, one call at a time. What it raises ends the transfer."""
        ...


@dataclass(frozen=True, slots=True)
class Downloaded:
    """
    A body, whole and within its bound.

    Attributes:
        content: the bytes as they were sent.
        media_type: lower case, without parameters; None when the server named none. A claim, not a fact.
    """

    content: bytes
    media_type: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What a service answered.

    Attributes:
        headers: names in any case.
        content: the whole body; empty when a sink took it.
        shown: who answered, for error sentences: no query and no secret.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes
    shown: str

    def json(self) -> Any:
        """
        The body as JSON.

        Raises:
            ProviderUnavailableError: it is none: a proxy's page, for instance.
        """
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as exc:
            if 300 <= self.status < 400:
                # Where to is nobody's business here: it may lead inwards, or hold a token.
                raise ProviderUnavailableError(
                    f"{self.shown} answered {self.status}, a redirect, which is not followed."
                ) from exc
            kind = self.headers.get("content-type", "").partition(";")[0][:40] or "unknown type"
            raise ProviderUnavailableError(
                f"{self.shown} answered {self.status} with something that is no JSON ({kind})."
            ) from exc

    @property
    def retry_after(self) -> timedelta | None:
        """How long it asks us to wait, when it does."""
        return parse_retry_after(self.headers.get("retry-after"), datetime.now(UTC))


class GuardedClient:
    """
    Fetches what untrusted URLs name, and calls the services that the settings name.

    Args:
        allowed_hosts: ``host`` or ``host:port`` for which the guard is lifted: any address, and plain http.
        proxy: URL of an HTTP proxy; none by default, and the environment is never asked. Through a proxy the proxy resolves
            the names, so that only literal addresses can be judged here: give it rules of its own.
        connect_timeout: per connection; *idle_timeout*: between two reads or writes.
        max_connections: over all hosts.
        ssl_context: for certificates of one's own; the default trusts the usual authorities.
    """

    def __init__(
        self,
        *,
        allowed_hosts: Collection[str] = (),
        proxy: str | None = None,
        connect_timeout: timedelta = timedelta(seconds=10),
        idle_timeout: timedelta = timedelta(seconds=30),
        max_connections: int = 100,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        with suppress(ImportError):
            # httpcore would import it within the first request, and hold the event loop up for as long as that takes.
            import_module("anyio._backends._asyncio")
        self._allowed = AllowedHosts(allowed_hosts)
        self._timeout = httpx.Timeout(idle_timeout.total_seconds(), connect=connect_timeout.total_seconds())
        self._proxied = proxy is not None
        #: For providers: ``httpx.AsyncClient(transport=…)`` gets the same pool and guard. Closed by :meth:`close` only.
        self.transport: httpx.AsyncBaseTransport = _Transport(
            _pool(self._allowed, proxy, max_connections, ssl_context or _usual_authorities())
        )

    async def download(self, url: str, *, max_bytes: int, timeout: timedelta) -> Downloaded:  # noqa: ASYNC109 - one for all hops
        """
        Fetch *url* with GET, following at most five redirects.

        Args:
            url: ``https://…``; plain http for allowed hosts only.
            max_bytes: a larger body is given up, whatever its headers say.
            timeout: for everything together, from the first look-up to the last byte.

        Raises:
            InvalidOrderError: a scheme, host or address that is refused. Permanent.
            DownloadRefusedError: 4xx. Permanent.
            UnsupportedImageError: larger than *max_bytes*, or sent compressed. Permanent.
            RateLimitedError: 429. Retryable, with retry_after when the server gave one.
            ProviderUnavailableError: no answer, a broken one, 5xx, too slow. Retryable.
        """
        blocks = _Blocks()
        media_type = await self._fetch(url, blocks, max_bytes, timeout)
        return Downloaded(content=blocks.joined(), media_type=media_type)

    async def download_to(self, sink: Sink, url: str, *, max_bytes: int, timeout: timedelta) -> None:  # noqa: ASYNC109 - as above
        """
        As :meth:`download`, with the body going to *sink* as it arrives; one that fails in the middle has part of it.

        Raises:
            What download does, and what *sink* does.
        """
        await self._fetch(url, sink, max_bytes, timeout)

    async def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        payload: Any = None,
        data: Mapping[str, str] | None = None,
        files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = None,
        max_bytes: int,
        timeout: timedelta,  # noqa: ASYNC109 - one for everything
        into: Sink | None = None,
    ) -> Answer:
        """
        Send one request to a service of our own choosing and return its whole answer, whatever its status; follows no redirect.

        Args:
            url: of a configured service, its host among *allowed_hosts* unless it is public and https.
            content: a body as it is; or *payload* as JSON; or *data* and *files*, ``(field, (name, bytes, media type))``, as a
                form.
            max_bytes: a larger answer is given up.
            timeout: for everything together.
            into: takes the body of a good answer (2xx); others are too short to need it.

        Raises:
            InvalidOrderError: the address is refused. Permanent.
            UnreachableError: no connection could be made. Retryable.
            ProviderUnavailableError: the request did not reach the service as a whole. Retryable.
            AnswerLostError: it may have: no whole answer came, or one larger than *max_bytes*. Retryable.
        """
        shown = shown_url(url)
        form = httpx.Request(
            method,
            self._judged(url),
            headers=_own(headers),
            content=content,
            json=payload,
            data=data,
            files=list(files or ()) or None,
        )
        form.extensions = {"timeout": self._timeout.as_dict() | {"read": timeout.total_seconds()}}
        assert isinstance(form.stream, httpx.AsyncByteStream)
        if int(form.headers.get("content-length", _JOINED_BYTES)) < _JOINED_BYTES:
            form.stream = httpx.ByteStream(await form.aread())
        form.stream = sent = _SentBody(form.stream)
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                response = await self.transport.handle_async_request(form)
                blocks = _Blocks()
                too_large = AnswerLostError(f"{shown} answered with more than {max_bytes} bytes.")
                try:
                    # As it was sent, or decompressed by nobody: we did not ask for that.
                    await _pour(response, into if into is not None and response.is_success else blocks, max_bytes, too_large)
                finally:
                    await response.aclose()
        except (TimeoutError, httpx.HTTPError) as exc:
            within = f"within {timeout.total_seconds():g} s" if isinstance(exc, TimeoutError) else f"({type(exc).__name__})"
            if not sent.is_whole:
                kind = ProviderUnavailableError if sent.is_begun else UnreachableError
                raise kind(f"{shown} could not be reached {within}.") from exc
            raise AnswerLostError(f"{shown} gave no whole answer {within}.") from exc
        return Answer(response.status_code, response.headers, blocks.joined(), shown)

    async def close(self) -> None:
        """Free the connections."""
        await self.transport.aclose()

    async def _fetch(self, url: str, sink: Sink | _Blocks, max_bytes: int, limit: timedelta) -> str | None:
        shown = shown_url(url)
        try:
            async with asyncio.timeout(limit.total_seconds()):
                return await self._follow(url, sink, max_bytes)
        except TimeoutError as exc:
            raise ProviderUnavailableError(f"{shown} was not fetched within {limit.total_seconds():g} s.") from exc
        except httpx.HTTPError as exc:
            raise ProviderUnavailableError(f"{shown} could not be fetched ({type(exc).__name__}).") from exc

    async def _follow(self, url: str, sink: Sink | _Blocks, max_bytes: int) -> str | None:
        target = self._judged(url)
        for _ in range(MAX_REDIRECTS + 1):
            # The transport itself, not an AsyncClient: that one logs whole URLs and carries cookies from host to host.
            request = httpx.Request(
                "GET",
                target,
                headers={"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "jobdaemon"},
                extensions={"timeout": self._timeout.as_dict()},
            )
            response = await self.transport.handle_async_request(request)
            try:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    return await _received(response, target, sink, max_bytes)
            finally:
                await response.aclose()
            target = self._judged(location, base=target)
        raise InvalidOrderError(f"{shown_url(url)} redirects more than {MAX_REDIRECTS} times.")

    def _judged(self, url: str, *, base: httpx.URL | None = None) -> httpx.URL:
        """*url* as a value, if its scheme and form are acceptable; addresses are judged when connecting."""
        try:
            target = httpx.URL(url) if base is None else base.join(url)
        except (httpx.InvalidURL, ValueError, TypeError) as exc:
            raise InvalidOrderError("The source is not a valid URL.") from exc
        if target.userinfo or not target.host:
            raise InvalidOrderError(f"{shown_url(url)} must name a host and no user.")
        port = (443 if target.scheme == "https" else 80) if target.port is None else target.port
        if not 0 < port < 65536:
            raise InvalidOrderError(f"{shown_url(str(target))} names a port that does not exist.")
        allowed = self._allowed.covers(target.host, port)
        if target.scheme != "https" and not (target.scheme == "http" and allowed):
            raise InvalidOrderError(f"{shown_url(str(target))} must be an https URL.")
        if self._proxied and not allowed:
            _judge_literal(target.host)
        return target


class AllowedHosts:
    """Hosts for which the guard is lifted, each ``host`` (any port) or ``host:port``; IPv6 with a port goes in brackets."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._entries = {self._parsed(host) for host in hosts}

    def covers(self, host: str, port: int) -> bool:
        """Whether a connection to *host* and *port* is exempt."""
        name = _normal(host)
        return (name, None) in self._entries or (name, port) in self._entries

    @staticmethod
    def _parsed(entry: str) -> tuple[str, int | None]:
        with suppress(ValueError):
            return str(ipaddress.ip_address(entry)), None
        try:
            parsed = httpx.URL(f"any://{entry}/")
        except httpx.InvalidURL as exc:
            raise SettingsError(f"{entry!r} is not a host or host:port.") from exc
        if not parsed.host or parsed.userinfo or parsed.path != "/" or parsed.query or parsed.fragment:
            raise SettingsError(f"{entry!r} is not a host or host:port.")
        return _normal(parsed.host), parsed.port


def is_public_address(address: str) -> bool:
    """Whether an IP address, as text, belongs to the public internet and to no cloud's inner services."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _REFUSED_V4)
    return ip.scope_id is None and ip in _GLOBAL_V6 and not any(ip in network for network in _REFUSED_V6)


def shown_url(url: str) -> str:
    """Scheme, host and path of *url* for people: no query, fragment or user, and a long path cut."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        return "The URL"
    path = parsed.raw_path.decode("ascii", "replace").partition("?")[0]
    if len(path) > _SHOWN_PATH_CHARACTERS:
        path = f"{path[:_SHOWN_PATH_CHARACTERS]}…"
    host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    return f"{parsed.scheme}://{host}{'' if parsed.port is None else f':{parsed.port}'}{path}"


def parse_retry_after(value: str | None, now: datetime) -> timedelta | None:
    """
    The wait in a ``Retry-After`` header, which is seconds or an HTTP date; None when there is none or it makes no sense.

    Args:
        value: the header.
        now: aware; what a date is measured against.

    Returns:
        From zero to a day.
    """
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        wait = timedelta(seconds=min(int(text[:12]), MAX_RETRY_AFTER.total_seconds()))
    else:
        try:
            date = parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        wait = (date if date.tzinfo else date.replace(tzinfo=UTC)) - now
    return min(max(wait, timedelta(0)), MAX_RETRY_AFTER)


def _own(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {"Accept-Encoding": "identity", "User-Agent": "jobdaemon"} | dict(headers or {})


class _Blocks:
    """A body that is wanted in memory."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def write(self, block: bytes) -> None:
        self._blocks.append(block)

    def joined(self) -> bytes:
        return b"".join(self._blocks)

    def drop(self) -> None:
        self._blocks.clear()


async def _pour(response: httpx.Response, sink: Sink | _Blocks, max_bytes: int, too_large: Exception) -> None:
    """The body as it was sent; *too_large* is raised once there is more of it than *max_bytes*, or is said to be."""
    declared = response.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    try:
        if isinstance(sink, _Blocks):
            await _hold(response, sink, max_bytes, too_large)
        else:
            await _pass_on(response, sink, max_bytes, too_large)
    except BaseException:
        # Whoever keeps the error keeps the frames that it went through.
        if isinstance(sink, _Blocks):
            sink.drop()
        raise


async def _hold(response: httpx.Response, blocks: _Blocks, max_bytes: int, too_large: Exception) -> None:
    left_bytes = max_bytes
    async for block in response.aiter_raw():
        left_bytes -= len(block)
        if left_bytes < 0:
            raise too_large
        blocks.write(block)


async def _pass_on(response: httpx.Response, sink: Sink, max_bytes: int, too_large: Exception) -> None:
    held, held_bytes, left_bytes = _Blocks(), 0, max_bytes
    async for block in response.aiter_raw():
        left_bytes -= len(block)
        if left_bytes < 0:
            raise too_large
        held.write(block)
        held_bytes += len(block)
        if held_bytes >= _POUR_BYTES:
            await asyncio.to_thread(sink.write, held.joined())
            held, held_bytes = _Blocks(), 0
    if held_bytes:
        await asyncio.to_thread(sink.write, held.joined())


async def _received(response: httpx.Response, target: httpx.URL, sink: Sink | _Blocks, max_bytes: int) -> str | None:
    """The body of an answer that is no redirect into *sink*, or the error that its status means; returns the media type."""
    shown = shown_url(str(target))
    if response.status_code != httpx.codes.OK:
        raise _status_error(response, shown)
    if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise UnsupportedImageError(f"{shown} was sent compressed, although that was not asked for.")
    await _pour(response, sink, max_bytes, UnsupportedImageError(f"{shown} is larger than {max_bytes} bytes."))
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type or None


def _status_error(response: httpx.Response, shown: str) -> JobdaemonError:
    status = response.status_code
    retry_after = parse_retry_after(response.headers.get("retry-after"), datetime.now(UTC))
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return RateLimitedError(f"{shown} answered that we ask too often (429).", retry_after=retry_after)
    if status in _TRANSIENT_STATUSES or not 400 <= status < 500:
        return ProviderUnavailableError(f"{shown} answered with status {status}.", retry_after=retry_after)
    return DownloadRefusedError(f"{shown} answered with status {status}.", status=status)


def _normal(host: str) -> str:
    return host.lower().strip("[]").rstrip(".")


def _judge_literal(host: str) -> None:
    """Refuse *host* if it is an address, in any notation the system's own parser takes, and not a public one."""
    try:
        found = socket.getaddrinfo(_normal(host), None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        return  # a name: the proxy resolves it
    if not all(is_public_address(str(address[0])) for *_, address in found):
        raise InvalidOrderError(f"{host} is not a public address.")


@cache
def _usual_authorities() -> ssl.SSLContext:
    """Shared by all clients: reading some 140 certificates holds the event loop up for 20 to 50 ms, and they stay the same."""
    return httpx.create_ssl_context(trust_env=False)


def _pool(
    allowed: AllowedHosts, proxy: str | None, max_connections: int, ssl_context: ssl.SSLContext
) -> httpcore.AsyncConnectionPool:
    if proxy is not None:
        try:
            return httpcore.AsyncHTTPProxy(proxy, ssl_context=ssl_context, max_connections=max_connections)
        except (ValueError, TypeError, RuntimeError) as exc:
            raise SettingsError("The HTTP proxy is not a valid URL.") from exc
    return httpcore.AsyncConnectionPool(
        ssl_context=ssl_context,
        max_connections=max_connections,
        max_keepalive_connections=max_connections // 4,
        keepalive_expiry=15,
        network_backend=_GuardedBackend(allowed),
    )


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once and connects to one of the addresses it has judged, so that a second answer cannot matter."""

    def __init__(self, allowed: AllowedHosts) -> None:
        self._allowed = allowed
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(await self._addresses(host, port), port, local_address, socket_options)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout("No connection in time.") from exc

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """What *host* resolves to, without what the guard refuses; refused as a whole when nothing is left."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            raise httpcore.ConnectError("The name does not resolve.") from exc
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        if self._allowed.covers(host, port):
            return addresses
        public = [address for address in addresses if is_public_address(address)]
        if not public:
            raise InvalidOrderError(f"{host} is not on the public internet.")
        return public

    async def _connect(
        self,
        addresses: list[str],
        port: int,
        local_address: str | None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("The name has no address.")
        for number, address in enumerate(addresses):
            # One dead address must not use up the time of those after it; the last one has all that is left.
            patience = None if number == len(addresses) - 1 else 3.0
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout=patience, local_address=local_address, socket_options=socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure


class _Transport(httpx.AsyncBaseTransport):
    """httpx's seam over an httpcore pool of our own making: httpx offers no way to hand it a network backend."""

    def __init__(self, pool: httpcore.AsyncConnectionPool) -> None:
        self._pool = pool

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        with _as_httpx_errors():
            response = await self._pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            response.status, headers=response.headers, stream=_Stream(response), extensions=response.extensions, request=request
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class _SentBody(httpx.AsyncByteStream):
    """A request's body that tells how much of it was handed over: half a request is one that nobody carries out."""

    def __init__(self, inner: httpx.AsyncByteStream) -> None:
        self._inner = inner
        self.is_begun = False
        self.is_whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.is_begun = True
        async for part in self._inner:
            for start in range(0, len(part), _WRITTEN_BYTES):
                yield part[start : start + _WRITTEN_BYTES]
        self.is_whole = True


class _Stream(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx_errors():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        with _as_httpx_errors():
            await self._response.aclose()


@contextmanager
def _as_httpx_errors() -> Iterator[None]:
    """Each of httpcore's exceptions as httpx's of the same name; a test holds the two sets equal."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as exc:
        raise getattr(httpx, type(exc).__name__)(str(exc)) from exc
    except httpcore.UnsupportedProtocol as exc:
        raise httpx.UnsupportedProtocol(str(exc)) from exc
