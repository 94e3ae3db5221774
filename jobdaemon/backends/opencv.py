"""
The embedded default: real portrait retouching on the CPU, without weights for the picture itself.

Per face, skin is evened out and eyes and mouth are made a little crisper; nothing else changes. Brightness is split into a base
(shape of the face, light, contours), a middle band (blotches, spots, wrinkles), which is mostly removed, and a fine band (pores),
which is mostly kept, so that skin does not turn to plastic. How strong a texture must be to count as a contour is measured on the
face itself, so that dark and light, smooth and rough skin are served alike.

Everything that is wider than a pore is computed on a small copy of the face and applied to the photo strip by strip: time and
memory hardly grow with the photo, and a photo of twice the size is retouched the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobdaemon.backends.faces import Face, FaceDetector, Floats, Pixels
from jobdaemon.errors import DeviceMemoryError
from jobdaemon.photo import PhotoLimits, encode_photo, read_photo
from jobdaemon.ports import BeautifiedPhoto

MODEL = "opencv-1"

# Lengths are in eye distances ("ed") unless a name says otherwise. Amounts are for strength 1; brightness runs from 0 to 255.
_WORK_ED_PX = 128.0  # eye distance on the small copy: a pore is about a pixel there
_SMALLEST_ED_PX = 8.0  # below, there is no texture to work on
_FACE_CENTRE, _FACE_HALF = (0.0, 0.3), (1.08, 1.48)  # from between the eyes; forehead to chin
_FINE_SIGMA = 0.008
_SHARPEN_SIGMA = 0.03
_WINDOW = 0.13  # radius in which brightness and colour are evened out
_MIDDLE_REMOVED = 0.9
_FINE_REMOVED = 0.4
_COLOUR_EVENED = 0.55
_LIFT = 0.05
_EYES_SHARPENED = 0.55
_MOUTH_SHARPENED = 0.3
_MOUTH_COLOUR = 0.08
_MOST_SHARPENED = 24.0
_SPOT_WINDOW = 0.05  # radius of the median that a spot does not survive
_SPOT_FROM, _SPOT_OVER = 3.0, 2.0  # a dark spot is that many times rougher than the skin around; from the sum on wholly
_CONTOUR_SHARE = 2.0  # times the median variance of the skin: textures above count as contours
_CONTOUR_RANGE = (40.0, 500.0)
_STRIP_PIXELS = 400_000


class OpenCVBackend:
    """Retouches on threads of its own; see :class:`jobdaemon.ports.BeautifyBackend`."""

    name = "opencv"
    model = MODEL

    def __init__(self, *, threads: int = 1, limits: PhotoLimits | None = None) -> None:
        """
        Check the networks of the face detector; they are loaded by the first photo.

        Args:
            threads: photos worked on at the same time.
            limits: which photos are let in.

        Raises:
            SettingsError: OpenCV 5, or the face networks are missing or changed.
        """
        self._limits = limits or PhotoLimits()
        self._detector = FaceDetector()
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="beautify")
        if threads > 1:
            # OpenCV splits every operation over all cores; with several photos at once that only adds waiting.
            cv2.setNumThreads(1)

    async def beautify(self, photo: bytes, *, strength: float) -> BeautifiedPhoto:
        """Retouch one photo; faces are counted as unrestored when *strength* is 0."""
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must lie between 0 and 1, not at {strength}")
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._beautify, photo, strength)

    async def close(self) -> None:
        """Let the photos in work end, drop those that wait."""
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    def _beautify(self, content: bytes, strength: float) -> BeautifiedPhoto:
        photo = read_photo(content, limits=self._limits)
        try:
            faces = self._detector.detect(photo.pixels)
            retouched = retouch(photo.pixels, faces, strength)
            encoded = encode_photo(photo)
        except MemoryError as error:
            raise _no_memory(photo.width, photo.height) from error
        except cv2.error as error:
            if error.code == cv2.Error.StsNoMem:
                raise _no_memory(photo.width, photo.height) from error
            raise
        return BeautifiedPhoto(
            content=encoded,
            media_type="image/jpeg",
            width=photo.width,
            height=photo.height,
            faces=retouched,
            unrestored=len(faces) - retouched,
            model=MODEL,
            device="cpu",
        )


def _no_memory(width: int, height: int) -> DeviceMemoryError:
    return DeviceMemoryError(f"There is no memory to retouch a photo of {width} x {height} pixels.")


def beautify_pixels(pixels: Pixels, faces: Sequence[Face], strength: float) -> Pixels:
    """
    A retouched copy; the same arguments give the same pixels.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        faces: those to retouch, as detected on *pixels*.
        strength: 0.0 (an exact copy) to 1.0.
    """
    copy = pixels.copy()
    retouch(copy, faces, strength)
    return copy


def retouch(pixels: Pixels, faces: Sequence[Face], strength: float) -> int:
    """
    Retouch *pixels* in place, without a second copy in memory.

    Returns:
        How many of *faces* were retouched: none at strength 0, and not those too small or outside the photo.
    """
    retouched = 0
    for face in faces:
        region = _region(face, pixels.shape[0], pixels.shape[1])
        if strength <= 0.0 or region is None:
            continue
        plan = _plan(pixels[region.rows, region.columns], region, strength)
        _apply(pixels[region.rows, region.columns], plan, strength)
        retouched += 1
    return retouched


def skin_mask(pixels: Pixels, face: Face) -> Floats:
    """(H, W) float32, 0 to 1: how much of each pixel of the photo counts as this face's skin. Large; for tests and debugging."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.float32)
    region = _region(face, height, width)
    if region is not None:
        crop = mask[region.rows, region.columns]
        small = _skin(_small_copy(pixels[region.rows, region.columns], region.scale), region)
        crop[:] = cv2.resize(small, (crop.shape[1], crop.shape[0]), interpolation=cv2.INTER_LINEAR)
    return mask


