"""The local provider: different, deterministic, honest pictures, whatever the photo and the prompt."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image

from jobdaemon.domain.artifact import Artifact, source_key
from jobdaemon.errors import ArtifactMissingError, DeviceMemoryError, SettingsError, UnsupportedImageError
from jobdaemon.photo import PhotoLimits
from jobdaemon.ports import GenerateRequest, ImageMade, Provider
from jobdaemon.providers.local import LocalProvider
from jobdaemon.providers.local import provider as provider_module
from jobdaemon.providers.local.crops import CROPS, place_crop
from jobdaemon.providers.local.recipe import check_table, recipe_for, wish_of
from jobdaemon.providers.local.render import render
from jobdaemon.providers.local.subject import Subject, fit_within, prepare_subject
from tests.effort import IS_THOROUGH
from tests.fakes import content_of

ASTRONAUT = Path(__file__).parent.parent / "data" / "astronaut.png"
PRO_IMAGES = 70
#: Mean CIELAB distance of 24 x 24 thumbnails. Two takes of one look measure below 2, the closest pair of the plan 11.7.
TOLD_APART = 8.0
TOLD_APART_WHEN_STEERED = 2.5

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return prepare_subject(np.array(Image.open(ASTRONAUT).convert("RGB")))


@pytest.fixture(scope="module")
def small() -> Pixels:
    """The same photo small enough that preparing it takes no time."""
    return np.array(Image.open(ASTRONAUT).convert("RGB").resize((200, 200), Image.Resampling.BOX))


@pytest.fixture(scope="module")
def photo(small: Pixels) -> bytes:
    return png(small)


@pytest.fixture
async def provider() -> AsyncIterator[LocalProvider]:
    provider = LocalProvider(threads=2)
    yield provider
    await provider.close()


class Photos:
    """Gives out one photo and counts how often."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.loads = 0

    async def load(self) -> bytes:
        self.loads += 1
        await asyncio.sleep(0)
        return self.content


def request_for(content: bytes, *indexes: int, prompt: str = "a portrait", photos: Photos | None = None) -> GenerateRequest:
    digest = hashlib.sha256(content).hexdigest()
    return GenerateRequest(
        order_id=1,
        images=tuple((index, ordinal) for ordinal, index in enumerate(indexes)),
        prompt=prompt,
        photo=Artifact(source_key(digest), digest, len(content), "image/png"),
        load_photo=(photos or Photos(content)).load,
    )


async def made(provider: Provider, request: GenerateRequest) -> list[ImageMade]:
    return [event async for event in provider.generate(request) if isinstance(event, ImageMade)]


