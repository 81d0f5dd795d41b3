"""The drawn world: endless pictures of coloured shapes, each a pure function of (seed, index).

A scene is kept as geometry in fractions of the picture's side, so the same scene can be drawn at any size, and what
else belongs to it (maps, reference pictures, requests) is made from it when asked for. About a third of a
millisecond a scene, so that no training waits for its data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gligen.data import streams
from gligen.data.shapes import COLORS, HELD_OUT, PAIRS, SEEN, SHAPES, Array, Pair, distance, phrase_of
from gligen.data.streams import Purpose
from gligen.request import Box, Person

Image = NDArray[np.uint8]  # (H, W, 3)
Pairs = Literal["all", "seen", "held-out"]
COUNTS = (1, 2, 2, 3, 3, 4)  # how many objects a scene has, drawn evenly from these
RADII = (7 / 64, 17 / 64)  # smallest and largest, so that objects are 14 to 34 of 64 pixels across
GAP = 1 / 64  # to the border, and between objects of one colour
MAX_TURN = math.radians(20)  # either way: things stand, as they do in photographs, or a shape would be all its turns


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One coloured shape. Lengths are fractions of the picture's side."""

    color: str
    shape: str
    phrase: str  # 'a red star'
    box: Box  # x0, y0, x1, y1 around the pixels it covers at least half, as if nothing lay over it
    center: tuple[float, float]
    radius: float
    turn: float  # radians, clockwise, -MAX_TURN to MAX_TURN
    rgb: tuple[float, float, float]  # its shade of the colour, 0..255
    depth: float  # 0 (background) to 1 (nearest)

    @property
    def pair(self) -> Pair:
        return self.color, self.shape

    @property
    def is_held_out(self) -> bool:
        return self.pair in HELD_OUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """Two greyish tones (0..255); the first fades into the second along `slope`, or is everywhere if slope is None."""

    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    slope: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture and all that is known about it. Objects lie as they are listed, the last one on top."""

    seed: int
    index: int
    size: int  # pixels a side
    image: Image
    caption: str
    objects: tuple[SceneObject, ...] = ()
    people: tuple[Person, ...] = ()  # 17 points each (gligen.request); make_people_scene
    background: Background


def make_scene(seed: int, index: int, *, size: int = 64, pairs: Pairs = "all", places: float = 0.25) -> Scene:
    """Scene `index` of the endless series `seed` (both whole, 0 or more).

    size: pixels a side, 16 or more. pairs: 'seen' has none of HELD_OUT; 'held-out' has at least one of them.
    places: share of captions that say coarsely where things are.
    Raises ValueError for a size or a kind of pairs that cannot be.
    """
    if size < 16 or pairs not in ("all", "seen", "held-out"):
        raise ValueError(f"size is {size}, pairs is {pairs!r}: give 16 or more, and 'all', 'seen' or 'held-out'")
    rng = streams.rng(seed, index)
    chosen = _choose_pairs(rng, COUNTS[int(rng.random() * len(COUNTS))], pairs)
    centers, radii = _place(rng, chosen)
    background = muted_background(rng)
    canvas = draw_background(background, size)
    objects = []
    for i, ((color, shape), center, radius) in enumerate(zip(chosen, centers, radii, strict=True)):
        turn, shade, depth = rng.random(3).tolist()
        rgb = _shade(COLORS[color], 0.16 * shade - 0.08)
        turn = _turn(turn)
        box = draw_shape(canvas, shape, center, radius, turn, rgb)
        objects.append(
            SceneObject(
                color=color,
                shape=shape,
                phrase=phrase_of(color, shape),
                box=box,
                center=center,
                radius=radius,
                turn=turn,
                rgb=rgb,
                depth=0.3 + 0.7 * (i + 0.2 + 0.6 * depth) / len(chosen),
            )
        )
    return Scene(
        seed=seed,
        index=index,
        size=size,
        image=to_image(canvas),
        caption=_caption(rng, objects, places),
        objects=tuple(objects),
        background=background,
    )


def detection_caption(scene: Scene) -> str:
    """The pseudo-caption that detection data gets: class names and commas, 'red star, blue ring'."""
    return ", ".join(f"{item.color} {item.shape}" for item in scene.objects)


def reference_image(scene: Scene, which: int, size: int | None = None) -> Image:
    """Object number `which` alone on a plain background, larger and with a turn of its own: a picture to ask with."""
    item = scene.objects[which]
    rng = streams.rng(scene.seed, scene.index, Purpose.REFERENCE_FIRST + which)
    turn, shade, radius, tone = rng.random(4).tolist()
    canvas = np.full((size or scene.size,) * 2 + (3,), 40 + 200 * tone, np.float32)
    radius = (0.33 + 0.11 * radius) / SHAPES[item.shape][1]
    rgb = _shade(COLORS[item.color], 0.16 * shade - 0.08)
    draw_shape(canvas, item.shape, (0.5, 0.5), radius, _turn(turn), rgb)
    return to_image(canvas)


def other_shapes(scene: Scene) -> Scene:
    """The same scene asked for wrongly: every object another shape of its colour, in its box. The image stays.

    Which one goes round all the others with the scene's index.
    """
    names = tuple(SHAPES)
    objects = []
    for i, item in enumerate(scene.objects):
        shape = names[(names.index(item.shape) + 1 + (scene.index + i) % (len(names) - 1)) % len(names)]
        objects.append(dataclasses.replace(item, shape=shape, phrase=phrase_of(item.color, shape)))
    return dataclasses.replace(scene, objects=tuple(objects))


def repaint(scene: Scene, objects: Sequence[SceneObject], caption: str) -> Scene:
    """The scene with these objects, drawn anew, and this caption."""
    canvas = draw_background(scene.background, scene.size)
    for item in objects:
        draw_shape(canvas, item.shape, item.center, item.radius, item.turn, item.rgb)
    return dataclasses.replace(scene, image=to_image(canvas), caption=caption, objects=tuple(objects))


def draw_background(background: Background, size: int) -> Array:
    """A canvas (size, size, 3), float32 in 0..255."""
    first, second = (np.array(tone, np.float32) for tone in background.tones)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = first
    if background.slope:
        x, y = background.slope
        steps = (np.arange(size, dtype=np.float32) + np.float32(0.5 - size / 2)) / np.float32(size * (abs(x) + abs(y)))
        ramp = np.float32(x) * steps + np.float32(y) * steps[:, None] + np.float32(0.5)
        canvas += ramp[..., None] * (second - first)
    return canvas + light(size)


@cache
def light(size: int) -> Array:
    """The light that falls on every background, (size, size, 3) in -33..33: soft patches of brightness, and a breath of
    colour.

    The same in every picture, as photographs have their sky above and their ground below: a model must know where
    a pixel is to predict it, and knowing where is what grounding builds on (gligen/training/positions.py).
    """
    steps = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return sum(
        wave(np.float32(x) * steps + np.float32(y) * steps[:, None] + np.float32(start))[..., None] * tint
        for x, y, start, tint in _LIGHT
    )  # type: ignore[return-value]  # of arrays, not the number 0


# waves across and down a picture, the first one's start, and what they do to red, green and blue
_LIGHT = (
    (2.3, 0.7, 0.15, np.array([12, 12, 12], np.float32)),
    (-0.8, 2.1, 0.60, np.array([12, 12, 12], np.float32)),
    (1.1, 0.3, 0.40, np.array([9, 0, 0], np.float32)),
    (-0.4, 0.9, 0.05, np.array([0, 9, 0], np.float32)),
    (0.7, -0.8, 0.80, np.array([0, 0, 9], np.float32)),
)


def wave(t: Array) -> Array:
    """A sine made of parabolas, period 1: no library's cosine, so that bytes are the same everywhere."""
    u = 2 * (t - np.floor(t)) - 1
    return 4 * u * (np.abs(u) - 1)


