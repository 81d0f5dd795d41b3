"""Epochs, mixtures and held-out parts: pure in the number, nothing repeated, nothing lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from gligen.data.example import NO_IMAGE, Example, Source
from gligen.data.geometry import Buckets
from gligen.data.order import (
    Bucketed,
    Joined,
    Mixed,
    Permutation,
    Shuffled,
    Subset,
    are_held_out,
    name_hash,
    picture_ids,
    split,
)


@dataclass(frozen=True)
class Numbers:
    """Examples whose captions are their numbers."""

    size: int | None
    name: str = ""

    def example(self, n: int) -> Example:
        if self.size is not None and not 0 <= n < self.size:
            raise IndexError(n)
        return Example(image=NO_IMAGE, caption=f"{self.name}{n}", key=self.key(n))

    def key(self, n: int) -> str:
        return f"{self.name}{n}.jpg"


def captions(source: Source, numbers: range) -> list[str]:
    return [source.example(n).caption for n in numbers]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_an_order_has_every_number_once(size):
    order = Permutation.draw(size, np.random.default_rng(size))
    assert sorted(order[i] for i in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


def test_orders_are_even():
    """Every number is equally often at every place: chi-squared of 6 numbers over 3000 orders."""
    counts = np.zeros((6, 6))
    for seed in range(3000):
        order = Permutation.draw(6, np.random.default_rng(seed))
        for i in range(6):
            counts[i, order[i]] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 52.6  # 99.9 % of the distribution with 25 degrees of freedom


def test_neighbours_are_scattered():
    order = Permutation.draw(100_000, np.random.default_rng(0))
    places = np.array([order[i] for i in range(2000)])
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.08  # 3.5 standard errors of 2000
    assert abs(places.mean() / 100_000 - 0.5) < 0.03


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_no_example_is_repeated_or_lost_in_an_epoch(readers):
    size, epochs = 30, 3
    shuffled = Shuffled(Numbers(size), series=5)
    seen: list[list[str]] = [[] for _ in range(epochs)]
    for reader in range(readers):  # each makes its own numbers, as processes do
        for k in range(reader, epochs * size, readers):
            seen[k // size].append(Shuffled(Numbers(size), series=5).example(k).caption)
    for epoch in seen:
        assert sorted(map(int, epoch)) == list(range(size))
    order = [captions(shuffled, range(size * e, size * (e + 1))) for e in range(epochs)]
    assert order[0] != order[1] != order[2]
    assert captions(Shuffled(Numbers(size), series=6), range(size)) != order[0]


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_mixtures_keep_shares_and_epochs(readers):
    sources = (Shuffled(Numbers(10, "a"), 1), Shuffled(Numbers(6, "b"), 2), Shuffled(Numbers(4, "c"), 3))
    mixed = Mixed(sources, (2, 1, 1), series=9)
    made = {k: mixed.example(k).caption for reader in range(readers) for k in range(reader, 400, readers)}
    listed = [made[k] for k in range(400)]
    for start in range(0, 400, 4):
        assert Counter(name[0] for name in listed[start : start + 4]) == {"a": 2, "b": 1, "c": 1}
    for name, size in (("a", 10), ("b", 6), ("c", 4)):
        own = [caption for caption in listed if caption[0] == name]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size
    assert len({tuple(name[0] for name in listed[s : s + 4]) for s in range(0, 400, 4)}) > 5


def test_weights_of_any_kind():
    a, b = Shuffled(Numbers(3, "a"), 1), Shuffled(Numbers(3, "b"), 2)
    counts = Counter(Mixed((a, b), (0.75, 0.25), 0).number(k)[0] for k in range(400))
    assert counts == {0: 300, 1: 100}
    counts = Counter(Mixed((a, b), (3.14159, 1), 0).number(k)[0] for k in range(5000))
    assert counts[0] / 5000 == pytest.approx(3.14159 / 4.14159, abs=1e-3)
    counts = Counter(Mixed((a, b), (100_000, 1), 0).number(k)[0] for k in range(5000))
    assert counts[1] >= 4
    for weights in ((1.0,), (1, 0), (1, float("nan")), (1, -1)):
        with pytest.raises(ValueError, match="weight"):
            Mixed((a, b), weights, 0)
    with pytest.raises(ValueError, match="endless"):
        Mixed((Numbers(3),), (1,), 0)


def test_shuffling_needs_a_finite_source():
    for size in (0, None):
        with pytest.raises(ValueError, match="nothing to shuffle"):
            Shuffled(Numbers(size), 0)


def test_added_pictures_move_no_other():
    train, out = split(Numbers(1000), 0.2)
    assert train.size + out.size == 1000
    assert abs(out.size - 200) < 45  # 3.5 standard deviations
    more_train, more_out = split(Numbers(1500), 0.2)
    assert {train.key(n) for n in range(train.size)} <= {more_train.key(n) for n in range(more_train.size)}
    assert {out.key(n) for n in range(out.size)} <= {more_out.key(n) for n in range(more_out.size)}
    larger = split(Numbers(1000), 0.3)[1]
    assert {out.key(n) for n in range(out.size)} <= {larger.key(n) for n in range(larger.size)}
    assert {example.caption for example in map(out.example, range(out.size))}.isdisjoint(
        example.caption for example in map(train.example, range(train.size))
    )


def test_one_picture_under_several_numbers_is_on_one_side():
    @dataclass(frozen=True)
    class Twice(Numbers):
        def key(self, n: int) -> str:
            return f"{n // 2}.jpg"

    train, out = split(Twice(400), 0.3)
    assert {train.key(n) for n in range(train.size)}.isdisjoint(out.key(n) for n in range(out.size))


@pytest.mark.parametrize("size", [10, 24, 60, 999])
def test_of_few_pictures_the_share_is_exact(size):
    for share in (0.1, 0.25, 0.3):
        train, out = split(Numbers(size), share)
        assert (train.size, out.size) == (size - round(share * size), round(share * size))
        larger = split(Numbers(size), 1.7 * share)[1]
        assert {out.key(n) for n in range(out.size)} <= {larger.key(n) for n in range(larger.size)}


def test_a_pictures_name_decides_without_folder_and_suffix_unless_others_have_it():
    @dataclass(frozen=True)
    class Listed(Numbers):
        keys: tuple[str, ...] = ()

        def key(self, n: int) -> str:
            return self.keys[n]

    def ids(*keys: str) -> list[int]:
        return picture_ids(Listed(len(keys), keys=keys)).tolist()

    a, b = name_hash("a"), name_hash("b.1")
    assert ids("a.jpg", "b.1.PNG") == ids("images/train/a.png", "b.1") == ids("set.tsv/a", "x/b.1.webp") == [a, b]
    x, y = name_hash("x"), name_hash("y")
    assert ids("x/a.jpg", "y/a.jpg", "y/b.1.jpg") == [a ^ x, a ^ y, b]
    assert ids("x/a.jpg", "x/a.jpg") == [a, a]  # one picture twice
    constant = np.arange(2000).astype(np.uint64) << np.uint64(53)
    assert are_held_out(constant, 0.5).sum() == 1024  # below half of 2^64


def test_a_split_with_an_empty_side_says_so():
    with pytest.raises(ValueError, match="leaves 3 to train on and 0 to compare with"):
        split(Numbers(3), 0.0)


def test_joined_sources_follow_each_other():
    joined = Joined((Numbers(2, "a"), Numbers(0, "b"), Numbers(3, "c")))
    assert joined.size == 5
    assert captions(joined, range(5)) == ["a0", "a1", "c0", "c1", "c2"]
    with pytest.raises(IndexError):
        joined.example(5)


def test_subsets_keep_their_order():
    subset = Subset(Numbers(10), np.array([7, 2, 5]))
    assert captions(subset, range(3)) == ["7", "2", "5"]
    with pytest.raises(IndexError):
        subset.example(3)


def test_batches_of_one_shape():
    """Every batch has one bucket, every bucket its share, and a bucket's epoch has each of its examples once."""
    shapes = [(100, 100)] * 8 + [(200, 100)] * 4 + [(100, 200)] * 4
    source = Bucketed.sort(
        Numbers(16), np.arange(16), shapes.__getitem__, Buckets(256), batch_size=2, series=3, wrap=lambda part: part
    )
    listed = [int(caption) for caption in captions(source, range(320))]
    batches = [listed[i : i + 2] for i in range(0, 320, 2)]
    assert all(shapes[a] == shapes[b] for a, b in batches)
    counts = Counter(listed)
    assert all(counts[n] == 20 for n in range(16))
    assert all(source.image_size(k) == Buckets(256).nearest(shapes[n]) for k, n in enumerate(listed))
