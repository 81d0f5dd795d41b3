"""The sets that `--data` names, opened together: one endless source to train on, and one to compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gligen.data.example import Findings, Fingerprinted, Source
from gligen.data.faults import FaultLog, Tolerant
from gligen.data.flags import MAX_BAD
from gligen.data.geometry import Buckets
from gligen.data.open import open_source, split_weight
from gligen.data.order import Bucketed, Joined, Mixed, Shuffled, Subset, are_held_out, check_parts, picture_ids
from gligen.data.storage import is_remote

SERIES_A_SET = 1000  # of orders: one for each of its buckets


@runtime_checkable
class Shaped(Protocol):
    """A source that knows the shapes of its pictures without decoding them."""

    def shape(self, n: int) -> tuple[int, int]:
        """Width and height of example n's picture."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The opened sets. training has no end; held_out is finite, None where nothing was held out. Both give whole
    pictures, upright, for `gligen.data.prepare.Prepared`, whose `maps` is made_maps.

    examples, lost: how many there are in all sets together, and how many faults took when they were opened.
    notes: lines for people on what the sets have in common. fingerprint: of what all sets say of their pictures.
    """

    training: Source
    held_out: Source | None
    findings: tuple[Findings, ...]
    examples: int
    lost: int
    max_bad: float
    notes: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def made_maps(self) -> str:
        """Names 'canny' or 'scribble' where a set has no maps of its own."""
        return next((found.made_maps for found in self.findings if found.made_maps), "")

    def fault_log(self) -> FaultLog:
        """A new count of what goes wrong while training, with what was lost before it."""
        return FaultLog(self.examples, self.max_bad, self.lost)


def open_sets(
    data: Sequence[str],
    mode: str,
    *,
    series: int,
    held_out: float = 0.0,
    buckets: Buckets | None = None,
    batch_size: int = 1,
    max_bad: float = MAX_BAD,
    captions: str | Path | None = None,
    images: str | Path | None = None,
    maps: str | None = None,
    masks: str | Path | None = None,
    change: Callable[[Source], Source] = lambda source: source,
) -> Sets:
    """Opens sets given as 'PATH' or 'PATH:WEIGHT': samples come in proportion to the weights, 1 unless given.

    series: whose stream orders are drawn from (gligen.data.streams), the user's seed added.
    held_out: the share of each set's pictures that is not trained on, told by their names
    (`gligen.data.order.are_held_out`); of no set is a picture trained on that another holds out.
    buckets: the training samples from a multiple of batch_size to the next come from one set and have one size, which
    `training.image_size` says.
    change: what is done to each set's examples before they are split and shuffled. The others are `open_source`'s.
    Raises as it does.
    """
    if not data:
        raise ValueError("no data: name at least one set with --data")
    paths, weights = zip(*map(split_weight, data), strict=True)
    places = [path if is_remote(path) else os.path.realpath(Path(path).expanduser()) for path in paths]
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"--data names '{twice}' twice: name it once, with a weight, such as {twice}:2")
    choices: dict[str, Any] = {"captions": captions, "images": images, "maps": maps, "masks": masks}
    opened, findings = zip(*(open_source(path, mode, max_bad=max_bad, **choices) for path in paths), strict=True)
    ids = [picture_ids(source) for source in opened] if held_out or len(data) > 1 else []  # of each set's pictures
    fingerprints = [source.fingerprint() if isinstance(source, Fingerprinted) else "" for source in opened]
    sources = [change(source) for source in opened]
    notes = _shared(paths, ids)
    out = [are_held_out(own, held_out) for own in ids] if held_out else []
    endless: list[Source] = []
    finite: list[Source] = []
    for i, source in enumerate(sources):
        part = Subset(source, np.arange(source.size or 0))
        if held_out:
            others = [ids[k][out[k]] for k in range(len(ids)) if k != i]
            unseen = out[i] | np.isin(ids[i], np.concatenate(others)) if others else out[i]
            part = Subset(source, np.flatnonzero(~unseen))
            check_parts(part.size, int(out[i].sum()), held_out)
            finite.append(Tolerant(Subset(source, np.flatnonzero(out[i])), max_bad))
            if count := int((unseen & ~out[i]).sum()):
                notes.append(f"{paths[i]}: not trained on: {count} × picture of a name that another set holds out")
        endless.append(_without_end(part, series + SERIES_A_SET * i, buckets, batch_size, max_bad))
    training = endless[0]
    if len(endless) > 1:
        behind = series + SERIES_A_SET * len(sources)  # of those of the sets, which mix their buckets
        training = Mixed(tuple(endless), weights, behind, run=batch_size if buckets else 1)
    return Sets(
        training=training,
        held_out=Joined(tuple(finite)) if finite else None,
        findings=findings,
        examples=sum(source.size or 0 for source in sources),
        lost=sum(found.lost for found in findings),
        max_bad=max_bad,
        notes=tuple(notes),
        fingerprint=" ".join(fingerprints),
    )


def _shared(paths: Sequence[str], ids: Sequence[NDArray[np.uint64]]) -> list[str]:
    """Lines on sets whose pictures have one another's names, such as a set and the built set of it."""
    lines = []
    for i, own in enumerate(ids):
        for k in range(i):
            if count := int(np.isin(own, ids[k]).sum()):
                lines.append(
                    f"{paths[i]}: {count:,} of its {len(own):,} pictures have names of pictures of {paths[k]}: if they "
                    "are the same, they come by both sets' weights"
                )
    return lines


def _without_end(
    part: Subset, series: int, buckets: Buckets | None, batch_size: int, max_bad: float
) -> Shuffled | Bucketed:
    tolerant = partial(Tolerant, max_bad=max_bad)
    if buckets is None:
        return Shuffled(tolerant(part), series)
    source = part.source
    if not isinstance(source, Shaped):
        raise ValueError(f"{type(source).__name__} does not know the shapes of its pictures: leave out the buckets")
    return Bucketed.sort(
        source, part.numbers, source.shape, buckets, batch_size=batch_size, series=series, wrap=tolerant
    )
