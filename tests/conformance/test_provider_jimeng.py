"""The Jimeng provider: its table of errors, its answers, its requests, and its calls against the sandbox."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from jobdaemon.app import open_providers
from jobdaemon.errors import (
    AnswerLostError,
    KeyRefusedError,
    PhotoRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    SettingsError,
)
from jobdaemon.http import Answer, GuardedClient
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
from jobdaemon.providers.inline import InlineImages
from jobdaemon.providers.jimeng import JimengProvider, KeyPair
from jobdaemon.providers.jimeng.answers import GATEWAY_KINDS, KINDS, VERDICTS, end_in, told_in
from jobdaemon.providers.photo_links import InlineLinks, SuperbedLinks
from jobdaemon.providers.superbed import Superbed
from jobdaemon.providers.wire import Kind
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings import load_settings
from jobdaemon.settings_generate import JimengSettings, SuperbedSettings
from jobdaemon.spool import Spool
from jobdaemon.storage.files import FilesStore
from tests.conformance.provider_promises import MAX_IMAGE_BYTES, Outcome, content_of, hostile, outcome, wanted
from tests.daemons import until
from tests.fakes import FakeUploaded

API = "jimeng"
KEYS = KeyPair("AKjimeng-test", "SKjimeng-test==")
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
ERRORS = {
    Kind.RETRY: ProviderUnavailableError,
    Kind.CAPACITY: RateLimitedError,
    Kind.PERMANENT: ProviderRefusedError,
    Kind.PHOTO: PhotoRefusedError,
    Kind.KEY: KeyRefusedError,
    Kind.LOST: AnswerLostError,
}

Make = Callable[..., JimengProvider]


def answer(body: Any, status: int = 200, **headers: str) -> Answer:
    """An answer with *body* as JSON, or as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"content-type": "application/json"} | named, content, "https://api.example/")


def error_in(body: Any, status: int, *, is_submit: bool = True, **headers: str) -> Exception:
    """The error that an answer is."""
    error = told_in(answer(body, status, **headers), is_submit=is_submit, pair=KEYS, now=NOW).error
    assert error is not None
    return error


def refused(code: int, message: str = "what it says") -> dict[str, Any]:
    return {"code": code, "data": None, "message": message, "request_id": "2026REQ", "status": code, "time_elapsed": "36ms"}


def gateway(code: str, message: str = "what it says") -> dict[str, Any]:
    error = {"CodeN": 100010, "Code": code, "Message": message}
    return {"ResponseMetadata": {"RequestId": "2026GW", "Action": "CVSync2AsyncSubmitTask", "Error": error}}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("code", list(KINDS))
def test_every_code_of_the_table_is_its_kind(code: int, status: int) -> None:
    """A code means what the table says under any HTTP status, 200 too, with data null; the service's words are kept."""
    error = error_in(refused(code), status)
    assert type(error) is ERRORS[KINDS[code]]
    assert str(error) == f"jimeng ({status}, request 2026REQ): what it says [{code}]"


@pytest.mark.parametrize("code", list(GATEWAY_KINDS))
def test_every_code_of_the_gateway_is_its_kind(code: str) -> None:
    """The gateway's envelope is understood, and its codes mean what the table says."""
    error = error_in(gateway(code), 418)
    assert type(error) is ERRORS[GATEWAY_KINDS[code]]
    assert code == "InvalidTimestamp" or str(error) == f"jimeng (418, request 2026GW): what it says [{code}]"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (refused(59999), 400, Kind.PERMANENT),
        (refused(59999), 500, Kind.RETRY),
        (refused(59999), 429, Kind.CAPACITY),
        (refused(59999), 200, Kind.RETRY),
        (gateway("SomethingNew"), 403, Kind.KEY),
        (gateway("SomethingNew"), 503, Kind.RETRY),
        ({"ResponseMetadata": {"Error": None}}, 502, Kind.RETRY),
        ({"message": "no code"}, 200, Kind.LOST),
        (b"<html>Bad gateway</html>", 502, Kind.RETRY),
        (b"<html>Time-out</html>", 504, Kind.LOST),
        (b"<html>Welcome</html>", 200, Kind.LOST),
        (b"", 401, Kind.KEY),
    ],
)
def test_an_unknown_answer_goes_by_its_status(body: Any, status: int, kind: Kind) -> None:
    """What no table has is judged by the HTTP status; what cannot be read after a submit is lost."""
    assert type(error_in(body, status)) is ERRORS[kind]


