"""Built sets with stored encodings: training reads these instead of encoding, and decoding, pictures again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gligen.data.encodings import Array
from gligen.data.example import Example, Source, Wrapped
from gligen.data.records import described
from gligen.data.shards import ShardSource
from gligen.modes import Mode


@dataclass(frozen=True, kw_only=True)
class EncodedSource(Wrapped):
    """A built set's examples with what is stored of them. Made by `open_encoded`.

    has_latents: latents come in place of images. has_references: features come beside the pictures they are of.
    """

    source: ShardSource
    has_latents: bool
    has_references: bool

    def shape(self, n: int) -> tuple[int, int]:
        return self.source.shape(n)

    def example(self, n: int) -> Example:
        latents = self.source.latents(n) if self.has_latents else None
        if latents is not None:
            return described(self.source.words(n), latents, self.source.key(n), self.source.mode, n)
        example = self.source.example(n)
        features = self.source.reference_features(n) if self.has_references else None
        return example if features is None else dataclasses.replace(example, reference_features=tuple(features))


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A set as `open_encoded` found it. phrases: features (F,) float32 that it stores; lines: for people."""

    source: Source
    phrases: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def has_latents(self) -> bool:
        return isinstance(self.source, EncodedSource) and self.source.has_latents


def open_encoded(
    source: Source, size: tuple[int, int] | None, fingerprint: Callable[[str], str], *, base: str | None, is_plain: bool
) -> Encoded:
    """The set with those of its stored encodings that a run can use; a set that stores none is as it was.

    size: width and height to train at; None: those of buckets. fingerprint: of the run's own encoder of a part
    ('latents', 'phrases', 'references'; gligen.data.encode), asked for where the part is used. base: the name of its
    file. is_plain: pictures are cropped at their centre and never mirrored, as those were whose latents are stored.
    Raises ValueError, one line, for encodings by another encoder.
    """
    if not isinstance(source, ShardSource) or source.encodings is None:
        return Encoded(source=source)
    mode, facts, lines = source.mode, source.encodings.facts, []
    uses = {"phrases": mode.takes_phrases, "references": mode.takes_images, "latents": False}
    if "latents" in facts:
        width, height = facts["latents"]["size"]
        why = _useless_latents((width, height), size, mode, is_plain=is_plain)
        uses["latents"] = why is None
        lines.append(
            f"{source.path}: stored latents are used, no picture is decoded"
            if why is None
            else f"{source.path}: its stored latents {why}; pictures are decoded and encoded"
        )
    used = [part for part in facts if uses[part]]
    for part in used:
        source.encodings.require(part, fingerprint(part), Path(base or "the embedded base").name)
    if features := [part for part in ("phrases", "references") if part in used]:
        lines.append(f"{source.path}: stored features of {' and '.join(features)} are used")
    stored: Source = source
    if "latents" in used or "references" in used:
        stored = EncodedSource(source=source, has_latents="latents" in used, has_references="references" in used)
    phrases = source.phrase_features if "phrases" in used else None
    return Encoded(source=stored, phrases=phrases or {}, lines=tuple(lines))


def _useless_latents(
    stored: tuple[int, int], size: tuple[int, int] | None, mode: Mode, *, is_plain: bool
) -> str | None:
    """Why a run cannot use latents of this size, or None if it can."""
    if size is None:
        return "are of one size, and --buckets has several"
    if stored != size:
        return f"are of {stored[0]} x {stored[1]} pixels, and the run trains at {size[0]} x {size[1]}"
    if not is_plain:
        return "are of centre crops that are not mirrored: --crop center and --flip 0 would use them"
    if mode.is_map or mode.takes_images or mode.is_inpainting:
        return f"do not help mode {mode.name}, which reads pictures as well"
    return None
