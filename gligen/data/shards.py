"""Tar shards as a source: sets that `python -m gligen.data build` wrote, and anybody's WebDataset or img2dataset tars.

A built set is a folder:

    00000.tar …         uncompressed, records as in records.py
    index.npy           (N, 4) uint32, little-endian, mapped into memory: 16 bytes a record. Shard, and in blocks of
                        512 bytes, as tars are made: offset in the shard, length, and length of the words before the
                        picture (0: somewhere else). So a shard may have 2 TiB.
    dataset.json        shards with their records and bytes, mode, counts, what was left out
    names.npy           (N, 2) uint64: hashes of the pictures' names and paths, which a held-out part goes by
    phrases.jsonl       all phrases
    *.npy, …            encodings (encodings.py)

Example n is one read at a place that the index tells. Tars of others have no index: one pass over their headers makes
the same two files, which are kept in a folder beside them, or in ~/.cache/gligen where that cannot be written.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gligen.data.edges import MAKERS
from gligen.data.encodings import ENCODINGS, Array, ArrayFile, Encodings, array_bytes
from gligen.data.example import BadExample, Example, Findings, sampled
from gligen.data.order import hash_paths
from gligen.data.pictures import picture_shape
from gligen.data.records import Words, has_picture, head_length, map_names, picture_of, read_words, split, unpack
from gligen.data.storage import Storage, is_remote, open_storage
from gligen.data.tars import BLOCK, Member, TarError, walk
from gligen.files import cache_folder, write_atomically
from gligen.modes import get_mode

log = logging.getLogger("gligen")

MANIFEST, INDEX, NAMES = "dataset.json", "index.npy", "names.npy"
FORMAT = "gligen tar set 1"
BESIDE = ".gligen-index"  # folder of the index of tars that this project did not write
AHEAD = 2**22  # bytes of a remote tar fetched at once while its headers are read


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar. stamp: what changes when the file is written again; '' in built sets, which may be copied."""

    name: str
    records: int
    size: int
    stamp: str = ""


