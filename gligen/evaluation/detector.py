"""Sees what is in a drawn image, without learning: coloured regions, their boxes and their shapes by rule.

A colour is known by its hue, an object is a connected region, and its shape is the one whose drawing it correlates with
best over all turns. Proven on drawn scenes, clean and blurred, in tests/evaluation/test_scene_metrics.py.

    python -m gligen.evaluation.detector runs/a/val/images --out detections.json

writes what it sees in a folder of images as COCO results, for `evaluate.py pictures --detections`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gligen import cli
from gligen.data.edges import components
from gligen.data.maps import BACKGROUND_LABEL, SHAPE_LABELS
from gligen.data.scenes import Image, shape_patch
from gligen.data.shapes import COLORS, SHAPES, Array, Pair
from gligen.files import write_atomically
from gligen.image_files import open_image
from gligen.request import Box

MIN_AREA = 20 / 64**2  # of the image: smaller regions are rims where two colours mix
RINGS, RAYS = 10, 48  # the polar grid on which shapes are compared
REACH = 2.2  # its outer radius, in units of the region's spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One coloured region. box: x0, y0, x1, y1 in [0, 1]; score: likeness to its shape, at most 1."""

    box: Box
    color: str
    shape: str
    score: float

    @property
    def pair(self) -> Pair:
        return self.color, self.shape


def detect(image: Image) -> list[Detection]:
    """The objects of an image (H, W, 3) uint8, the most certain first."""
    return sorted((detection for detection, _ in _find(image)), key=lambda detection: -detection.score)


def predict_labels(image: Image) -> NDArray[np.uint8]:
    """The semantic map (gligen.data.maps) that an image (H, W, 3) uint8 shows."""
    labels = np.full(image.shape[:2], BACKGROUND_LABEL, np.uint8)
    for detection, region in _find(image):
        labels[region] = SHAPE_LABELS[detection.shape]
    return labels


def _find(image: Image) -> Iterator[tuple[Detection, NDArray[np.bool_]]]:
    """Each object and the pixels (H, W) that belong to it."""
    H, W, _ = image.shape
    for color, region, strength in colored_regions(image, MIN_AREA):
        x, y = np.flatnonzero(region.any(0)), np.flatnonzero(region.any(1))
        x0, y0, x1, y1 = int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1
        shape, score = classify_shape((region * strength)[y0:y1, x0:x1])
        yield Detection(box=(x0 / W, y0 / H, x1 / W, y1 / H), color=color, shape=shape, score=score), region


def colored_regions(image: Image, least: float) -> Iterator[tuple[str, NDArray[np.bool_], Array]]:
    """The connected regions of a colour that fill this share of an image (H, W, 3) or more: the colour, the region's
    pixels (H, W), and how much of a colour there is in every pixel of the image, at most 1."""
    colors, strength = classify_colors(image)
    regions = label_regions(colors)
    areas = np.bincount(regions[regions >= 0])
    for label in np.flatnonzero(areas >= least * regions.size):
        region = regions == label
        yield tuple(COLORS)[colors[region][0]], region, np.minimum(strength, 1)


def classify_colors(image: Image) -> tuple[NDArray[np.int64], Array]:
    """For each pixel the number of its colour in COLORS, -1 for none, and how much of that colour there is.

    A colour is known by its hue. How much: chroma (largest less smallest channel) relative to the pure colour's,
    which is the share of a pixel that an object on grey covers; from one half on, the pixel is the object's.
    """
    hues, chroma = _hue_and_chroma(image.astype(np.float32))
    names, full = _hue_and_chroma(np.array(list(COLORS.values()), np.float32))
    apart = np.abs((hues[..., None] - names + 3) % 6 - 3)
    colors = apart.argmin(-1)
    strength = chroma / full[colors]
    return np.where(strength >= 0.5, colors, -1), strength


