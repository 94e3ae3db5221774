"""
What every provider promises, whichever service it calls. The table of providers is in test_providers.py.

A fault or answer that one API does not know is no failure here: then the images are simply made.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from jobdaemon.domain.artifact import Artifact, source_key
from jobdaemon.errors import (
    AnswerLostError,
    JobdaemonError,
    KeyMissingError,
    PermanentError,
    RateLimitedError,
    RetryableError,
    StoreUnavailableError,
)
from jobdaemon.http import GuardedClient
from jobdaemon.ports import (
    CallDone,
    Charged,
    GenerateRequest,
    ImageMade,
    ImageRefused,
    Provider,
    ProviderCall,
    ProviderEvent,
    Submitting,
    TaskAccepted,
    TaskOver,
)
from jobdaemon.sandbox import Sandbox, parse_faults
from jobdaemon.sandbox.shop import Shop
from tests.daemons import until
from tests.fakes import content_of as inline_content

#: The key (or the secret half of it) that every factory gives its provider.
SECRET = "SK-conformance-0123456789abcdef=="
#: What every factory sets as the bound of one image.
MAX_IMAGE_BYTES = 1024 * 1024
#: What all of one call may send at most before it is given up; the endless server has 2 GB to give.
_GIVEN_UP_BYTES = 64 * 1024 * 1024
_ENDLESS_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Bench:
    """
    What a factory builds its provider from.

    Attributes:
        url: of a server that speaks every API at its usual paths, without a path of its own.
        client: may reach that server, and is shared: no provider closes it.
        folder: for files that a provider needs.
    """

    url: str
    client: GuardedClient
    folder: Path


#: Makes a provider with SECRET as its key, MAX_IMAGE_BYTES, polls of a few milliseconds and patience of a few seconds.
Make = Callable[[Bench], Provider]


@dataclass(slots=True)
class Outcome:
    """What one call came to; what it was charged for, and when its slot was free, stand apart from what happened."""

    events: list[ProviderEvent] = field(default_factory=list)
    error: JobdaemonError | None = None
    charged: int = 0
    done_after: list[int] = field(default_factory=list)

    @property
    def made(self) -> list[ImageMade]:
        return [event for event in self.events if isinstance(event, ImageMade)]

    @property
    def answered(self) -> list[int]:
        """Indexes that were made or refused."""
        return [event.index for event in self.events if isinstance(event, ImageMade | ImageRefused)]

    @property
    def task_id(self) -> str | None:
        """The task's id, of a service that has tasks."""
        return next(
            (event.task_id for event in self.events if isinstance(event, Submitting | TaskAccepted) and event.task_id), None
        )


@dataclass(slots=True)
class Service:
    """A provider and the sandbox it calls."""

    provider: Provider
    sandbox: Sandbox
    client: GuardedClient

    @property
    def shop(self) -> Shop:
        return self.sandbox.shop

    def bought(self) -> int:
        """Images that cost money so far."""
        return sum(int(api["images_bought"]) for api in self.shop.report().values())

    def open_slots(self) -> int:
        """Calls or tasks that hold a slot of their key now."""
        return sum(account.open for account in self.shop._accounts.values())


async def outcome(provider: Provider, request: GenerateRequest) -> Outcome:
    """Everything that one call yields, and the error it ends with; only ours are caught."""
    seen = Outcome()
    try:
        async with aclosing(provider.generate(request)) as events:
            async for event in events:
                if isinstance(event, Charged):
                    seen.charged += event.images
                elif isinstance(event, CallDone):
                    seen.done_after.append(len(seen.events))
                else:
                    seen.events.append(event)
    except JobdaemonError as error:
        seen.error = error
    return seen


def wanted(provider: Provider, *, prompt: str = "a portrait by a window", at_most: int = 3) -> GenerateRequest:
    """A request for as many images as one call makes, up to *at_most*, by indexes that do not begin at one."""
    photo = _photo()
    digest = hashlib.sha256(photo).hexdigest()

    async def load() -> bytes:
        return photo

    count = min(at_most, provider.max_images_per_call)
    images = tuple((7 + ordinal, ordinal) for ordinal in range(count))
    return GenerateRequest(1, images, prompt, Artifact(source_key(digest, "png"), digest, len(photo), "image/png"), load)


def indexes(request: GenerateRequest) -> list[int]:
    """What a request asks for."""
    return [index for index, _ in request.images]


def _photo() -> bytes:
    out = io.BytesIO()
    # No smaller than the pickiest model takes.
    Image.linear_gradient("L").convert("RGB").resize((384, 384)).save(out, "PNG")
    return out.getvalue()


