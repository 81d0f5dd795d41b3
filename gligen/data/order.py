"""In which order examples come: shuffled epochs, mixtures of sources, held-out parts, batches of one shape.

All are pure functions of the sample's number, so that any process can make any sample, nothing is held but a few
numbers, and a run resumes from one: sample k of two processes is the same as of one.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gligen.data.example import Example, Hashed, Named, Source
from gligen.data.geometry import Buckets
from gligen.data.pictures import SUFFIXES
from gligen.data.streams import Purpose, rng

_ROUNDS = 8
_MASK = (1 << 64) - 1
_SLOTS = 1000  # in a mixture's block, where weights are no small whole numbers
_AT_ONCE = 1 << 14  # names, as Python's numbers, before they are packed
_FEW = 1000  # pictures, of which a share is counted out: chance would miss it by a tenth and more


@dataclass(frozen=True)
class Permutation:
    """An order of 0 … size - 1 without a list of it: a Feistel network on the next power of four, walked until inside.

    Source: Black and Rogaway, 'Ciphers with arbitrary finite domains' (CT-RSA 2002), cycle walking.
    """

    size: int
    keys: tuple[int, ...]

    @classmethod
    def draw(cls, size: int, generator: np.random.Generator) -> Permutation:
        """Raises ValueError for a size below 1."""
        if size < 1:
            raise ValueError(f"an order of {size} examples: there must be at least one")
        return cls(size, tuple(int(key) for key in generator.integers(0, 2**63, _ROUNDS)))

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"place {i} of {self.size}")
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        low = (1 << half) - 1
        while True:
            left, right = i >> half, i & low
            for key in self.keys:
                left, right = right, left ^ (_scramble(right + key) >> (64 - half))
            i = left << half | right
            if i < self.size:
                return i


def _scramble(x: int) -> int:
    """SplitMix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=256)
def _epoch(size: int, series: int, epoch: int) -> Permutation:
    return Permutation.draw(size, rng(series, epoch, Purpose.ORDER))


@runtime_checkable
class Sized(Protocol):
    """Says of its samples which size they are to have, so that those of a batch have one."""

    def image_size(self, n: int) -> tuple[int, int]:
        """Width and height in pixels."""


class Endless:
    """A source without end."""

    @property
    def size(self) -> None:
        """There is no last example."""


@dataclass(frozen=True, eq=False)
class Renumbered(ABC):
    """A source of another one's examples by other numbers."""

    source: Source

    @abstractmethod
    def number(self, n: int) -> int:
        """The source's number of example n."""

    def example(self, n: int) -> Example:
        return self.source.example(self.number(n))

    def key(self, n: int) -> str:
        return self.source.key(self.number(n))


@dataclass(frozen=True, eq=False)
class Several(ABC):
    """A source of the examples of several."""

    sources: tuple[Source, ...]

    @abstractmethod
    def number(self, n: int) -> tuple[int, int]:
        """The place of the source that example n comes from, and its number there."""

    def example(self, n: int) -> Example:
        source, number = self.number(n)
        return self.sources[source].example(number)

    def key(self, n: int) -> str:
        source, number = self.number(n)
        return self.sources[source].key(number)


@dataclass(frozen=True)
class Shuffled(Endless, Renumbered):
    """A finite source without end: every epoch has every example once, in an order of its own.

    series: whose stream orders are drawn from (gligen.data.streams), the user's seed added.
    """

    series: int

    def __post_init__(self) -> None:
        if not self.source.size:
            raise ValueError("nothing to shuffle: the source has no examples, or no end")

    def number(self, n: int) -> int:
        size = self.source.size
        assert size is not None  # checked when made
        epoch, place = divmod(n, size)
        return _epoch(size, self.series, epoch)[place]


