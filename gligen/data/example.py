"""One training example, and where examples come from: the seam between anybody's pictures and what trains on them.

A `Source` gives examples by number; what reads them (gligen/training/batches.py, `python -m gligen.data`) knows neither
files nor formats. A source says once, when it is opened, what it found and what it left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gligen.request import Entity, Person

Pixels = NDArray[np.uint8]  # (H, W, 3)
Map = NDArray[np.uint8]  # (H, W) labels or greys, (H, W, 3) colours
Features = NDArray[np.float32]  # (F,)
Latents = tuple[NDArray[np.float32], NDArray[np.float32]]  # mean and log-variance (C, h, w), unscaled
NO_IMAGE = np.zeros((0, 0, 3), np.uint8)
SAMPLED = 1000  # examples that are read for a fingerprint, where it would take too long to read all


def sampled(size: int) -> list[int]:
    """At most SAMPLED numbers below `size`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(size, SAMPLED)).astype(int)).tolist()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something wrong with an example's data, which the example says itself: it may have been made in another process.

    number: of the example in its source. is_lost: another example stands in its place; else a part was left out.
    """

    reason: str  # what such faults are counted under
    message: str  # one line
    number: int
    is_lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture and what is known about it. Coordinates are fractions of this image's width and height.

    entities have a phrase and a box, no picture file; references holds, for each of them, the picture that shows it, or
    is empty where the mode needs none. At most one of entities, keypoints and map is what a mode is grounded in.
    """

    image: Pixels
    caption: str  # '' where the data has none
    other_captions: tuple[str, ...] = ()  # of the same picture, of which preparing it draws one
    entities: tuple[Entity, ...] = ()
    keypoints: tuple[Person, ...] = ()  # 17 points a person, COCO's order, None where absent
    map: Map | None = None  # of the mode the source was opened for, as that mode's request files hold it
    references: tuple[Pixels | None, ...] = ()
    reference_features: tuple[Features, ...] = ()  # CLIP's, of what is in each entity's box, as a built set stores them
    mask: NDArray[np.uint8] | None = None  # (H, W), 255 where inpainting repaints; None: the entities' boxes
    latents: Latents | None = None  # of the image, which is then NO_IMAGE, as the autoencoder encoded it before
    size: tuple[int, int] | None = None  # width and height where there is no image
    key: str = ""  # names the picture, such as its file name in the set; the same in every run and on every machine
    faults: tuple[Fault, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A numbered series of examples. `example(n)` is a pure function of n, so that any process can make any example."""

    @property
    def size(self) -> int | None:
        """The number of examples, 0 to size - 1; None: no end."""

    def example(self, n: int) -> Example:
        """Example n. Raises BadExample, one line, for one that cannot be read, and IndexError beyond the last."""

    def key(self, n: int) -> str:
        """The key of example n's picture, without reading it: which of the source's pictures it is."""


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A source of another one's examples, changed, by their numbers; what inherits it changes them."""

    source: Source

    @property
    def size(self) -> int | None:
        return self.source.size

    def key(self, n: int) -> str:
        return self.source.key(n)


@runtime_checkable
class Named(Protocol):
    """A source whose keys are no file names, and which knows the names of its pictures all the same."""

    def picture_name(self, n: int) -> str:
        """The path or name of example n's picture file, as it was before the set was packed."""


@runtime_checkable
class Hashed(Protocol):
    """A source that stores what `gligen.data.order.name_hashes` gives."""

    def name_hashes(self) -> NDArray[np.uint64]:
        """(size, 2), see there."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that knows, without decoding pictures, whether it teaches what it taught before."""

    def fingerprint(self) -> str:
        """Differs where captions, phrases, boxes, keypoints, maps or masks do, as far as each source says; the same
        wherever its files lie."""


@runtime_checkable
class Pictured(Protocol):
    """A source whose pictures lie in files: a built set keeps their bytes as they are, and others' pixels as PNG."""

    def picture(self, n: int) -> bytes:
        """Example n's picture file. Raises BadExample and IndexError as `Source.example`."""


class BadExample(ValueError):  # noqa: N818 - it says what it is
    """An example that cannot be read or used; `reason` is what such examples are counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadExample], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # it comes back from worker processes


@dataclass(kw_only=True)
class Federation:
    """What is labelled of a set in whose pictures not every class is (LVIS). Names of classes, by pictures' keys.

    absent: those that are known not to be there. partial: those that are there, not all of them with boxes.
    frequency: 'r', 'c' or 'f' by class, for rare, common and frequent ones.
    """

    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    partial: dict[str, tuple[str, ...]] = field(default_factory=dict)
    frequency: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Findings:
    """The findings of opening a source, for the first lines of every command: nothing is left out silently."""

    format: str  # 'COCO JSON (instances_train2017.json)', 'YOLO', ...
    images: int = 0  # that are used
    entities: int | None = 0  # None: not counted, as they are read together with the pictures
    phrases: int | None = 0  # different ones
    persons: int = 0  # with keypoints
    lost: int = 0  # pictures that a fault made useless
    federation: Federation | None = None  # of a set that says what is labelled where
    made_maps: str = ""  # 'canny' or 'scribble': maps are to be made from the pictures (gligen.data.prepare)
    notes: list[str] = field(default_factory=list)  # what else was decided, such as where captions came from
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> how many
    first_left_out: dict[str, str] = field(default_factory=dict)  # reason -> the first such, in one line

    def leave_out(self, reason: str, what: str, count: int = 1) -> None:
        """Counts `what` under the reason, and remembers the first."""
        if count:
            self.left_out[reason] += count
            self.first_left_out.setdefault(reason, " ".join(what.encode("utf-8", "replace").decode().split()))

    def lose(self, reason: str, what: str, count: int = 1) -> None:
        """The same for pictures that should have been there: --max-bad limits how many."""
        self.leave_out(reason, what, count)
        self.lost += count

    def make_maps(self, mode: str, kind: str) -> None:
        """Has maps of a mode made from the pictures, as 'canny' or 'scribble'."""
        self.made_maps = kind
        self.notes.append(f"{mode} maps: {kind}, made from the pictures")

    def lines(self) -> list[str]:
        """Lines for people: what it is, how much there is, and what was left out and why."""
        counts = [counted(self.images, "image")]
        if self.persons:
            counts.append(counted(self.persons, "person"))
        if self.entities is None:
            counts.append("boxes not counted: they are read with the pictures")
        elif self.entities:
            counts += [counted(self.entities, "box"), counted(self.phrases or 0, "phrase")]
        found = [f"{self.format}: {', '.join(counts)}", *self.notes]
        for reason, count in self.left_out.most_common():
            found.append(f"left out: {count} × {reason}, the first: {self.first_left_out[reason]}")
        return found


def counted(number: int, of: str) -> str:
    """A number of things in words: '1 box', '2,000 boxes'."""
    return f"{number:,} {of}" if number == 1 else f"{number:,} {of}{'es' if of.endswith('x') else 's'}"
