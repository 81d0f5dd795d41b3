"""What is known about every picture of a set, held compactly, and the source made of it: all formats end up here.

A reader (coco.py, yolo.py, …) collects rows: a picture's name, the size its boxes were measured in, captions, boxes
with phrases, people. `Collector.annotations` checks all boxes at once and counts what is wrong. About 100 bytes a
picture and 50 a box remain; pictures are read in `example(n)`.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gligen.data.example import BadExample, Example, Fault, Findings, sampled
from gligen.data.geometry import boxes_to_upright, to_upright
from gligen.data.map_files import MapFolder
from gligen.data.pictures import annotated_frame, decode_picture, picture_shape
from gligen.modes import Mode
from gligen.request import NUM_KEYPOINTS, Entity, Person

FRACTIONS = (1, 1)  # the size that boxes in fractions of the upright picture were measured in
PIXELS = (0, 0)  # not said: pixels of the upright picture, whatever its size
LONG_PHRASE = 75  # words; CLIP reads 75 tokens, and a word is at least one
OUTSIDE = "box outside its picture"
SLACK = 1.5  # pixels that a box may reach over the border without a word: rounding, 1-based corners


def plain_text(text: str) -> str:
    """One line of valid Unicode: halves of surrogate pairs, which JSON may hold, become question marks."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def printable(name: str) -> str:
    """A file's name as valid Unicode: bytes that are no UTF-8 become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def four_numbers(values: Any) -> tuple[float, float, float, float] | None:
    """A box as a file has it, numbers or text of numbers, an empty one NaN; None where they are not four."""
    try:
        x0, y0, x1, y1 = (math.nan if x is None else float(x) for x in values)
    except (TypeError, ValueError):
        return None
    return x0, y0, x1, y1


class Strings(Sequence[str]):
    """Texts, end to end in UTF-8: a tenth of what a list of str takes."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogateescape")  # file names that are not UTF-8 stay what they are
        self._ends.append(len(self._bytes))

    def digest_into(self, digest: Any) -> None:
        """Updates a hashlib digest with all texts and where they end."""
        digest.update(self._bytes)
        digest.update(self._ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # two kinds of index, as for every sequence
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        i %= len(self)
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


class Pictures(Protocol):
    """The source of pictures' bytes, by the number of their row."""

    def read(self, row: int) -> bytes:
        """The file's content as it lies there. Raises OSError or BadExample."""


@dataclass(frozen=True)
class Files:
    """Pictures in a folder; names are relative to it."""

    folder: Path
    names: Sequence[str]

    def read(self, row: int) -> bytes:
        return (self.folder / self.names[row]).read_bytes()


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Rows of a set. n pictures, c captions, m boxes, p people; `*_starts` (n + 1) say whose they are.

    sizes: (n, 2) int32, the width and height that boxes and points are measured in, or FRACTIONS or PIXELS.
    boxes: (m, 4) float64 xyxy; points: (p, 17, 3) float64 x, y, visibility (0 is absent).
    """

    keys: Strings
    sizes: NDArray[np.int32]
    captions: Strings
    caption_starts: NDArray[np.int64]
    boxes: NDArray[np.float64]
    phrases: Strings  # different ones
    phrase_ids: NDArray[np.int32]  # (m,)
    box_starts: NDArray[np.int64]
    points: NDArray[np.float64]
    point_starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)


class Collector:
    """Gathers rows in any order of boxes and people; `annotations` sorts them by row and checks them."""

    def __init__(self) -> None:
        self.keys = Strings()
        self._sizes = array("i")
        self._captions, self._caption_rows = Strings(), array("q")
        self._boxes, self._box_rows, self._phrase_ids = array("d"), array("q"), array("i")
        self._phrases: dict[str, int] = {}
        self._points, self._point_rows = array("d"), array("q")

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, key: str, size: tuple[int, int]) -> int:
        """A new row; returns its number. size: as in `Annotations`."""
        self.keys.append(key)
        self._sizes.extend(size)
        return len(self.keys) - 1

    def caption(self, row: int, caption: str) -> None:
        if caption.strip():
            self._captions.append(plain_text(caption))
            self._caption_rows.append(row)

    def box(self, row: int, phrase: str, box: Sequence[float]) -> None:
        phrase = plain_text(phrase)
        self._boxes.extend(box)
        self._box_rows.append(row)
        self._phrase_ids.append(self._phrases.setdefault(phrase, len(self._phrases)))

    def person(self, row: int, points: Sequence[float]) -> None:
        """A person of COCO's points: 51 numbers x, y, visibility in COCO's order."""
        self._points.extend(points)
        self._point_rows.append(row)

    def annotations(self, findings: Findings) -> Annotations:
        """The rows, without boxes that cannot be; what was wrong is counted in findings."""
        n = len(self.keys)
        sizes = np.array(self._sizes, np.int32).reshape(n, 2)
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)
        rows = np.array(self._box_rows, np.int64)
        ids = np.array(self._phrase_ids, np.int32)
        phrases = list(self._phrases)
        good = self._good_boxes(sizes, boxes, rows, ids, phrases, findings)
        order = np.flatnonzero(good)[np.argsort(rows[good], kind="stable")]
        boxes, rows, ids = boxes[order], rows[order], ids[order]

        points = np.array(self._points, np.float64).reshape(-1, NUM_KEYPOINTS, 3)
        people = np.array(self._point_rows, np.int64)
        seen = (np.isfinite(points).all(2) & (points[..., 2] > 0)).any(1)
        for i in np.flatnonzero(~seen):
            findings.leave_out("person without a visible keypoint", self.keys[int(people[i])])
        order = np.flatnonzero(seen)[np.argsort(people[seen], kind="stable")]

        caption_rows = np.array(self._caption_rows, np.int64)
        by_row = np.argsort(caption_rows, kind="stable")
        is_sorted = bool((by_row == np.arange(len(by_row))).all())
        captions = self._captions if is_sorted else Strings(self._captions[int(i)] for i in by_row)
        return Annotations(
            keys=self.keys,
            sizes=sizes,
            captions=captions,
            caption_starts=_starts(caption_rows, n),
            boxes=boxes,
            phrases=Strings(phrases),
            phrase_ids=ids,
            box_starts=_starts(rows, n),
            points=points[order],
            point_starts=_starts(people[order], n),
        )

    def _good_boxes(
        self,
        sizes: NDArray[np.int32],
        boxes: NDArray[np.float64],
        rows: NDArray[np.int64],
        ids: NDArray[np.int32],
        phrases: list[str],
        findings: Findings,
    ) -> NDArray[np.bool_]:
        """Which boxes can be; those that cannot are counted, as are those that will not be seen whole."""

        def tell(reason: str, wrong: Any) -> None:
            if len(which := np.flatnonzero(good & wrong)):
                i = int(which[0])
                place = ", ".join(f"{x:g}" for x in boxes[i])
                what = f"{self.keys[int(rows[i])]}, '{phrases[ids[i]][:40]}' at {place}"
                findings.leave_out(reason, what, len(which))

        side = sizes[rows].astype(np.float64)
        knows = side[:, 0] > 0
        side = np.where(knows[:, None], side, np.inf)
        x0, y0, x1, y1 = boxes.T
        with np.errstate(invalid="ignore"):
            inside_x = np.minimum(x1, side[:, 0]) - np.maximum(x0, 0)
            inside_y = np.minimum(y1, side[:, 1]) - np.maximum(y0, 0)
            slack = np.where((side == FRACTIONS).all(1), 0.005, SLACK)
            over = np.maximum(np.maximum(-x0, -y0), np.maximum(x1 - side[:, 0], y1 - side[:, 1])) > slack
        good = np.ones(len(boxes), bool)
        for reason, wrong in (
            ("box with a number that is none", ~np.isfinite(boxes).all(1)),
            ("box without area", (x1 <= x0) | (y1 <= y0)),
            (OUTSIDE, (inside_x <= 0) | (inside_y <= 0)),
            ("box without a phrase", np.array([not phrase for phrase in phrases], bool)[ids]),
        ):
            tell(reason, wrong)
            good &= ~wrong
        tell("part of a box beyond its picture", over)
        is_long = np.array([len(phrase.split()) > LONG_PHRASE for phrase in phrases], bool)
        tell(f"end of a phrase of more than {LONG_PHRASE} words", is_long[ids])
        return good


def _starts(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class AnnotatedSource:
    """Examples of a mode from annotations and pictures: whole pictures as they are, upright, with all their boxes.

    rows: the rows that the mode can use, in their order. maps, masks: folders matched by name.
    """

    annotations: Annotations
    pictures: Pictures
    mode: Mode
    rows: NDArray[np.int64]
    maps: MapFolder | None = None
    masks: MapFolder | None = None

    @property
    def size(self) -> int:
        return len(self.rows)

    def key(self, n: int) -> str:
        return printable(self._name(n))

    def picture(self, n: int) -> bytes:
        """The picture's file as it is. Raises BadExample."""
        row = self._row(n)
        try:
            return self.pictures.read(row)
        except OSError as error:
            key = self.key(n)
            raise BadExample("picture file missing or unreadable", f"{key}: {error.strerror or error}") from None

    def shape(self, n: int) -> tuple[int, int]:
        """Width and height of the picture: what the annotation says, else what the file does. Raises BadExample."""
        width, height = self.annotations.sizes[self._row(n)].tolist()
        is_told = (width, height) not in (FRACTIONS, PIXELS)
        return (width, height) if is_told else picture_shape(self.picture(n), self.key(n))

    def fingerprint(self) -> str:
        """Of all captions, and of all boxes and phrases or keypoints if the mode reads them; and of the map and mask
        files of SAMPLED examples."""
        known, digest = self.annotations, hashlib.sha256()  # the quickest of hashlib where CPUs help it
        texts, numbers = [known.keys, known.captions], [self.rows, known.sizes, known.caption_starts]
        if self.mode.takes_phrases:
            texts.append(known.phrases)
            numbers += [known.boxes, known.phrase_ids, known.box_starts]
        if self.mode.kind == "keypoint":
            numbers += [known.points, known.point_starts]
        for strings in texts:
            strings.digest_into(digest)
        for each in numbers:
            digest.update(np.ascontiguousarray(each).data)
        for n in sampled(self.size) if self.maps or self.masks else ():
            for folder in filter(None, (self.maps, self.masks)):
                digest.update(folder.head(self._name(n)))
        return digest.hexdigest()[:16]

    def example(self, n: int) -> Example:
        row, known, key = self._row(n), self.annotations, self.key(n)
        picture = decode_picture(self.picture(n), key)
        w, h = known.sizes[row].tolist()
        W, H, orientation = annotated_frame(picture, (w, h), key)
        faults: list[Fault] = []
        entities: tuple[Entity, ...] = ()
        people: tuple[Person, ...] = ()
        if self.mode.takes_phrases:
            start, end = known.box_starts[row : row + 2]
            boxes = boxes_to_upright(known.boxes[start:end] / (W, H, W, H), orientation)
            phrases = [known.phrases[i] for i in known.phrase_ids[start:end].tolist()]
            entities = make_entities(boxes, phrases, n, key, faults)
        if self.mode.kind == "keypoint":
            start, end = known.point_starts[row : row + 2]
            points = known.points[start:end]
            people = make_people(to_upright(points[..., :2] / (W, H), orientation), points[..., 2])
        start, end = known.caption_starts[row : row + 2]
        captions = known.captions[start:end]
        return Example(
            image=picture.pixels,
            caption=captions[0] if captions else "",
            other_captions=tuple(captions[1:]),
            entities=entities,
            keypoints=people,
            map=self.maps.read(self._name(n), picture.pixels) if self.maps else None,
            mask=self.masks.read(self._name(n), picture.pixels) if self.masks else None,
            key=key,
            faults=tuple(faults),
        )

    def _name(self, n: int) -> str:
        """The picture's file, whatever bytes its name has."""
        return self.annotations.keys[self._row(n)]

    def _row(self, n: int) -> int:
        if not 0 <= n < self.size:
            raise IndexError(f"example {n} of {self.size}")
        return int(self.rows[n])


def make_entities(
    boxes: NDArray[np.float64], phrases: Sequence[str], n: int, key: str, faults: list[Fault]
) -> tuple[Entity, ...]:
    """Entities of boxes (m, 4) in fractions, clipped to the picture; those with nothing inside become faults."""
    entities = []
    for phrase, box, (x0, y0, x1, y1) in zip(phrases, boxes.tolist(), boxes.clip(0, 1).tolist(), strict=True):
        if x0 < x1 and y0 < y1:  # false for NaN too
            entities.append(Entity(phrase=phrase, box=(x0, y0, x1, y1)))
        else:
            where = ", ".join(f"{x:.4g}" for x in box)
            faults.append(Fault(reason=OUTSIDE, message=f"{key}, '{phrase[:40]}' at fractions {where}", number=n))
    return tuple(entities)


def make_people(xy: NDArray[np.float64], visibility: NDArray[np.float64]) -> tuple[Person, ...]:
    """People from points (p, 17, 2) in fractions; None for those with visibility 0 or outside the picture."""
    seen = (visibility > 0) & ((xy >= 0) & (xy <= 1)).all(-1) & xy.any(-1)
    return tuple(
        tuple((x, y) if is_seen else None for (x, y), is_seen in zip(points, row, strict=True))
        for points, row in zip(xy.tolist(), seen.tolist(), strict=True)
    )