def _resumed(request: GenerateRequest, task_id: str) -> GenerateRequest:
    return replace(request, resume=ProviderCall(1, task_id, tuple(indexes(request)), None, datetime.now(UTC)))


def _shown(error: BaseException | None) -> str:
    return "" if error is None else "".join(traceback.format_exception(error))


async def content_of(
    image: ImageMade, client: GuardedClient, *, max_bytes: int = MAX_IMAGE_BYTES, patience: timedelta = timedelta(seconds=5)
) -> bytes:
    """The bytes of an image, however it came."""
    if image.url is None:
        assert image.media_type is not None
        return inline_content(image)
    return (await client.download(image.url, max_bytes=max_bytes, timeout=patience)).content


class EveryProvider:
    """Promises of all providers, the local one too. Needs the fixtures *provider* and *client*."""

    async def test_it_says_what_it_is(self, provider: Provider) -> None:
        """A provider has a name, room for an image in a call, and an answer to lost submits."""
        assert provider.name
        assert provider.max_images_per_call >= 1
        assert provider.on_unknown_submit in ("retry", "fail")

    async def test_every_image_is_made_once(self, provider: Provider, client: GuardedClient) -> None:
        """A call that goes well makes each index of the request exactly once, as a whole picture that its siblings are not."""
        request = wanted(provider, at_most=2)
        seen = await outcome(provider, request)
        assert seen.error is None
        assert sorted(image.index for image in seen.made) == indexes(request)
        pictures = [await content_of(image, client) for image in seen.made]
        for picture in pictures:
            with Image.open(io.BytesIO(picture)) as opened:
                opened.load()
        assert len(set(pictures)) == len(pictures)

    async def test_what_is_unknown_is_no_error(self, provider: Provider) -> None:
        """Calls that nobody knows are not found, and cancelling one is no error: it stopped nothing."""
        request = wanted(provider)
        call = ProviderCall(1, "no-such-task", tuple(indexes(request)), None, datetime.now(UTC))
        assert await provider.cancel(call) is False
        assert await provider.find_task(request, replace(call, task_id=None)) is None

    async def test_closing_early_is_quiet(self, provider: Provider) -> None:
        """A call can be closed after any of its events, and leaves no task of its own behind."""
        before = asyncio.all_tasks()
        for count in (1, 2):
            stream = provider.generate(wanted(provider, prompt=f"closed after {count}", at_most=2))
            for _ in range(count):
                with suppress(StopAsyncIteration):
                    await anext(stream)
            await stream.aclose()

        def left() -> list[str]:
            # The sandbox's server lives in this loop too, and keeps connections open.
            return [text for text in map(repr, asyncio.all_tasks() - before) if "aiohttp" not in text]

        await until(lambda: not left(), timeout_s=5)


