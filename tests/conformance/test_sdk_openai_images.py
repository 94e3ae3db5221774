"""OpenAI's own Python SDK, unchanged, against the sandbox: what it takes for OpenAI is good enough to test against."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from datetime import timedelta

import openai
import pytest
import pytest_asyncio
from PIL import Image

from jobdaemon.http import GuardedClient
from jobdaemon.sandbox import Behaviour, Sandbox, parse_faults

API = "openai_images"
PROMPT = "a portrait by a window"


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A quick one with small pictures."""
    async with Sandbox(Behaviour(latency_s=0.005, image_px=(48, 64))) as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def sdk(sandbox: Sandbox) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK, told where to go and nothing else; each test says whether it may retry."""
    async with openai.AsyncOpenAI(api_key="sk-sdk-test", base_url=f"{sandbox.url}/v1", max_retries=0) as sdk:
        yield sdk


def photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(out, "PNG")
    return out.getvalue()


def kind_of(content: bytes) -> tuple[str | None, tuple[int, int]]:
    """Format and sides of a whole picture."""
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        return picture.format, picture.size


async def test_gpt_models_give_base64_and_usage(sdk: openai.AsyncOpenAI, sandbox: Sandbox) -> None:
    """A generation of several images comes inline, in the format that was asked for, with the SDK's every field in place."""
    for output_format in ("png", "jpeg", "webp"):
        answer = await sdk.images.generate(
            model="gpt-image-2", prompt=PROMPT, n=2, size="1024x1536", quality="high", output_format=output_format
        )
        assert answer.data is not None
        assert [kind_of(base64.b64decode(image.b64_json or "")) for image in answer.data] == [
            (output_format.upper(), (48, 64))
        ] * 2
        assert answer.created > 1_700_000_000
        assert (answer.size, answer.quality, answer.output_format) == ("1024x1536", "high", output_format)
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.image_tokens > 0
    assert sandbox.report()["apis"][API]["images_bought"] == 6


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("gpt-image-2", "1024x1536", (1024, 1536)),
        ("gpt-image-2", "auto", (512, 768)),
        ("some-gateway", "640x480", (640, 480)),
        ("some-gateway", "2x3", (512, 768)),
        ("some-gateway", "99999x99999", (512, 768)),
    ],
)
async def test_images_have_the_size_that_was_asked_for(
    sdk: openai.AsyncOpenAI, sandbox: Sandbox, model: str, size: str, expected: tuple[int, int]
) -> None:
    """In pixels where it is told so; a ratio or "auto" leaves it to the sandbox, which draws nothing enormous."""
    sandbox.behaviour.image_px = None
    as_text = {} if model.startswith("gpt") else {"response_format": "b64_json"}
    answer = await sdk.images.generate(model=model, prompt=PROMPT, size=size, **as_text)  # type: ignore[call-overload]
    assert kind_of(base64.b64decode(answer.data[0].b64_json))[1] == expected


async def test_older_models_give_links(sdk: openai.AsyncOpenAI, sandbox: Sandbox) -> None:
    """Models with response_format give a link that can be fetched, or base64."""
    linked = await sdk.images.generate(model="dall-e-3", prompt=PROMPT, size="1024x1792", response_format="url")
    assert linked.data is not None
    assert (linked.data[0].b64_json, linked.data[0].revised_prompt) == (None, PROMPT)
    client = GuardedClient(allowed_hosts=[sandbox.url.removeprefix("http://")])
    file = await client.download(linked.data[0].url or "", max_bytes=100_000, timeout=timedelta(seconds=5))
    assert kind_of(file.content)[0] == "PNG"
    await client.close()
    inline = await sdk.images.generate(model="dall-e-2", prompt=PROMPT, n=2, response_format="b64_json")
    assert inline.data is not None
    assert [image.url for image in inline.data] == [None, None]


async def test_gateways_fill_every_field(sdk: openai.AsyncOpenAI) -> None:
    """A model of another name is a gateway's: the SDK reads an answer without "created" and with empty fields."""
    answer = await sdk.images.generate(model="gemini-2.5-flash-image", prompt=PROMPT)
    assert answer.data is not None
    assert (answer.data[0].b64_json, answer.data[0].revised_prompt) == ("", "")
    assert (answer.data[0].url or "").startswith("http")


