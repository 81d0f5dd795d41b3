"""Reads a folder of pictures with what is said about them beside: `.txt` or `.caption` files, JSONL or CSV.

- text files: `a.jpg` has its caption in `a.txt` or `a.caption` (kohya's layout).
- JSONL, one object a line (`metadata.jsonl` of Hugging Face's imagefolder, or any other): `file_name`, and of `caption`
  (or `text`), `entities: [{"phrase", "box": [x0, y0, x1, y1] in fractions}]`, `keypoints` (as in request files), or
  imagefolder's `objects: {"bbox": [[x, y, w, h] in pixels], "categories": [names]}` those that are known.
- CSV with a header: `file_name`, `caption`, and for boxes `phrase, x0, y0, x1, y1`, in fractions if no number is above
  1.5, else in pixels; a picture may have several rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gligen.data.annotations import FRACTIONS, PIXELS, Annotations, Collector, Files, four_numbers
from gligen.data.example import Findings
from gligen.data.files import PictureFiles, class_name, find_pictures
from gligen.request import NUM_KEYPOINTS

CAPTIONS = (".txt", ".caption")
FILE_NAMES = ("file_name", "image", "image_path", "path", "file", "filename")
TEXTS = ("caption", "text", "prompt", "global_caption")
CORNERS = ("x0", "y0", "x1", "y1")
ABOVE_FRACTIONS = 1.5


def find(path: Path) -> list[Path]:
    """The files that say things about a folder's pictures: its JSONL or CSV files, else its caption files.

    A JSONL or CSV file may be named itself.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in (".jsonl", ".csv") else []
    if not path.is_dir():
        return []
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in (".jsonl", ".csv"))
    return tables or sorted(file for file in path.rglob("*") if file.suffix.lower() in CAPTIONS)


def read(
    path: Path, findings: Findings, *, said: Sequence[Path], images: Path | None = None
) -> tuple[Annotations, Files]:
    """The rows of a folder. said: the files that `find` gives; with none of them pictures have no captions.

    Raises FileNotFoundError where there are no pictures, ValueError for several tables or one without file names.
    """
    folder = path if path.is_dir() else path.parent
    files = find_pictures(images, [folder])
    collector = Collector()
    tables = [file for file in said if file.suffix.lower() not in CAPTIONS]
    if len(tables) > 1:
        raise ValueError(f"{folder}: {', '.join(file.name for file in tables)}: name the one that is meant")
    if tables:
        findings.format = f"pictures with {tables[0].name}"
        rows = _json_lines(tables[0], findings) if tables[0].suffix.lower() == ".jsonl" else _csv_rows(tables[0])
        _read_table(rows, tables[0], collector, files, findings)
    else:
        findings.format = "pictures with caption files" if said else "pictures without captions"
        _read_captions(folder, said, collector, files, findings)
    return collector.annotations(findings), Files(files.folder, collector.keys)


def _read_captions(
    folder: Path, said: Sequence[Path], collector: Collector, files: PictureFiles, findings: Findings
) -> None:
    pictures = files.by_stem()
    captions: dict[str, Path] = {}
    for file in said:
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if stem in captions:
            findings.leave_out("caption file of a picture that has another", file.name)
        elif stem not in pictures:
            findings.leave_out("text file of no picture", file.name)
        else:
            captions[stem] = file
    for stem, name in pictures.items():
        row = collector.picture(name, PIXELS)
        if stem in captions:
            collector.caption(row, captions[stem].read_text(encoding="utf-8-sig", errors="replace"))
        elif said:
            findings.leave_out("caption (a picture without one)", name)