@dataclass(kw_only=True)
class Tally:
    """Counts of what records say; built sets and foreign tars are counted alike."""

    records: int = 0
    lost: int = 0  # records that should be there; what else is left out is a part of one
    entities: int = 0
    persons: int = 0
    phrases: set[str] = field(default_factory=set)
    maps: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, words: Words, extensions: Iterable[str]) -> None:
        self.records += 1
        self.entities += len(words.entities)
        self.persons += len(words.keypoints)
        self.phrases.update(entity.phrase for entity in words.entities)
        self.maps.update(map_names(extensions))

    def leave_out(self, reason: str, what: str) -> None:
        self.left_out[reason] += 1
        self.first.setdefault(reason, " ".join(what.split()))

    def lose(self, reason: str, what: str) -> None:
        self.leave_out(reason, what)
        self.lost += 1

    def join(self, other: Tally) -> None:
        for name in ("records", "lost", "entities", "persons"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.phrases |= other.phrases
        self.maps += other.maps
        self.left_out += other.left_out
        self.first = other.first | self.first

    def facts(self) -> dict[str, Any]:
        """Facts for a manifest: the phrases as their number."""
        return {
            "records": self.records,
            "lost": self.lost,
            "entities": self.entities,
            "phrases": len(self.phrases),
            "persons": self.persons,
            "maps": dict(sorted(self.maps.items())),
            "left_out": {reason: [count, self.first[reason]] for reason, count in sorted(self.left_out.items())},
        }


# -- the index ---------------------------------------------------------------------------------------------------------


def index_row(shard: int, files: Sequence[Member]) -> tuple[int, int, int, int]:
    """A record's row of the index. files: its members, one after another."""
    start, end = files[0].start, files[-1].end
    return shard, start // BLOCK, (end - start) // BLOCK, head_length(files) // BLOCK


def index_shard(storage: Storage, name: str, number: int, size: int) -> tuple[list[tuple[int, ...]], Tally]:
    """Rows of one tar's records in their order, by one pass over its headers and words, and what they say.

    Left out and counted: records without a picture or with broken words, and what follows a damage.
    """
    rows: list[tuple[int, ...]] = []
    tally = Tally()
    read = _ahead(storage, name) if is_remote(storage.folder) else lambda at, length: storage.read(name, at, length)

    def end(files: list[Member]) -> None:
        if not files:
            return
        extensions = [file.extension for file in files]
        where = f"{name}/{files[0].key}"
        if not has_picture(extensions):
            tally.lose("record without a picture", f"{where}: {', '.join(extensions)}")
            return
        try:
            words = {f.extension: read(f.offset, f.size) for f in files if f.extension in ("json", "txt")}
            tally.add(read_words(words, where), extensions)
        except BadExample as error:
            tally.lose(error.reason, str(error))
            return
        rows.append(index_row(number, files))

    files: list[Member] = []
    try:
        for member in walk(read, size):
            if files and (member.key != files[0].key or member.extension in (f.extension for f in files)):
                end(files)
                files = []
            files.append(member)
    except TarError as error:
        if not rows and not files:
            raise ValueError(f"'{storage.path(name)}': {error}") from None
        # what the last record lacks is unknown, so it is lost with what follows
        tally.lose("damaged tar, read as far as it goes", f"{storage.path(name)}: {error}")
        files = []
    end(files)
    return rows, tally


def _ahead(storage: Storage, name: str) -> Callable[[int, int], bytes]:
    """Reads of a remote file in order, a few MiB fetched at once."""
    start, kept = 0, b""

    def read(offset: int, length: int) -> bytes:
        nonlocal start, kept
        if not start <= offset <= offset + length <= start + len(kept):
            start, kept = offset, storage.read(name, offset, max(length, AHEAD))
        return kept[offset - start : offset - start + length]

    return read


def manifest(shards: Sequence[Shard], tally: Tally, **facts: Any) -> bytes:
    """The text of dataset.json."""
    listed = [{name: value for name, value in asdict(shard).items() if value != ""} for shard in shards]
    text = json.dumps({"format": FORMAT, **facts, **tally.facts()}, ensure_ascii=False, indent=1)
    lines = ",\n  ".join(json.dumps(shard, ensure_ascii=False) for shard in listed)
    opened = text.removesuffix("\n}")
    return f'{opened},\n "shards": [\n  {lines}\n ]\n}}\n'.encode()


# -- the source --------------------------------------------------------------------------------------------------------


class ShardSource:
    """Examples of a built set or of foreign tars.

    path: a folder or URL of one, a .tar, or several of them in one folder: 'many/{00000..00031}.tar', 'many/*.tar'.
    mode: which grounding is read; None: that which the set was built for.
    maps: 'canny' or 'scribble', to be made from the pictures of a set that holds no maps (gligen.data.prepare); mode
    canny has them made anyway.
    is_whole: refuse a built set with a shard that is missing or of another length, instead of its examples.
    Examples can be had in any number of processes and threads; files are opened where they are read.
    Raises FileNotFoundError or ValueError, one line, for what is no such set or lacks what the mode needs.
    """

    def __init__(
        self, path: str | Path, mode: str | None = "box-text", *, maps: str | None = None, is_whole: bool = True
    ) -> None:
        self.path = str(path)
        folder, wanted = _parts(self.path)
        self.storage = open_storage(folder)
        self.facts, self._index_path = _open_index(self.storage, wanted, self.path, is_whole)
        self.mode = get_mode(mode or self.facts.get("mode", "box-text"))
        self.made_maps = maps or self.mode.name
        self.shards = [Shard(**shard) for shard in self.facts["shards"]]
        self.is_built = "mode" in self.facts
        self._map_index()
        self.findings = self._findings()
        self._check_mode()
        self.encodings = self._open_encodings()
        self.first = np.cumsum([0, *(shard.records for shard in self.shards)])  # record number each shard begins with

    def _map_index(self) -> None:
        rows = np.load(self._index_path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != np.dtype("<u4") or rows.shape != (self.facts["records"], 4):
            raise ValueError(f"'{self._index_path}' does not fit {MANIFEST}: {rows.shape} {rows.dtype}; remove it")
        self._rows = np.asarray(rows)  # a plain view of the map, which is quicker to take rows from

    @property
    def size(self) -> int:
        return len(self._rows)

    def key(self, n: int) -> str:
        """Shard and place, which stay as they are when shards are added."""
        shard, offset, _, _ = self._row(n)
        return f"{self.shards[shard].name}@{offset}"

    def picture_name(self, n: int) -> str:
        """The picture's name before it was packed. Tars of others name none: there a picture is its place."""
        try:
            return (self.words(n).source if self.is_built else "") or self.key(n)
        except BadExample:  # to be told when it is read
            return self.key(n)

    def name_hashes(self) -> NDArray[np.uint64]:
        """`gligen.data.order.name_hashes` by the stored names; by those of all records, which takes longer, of tars of
        others and of sets that an earlier version built."""
        if not self.is_built or NAMES not in self.storage.names():
            return hash_paths(self.picture_name, self.size)
        names = ArrayFile(self.storage, NAMES)
        _, shape, dtype = names.header
        if shape != (self.size, 2) or dtype != np.dtype("<u8"):
            raise ValueError(
                f"'{self.storage.path(NAMES)}' does not fit {MANIFEST}: {shape} {dtype}; build the set again"
            )
        return names.rows(0, self.size)

    def fingerprint(self) -> str:
        """Of what the index knows of all records, and of what SAMPLED records say: of a remote set, whose records are
        slow to come by, the first alone."""
        told = [(shard.name, shard.records, shard.size) for shard in self.shards]
        counts = {name: self.facts[name] for name in ("entities", "phrases", "persons", "maps")}
        digest = hashlib.blake2b(repr((told, counts)).encode(), digest_size=8)
        for n in () if is_remote(self.storage.folder) else sampled(self.size):
            shard, _, blocks, _ = self._row(n)
            try:
                digest.update(repr((shard, blocks, self.words(n))).encode())
            except BadExample as error:  # to be told when it is read
                digest.update(str(error).encode())
        return digest.hexdigest()

    def example(self, n: int) -> Example:
        """Example n, its whole picture decoded. Raises BadExample, one line, and IndexError beyond the last."""
        return unpack(self.files(n), self._where(n), self.mode, n, needs_map=not self.findings.made_maps)

    def picture(self, n: int) -> bytes:
        """The picture's file as it is. Raises as `example`."""
        return picture_of(self.files(n), self._where(n))

    def shape(self, n: int) -> tuple[int, int]:
        """Width and height of the picture, upright. Raises as `example`."""
        return self.words(n).size or picture_shape(self.picture(n), self._where(n))

    def words(self, n: int) -> Words:
        """Reads what record n says beside its pictures, of which none is read. Raises as `example`."""
        _, _, _, head = self._row(n)
        return read_words(self.files(n, head * BLOCK or None), self._where(n))

    @property
    def encoder_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the encoders that made what is stored: 'latents', 'phrases', 'references'
        (gligen.data.encodings)."""
        return {} if self.encodings is None else {p: f["fingerprint"] for p, f in self.encodings.facts.items()}

    def latents(self, n: int) -> tuple[Array, Array] | None:
        """Mean and log-variance (C, h, w) float32 of example n's posterior, unscaled, of its centre cropped to
        `encodings.facts["latents"]["size"]`; None where the set stores none."""
        stored = self._stored("latents")
        return stored.latents(*self._place(n)) if stored else None

    def reference_features(self, n: int) -> Array | None:
        """Features (entities, F) float32: CLIP's, of what is in the boxes of example n; None where none are stored."""
        stored = self._stored("references")
        return stored.references(*self._place(n)) if stored else None

    @property
    def phrase_features(self) -> Mapping[str, Array] | None:
        """CLIP's features (F,) float32 of all phrases of the set; None where none are stored."""
        stored = self._stored("phrases")
        return stored.phrases if stored else None

    def _stored(self, part: str) -> Encodings | None:
        return self.encodings if self.encodings and part in self.encodings.facts else None

    def _place(self, n: int) -> tuple[int, int]:
        """Shard, and the record's number in it."""
        shard = self._row(n)[0]
        return shard, n - int(self.first[shard])

    def _open_encodings(self) -> Encodings | None:
        names = self.storage.names() if self.is_built else []
        if ENCODINGS not in names:
            return None
        found = Encodings(self.storage, [shard.name for shard in self.shards], names)
        made = ", ".join(f"{part} by {facts['encoder']}" for part, facts in found.facts.items())
        self.findings.notes += [f"stored: {made}"] * bool(made) + found.missing
        return found

    def files(self, n: int, length: int | None = None) -> dict[str, bytes]:
        """The record's files by extension; those in its first `length` bytes."""
        shard, offset, blocks, _ = self._row(n)
        length = length or blocks * BLOCK
        content = self.storage.read(self.shards[shard].name, offset * BLOCK, length)
        if len(content) < length:
            raise BadExample("tar shorter than its index", f"{self._where(n)}: the tar ends within the record")
        return split(content, self._where(n))

    def _where(self, n: int) -> str:
        shard, record = self._place(n)
        return f"{self.shards[shard].name}, record {record}"

    def _row(self, n: int) -> list[int]:
        if not 0 <= n < len(self._rows):
            raise IndexError(f"example {n} of {len(self._rows)}")
        return self._rows[n].tolist()

    def rows(self, shard: int) -> list[tuple[int, ...]]:
        """The index of one shard's records."""
        return list(map(tuple, self._rows[self.first[shard] : self.first[shard + 1]].tolist()))

    def _findings(self) -> Findings:
        facts = self.facts
        found = Findings(
            format="built set" if self.is_built else "tar shards",
            images=facts["records"],
            **{name: facts[name] for name in ("entities", "phrases", "persons")},
        )
        for reason, (count, first) in facts["left_out"].items():
            found.leave_out(reason, first, count)
        if not self.is_built:  # whoever built a set has accepted what it lost
            found.lost = facts["lost"]
        return found

    def _check_mode(self) -> None:
        mode, has = self.mode, self.facts
        if mode.is_map and not has["maps"].get(mode.name):
            if self.made_maps not in MAKERS:
                others = ", ".join(has["maps"]) or "no maps at all"
                raise ValueError(
                    f"'{self.path}' holds no {mode.name} maps (it has {others}): build it with --mode {mode.name}, or "
                    f"make them with --maps {' or '.join(MAKERS)}"
                )
            self.findings.make_maps(mode.name, self.made_maps)
        if mode.kind == "keypoint" and not has["persons"]:
            raise ValueError(
                f"'{self.path}' holds no keypoints: build it with --mode keypoint from a set that has them"
            )
        built_for = has.get("mode")
        if mode.takes_phrases and built_for and not get_mode(built_for).takes_phrases:
            raise ValueError(
                f"'{self.path}' was built for mode {built_for} without boxes: build it with --mode {mode.name}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_index()


def find_tars(path: Path) -> list[Path]:
    """Finds what makes a path one of tar shards: a built set's manifest, or tars; [] if it is something else."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return [path / MANIFEST] if (path / MANIFEST).is_file() else sorted(path.glob("*.tar"))


def _parts(path: str) -> tuple[str, str | None]:
    """Folder, and the pattern of tars in it; None for a folder of them."""
    if not path.endswith(".tar"):
        return path, None
    folder, slash, pattern = path.rpartition("/")
    return folder or (slash or "."), pattern


def _expand(pattern: str) -> list[str]:
    """'{000..002}.tar' as its names, as WebDataset writes them."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    names = (f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1))
    return [f"{pattern[: found.start()]}{name}{pattern[found.end() :]}" for name in names]


def _open_index(storage: Storage, pattern: str | None, path: str, is_whole: bool) -> tuple[dict[str, Any], str]:
    """The manifest and a local file of rows; both are made where they are not there or not true any more."""
    if pattern is None:
        try:
            names = storage.names()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"'{path}' does not exist, or is no folder of tars") from None
        if MANIFEST in names:
            return _open_built(storage, path, is_whole)
        names = [name for name in names if name.endswith(".tar")]
    elif any(c in pattern for c in "*?["):
        names = fnmatch.filter(storage.names(), pattern)
    else:
        names = _expand(pattern)
    if not names:
        raise ValueError(f"'{path}' holds no .tar files")
    stamps = [(name, *storage.stamp(name)) for name in names]
    places = _index_places(storage, pattern)
    for place in places:
        known = _read_manifest(place / MANIFEST)
        if (
            known
            and [(s["name"], s["size"], s["stamp"]) for s in known["shards"]] == stamps
            and (place / INDEX).exists()
        ):
            return known, str(place / INDEX)
    return _make_index(storage, stamps, places)


def _make_index(
    storage: Storage, stamps: Sequence[tuple[str, int, str]], places: Sequence[Path]
) -> tuple[dict[str, Any], str]:
    log.info("reading the headers of %d tars in '%s', once", len(stamps), storage.folder)
    parts, shards, whole = [], [], Tally()
    for number, (name, size, stamp) in enumerate(stamps):
        rows, tally = index_shard(storage, name, number, size)
        parts.append(np.asarray(rows, "<u4").reshape(-1, 4))
        shards.append(Shard(name=name, records=len(rows), size=size, stamp=stamp))
        whole.join(tally)
    text = manifest(shards, whole)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(place / INDEX, array_bytes(np.concatenate(parts), "<u4"))
            write_atomically(place / MANIFEST, text)
        except OSError as error:
            if place == places[-1]:
                raise
            log.info("'%s' cannot be written (%s): the index goes to '%s'", place, error.strerror, places[-1])
        else:
            return json.loads(text), str(place / INDEX)
    raise AssertionError


def _index_places(storage: Storage, pattern: str | None) -> list[Path]:
    """Folders where the index of foreign tars may lie, the best first."""
    folder = storage.folder if is_remote(storage.folder) else os.path.abspath(storage.folder)
    mark = hashlib.sha256(f"{folder}/{pattern or ''}".encode()).hexdigest()[:16]
    cache = cache_folder("indexes") / mark
    if is_remote(storage.folder):
        return [cache]
    # patterns have one each, beside the folder's own
    return [Path(folder, BESIDE) if pattern is None else Path(folder, BESIDE, mark), cache]


def _open_built(storage: Storage, path: str, is_whole: bool) -> tuple[dict[str, Any], str]:
    text = storage.read(MANIFEST)
    try:
        facts = json.loads(text)
        if facts["format"] != FORMAT:
            raise ValueError(f"format is {facts['format']!r}, this version reads {FORMAT!r}")
        get_mode(facts["mode"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{storage.path(MANIFEST)}' is not a built set's ({error})") from None
    if not is_remote(storage.folder):
        for shard in facts["shards"] if is_whole else []:
            try:
                size = storage.stamp(shard["name"])[0]
                state = f"{size} bytes long"
            except FileNotFoundError:
                size, state = None, "missing"
            if size != shard["size"]:
                raise ValueError(
                    f"'{storage.path(shard['name'])}' is {state}, {MANIFEST} says {shard['size']} bytes: is '{path}' "
                    "fully copied?"
                )
        return facts, storage.path(INDEX)
    place = cache_folder("indexes") / hashlib.sha256(storage.folder.encode() + text).hexdigest()[:16]
    if not (place / INDEX).exists():
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / INDEX, storage.read(INDEX))
    return facts, str(place / INDEX)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_bytes())
        return facts if facts["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
