"""One picture from one subject and one recipe: crop, background, grade, finish, in this order."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from jobdaemon.providers.local.backgrounds import lay_background
from jobdaemon.providers.local.crops import TARGET_LONG_SIDE_PX, place_crop
from jobdaemon.providers.local.finishes import FINISHES, noise_tile
from jobdaemon.providers.local.grades import apply_grade
from jobdaemon.providers.local.recipe import Recipe
from jobdaemon.providers.local.subject import Pixels, Subject


def render(subject: Subject, recipe: Recipe, *, checkpoint: Callable[[], None] = lambda: None) -> Pixels:
    """
    Make one picture; the same subject and recipe give the same pixels.

    Args:
        subject: the photo.
        recipe: the look.
        checkpoint: called between the steps; may raise to abandon the picture.

    Returns:
        (H, W, 3) uint8 RGB, long side 2048 pixels where the photo has as much.
    """
    finish = FINISHES[recipe.finish]
    height, width = subject.pixels.shape[:2]
    long_side = round(TARGET_LONG_SIDE_PX * finish.scale)
    window = place_crop(recipe.crop, width=width, height=height, head=subject.head, long_side=long_side)
    cut = subject.pixels[window.y : window.y + window.height, window.x : window.x + window.width]
    size = (window.out_width, window.out_height)
    if size == (window.width, window.height):
        picture = cut.copy()
    else:
        picture = np.asarray(cv2.resize(cut, size, interpolation=cv2.INTER_AREA), np.uint8)
    checkpoint()
    picture = lay_background(picture, subject, window, recipe.background, noise_tile())
    checkpoint()
    picture = apply_grade(picture, recipe.grade)
    checkpoint()
    return finish.apply(picture, recipe.variant)