class EveryService:
    """Promises of providers that call a service. Needs the fixture *service*: the sandbox is as good as its API."""

    async def test_submitting_comes_before_the_money(self, service: Service) -> None:
        """The first event is Submitting, and until the caller goes on from it nothing is asked for or bought."""
        stream = service.provider.generate(wanted(service.provider))
        async with aclosing(stream):
            assert isinstance(await anext(stream), Submitting)
            await asyncio.sleep(0.02)  # what must not happen gives no signal
            assert (service.bought(), service.open_slots()) == (0, 0)
            await anext(stream)

    async def test_a_photo_that_is_away_is_no_submit(self, service: Service) -> None:
        """What fails before the call that costs money is not noted as one."""

        async def load() -> bytes:
            raise StoreUnavailableError("away")

        seen = await outcome(service.provider, replace(wanted(service.provider), load_photo=load))
        if seen.error is not None:  # else it needs no photo
            assert isinstance(seen.error, StoreUnavailableError)
            assert (seen.events, service.bought()) == ([], 0)

    async def test_money_is_spent_once(self, service: Service) -> None:
        """A call that goes well buys what it makes and nothing else, and leaves no slot open."""
        request = wanted(service.provider)
        await outcome(service.provider, request)
        assert service.bought() == len(request.images)
        await until(lambda: service.open_slots() == 0, timeout_s=5)

    async def test_its_slot_is_free_once_nothing_more_is_asked_for(self, service: Service) -> None:
        """A call says once that the service has done its part: after it holds a slot there no more, and before its images."""
        done: list[int] = []
        async with aclosing(service.provider.generate(wanted(service.provider))) as events:
            kinds: list[type[ProviderEvent]] = []
            async for event in events:
                if isinstance(event, CallDone):
                    done.append(len(kinds))
                    await until(lambda: service.open_slots() == 0, timeout_s=5)
                kinds.append(type(event))
        assert len(done) == 1
        assert {Submitting, TaskAccepted}.isdisjoint(kinds[done[0] :])
        assert {ImageMade, ImageRefused}.isdisjoint(kinds[: done[0]])

    async def test_what_was_bought_is_told(self, service: Service) -> None:
        """Where calls cost money the answer's own count of images is told, and it is the service's."""
        seen = await outcome(service.provider, wanted(service.provider))
        assert seen.error is None
        assert seen.charged == (service.bought() if service.provider.is_paid else 0)

    async def test_a_known_task_is_gone_on_with(self, service: Service) -> None:
        """A later attempt resumes the noted task: it makes all images in the order of that call, and buys none again."""
        request = wanted(service.provider)
        stream = service.provider.generate(request)
        first = Outcome()
        async with aclosing(stream):
            while first.task_id is None:
                try:
                    first.events.append(await anext(stream))
                except StopAsyncIteration:
                    return  # no tasks: see the next test
            if not isinstance(first.events[-1], TaskAccepted):
                first.events.append(await anext(stream))
        second = await outcome(service.provider, _resumed(request, first.task_id))
        assert second.error is None
        assert sorted(second.answered) == indexes(request)
        assert not [event for event in second.events if isinstance(event, Submitting)]
        assert len(second.done_after) == 1
        assert service.bought() == len(request.images)

    async def test_resuming_never_buys(self, service: Service) -> None:
        """A task that the service does not know is over, and that is an error; nothing is bought for it."""
        seen = await outcome(service.provider, _resumed(wanted(service.provider), "no-such-task"))
        assert [type(event) for event in seen.events] == [TaskOver]
        assert isinstance(seen.error, RetryableError | PermanentError)
        assert service.bought() == 0

    async def test_closing_early_leaves_no_open_slot(self, service: Service) -> None:
        """A cancelled call gives its slot back: at once where it is one request, when the task ends where it is a task."""
        has_tasks = (await outcome(service.provider, wanted(service.provider))).task_id is not None
        bought = service.bought()
        service.sandbox.behaviour.latency_s = 0.3 if has_tasks else 60.0
        call = asyncio.ensure_future(outcome(service.provider, wanted(service.provider, prompt="given up")))
        await until(lambda: service.open_slots() == 1, timeout_s=5)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: service.open_slots() == 0, timeout_s=5)
        assert has_tasks or service.bought() == bought

    async def test_above_its_limit_it_is_a_capacity_signal(self, service: Service) -> None:
        """A service that is full costs no attempt and no money."""
        service.sandbox.behaviour.concurrency = 0
        seen = await outcome(service.provider, wanted(service.provider))
        if seen.error is not None:  # a queue of one's own is never full
            assert isinstance(seen.error, RateLimitedError)
            assert (seen.answered, service.bought()) == ([], 0)

    async def test_a_key_that_is_not_here_is_that_key_s_error(self, service: Service) -> None:
        """An alias this daemon has no secret for is another daemon's, which is no outage and no refusal."""
        seen = await outcome(service.provider, replace(wanted(service.provider), key="no-such-key"))
        assert seen.error is None or isinstance(seen.error, KeyMissingError)
        assert seen.events == [] or seen.error is None

    @pytest.mark.parametrize(
        ("fault", "errors"),
        [
            ("429", (RateLimitedError,)),
            ("500", (RetryableError,)),
            ("html", (RetryableError,)),
            ("reset", (AnswerLostError,)),
            ("expired", (RetryableError,)),
            ("failed", (RetryableError, PermanentError)),
            ("partial", (RetryableError,)),
            ("unsafe", (PermanentError,)),
        ],
    )
    async def test_each_fault_is_one_error_of_the_right_kind(
        self, service: Service, fault: str, errors: tuple[type[JobdaemonError], ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whatever goes wrong at the service is one of our errors, loses nothing, makes nothing twice, and tells no secret."""
        caplog.set_level(logging.DEBUG)
        service.sandbox.behaviour.faults = parse_faults(f"{fault}=1")
        request = wanted(service.provider)
        seen = await outcome(service.provider, request)
        assert seen.error is None or isinstance(seen.error, errors)
        assert len(set(seen.answered)) == len(seen.answered)
        assert set(seen.answered) <= set(indexes(request))
        if fault != "partial" and seen.error is None:
            assert sorted(seen.answered) == indexes(request)
        for text in (_shown(seen.error), caplog.text):
            assert SECRET not in text
            assert "signature=" not in text
        await until(lambda: service.open_slots() == 0, timeout_s=5)

    async def test_the_shared_client_stays_open(self, service: Service) -> None:
        """Closing one provider leaves the connections of the others alone."""
        await service.provider.close()
        report = await service.client.call(
            "GET", f"{service.sandbox.url}/_sandbox/report", max_bytes=100_000, timeout=timedelta(seconds=5)
        )
        assert report.status == 200


#: Answers that no service should give, each with what it is.
_JSON = "Content-Type: application/json"
NONSENSE: dict[str, tuple[str, tuple[str, ...], bytes]] = {
    "page": ("200 OK", ("Content-Type: text/html",), b"<html>Welcome to the hotel's network</html>"),
    "empty": ("200 OK", (_JSON,), b""),
    "null": ("200 OK", (_JSON,), b"null"),
    "list": ("200 OK", (_JSON,), b"[]"),
    "object": ("200 OK", (_JSON,), b"{}"),
    "no images": ("200 OK", (_JSON,), b'{"data": [], "output": {}, "code": 10000}'),
    "wrong types": ("200 OK", (_JSON,), b'{"data": "x", "output": 3, "code": {}, "prompt_id": [], "error": [1]}'),
    "depth": ("200 OK", (_JSON,), b"[" * 200_000),
    "no text": ("200 OK", (_JSON,), b"\xff\xfe\x00{"),
    "no picture": ("200 OK", (_JSON,), b'{"data": [{"b64_json": "aGVsbG8="}, {"url": "file:///etc/passwd"}]}'),
    "inner network": ("302 Found", ("Location: http://169.254.169.254/latest/meta-data/",), b""),
    "refused": ("403 Forbidden", ("Content-Type: text/html",), b"<html>no</html>"),
    "away": ("503 Service Unavailable", ("Retry-After: soon",), b"down"),
}


@dataclass(slots=True)
class HostileServer:
    """Answers every request alike, and counts."""

    send: Callable[[asyncio.StreamWriter], Awaitable[None]]
    requests: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            for line in head.lower().split("\r\n"):
                if line.startswith("content-length:"):
                    await reader.readexactly(int(line.partition(":")[2]))
            self.requests += 1
            await self.send(writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def hostile(send: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[tuple[str, HostileServer]]:
    """A server on loopback that answers everything with *send*; gives its URL."""
    server = HostileServer(send)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", server
    finally:
        listener.close()
        await listener.wait_closed()


class EveryServiceGoneWrong:
    """Promises about servers that are not what they should be. Needs the fixtures *make* and *tmp_path*."""

    @pytest.mark.parametrize("name", list(NONSENSE))
    async def test_a_nonsense_answer_is_one_clear_error(self, make: Make, tmp_path: Path, name: str) -> None:
        """Whatever a server says instead of the API's words, no redirect is followed and one of our errors comes, soon."""
        status, headers, body = NONSENSE[name]
        raw = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close", "", ""])

        async def send(writer: asyncio.StreamWriter) -> None:
            writer.write(raw.encode() + body)
            await writer.drain()

        async with hostile(send) as (url, server):
            seen = await self._seen(make, url, tmp_path)
        assert isinstance(seen.error, RetryableError | PermanentError)
        assert seen.made == []
        assert 1 <= server.requests <= 20
        assert SECRET not in _shown(seen.error)

    async def test_an_endless_answer_is_given_up_early(self, make: Make, tmp_path: Path) -> None:
        """A body of 2 GB is given up long before its end."""
        sent_bytes = 0
        block = b"A" * 65_536

        async def send(writer: asyncio.StreamWriter) -> None:
            nonlocal sent_bytes
            writer.write(f"HTTP/1.1 200 OK\r\n{_JSON}\r\nContent-Length: {_ENDLESS_BYTES}\r\n\r\n".encode())
            writer.write(b'{"data": [{"b64_json": "')
            while sent_bytes < _ENDLESS_BYTES:
                writer.write(block)
                await writer.drain()
                sent_bytes += len(block)

        async with hostile(send) as (url, _):
            seen = await self._seen(make, url, tmp_path)
        assert isinstance(seen.error, RetryableError)
        assert 0 < sent_bytes < _GIVEN_UP_BYTES

    @staticmethod
    async def _seen(make: Make, url: str, folder: Path) -> Outcome:
        client = GuardedClient(allowed_hosts=[url.removeprefix("http://")])
        try:
            provider = make(Bench(url, client, folder))
            try:
                async with asyncio.timeout(30):
                    return await outcome(provider, wanted(provider))
            finally:
                await provider.close()
        finally:
            await client.close()
