"""Pictures from bytes: upright RGB, with what is needed to tell in which frame their annotations were made."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gligen.data.example import BadExample, Pixels
from gligen.images import load_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXIF_ORIENTATION = 0x0112
SAME_SHAPE = 0.02  # how much two aspect ratios may differ: pictures are resized, and sides rounded


@dataclass(frozen=True)
class Picture:
    """A decoded picture. pixels: upright. orientation: EXIF's, 1 to 8, that turned the stored picture into it (1: as
    stored)."""

    pixels: Pixels
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright."""
        return self.pixels.shape[1], self.pixels.shape[0]


def decode_pixels(content: bytes, key: str) -> Pixels:
    """The upright picture of a file's bytes: any mode as RGB, transparency on white, 16 bits scaled to 8.

    Raises BadExample, its reason what is wrong with the file.
    """
    try:
        return np.asarray(load_rgb(content, key))
    except ValueError as error:
        what = str(error).removeprefix(f"{key}: ")
        raise BadExample(f"picture: {what.split(' (')[0]}", str(error)) from None


def decode_picture(content: bytes, key: str) -> Picture:
    """The same with the orientation that made it upright. Raises BadExample."""
    pixels = decode_pixels(content, key)
    with Image.open(io.BytesIO(content)) as image:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    return Picture(pixels, orientation if orientation in range(1, 9) else 1)


def picture_shape(content: bytes, key: str) -> tuple[int, int]:
    """Width and height of a file's picture, upright, from its header. Raises BadExample."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            is_turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(5, 9)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadExample("picture: not an image file", f"{key}: {error}") from None
    return (height, width) if is_turned else (width, height)


def annotated_frame(picture: Picture, said: tuple[int, int], key: str) -> tuple[int, int, int]:
    """The frame in which boxes were measured: its width and height, and the EXIF orientation that makes it upright.

    said: what the annotation says the picture's width and height are; (0, 0) if nothing, (1, 1) for fractions.
    Pictures with an EXIF orientation are annotated as stored by tools that ignore it and upright by those that do not:
    the size that the annotation gives decides; where it fits both or says nothing, upright, as people see pictures.
    Pictures may have been resized since, as a whole.
    Raises BadExample if the shape fits neither.
    """
    W, H = picture.size
    w, h = said
    if (w, h) == (0, 0):
        return W, H, 1
    if (w, h) == (1, 1) or _same_shape(w, h, W, H):
        return w, h, 1
    if picture.orientation >= 5 and _same_shape(w, h, H, W):
        return w, h, picture.orientation
    raise BadExample(
        "picture of another shape than its annotation says", f"{key}: {W} x {H} pixels, but annotated as {w} x {h}"
    )


def _same_shape(width: int, height: int, other_width: int, other_height: int) -> bool:
    a, b = width * other_height, height * other_width
    return abs(a - b) <= max(SAME_SHAPE * b, width, height, other_width, other_height)  # at least a pixel's rounding


def check_same_shape(size: tuple[int, int], pixels: Pixels, what: str, key: str) -> None:
    """Raises BadExample unless a map or mask of that width and height has the picture's shape."""
    H, W = pixels.shape[:2]
    if not _same_shape(*size, W, H):
        raise BadExample(
            f"{what} of another shape than its picture", f"{key}: {size[0]} x {size[1]}, but the picture {W} x {H}"
        )
