"""
Where finished images go on the user's disk: one folder per photo with ``NN.jpg``, a contact sheet and ``order.json``.

Every file is written beside its place and renamed, so that a file that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobdaemon.contact_sheet import MAX_IMAGES, make_contact_sheet
from jobdaemon.domain.artifact import EXTENSIONS
from jobdaemon.errors import SettingsError

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".heic", ".heif"})
ORDER_FILE = "order.json"
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
        raise SettingsError(f"{folder} cannot be written: {error.strerror}") from error


class FolderNames:
    """Gives each photo of a run its folder: its stem, and with a piece of its digest where two photos share one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._taken: dict[str, str] = {}

    def folder(self, photo: Path, sha256: str) -> Path:
        """The same photo gets the same folder in every run, as long as the folder's order.json is there."""
        stem = photo.stem or "photo"
        for name in (stem, f"{stem}-{sha256[:8]}"):
            if self._taken.get(name, sha256) == sha256 and _owner(self._root / name) in (None, sha256):
                break
        self._taken[name] = sha256
        return self._root / name


def _owner(folder: Path) -> str | None:
    try:
        document = json.loads((folder / ORDER_FILE).read_text(encoding="utf-8"))
        return str(document["photo_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Delivery:
    """The folder of one photo."""

    folder: Path

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
