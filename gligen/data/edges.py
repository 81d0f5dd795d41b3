"""Canny edges and scribbles made from a picture, for map modes without a folder of maps.

Source: Canny, 'A computational approach to edge detection' (1986), in the form that the published canny model was
trained with: OpenCV's Canny(100, 200) on grey, which does not blur, takes Sobel gradients and their L1 norm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gligen.data.example import Pixels

LOW, HIGH = 100, 200
_TAN_22 = 13573  # the tangent of 22.5 degrees times 2¹⁵, rounded as OpenCV has it
SCRIBBLE_BLUR = 1 / 128  # of the shorter side: what is smaller is no stroke
SCRIBBLE_LENGTH = 1 / 12  # of the shorter side, in edge pixels: shorter strokes are left out
SCRIBBLE_WIDTH = 1 / 100  # of the shorter side

Grey = NDArray[np.uint8]  # (H, W), 0 or 255


def canny(pixels: Pixels, low: float = LOW, high: float = HIGH) -> Grey:
    """Edges one pixel wide, 255 on 0: gradients above `high`, and those above `low` that hang together with them."""
    r, g, b = (pixels[..., i].astype(np.int32) for i in range(3))
    grey = (9798 * r + 19235 * g + 3735 * b + (1 << 14)) >> 15  # as OpenCV rounds 0.299, 0.587, 0.114
    p = np.pad(grey, 1, mode="edge")
    right, left = p[:, 2:], p[:, :-2]
    below, above = p[2:], p[:-2]
    dx = (right - left)[:-2] + 2 * (right - left)[1:-1] + (right - left)[2:]
    dy = (below - above)[:, :-2] + 2 * (below - above)[:, 1:-1] + (below - above)[:, 2:]
    size = np.abs(dx) + np.abs(dy)

    around = np.pad(size, 1)
    H, W = size.shape

    def at(down: int, along: int) -> NDArray[np.int32]:
        return around[1 + down : 1 + down + H, 1 + along : 1 + along + W]

    ax, ay = np.abs(dx), np.abs(dy) << 15
    is_across, is_upright = ay < ax * _TAN_22, ay > ax * (_TAN_22 + (2 << 15))
    falls = (dx ^ dy) >= 0  # the gradient points right and down, or left and up
    thin = np.where(
        is_across,
        (size > at(0, -1)) & (size >= at(0, 1)),
        np.where(
            is_upright,
            (size > at(-1, 0)) & (size >= at(1, 0)),
            np.where(
                falls,
                (size > at(-1, -1)) & (size > at(1, 1)),
                (size > at(-1, 1)) & (size > at(1, -1)),
            ),
        ),
    )
    weak = thin & (size > low)
    labels = components(weak)
    strong = np.zeros(labels.max() + 1, bool)
    strong[labels[weak & (size > high)]] = True
    strong[0] = False
    return strong[labels].astype(np.uint8) * 255


def scribble(pixels: Pixels) -> Grey:
    """Thick strokes, 255 on 0, along the long edges of the picture: about what a person would draw after it."""
    side = min(pixels.shape[:2])
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(SCRIBBLE_BLUR * side))
    labels = components(canny(np.asarray(blurred), LOW / 2, HIGH / 2) > 0)
    long = np.bincount(labels.ravel()) >= SCRIBBLE_LENGTH * side
    long[0] = False
    strokes = Image.fromarray(long[labels].astype(np.uint8) * 255)
    width = 2 * round(SCRIBBLE_WIDTH * side / 2) + 1
    return np.asarray(strokes.filter(ImageFilter.MaxFilter(width)))


MAKERS = {"canny": canny, "scribble": scribble}


def components(classes: NDArray[np.integer | np.bool_]) -> NDArray[np.int64]:
    """Labels (H, W) of what is of one class and hangs together, diagonals too: 0 for class 0, else from 1, smaller ones
    for what begins before."""
    number = np.zeros(classes.shape, np.int64)
    count = np.count_nonzero(classes)
    number[classes != 0] = np.arange(1, count + 1)
    H, W = classes.shape
    pairs = []
    for down, along in ((0, 1), (1, -1), (1, 0), (1, 1)):
        here = np.s_[: H - down, max(0, -along) : W - max(0, along)]
        there = np.s_[down:, max(0, along) : W - max(0, -along)]
        same = (classes[here] == classes[there]) & (number[here] > 0)
        pairs.append(np.stack([number[here][same], number[there][same]]))
    a, b = np.concatenate(pairs, 1)
    parent = np.arange(count + 1)
    while True:  # hang the larger root below the smaller, then shorten all ways to the roots
        root_a, root_b = parent[a], parent[b]
        if (root_a == root_b).all():
            return parent[number]
        np.minimum.at(parent, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while (parent[parent] != parent).any():
            parent = parent[parent]