# -- where a face lies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """
    The part of a photo that a face can change, and the face's own coordinates in it.

    Attributes:
        rows, columns: of the photo.
        ed_px: eye distance in pixels of the photo.
        scale: from the photo to the small copy, at most 1.
        origin: x, y of the point between the eyes, in pixels of the photo counted from the region's corner.
        right: (2,) unit vector from the eye on the left to the eye on the right; down is at a right angle to it.
        landmarks: (5, 2) in face coordinates: eye distances to the right of and below the origin.
    """

    rows: slice
    columns: slice
    ed_px: float
    scale: float
    origin: Floats
    right: Floats
    landmarks: Floats


def _region(face: Face, height: int, width: int) -> _Region | None:
    """The region of a face, or None when it is too small or lies outside the photo."""
    points = face.landmarks.astype(np.float64)
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    across, down = points[1] - points[0], mouth - eyes
    # A head turned aside has its eyes close together, but not eyes and mouth; and then the line of the eyes says less about tilt.
    ed_px = max(float(np.hypot(*across)), 0.9 * float(np.hypot(*down)))
    direction = across + np.array([down[1], -down[0]])
    length = float(np.hypot(*direction))
    if ed_px < _SMALLEST_ED_PX or length == 0.0:
        return None
    right = direction / length
    axes = np.array([[right[0], -right[1]], [right[1], right[0]]])  # columns: right and down
    centre = eyes + axes @ np.array(_FACE_CENTRE) * ed_px
    reach = np.hypot(axes[:, 0] * _FACE_HALF[0], axes[:, 1] * _FACE_HALF[1]) * ed_px + 2
    left, top = (max(0, int(np.floor(value))) for value in centre - reach)
    end_x, end_y = np.ceil(centre + reach).astype(int) + 1
    columns, rows = slice(left, min(width, int(end_x))), slice(top, min(height, int(end_y)))
    if columns.stop - columns.start < _SMALLEST_ED_PX or rows.stop - rows.start < _SMALLEST_ED_PX:
        return None
    return _Region(
        rows=rows,
        columns=columns,
        ed_px=ed_px,
        scale=min(1.0, _WORK_ED_PX / ed_px),
        origin=(eyes - (left, top)).astype(np.float32),
        right=right.astype(np.float32),
        landmarks=((points - eyes) @ axes / ed_px).astype(np.float32),
    )


def _face_coordinates(region: _Region, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """For each pixel of the small copy: eye distances to the right of, and below, the point between the eyes."""
    height, width = shape[:2]
    x = (np.arange(width, dtype=np.float32) + 0.5) / region.scale - 0.5 - region.origin[0]
    y = (np.arange(height, dtype=np.float32) + 0.5) / region.scale - 0.5 - region.origin[1]
    cos, sin = region.right / np.float32(region.ed_px)
    return x[np.newaxis] * cos + y[:, np.newaxis] * sin, y[:, np.newaxis] * cos - x[np.newaxis] * sin


# -- what to change, on a small copy ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """
    What to do with each pixel of a region, at the size of the small copy; all (h, w) float32 unless said otherwise.

    Attributes:
        skin: 0 to 1.
        shift: to add to the brightness of skin; already weighted by *skin*.
        smooth: brightness without pores.
        colour: (h, w, 3): the even colour of skin around here, as differences from brightness.
        sharpen: how much of the detail of eyes and mouth to add.
        soft: brightness without that detail.
        mouth: how much colour to add, 0 to 1.
    """

    skin: Floats
    shift: Floats
    smooth: Floats
    colour: Floats
    sharpen: Floats
    soft: Floats
    mouth: Floats


def _plan(pixels: Pixels, region: _Region, strength: float) -> _Plan:
    small = _small_copy(pixels, region.scale)
    ed = region.ed_px * region.scale
    u, v = _face_coordinates(region, small.shape)
    skin = _skin(small, region)
    rgb = small.astype(np.float32)
    brightness = _brightness(rgb)
    smooth = _blurred(brightness, _FINE_SIGMA * ed)
    base = _without_texture(_without_spots(smooth, skin, ed), skin, radius=max(1, round(_WINDOW * ed)))
    lift = _LIFT * base * (1 - base / 255)
    mouth = _mouth(region, u, v)
    return _Plan(
        skin=skin,
        shift=skin * strength * (lift - _MIDDLE_REMOVED * (smooth - base)),
        smooth=smooth,
        colour=_even_colour(rgb - brightness[..., np.newaxis], skin, _WINDOW * ed),
        sharpen=_float(strength * (_EYES_SHARPENED * _eyes(region, u, v) + _MOUTH_SHARPENED * mouth)),
        soft=_blurred(brightness, _SHARPEN_SIGMA * ed),
        mouth=mouth,
    )


def _skin(small: Pixels, region: _Region) -> Floats:
    """(h, w) float32, 0 to 1: the face's skin, without eyes, brows, nostrils, mouth, hair, glasses and background."""
    ed = region.ed_px * region.scale
    u, v = _face_coordinates(region, small.shape)
    oval = _oval(u, v, _FACE_CENTRE, (_FACE_HALF[0] * 0.82, _FACE_HALF[1] * 0.82), feather=0.22)
    features = _features(region, u, v)
    # A median of this width removes spots, which are skin although they do not look like it.
    calm = cv2.medianBlur(small, max(3, round(0.05 * ed) * 2 + 1))
    lab = _float(cv2.cvtColor(calm.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB))
    likely = _likeness(lab, region, u, v)
    refined = np.clip(_guided(lab[..., 0], likely, radius=max(1, round(0.06 * ed)), eps=9.0) * 1.15 - 0.1, 0, 1)
    mask = refined * oval * (1 - features) * _connected(np.maximum(refined, features) * oval > 0.15, region, u, v)
    mask[mask < 0.02] = 0
    return _float(mask)


