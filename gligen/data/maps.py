"""Maps of a drawn scene, as the map modes' request files hold them; computed only when asked for.

All are made from the scene's geometry, not from its pixels, so they can be had at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from gligen.data.scenes import Image, Scene, SceneObject, shape_patch, wave
from gligen.data.shapes import SHAPES, Array
from gligen.data.streams import Purpose, rng

Grey = NDArray[np.uint8]  # (H, W)

BACKGROUND_LABEL = 0
SHAPE_LABELS: dict[str, int] = {shape: label for label, shape in enumerate(SHAPES, 1)}  # circle 1 … crescent 8
HED_WIDTH = 1 / 64  # of the side: where a soft outline has fallen to 1/e
STROKE_WIDTH = 1 / 24  # of the side, about
STROKE_STRAY = 1 / 64  # of the side: how far from the outline a stroke's middle may be


def semantic_map(scene: Scene, size: int | None = None) -> Grey:
    """Label ids: SHAPE_LABELS for objects, whatever their colour, and 0 around them."""
    labels = np.array([BACKGROUND_LABEL, *(SHAPE_LABELS[item.shape] for item in scene.objects)], np.uint8)
    return labels[_instances(scene, size)]


def depth_map(scene: Scene, size: int | None = None) -> Grey:
    """Nearness, as MiDaS gives it: black is far, and each object bulges a little towards the viewer."""
    side = size or scene.size
    canvas = np.zeros((side, side), np.float32)
    for item, rows, columns, d in _patches(scene, side):
        near = 255 * item.depth * (0.8 + 0.2 * np.maximum(_dome(item, d, side), 0))
        canvas[rows, columns] += np.clip(0.5 - d, 0, 1) * (near - canvas[rows, columns])
    return (canvas + 0.5).astype(np.uint8)


def normal_map(scene: Scene, size: int | None = None) -> Image:
    """Surface normals (right, up, towards the viewer) as RGB, 128 for 0: objects domed, 45° at their rim."""
    side = size or scene.size
    normals = np.zeros((side, side, 3), np.float32)
    normals[..., 2] = 1
    for item, rows, columns, d in _patches(scene, side):
        down, right = np.gradient(_dome(item, d, side) * (0.3 * item.radius * side))
        n = np.stack([-right, down, np.ones_like(d)], -1)
        n /= np.sqrt((n * n).sum(-1, keepdims=True))
        normals[rows, columns][d <= 0] = n[d <= 0]
    return (normals * 127.5 + 128).clip(0, 255).astype(np.uint8)


def canny_map(scene: Scene, size: int | None = None) -> Grey:
    """Outlines one pixel wide, 255 on 0, on the side of what lies on top."""
    top = _instances(scene, size)
    edges = np.zeros(top.shape, bool)
    for here, there, edge_here, edge_there in (
        (top[:, :-1], top[:, 1:], edges[:, :-1], edges[:, 1:]),
        (top[:-1], top[1:], edges[:-1], edges[1:]),
    ):
        edge_here |= here > there
        edge_there |= here < there
    return edges.astype(np.uint8) * 255


def hed_map(scene: Scene, size: int | None = None) -> Grey:
    """Soft outlines, white where an edge is, as holistically-nested edge detection draws them."""
    soft = canny_map(scene, size).astype(np.float32) / 255
    width = HED_WIDTH * len(soft)
    reach = math.ceil(2 * width)
    kernel = np.exp(-((np.arange(-reach, reach + 1, dtype=np.float32) / width) ** 2))
    for _ in range(2):  # down, then across
        padded = np.pad(soft, ((reach, reach), (0, 0)))
        soft = np.sum([weight * padded[k : k + len(soft)] for k, weight in enumerate(kernel)], axis=0).T
    return (255 * np.minimum(soft / kernel.sum(), 1) + 0.5).astype(np.uint8)  # a straight line is 255


def scribble_map(scene: Scene, size: int | None = None) -> Grey:
    """Thick strokes, 255 on 0, that follow outlines as a hand does: a little beside them, now wider, now thinner."""
    side = size or scene.size
    strokes = np.zeros((side, side), bool)
    hand = rng(scene.seed, scene.index, Purpose.STROKES)
    for _, rows, columns, d in _patches(scene, side, STROKE_WIDTH + STROKE_STRAY):
        stray, width = (_tremor(hand, rows, columns, side) for _ in range(2))
        d = d - STROKE_STRAY * side * stray  # of the outline as it is drawn
        strokes[rows, columns] &= d > 0  # what lies on top hides what is below
        strokes[rows, columns] |= np.abs(d) < STROKE_WIDTH / 2 * side * (1 + 0.3 * width)
    return strokes.astype(np.uint8) * 255


# by the names of the map modes (gligen.modes)
MAPS: dict[str, Callable[[Scene, int | None], NDArray[np.uint8]]] = {
    "sem": semantic_map,
    "depth": depth_map,
    "normal": normal_map,
    "canny": canny_map,
    "hed": hed_map,
    "scribble": scribble_map,
}


def _patches(scene: Scene, size: int, margin: float = 0.0) -> Iterator[tuple[SceneObject, slice, slice, Array]]:
    """Each object from back to front with its patch of the picture and the signed distance there, in pixels.

    margin: around the patch, as a fraction of the side.
    """
    if scene.people:
        raise ValueError("maps are made of scenes of shapes: this one has people")
    for item in scene.objects:
        yield item, *shape_patch(item.shape, item.center, item.radius, item.turn, size, margin * size)


def _instances(scene: Scene, size: int | None) -> NDArray[np.int64]:
    """(H, W): 0 for the background, i + 1 where object i is on top."""
    side = size or scene.size
    top = np.zeros((side, side), np.int64)
    for i, (_, rows, columns, d) in enumerate(_patches(scene, side), 1):
        top[rows, columns][d <= 0] = i
    return top


def _tremor(hand: np.random.Generator, rows: slice, columns: slice, size: int) -> Array:
    """Slow waves across a patch of the picture, in -1..1."""
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    y = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5)) / np.float32(size)
    waves = hand.random((3, 3)).astype(np.float32)
    each = [wave(8 * (u - np.float32(0.5)) * x + 8 * (v - np.float32(0.5)) * y + start) for u, v, start in waves]
    return sum(each[1:], start=each[0]) / np.float32(len(each))


def _dome(item: SceneObject, d: Array, size: int) -> Array:
    """Height over the plane: 0 at the outline, rising to 1 at 0.6 radii inside; negative outside."""
    t = np.minimum(-d / (0.6 * item.radius * size), 1)
    return t * (2 - t)