@dataclass(frozen=True)
class Mixed(Endless, Several):
    """Endless sources in shares: in every block of samples each has exactly its part, in a drawn order.

    weights: above 0; samples come in this proportion, exactly where blocks of up to 1000 allow it, else to 1/1000.
    run: how many samples in a row come from one source, such as a batch.
    """

    weights: tuple[float, ...]
    series: int
    run: int = 1

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise ValueError(f"{len(self.sources)} sources and {len(self.weights)} weights: give one for each")
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"a weight is {weight}: give numbers above 0")
        for source in self.sources:
            if source.size is not None:
                raise ValueError("a mixture is of endless sources: shuffle those that end")

    def number(self, n: int) -> tuple[int, int]:
        turn, place = divmod(n, self.run)
        counts = _shares(self.weights)
        block, slot = divmod(turn, sum(counts))
        source, before = _block(counts, self.series, block)[slot]
        return source, (block * counts[source] + before) * self.run + place

    def image_size(self, n: int) -> tuple[int, int]:
        """Width and height that sample n is to have, where the sources are bucketed."""
        source, number = self.number(n)
        sized = self.sources[source]
        assert isinstance(sized, Sized)  # the mixture's maker knows
        return sized.image_size(number)


@lru_cache(maxsize=256)
def _shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """How many slots of a block each source gets, at least one."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * whole) for weight in exact]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) <= _SLOTS:
        return tuple(counts)
    total = sum(exact)
    return tuple(max(1, round(weight / total * _SLOTS)) for weight in exact)


@lru_cache(maxsize=1024)
def _block(counts: tuple[int, ...], series: int, block: int) -> list[tuple[int, int]]:
    """For each slot of a block: its source, and how many slots before it have the same."""
    slots = np.repeat(np.arange(len(counts)), counts)
    slots = rng(series, block, Purpose.MIXTURE).permutation(slots)
    seen = [0] * len(counts)
    result = []
    for source in slots.tolist():
        result.append((source, seen[source]))
        seen[source] += 1
    return result


@dataclass(frozen=True, eq=False)
class Subset(Renumbered):
    """Some examples of a source, by their numbers, in that order."""

    numbers: NDArray[np.int64]

    @property
    def size(self) -> int:
        return len(self.numbers)

    def number(self, n: int) -> int:
        if not 0 <= n < len(self.numbers):
            raise IndexError(f"example {n} of {len(self.numbers)}")
        return int(self.numbers[n])


def name_hash(name: str) -> int:
    """64 bits of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest())


def path_hashes(path: str) -> tuple[int, int]:
    """Hashes of a picture's name, without folder and picture suffix, and of its whole path without the suffix: that of
    the name xor that of the folder, of which there are few."""
    stem, dot, suffix = path.rpartition(".")
    if dot and f".{suffix.lower()}" in SUFFIXES:
        path = stem
    folder, _, name = path.rpartition("/")
    hashed = name_hash(name)
    return hashed, hashed ^ _folder_hash(folder)


_folder_hash = lru_cache(maxsize=4096)(name_hash)


def picture_path(source: Source) -> Callable[[int], str]:
    """What gives the path of each example's picture, as far as the source knows it."""
    return source.picture_name if isinstance(source, Named) else source.key


def hash_paths(path: Callable[[int], str], size: int) -> NDArray[np.uint64]:
    """The `path_hashes` (size, 2) of the paths of pictures 0 … size - 1."""
    found = np.empty((size, 2), np.uint64)
    for start in range(0, size, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, size))
        found[start : numbers.stop] = np.array([path_hashes(path(n)) for n in numbers], np.uint64)
    return found


def name_hashes(source: Source) -> NDArray[np.uint64]:
    """The `path_hashes` (size, 2) of a finite source's pictures."""
    if isinstance(source, Hashed):
        return source.name_hashes()
    assert source.size is not None  # of finite sources
    return hash_paths(picture_path(source), source.size)


def picture_ids(source: Source) -> NDArray[np.uint64]:
    """Numbers (size,) that tell a finite source's pictures apart, and are the same in whatever format and folder they
    lie: hashes of their names; of their paths where several pictures have a name."""
    names, paths = name_hashes(source).T
    order = np.argsort(names)
    sorted_names = names[order]
    same = np.flatnonzero(sorted_names[1:] == sorted_names[:-1])  # as the next
    shared = sorted_names[same[paths[order[same]] != paths[order[same + 1]]]]
    return np.where(np.isin(names, shared), paths, names) if len(shared) else names.copy()


