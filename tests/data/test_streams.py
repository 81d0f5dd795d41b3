"""Random streams: series far apart, purposes without anything in common."""

from __future__ import annotations

import itertools

import numpy as np

from gligen.data.streams import Purpose, Series, rng


def test_series_are_kept_apart() -> None:
    assert min(np.diff(sorted(Series))) >= 10**9  # a seed, which is added to them, is smaller


def test_every_purpose_has_a_stream_of_its_own() -> None:
    """Also those of a scene's four reference pictures, one of which once drew what an inpainting mask did."""
    words = [None, *(Purpose.REFERENCE_FIRST + which for which in range(4))]
    words += [purpose for purpose in Purpose if purpose != Purpose.REFERENCE_FIRST]
    assert len(set(words)) == len(words)
    drawn = [tuple(rng(Series.TRAINING, 5, word).random(4)) for word in words]
    assert all(a != b for a, b in itertools.combinations(drawn, 2))


def test_a_stream_is_numpys_of_its_words() -> None:
    assert rng(7, 3).random() == np.random.default_rng([7, 3]).random()
    assert rng(7, 3, Purpose.MASK).random() == np.random.default_rng([7, 3, 78]).random()
