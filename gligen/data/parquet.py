"""Reads parquet files with pictures in them (needs pyarrow): Hugging Face's, LayoutSAM's, GRIT's after img2dataset.

Known columns: the picture (`image`, `jpg`, …) as bytes or Hugging Face's {bytes, path}; captions; and boxes as
`entities` (fractions), `objects` (xywh in pixels; class numbers get the names that the file tells), LayoutSAM's
`bbox_list` (xyxy in pixels) with `region_captions`, or GRIT's `noun_chunks` [start, end, x0, y0, x1, y1, score] in
fractions, spans of the caption. Lists may be text. One picture costs reading its row group: build large sets first.
"""

from __future__ import annotations

import ast
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gligen.data.annotations import FRACTIONS, PIXELS, Annotations, Collector
from gligen.data.coco import spans
from gligen.data.example import BadExample, Findings
from gligen.data.folder import add_boxes, captions_of

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
NAMES = ("file_name", "filename", "image_path", "key", "id", "image_id")
BOXES = ("entities", "objects", "bbox_list", "noun_chunks")
_TRAIN = "train"


def find(path: Path) -> list[Path]:
    """The parquet files of a path: itself, or those in the folder or its `data/`."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    places = [folder for folder in (path, path / "data") if folder.is_dir()]
    return next((files for folder in places if (files := sorted(folder.glob("*.parquet")))), [])


@dataclass(frozen=True)
class RowGroups:
    """Pictures by the number of their row in all files together. starts: (file, group in it) begin at these rows."""

    files: tuple[Path, ...]
    column: str
    starts: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]

    def read(self, row: int) -> bytes:
        which = bisect_right(self.starts, row) - 1
        file, group = self.groups[which]
        with _open(self.files[file]) as parquet:
            value = parquet.read_row_group(group, columns=[self.column])[self.column][row - self.starts[which]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise BadExample("parquet row without picture bytes", f"{self.files[file].name}, row {row}: {value!r:.60}")
        return content


def read(files: list[Path], findings: Findings) -> tuple[Annotations, RowGroups]:
    """The rows of parquet files.

    Raises ValueError where there is no column of pictures, and where pyarrow is not installed.
    """
    splits = sorted({file.name.split("-")[0] for file in files if "-of-" in file.name})
    if len(splits) > 1 and _TRAIN in splits:
        files = [file for file in files if file.name.startswith(f"{_TRAIN}-")]
        findings.notes.append(f"the split {_TRAIN}; there are {', '.join(splits)}: name a file to use another")
    findings.format = f"parquet ({files[0].name}{f' and {len(files) - 1} more' if len(files) > 1 else ''})"
    collector = Collector()
    starts: list[int] = []
    groups: list[tuple[int, int]] = []
    column = ""
    for number, file in enumerate(files):
        with _open(file) as parquet:
            names = parquet.schema_arrow.names
            column = _picture_column(names, file)
            start = len(collector)
            for group in range(parquet.num_row_groups):
                starts.append(start)
                groups.append((number, group))
                start += parquet.metadata.row_group(group).num_rows
            classes = _class_names(parquet.schema_arrow.metadata)
            wanted = [name for name in names if name != column]
            for row, item in enumerate(_items(parquet, wanted)):
                _add_row(f"{file.name}/{row}", item, collector, classes, findings)
    return collector.annotations(findings), RowGroups(tuple(files), column, tuple(starts), tuple(groups))


def _open(path: Path) -> Any:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install 'gligen[data]'") from None
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from None


def _picture_column(names: list[str], file: Path) -> str:
    found = [name for name in PICTURES if name in names]
    if not found:
        fetch = " It has URLs: fetch them first, img2dataset makes tar shards of them." if "url" in names else ""
        raise ValueError(f"{file}: no column of pictures ({', '.join(PICTURES)}) among {', '.join(names)}.{fetch}")
    return found[0]


def _items(parquet: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in parquet.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def _add_row(
    key: str, item: dict[str, Any], collector: Collector, classes: Mapping[str, list[str]], findings: Findings
) -> None:
    given = [name for name in BOXES if item.get(name) is not None]
    item = {**item, **{name: _listed(item[name]) for name in (*given, "region_captions", "keypoints") if name in item}}
    w, h = item.get("width"), item.get("height")
    size = (int(w), int(h)) if isinstance(w, (int, float)) and isinstance(h, (int, float)) and w > 0 < h else PIXELS
    is_pixels = bool(given) and given[0] in ("objects", "bbox_list")
    name = next((item[name] for name in NAMES if isinstance(item.get(name), str) and item[name]), key)
    row = collector.picture(name, size if is_pixels else FRACTIONS)
    captions = captions_of(item)
    for caption in dict.fromkeys(captions):
        collector.caption(row, caption)
    if len(given) > 1:
        findings.leave_out(f"{', '.join(given[1:])} of a row that has {given[0]}", key)
    facts = {name: item.get(name) for name in (*given[:1], "keypoints")}
    if "noun_chunks" in facts:
        caption = captions[0] if captions else ""
        chunks = item["noun_chunks"] if isinstance(item["noun_chunks"], list) else []
        whole = [[int(c[0]), int(c[1]), *c[2:]] for c in chunks if isinstance(c, list) and len(c) >= 6]
        findings.leave_out("noun chunk of fewer than 6 numbers", key, len(chunks) - len(whole))
        facts = {"entities": [{"phrase": spans(caption, [c[:2]]), "box": c[2:6]} for c in whole]}
    elif "bbox_list" in facts:
        boxes, phrases = item["bbox_list"], item.get("region_captions")
        if not isinstance(boxes, list) or not isinstance(phrases, list) or len(boxes) != len(phrases):
            findings.leave_out("bbox_list without as many region_captions", key)
            return
        facts = {"entities": [{"phrase": phrase, "box": box} for phrase, box in zip(phrases, boxes, strict=True)]}
    elif "objects" in facts:
        things = facts["objects"]
        if isinstance(things, list):  # a list of structs
            rows = [thing for thing in things if isinstance(thing, dict)]
            things = {name: [thing.get(name) for thing in rows] for name in (rows[0] if rows else ())}
        if isinstance(things, dict):
            for name in things.keys() & classes.keys():
                if isinstance(things[name], list):
                    names = dict(enumerate(classes[name]))
                    things[name] = [names.get(i, i) if isinstance(i, int) else i for i in things[name]]
        facts["objects"] = things
    add_boxes(key, facts, row, collector, findings)


def _listed(value: Any) -> Any:
    """Lists that were stored as text, in JSON or as Python writes them."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of class numbers by the field of `objects`, as Hugging Face's datasets write them into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["objects"]
    except (KeyError, ValueError, TypeError):
        return {}
    if isinstance(features, list):  # a list of structs
        features = features[0]
    features = features.get("feature", features) if isinstance(features, dict) else {}
    found = {}
    for name, feature in features.items():
        inner = feature[0] if isinstance(feature, list) else feature
        inner = inner.get("feature", inner) if isinstance(inner, dict) else {}
        if isinstance(inner, dict) and isinstance(inner.get("names"), list):
            found[name] = [str(label) for label in inner["names"]]
    return found
