"""Reads GLIGEN's TSV: lines of `id TAB JSON` with the picture as base64 in the JSON, and a `.lineidx` of byte offsets.

Boxes are xywh in pixels. Rows with `is_det` have class names and no caption; others have a caption, and spans of it for
every box. Maps lie in side TSVs of the same rows, as base64 under a name of their own (`hed_edge`, …). A `.lineidx`
that is missing is made in one pass, and kept in memory. Rows are read when they are asked for, so how many boxes there
are is not known before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gligen.data.annotations import make_entities, plain_text
from gligen.data.coco import corners, spans
from gligen.data.edges import MAKERS
from gligen.data.example import BadExample, Example, Fault, Findings, Map, Pixels, sampled
from gligen.data.files import class_name
from gligen.data.pictures import check_same_shape, decode_picture, picture_shape
from gligen.modes import Mode
from gligen.request import Entity

MAPS = {"hed": "hed_edge", "canny": "canny_edge", "depth": "depth"}  # mode -> its field in a side TSV
_HEAD = 1024  # bytes of a line in which its file_name is looked for first
_FILE_NAME = re.compile(rb'"file_name": ?("(?:[^"\\]|\\.)+")')


def find(path: Path) -> list[Path]:
    """The TSV files of a path: itself, or those in the folder, in the order of their names."""
    if path.is_file():
        return [path] if path.suffix == ".tsv" else []
    return sorted(path.glob("*.tsv")) if path.is_dir() else []


@dataclass(frozen=True, eq=False)
class TsvFile:
    """One file and where its lines begin, its end as the last."""

    path: Path
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> TsvFile:
        """Raises ValueError for a line index that is not one of this file."""
        index = path.with_suffix(".lineidx")
        size = path.stat().st_size
        if index.is_file():
            try:
                offsets = np.array(index.read_text().split(), np.int64)
            except ValueError:
                raise ValueError(f"{index}: not a line index: remove it, and it will be made") from None
            if len(offsets) == 0 or offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] >= size:
                raise ValueError(f"{index}: not of {path.name}, which has {size} bytes: remove it, and it will be made")
            return cls(path, np.append(offsets, size))
        ends = array("q", [0])
        with open(path, "rb") as file:
            for line in file:
                ends.append(ends[-1] + len(line))
        return cls(path, np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def line(self, n: int, length: int | None = None) -> bytes:
        """A line, or its first bytes."""
        whole = int(self.offsets[n + 1] - self.offsets[n])
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[n]))
            return file.read(whole if length is None else min(whole, length))


@dataclass(frozen=True, eq=False)
class TsvSource:
    """Rows of TSV files, one after the other."""

    files: tuple[TsvFile, ...]
    ends: tuple[int, ...]
    mode: Mode
    maps: tuple[TsvFile, ...] = ()  # side TSVs, one for each file

    @property
    def size(self) -> int:
        return self.ends[-1]

    def key(self, n: int) -> str:
        """The file and the line: the picture's own name lies in the JSON, behind the picture."""
        file, line = self._where(n)
        return f"{file.path.name}/{line}"

    def picture_name(self, n: int) -> str:
        """The row's file_name; that of the file and the line where it has none or cannot be read."""
        file, line = self._where(n)
        if found := _FILE_NAME.search(file.line(line, _HEAD)):  # before the picture, which is long
            return str(json.loads(found[1]))
        try:
            name = self.row(n).get("file_name")
        except BadExample:
            name = None
        return name if isinstance(name, str) and name else self.key(n)

    def fingerprint(self) -> str:
        """Of the files' lengths, and of SAMPLED rows without their pictures, with their maps."""
        digest = hashlib.blake2b(repr([int(file.offsets[-1]) for file in self.files]).encode(), digest_size=8)
        for n in sampled(self.size):
            file, line = self._where(n)
            try:
                digest.update(repr({**self.row(n), "image": ""}).encode())
            except BadExample as error:  # to be told when it is read
                digest.update(str(error).encode())
            if self.maps:
                digest.update(self.maps[self.files.index(file)].line(line))
        return digest.hexdigest()

    def picture(self, n: int) -> bytes:
        """The picture's file as it is. Raises BadExample."""
        return decode_base64(self.row(n).get("image"), self.key(n))

    def shape(self, n: int) -> tuple[int, int]:
        """Width and height of the picture. Raises BadExample."""
        return picture_shape(self.picture(n), self.key(n))

    def example(self, n: int) -> Example:
        key = self.key(n)
        row = self.row(n)
        picture = decode_picture(decode_base64(row.get("image"), key), key)
        W, H = picture.size
        annos = row.get("annos")
        if not isinstance(annos, list):
            raise BadExample("TSV row without annos", key)
        caption = row.get("caption")
        caption = caption if isinstance(caption, str) and not row.get("is_det") else ""
        faults: list[Fault] = []
        entities: tuple[Entity, ...] = ()
        if self.mode.takes_phrases:
            boxes, phrases = [], []
            for i, anno in enumerate(annos):
                phrase, box = _phrase(anno, caption), _box(anno)
                if box is None or not phrase:
                    reason = "annotation without a phrase" if box else "annotation without a box of four numbers"
                    faults.append(Fault(reason=reason, message=f"{key}, annos[{i}]", number=n))
                else:
                    boxes.append(box)
                    phrases.append(phrase)
            fractions = np.array(boxes, np.float64).reshape(-1, 4) / (W, H, W, H)
            entities = make_entities(fractions, phrases, n, key, faults)
        return Example(
            image=picture.pixels,
            caption=plain_text(caption),
            entities=entities,
            map=self._map(n, row, picture.pixels) if self.maps else None,
            key=key,
            faults=tuple(faults),
        )

    def _map(self, n: int, row: dict[str, Any], pixels: Pixels) -> Map:
        file, line = self._where(n)
        side, key = self.maps[self.files.index(file)], self.key(n)
        found = parse_row(side, line)
        if found.get("data_id") != row.get("data_id"):
            raise BadExample("side TSV row of another picture", f"{key}: {side.path.name} has {found.get('data_id')}")
        shown = decode_picture(decode_base64(found.get(MAPS[self.mode.name]), key), key)
        check_same_shape(shown.size, pixels, f"{self.mode.name} map", key)
        return shown.pixels

    def _where(self, n: int) -> tuple[TsvFile, int]:
        if not 0 <= n < self.size:
            raise IndexError(f"example {n} of {self.size}")
        which = bisect_right(self.ends, n)
        return self.files[which], n - (self.ends[which - 1] if which else 0)

    def row(self, n: int) -> dict[str, Any]:
        """The JSON object of a row. Raises BadExample."""
        return parse_row(*self._where(n))


