"""Encodings stored with a set: what a frozen model's encoders make of its pictures and phrases, read by number.

    encodings.json          which encoders made them: a file's name, and a fingerprint of its weights
    00000.latents.npy       (records, 2, C, h, w) float16: mean and log-variance of each picture's posterior, unscaled,
                            of its centre cropped to a size. float16 has 11 bits: 5e-4 of a value, less than the 8 bits
                            of pixels do to a latent, at half the disk of float32
    00000.references.npy    (entities, F) float32: features of what is in each box, uncropped; whose they are says
    00000.entities.npy      (records + 1,) int64: the first entity of each record
    phrases.npy             (phrases, F) float32: of each line of phrases.jsonl

All are plain .npy files, to be mapped into memory; read here by position, so that they may lie behind a URL.
`gligen.data.encode` makes them.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gligen.data.storage import Storage

ENCODINGS, PHRASES = "encodings.json", "phrases.jsonl"
HEADER = 4096  # bytes in which an .npy file's header ends
PARTS = {"latents": "autoencoder", "phrases": "text encoder", "references": "image encoder"}

Array = NDArray[Any]


@dataclass
class ArrayFile:
    """Rows of an .npy file by their numbers."""

    storage: Storage
    name: str

    @cached_property
    def header(self) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """Where the numbers begin, shape and type. Raises ValueError for a file that is none."""
        start = io.BytesIO(self.storage.read(self.name, 0, HEADER))
        try:
            version = np.lib.format.read_magic(start)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(start)
            if is_fortran or dtype.hasobject:
                raise ValueError("another order or type")
        except ValueError as error:
            raise ValueError(f"'{self.storage.path(self.name)}' is damaged ({error})") from None
        return start.tell(), shape, dtype

    def rows(self, first: int, last: int) -> Array:
        """Rows first … last - 1. Raises ValueError where the file ends before."""
        begin, shape, dtype = self.header
        each = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        content = self.storage.read(self.name, begin + first * each, (last - first) * each)
        if not 0 <= first <= last <= shape[0] or len(content) != (last - first) * each:
            raise ValueError(f"'{self.storage.path(self.name)}' ends before row {last}: is it fully copied?")
        return np.frombuffer(content, dtype).reshape(last - first, *shape[1:])


def array_bytes(rows: ArrayLike, dtype: DTypeLike | None = None) -> memoryview:
    """The content of an .npy file."""
    content = io.BytesIO()
    np.save(content, np.asarray(rows, dtype), allow_pickle=False)
    return content.getbuffer()


class PhraseFeatures(Mapping[str, Array]):
    """Features (F,) float32 of phrases, found by halving the sorted file of phrases."""

    def __init__(self, storage: Storage) -> None:
        self._features = ArrayFile(storage, "phrases.npy")
        self._text = storage.read(PHRASES)
        self._ends = np.flatnonzero(np.frombuffer(self._text, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def _line(self, i: int) -> bytes:
        return self._text[int(self._ends[i - 1]) + 1 if i else 0 : int(self._ends[i]) + 1]

    def __getitem__(self, phrase: str) -> Array:
        wanted = phrase_line(phrase)
        i = bisect_left(range(len(self)), wanted, key=self._line)
        if i == len(self) or self._line(i) != wanted:
            raise KeyError(phrase)
        return self._features.rows(i, i + 1)[0]

    def __iter__(self) -> Iterator[str]:
        return (json.loads(self._line(i)) for i in range(len(self)))


class Encodings:
    """The encodings of a set whose shards have these names.

    Complete or not there: `missing` says what is unfinished.
    """

    def __init__(self, storage: Storage, shards: Sequence[str], names: Sequence[str]) -> None:
        """names: of all the set's files."""
        self.storage, self.shards = storage, shards
        self.facts: dict[str, dict[str, Any]] = json.loads(storage.read(ENCODINGS))
        self.missing: list[str] = []
        there = set(names)
        for part in list(self.facts):
            lacking = [name for name in part_files(part, shards) if name not in there]
            if lacking:
                self.missing.append(f"{part} are unfinished, {len(lacking)} files are still to be made: {lacking[0]} …")
                del self.facts[part]
        self._files: dict[str, ArrayFile] = {}

    def require(self, part: str, fingerprint: str, name: str) -> None:
        """Raises ValueError, one line, if a part ('latents', 'phrases', 'references') is of another encoder than this
        one, whose file is called `name`."""
        facts = self.facts[part]
        if facts["fingerprint"] != fingerprint:
            raise ValueError(other_encoder(self.storage.folder, part, facts, fingerprint, name))

    def latents(self, shard: int, record: int) -> tuple[Array, Array]:
        """Mean and log-variance (C, h, w) float32 of a shard's record."""
        mean, logvar = self._rows(shard, "latents", record, record + 1)[0].astype(np.float32)
        return mean, logvar

    def references(self, shard: int, record: int) -> Array:
        """Features (entities, F) float32 of a shard's record."""
        first, last = self._rows(shard, "entities", record, record + 2).tolist()
        return self._rows(shard, "references", first, last)

    @cached_property
    def phrases(self) -> PhraseFeatures:
        return PhraseFeatures(self.storage)

    def _rows(self, shard: int, what: str, first: int, last: int) -> Array:
        name = shard_file(self.shards[shard], what)
        return self._files.setdefault(name, ArrayFile(self.storage, name)).rows(first, last)


def phrase_line(phrase: str) -> bytes:
    """A phrase's line of phrases.jsonl, whose lines are in the order of their bytes."""
    return json.dumps(phrase, ensure_ascii=False).encode() + b"\n"


def shard_file(shard: str, what: str) -> str:
    return f"{shard.removesuffix('.tar')}.{what}.npy"


def part_files(part: str, shards: Sequence[str]) -> list[str]:
    """The files that a part is made of."""
    if part == "phrases":
        return ["phrases.npy"]
    kinds = ("references", "entities") if part == "references" else (part,)
    return [shard_file(shard, kind) for shard in shards for kind in kinds]


def other_encoder(folder: str, part: str, facts: Mapping[str, Any], fingerprint: str, name: str) -> str:
    """The message for an encoding that another encoder made."""
    return (
        f"'{folder}' holds {part} by the {PARTS[part]} of '{facts['encoder']}' ({facts['fingerprint'][:12]}), and that "
        f"of '{name}' ({fingerprint[:12]}) is another: build a set for it, or use the model they were made with"
    )
