"""Geometry that moves with the pixels: crop, resize and flip of a picture, its boxes, points, maps and masks.

Pure functions: what they are given stays as it was, so boxes are the same in every epoch. Coordinates are fractions of
the picture's width and height; a `Window` is the part of the upright picture that an example shows.
Source: GLIGEN (Li et al., 2023), its training data: boxes under 1 % of the area dropped, the 30 largest kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gligen.data.example import Pixels
from gligen.images import BICUBIC
from gligen.request import Box, Person

MIN_AREA = 0.01  # of the picture as it is shown
MAX_BOXES = 30
MULTIPLE = 64  # of every side: the autoencoder's 8 times the UNet's 8

# COCO's keypoints with left and right exchanged: nose, then pairs of left and right
MIRRORED = (0, *(i for left in range(1, 17, 2) for i in (left + 1, left)))
_SIDES = re.compile(r"\b(left|right)(most|ward|wards|hand|handed)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Window:
    """A crop in whole pixels of the upright picture, resized to (width, height), then flipped or not."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int
    is_flipped: bool = False

    def fractions(self, picture: tuple[int, int]) -> Box:
        """The fractions x0, y0, x1, y1 of the crop in a picture of that width and height."""
        W, H = picture
        return self.left / W, self.top / H, self.right / W, self.bottom / H


def crop_window(
    picture: tuple[int, int],
    size: tuple[int, int],
    place: tuple[float, float] = (0.5, 0.5),
    *,
    is_flipped: bool = False,
) -> Window:
    """The largest crop of a picture (width, height) that has the size's aspect ratio.

    place: where it lies, from (0, 0), left and top, to (1, 1); the centre is that of `gligen.images.fit`.
    """
    W, H = picture
    width, height = size
    if W * height > H * width:
        w, h = max(1, round(H * width / height)), H
    else:
        w, h = W, max(1, round(W * height / width))
    left, top = round((W - w) * place[0]), round((H - h) * place[1])
    return Window(left, top, left + w, top + h, width, height, is_flipped)


def crop_pixels(pixels: Pixels, window: Window) -> Pixels:
    """The window of a picture, resized (bicubic, as the original) and flipped."""
    image = Image.fromarray(pixels[window.top : window.bottom, window.left : window.right])
    resized = np.asarray(image.resize((window.width, window.height), BICUBIC))
    return resized[:, ::-1] if window.is_flipped else resized


def crop_map(pixels: NDArray[np.uint8], kind: str, window: Window, picture: tuple[int, int]) -> NDArray[np.uint8]:
    """The same part of a map or mask, which may have another resolution than its picture of (width, height).

    kind: a map mode's name, or 'mask'. Resized as `gligen.images.load_map` and `load_mask_image` resize: labels keep
    their values; a mask's pixel is white if any in its place is. A normal map that is flipped has its x, red, inverted.
    """
    image = Image.fromarray(pixels)
    W, H = image.size
    x0, y0, x1, y1 = window.fractions(picture)
    box = (x0 * W, y0 * H, x1 * W, y1 * H)
    resample = {"sem": Image.Resampling.NEAREST, "mask": Image.Resampling.BOX}.get(kind, BICUBIC)
    image = image.resize((window.width, window.height), resample, box)
    result = np.array(image)
    if kind == "mask":
        result = np.where(result > 0, 255, 0).astype(np.uint8)
    if window.is_flipped:
        result = result[:, ::-1].copy()
        if kind == "normal":
            result[..., 0] = 255 - result[..., 0]
    return result


