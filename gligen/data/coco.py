"""Reads COCO JSON: COCO's instances, captions and keypoints, LVIS, Objects365, and MDETR's GoldG.

Dialects: LVIS names pictures by `coco_url`, and says of each which classes are labelled in it; Objects365 names them by
paths of another unpacking; GoldG has a caption with every image and `tokens_positive`, spans of it, with every box.
Boxes are xywh in pixels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gligen.data.annotations import PIXELS, Annotations, Collector, Files, printable
from gligen.data.example import Federation, Findings
from gligen.data.files import PictureFiles, class_name, find_pictures
from gligen.request import NUM_KEYPOINTS

_SPACE = re.compile(r"[ \t\n\r]*")
_HEAD = 1 << 16  # characters that tell what a JSON file is


def find(path: Path) -> list[Path]:
    """The COCO files that a path means: itself, or those in the folder and its `annotations`; captions files apart."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" and _looks_like_coco(path) else []
    places = [folder for folder in (path, path / "annotations") if folder.is_dir()]
    files = sorted(file for folder in places for file in folder.glob("*.json") if _looks_like_coco(file))
    return [file for file in files if not file.name.startswith("captions")] or files


def choose(files: list[Path], is_keypoint: bool) -> Path:
    """The one of several that the mode needs. Raises ValueError if that leaves a choice."""
    wanted = [file for file in files if ("keypoints" in file.name) == is_keypoint] or files
    if len(wanted) > 1:
        raise ValueError(
            f"{len(wanted)} COCO files ({', '.join(file.name for file in wanted[:4])}): name the one, {wanted[0]}"
        )
    return wanted[0]


def read(
    path: Path, findings: Findings, *, images: Path | None = None, captions: Path | None = None
) -> tuple[Annotations, Files]:
    """The rows of a COCO file.

    images: the folder of pictures; None looks beside the file, above an `annotations` folder and in `images/` of both.
    captions: COCO's captions file; None takes the one beside it of the same name, captions_… for instances_… .
    Raises ValueError for what is not COCO JSON, and FileNotFoundError where there are no pictures.
    """
    findings.format = f"COCO JSON ({path.name})"
    above = path.parent.parent if path.parent.name.lower() in ("annotations", "labels") else None
    nearby = [path.parent / "images", *([above / "images", above] if above else []), path.parent]
    files = find_pictures(images, nearby)
    if captions is None:
        beside = path.with_name(re.sub(r"^(instances|person_keypoints)_", "captions_", path.name))
        captions = beside if beside != path and beside.is_file() else None

    reader = _Reader(files, findings)
    text = _read_text(path)
    for name, item in items(text, path):  # in any order in the file, so annotations wait for the second pass
        if name == "categories":
            reader.add_category(item)
        elif name == "images":
            reader.add_image(item)
    if not reader.rows:
        raise ValueError(f"{path}: no images in it: a COCO file has a list 'images'")
    if captions is not None:
        findings.notes.append(f"captions from {captions.name}")
        for name, item in items(_read_text(captions), captions):
            if name == "annotations":
                reader.add_caption(item)
    for name, item in items(text, path):
        if name == "annotations" and "caption" in item and "bbox" not in item:
            reader.add_caption(item)
        elif name == "annotations":
            reader.add_annotation(item)
    findings.federation = reader.federation()
    return reader.collector.annotations(findings), Files(files.folder, reader.collector.keys)


