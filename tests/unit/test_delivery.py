"""Output folders: whose they are, what they are called, and what lies in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobdaemon.delivery import Delivery, Folders, find_photos, make_output_folder
from jobdaemon.errors import SettingsError

ONE, TWO = "1" * 64, "2" * 64


def test_two_wishes_of_one_name_get_two_folders_and_keep_them(tmp_path: Path) -> None:
    """The first wish has the stem, the second a piece of its digest behind it, in every later call too."""
    for _ in range(2):
        assert Folders(tmp_path).claim(Path("a/ada.png"), ONE).folder == tmp_path / "ada"
        assert Folders(tmp_path).claim(Path("b/ada.jpg"), TWO).folder == tmp_path / "ada-22222222"


def test_a_claim_is_made_by_whoever_is_first(tmp_path: Path) -> None:
    """A folder that is claimed stays its owner's, although nothing else lies in it yet."""
    assert Delivery(tmp_path / "ada").claim(ONE)
    assert not Delivery(tmp_path / "ada").claim(TWO)
    assert [path.name for path in (tmp_path / "ada").iterdir()] == ["order.json"]


@pytest.mark.parametrize("photo", ["..jpg", "...jpg", ".jpg.", " . .png", "..", "x/..png"])
def test_no_name_leads_out_of_the_output_folder(tmp_path: Path, photo: str) -> None:
    """Whatever a photo is called, its folder lies in the output folder."""
    folder = Folders(tmp_path / "out").claim(Path(photo), ONE).folder
    assert folder.parent == tmp_path / "out"
    assert folder.name not in ("", ".", "..")


def test_a_long_name_leaves_room_for_the_digest(tmp_path: Path) -> None:
    """A name of 250 characters of four bytes each is cut to what a disk takes."""
    for wish in (ONE, TWO):
        assert Folders(tmp_path).claim(Path("\N{WOMAN}" * 60 + ".jpg"), wish).folder.is_dir()


def test_an_abandoned_claim_leaves_nothing(tmp_path: Path) -> None:
    """A refused wish takes its folder back, unless something else lies in it."""
    empty, used = Delivery(tmp_path / "empty"), Delivery(tmp_path / "used")
    for delivery in (empty, used):
        delivery.claim(ONE)
    used.write_image(1, "image/jpeg", b"x")
    empty.abandon()
    used.abandon()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]


def test_a_broken_order_file_belongs_to_nobody(tmp_path: Path) -> None:
    """What cannot be read is left alone: the wish gets the folder with its digest."""
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "order.json").write_text(json.dumps(["not ours"]))
    assert Folders(tmp_path).claim(Path("ada.png"), ONE).folder.name == "ada-11111111"


def test_folders_are_read_by_name_and_files_kept_in_order(tmp_path: Path) -> None:
    """A folder stands for its photos, whatever else lies in it; nothing comes twice."""
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert find_photos([tmp_path / "b.JPG", tmp_path]) == [tmp_path / "b.JPG", tmp_path / "a.png"]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """It is said what is wrong with it."""
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(SettingsError, match="it is a file, not a folder"):
        make_output_folder(tmp_path / "out")
