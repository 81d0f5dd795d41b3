"""Built sets whose latents are stored: training reads these instead of decoding and encoding pictures again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gligen.data.example import Example, Source
from gligen.data.records import described
from gligen.data.shards import ShardSource


@dataclass(frozen=True)
class EncodedSource:
    """A built set's examples with stored latents in place of images. Made by `stored_latents`."""

    source: ShardSource

    @property
    def size(self) -> int:
        return self.source.size

    def key(self, n: int) -> str:
        return self.source.key(n)

    def example(self, n: int) -> Example:
        latents = self.source.latents(n)
        assert latents is not None  # `stored_latents` has looked
        return described(self.source.words(n), latents, self.source.key(n), self.source.mode, n)


def stored_latents(
    source: Source, size: tuple[int, int] | None, fingerprint: Callable[[], str], *, base: str | None, is_plain: bool
) -> tuple[Source, str | None]:
    """The source with its stored latents in place of images, or as it is; and a line that says which, if it has some.

    size: width and height to train at; None: those of buckets. fingerprint: of the autoencoder's encoder
    (gligen.data.encode), asked for where there are latents. base: its file's name. is_plain: pictures are cropped at
    their centre and never mirrored, as those were that are stored.
    Raises ValueError, one line, for latents of another encoder.
    """
    if not isinstance(source, ShardSource) or source.encodings is None or "latents" not in source.encodings.facts:
        return source, None
    stored = tuple(source.encodings.facts["latents"]["size"])
    mode, why = source.mode, None
    if size is None:
        why = "are of one size, and --buckets has several"
    elif stored != size:
        why = f"are of {stored[0]} x {stored[1]} pixels, and the run trains at {size[0]} x {size[1]}"
    elif not is_plain:
        why = "are of centre crops that are not mirrored: --crop center and --flip 0 would use them"
    elif mode.is_map or mode.takes_images or mode.is_inpainting:
        why = f"do not help mode {mode.name}, which reads pictures as well"
    if why:
        return source, f"{source.path}: its stored latents {why}; pictures are decoded and encoded"
    source.encodings.require("latents", fingerprint(), Path(base or "the embedded base").name)
    return EncodedSource(source), f"{source.path}: stored latents are used, no picture is decoded"