async def test_edits_take_photos_in_both_spellings(sdk: openai.AsyncOpenAI) -> None:
    """One photo goes as "image", several as "image[]", with a mask or without."""
    for image in (photo(), ("portrait.png", photo(), "image/png"), [photo(), photo()]):
        answer = await sdk.images.edit(model="gpt-image-2", image=image, prompt=PROMPT, n=2, mask=photo())
        assert answer.data is not None
        assert len(answer.data) == 2


async def test_the_synchronous_client_works_as_well(sandbox: Sandbox) -> None:
    """The SDK's other face."""
    import asyncio

    def generate() -> int:
        with openai.OpenAI(api_key="sk-sdk-test", base_url=f"{sandbox.url}/v1") as sdk:
            return len(sdk.images.generate(model="gpt-image-2", prompt=PROMPT, n=3).data or [])

    assert await asyncio.to_thread(generate) == 3


async def test_models_can_be_listed(sdk: openai.AsyncOpenAI) -> None:
    """GET /v1/models is what people try a key with."""
    assert "gpt-image-2" in [model.id async for model in sdk.models.list()]


async def test_wrong_requests_are_told_apart(sdk: openai.AsyncOpenAI, sandbox: Sandbox) -> None:
    """Each wrong field is a BadRequestError that names it; nothing is bought."""
    images = sdk.images
    wrong = [
        (images.generate(model="gpt-image-2", prompt=""), "prompt", "missing_required_parameter"),
        (images.generate(model="gpt-image-2", prompt="x" * 32_001), "prompt", "string_above_max_length"),
        (images.generate(model="gpt-image-2", prompt=PROMPT, n=11), "n", "integer_above_max_value"),
        (images.generate(model="dall-e-3", prompt=PROMPT, n=2), "n", "integer_above_max_value"),
        (images.generate(model="gpt-image-2", prompt=PROMPT, size="1000x1000"), "size", "invalid_value"),
        (images.generate(model="gpt-image-1-mini", prompt=PROMPT, size="1024x1792"), "size", "invalid_value"),
        (images.generate(model="gpt-image-2", prompt=PROMPT, response_format="url"), "response_format", "unknown_parameter"),
        (images.edit(model="gpt-image-2", prompt=PROMPT, image=b"no picture"), "image", "invalid_image_file"),
        (images.edit(model="gpt-image-2", prompt=PROMPT, image=[photo()] * 17), "image", "array_above_max_length"),
    ]
    for call, param, code in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            await call
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.request_id
    assert sandbox.report()["apis"][API]["images_bought"] == 0


@pytest.mark.parametrize(
    ("fault", "error", "code"),
    [
        ("429", openai.RateLimitError, "rate_limit_exceeded"),
        ("500", openai.InternalServerError, None),
        ("html", openai.InternalServerError, None),
        ("unsafe", openai.BadRequestError, "moderation_blocked"),
        ("reset", openai.APIConnectionError, None),
        ("timeout", openai.APITimeoutError, None),
    ],
)
async def test_faults_are_the_sdk_s_own_errors(
    sdk: openai.AsyncOpenAI, sandbox: Sandbox, fault: str, error: type[openai.APIError], code: str | None
) -> None:
    """Each fault arrives as the class that the SDK has for it."""
    sandbox.behaviour.faults = parse_faults(f"{fault}=1")
    with pytest.raises(error) as caught:
        await sdk.with_options(timeout=0.3 if fault == "timeout" else 10).images.generate(model="gpt-image-2", prompt=PROMPT)
    assert caught.value.code == code
    if isinstance(caught.value, openai.RateLimitError):
        assert caught.value.response.headers["retry-after-ms"] == "1000"


async def test_the_sdk_gets_over_faults(sdk: openai.AsyncOpenAI, sandbox: Sandbox) -> None:
    """Its own retries work: each call is another throw of the dice, the same for the same seed."""
    sandbox.behaviour.faults = parse_faults("500=0.5", seed=3)
    patient = sdk.with_options(max_retries=6)
    answers = [await patient.images.generate(model="gpt-image-2", prompt=f"{PROMPT} {number}") for number in range(3)]
    assert all(answer.data for answer in answers)
    assert sandbox.report()["apis"][API]["faults"]["500"] >= 1


async def test_a_call_without_a_key_is_unauthorised(sandbox: Sandbox) -> None:
    """The SDK's error for a key that is not given as this API wants it."""
    async with openai.AsyncOpenAI(api_key="x", base_url=f"{sandbox.url}/v1", max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError):
            await sdk.images.generate(model="gpt-image-2", prompt=PROMPT, extra_headers={"Authorization": "Basic eA=="})
    assert sandbox.report()["apis"][API]["unauthorised"] == 1
