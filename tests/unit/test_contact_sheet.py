"""The contact sheet: one tidy JPEG of all pictures of an order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobdaemon.contact_sheet import make_contact_sheet
from jobdaemon.photo import encode_jpeg

RED = np.array([220, 20, 20], np.uint8)


def picture(path: Path, *, width: int = 160, height: int = 120, description: str | None = None) -> Path:
    path.write_bytes(encode_jpeg(np.broadcast_to(RED, (height, width, 3)).copy(), description=description))
    return path


def red_pixels(path: Path) -> int:
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(np.int16)
    return int((np.abs(pixels - RED).max(axis=2) < 30).sum())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 70])
def test_every_picture_has_its_cell(tmp_path: Path, count: int) -> None:
    """From 1 to 70 pictures, each is shown once."""
    one = picture(tmp_path / "one.jpg")
    make_contact_sheet([(one, "caption")] * count, tmp_path / "sheet.jpg", title="Order 7")
    assert red_pixels(tmp_path / "sheet.jpg") == pytest.approx(count * 160 * 120, rel=0.05)


def test_pictures_of_any_shape_stay_in_their_cells(tmp_path: Path) -> None:
    """A panorama and a tower are scaled into the grid without covering a neighbour."""
    wide = picture(tmp_path / "wide.jpg", width=2000, height=200)
    tall = picture(tmp_path / "tall.jpg", width=200, height=2000)
    make_contact_sheet([(wide, ""), (tall, "")], tmp_path / "sheet.jpg", title="")
    assert red_pixels(tmp_path / "sheet.jpg") == pytest.approx(2 * 420 * 42, rel=0.1)


def test_the_caption_is_read_from_the_picture(tmp_path: Path) -> None:
    """Without a caption the picture's own description is printed: the sheet differs from one without any."""
    described = picture(tmp_path / "a.jpg", description="jobdaemon local style: studio grey; not generative AI")
    plain = picture(tmp_path / "b.jpg")
    make_contact_sheet([(described, "")], tmp_path / "described.jpg", title="t")
    make_contact_sheet([(plain, "")], tmp_path / "plain.jpg", title="t")
    make_contact_sheet([(plain, "studio grey")], tmp_path / "given.jpg", title="t")
    assert (tmp_path / "described.jpg").read_bytes() != (tmp_path / "plain.jpg").read_bytes()
    assert (tmp_path / "described.jpg").read_bytes() == (tmp_path / "given.jpg").read_bytes()


def test_a_damaged_or_missing_file_leaves_a_marked_cell(tmp_path: Path) -> None:
    """One bad file does not cost the sheet of the others."""
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    good = picture(tmp_path / "good.jpg")
    make_contact_sheet([(tmp_path / "bad.jpg", ""), (tmp_path / "none.jpg", ""), (good, "")], tmp_path / "s.jpg", title="t")
    assert red_pixels(tmp_path / "s.jpg") == pytest.approx(160 * 120, rel=0.05)


def test_strange_text_is_shortened_and_never_fails(tmp_path: Path) -> None:
    """Titles and captions of any length and script fit their lines."""
    one = picture(tmp_path / "one.jpg")
    captions = ["x" * 5_000, "词 " * 900, "a\nb\x00\ud800", ""]
    make_contact_sheet([(one, caption) for caption in captions], tmp_path / "s.jpg", title="订单 " * 500 + "\n")
    assert red_pixels(tmp_path / "s.jpg") == pytest.approx(4 * 160 * 120, rel=0.05)


def test_a_failed_sheet_leaves_the_old_one_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination holds a whole sheet at every moment."""
    one = picture(tmp_path / "one.jpg")
    destination = tmp_path / "sheet.jpg"
    destination.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        make_contact_sheet([(one, "")], destination, title="t")
    assert destination.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jpg", "sheet.jpg"]


@pytest.mark.parametrize("count", [0, 71])
def test_a_sheet_of_nothing_or_too_much_is_refused(tmp_path: Path, count: int) -> None:
    """A sheet shows 1 to 70 pictures."""
    with pytest.raises(ValueError, match="1 to 70"):
        make_contact_sheet([(tmp_path / "x.jpg", "")] * count, tmp_path / "s.jpg", title="t")
