"""Images to tensors and back, and what is drawn on them for people (gligen.grounding.draw_request says what).

Everywhere else images are (B, 3, H, W) in [-1, 1]; only this file knows about modes, orientation and fonts.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gligen.image_files import ImageSource, check_labels, cropped_size, eight_bits, mask_levels, open_image
from gligen.request import Person, name_image

log = logging.getLogger("gligen")

BICUBIC = Image.Resampling.BICUBIC
NEAREST = Image.Resampling.NEAREST

# fmt: off
COCO_LIMBS = (  # pairs of COCO's 17 keypoints
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8),
    (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)
# fmt: on
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONTS = (  # of the usual systems, wide ones last; PIL finds them by name
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
)
COLORS = ("#e6194b", "#4363d8", "#f58231", "#911eb4", "#3cb44b", "#f032e6", "#008080", "#9a6324")


def load_rgb(source: ImageSource | bytes, subject: str | None = None) -> Image.Image:
    """An image as `open_image` takes it, upright (EXIF), as RGB; what is transparent becomes white.

    Greys of 16 bits are scaled to 8, where PIL alone would clip them. Raises as `open_image`.
    """
    image = eight_bits(open_image(source, subject))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def fit(image: Image.Image, width: int, height: int, resample: Image.Resampling = BICUBIC) -> Image.Image:
    """The image's centre at (width, height)'s aspect ratio, resized to it.

    Source: for a square it is the original's preparation, a centre crop to the shorter side rounded as in
    torchvision, then PIL's resize.
    """
    W, H = cropped_size(image.size, width, height)
    left, top = round((image.width - W) / 2), round((image.height - H) / 2)
    return image.crop((left, top, left + W, top + H)).resize((width, height), resample)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1]."""
    return to_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def to_pixels(levels: Tensor) -> Tensor:
    """uint8 of any shape as float32 in [-1, 1]."""
    return (levels.float() / 255 - 0.5) / 0.5


def label_tensor(image: Image.Image) -> Tensor:
    """A label map (mode L, P or I: the ids themselves) as (1, H, W) int64."""
    return torch.from_numpy(np.array(image).astype(np.int64))[None]


class NotFiniteError(ValueError):
    """A decoded image is none."""


def to_pil(image: Tensor) -> Image.Image:
    """A tensor (3, H, W) as an RGB image, clamped to [-1, 1] first; truncated to whole levels as in the original.

    Raises NotFiniteError if a value is not finite, which would pass for a dark or a white pixel.
    """
    if not image.isfinite().all():
        raise NotFiniteError("the image holds NaN or infinity: the model or its precision failed")
    levels = (image.detach().float().clamp(-1, 1) * 0.5 + 0.5) * 255
    return Image.fromarray(levels.byte().permute(1, 2, 0).cpu().numpy())


def load_map(source: ImageSource, mode_name: str, width: int, height: int) -> Tensor:
    """A map of one of the map modes, fitted to the size.

    Returns (3, height, width) in [-1, 1], or for 'sem' labels (1, height, width) int64 in 0..151.
    Raises ValueError if a label map is not one.
    """
    if mode_name != "sem":
        return to_tensor(fit(load_rgb(source), width, height))
    labels = open_image(source, lossless=True)
    check_labels(labels, name_image("sem", source))
    return label_tensor(fit(labels, width, height, NEAREST))


def load_mask_image(source: ImageSource, width: int, height: int) -> Image.Image:
    """A mask as levels 0 and 255 (mode L), fitted to the size: white is what gligen.image_files.mask_levels says.

    A pixel is white if any of the mask's pixels in its place is, so that thin strokes survive.
    """
    white = mask_levels(open_image(source))
    return fit(white, width, height, Image.Resampling.BOX).point([0] + [255] * 255)


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The images row by row on white; `columns` None is about as many as rows. Raises ValueError for none."""
    if not images:
        raise ValueError("a grid needs at least one image")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    gap = 2
    W, H = max(image.width for image in images), max(image.height for image in images)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (W + gap) - gap, rows * (H + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (W + gap), i // columns * (H + gap)))
    return sheet


def draw_person(draw: ImageDraw.ImageDraw, person: Person, color: str, line: int, size: tuple[int, int]) -> None:
    """Draws a skeleton with its keypoints in white."""
    points = [p and (p[0] * (size[0] - 1), p[1] * (size[1] - 1)) for p in person]
    for a, b in COCO_LIMBS:
        start, end = points[a], points[b]
        if start and end:
            draw.line((start, end), fill=color, width=line)
    for point in points:
        if point:
            draw.circle(point, line + 0.5, fill="white", outline=color)


def draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: Font,
    corner: tuple[float, float],
    color: str,
    taken: Sequence[tuple[float, ...]],
    size: tuple[int, int],
) -> tuple[float, ...]:
    """Writes white on the box's colour near its corner, within the image and off the labels already there."""
    W, H = size
    room = W - 4
    while draw.textlength(text, font) > room and len(text) > 1:
        text = text.removesuffix("…")[:-1] + "…"
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    w, h = right - left + 3, bottom - top + 3
    x = max(0, min(corner[0], W - w))
    rows = (corner[1] + step * h for step in (0, -1, 1, 2, 3, -2))
    spots = [(x, y, x + w, y + h) for y in (max(0, min(row, H - h)) for row in rows)]
    spot = next((s for s in spots if not any(_overlap(s, other) for other in taken)), spots[0])
    draw.rectangle(spot, fill=color)
    draw.text((spot[0] + 2 - left, spot[1] + 2 - top), text, "white", font)
    return spot


def legible(text: str, number: int, size: int) -> tuple[str, Font]:
    """The text and a font that has its letters: PIL's own or one of the system's; else a number, which is logged."""
    own = ImageFont.load_default(size)
    if _has_letters(own, text):
        return text, own
    for name in FONTS:
        font = _font(name, size)
        if font is not None and _has_letters(font, text):
            return text, font
    log.info("no font here has the letters of '%s': its box is labelled %d", text, number)
    return str(number), own


def _has_letters(font: Font, text: str) -> bool:
    """Whether no letter is drawn as the sign for a missing one."""
    try:
        missing = font.getmask("\U0010ffff")
        masks = [font.getmask(letter) for letter in dict.fromkeys(text.replace(" ", ""))]
    except UnicodeEncodeError:  # a bitmap font knows Latin-1 only
        return False
    return all((mask.size, bytes(mask)) != (missing.size, bytes(missing)) for mask in masks)


@functools.lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