def _json_lines(path: Path, findings: Findings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                findings.lose("line that is not JSON", f"{where}: {error}")
                continue
            if isinstance(item, dict):
                yield where, item
            else:
                findings.lose("line that is no JSON object", where)


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        columns = [name for name in reader.fieldnames or () if name]
        if not set(columns) & set(FILE_NAMES):
            raise ValueError(f"{path}: no column of file names ({', '.join(FILE_NAMES)}) among {', '.join(columns)}")
        rows = [(f"{path.name}, line {reader.line_num}", row) for row in reader]
    has_boxes = all(name in columns for name in ("phrase", *CORNERS))
    corners = [four_numbers(row.get(name) for name in CORNERS) if has_boxes else None for _, row in rows]
    is_pixels = any(max(box) > ABOVE_FRACTIONS for box in corners if box)
    for (where, row), box in zip(rows, corners, strict=True):
        item: dict[str, Any] = dict(row)
        if has_boxes and (row.get("phrase") or "").strip():
            item["in pixels" if is_pixels else "entities"] = [{"phrase": row["phrase"], "box": box}]
        yield where, item


def _read_table(
    items: Iterator[tuple[str, Mapping[str, Any]]],
    path: Path,
    collector: Collector,
    files: PictureFiles,
    findings: Findings,
) -> None:
    is_csv = path.suffix.lower() == ".csv"
    rows: dict[str, int] = {}
    said: set[tuple[str, str]] = set()
    for where, item in items:
        named = next((item[name] for name in FILE_NAMES if isinstance(item.get(name), str) and item[name]), None)
        if named is None:
            findings.lose("line without a file name", where)
            continue
        found = files.find_or_lose(findings, f"{where}: ", named)
        if found is None:
            continue
        is_pixels = "in pixels" in item or not ("entities" in item or item.get("keypoints"))
        if found in rows and not is_csv:
            findings.leave_out("line of a picture that has one", f"{where}: {named}")
            continue
        if found not in rows:
            rows[found] = collector.picture(found, PIXELS if is_pixels else FRACTIONS)
        row = rows[found]
        for caption in captions_of(item):
            if (found, caption) not in said:
                said.add((found, caption))
                collector.caption(row, caption)
        add_boxes(where, item, row, collector, findings)
    for name in files.names():
        if name not in rows:
            findings.leave_out(f"picture that {path.name} does not name", name)


def captions_of(item: Mapping[str, Any]) -> list[str]:
    """All texts of a line that are captions."""
    texts = [text for name in TEXTS for text in (item[name] if isinstance(item.get(name), list) else [item.get(name)])]
    return [text for text in texts if isinstance(text, str)]


def add_boxes(where: str, item: Mapping[str, Any], row: int, collector: Collector, findings: Findings) -> None:
    """Adds a line's entities, objects and keypoints to its row; what is wrong with them is counted."""
    if "objects" in item and ("entities" in item or item.get("keypoints")):
        findings.leave_out("objects, in pixels, of a line that has entities or keypoints, fractions", where)
    elif isinstance(item.get("objects"), dict):
        _add_objects(where, item["objects"], row, collector, findings)
        return
    entities = item.get("entities", item.get("in pixels", []))
    for entity in entities if isinstance(entities, list) else [entities]:
        box = four_numbers(entity.get("box")) if isinstance(entity, dict) else None
        if box is None:
            findings.leave_out("entity without a box of four numbers", f"{where}: {str(entity)[:60]}")
        else:
            collector.box(row, str(entity.get("phrase") or ""), box)
    for person in item.get("keypoints") or []:
        is_person = isinstance(person, list) and len(person) == NUM_KEYPOINTS
        if is_person and all(p is None or (isinstance(p, list) and len(p) == 2) for p in person):
            collector.person(row, [x for p in person for x in ((p[0], p[1], 2.0) if p else (0.0, 0.0, 0.0))])
        else:
            findings.leave_out(f"keypoints that are not {NUM_KEYPOINTS} points [x, y] or null", where)


def _add_objects(where: str, objects: Mapping[str, Any], row: int, collector: Collector, findings: Findings) -> None:
    """Hugging Face imagefolder's: lists of xywh boxes and of names."""
    boxes: list[Any] = objects.get("bbox") or []
    keys = [key for key in ("categories", "category", "labels", "label") if key in objects]
    names: list[Any] = objects[keys[0]] if keys else []
    if len(names) != len(boxes) or not all(isinstance(name, str) for name in names):
        findings.leave_out("objects without as many category names as boxes", where)
        return
    for name, xywh in zip(names, boxes, strict=True):
        box = four_numbers(xywh)
        if box is None:
            findings.leave_out("entity without a box of four numbers", f"{where}: {xywh}")
        else:
            x, y, w, h = box
            collector.box(row, class_name(name), (x, y, x + w, y + h))