def png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def closest_pair(pictures: list[Pixels]) -> float:
    """The smallest distance between any two pictures, as a person sees thumbnails: mean CIELAB difference."""
    thumbnails = []
    for picture in pictures:
        small = cv2.resize(picture, (24, 24), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        thumbnails.append(cv2.cvtColor(small, cv2.COLOR_RGB2LAB).reshape(-1, 3))
    seen = np.stack(thumbnails)
    return min(
        float(np.linalg.norm(seen[place + 1 :] - seen[place], axis=2).mean(axis=1).min()) for place in range(len(pictures) - 1)
    )


def test_every_two_images_of_a_pro_order_can_be_told_apart(subject: Subject) -> None:
    """Seventy images of one photo are seventy that a person tells apart."""
    assert closest_pair([render(subject, recipe_for(index, "")) for index in range(PRO_IMAGES)]) >= TOLD_APART


def test_the_measure_of_distance_finds_a_near_duplicate(subject: Subject) -> None:
    """A look taken again a little brighter and a few pixels off would fail the test above."""
    picture = render(subject, recipe_for(3, ""))
    again = np.clip(picture[4:, 4:].astype(np.int16) + 4, 0, 255).astype(np.uint8)
    assert closest_pair([picture, render(subject, recipe_for(4, "")), again]) < 0.5 * TOLD_APART


@pytest.mark.parametrize("prompt", ["black and white", "blue background", "watercolour"])
def test_steered_images_still_differ(small: Pixels, prompt: str) -> None:
    """An order whose only prompt names one look still gets images that differ from each other."""
    subject = prepare_subject(small)
    images = PRO_IMAGES if IS_THOROUGH else PRO_IMAGES // 2
    pictures = [render(subject, recipe_for(index, prompt)) for index in range(images)]
    assert closest_pair(pictures) >= TOLD_APART_WHEN_STEERED


def test_the_planned_table_names_only_what_exists() -> None:
    """Every name in the table and the word list is a background, grade or finish."""
    assert check_table() == []


@pytest.mark.parametrize(
    ("prompt", "part", "words"),
    [
        ("A black-and-white portrait", "grade", ("mono", "black and white")),
        ("B&W please", "grade", ("mono", "black and white")),
        ("黑白肖像", "grade", ("mono", "black and white")),
        ("shot on film, candid", "finish", ("film", "leak", "negative")),
        ("a watercolor", "finish", ("watercolour",)),
        ("oil painting of a queen", "finish", ("oil",)),
        ("a pencil sketch", "finish", ("charcoal",)),
        ("portrait on a blue background", "background", ("blue", "navy", "sky", "ocean", "teal", "storm")),
        ("背景:红色", "background", ("red", "burgundy")),
        ("red backdrop", "background", ("red", "burgundy")),
    ],
)
def test_words_of_the_prompt_choose_the_look(prompt: str, part: str, words: tuple[str, ...]) -> None:
    """A prompt that names a look or a background colour gets it in every image."""
    for index in range(PRO_IMAGES):
        assert any(word in getattr(recipe_for(index, prompt), part) for word in words)


@pytest.mark.parametrize(
    "prompt", ["a blue dress on the beach", "filming", "covered in ivy", "", "\ud800\x00", "professional portrait"]
)
def test_other_words_leave_the_plan_alone(prompt: str) -> None:
    """A colour that is not the background's, and words that only contain a look's name, steer nothing."""
    assert wish_of(prompt) == wish_of("")


@given(prompt=st.text(max_size=200), index=st.integers(0, 5_000))
def test_any_prompt_and_index_have_a_look(prompt: str, index: int) -> None:
    """No text and no index is without a recipe, and the same ones always give the same."""
    assert recipe_for(index, prompt) == recipe_for(index, prompt)


def test_a_hostile_prompt_is_read_quickly() -> None:
    """A megabyte of words made to confuse the patterns costs well under a second of computing."""
    started = time.process_time()
    recipe_for(0, "blue blue navy background of is " * 40_000)
    assert time.process_time() - started < 2  # patterns that can be confused would take hours


def test_recipes_do_not_come_back_within_seven_hundred_images() -> None:
    """Orders larger than any plan get new combinations too."""
    seen = {(r.crop, r.background, r.grade, r.finish) for r in (recipe_for(index, "") for index in range(700))}
    assert len(seen) == 700


head_shares = st.tuples(st.floats(0, 0.7), st.floats(0, 0.7), st.floats(0.02, 0.3), st.floats(0.02, 0.3))


@given(width=st.integers(1, 6000), height=st.integers(1, 6000), head=head_shares, crop=st.sampled_from(CROPS))
def test_a_crop_stays_within_the_photo_and_keeps_the_face(
    width: int, height: int, head: tuple[float, float, float, float], crop: Any
) -> None:
    """The window never leaves the photo, never cuts the face, and the picture is never larger than the window."""
    window = place_crop(crop, width=width, height=height, head=head)
    assert window.x >= 0
    assert window.y >= 0
    assert window.x + window.width <= width
    assert window.y + window.height <= height
    assert 1 <= window.out_width <= window.width
    assert 1 <= window.out_height <= window.height
    assert window.x <= head[0] * width + 1
    assert window.y <= head[1] * height + 1
    assert window.x + window.width >= (head[0] + head[2]) * width - 1.5
    assert window.y + window.height >= (head[1] + head[3]) * height - 1.5


@given(crop=st.sampled_from(CROPS), head=head_shares)
def test_pictures_of_a_large_photo_have_2048_pixels(crop: Any, head: tuple[float, float, float, float]) -> None:
    """From 12 megapixels every framing has a long side of 2048 pixels."""
    for width, height in ((4000, 3000), (3000, 4000), (3464, 3464)):
        window = place_crop(crop, width=width, height=height, head=head)
        assert max(window.out_width, window.out_height) in {2047, 2048}


def test_large_photos_are_held_small() -> None:
    """A photo of any size is kept at 16 megapixels at most."""
    assert fit_within(np.zeros((100, 200, 3), np.uint8), max_pixels=5_000).shape == (50, 100, 3)


def test_a_person_is_cut_out_with_the_face_inside(subject: Subject) -> None:
    """The matte holds the face and not the upper corners."""
    assert subject.matte is not None
    height, width = subject.matte.shape
    x, y, w, h = subject.head
    assert subject.matte[int((y + h / 2) * height), int((x + w / 2) * width)] == 255
    assert subject.matte[: height // 10, : width // 10].max() == 0
    assert subject.matte[: height // 10, -width // 10 :].max() == 0


def test_preparing_twice_gives_the_same_subject(subject: Subject) -> None:
    """GrabCut's random start is fixed, whatever the thread drew before."""
    cv2.setRNGSeed(99)
    again = prepare_subject(np.array(Image.open(ASTRONAUT).convert("RGB")))
    assert subject.matte is not None
    assert again.matte is not None
    assert np.array_equal(subject.matte, again.matte)
    assert np.array_equal(subject.plate, again.plate)


def test_the_face_finder_given_is_the_one_asked() -> None:
    """A face found by the caller's detector decides where the head is, in fractions of the photo."""
    pixels = np.zeros((300, 400, 3), np.uint8)
    found = prepare_subject(
        pixels, lambda photo: [(0.5 * photo.shape[1], 0.25 * photo.shape[0], 40.0, 60.0), (1.0, 1.0, 4.0, 4.0)]
    )
    assert found.head == pytest.approx((0.5, 0.25, 0.1, 0.2))


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        noise(64, 64),
        noise(64, 900),
        noise(900, 64),
        np.zeros((200, 150, 3), np.uint8),
        np.full((150, 200, 3), 255, np.uint8),
    ],
    ids=["tiny", "panorama", "strip", "black", "white"],
)
def test_no_photo_breaks_any_look(pixels: Pixels) -> None:
    """Photos without a person, of any shape, get every look of the plan without an error."""
    subject = prepare_subject(pixels, lambda _: [])
    for index in range(0, PRO_IMAGES, 1 if IS_THOROUGH else 3):
        picture = render(subject, recipe_for(index, ""))
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert min(picture.shape[:2]) >= 1


@pytest.mark.parametrize(
    "face", [(0.0, 0.0, 96.0, 96.0), (-50.0, -50.0, 9000.0, 9000.0), (5.0, 5.0, 0.0, -3.0), (95.0, 95.0, 9.0, 9.0)]
)
def test_absurd_faces_break_nothing(face: tuple[float, float, float, float]) -> None:
    """A face as large as the photo, larger, empty or at the rim still leads to pictures."""
    subject = prepare_subject(noise(96, 96), lambda _: [face])
    for index in range(len(CROPS)):
        assert min(render(subject, recipe_for(index, "")).shape[:2]) >= 1


async def test_images_come_in_order_as_jpeg_that_says_what_it_is(provider: LocalProvider, photo: bytes) -> None:
    """Each image of the call is a JPEG whose EXIF description names the style and denies generative AI."""
    images = await made(provider, request_for(photo, 0, 5, 9, 12, 69))
    assert [image.index for image in images] == [0, 5, 9, 12, 69]
    for image in images:
        assert image.media_type == "image/jpeg"
        with Image.open(io.BytesIO(content_of(image))) as picture:
            picture.load()
            description = picture.getexif()[ExifTags.Base.ImageDescription]
        assert description.startswith("jobdaemon local style: ")
        assert description.endswith("; not generative AI")


async def test_the_same_photo_prompt_and_index_give_the_same_bytes(photo: bytes) -> None:
    """A retry, on another day, with other neighbours and another number of threads, makes the very same file."""
    contents = []
    for threads, indexes in ((1, (7, 30, 41)), (2, (41, 30, 7))):
        provider = LocalProvider(threads=threads)
        contents.append({image.index: image.content for image in await made(provider, request_for(photo, *indexes))})
        await provider.close()
    assert contents[0] == contents[1]


async def test_calls_for_one_photo_decode_it_once(provider: LocalProvider, photo: bytes) -> None:
    """Calls of one order that run together, and those that follow, share one decoded photo."""
    photos = Photos(photo)
    calls = [made(provider, request_for(photo, index, photos=photos)) for index in range(4)]
    assert sum(len(images) for images in await asyncio.gather(*calls)) == 4
    await made(provider, request_for(photo, 4, photos=photos))
    assert photos.loads == 1
    assert provider._preparing == {}


async def test_only_the_photos_used_last_are_kept(provider: LocalProvider) -> None:
    """Memory does not grow with the number of orders."""
    for shade in range(4):
        await made(provider, request_for(png(np.full((64, 64, 3), shade, np.uint8)), 0))
    assert len(provider._subjects) == 2


async def test_a_bad_photo_is_a_permanent_error_and_harms_no_later_call(provider: LocalProvider, photo: bytes) -> None:
    """Bytes that are no image are refused by the photo gate, and the provider goes on."""
    with pytest.raises(UnsupportedImageError):
        await made(provider, request_for(b"no image", 0))
    assert len(await made(provider, request_for(photo, 0))) == 1


async def test_limits_are_the_callers(photo: bytes) -> None:
    """The limits given decide what is let in."""
    provider = LocalProvider(threads=1, limits=PhotoLimits(max_bytes=50_000_000, max_pixels=1_000))
    with pytest.raises(UnsupportedImageError):
        await made(provider, request_for(photo, 0))
    await provider.close()


async def test_a_photo_that_could_not_be_loaded_is_loaded_again(provider: LocalProvider, photo: bytes) -> None:
    """The store's error reaches the caller as it is, and is not remembered."""

    class Absent(Photos):
        async def load(self) -> bytes:
            raise ArtifactMissingError("The store has no such photo.")

    with pytest.raises(ArtifactMissingError):
        await made(provider, request_for(photo, 0, photos=Absent(photo)))
    assert len(await made(provider, request_for(photo, 0))) == 1


async def test_closing_the_generator_early_abandons_the_rest(photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the caller goes away no further image is begun, and one under way stops at its next step."""
    provider = LocalProvider(threads=1)
    begun: list[int] = []
    second_begun, go_on = threading.Event(), threading.Event()

    def watched(subject: Subject, recipe: Any, *, checkpoint: Callable[[], None]) -> Pixels:
        begun.append(recipe.variant)
        if len(begun) == 2:
            second_begun.set()
            assert go_on.wait(10)
            checkpoint()
            pytest.fail("the image went on")
        return render(subject, recipe, checkpoint=checkpoint)

    monkeypatch.setattr(provider_module, "render", watched)
    images = provider.generate(request_for(photo, 0, 1, 2, 3, 4))
    await anext(images)
    assert await asyncio.to_thread(second_begun.wait, 10)
    await images.aclose()
    go_on.set()
    await provider.close()
    assert begun == [0, 1]


async def test_no_memory_is_a_retryable_error(provider: LocalProvider, photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is out of memory may have some later."""

    def exhausted(*_: Any, **__: Any) -> Pixels:
        raise MemoryError

    monkeypatch.setattr(provider_module, "render", exhausted)
    with pytest.raises(DeviceMemoryError):
        await made(provider, request_for(photo, 0))


async def test_the_event_loop_stays_free(provider: LocalProvider, photo: bytes) -> None:
    """Other tasks run while pictures are computed."""
    turns = 0
    done = asyncio.Event()

    async def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0.001)

    counting = asyncio.create_task(count())
    await made(provider, request_for(photo, 0, 1, 2))
    done.set()
    await counting
    assert turns > 20


@pytest.mark.parametrize(("threads", "images_per_call"), [(0, 5), (1, 0)])
def test_a_provider_without_threads_is_refused(threads: int, images_per_call: int) -> None:
    """Settings that could never make an image are an error at the start."""
    with pytest.raises(SettingsError):
        LocalProvider(threads=threads, images_per_call=images_per_call)