def test_the_same_answer_to_a_poll_loses_nothing() -> None:
    """A poll can be repeated: what cannot be read is asked for again."""
    for body, status in ((b"<html>", 504), (b"<html>", 200), ({}, 200), (gateway("InternalServiceTimeout"), 504)):
        assert type(error_in(body, status, is_submit=False)) is ProviderUnavailableError


def test_a_code_may_come_as_text() -> None:
    """Some answers have numbers in quotes."""
    assert type(error_in({**refused(1), "code": "50430"}, 200)) is RateLimitedError
    assert told_in(answer({"code": "10000", "data": {"task_id": "1"}}), is_submit=True, pair=KEYS, now=NOW).error is None


@pytest.mark.parametrize("code", ["InvalidTimestamp", "SignatureDoesNotMatch"])
@pytest.mark.parametrize("minutes", [10, -10])
def test_a_clock_that_is_off_is_named(code: str, minutes: int) -> None:
    """Ten minutes off in either direction are one clear sentence and no refused key, whatever the gateway calls it."""
    error = error_in(gateway(code), 401, date=format_datetime(NOW + timedelta(minutes=minutes), usegmt=True))
    assert type(error) is ProviderUnavailableError
    assert "the clock of this machine is off by about 10 min" in str(error)


def test_a_signature_that_does_not_match_is_a_refused_key_when_the_clock_is_right() -> None:
    """Without a difference of clocks, or a date to tell by, a wrong signature is the key's."""
    assert type(error_in(gateway("SignatureDoesNotMatch"), 401, date=format_datetime(NOW, usegmt=True))) is KeyRefusedError
    assert type(error_in(gateway("SignatureDoesNotMatch"), 401, date="yesterday")) is KeyRefusedError
    assert "the clock of this machine is off, and" in str(error_in(gateway("InvalidTimestamp"), 400))


def test_no_error_repeats_a_secret() -> None:
    """Gateways repeat ids, signatures' parts and links: key pair and queries are masked."""
    words = f"{KEYS.access_key_id} {KEYS.secret_access_key} https://x.example/p.jpg?X-Amz-Signature=abc"
    for body in (refused(50215, words), gateway("InvalidAccessKey", words)):
        text = str(error_in(body, 400))
        assert "jimeng-test" not in text
        assert "abc" not in text


def test_retry_after_is_kept() -> None:
    """Where a proxy says how long to wait, that is told on."""
    error = error_in(refused(50429), 429, retry_after="7")
    assert isinstance(error, RateLimitedError)
    assert error.retry_after == timedelta(seconds=7)


def test_the_docs_list_every_code() -> None:
    """The table of docs/providers.md has the codes of both tables, each once."""
    text = (Path(__file__).parents[2] / "docs" / "providers.md").read_text(encoding="utf-8")
    table = text.partition("<!-- jimeng errors -->")[2].partition("<!--")[0]
    listed = re.findall(r"\b50\d{3}\b|`(\w+)`", table)
    codes = [*map(str, KINDS), *GATEWAY_KINDS]
    assert sorted(re.findall(r"\b50\d{3}\b", table) + [name for name in listed if name]) == sorted(codes)


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("status", ["in_queue", "generating", "something_new"])
def test_a_task_under_way_has_no_end(status: str) -> None:
    """Whatever is not known to be an end is waited for."""
    assert end_in({"status": status, "image_urls": None}) is None


@pytest.mark.parametrize("status", ["not_found", "expired"])
def test_a_forgotten_task_may_be_bought_again(status: str) -> None:
    """Unknown and expired tasks end in an error that may be retried."""
    end = end_in({"status": status})
    assert end is not None
    assert type(end.error) is ProviderUnavailableError


