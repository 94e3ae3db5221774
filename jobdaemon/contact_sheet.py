"""One JPEG that shows all pictures of an order: numbered thumbnails with captions. Pillow only, a thumbnail at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageDraw, ImageFont

MAX_IMAGES = 70
_MARGIN_PX = 28
_GAP_PX = 16
_TITLE_PX = 60
_CAPTION_PX = 44
_PAPER = (250, 250, 248)
_INK = (34, 36, 40)
_FAINT = (104, 108, 116)
_EMPTY = (226, 226, 222)
_PREFIX, _SUFFIX = "jobdaemon local style: ", "; not generative AI"

#: Typographic signs that people type and the built-in font lacks.
_PLAIN = str.maketrans({"—": "-", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "..."})

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class _Grid:
    """Square cells, but each row is only as high as its tallest picture."""

    columns: int
    cell_px: int
    row_heights_px: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        width = 2 * _MARGIN_PX + self.columns * self.cell_px + (self.columns - 1) * _GAP_PX
        return width, self._top(len(self.row_heights_px)) - _GAP_PX + _MARGIN_PX

    def _top(self, row: int) -> int:
        return _MARGIN_PX + _TITLE_PX + sum(self.row_heights_px[:row]) + row * (_CAPTION_PX + _GAP_PX)

    def cell(self, number: int) -> tuple[int, int, int]:
        """Left, top and height of a cell."""
        row, column = divmod(number, self.columns)
        return _MARGIN_PX + column * (self.cell_px + _GAP_PX), self._top(row), self.row_heights_px[row]


def make_contact_sheet(images: Sequence[tuple[Path, str]], destination: Path, *, title: str) -> None:
    """
    Lay pictures out in a grid and write it as one JPEG; *destination* appears whole or not at all.

    A file that is missing or cannot be decoded leaves an empty cell that says so: the sheet of a partial order is still a sheet.

    Args:
        images: file and caption of each, in order, 1 to 70; with an empty caption the file's EXIF ImageDescription is used.
        destination: a ``.jpg`` file in an existing folder; replaced if it exists.
        title: one line above the grid.

    Raises:
        ValueError: no images, or more than 70.
        OSError: the folder cannot be written.
    """
    if not 1 <= len(images) <= MAX_IMAGES:
        raise ValueError(f"A contact sheet shows 1 to {MAX_IMAGES} images, not {len(images)}.")
    grid = _grid_for([path for path, _ in images])
    sheet = Image.new("RGB", grid.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    heading = _font(30)
    draw.text((_MARGIN_PX, _MARGIN_PX), _fitted(draw, title, heading, grid.size[0] - 2 * _MARGIN_PX), _INK, heading)
    for number, (path, caption) in enumerate(images):
        left, top, height = grid.cell(number)
        description = _draw_picture(sheet, (left, top), (grid.cell_px, height), path)
        words = caption or description.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        _draw_caption(draw, (left, top + height), grid.cell_px, f"{number + 1}", words)
    _write_atomically(sheet, destination)


def _grid_for(paths: Sequence[Path]) -> _Grid:
    count = len(paths)
    columns = count if count <= 3 else 4 if count <= 8 else 6 if count <= 30 else 10
    cell = 420 if columns <= 4 else 300 if columns == 6 else 240
    heights = [_height(path, cell) for path in paths]
    return _Grid(columns, cell, tuple(max(heights[first : first + columns]) for first in range(0, count, columns)))


def _height(path: Path, cell: int) -> int:
    """How high a picture's thumbnail is; a cell for one that is not there."""
    try:
        with Image.open(path) as image:
            # Thumbnails are never enlarged.
            return round(image.height * min(1.0, cell / max(image.size)))
    except Exception:  # noqa: BLE001 -- as in _draw_picture
        return cell


def _draw_picture(sheet: Image.Image, corner: tuple[int, int], size: tuple[int, int], path: Path) -> str:
    """Paste one thumbnail and return its description."""
    left, top = corner
    cell, height = size
    try:
        thumbnail, description = _thumbnail(path, cell)
    except Exception:  # noqa: BLE001 -- Pillow raises whatever a damaged file provokes; the sheet of the others is still wanted
        draw = ImageDraw.Draw(sheet)
        draw.rectangle((left, top, left + cell - 1, top + height - 1), fill=_EMPTY)
        draw.text((left + cell // 2, top + height // 2), "not available", _FAINT, _font(13), anchor="mm")
        return ""
    # Standing on the caption line, so that pictures of different shapes line up.
    sheet.paste(thumbnail, (left + (cell - thumbnail.width) // 2, top + height - thumbnail.height))
    return description


def _draw_caption(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, label: str, words: str) -> None:
    left, top = corner
    bold, small = _font(16), _font(13)
    draw.text((left, top + 6), label, _INK, bold)
    indent = round(draw.textlength(label, bold)) + 8
    first, rest = _broken(draw, words, small, cell - indent)
    draw.text((left + indent, top + 8), first, _FAINT, small)
    draw.text((left + indent, top + 25), _fitted(draw, rest, small, cell - indent), _FAINT, small)


def _thumbnail(path: Path, side: int) -> tuple[Image.Image, str]:
    with Image.open(path) as image:
        # Decoding at an eighth to a half of the size: a 2048-pixel JPEG costs 10 ms and 1 MB.
        image.draft("RGB", (side * 2, side * 2))
        described = image.getexif().get(ExifTags.Base.ImageDescription, "")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    if orientation in turns:
        small = small.transpose(turns[orientation])
    if isinstance(described, str):
        # Pillow reads EXIF text as Latin-1; we write UTF-8.
        described = described.encode("latin-1", "replace")
    return small, bytes(described).decode("utf-8", "replace").strip("\0 ")


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _printable(text: str) -> str:
    """One line of what the built-in font can show, which is little more than Latin-1."""
    plain = text.translate(_PLAIN).encode("latin-1", "replace").decode("latin-1")
    return "".join(character if character.isprintable() else " " for character in plain)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """*text*, shortened with an ellipsis until it fits."""
    text = _printable(text)[:400]
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _broken(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> tuple[str, str]:
    """*text* in two lines, broken between words; a first word that does not fit is shortened."""
    words = _printable(text)[:400].split()
    line = ""
    for place, word in enumerate(words):
        longer = f"{line} {word}".strip()
        if draw.textlength(longer, font) > width:
            return (line, " ".join(words[place:])) if line else (_fitted(draw, word, font, width), " ".join(words[1:]))
        line = longer
    return line, ""


def _write_atomically(sheet: Image.Image, destination: Path) -> None:
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            sheet.save(file, "JPEG", quality=88)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp's 0600 would keep the operator's colleagues out
        Path(name).replace(destination)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