def _hue_and_chroma(rgb: Array) -> tuple[Array, Array]:
    """Hue in [0, 6) (0 red, 2 green, 4 blue) and chroma in 0..255 of (..., 3)."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    high = rgb.max(-1)
    chroma = high - rgb.min(-1)
    c = np.maximum(chroma, 1)
    return np.where(high == r, (g - b) / c % 6, np.where(high == g, (b - r) / c + 2, (r - g) / c + 4)), chroma


def label_regions(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers from 0 for the connected regions (8 neighbours) of equal class (H, W); -1 where the class is negative."""
    labels = components(classes + 1)
    return np.unique(np.append(labels, 0), return_inverse=True)[1][:-1].reshape(classes.shape) - 1


def classify_shape(mask: Array) -> tuple[str, float]:
    """The shape that a region (H, W), 0..1, is most like over all turns, and the correlation with it."""
    spectrum = np.fft.rfft(_polar(mask))
    templates, owners = _templates()
    likeness = np.fft.irfft(templates * spectrum.conj(), n=RAYS).sum(1).max(-1)
    best = int(likeness.argmax())
    return owners[best], float(likeness[best])


def _polar(mask: Array) -> Array:
    """The region on rings × rays around its centroid, scaled by its spread, less its mean and of norm 1.

    Rings are weighted by the area they stand for, so that a product of two is their correlation in the plane.
    """
    mask = np.pad(mask, 1)
    y, x = np.indices(mask.shape, np.float32)
    total = mask.sum()
    cx, cy = (mask * x).sum() / total, (mask * y).sum() / total
    spread = math.sqrt((mask * ((x - cx) ** 2 + (y - cy) ** 2)).sum() / total)
    radii = (np.arange(RINGS, dtype=np.float32)[:, None] + 0.5) * (REACH * spread / RINGS)
    turns = np.arange(RAYS) * (2 * math.pi / RAYS)
    px = np.clip(cx + radii * np.cos(turns), 0, mask.shape[1] - 1.001)
    py = np.clip(cy + radii * np.sin(turns), 0, mask.shape[0] - 1.001)
    ix, iy = px.astype(int), py.astype(int)
    fx, fy = px - ix, py - iy
    top = mask[iy, ix] * (1 - fx) + mask[iy, ix + 1] * fx
    bottom = mask[iy + 1, ix] * (1 - fx) + mask[iy + 1, ix + 1] * fx
    weights = np.arange(1, 2 * RINGS, 2)[:, None] / (RINGS**2 * RAYS)  # of each cell, sum 1
    values = top * (1 - fy) + bottom * fy
    values = (values - (values * weights).sum()) * np.sqrt(weights)
    return values / (np.linalg.norm(values) or 1)


@cache
def _templates() -> tuple[NDArray[np.complex128], list[str]]:
    """Spectra along the rays of each shape drawn at several sizes, and which shape each is."""
    spectra, owners = [], []
    for shape in SHAPES:
        for radius in (7, 10, 16):
            _, _, d = shape_patch(shape, (0.5, 0.5), radius / 64, 0.2, 64)
            spectra.append(np.fft.rfft(_polar(np.clip(0.5 - d, 0, 1))))
            owners.append(shape)
    return np.stack(spectra), owners


def coco_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """COCO results of image files: image_id is the number that a file is named, else its place in the list; a class is
    colour and shape, 'red star'; bbox x, y, width, height in pixels. Raises ValueError for what is no image."""
    results = []
    for i, path in enumerate(files):
        image = np.asarray(open_image(path).convert("RGB"))
        H, W, _ = image.shape
        number = int(path.stem) if path.stem.isdecimal() else i
        for found in detect(image):
            x0, y0, x1, y1 = found.box
            box = [x0 * W, y0 * H, (x1 - x0) * W, (y1 - y0) * H]
            name = f"{found.color} {found.shape}"
            result = {"image_id": number, "file_name": path.name, "category_name": name, "bbox": box}
            results.append(result | {"score": found.score})
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "python -m gligen.evaluation.detector", description="What is in images of the drawn world, as COCO results."
    )
    parser.add_argument("images", metavar="DIR", help="folder of .png images")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where the results go; replaced if there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    files = sorted(Path(args.images).glob("*.png"))
    if not files:
        raise ValueError(f"'{args.images}' holds no .png images")
    if not Path(args.out).parent.is_dir():
        raise ValueError(f"--out '{args.out}': there is no such folder")
    write_atomically(Path(args.out), json.dumps(coco_results(files)).encode())
    print(args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
