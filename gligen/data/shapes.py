"""The drawn world's vocabulary: eight shapes as signed distances, eight colours, and the pairs held out of training.

A shape is a function (u, v) -> distance to its outline, negative inside, with u to the right and v down, both in
units of the object's radius. Formulas use only + - * sqrt min max, which IEEE 754 rounds alike everywhere, so
that a scene has the same bytes on every machine. Distances are exact near straight and round outlines and a lower
bound beyond sharp corners, which is all that anti-aliasing needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32; NumPy's stubs believe that a Python float would widen it

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 225, 40),
    "green": (35, 150, 60),
    "cyan": (40, 205, 220),
    "blue": (35, 70, 210),
    "purple": (125, 45, 165),
    "pink": (250, 130, 190),
}


def circle(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 1


def square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def triangle(u: Array, v: Array) -> Array:
    """Equilateral, tip up, its corners 1.2 from the centre."""
    return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - 0.6


def star(u: Array, v: Array) -> Array:
    """Five points: all folded onto half of the upper one by three mirrors, then one straight edge."""
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = np.abs(u), -v
    t = 2 * np.maximum(c * x - s * y, 0)
    x, y = x - c * t, y + s * t
    t = 2 * np.maximum(-c * x - s * y, 0)
    x, y = x + c * t, y + s * t
    x = np.abs(x)
    tip, inner = 1.2, 0.58  # radii of the points and of the notches
    edge_x, edge_y = inner * s, inner * c - tip
    return ((y - tip) * edge_x - x * edge_y) / math.hypot(edge_x, edge_y)


def heart(u: Array, v: Array) -> Array:
    """Two circles on a square that stands on its corner."""
    x, y = 0.6 * np.abs(u), 0.55 - 0.6 * v  # the tip at (0, 0), the lobe's centre at (1/4, 3/4)
    lobe = np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(0.125)
    flank = np.maximum(x - y, x + y - 1) * math.sqrt(0.5)
    return np.minimum(lobe, flank) * (1 / 0.6)


def cross(u: Array, v: Array) -> Array:
    x, y = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.34)


def ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - 0.77) - 0.23


def crescent(u: Array, v: Array) -> Array:
    """A circle with a smaller one cut out of its right side."""
    x = u - 0.2
    return np.maximum(np.sqrt(x * x + v * v) - 1, 0.82 - np.sqrt((x - 0.55) ** 2 + v * v))


# each with its reach: the distance of its farthest point from the centre
SHAPES: dict[str, tuple[Callable[[Array, Array], Array], float]] = {
    "circle": (circle, 1.0),
    "square": (square, 1.21),
    "triangle": (triangle, 1.2),
    "star": (star, 1.2),
    "heart": (heart, 1.12),
    "cross": (cross, 1.06),
    "ring": (ring, 1.0),
    "crescent": (crescent, 1.13),
}

Pair = tuple[str, str]  # colour, shape
PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
# Never in the data that teaches grounding, although the base has seen them: each colour and each shape once.
HELD_OUT: tuple[Pair, ...] = (
    ("red", "ring"),
    ("orange", "crescent"),
    ("yellow", "square"),
    ("green", "heart"),
    ("cyan", "triangle"),
    ("blue", "star"),
    ("purple", "circle"),
    ("pink", "cross"),
)
SEEN: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


def phrase_of(color: str, shape: str) -> str:
    """The phrase of a pair: 'a red star', 'an orange ring'."""
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def distance(shape: str, x: Array, y: Array, radius: float, turn: float) -> Array:
    """Signed distance, in the units of x, y and radius, to a shape around (0, 0).

    x, y: float32 of shapes that broadcast, to the right and down. turn: radians, clockwise on the screen.
    """
    c, s = np.float32(math.cos(turn) / radius), np.float32(math.sin(turn) / radius)
    return SHAPES[shape][0](c * x + s * y, c * y - s * x) * np.float32(radius)