def _connected(passable: NDArray[np.bool_], region: _Region, u: Floats, v: Floats) -> NDArray[np.bool_]:
    """What hangs together with the middle of the face: not the bright lock of hair that looks like skin."""
    _, labels = cv2.connectedComponents(passable.astype(np.uint8), connectivity=4)
    middle = labels[np.hypot(u - region.landmarks[2, 0] / 2, v - region.landmarks[2, 1] / 2) < 0.3]
    return np.asarray(np.isin(labels, middle[middle > 0]))


def _likeness(lab: Floats, region: _Region, u: Floats, v: Floats) -> Floats:
    """How much each pixel looks like the skin of cheeks, bridge of the nose and between the brows of this face, 0 to 1."""
    eye_left, eye_right, nose, mouth_left, mouth_right = region.landmarks
    # Not the forehead: too often it is hair.
    spots = [(eye_left + mouth_left) / 2 - (0.08, 0), (eye_right + mouth_right) / 2 + (0.08, 0), nose * 0.4, (0.0, -0.28)]
    samples = [patch for spot in spots if len(patch := lab[np.hypot(u - spot[0], v - spot[1]) < 0.12]) >= 3]
    if not samples:
        return np.zeros(u.shape, np.float32)
    away = np.array([np.median(patch, axis=0) for patch in samples])
    away -= np.median(away, axis=0)
    # A fringe, glasses or a hand are no skin: leave out a spot that is far from the others.
    near = (np.abs(away[:, 0]) < 25) & (np.hypot(away[:, 1], away[:, 2]) < 12)
    pool = np.concatenate([patch for patch, is_near in zip(samples, near, strict=True) if is_near or not near.any()])
    centre = np.median(pool, axis=0)
    # Light and shadow spread brightness further over a face than a few spots show, and the more so the lighter the skin.
    floor = np.diag([max(4.0, 0.1 * float(centre[0])) ** 2, 3.5**2, 3.5**2])
    inverse = np.linalg.inv(np.cov(pool, rowvar=False) + floor).astype(np.float32)
    apart = lab - centre.astype(np.float32)
    distance = np.sqrt(np.maximum(0, np.einsum("hwi,ij,hwj->hw", apart, inverse, apart)))
    return _float(1 - _smoothstep((distance - 2.2) / 1.2))