@pytest.mark.parametrize(
    ("data", "made"),
    [
        ({"image_urls": ["https://x/1", "https://x/2"], "binary_data_base64": None}, ["https://x/1", "https://x/2"]),
        ({"image_urls": None, "binary_data_base64": [base64.b64encode(PNG).decode()]}, [PNG]),
        ({"image_urls": [], "binary_data_base64": [base64.b64encode(PNG).decode()]}, [PNG]),
        ({"image_urls": ["https://x/1"], "binary_data_base64": [base64.b64encode(PNG).decode()]}, ["https://x/1"]),
        ({"image_urls": ["", None, "file:///etc/passwd", "https://x/1"]}, ["https://x/1"]),
    ],
    ids=["links", "inline", "no links", "both", "mixed"],
)
def test_results_come_as_links_or_inline(data: dict[str, Any], made: list[Any]) -> None:
    """Links are taken before base64, base64 where there are none, and what is neither is left out; the format is sniffed."""
    end = end_in({"status": "done", **data})
    assert end is not None
    inline = InlineImages(Spool, most=1, max_bytes=1000, provider="jimeng")
    events = [image.event(7, inline, NOW) for image in end.images]
    assert [event.url or event.content for event in events] == made
    assert all(event.url is None or event.url_expires_at == NOW for event in events)
    assert all(event.content is None or event.media_type == "image/png" for event in events)


def test_done_without_an_image_is_an_error() -> None:
    """A task that is done and gives nothing is over."""
    end = end_in({"status": "done", "image_urls": None, "binary_data_base64": None})
    assert end is not None
    assert isinstance(end.error, ProviderUnavailableError)


# ---------------------------------------------------------------- against the sandbox


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one with small pictures."""
    async with Sandbox(Behaviour(latency_s=0.01, image_px=(48, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[GuardedClient]:
    """A client that may reach the sandbox."""
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])
    yield client
    await client.close()


@pytest.fixture
def make(sandbox: Sandbox, client: GuardedClient) -> Make:
    """Makes a provider with settings of one's own."""

    def make(
        *, keys: dict[str, KeyPair] | None = None, clock: Callable[[], datetime] | None = None, **chosen: Any
    ) -> JimengProvider:
        defaults = {"base_url": sandbox.url, "photo": "superbed", "poll": "5ms", "task_timeout": "5s"}
        settings = JimengSettings.model_validate(defaults | chosen)
        superbed = SuperbedSettings(url=f"{sandbox.url}/superbed/upload", token=SecretStr("jimeng-token"))
        return JimengProvider(
            settings,
            keys={"default": KEYS} if keys is None else keys,
            client=client,
            links=InlineLinks() if settings.photo == "inline" else SuperbedLinks(Superbed(superbed, client), FakeUploaded()),
            max_image_bytes=MAX_IMAGE_BYTES,
            clock=clock or (lambda: datetime.now(UTC)),
        )

    return make


def resumed(request: GenerateRequest, seen: Outcome, **chosen: Any) -> GenerateRequest:
    """*request* as a later attempt makes it."""
    call = ProviderCall(1, seen.task_id, tuple(index for index, _ in request.images), None, datetime.now(UTC))
    return replace(request, resume=replace(call, **chosen))


def bought(sandbox: Sandbox) -> int:
    return int(sandbox.report()["apis"].get(API, {"images_bought": 0})["images_bought"])


async def test_one_image_by_link(make: Make, sandbox: Sandbox, client: GuardedClient) -> None:
    """A call is submitted, noted by its model and number, and gives a link that is good for a day."""
    seen = await outcome(make(), wanted(make()))
    assert seen.error is None
    assert [type(event) for event in seen.events] == [Submitting, TaskAccepted, ImageMade]
    assert (seen.task_id or "").startswith("jimeng_t2i_v40:73926163365196")
    [image] = seen.made
    assert image.url_expires_at is not None
    assert timedelta(hours=23, minutes=59) < image.url_expires_at - datetime.now(UTC) <= timedelta(hours=24)
    assert (await content_of(image, client)).startswith(b"\x89PNG")
    assert bought(sandbox) == 1


@pytest.mark.parametrize(
    ("chosen", "photos"),
    [
        ({"req_key": "jimeng_t2i_v40"}, 1),
        ({"req_key": "jimeng_seedream46_cvtob", "strength": 0.0}, 1),
        ({"req_key": "jimeng_i2i_v30"}, 1),
        ({"req_key": "jimeng_i2i_v30", "photo": "inline"}, 0),
        ({"req_key": "jimeng_t2i_v30", "photo": "inline"}, 0),
        ({"req_key": "jimeng_t2i_v31"}, 0),
    ],
)
async def test_each_model_gets_what_it_takes(make: Make, sandbox: Sandbox, chosen: dict[str, Any], photos: int) -> None:
    """The sandbox, which judges every field, takes each model's request; photos are uploaded only where links are needed."""
    provider = make(**chosen)
    seen = await outcome(provider, wanted(provider))
    assert seen.error is None
    assert len(seen.made) == 1
    assert sandbox.report()["apis"].get("superbed", {"calls": 0})["calls"] == photos