class _Reader:
    """What is known of a file whose items are read one by one."""

    def __init__(self, files: PictureFiles, findings: Findings) -> None:
        self.files, self.findings, self.collector = files, findings, Collector()
        self.names: dict[Any, str] = {}  # of classes, by id
        self.frequency: dict[str, str] = {}
        self.labelled: dict[str, tuple[Any, Any]] = {}  # by key: ids of LVIS's classes that are absent, partly labelled
        self.rows: dict[Any, int | None] = {}  # of an image id; None: left out
        self.texts: dict[int, str] = {}  # GoldG's captions, to cut phrases from
        self.ids: set[Any] = set()  # of annotations

    def add_category(self, item: dict[str, Any]) -> None:
        number = _plain(item.get("id"))
        if number is not None:
            name = self.names[number] = class_name(str(item.get("name", "")))
            self.frequency[name] = str(item.get("frequency", ""))

    def add_caption(self, item: dict[str, Any]) -> None:
        row = self.rows.get(_plain(item.get("image_id")))
        if row is not None and isinstance(item.get("caption"), str):
            self.collector.caption(row, item["caption"])

    def add_image(self, item: dict[str, Any]) -> None:
        number = _plain(item.get("id"))
        name = item.get("file_name") or "/".join(str(item.get("coco_url", "")).split("/")[-2:])
        if not name or number is None:
            self.findings.lose("image without id or file_name", json.dumps(item)[:100])
            return
        if number in self.rows:
            self.findings.lose("image id given twice", f"{number} ({name})")
            return
        self.rows[number] = None
        found = self.files.find_or_lose(self.findings, "", str(name))
        if found is None:
            return
        w: Any = item.get("width")
        h: Any = item.get("height")
        known = all(isinstance(side, (int, float)) and math.isfinite(side) and side >= 1 for side in (w, h))
        row = self.rows[number] = self.collector.picture(found, (round(w), round(h)) if known else PIXELS)
        if isinstance(item.get("caption"), str):
            self.texts[row] = item["caption"]
            self.collector.caption(row, item["caption"])
        if "neg_category_ids" in item:
            self.labelled[printable(found)] = item["neg_category_ids"], item.get("not_exhaustive_category_ids")

    def add_annotation(self, item: dict[str, Any]) -> None:
        number, image = _plain(item.get("id")), _plain(item.get("image_id"))
        what = f"annotation {number} of image {image}"
        if image not in self.rows:
            self.findings.leave_out("annotation of an image that is not listed", what)
            return
        row = self.rows[image]
        if row is None:
            return  # its picture has been counted
        if number is not None:
            if number in self.ids:
                self.findings.leave_out("annotation id given twice", what)
                return
            self.ids.add(number)
        if item.get("iscrowd"):
            self.findings.leave_out("crowd region, not one thing", what)
            return
        box = corners(item.get("bbox"))
        if box is None:
            self.findings.leave_out("annotation without a box of four numbers", what)
            return
        phrase = self.names.get(_plain(item.get("category_id")), "")
        if item.get("tokens_positive") and row in self.texts:
            phrase = spans(self.texts[row], item["tokens_positive"])
        elif not phrase:
            self.findings.leave_out("annotation of a category without a name", f"{what}: {item.get('category_id')}")
            return
        self.collector.box(row, phrase, box)
        points = item.get("keypoints")
        if points is not None:
            if isinstance(points, list) and len(points) == 3 * NUM_KEYPOINTS:
                self.collector.person(row, points)
            else:
                self.findings.leave_out(f"keypoints that are not COCO's {NUM_KEYPOINTS}", what)

    def federation(self) -> Federation | None:
        def named(ids: Any) -> tuple[str, ...]:
            return tuple(self.names[i] for i in ids if _plain(i) in self.names) if isinstance(ids, list) else ()

        if not self.labelled:
            return None
        return Federation(
            absent={key: named(absent) for key, (absent, _) in self.labelled.items()},
            partial={key: named(partial) for key, (_, partial) in self.labelled.items()},
            frequency={name: kind for name, kind in self.frequency.items() if kind},
        )


def items(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in the lists of a JSON text's outermost object, with the list's name, one at a time: all at once
    would take ten times the memory.

    Raises ValueError, one line with the place, where the text is broken.
    """
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        assert match is not None  # it matches nothing too
        return match.end()

    def expect(characters: str, at: int) -> str:
        if text[at : at + 1] not in tuple(characters):
            raise json.JSONDecodeError(f"expected {' or '.join(characters)}", text, at)
        return text[at]

    try:
        at = skip(0)
        expect("{", at)
        at = skip(at + 1)
        while text[at : at + 1] != "}":
            key, at = decoder.raw_decode(text, at)
            at = skip(at)
            expect(":", at)
            at = skip(at + 1)
            if text[at : at + 1] == "[":
                at = skip(at + 1)
                while text[at : at + 1] != "]":
                    item, at = decoder.raw_decode(text, at)
                    if isinstance(item, dict):
                        yield key, item
                    at = skip(at)
                    at = skip(at + 1) if expect(",]", at) == "," else at
                at += 1
            else:
                _, at = decoder.raw_decode(text, at)
            at = skip(at)
            at = skip(at + 1) if expect(",}", at) == "," else at
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _looks_like_coco(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = file.read(_HEAD)
    return head.lstrip().startswith("{") and re.search(r'"(images|annotations|categories)"\s*:\s*\[', head) is not None


def _plain(value: Any) -> Any:
    return None if isinstance(value, (dict, list)) else value


def corners(bbox: Any) -> tuple[float, float, float, float] | None:
    """The corners xyxy of COCO's x, y, width, height; None where these are not four numbers."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(x, (int, float)) for x in bbox)):
        return None
    x, y, w, h = map(float, bbox)
    return x, y, x + w, y + h


def spans(caption: str, tokens_positive: Any) -> str:
    """The phrase of GoldG's character spans [[start, end], …] in the caption; '' for none that lies in it."""
    parts = []
    for span in tokens_positive if isinstance(tokens_positive, list) else []:
        if isinstance(span, list) and len(span) == 2 and all(isinstance(i, int) for i in span):
            parts.append(caption[max(0, span[0]) : max(0, span[1])].strip())
    return " ".join(filter(None, parts))
