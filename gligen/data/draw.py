"""Writes the drawn world as real data: the same pictures and the same truth in each format that people have.

Everything a reader does can so be tested end to end, with the truth known exactly and nothing downloaded. Pictures are
pure functions of (seed, number) and written one by one, each whole or not at all: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from gligen.data.build import build
from gligen.data.drawn import SceneSource, draw_scene
from gligen.data.example import Findings
from gligen.data.maps import MAPS
from gligen.data.scenes import Scene
from gligen.data.shapes import PAIRS, phrase_of
from gligen.data.streams import Series
from gligen.files import write_atomically
from gligen.modes import Mode, get_mode
from gligen.request import NUM_KEYPOINTS, Person

log = logging.getLogger(__name__)

SETTINGS = ".drawn.json"  # what was asked for, so that another run does not go on with something else
ROWS = 1000  # of a TSV file
PHRASES = tuple(phrase_of(color, shape) for color, shape in PAIRS)  # class numbers are places in it
_PERSON = "person"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawing to make: pictures 0 … count - 1 of a series, at `size` pixels a side, with what a mode trains on."""

    mode: Mode
    count: int
    size: int
    series: int

    def __iter__(self) -> Iterator[Scene]:
        return (self.scene(n) for n in range(self.count))

    @property
    def has_people(self) -> bool:
        return self.mode.field == "keypoints"

    def scene(self, n: int) -> Scene:
        return draw_scene(self.mode, self.series, n, size=self.size)


def main(args: argparse.Namespace) -> None:
    """Runs `python -m gligen.data draw`. Raises ValueError for a folder that holds another drawing."""
    if args.count < 1 or args.size < 16:
        raise ValueError(f"--count {args.count} --size {args.size}: draw at least 1 picture of at least 16 pixels")
    series = Series.TRAINING if args.series == "training" else Series.EVALUATION
    drawing = Drawing(mode=get_mode(args.mode), count=args.count, size=args.size, series=series + args.seed)
    draw(drawing, args.format, args.out)
    print(args.out)


