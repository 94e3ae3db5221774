"""Where the picture is cut: named framings around the head."""

from __future__ import annotations

from dataclasses import dataclass

#: The longest side of a finished picture, where the photo has as much.
TARGET_LONG_SIDE_PX = 2048


@dataclass(frozen=True, slots=True)
class Crop:
    """
    A framing.

    Attributes:
        name: for the caption.
        aspect: width over height.
        face_share: height of the face over the height of the picture; 0 takes as much of the photo as fits.
        face_x: where the middle of the face lies, 0 (left edge) to 1.
        face_y: where the middle of the face lies, 0 (top edge) to 1.
    """

    name: str
    aspect: float
    face_share: float
    face_x: float = 0.5
    face_y: float = 0.4


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle in the photo and the size it is delivered in; all in pixels."""

    x: int
    y: int
    width: int
    height: int
    out_width: int
    out_height: int


#: Neighbours in this list differ in shape and in size of the head: consecutive images never look alike.
CROPS = (
    Crop("portrait 4:5", 4 / 5, 0.34, 0.5, 0.40),
    Crop("wide 16:9", 16 / 9, 0.0, 0.36, 0.36),
    Crop("close square", 1.0, 0.50, 0.5, 0.46),
    Crop("tall 9:16", 9 / 16, 0.0, 0.5, 0.30),
    Crop("landscape 3:2", 3 / 2, 0.40, 0.63, 0.42),
    Crop("half length 2:3", 2 / 3, 0.0, 0.5, 0.30),
    Crop("square", 1.0, 0.0, 0.5, 0.34),
    Crop("close 4:5", 4 / 5, 0.48, 0.42, 0.42),
    Crop("landscape 4:3", 4 / 3, 0.0, 0.40, 0.36),
    Crop("portrait 3:4", 3 / 4, 0.27, 0.60, 0.36),
    Crop("panorama 2:1", 2.0, 0.0, 0.66, 0.40),
)


def place_crop(
    crop: Crop, *, width: int, height: int, head: tuple[float, float, float, float], long_side: int = TARGET_LONG_SIDE_PX
) -> Window:
    """
    Lay a framing on a photo.

    The head always fits, the window never leaves the photo, and it is never so tight that the picture falls below *long_side*
    while the photo has it.

    Args:
        crop: which framing.
        width: of the photo, pixels.
        height: of the photo, pixels.
        head: x, y, width, height in fractions of the photo.
        long_side: of the finished picture, at most, in pixels.
    """
    face_w, face_h = head[2] * width, head[3] * height
    centre_x, centre_y = (head[0] + head[2] / 2) * width, (head[1] + head[3] / 2) * height
    # A face that fills the photo does not fit into a panorama of it: the shape gives way, not the forehead.
    need_w, need_h = min(width, 1.35 * face_w), min(height, 1.5 * face_h)
    aspect = min(max(crop.aspect, need_w / height), width / need_h)
    largest_h = min(height, width / aspect)
    wanted_h = face_h / crop.face_share if crop.face_share else largest_h
    long_per_h = max(1.0, aspect)
    sharp_h = min(largest_h, long_side / long_per_h)
    # A small photo must not become a stamp: there, no tighter than half of what it has.
    tightest_h = sharp_h if long_side <= max(width, height) else 0.5 * largest_h
    window_h = min(largest_h, max(wanted_h, need_h, need_w / aspect, tightest_h))
    window_w = min(width, window_h * aspect)
    x = _start(centre_x, face_w, crop.face_x, window_w, width)
    y = _start(centre_y, face_h, crop.face_y, window_h, height)
    x0, y0 = int(x), int(y)
    box_w = max(1, min(width - x0, round(window_w)))
    box_h = max(1, min(height - y0, round(window_h)))
    scale = min(1.0, long_side / max(box_w, box_h))
    return Window(x0, y0, box_w, box_h, max(1, round(box_w * scale)), max(1, round(box_h * scale)))


def _start(centre: float, face: float, place: float, window: float, photo: float) -> float:
    """Where the window begins: the face at its *place*, but whole, and nothing from outside the photo."""
    start = centre - place * window
    if face <= window:
        start = min(max(start, centre + face / 2 - window), centre - face / 2)
    return min(max(start, 0.0), photo - window)