def are_held_out(ids: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which of a set's pictures are in its held-out part, by their `picture_ids`.

    Of fewer than 1000 pictures the share is exact to a picture. Of more it is about the share, and a picture's name
    alone decides: those that are added move no other. Either way a larger share holds out what a smaller one does and
    more.
    """
    pictures = np.unique(ids[: 100 * _FEW])  # of millions, sorting all would take long
    if len(ids) > 100 * _FEW > 100 * len(pictures):
        pictures = np.unique(ids)
    if len(pictures) >= _FEW:
        return ids < np.uint64(min(int(share * 2**64), 2**64 - 1))
    count = round(share * len(pictures))
    return ids <= pictures[count - 1] if count else np.zeros(len(ids), bool)


def split(source: Source, share: float) -> tuple[Subset, Subset]:
    """A finite source's (training part, held-out part), see `are_held_out`. Raises ValueError unless both have
    examples."""
    if source.size is None:
        raise ValueError("an endless source has no held-out part")
    out = are_held_out(picture_ids(source), share)
    parts = Subset(source, np.flatnonzero(~out)), Subset(source, np.flatnonzero(out))
    check_parts(parts[0].size, parts[1].size, share)
    return parts


def check_parts(training: int, held_out: int, share: float) -> None:
    """Raises ValueError unless both parts of a split set have examples."""
    if not (training and held_out):
        raise ValueError(
            f"holding out {share:.1%} of {training + held_out} examples leaves {training} to train on and {held_out} "
            "to compare with: give more pictures or another share"
        )


@dataclass(frozen=True)
class Repeated(Endless, Renumbered):
    """A finite source without end: its examples in their order, again and again."""

    def number(self, n: int) -> int:
        assert self.source.size  # of finite sources
        return n % self.source.size


@dataclass(frozen=True)
class Joined(Several):
    """Finite sources one after the other, as one."""

    @property
    def size(self) -> int:
        return self._ends()[-1]

    def number(self, n: int) -> tuple[int, int]:
        ends = self._ends()
        if not 0 <= n < ends[-1]:
            raise IndexError(f"example {n} of {ends[-1]}")
        which = bisect_right(ends, n)
        return which, n - (ends[which - 1] if which else 0)

    def _ends(self) -> list[int]:
        sizes = [source.size for source in self.sources]
        if None in sizes:
            raise ValueError("an endless source has nothing after it")
        return np.cumsum([size or 0 for size in sizes]).tolist()


@dataclass(frozen=True)
class Bucketed(Mixed):
    """A finite source without end: `batch_size` samples from a multiple of it have one size, to be stacked.

    sources: the examples of each bucket, whose size is in `sizes`. Each has epochs of its own, and its examples' share
    of the batches.
    """

    sizes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def sort(
        cls,
        source: Source,
        numbers: NDArray[np.int64],
        shape: Callable[[int], tuple[int, int]],
        buckets: Buckets,
        *,
        batch_size: int,
        series: int,
        wrap: Callable[[Source], Source],
    ) -> Bucketed:
        """Buckets of some examples of a source. shape: width and height of example n's picture. wrap: put around each
        bucket, so that what stands in for a bad example is of its bucket."""
        order = {size: i for i, size in enumerate(buckets.sizes)}
        where = np.fromiter((order[buckets.nearest(shape(int(n)))] for n in numbers), np.int16, len(numbers))
        used = [i for i in range(len(order)) if (where == i).any()]
        parts = [wrap(Subset(source, numbers[where == i])) for i in used]
        return cls(
            sources=tuple(Shuffled(part, series + i) for i, part in enumerate(parts)),
            weights=tuple(part.size or 0 for part in parts),
            series=series,
            run=batch_size,
            sizes=tuple(buckets.sizes[i] for i in used),
        )

    def image_size(self, n: int) -> tuple[int, int]:
        """Width and height that sample n is to have."""
        return self.sizes[self.number(n)[0]]