def draw(drawing: Drawing, form: str, out: Path) -> None:
    """Writes the drawing into the folder, or goes on with it.

    Raises ValueError if the folder holds something else, or the format cannot hold what the mode needs.
    """
    if drawing.has_people and form == "voc":
        raise ValueError("Pascal VOC holds no keypoints: draw them as coco, yolo or folder")
    if not drawing.mode.takes_phrases and form == "tsv":
        raise ValueError(f"GLIGEN's TSV holds nothing for {drawing.mode.name}: draw it as coco, yolo or folder")
    settings = {"format": form, "mode": drawing.mode.name, "size": drawing.size, "series": drawing.series}
    path = out / SETTINGS
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != settings:
            raise ValueError(f"{out} holds another drawing ({there}): give another folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and holds no drawing: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings).encode())
    FORMATS[form](drawing, out)


def _pictures(drawing: Drawing, folder: Path, out: Path) -> Iterator[tuple[str, Scene]]:
    """Every scene with its file's name; pictures, and maps where the mode needs them, are written if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = out / drawing.mode.name if drawing.mode.is_map else None
    if maps:
        maps.mkdir(exist_ok=True)
    kept = 0
    for scene in drawing:
        name = f"{scene.index:06d}.png"
        if (folder / name).exists() and (maps is None or (maps / name).exists()):
            kept += 1
        else:
            if maps:
                write_atomically(maps / name, _encode(MAPS[drawing.mode.name](scene, None), "PNG"))
            write_atomically(folder / name, _encode(scene.image, "PNG"))
        yield name, scene
    log.info("%d pictures drawn, %d were there", drawing.count - kept, kept)


def _encode(pixels: Any, form: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}))
    return content.getvalue()


def _coco(drawing: Drawing, out: Path) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for name, scene in _pictures(drawing, out / "images", out):
        number = scene.index + 1
        images.append({"id": number, "file_name": name, "width": scene.size, "height": scene.size})
        captions.append({"id": number, "image_id": number, "caption": scene.caption})
        for label, box, person in _things(scene):
            x0, y0, x1, y1 = (value * scene.size for value in box)
            w, h = x1 - x0, y1 - y0
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": label + 1,
                "bbox": [x0, y0, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            if person is not None:
                points = [p and (p[0] * scene.size, p[1] * scene.size, 2) for p in person]
                annotation |= {
                    "keypoints": [value for p in points for value in p or (0, 0, 0)],
                    "num_keypoints": sum(p is not None for p in points),
                }
            annotations.append(annotation)
    names = (_PERSON,) if drawing.has_people else PHRASES
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    kind = "person_keypoints" if drawing.has_people else "instances"
    folder = out / "annotations"
    folder.mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    _write_json(folder / f"{kind}_drawn.json", content)
    _write_json(folder / "captions_drawn.json", {"images": images, "annotations": captions})


def _yolo(drawing: Drawing, out: Path) -> None:
    (out / "labels").mkdir(exist_ok=True)
    for name, scene in _pictures(drawing, out / "images", out):
        lines = []
        for label, (x0, y0, x1, y1), person in _things(scene):
            numbers = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            for point in person or ():
                numbers += [*point, 2] if point else [0, 0, 0]
            lines.append(" ".join([str(label), *map(repr, numbers)]) + "\n")
        write_atomically((out / "labels" / name).with_suffix(".txt"), "".join(lines).encode())
    names = dict(enumerate((_PERSON,) if drawing.has_people else PHRASES))
    shape = {"kpt_shape": [NUM_KEYPOINTS, 3]} if drawing.has_people else {}
    described = {"path": ".", "train": "images", "val": "images", "names": names, **shape}
    write_atomically(out / "data.yaml", yaml.safe_dump(described, sort_keys=False).encode())


def _voc(drawing: Drawing, out: Path) -> None:
    folder = out / "Annotations"
    folder.mkdir(exist_ok=True)
    for name, scene in _pictures(drawing, out / "JPEGImages", out):
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = name
        size = ET.SubElement(root, "size")
        for side, pixels in (("width", scene.size), ("height", scene.size), ("depth", 3)):
            ET.SubElement(size, side).text = str(pixels)
        for item in scene.objects:
            thing = ET.SubElement(root, "object")
            ET.SubElement(thing, "name").text = item.phrase
            ET.SubElement(thing, "difficult").text = "0"
            box = ET.SubElement(thing, "bndbox")
            for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True):
                ET.SubElement(box, corner).text = str(round(value * scene.size))
        write_atomically((folder / name).with_suffix(".xml"), ET.tostring(root))


def _folder(drawing: Drawing, out: Path) -> None:
    lines = []
    for name, scene in _pictures(drawing, out / "images", out):
        line: dict[str, Any] = {"file_name": f"images/{name}", "caption": scene.caption}
        if scene.people:
            line["keypoints"] = scene.people
        else:
            line["entities"] = [{"phrase": item.phrase, "box": item.box} for item in scene.objects]
        lines.append(json.dumps(line) + "\n")
    write_atomically(out / "metadata.jsonl", "".join(lines).encode())


def _tsv(drawing: Drawing, out: Path) -> None:
    for chunk in range(math.ceil(drawing.count / ROWS)):
        numbers = range(chunk * ROWS, min((chunk + 1) * ROWS, drawing.count))
        rows = (_tsv_row(drawing.scene(n)) for n in numbers)
        path = out / f"train-{chunk:04d}.tsv"
        if not path.exists() or path.read_bytes().count(b"\n") != len(numbers):
            write_atomically(path, b"".join(rows))


def _tar(drawing: Drawing, out: Path) -> None:
    source = SceneSource(mode=drawing.mode.name, series=drawing.series, image_size=drawing.size)
    build(source, Findings(format="the drawn world"), out, mode=drawing.mode.name, count=drawing.count)


def _tsv_row(scene: Scene) -> bytes:
    annos = []
    for item in scene.objects:
        x0, y0, x1, y1 = (value * scene.size for value in item.box)
        start = scene.caption.find(item.phrase)
        span = [[start, start + len(item.phrase)]]
        annos.append({"bbox": [x0, y0, x1 - x0, y1 - y0], "tokens_positive": span})
    row = {
        "data_id": scene.index,
        "file_name": f"{scene.index:06d}.jpg",
        "image": base64.b64encode(_encode(scene.image, "JPEG")).decode(),
        "caption": scene.caption,
        "annos": annos,
    }
    return f"{scene.index}\t{json.dumps(row)}\n".encode()


def _things(scene: Scene) -> Iterator[tuple[int, tuple[float, ...], Person | None]]:
    """Class number, box in fractions and, for people, the points of everything in a scene.

    A person's box goes around the points, as COCO's goes around what is seen.
    """
    for item in scene.objects:
        yield PHRASES.index(item.phrase), item.box, None
    for person in scene.people:
        x, y = zip(*(point for point in person if point), strict=True)
        yield 0, (min(x), min(y), max(x), max(y)), person


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content).encode())


FORMATS: dict[str, Callable[[Drawing, Path], None]] = {
    "coco": _coco,
    "yolo": _yolo,
    "voc": _voc,
    "tsv": _tsv,
    "tar": _tar,
    "folder": _folder,
}