def _features(region: _Region, u: Floats, v: Floats) -> Floats:
    """Where eyes, brows, nostrils and mouth lie, 0 to 1."""
    nose = region.landmarks[2]
    covered = _oval(u, v, (nose[0], nose[1] + 0.1), (0.26, 0.12), feather=0.5)
    for eye in region.landmarks[:2]:
        covered = np.maximum(covered, _oval(u, v, (eye[0], eye[1]), (0.33, 0.2), feather=0.3))
        covered = np.maximum(covered, _oval(u, v, (eye[0], eye[1] - 0.32), (0.42, 0.14), feather=0.4))
    left, right = region.landmarks[3:]
    width = max(0.5, float(right[0] - left[0]))
    middle = (left + right) / 2
    return np.maximum(covered, _oval(u, v, (middle[0], middle[1]), (0.56 * width, 0.24), feather=0.3))


def _eyes(region: _Region, u: Floats, v: Floats) -> Floats:
    left, right = (_oval(u, v, (eye[0], eye[1]), (0.24, 0.13), feather=0.5) for eye in region.landmarks[:2])
    return np.maximum(left, right)


def _mouth(region: _Region, u: Floats, v: Floats) -> Floats:
    left, right = region.landmarks[3:]
    middle = (left + right) / 2
    return _oval(u, v, (middle[0], middle[1]), (0.4 * max(0.5, float(right[0] - left[0])), 0.12), feather=0.5)


def _oval(u: Floats, v: Floats, centre: tuple[float, float], half: tuple[float, float], *, feather: float) -> Floats:
    """1 inside the oval, falling to 0 where it is larger by the share *feather*."""
    distance = np.hypot((u - np.float32(centre[0])) / np.float32(half[0]), (v - np.float32(centre[1])) / np.float32(half[1]))
    return _float(1 - _smoothstep((distance - 1) / np.float32(feather)))


def _float(values: ArrayLike) -> Floats:
    return np.asarray(values, np.float32)