def draw_shape(
    canvas: Array,
    shape: str,
    center: tuple[float, float],
    radius: float,
    turn: float,
    rgb: tuple[float, float, float],
) -> Box:
    """Draws one shape onto the canvas (H = W, in place) and returns the box of the pixels it covers at least half."""
    size = len(canvas)
    rows, columns, d = shape_patch(shape, center, radius, turn, size)
    patch = canvas[rows, columns]
    patch += np.clip(np.float32(0.5) - d, 0, 1)[..., None] * (np.array(rgb, np.float32) - patch)
    covered = d <= 0
    x, y = np.flatnonzero(covered.any(0)), np.flatnonzero(covered.any(1))
    return (
        (columns.start + int(x[0])) / size,
        (rows.start + int(y[0])) / size,
        (columns.start + int(x[-1]) + 1) / size,
        (rows.start + int(y[-1]) + 1) / size,
    )


def shape_patch(
    shape: str, center: tuple[float, float], radius: float, turn: float, size: int, margin: float = 0.0
) -> tuple[slice, slice, Array]:
    """Rows and columns of the picture that a shape, a pixel and `margin` pixels around it fill, and the signed distance
    there.

    Lengths are fractions of the side; the distance is in pixels, taken at their centres.
    """
    reach = SHAPES[shape][1] * radius * size + 1 + margin
    x, y = center[0] * size, center[1] * size
    columns = slice(max(0, math.floor(x - reach)), min(size, math.ceil(x + reach)))
    rows = slice(max(0, math.floor(y - reach)), min(size, math.ceil(y + reach)))
    along = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - x)
    down = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    return rows, columns, distance(shape, along, down, radius * size, turn)


