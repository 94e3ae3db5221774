"""
Where finished images go on the user's disk: one folder per photo with ``NN.jpg``, a contact sheet and ``order.json``.

Every file is written beside its place and renamed, so that a file that is there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobdaemon.contact_sheet import MAX_IMAGES, make_contact_sheet
from jobdaemon.domain.artifact import EXTENSIONS
from jobdaemon.errors import SettingsError

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".heic", ".heif"})
ORDER_FILE = "order.json"
#: A file name may have 255 bytes on most disks.
_MAX_NAME_BYTES = 200
CONTACT_SHEET = "contact-sheet.jpg"


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """
    The photos these arguments name: files as they are, folders as the photos directly in them, by name.

    A missing file is left in: it is reported like any other bad photo, and does not stop the others.

    Raises:
        SettingsError: a folder has no photos.
    """
    photos: list[Path] = []
    for path in paths:
        if not path.is_dir():
            photos.append(path)
            continue
        try:
            inside = sorted(child for child in path.iterdir() if child.suffix.lower() in PHOTO_SUFFIXES and child.is_file())
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
        if not inside:
            raise SettingsError(f"{path} has no photos: no file in it ends in {', '.join(sorted(PHOTO_SUFFIXES))}")
        photos += inside
    return list(dict.fromkeys(photos))


def make_output_folder(folder: Path) -> None:
    """
    Make the folder if need be, and prove that files can be written into it.

    Raises:
        SettingsError: they cannot.
    """
    probe = folder / f".jobdaemon-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = "it is a file, not a folder" if folder.is_file() else error.strerror
        raise SettingsError(f"{folder} cannot be written: {reason}") from error


class Folders:
    """
    Gives each order its folder: the photo's stem, and with a piece of the wish's digest where that is taken.

    A folder belongs to the wish (photo, plan, prompts) whose ``order.json`` was there first, which also holds between two calls
    at once; so two photos of one name never mix, and the same call finds its folder again.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def claim(self, photo: Path, wish: str) -> Delivery:
        """
        Args:
            wish: hex digest of what is asked for.

        Raises:
            OSError: the folder cannot be made.
        """
        stem = _folder_name(photo)
        for name in (stem, f"{stem}-{wish[:8]}"):
            delivery = Delivery(self._root / name)
            if delivery.claim(wish):
                return delivery
        raise FileExistsError(errno.EEXIST, "its folder belongs to another order", str(self._root / f"{stem}-{wish[:8]}"))


def _folder_name(photo: Path) -> str:
    """The stem as one plain name inside the output folder, short enough for a disk with a digest behind it."""
    stem = photo.stem.strip(". ")
    while len(os.fsencode(stem)) > _MAX_NAME_BYTES:
        stem = stem[:-1]
    return stem or "photo"


@dataclass(frozen=True, slots=True)
class Delivery:
    """The folder of one photo."""

    folder: Path

    def claim(self, wish: str) -> bool:
        """Make the folder this wish's own; False when it is another's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{ORDER_FILE}.{os.getpid()}"
        try:
            temporary.write_text(as_json({"wish": wish, "status": "waiting"}) + "\n")
            # A link, unlike a rename, never replaces what is there.
            os.link(temporary, self.folder / ORDER_FILE)
        except FileExistsError:
            return self._owner() == wish
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _owner(self) -> str | None:
        try:
            return str(json.loads((self.folder / ORDER_FILE).read_text(encoding="utf-8"))["wish"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def abandon(self) -> None:
        """Take back a claim whose order never came to be."""
        with suppress(OSError):
            if not any(path.name != ORDER_FILE for path in self.folder.iterdir()):
                (self.folder / ORDER_FILE).unlink()
                self.folder.rmdir()

    def image_path(self, index: int, media_type: str) -> Path:
        """Where image number *index* (from 1) lies."""
        return self.folder / f"{index:02d}.{EXTENSIONS.get(media_type, 'bin')}"

    def has(self, index: int, media_type: str, sha256: str) -> bool:
        """Whether that very image is already there."""
        try:
            return hashlib.sha256(self.image_path(index, media_type).read_bytes()).hexdigest() == sha256
        except OSError:
            return False

    def write_image(self, index: int, media_type: str, content: bytes) -> Path:
        """Write one image; OSError when the disk does not let us."""
        path = self.image_path(index, media_type)
        _write(path, content)
        return path

    def write_order(self, document: dict[str, Any]) -> None:
        """Write ``order.json``."""
        _write(self.folder / ORDER_FILE, (as_json(document, indent=2) + "\n").encode())

    def write_contact_sheet(self, images: Sequence[dict[str, Any]], title: str) -> None:
        """Lay the images on one sheet; one that was not made leaves its cell empty, so that numbers agree with file names."""
        pictures = [(self.image_path(image["index"], image["media_type"] or "image/jpeg"), "") for image in images[:MAX_IMAGES]]
        if any(path.exists() for path, _ in pictures):
            make_contact_sheet(pictures, self.folder / CONTACT_SHEET, title=title)


def as_json(document: Any, *, indent: int | None = None) -> str:
    """*document* as JSON, times in ISO 8601 UTC."""
    return json.dumps(document, indent=indent, ensure_ascii=False, default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return str(value)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
