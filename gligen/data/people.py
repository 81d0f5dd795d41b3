"""Drawn people: stick figures with COCO's 17 keypoints, whose limbs have eight colours so that keypoints can be seen.

Each of the eight colours is one limb of every figure, as in the skeletons that pose estimators draw; heads and
trunks are grey. Figures face the viewer, so a person's left is on the picture's right.
"""

from __future__ import annotations

import math

import numpy as np

from gligen.data import streams
from gligen.data.scenes import Scene, draw_background, muted_background, to_image
from gligen.data.shapes import COLORS, Array
from gligen.data.streams import Purpose

Point = tuple[float, float]

# COCO's keypoints at both ends of each limb, the one nearer to the trunk first
LIMBS: dict[str, tuple[int, int]] = {
    "red": (5, 7),
    "orange": (7, 9),
    "blue": (6, 8),
    "cyan": (8, 10),
    "green": (11, 13),
    "yellow": (13, 15),
    "purple": (12, 14),
    "pink": (14, 16),
}
LIMB_WIDTH = 0.075  # this and all below are fractions of a figure's height

# Degrees outwards from hanging down: upper and lower part of one arm, the other arm, one leg, the other leg.
POSES: dict[str, tuple[float, ...]] = {
    "standing": (20, 25, 20, 25, 6, 6, 6, 6),
    "waving": (115, 160, 20, 25, 6, 6, 8, 8),
    "cheering": (140, 160, 140, 160, 12, 12, 12, 12),
    "stretching": (90, 90, 90, 90, 15, 15, 15, 15),
    "jumping": (125, 135, 125, 135, 38, 20, 38, 20),
    "kicking": (60, 60, 40, 60, 70, 75, 4, 4),
    "flexing": (80, 170, 80, 170, 10, 10, 10, 10),
}


def make_people_scene(seed: int, index: int, *, size: int = 64) -> Scene:
    """Picture `index` of the endless series `seed` of one or two people; a keypoint beyond the border is None.

    size: pixels a side, 16 or more.
    """
    if size < 16:
        raise ValueError(f"size is {size}: give 16 pixels or more")
    rng = streams.rng(seed, index, Purpose.PEOPLE)
    background = muted_background(rng)
    canvas = draw_background(background, size)
    count = 1 if rng.random() < 0.6 else 2
    people, doing = [], []
    for i in range(count):
        u = rng.random(6).tolist()
        height = 0.66 + 0.28 * u[0] if count == 1 else 0.52 + 0.2 * u[0]
        x = 0.5 + 0.3 * (u[1] - 0.5) if count == 1 else 0.26 + 0.48 * i + 0.08 * (u[1] - 0.5)
        is_cut_off = u[2] < 0.2
        top = 0.05 + 0.6 * u[3] if is_cut_off else 0.03 + (0.94 - height) * u[3]
        pose = tuple(POSES)[int(u[4] * len(POSES))]
        points = _figure(rng, pose, (x, top), height, is_mirrored=u[5] < 0.5)
        tone = 235.0 if sum(background.tones[0]) < 3 * 128 else 45.0
        _draw_figure(canvas, points, height, tone)
        people.append(tuple(p if min(*p, 1 - p[0], 1 - p[1]) >= 0 else None for p in points))
        doing.append(pose)
    return Scene(
        seed=seed,
        index=index,
        size=size,
        image=to_image(canvas),
        caption=_caption(rng, doing),
        people=tuple(people),
        background=background,
    )


def _figure(rng: np.random.Generator, pose: str, top: Point, height: float, *, is_mirrored: bool) -> list[Point]:
    """17 points in fractions of the picture, which may lie outside it. top: where the crown of the head is."""
    angles = [angle + 16 * (u - 0.5) for angle, u in zip(POSES[pose], rng.random(8).tolist(), strict=True)]
    if is_mirrored:
        angles = [*angles[2:4], *angles[:2], *angles[6:8], *angles[4:6]]
    look = 0.03 * (2 * rng.random() - 1)

    points: list[Point] = [(look, 0.1), (look + 0.035, 0.08), (look - 0.035, 0.08), (0.08, 0.095), (-0.08, 0.095)]
    limbs: list[list[Point]] = [[], [], []]
    for start, lengths, at in (((0.11, 0.23), (0.17, 0.16), 0), ((0.07, 0.53), (0.22, 0.21), 4)):
        for side, (upper, lower) in ((1, angles[at : at + 2]), (-1, angles[at + 2 : at + 4])):
            x, y = side * start[0], start[1]
            chain = [(x, y)]
            for length, angle in zip(lengths, (upper, lower), strict=True):
                x += side * length * math.sin(math.radians(angle))
                y += length * math.cos(math.radians(angle))
                chain.append((x, y))
            for row, point in zip(limbs, chain, strict=True):
                row.append(point)
    arms, legs = [p for row in limbs for p in row[:2]], [p for row in limbs for p in row[2:]]
    return [(top[0] + height * x, top[1] + height * y) for x, y in points + arms + legs]


def _draw_figure(canvas: Array, points: list[Point], height: float, tone: float) -> None:
    grey = (tone, tone, tone)
    width = LIMB_WIDTH * height
    head, neck, hip = (_middle(points[i], points[i + 1]) for i in (3, 5, 11))
    for start, end in ((neck, hip), (points[5], points[6]), (points[11], points[12])):
        _draw_line(canvas, start, end, width, grey)
    for color, (a, b) in reversed(LIMBS.items()):  # arms over legs
        _draw_line(canvas, points[a], points[b], width, COLORS[color])
    _draw_line(canvas, head, head, 0.17 * height, grey)
    for eye in points[1:3]:
        _draw_line(canvas, eye, eye, 0.035 * height, (255 - tone,) * 3)


def _middle(a: Point, b: Point) -> Point:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def _draw_line(canvas: Array, a: Point, b: Point, width: float, rgb: tuple[float, float, float]) -> None:
    """A line with round ends, in place; a = b gives a disc."""
    size = len(canvas)
    reach = width / 2 + 1 / size
    columns, rows = (
        slice(max(0, math.floor((min(a[k], b[k]) - reach) * size)), max(0, math.ceil((max(a[k], b[k]) + reach) * size)))
        for k in (0, 1)
    )
    patch = canvas[rows, columns]
    if not patch.size:
        return
    x = (np.arange(columns.start, columns.start + patch.shape[1], dtype=np.float32) + 0.5) / size - a[0]
    y = (np.arange(rows.start, rows.start + patch.shape[0], dtype=np.float32)[:, None] + 0.5) / size - a[1]
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy or 1), 0, 1)
    d = (np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2) - width / 2) * size
    patch += np.clip(0.5 - d, 0, 1)[..., None] * (np.array(rgb, np.float32) - patch)


def _caption(rng: np.random.Generator, doing: list[str]) -> str:
    wording = int(3 * rng.random())
    if len(doing) == 1:
        return ("a person {}", "a stick figure {}", "a picture of a person {}")[wording].format(doing[0])
    if doing[0] == doing[1]:
        return ("two people {}", "two stick figures {}", "a picture of two people {}")[wording].format(doing[0])
    return ("two people, one {} and one {}", "a person {} and a person {}", "two stick figures, one {} and one {}")[
        wording
    ].format(*doing)
