"""The OpenAI image provider: its table of errors, the answers of gateways, and its calls against the sandbox."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from jobdaemon.domain.artifact import Artifact
from jobdaemon.errors import (
    AnswerLostError,
    KeyMissingError,
    KeyRefusedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    RateLimitedError,
    RetryableError,
    SettingsError,
    StoreUnavailableError,
)
from jobdaemon.http import Answer, GuardedClient
from jobdaemon.ports import Charged, GenerateRequest, ImageMade, Submitting
from jobdaemon.providers.inline import InlineImages
from jobdaemon.providers.openai_images import KINDS, OpenAIImagesProvider, images_in, kind_of_error
from jobdaemon.providers.wire import Kind
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults
from jobdaemon.settings_generate import OpenAIImagesSettings
from jobdaemon.spool import Spool
from tests.conformance.provider_promises import MAX_IMAGE_BYTES, SECRET, indexes, outcome, wanted

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
B64 = base64.b64encode(PNG).decode()
LINK = "https://files.example/1.png?signature=topsecret"
API = "openai_images"

Make = Callable[..., OpenAIImagesProvider]


def answer(body: Any, status: int = 200, **headers: str) -> Answer:
    """An answer with *body* as JSON, or as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"content-type": "application/json"} | named, content, "https://api.example/v1/images/edits")


def error_in(body: Any, status: int, **headers: str) -> Exception:
    """The error that an answer is."""
    with pytest.raises(Exception, match=API) as caught:
        images_in(answer(body, status, **headers), secret=SECRET)
    return caught.value


# ---------------------------------------------------------------- errors

ERRORS = {
    Kind.RETRY: ProviderUnavailableError,
    Kind.CAPACITY: RateLimitedError,
    Kind.PERMANENT: ProviderRefusedError,
    Kind.KEY: KeyRefusedError,
    Kind.MONEY: KeyRefusedError,
    Kind.LOST: AnswerLostError,
}


@pytest.mark.parametrize("place", ["code", "type"])
@pytest.mark.parametrize("code", list(KINDS))
def test_every_code_of_the_table_is_its_kind(code: str, place: str) -> None:
    """A code means what the table says, whatever the status, as a code or as a type, and the service's words are kept."""
    error = error_in({"error": {"message": "what it says", place: code, "param": None}}, 418)
    assert type(error) is ERRORS[KINDS[code]]
    assert "what it says" in str(error)
    assert getattr(error, "is_out_of_money", False) == (KINDS[code] is Kind.MONEY)


@pytest.mark.parametrize(
    ("status", "code", "type_", "kind"),
    [
        # A rate limit and a spent balance have the same status.
        (429, "rate_limit_exceeded", "requests", Kind.CAPACITY),
        (429, "insufficient_quota", "insufficient_quota", Kind.MONEY),
        (429, "", "new_api_error", Kind.CAPACITY),
        (403, "insufficient_user_quota", "new_api_error", Kind.MONEY),
        (400, "billing_hard_limit_reached", "invalid_request_error", Kind.MONEY),
        # Moderation, in any spelling.
        (400, "moderation_blocked", "image_generation_user_error", Kind.PERMANENT),
        (400, "content_policy_violation", "invalid_request_error", Kind.PERMANENT),
        (500, "sensitive_words_detected", "new_api_error", Kind.PERMANENT),
        (400, "", "safety_error", Kind.PERMANENT),
        # A model that is not there, and one whose channel is away.
        (404, "model_not_found", "invalid_request_error", Kind.PERMANENT),
        (503, "model_not_found", "new_api_error", Kind.RETRY),
        # By the status: numbers and unknown words say nothing.
        (400, "1234", "upstream_error", Kind.PERMANENT),
        (401, "", "", Kind.KEY),
        (413, "", "", Kind.PERMANENT),
        (409, "", "", Kind.RETRY),
        (500, "bad_response_status_code", "upstream_error", Kind.RETRY),
        (502, "", "", Kind.RETRY),
        (408, "", "", Kind.LOST),
        (504, "", "", Kind.LOST),
        (524, "", "", Kind.LOST),
        (302, "", "", Kind.RETRY),
    ],
)
def test_an_error_is_judged_by_code_then_type_then_status(status: int, code: str, type_: str, kind: Kind) -> None:
    """What the service names decides; only where it names nothing known does the status."""
    assert kind_of_error(status, code, type_) is kind


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "out of order", "type": "new_api_error", "param": "", "code": 7}},
        {"error": {"message": "out of order", "type": None, "code": None}},
        {"error": "out of order"},
        {"code": 500, "message": "out of order"},
        {"detail": "out of order"},
    ],
    ids=["gateway", "nulls", "text", "flat", "framework"],
)
def test_the_service_s_words_are_found_in_any_shape(body: Any) -> None:
    """Errors come nested, as plain text and flat; the request's id is kept for whoever asks the service."""
    error = error_in(body, 500, x_request_id="req_12")
    assert type(error) is ProviderUnavailableError
    assert str(error) == "openai_images (500, request req_12): out of order"