def _smoothstep(x: Floats) -> Floats:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _small_copy(pixels: Pixels, scale: float) -> Pixels:
    if scale == 1.0:
        return np.ascontiguousarray(pixels)
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _brightness(rgb: Floats) -> Floats:
    """Luma: what is added to it is added to all three channels, so that colours stay, and grey stays grey to the bit."""
    return _float(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def _blurred(values: Floats, sigma_px: float) -> Floats:
    if sigma_px < 0.3:  # a kernel of one pixel
        return values
    return _float(cv2.GaussianBlur(values, (0, 0), sigma_px))


def _box(values: Floats, radius: int) -> Floats:
    return _float(cv2.blur(values, (2 * radius + 1, 2 * radius + 1)))


def _guided(guide: Floats, values: Floats, *, radius: int, eps: float) -> Floats:
    """*values* smoothed along the contours of *guide* (the guided filter, He et al. 2010)."""
    mean, mean_values = _box(guide, radius), _box(values, radius)
    variance = _box(guide * guide, radius) - mean * mean
    slope = _float((_box(guide * values, radius) - mean * mean_values) / (variance + np.float32(eps)))
    return _box(slope, radius) * guide + _box(mean_values - slope * mean, radius)


def _without_spots(values: Floats, skin: Floats, ed: float) -> Floats:
    """Brightness with what is much darker than skin's usual texture, and small, filled up: spots are no contours."""
    window = 2 * round(_SPOT_WINDOW * ed) + 1
    usual = skin > 0.8
    if window < 3 or not usual.any():
        return values
    depth = _float(cv2.medianBlur(np.rint(values).astype(np.uint8), window)) - values
    roughness = max(1.0, 1.48 * float(np.median(np.abs(depth[usual]))))
    return _float(values + _smoothstep((depth / roughness - _SPOT_FROM) / _SPOT_OVER) * depth)


def _without_texture(values: Floats, skin: Floats, *, radius: int) -> Floats:
    """
    Brightness without blotches and wrinkles, but with contours.

    A guided filter of *values* by itself that only looks at skin, so that hair and eyes do not shine into it.
    """
    weight = _float(skin + 1e-3)
    total = _box(weight, radius)

    def mean(of: Floats) -> Floats:
        return _box(of * weight, radius) / total

    middle = mean(values)
    variance = _float(np.maximum(0, mean(values * values) - middle * middle))
    texture = variance[skin > 0.8]
    usual = float(np.median(texture)) if texture.size else 0.0
    eps = float(np.clip(_CONTOUR_SHARE * usual, *_CONTOUR_RANGE))
    slope = _float(variance / (variance + np.float32(eps)))
    return mean(slope) * values + mean(middle - slope * middle)


def _even_colour(colour: Floats, skin: Floats, sigma_px: float) -> Floats:
    weight = skin + np.float32(1e-3)
    total = _blurred(weight, sigma_px)
    return _float(_blurred(colour * weight[..., np.newaxis], sigma_px) / total[..., np.newaxis])


# -- changing the photo -----------------------------------------------------------------------------------------------------


def _apply(pixels: Pixels, plan: _Plan, strength: float) -> None:
    """Carry out *plan* on the region's *pixels* (a view of the photo), strip by strip; what the plan does not name stays."""
    maps = np.dstack([plan.skin, plan.shift, plan.smooth, plan.sharpen, plan.soft, plan.mouth, plan.colour])
    for rows, enlarged in _strips(maps, pixels.shape[0], pixels.shape[1]):
        skin, shift, smooth, sharpen, soft, mouth = (enlarged[..., channel] for channel in range(6))
        rgb = pixels[rows].astype(np.float32)
        brightness = _brightness(rgb)
        colour = rgb - brightness[..., np.newaxis]
        detail = np.clip(brightness - soft, -_MOST_SHARPENED, _MOST_SHARPENED)
        change = shift - skin * (_FINE_REMOVED * strength) * (brightness - smooth) + sharpen * detail
        tint = skin[..., np.newaxis] * (_COLOUR_EVENED * strength) * (enlarged[..., 6:] - colour)
        tint += (mouth * (_MOUTH_COLOUR * strength))[..., np.newaxis] * colour
        pixels[rows] = np.clip(np.rint(rgb + change[..., np.newaxis] + tint), 0, 255).astype(np.uint8)


def _strips(maps: Floats, height: int, width: int) -> Iterator[tuple[slice, Floats]]:
    """Rows of the region, and (rows, width, C) *maps* enlarged for them by linear interpolation."""
    small_height = maps.shape[0]
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        rows = slice(top, min(height, top + step))
        at = np.clip((np.arange(rows.start, rows.stop) + 0.5) * small_height / height - 0.5, 0, small_height - 1)
        above = np.floor(at).astype(int)
        below = np.minimum(above + 1, small_height - 1)
        share = (at - above).astype(np.float32)[:, np.newaxis, np.newaxis]
        lines = maps[above] * (1 - share) + maps[below] * share
        if width != maps.shape[1]:
            lines = cv2.resize(lines, (width, lines.shape[0]), interpolation=cv2.INTER_LINEAR)
        yield rows, np.asarray(lines, np.float32)