def crop_boxes(boxes: NDArray[np.float64], window: Window, picture: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes (m, 4) in fractions of the picture as fractions of the window, clipped to it.

    What lies outside the window has no area left.
    """
    moved = _into(boxes.reshape(-1, 2, 2), window, picture).reshape(-1, 4).clip(0, 1)
    return moved[:, [2, 1, 0, 3]] if window.is_flipped else moved


def crop_person(person: Person, window: Window, picture: tuple[int, int]) -> Person:
    """A person's 17 points as fractions of the window; None where absent or outside. Flipped, left becomes right."""
    points: list[tuple[float, float] | None] = []
    for point in person:
        moved = None if point is None else _into(np.array(point, np.float64), window, picture)
        is_inside = moved is not None and bool(((moved >= 0) & (moved <= 1)).all() and moved.any())
        points.append((float(moved[0]), float(moved[1])) if moved is not None and is_inside else None)
    return tuple(points[i] for i in MIRRORED) if window.is_flipped else tuple(points)


def select_boxes(boxes: NDArray[np.float64], min_area: float = MIN_AREA, most: int = MAX_BOXES) -> list[int]:
    """Selects which boxes (m, 4) to keep, in their own order: those of at least min_area, and of them the `most`
    largest."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    large = np.flatnonzero((area >= min_area) & (area > 0))
    by_size = large[np.argsort(-area[large], kind="stable")]
    return sorted(int(i) for i in by_size[:most])


def select_people(people: Sequence[Person], most: int) -> list[int]:
    """Selects which people to keep, in their own order: those with a point, and of them the `most` that reach
    farthest."""

    def extent(person: Person) -> float:
        points = np.array([point for point in person if point])
        return float(np.prod(points.max(0) - points.min(0)))

    seen = [i for i, person in enumerate(people) if any(person)]
    return sorted(sorted(seen, key=lambda i: -extent(people[i]))[:most])


def says_side(texts: Iterable[str]) -> bool:
    """True if a text says left or right: such pictures are not flipped, as they would belie it."""
    return any(_SIDES.search(text) for text in texts)


def to_upright(points: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """Points (…, 2), fractions of a stored picture, in the picture that its EXIF orientation (1 to 8) makes of it."""
    x, y = points[..., 0], points[..., 1]
    turned = {
        1: (x, y),
        2: (1 - x, y),
        3: (1 - x, 1 - y),
        4: (x, 1 - y),
        5: (y, x),
        6: (1 - y, x),
        7: (1 - y, 1 - x),
        8: (y, 1 - x),
    }
    return np.stack(turned[orientation], -1)


def boxes_to_upright(boxes: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """The same for boxes (m, 4) xyxy."""
    corners = to_upright(boxes.reshape(-1, 2, 2), orientation)
    return np.concatenate([corners.min(1), corners.max(1)], -1)


@dataclass(frozen=True)
class Buckets:
    """Sizes of about base² pixels, sides multiples of 64, for pictures of many shapes to lose little to the crop.

    base: pixels, a multiple of 64. most: the largest aspect ratio, either way.
    """

    base: int = 512
    most: float = 2.0

    def __post_init__(self) -> None:
        check_size((self.base, self.base))
        if not self.most >= 1:
            raise ValueError(f"the largest aspect ratio is {self.most}: give 1 or more")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes (width, height) from tall to wide: for each width the height that comes nearest to base² pixels."""
        area = self.base**2
        sizes = []
        for width in range(MULTIPLE, int(self.base * self.most) + 1, MULTIPLE):
            height = max(MULTIPLE, round(area / width / MULTIPLE) * MULTIPLE)
            if max(width, height) <= self.most * min(width, height):
                sizes.append((width, height))
        return tuple(sizes)

    def nearest(self, picture: tuple[int, int]) -> tuple[int, int]:
        """The size that a picture (width, height) loses least in: the nearest aspect ratio."""
        ratio = np.log(picture[0] / picture[1])
        return min(self.sizes, key=lambda size: (abs(np.log(size[0] / size[1]) - ratio), -size[0] * size[1]))


def check_size(size: tuple[int, int]) -> None:
    """Raises ValueError unless both sides are multiples of 64 above 0."""
    if any(side <= 0 or side % MULTIPLE for side in size):
        raise ValueError(f"size is {size[0]} x {size[1]}: give multiples of {MULTIPLE}")


def _into(points: NDArray[np.float64], window: Window, picture: tuple[int, int]) -> NDArray[np.float64]:
    x0, y0, x1, y1 = window.fractions(picture)
    moved = (points - (x0, y0)) / (x1 - x0, y1 - y0)
    if window.is_flipped:
        moved[..., 0] = 1 - moved[..., 0]
    return moved