def read(files: list[Path], findings: Findings, mode: Mode, maps: str | None = None) -> TsvSource:
    """The source of TSV files. maps: the side TSV, or the folder of side TSVs, of a map mode.

    Raises ValueError for files without rows, a first row that is none, and modes that a TSV holds nothing for;
    FileNotFoundError where a map mode has no side TSV.
    """
    if mode.kind == "keypoint":
        raise ValueError(f"{files[0]}: GLIGEN's TSV holds boxes, nothing for the mode {mode.name}")
    opened = tuple(TsvFile.open(path) for path in files)
    ends = tuple(int(end) for end in np.cumsum([len(file) for file in opened]))
    if not ends[-1]:
        raise ValueError(f"{files[0]}: no rows in it")
    name = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}"
    findings.format = f"GLIGEN TSV ({name})"
    findings.images, findings.entities, findings.phrases = ends[-1], None, None
    side: tuple[TsvFile, ...] = ()
    if mode.is_map and (maps or mode.name) in MAKERS:
        findings.make_maps(mode.name, maps or mode.name)
    elif mode.is_map:
        side = _side_files(opened, mode, maps)
        findings.notes.append(f"{mode.name} maps from {maps}")
    source = TsvSource(opened, ends, mode, side)
    source.row(0)  # a TSV of something else is told at once
    return source


def parse_row(file: TsvFile, line: int) -> dict[str, Any]:
    """The JSON object of a line. Raises BadExample."""
    key = f"{file.path.name}/{line}"
    try:
        _, _, content = file.line(line).partition(b"\t")
        row = json.loads(content)
    except OSError as error:
        raise BadExample("TSV that cannot be read", f"{key}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadExample("TSV row that is not JSON", f"{key}: {error}") from None
    if not isinstance(row, dict):
        raise BadExample("TSV row that is no JSON object", key)
    return row


def _side_files(files: tuple[TsvFile, ...], mode: Mode, maps: str | None) -> tuple[TsvFile, ...]:
    """The side TSV of each file: the one that is named, or those of the same names in the folder that is."""
    if mode.name not in MAPS:
        raise ValueError(f"{files[0].path}: side TSVs hold {', '.join(MAPS)}, nothing for the mode {mode.name}")
    if maps is None:
        raise FileNotFoundError(f"{files[0].path}: name its side TSV with the {mode.name} maps with --maps FILE")
    given = Path(maps)
    paths = [given / file.path.name for file in files] if given.is_dir() else [given]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: there is no such side TSV of {mode.name} maps")
    side = tuple(TsvFile.open(path) for path in paths)
    if [len(file) for file in side] != [len(file) for file in files]:
        raise ValueError(f"{maps}: not as many rows as {files[0].path.parent} has")
    return side


def decode_base64(text: Any, key: str) -> bytes:
    """The bytes of a picture in a row. Raises BadExample."""
    if not isinstance(text, str):
        raise BadExample("TSV row without a picture", key)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadExample("TSV row whose picture is not base64", f"{key}: {error}") from None


def _phrase(anno: Any, caption: str) -> str:
    if not isinstance(anno, dict):
        return ""
    if caption and anno.get("tokens_positive"):
        return plain_text(spans(caption, anno["tokens_positive"]))
    return plain_text(class_name(str(anno.get("category_name") or "")))


def _box(anno: Any) -> tuple[float, float, float, float] | None:
    box = corners(anno.get("bbox")) if isinstance(anno, dict) else None
    return box if box and all(map(math.isfinite, box)) else None