def test_a_page_of_a_proxy_is_judged_by_its_status() -> None:
    """HTML says nothing: 502 is an outage, 504 a lost answer, 403 a refused key; and under 200 something may have been made."""
    page = b"<html>Bad gateway</html>"
    kinds = {502: ProviderUnavailableError, 504: AnswerLostError, 403: KeyRefusedError, 200: AnswerLostError}
    assert {status: type(error_in(page, status, content_type="text/html")) for status in kinds} == kinds


def test_an_error_under_200_is_an_error() -> None:
    """Some gateways answer 200 with an error inside."""
    assert isinstance(error_in({"error": {"code": "insufficient_user_quota", "message": "empty"}}, 200), KeyRefusedError)
    assert type(error_in({"error": {"message": "?"}, "data": None}, 200)) is ProviderUnavailableError


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after_ms": "1500", "retry_after": "9"}, 1.5),
        ({"retry_after": "2.5"}, 2.5),
        ({"retry_after": "30"}, 30),
        ({"retry_after_ms": "soon", "retry_after": "3"}, 3),
        ({"retry_after": "1e300"}, 86_400),
        ({"retry_after": "Wed, 21 Oct 2020 07:28:00 GMT"}, 0),
        ({"retry_after": "inf"}, None),
        ({"retry_after": "-1"}, None),
        ({}, None),
    ],
)
def test_the_wait_asked_for_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    """Milliseconds before seconds, fractions, dates; nonsense is no wish; never more than a day."""
    error = error_in({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429, **headers)
    assert isinstance(error, RetryableError)
    assert error.retry_after == (None if seconds is None else timedelta(seconds=seconds))


def test_a_key_that_the_service_repeats_is_masked() -> None:
    """Gateways quote the key they refuse, and links with their signatures."""
    secret = "gateway.3f9a81c7"  # of no shape that is known for keys
    told = f"Incorrect API key provided: {secret}. Or was it {LINK}? Also api_key=abc123."
    with pytest.raises(KeyRefusedError) as caught:
        images_in(answer({"error": {"message": told, "code": "invalid_api_key"}}, 401), secret=secret)
    assert not [word for word in (secret, "topsecret", "abc123") if word in str(caught.value)]


# ---------------------------------------------------------------- answers

NOT_GIVEN = {"url": "", "b64_json": "", "revised_prompt": ""}


@pytest.mark.parametrize(
    ("item", "is_link"),
    [
        ({"b64_json": B64}, False),
        ({"b64_json": f"data:image/png;base64,{B64}"}, False),
        (NOT_GIVEN | {"b64_json": B64}, False),
        (NOT_GIVEN | {"url": LINK}, True),
        ({"url": LINK, "b64_json": None}, True),
        ({"url": f"data:image/png;base64,{B64}", "b64_json": ""}, False),
        ({"url": LINK, "b64_json": B64}, False),
        ({"url": LINK, "b64_json": "broken"}, True),
    ],
    ids=["base64", "data URL", "unused empty", "link", "null", "data in url", "both", "one of both broken"],
)
@pytest.mark.parametrize("frame", [{"created": 1}, {}, {"model": "m", "usage": {"prompt_tokens": 1}, "metadata": None}])
def test_images_come_in_all_the_forms_of_gateways(item: dict[str, Any], is_link: bool, frame: dict[str, Any]) -> None:
    """Inline bytes are taken before a link, which may expire; empty fields and whatever else stands there do not matter."""
    [found] = images_in(answer(frame | {"data": [item]}), secret=SECRET)
    made = found.event(3, InlineImages(Spool, most=1, max_bytes=1000, provider="openai_images"), None)
    assert made == (ImageMade(3, url=LINK) if is_link else ImageMade(3, content=PNG, media_type="image/png"))


def test_items_without_an_image_are_left_out() -> None:
    """An empty item, a number and a file path are no images; those beside them are."""
    data = [NOT_GIVEN, 7, None, {"url": "file:///etc/passwd"}, {"b64_json": B64}]
    assert len(images_in(answer({"data": data}), secret=SECRET)) == 1


@pytest.mark.parametrize("data", [[], [NOT_GIVEN], [{"revised_prompt": "no"}]])
def test_a_good_answer_without_images_is_a_refusal(data: list[Any]) -> None:
    """That is how gateways pass on a model that answered with words: asking again does not help."""
    assert type(error_in({"created": 1, "data": data}, 200)) is ProviderRefusedError


@pytest.mark.parametrize("body", [{"created": 1}, {"data": None}, {"data": {"url": LINK}}, [], 7, b"{"])
def test_a_broken_answer_is_a_lost_one(body: Any) -> None:
    """The service took the call and nobody can read what it made of it."""
    assert type(error_in(body, 200)) is AnswerLostError


# ---------------------------------------------------------------- calls


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one with small pictures."""
    async with Sandbox(Behaviour(latency_s=0.005, image_px=(64, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def make(sandbox: Sandbox) -> AsyncIterator[Make]:
    """Makes providers of that sandbox."""
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])

    def make(*, keys: Mapping[str, str] | None = None, **settings: Any) -> OpenAIImagesProvider:
        section = OpenAIImagesSettings.model_validate(
            {"base_url": f"{sandbox.url}/v1", "timeout": timedelta(seconds=5)} | settings
        )
        return OpenAIImagesProvider(section, keys=keys or {"default": SECRET}, client=client, max_image_bytes=MAX_IMAGE_BYTES)

    yield make
    await client.close()


def report(sandbox: Sandbox) -> dict[str, Any]:
    """What the sandbox counted for this API."""
    counts: dict[str, Any] = sandbox.report()["apis"].get(API, {"calls": 0, "images_bought": 0})
    return counts


@pytest.mark.parametrize("endpoint", ["edits", "generations"])
@pytest.mark.parametrize(
    ("settings", "is_link"),
    [
        ({"model": "gpt-image-2"}, False),
        ({"model": "dall-e-2", "size": "512x512"}, True),
        ({"model": "dall-e-2", "size": "512x512", "response_format": "b64_json"}, False),
        ({"model": "gemini-2.5-flash-image", "size": "1x1"}, True),
        ({"model": "gemini-2.5-flash-image", "size": None, "response_format": "b64_json", "quality": "hd"}, False),
    ],
    ids=["gpt", "dall-e link", "dall-e base64", "gateway link", "gateway base64"],
)
async def test_a_batch_is_one_call(sandbox: Sandbox, make: Make, endpoint: str, settings: dict[str, Any], is_link: bool) -> None:
    """Each family of models makes the batch in one call, by link or inline, of the photo or of the prompt alone."""
    provider = make(endpoint=endpoint, **settings)
    request = wanted(provider)
    seen = await outcome(provider, request)
    assert seen.error is None
    assert [type(event) for event in seen.events] == [Submitting] + [ImageMade] * 3
    assert [(image.index, image.url is not None) for image in seen.made] == [(index, is_link) for index in indexes(request)]
    assert (report(sandbox)["calls"], report(sandbox)["images_bought"]) == (1, 3)


async def test_a_model_that_makes_one_is_asked_for_one(sandbox: Sandbox, make: Make) -> None:
    """dall-e-3 refuses n above 1, so its calls are of one image whatever is set."""
    provider = make(model="dall-e-3", size=None, endpoint="generations", images_per_call=5)
    assert provider.max_images_per_call == 1
    assert (await outcome(provider, wanted(provider))).error is None
    assert make(model="gpt-image-2", images_per_call=4).max_images_per_call == 4


async def test_fewer_images_than_asked_are_followed_by_a_call_for_the_rest(sandbox: Sandbox, make: Make) -> None:
    """Many gateways make one image whatever is asked: the missing half is asked for, each time noted as a submit."""
    sandbox.behaviour.faults = parse_faults("partial=1")
    provider = make(images_per_call=5)
    request = wanted(provider, at_most=5)
    seen = await outcome(provider, request)
    assert seen.error is None
    # 5 asked, 2 made; 3 asked, 1 made; 2 asked, 1 made; 1 asked, 1 made.
    assert ["S" if isinstance(event, Submitting) else "I" for event in seen.events] == list("SIISISISI")
    assert seen.done_after == [8], "its slot was free before its last call was over"
    assert seen.answered == indexes(request)
    assert report(sandbox)["images_bought"] == 5


async def test_what_was_made_before_an_error_is_kept(sandbox: Sandbox, make: Make) -> None:
    """When the call for the rest fails, what came before is out already."""
    sandbox.behaviour.faults = parse_faults("partial=1")
    provider = make()
    stream = provider.generate(wanted(provider))
    first = [await anext(stream) for _ in range(3)]
    sandbox.behaviour.faults = parse_faults("429=1")
    assert isinstance(await anext(stream), Submitting)
    with pytest.raises(RateLimitedError):
        await anext(stream)
    assert [type(event) for event in first] == [Submitting, Charged, ImageMade]


async def test_images_that_find_no_room_here_are_charged_for(
    sandbox: Sandbox, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk on which images lie on their way fails, what the provider sent is paid for, and says so."""

    def full(_: Spool, block: bytes) -> None:
        raise StoreUnavailableError(f"no room for {len(block)} bytes")

    sandbox.behaviour.image_px, sandbox.behaviour.image_bytes = (512, 512), 300_000
    monkeypatch.setattr(Spool, "write", full)
    provider = make(images_per_call=2)
    seen = await outcome(provider, wanted(provider, at_most=2))
    assert isinstance(seen.error, StoreUnavailableError)
    assert report(sandbox)["images_bought"] == 2
    assert seen.charged == 2


async def test_an_unsafe_prompt_is_refused_for_nothing(sandbox: Sandbox, make: Make) -> None:
    """A prompt that moderation blocks is permanent and costs nothing."""
    sandbox.behaviour.faults = parse_faults("unsafe=1")
    provider = make()
    seen = await outcome(provider, wanted(provider))
    assert isinstance(seen.error, ProviderRefusedError)
    assert "safety system" in str(seen.error)
    assert report(sandbox)["images_bought"] == 0


@pytest.mark.parametrize("fault", ["reset", "timeout"])
async def test_a_call_without_an_answer_is_lost_and_was_paid(sandbox: Sandbox, make: Make, fault: str) -> None:
    """A connection that breaks and a call that outlasts the timeout leave a lost submit, which nobody can be asked about."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    provider = make(timeout=timedelta(seconds=2), on_unknown_submit="fail")
    request = wanted(provider)
    seen = await outcome(provider, request)
    assert isinstance(seen.error, AnswerLostError)
    assert [type(event) for event in seen.events] == [Submitting]
    assert report(sandbox)["images_bought"] == 3
    assert provider.on_unknown_submit == "fail"


async def test_a_full_service_says_how_long_to_wait(sandbox: Sandbox, make: Make) -> None:
    """A rate limit is a capacity signal with the service's own wait."""
    sandbox.behaviour.concurrency = 0
    provider = make()
    seen = await outcome(provider, wanted(provider))
    assert isinstance(seen.error, RateLimitedError)
    assert seen.error.retry_after == timedelta(seconds=1)


async def test_the_key_follows_the_request(sandbox: Sandbox, make: Make) -> None:
    """The claim's alias picks the key; without one the first is used; an alias without a secret is another daemon's."""
    provider = make(keys={"first": "sk-conformance-first", "other": "sk-conformance-other"})
    for alias in (None, "other", "first"):
        await outcome(provider, replace(wanted(provider), key=alias))
    calls = {key: counts["calls"] for key, counts in report(sandbox)["keys"].items()}
    assert calls == {"…irst": 2, "…ther": 1}
    seen = await outcome(provider, replace(wanted(provider), key="third"))
    assert isinstance(seen.error, KeyMissingError)
    assert seen.events == []


async def test_only_openai_s_own_links_have_a_known_end(sandbox: Sandbox, make: Make) -> None:
    """Links of openai.com are good for 60 minutes from before the call; how long a gateway's are nobody knows."""
    provider = make(model="dall-e-2", size="512x512")
    request = wanted(provider, at_most=1)
    [image] = (await outcome(provider, request)).made
    assert image.url_expires_at is None
    assert make(base_url="https://openai.com.example/v1")._link_lifetime is None
    provider._link_lifetime = make(base_url="https://eu.api.openai.com/v1")._link_lifetime
    began = datetime.now(UTC)
    [image] = (await outcome(provider, request)).made
    assert image.url_expires_at is not None
    assert began + timedelta(minutes=60) <= image.url_expires_at <= datetime.now(UTC) + timedelta(minutes=60)


async def test_a_broken_image_costs_its_siblings_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One item that is no image is left for a later attempt, with its reason; the others are out."""
    provider = make()

    async def submit(_request: GenerateRequest, _photo: bytes | None, _count: int, _key: str, _inline: InlineImages) -> Answer:
        return answer({"data": [{"b64_json": B64}, {"b64_json": "aGVsbG8="}, {"b64_json": B64}, {"b64_json": B64}]})

    monkeypatch.setattr(provider, "_submit", submit)
    seen = await outcome(provider, wanted(provider))
    assert seen.answered == [7, 9]
    assert type(seen.error) is ProviderUnavailableError


@pytest.mark.parametrize("keys", [{}, {"default": ""}, {"default": "sk-abc\nX-Evil: 1"}, {"default": "schlüssel"}])
async def test_a_missing_or_impossible_key_is_a_setting(make: Make, keys: dict[str, str]) -> None:
    """A key that is not there, or that no header can carry, is said at the start and not shown."""
    client = GuardedClient()
    with pytest.raises(SettingsError) as caught:
        OpenAIImagesProvider(OpenAIImagesSettings(), keys=keys, client=client, max_image_bytes=1)
    assert "Evil" not in str(caught.value)
    await client.close()


# ---------------------------------------------------------------- x-should-retry, chats, squares


@pytest.mark.parametrize(
    ("status", "code", "word", "kind"),
    [
        (400, "", "true", Kind.RETRY),
        (409, "", "false", Kind.PERMANENT),
        (500, "", "false", Kind.PERMANENT),
        (503, "", " False ", Kind.PERMANENT),
        (429, "", "false", Kind.RETRY),
        (429, "", "true", Kind.CAPACITY),
        (500, "", "maybe", Kind.RETRY),
        # What the code says is known better; a lost answer stays lost, and a refused key rests.
        (400, "moderation_blocked", "true", Kind.PERMANENT),
        (429, "insufficient_quota", "true", Kind.MONEY),
        (504, "", "false", Kind.LOST),
        (401, "", "true", Kind.KEY),
    ],
)
def test_the_service_s_word_on_retrying_counts_where_only_the_status_speaks(
    status: int, code: str, word: str, kind: Kind
) -> None:
    """x-should-retry turns never and later round; a limit that it calls hopeless costs attempts."""
    assert type(error_in({"error": {"message": "m", "code": code}}, status, x_should_retry=word)) is ERRORS[kind]


PNG_LINK = f"data:image/png;base64,{B64}"


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"content": "here", "images": [{"type": "image_url", "image_url": {"url": PNG_LINK}}]}, [PNG_LINK]),
        ({"content": None, "images": [{"image_url": LINK}]}, [LINK]),
        ({"content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": LINK}}]}, [LINK]),
        ({"content": [{"inline_data": {"mime_type": "image/png", "data": B64}}]}, [PNG_LINK]),
        ({"content": [{"inlineData": {"mimeType": "image/png", "data": B64}}]}, [PNG_LINK]),
        ({"content": f"Done! ![a cat]({LINK}) and ![again]({LINK})"}, [LINK]),
        ({"content": f"![image]({PNG_LINK})"}, [PNG_LINK]),
        ({"content": f" {PNG_LINK}\n"}, [PNG_LINK]),
        (
            {"content": "See https://img.example/f/1.webp?x=1, and https://img.example/about."},
            ["https://img.example/f/1.webp?x=1"],
        ),
        ({"content": "![a](http://img.example/1.png)"}, ["http://img.example/1.png"]),
        # beside the text and in it: the same image
        ({"content": f"![a]({LINK})", "images": [{"image_url": {"url": PNG_LINK}}]}, [PNG_LINK]),
    ],
)
def test_images_of_a_chat(message: Any, found: list[str]) -> None:
    """Every form in use is understood, each image counts once, and of two forms in one answer the first is taken."""
    images = images_in(answer({"choices": [{"message": message}]}), secret=SECRET)
    assert [image.url or image.inline for image in images] == found


@pytest.mark.parametrize(
    "body",
    [
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"message": "x"}]},
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": "I cannot draw real people."}}]},
        {"choices": [{"message": {"content": [1, {"text": 2}, {"image_url": {"url": 3}}, {"inline_data": {"data": ""}}]}}]},
        {"choices": [{"message": {"content": "![x](ftp://x/1.png) ![y](javascript:1) data:image/png;base64,"}}]},
    ],
)
def test_a_chat_without_an_image_is_a_refusal(body: Any) -> None:
    """It is quoted and not asked again, whatever the answer looks like."""
    assert type(error_in(body, 200)) is ProviderRefusedError


@pytest.mark.parametrize(("model", "is_link"), [("gemini-2.5-flash-image", False), ("gpt-4o-image", True)])
@pytest.mark.parametrize("endpoint", ["edits", "generations"])
async def test_an_image_by_chat(sandbox: Sandbox, make: Make, model: str, is_link: bool, endpoint: str) -> None:
    """One image is one call, inline or by a link, of the photo or of the prompt alone."""
    provider = make(api="chat", model=model, endpoint=endpoint)
    assert provider.max_images_per_call == 1
    request = wanted(provider)
    seen = await outcome(provider, request)
    assert seen.error is None
    assert [(image.index, image.url is not None) for image in seen.made] == [(7, is_link)]
    assert (report(sandbox)["calls"], report(sandbox)["images_bought"]) == (1, 1)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (350, 350), (3000, 2000)])
async def test_dall_e_2_gets_a_square_png(make: Make, size: tuple[int, int]) -> None:
    """The whole photo lies in the middle, what it does not cover is transparent, and the file is below 4 MB."""
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    photo = Artifact("work/1/beautified-0.jpg", hashlib.sha256(out.getvalue()).hexdigest(), out.tell(), "image/jpeg")

    async def load() -> bytes:
        return out.getvalue()

    provider = make(model="dall-e-2", size="512x512")
    request = GenerateRequest(1, ((7, 0),), "p", photo, load)
    content, media_type = await provider._photo(request)
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.format, media_type) == ("PNG", "image/png")
        assert picture.width == picture.height <= 1024
        corner = picture.convert("RGBA").getpixel((0, 0))
    assert isinstance(corner, tuple)
    assert (corner[3] == 0) == (size[0] != size[1])
    assert len(content) < 4_000_000
    assert (await outcome(provider, request)).error is None