async def test_a_photo_that_only_links_can_bring_is_refused_in_the_settings(make: Make) -> None:
    """A model without inline photos says so at the start."""
    with pytest.raises(SettingsError, match='photo is "inline", but jimeng_t2i_v40'):
        make(photo="inline")


@pytest.mark.parametrize("pair", [KeyPair("", "x"), KeyPair("AK", ""), KeyPair("AK b", "x"), KeyPair("AK/b", "x")])
def test_half_a_key_is_refused_in_the_settings(make: Make, pair: KeyPair) -> None:
    """Both parts are needed, and the id must fit into the header."""
    with pytest.raises(SettingsError, match="main"):
        make(keys={"main": pair})
    with pytest.raises(SettingsError, match="must be set"):
        make(keys={})


def test_several_keys_are_pairs(tmp_path: Path, client: GuardedClient) -> None:
    """Each key of the settings is both parts in one text; half of one is told by its alias."""
    chosen = {"PHOTO": "inline", "REQ_KEY": "jimeng_i2i_v30"}
    environ = {"JOBDAEMON_DATA_DIR": str(tmp_path)} | {
        f"JOBDAEMON_GENERATE__JIMENG__{name}": value for name, value in chosen.items()
    }
    store = FilesStore(tmp_path / "artifacts")

    def opened(*keys: tuple[str, str]) -> Provider:
        text = json.dumps([{"alias": alias, "key": key} for alias, key in keys])
        settings = load_settings(environ=environ | {"JOBDAEMON_GENERATE__JIMENG__KEYS": text})
        return open_providers(settings, client, store)["jimeng"]

    provider = opened(("a", "AKa:SKa=="), ("b", "AKb:SK:b=="))
    assert isinstance(provider, JimengProvider)
    assert provider._keys == {"a": KeyPair("AKa", "SKa=="), "b": KeyPair("AKb", "SK:b==")}
    with pytest.raises(SettingsError, match="key b is not the two parts"):
        opened(("a", "AKa:SKa=="), ("b", "AKb"))
    environ |= {f"JOBDAEMON_GENERATE__JIMENG__{name}": "x" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    with pytest.raises(SettingsError, match=r"generate\.jimeng\.access_key_id"):
        opened(("a", "AKa:SKa=="))


async def test_several_images_a_call(make: Make, sandbox: Sandbox) -> None:
    """A model that may make several gets calls until all are there: as many a call as the prompt brings, the last alone."""
    provider = make(images_per_call=5)
    assert provider.max_images_per_call == 5
    seen = await outcome(provider, wanted(provider, prompt="a set of 2 images of her", at_most=5))
    assert seen.error is None
    assert seen.answered == [7, 8, 9, 10, 11]
    kinds = [type(event) for event in seen.events]
    call = [Submitting, TaskAccepted]
    assert kinds == [*call, ImageMade, ImageMade, *call, ImageMade, ImageMade, *call, ImageMade]
    assert (bought(sandbox), sandbox.report()["apis"][API]["calls"]) == (5, 3)


def test_models_that_make_one_are_asked_for_one(make: Make) -> None:
    """images_per_call is for models that can."""
    assert make(images_per_call=5, req_key="jimeng_i2i_v30").max_images_per_call == 1


async def test_results_are_mapped_by_the_call_that_is_resumed(make: Make, sandbox: Sandbox) -> None:
    """A resumed task's results belong to its own images, in order, with the model it was submitted to; nothing is bought."""
    first = make(images_per_call=3)
    request = wanted(first, prompt="3 images", at_most=3)
    seen = await outcome(first, request)
    later = make(images_per_call=1, req_key="jimeng_i2i_v30", photo="inline")
    again = await outcome(later, resumed(request, seen, images=(9, 7, 8)))
    assert again.error is None
    assert [(event.index, event.url) for event in again.made] == [
        (index, event.url) for index, event in zip((9, 7, 8), seen.made, strict=True)
    ]
    assert (bought(sandbox), sandbox.report()["apis"][API]["calls"]) == (3, 1)


@pytest.mark.parametrize("code", [code for code, kind in KINDS.items() if kind is Kind.PERMANENT and code != 50215])
async def test_content_that_is_refused(make: Make, sandbox: Sandbox, code: int) -> None:
    """The same no is the call's error when it is submitted, and the one image's end when it is what became of the task."""
    provider = make()
    refused_at_once = await outcome(provider, wanted(provider, prompt=f"sandbox:submit={code}"))
    assert isinstance(refused_at_once.error, ProviderRefusedError)
    assert [type(event) for event in refused_at_once.events] == [Submitting]
    later = await outcome(provider, wanted(provider, prompt=f"sandbox:result={code}"))
    assert later.error is None
    assert isinstance(later.events[-1], ImageRefused)
    assert f"[{code}]" in later.events[-1].reason
    assert bought(sandbox) == 0


async def test_content_of_several_images_is_refused_as_a_whole(make: Make) -> None:
    """A task of several images whose prompt is refused is over, and permanently so."""
    provider = make(images_per_call=2)
    seen = await outcome(provider, wanted(provider, prompt="2 images sandbox:result=50412", at_most=2))
    assert isinstance(seen.error, ProviderRefusedError)
    assert isinstance(seen.events[-1], TaskOver)


@pytest.mark.parametrize("code", [*sorted(VERDICTS), 50215])
async def test_a_task_that_came_to_nothing_may_be_bought_again(make: Make, code: int) -> None:
    """A picture that did not pass, a failed review and a stale task end the task at once, and may be retried."""
    provider = make()
    seen = await outcome(provider, wanted(provider, prompt=f"sandbox:result={code}"))
    assert type(seen.error) is ProviderUnavailableError
    assert [type(event) for event in seen.events] == [Submitting, TaskAccepted, TaskOver]


@pytest.mark.parametrize("code", [50500, 50501])
async def test_trouble_of_its_own_is_asked_again_before_it_is_bought_again(make: Make, code: int) -> None:
    """An internal error on polls leaves the task open in the first attempt, and ends it in a later one."""
    provider = make()
    request = wanted(provider, prompt=f"sandbox:result={code}")
    seen = await outcome(provider, request)
    assert type(seen.error) is ProviderUnavailableError
    assert [type(event) for event in seen.events] == [Submitting, TaskAccepted]
    again = await outcome(provider, resumed(request, seen))
    assert type(again.error) is ProviderUnavailableError
    assert [type(event) for event in again.events] == [TaskOver]


@pytest.mark.parametrize(("limit", "code"), [("concurrency", 50430), ("qps", 50429)])
async def test_a_full_service_is_capacity_on_a_submit(make: Make, sandbox: Sandbox, limit: str, code: int) -> None:
    """Too many at once and too many a second cost no attempt; a slot is held until the task is made."""
    sandbox.behaviour.latency_s = 0.2
    setattr(sandbox.behaviour, limit, 1)
    provider = make()
    stream = provider.generate(wanted(provider))
    await anext(stream)
    await anext(stream)
    seen = await outcome(provider, wanted(provider, prompt="one too many"))
    await stream.aclose()
    assert isinstance(seen.error, RateLimitedError)
    assert f"[{code}]" in str(seen.error)
    assert [type(event) for event in seen.events] == [Submitting]
    await until(lambda: sandbox.shop.account(API, KEYS.access_key_id).open == 0, timeout_s=5)


async def test_polls_get_over_what_goes_wrong(make: Make, sandbox: Sandbox) -> None:
    """Limits and broken answers to polls only slow them down: every task is made, and bought once."""
    sandbox.behaviour.latency_s = 0.1
    provider = make()
    streams = [provider.generate(wanted(provider, prompt=f"number {number}")) for number in range(8)]
    for stream in streams:
        await anext(stream)
        await anext(stream)
    # A stream ends when three others than 429 come in a row, and how the streams take turns the seed does not say: they are rare.
    sandbox.behaviour.faults = parse_faults("429=0.5,500=0.01,html=0.01,reset=0.01", seed=5)

    async def rest(stream: AsyncGenerator[ProviderEvent, None]) -> list[ProviderEvent]:
        return [event async for event in stream if not isinstance(event, Charged | CallDone)]

    made = await asyncio.gather(*map(rest, streams))
    assert [[type(event) for event in events] for events in made] == [[ImageMade]] * 8
    assert sum(sandbox.report()["apis"][API]["faults"].values()) >= 3
    assert bought(sandbox) == 8


async def test_a_lost_submit_can_be_asked_of_nobody(make: Make, sandbox: Sandbox) -> None:
    """A reset after the submit is a lost answer: the task runs on, costs its image, and is not found."""
    sandbox.behaviour.faults = parse_faults("reset=1")
    provider = make(on_unknown_submit="fail")
    request = wanted(provider)
    seen = await outcome(provider, request)
    assert isinstance(seen.error, AnswerLostError)
    assert provider.on_unknown_submit == "fail"
    assert await provider.find_task(request, ProviderCall(1, None, (7,), None, datetime.now(UTC))) is None
    await until(lambda: bought(sandbox) == 1, timeout_s=5)


async def test_a_task_that_never_ends_is_left_for_a_later_attempt(make: Make, sandbox: Sandbox) -> None:
    """After its patience the provider gives up waiting, not the task."""
    sandbox.behaviour.latency_s = 4
    provider = make(task_timeout="50ms")
    seen = await outcome(provider, wanted(provider))
    assert type(seen.error) is ProviderUnavailableError
    assert "is not done after 0.05 s" in str(seen.error)
    assert [type(event) for event in seen.events] == [Submitting, TaskAccepted]


async def test_a_task_can_be_cancelled(make: Make, sandbox: Sandbox) -> None:
    """Cancelling a task under way stops it, frees its slot and costs nothing; a second time there is nothing to stop."""
    sandbox.behaviour.latency_s = 4
    provider = make()
    stream = provider.generate(wanted(provider))
    await anext(stream)
    accepted = await anext(stream)
    await stream.aclose()
    assert isinstance(accepted, TaskAccepted)
    call = ProviderCall(1, accepted.task_id, (7,), None, datetime.now(UTC))
    assert await provider.cancel(call) is True
    assert sandbox.shop.account(API, KEYS.access_key_id).open == 0
    assert await provider.cancel(call) is False
    assert bought(sandbox) == 0


async def test_a_service_that_is_away_cannot_cancel() -> None:
    """A cancel that nobody heard may be tried again."""
    client = GuardedClient(allowed_hosts=["127.0.0.1"])
    settings = JimengSettings(base_url="http://127.0.0.1:9")
    provider = JimengProvider(settings, keys={"k": KEYS}, client=client, links=InlineLinks(), max_image_bytes=MAX_IMAGE_BYTES)
    with pytest.raises(ProviderUnavailableError, match="could not be reached"):
        await provider.cancel(ProviderCall(1, "x:1", (7,), None, datetime.now(UTC)))
    await client.close()


@pytest.mark.parametrize("pair", [KeyPair("AKjimeng-test", "SKwrong=="), KeyPair("LTAI-other", "SKother==")])
async def test_a_wrong_key_is_refused(make: Make, sandbox: Sandbox, pair: KeyPair) -> None:
    """An unknown id and a wrong secret are this key's error, without either in it."""
    provider = make(keys={"default": pair})
    seen = await outcome(provider, wanted(provider))
    assert isinstance(seen.error, KeyRefusedError)
    assert pair.access_key_id not in str(seen.error)
    assert pair.secret_access_key not in str(seen.error)
    assert sandbox.report()["apis"][API]["unauthorised"] == 1


async def test_the_alias_picks_the_key(make: Make, sandbox: Sandbox) -> None:
    """A request is signed with the key it names, and a task is asked for with the key that bought it."""
    provider = make(keys={"a": KEYS, "b": KeyPair("AKjimeng-second", "SKjimeng-second==")})
    request = replace(wanted(provider), key="b")
    seen = await outcome(provider, request)
    assert seen.error is None
    assert sandbox.shop.account(API, "AKjimeng-second").calls == 1
    assert (await outcome(provider, resumed(request, seen, key="b"))).error is None
    lost = await outcome(provider, resumed(request, seen, key="a"))
    assert isinstance(lost.events[0], TaskOver)


@pytest.mark.parametrize("minutes", [10, -10])
async def test_a_clock_ten_minutes_off(make: Make, sandbox: Sandbox, minutes: int) -> None:
    """A machine whose clock is wrong is told so once; nothing is bought, no key is blamed; the next call has the right time."""
    off = timedelta(minutes=minutes)
    provider = make(clock=lambda: datetime.now(UTC) + off)
    for seen in await asyncio.gather(*(outcome(provider, wanted(provider)) for _ in range(2))):
        assert type(seen.error) is ProviderUnavailableError
        assert "the clock of this machine is off by about 10 min" in str(seen.error)
    assert bought(sandbox) == 0
    assert (await outcome(provider, wanted(provider))).error is None
    off = timedelta(0)  # somebody sets it right
    seen = await outcome(provider, wanted(provider))
    assert type(seen.error) is ProviderUnavailableError
    assert (await outcome(provider, wanted(provider))).error is None


async def test_a_refused_key_is_none_of_the_clock_s(make: Make, sandbox: Sandbox) -> None:
    """With a clock that is off the first answer may be its fault; once that is made up for, a wrong secret is called so."""
    keys = {"a": KeyPair("AKwrong", "SKnot-this-one==")}
    provider = make(keys=keys, clock=lambda: datetime.now(UTC) + timedelta(minutes=10))
    first, second = [(await outcome(provider, wanted(provider))).error for _ in range(2)]
    assert type(first) is ProviderUnavailableError
    assert type(second) is KeyRefusedError
    assert bought(sandbox) == 0


async def test_a_wrong_parameter_is_permanent(make: Make) -> None:
    """A prompt longer than the model takes is refused with the service's words."""
    provider = make()
    seen = await outcome(provider, wanted(provider, prompt="x" * 801))
    assert isinstance(seen.error, ProviderRefusedError)
    assert "prompt is invalid" in str(seen.error)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"code": 10000, "data": None}, AnswerLostError),
        ({"code": 10000, "data": {"task_id": ""}}, AnswerLostError),
        ({"code": 10000, "data": {"task_id": "a b\n"}}, AnswerLostError),
        ({"code": 50430, "data": None, "message": "later"}, RateLimitedError),
    ],
)
async def test_a_submit_without_an_id_is_lost(body: Any, error: type[Exception]) -> None:
    """The service took the call and did not say which task it is: that is a lost answer."""
    seen = await against([body])
    assert type(seen.error) is error
    assert [type(event) for event in seen.events] == [Submitting]


