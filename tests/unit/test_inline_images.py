"""Images taken out of a JSON answer as it arrives."""

from __future__ import annotations

import base64
import json
import random

import pytest

from jobdaemon.errors import AnswerLostError, ProviderUnavailableError
from jobdaemon.providers.inline import InlineImages
from jobdaemon.spool import Spool

MAX_BYTES = 400_000
PNG = b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(200_000)
TEXT = base64.b64encode(PNG).decode()


def taken(answer: str | bytes, *, step: int = 50_000, most: int = 2) -> InlineImages:
    """*answer*, arrived in blocks of *step* bytes."""
    images = InlineImages(Spool, most=most, max_bytes=MAX_BYTES, provider="acme")
    content = answer.encode() if isinstance(answer, str) else answer
    for start in range(0, len(content), step):
        images.write(content[start : start + step])
    return images


def content_of(images: InlineImages, text: str) -> tuple[bytes, str]:
    content, media_type = images.decoded(text)
    return (content if isinstance(content, bytes) else b"".join(content.blocks())), media_type


@pytest.mark.parametrize("step", [1_000, 65_537, 1_000_000])
@pytest.mark.parametrize("before", ["", "data:image/png;base64,"])
def test_long_images_leave_the_answer(step: int, before: str) -> None:
    """An image of any form comes out as it was, the rest of the answer stays as it was, and is short."""
    body = {
        "created": 1,
        "data": [{"b64_json": before + TEXT}, {"b64_json": "kept"}, {"url": before + TEXT}],
        "say": 'a "b" \\ ü',
    }
    images = taken(json.dumps(body), step=step)
    assert len(images.rest()) < 500
    rest = json.loads(images.rest())
    for text in (rest["data"][0].pop("b64_json"), rest["data"][2].pop("url")):
        assert text.startswith("data:")
        assert content_of(images, text) == (PNG, "image/png")
    assert rest == {"created": 1, "data": [{}, {"b64_json": "kept"}, {}], "say": 'a "b" \\ ü'}


def test_every_cut_gives_the_same() -> None:
    """However the network cuts an answer, in the middle of escapes too, it is read alike."""
    text = json.dumps({"a": TEXT[:70_000], "b": 'x\\"y\\\\'}).replace("/", "\\/").replace("+", "\\u002B")
    whole = taken(text, step=len(text))
    [expected, *_] = content_of(whole, json.loads(whole.rest())["a"])
    assert expected == PNG[:52_500]
    begin = text.index('"b"') - 40
    for step in range(begin, begin + 60):
        images = taken(text, step=step)
        rest = json.loads(images.rest())
        assert rest["b"] == 'x\\"y\\\\'
        assert content_of(images, rest["a"])[0] == expected


@pytest.mark.parametrize(("written", "step"), [("\\/", 1), ("\\u002f", 1), ("\\u002F", 3), ("/", 7)])
def test_escapes_and_line_breaks_are_read(written: str, step: int) -> None:
    """Gateways escape the slash, or the plus, or break lines within base64."""
    lines = "\\r\\n".join(TEXT[start : start + 76] for start in range(0, 66_044, 76))
    text = lines.replace("/", written).replace("+", "\\u002b")
    images = taken('{"a":"' + text + '"}', step=step)
    assert content_of(images, json.loads(images.rest())["a"])[0] == PNG[: 66_044 // 4 * 3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (base64.b64encode(bytes(MAX_BYTES + 1)).decode(), "more than 400000 bytes"),
        (TEXT[:-5], "no base64"),
        (TEXT[: len(TEXT) - len(TEXT) % 4 - 3] + "=", "no base64"),
        ("word " * 20_000, "neither PNG"),
        (base64.b64encode(bytes(90_000)).decode(), "neither PNG"),
    ],
    ids=["too large", "cut", "one digit left", "words", "no image"],
)
def test_what_is_no_image_says_so(text: str, reason: str) -> None:
    """An image that is too large, cut or none is refused when it is asked for; its siblings are whole."""
    images = taken(json.dumps([text, TEXT]))
    broken, whole = json.loads(images.rest())
    with pytest.raises(ProviderUnavailableError, match=reason):
        images.decoded(broken)
    assert content_of(images, whole)[0] == PNG


def test_only_so_many_are_kept() -> None:
    """More images than were asked for take no room, and are refused by themselves."""
    images = taken(json.dumps([TEXT] * 20), most=2)
    texts = json.loads(images.rest())
    assert [content_of(images, text)[0] for text in texts[:2]] == [PNG, PNG]
    for text in texts[2:]:
        with pytest.raises(ProviderUnavailableError, match="more images"):
            images.decoded(text)


def test_an_answer_that_is_all_frame_is_given_up() -> None:
    """Many short strings, or a page without any, are not let grow."""
    for endless in (json.dumps(["x" * 1000] * 5_000), "x" * 5_000_000):
        with pytest.raises(AnswerLostError):
            taken(endless)


@pytest.mark.parametrize("page", ['<html>it isn"t</html>', "", '{"a": "cut in the mid', '"\\', '{"message": "ünïcode \\u00fc"}'])
def test_what_is_short_or_no_json_passes_through(page: str) -> None:
    """Whatever holds no image is what it was, to the byte."""
    for step in (1, 1000):
        assert taken(page, step=step).rest() == page.encode()


def test_nobody_can_name_what_was_not_sent() -> None:
    """A string that looks like what stands for an image is only a string."""
    images = taken(json.dumps([TEXT, "data:0/0"]))
    with pytest.raises(ProviderUnavailableError):
        images.decoded(json.loads(images.rest())[1])
