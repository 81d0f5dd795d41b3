"""Random streams by name: every number drawn for data comes from `rng(series, n, purpose)`.

A series is an endless list of examples that nobody else draws from; users' seeds are added to it. Purposes keep apart
what is drawn about one example: its own geometry, its masks, its noise. They are words of a NumPy seed sequence, so
that streams of different words have nothing in common.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Series(IntEnum):
    """First seeds of the series, far from the small seeds of tests and from each other."""

    TRAINING = 1_000_000_000
    DIAGNOSIS = 2_000_000_000
    PREVIEW = 3_000_000_000
    MINIATURE_TRAINING = 4_000_000_000
    MINIATURE_HELD_OUT = 5_000_000_000
    EVALUATION = 6_000_000_000
    REFERENCE = 7_000_000_000
    BINDING = 8_000_000_000


class Purpose(IntEnum):
    """The purposes for which numbers are drawn about an example beside the drawn world's own geometry, which is the
    stream without a purpose.

    The numbers are part of what a seed means: changing one changes every picture drawn with it.
    """

    REFERENCE_FIRST = 1  # + the object's place in its scene: scenes have up to 4 objects
    PEOPLE = 8  # whole scenes of people
    KIND = 77  # shapes or people
    MASK = 78  # strokes of inpainting masks
    GEOMETRY = 79  # crops and flips of real pictures
    ORDER = 80  # of an epoch
    STROKES = 81  # how a hand strays from outlines
    MIXTURE = 82  # which source comes next
    SAMPLE = 1_000_003  # timesteps, noise and drops of a training sample


def rng(series: int, n: int, purpose: Purpose | int | None = None) -> np.random.Generator:
    """The stream of example n of a series (both whole, 0 or more) for a purpose; None is the example's own."""
    return np.random.default_rng((series, n) if purpose is None else (series, n, int(purpose)))