async def test_a_broken_image_ends_the_task() -> None:
    """Base64 that is no image cannot be had again: its siblings are out, and the task is over."""
    good = base64.b64encode(PNG).decode()
    done = {"status": "done", "image_urls": None, "binary_data_base64": [good, "aGVsbG8="]}
    seen = await against([{"code": 10000, "data": {"task_id": 7}}, {"code": 10000, "data": done}], images_per_call=2)
    assert type(seen.error) is ProviderUnavailableError
    assert [type(event) for event in seen.events] == [Submitting, TaskAccepted, ImageMade, TaskOver]


async def test_a_poll_that_some_gateway_refuses_does_not_end_the_task() -> None:
    """What is no answer of the service says nothing about the task: it stays open for a later attempt."""
    seen = await against([{"code": 10000, "data": {"task_id": "7"}}, gateway("InvalidActionOrVersion")])
    assert type(seen.error) is ProviderUnavailableError
    assert [type(event) for event in seen.events] == [Submitting, TaskAccepted]


async def test_a_task_that_brings_too_many_images_does_not_end_the_calls() -> None:
    """A batch that was cut for larger calls takes several; its slot is its own until the last one is over."""
    task = {"code": 10000, "data": {"task_id": 7}}
    done = {"code": 10000, "data": {"status": "done", "image_urls": ["https://x.example/1", "https://x.example/2"]}}
    seen = await against([task, done, task, done], images=2, images_per_call=1)
    call = [Submitting, TaskAccepted, ImageMade]
    assert [type(event) for event in seen.events] == [*call, *call]
    assert seen.done_after == [5]


async def against(bodies: list[Any], *, images: int | None = None, **chosen: Any) -> Outcome:
    """What so many *images* come to at a server that answers with *bodies* in turn, the last for ever."""
    told = iter(bodies)
    last = bodies[-1]

    async def send(writer: Any) -> None:
        content = json.dumps(next(told, last)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()

    async with hostile(send) as (url, _):
        client = GuardedClient(allowed_hosts=[url.removeprefix("http://")])
        settings = JimengSettings.model_validate(
            {"base_url": url, "req_key": "jimeng_t2i_v40", "photo": "store", "poll": "1ms", "task_timeout": "2s"} | chosen
        )
        provider = JimengProvider(settings, keys={"k": KEYS}, client=client, links=InlineLinks(), max_image_bytes=MAX_IMAGE_BYTES)
        request = wanted(provider, at_most=2)
        if images is not None:
            request = replace(request, images=tuple((index, index) for index in range(1, images + 1)))
        seen = await outcome(provider, request)
        await client.close()
    return seen