def to_image(canvas: Array) -> Image:
    return (canvas + np.float32(0.5)).astype(np.uint8)


def muted_background(rng: np.random.Generator) -> Background:
    """Two greys with a breath of a tint: far from the saturation of any object."""
    graded, angle, level, step, *tints = rng.random(10).tolist()
    levels = level, min(1.0, max(0.0, level + 0.7 * (step - 0.5)))
    first, second = (
        tuple(48 + 160 * base + 16 * (tint - 0.5) for tint in three)
        for base, three in zip(levels, (tints[:3], tints[3:]), strict=True)
    )
    if graded < 0.4:
        return Background(tones=(first, first), slope=None)
    return Background(tones=(first, second), slope=(math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)))


def _turn(u: float) -> float:
    """An even draw from [0, 1) as an angle from -MAX_TURN to MAX_TURN."""
    return MAX_TURN * (2 * u - 1)


def _shade(rgb: tuple[int, int, int], amount: float) -> tuple[float, float, float]:
    """The colour moved by this fraction towards white, or towards black where it is negative."""
    r, g, b = (c + (255 - c if amount > 0 else c) * amount for c in rgb)
    return r, g, b


def _choose_pairs(rng: np.random.Generator, count: int, pairs: Pairs) -> list[Pair]:
    """Different pairs, so that every phrase of a scene means one object."""
    source = SEEN if pairs == "seen" else PAIRS
    chosen: list[Pair] = []
    if pairs == "held-out":
        chosen.append(HELD_OUT[int(rng.random() * len(HELD_OUT))])
    while len(chosen) < count:
        pair = source[int(rng.random() * len(source))]
        if pair not in chosen:
            chosen.append(pair)
    return chosen


def _place(rng: np.random.Generator, pairs: Sequence[Pair]) -> tuple[list[tuple[float, float]], list[float]]:
    """Centres and radii such that circles around the objects hardly overlap, and not at all within one colour.

    Sizes are drawn first; they shrink together whenever some object finds no room.
    """
    low, high = RADII
    high -= (high - low) * 0.15 * (len(pairs) - 1)
    radii = [low + (high - low) * u for u in rng.random(len(pairs)).tolist()]
    while True:
        placed: list[tuple[float, float, float, str]] = []
        for (color, shape), radius in zip(pairs, radii, strict=True):
            reach = SHAPES[shape][1] * radius
            room = 1 - 2 * (reach + GAP)
            for _ in range(20):
                x, y = reach + GAP + room * rng.random(), reach + GAP + room * rng.random()
                if all(
                    math.hypot(x - x1, y - y1) >= (reach + reach1 + GAP if color == color1 else 0.92 * (reach + reach1))
                    for x1, y1, reach1, color1 in placed
                ):
                    placed.append((x, y, reach, color))
                    break
            else:
                break
        if len(placed) == len(pairs):
            return [(x, y) for x, y, _, _ in placed], radii
        radii = [max(low, 0.93 * radius) for radius in radii]


def _caption(rng: np.random.Generator, objects: Sequence[SceneObject], places: float) -> str:
    """One of several wordings, naming the objects in any order."""
    placed, wording, relation, *order = rng.random(3 + len(objects)).tolist()
    items = [item for _, item in sorted(zip(order, objects, strict=True), key=lambda pair: pair[0])]
    phrases = [item.phrase for item in items]
    if placed < places:
        if len(items) == 2 and relation < 0.5:
            return f"{phrases[0]} {_relation(items[0].center, items[1].center)} {phrases[1]}"
        phrases = [f"{item.phrase} {_whereabouts(item.center)}" for item in items]
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    return WORDINGS[int(wording * len(WORDINGS))].format(listed)


WORDINGS = ("{}", "{}", "a picture of {}", "a drawing with {}", "{} on a plain background", "we see {}")


def _whereabouts(center: tuple[float, float]) -> str:
    dx, dy = center[0] - 0.5, center[1] - 0.5
    if max(abs(dx), abs(dy)) < 0.1:
        return "in the middle"
    side, height = "left" if dx < 0 else "right", "top" if dy < 0 else "bottom"
    if min(abs(dx), abs(dy)) > 0.5 * max(abs(dx), abs(dy)):
        return f"at the {height} {side}"
    return f"on the {side}" if abs(dx) > abs(dy) else f"at the {height}"


def _relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"
