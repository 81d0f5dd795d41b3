"""Canny edges are those of the textbook written slowly; scribbles are few and thick."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gligen.data.edges import canny, components, scribble
from tests.data.sets import REAL, needs_voc, noise


def slow_canny(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Pixel by pixel: Sobel, the four directions, then hysteresis by flooding."""
    H, W = pixels.shape[:2]
    grey = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(int)

    def g(y: int, x: int) -> int:
        return int(grey[min(max(y, 0), H - 1), min(max(x, 0), W - 1)])

    dx, dy = np.zeros((H, W), int), np.zeros((H, W), int)
    for y in range(H):
        for x in range(W):
            for k, weight in ((-1, 1), (0, 2), (1, 1)):
                dx[y, x] += weight * (g(y + k, x + 1) - g(y + k, x - 1))
                dy[y, x] += weight * (g(y + 1, x + k) - g(y - 1, x + k))
    size = abs(dx) + abs(dy)

    def s(y: int, x: int) -> int:
        return int(size[y, x]) if 0 <= y < H and 0 <= x < W else 0

    thin = np.zeros((H, W), bool)
    for y in range(H):
        for x in range(W):
            here = s(y, x)
            angle = np.degrees(np.arctan2(abs(dy[y, x]), abs(dx[y, x])))
            if angle < 22.5:
                thin[y, x] = here > s(y, x - 1) and here >= s(y, x + 1)
            elif angle > 67.5:
                thin[y, x] = here > s(y - 1, x) and here >= s(y + 1, x)
            else:
                k = 1 if (dx[y, x] < 0) == (dy[y, x] < 0) else -1
                thin[y, x] = here > s(y - 1, x - k) and here > s(y + 1, x + k)
    edges = np.zeros((H, W), np.uint8)
    todo = [(y, x) for y in range(H) for x in range(W) if thin[y, x] and size[y, x] > high]
    while todo:
        y, x = todo.pop()
        if 0 <= y < H and 0 <= x < W and not edges[y, x] and thin[y, x] and size[y, x] > low:
            edges[y, x] = 255
            todo += [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return edges


@pytest.mark.parametrize("seed", range(4))
def test_canny_is_the_slow_one(seed):
    pixels = np.asarray(noise(48, 40, seed))
    expected = slow_canny(pixels, 100, 200)
    assert 30 < (expected > 0).sum() < 800
    # greys are rounded in fixed point: allow a pixel here and there whose grey is another
    assert (canny(pixels) != expected).mean() < 0.01


def test_canny_of_greys_is_exactly_the_slow_one():
    grey = np.asarray(noise(40, 40, 9).convert("L"))
    pixels = np.stack([grey] * 3, -1)
    assert (canny(pixels) == slow_canny(pixels, 100, 200)).all()
    assert canny(np.zeros((5, 7, 3), np.uint8)).max() == 0


@needs_voc
def test_canny_is_opencvs_on_photographs():
    """OpenCV's own Canny(100, 200) was run once on these: its number of edge pixels, and a checksum of where."""
    counts = {}
    for name in OPENCV:
        edges = canny(np.asarray(Image.open(REAL / "voc/images" / name)))
        y, x = np.nonzero(edges)
        counts[name] = (len(y), int((y * 7919 + x * 104729).sum() % 1_000_003))
    assert counts == OPENCV


OPENCV = {
    "2007_000027.jpg": (44986, 865860),
    "2007_000032.jpg": (13274, 517488),
    "2007_000123.jpg": (20250, 418620),
}


def test_components_hang_together_diagonally():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
    labels = components(mask)
    assert (labels > 0).tolist() == mask.tolist()
    assert labels[0, 0] == labels[1, 1]
    assert labels[0, 3] == labels[1, 3]
    assert labels[3, 0] == labels[3, 1]
    assert len({labels[0, 0], labels[0, 3], labels[3, 0], labels[3, 3]}) == 4
    spiral = np.ones((9, 9), bool)
    spiral[1, :8] = spiral[1:8, 7] = spiral[7, 1:8] = spiral[3:8, 1] = spiral[3, 1:6] = False
    assert len(np.unique(components(spiral))) == 2


def test_scribbles_are_thick_and_leave_out_what_is_small():
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 40, 200, 200), fill="black")
    draw.rectangle((230, 230, 233, 233), fill="black")
    strokes = scribble(np.asarray(image))
    assert strokes[215:, 215:].max() == 0
    assert set(np.unique(strokes)) == {0, 255}
    across = strokes[120]
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], across, [0]]).astype(int))))[::2]
    assert len(runs) == 2
    assert (runs >= 3).all()
