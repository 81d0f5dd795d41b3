"""Small sets of pictures in every format, made in a test's folder."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

_NEAR = [parent / "shared/real" for parent in Path(__file__).resolve().parents]
REAL = next((path for path in _NEAR if path.is_dir()), _NEAR[3])  # beside the checkout
needs_voc = pytest.mark.skipif(not (REAL / "voc").is_dir(), reason="no real pictures beside the checkout")

# name, width, height, boxes as (phrase, x0, y0, x1, y1) in pixels
TRUTH = (
    ("a.png", 80, 60, (("cat", 8.0, 6.0, 48.0, 36.0), ("red car", 40.0, 12.0, 80.0, 60.0))),
    ("b.png", 64, 96, (("cat", 0.0, 0.0, 32.0, 48.0),)),
    ("c.png", 64, 64, (("dog", 16.0, 16.0, 48.0, 64.0), ("cat", 8.0, 40.0, 24.0, 56.0), ("dog", 0.0, 0.0, 20.0, 20.0))),
)
NAMES = ("cat", "red car", "dog")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every pixel differs, but neighbours resemble."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, width, height, _) in enumerate(TRUTH):
        noise(width, height, i).save(folder / name)


def coco_data() -> dict[str, Any]:
    images = [{"id": i, "file_name": name, "width": w, "height": h} for i, (name, w, h, _) in enumerate(TRUTH)]
    annotations = [
        {"id": 10 * i + k, "image_id": i, "category_id": NAMES.index(name) + 5, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for i, (_, _, _, boxes) in enumerate(TRUTH)
        for k, (name, x0, y0, x1, y1) in enumerate(boxes)
    ]
    categories = [{"id": i + 5, "name": name} for i, name in enumerate(NAMES)]
    return {"annotations": annotations, "images": images, "categories": categories}


def write_coco(folder: Path, data: dict[str, Any] | None = None, name: str = "instances_x.json") -> Path:
    """A COCO set of TRUTH, or of other data; pictures in images/ unless they are there."""
    write_pictures(folder / "images")
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / name
    path.write_text(json.dumps(coco_data() if data is None else data))
    return path


def write_yolo(folder: Path) -> Path:
    write_pictures(folder / "images/train")
    labels = folder / "labels/train"
    labels.mkdir(parents=True)
    for name, w, h, boxes in TRUTH:
        lines = [
            f"{NAMES.index(n)} {(x0 + x1) / 2 / w!r} {(y0 + y1) / 2 / h!r} {(x1 - x0) / w!r} {(y1 - y0) / h!r}\n"
            for n, x0, y0, x1, y1 in boxes
        ]
        (labels / name).with_suffix(".txt").write_text("".join(lines))
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames: {list(NAMES)}\n")
    return folder


def write_voc(folder: Path) -> Path:
    write_pictures(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, w, h, boxes in TRUTH:
        objects = "".join(
            f"<object><name>{n}</name><bndbox><xmin>{x0:g}</xmin><ymin>{y0:g}</ymin><xmax>{x1:g}</xmax>"
            f"<ymax>{y1:g}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>"
            "<ymax>2</ymax></bndbox></part></object>"
            for n, x0, y0, x1, y1 in boxes
        )
        size = f"<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
        path = (folder / "Annotations" / name).with_suffix(".xml")
        path.write_text(f"<annotation><filename>{name}</filename>{size}{objects}</annotation>")
    return folder


def write_jsonl(folder: Path) -> Path:
    write_pictures(folder)
    with open(folder / "metadata.jsonl", "w") as file:
        for name, w, h, boxes in TRUTH:
            entities = [{"phrase": n, "box": [x0 / w, y0 / h, x1 / w, y1 / h]} for n, x0, y0, x1, y1 in boxes]
            file.write(json.dumps({"file_name": name, "caption": f"picture {name}", "entities": entities}) + "\n")
    return folder


def write_csv(folder: Path) -> Path:
    write_pictures(folder)
    with open(folder / "boxes.csv", "w") as file:
        file.write("file_name,caption,phrase,x0,y0,x1,y1\n")
        for name, _, _, boxes in TRUTH:
            for n, *box in boxes:
                file.write(f"{name},picture {name},{n},{','.join(map(str, box))}\n")
    return folder


def write_objects(folder: Path) -> Path:
    """Hugging Face imagefolder with objects."""
    write_pictures(folder)
    with open(folder / "metadata.jsonl", "w") as file:
        for name, _, _, boxes in TRUTH:
            xywh = [[x0, y0, x1 - x0, y1 - y0] for _, x0, y0, x1, y1 in boxes]
            objects = {"bbox": xywh, "categories": [box[0] for box in boxes]}
            file.write(json.dumps({"file_name": name, "objects": objects}) + "\n")
    return folder


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def truth(name: str) -> list[tuple[str, tuple[float, ...]]]:
    _, w, h, boxes = next(row for row in TRUTH if row[0] == name)
    return [(n, (x0 / w, y0 / h, x1 / w, y1 / h)) for n, x0, y0, x1, y1 in boxes]


def same_boxes(
    entities: Sequence[Any], expected: Sequence[tuple[str, tuple[float, ...]]], within: float = 1e-12
) -> bool:
    return len(entities) == len(expected) and all(
        entity.phrase == phrase and np.allclose(entity.box, box, rtol=0, atol=within)
        for entity, (phrase, box) in zip(entities, expected, strict=True)
    )
