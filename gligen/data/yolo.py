"""Reads YOLO: pictures and a text file for each, lines of `class cx cy w h` in fractions, and a file of class names.

Layouts: ultralytics' images/ and labels/ with data.yaml (and Roboflow's train/images), darknet's text files beside the
pictures with obj.names or classes.txt, labels alone in a folder with the pictures in a sibling. Lines may be polygons
(class x1 y1 x2 y2 …), whose bounds are the box, or poses where data.yaml says so (`kpt_shape`).
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from gligen.data.annotations import FRACTIONS, Annotations, Collector, Files
from gligen.data.example import Findings
from gligen.data.files import class_name, find_pictures
from gligen.fields import decode_file
from gligen.request import NUM_KEYPOINTS

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "obj.names", "classes.txt", "_darknet.labels")
_NOT_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt", "readme.txt", "requirements.txt", "notes.txt")


def find(path: Path) -> list[Path]:
    """The file of class names that makes a folder YOLO's, [] if there is none; in the folder or its labels'."""
    if path.is_file():
        return [path] if path.name in NAMES and _has_labels(path.parent) else []
    places = [folder for folder in (path, path / "labels") if folder.is_dir()]
    if path.name in ("labels", "obj_train_data"):
        places.append(path.parent)
    names = [folder / name for folder in places for name in NAMES if (folder / name).is_file()]
    return names[:1] if names and _has_labels(path) else []


def looks_without_names(path: Path) -> bool:
    """True if a folder has YOLO's images/ and labels/ but no names: then that is what is wrong with it."""
    return (path / "images").is_dir() and (path / "labels").is_dir() and any((path / "labels").rglob("*.txt"))


def read(path: Path, findings: Findings, *, names: Path, images: Path | None = None) -> tuple[Annotations, Files]:
    """The rows of a YOLO folder. names: the file of class names, as `find` gives it.

    Pictures without a label file, or with an empty one, are negatives: they have no boxes. Of the splits that data.yaml
    tells apart `train` is read; images names the folder of another.
    Raises ValueError for names that are none, FileNotFoundError where there are no pictures.
    """
    findings.format = f"YOLO (class names from {names.name})"
    folder = path if path.is_dir() else path.parent
    classes, has_points, dims = _read_names(names)
    files = find_pictures(images, [folder, folder.parent / "images", folder.parent])
    others = _other_splits(names) if images is None else {}
    labels = {
        _stem(name, "labels"): folder / name
        for name in _text_files(folder)
        if PurePosixPath(name).name.lower() not in _NOT_LABELS
    }
    collector = Collector()
    pictures: dict[str, str] = {}
    inside = files.folder.resolve().relative_to(folder.resolve()) if _is_inside(files.folder, folder) else Path()
    for name in files.names():
        stem = _stem(str(inside / name), "images")
        if stem in pictures:
            raise ValueError(f"{files.folder}: {pictures[stem]} and {name} have one label file: remove one")
        pictures[stem] = name
        label = labels.pop(stem, None)
        split = next((split for other, split in others.items() if _is_inside(files.folder / name, other)), None)
        if split is not None:
            findings.leave_out(f"picture of the split {split}", f"{name} (--images names the folder of another split)")
            continue
        row = collector.picture(name, FRACTIONS)
        if label is None:
            findings.leave_out("label file (a picture without one has no boxes)", name)
            continue
        for number, line in enumerate(label.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if line.strip():
                _add_line(line, f"{label.name}, line {number}", row, collector, classes, has_points, dims, findings)
    for stem, label in labels.items():
        if images is not None and inside != Path():
            continue  # of another split, which was not asked for
        findings.lose("picture file missing", f"{label.name} labels no picture {stem}.* in {files.folder}")
    annotations = collector.annotations(findings)
    return annotations, Files(files.folder, annotations.keys)


def _add_line(
    line: str,
    where: str,
    row: int,
    collector: Collector,
    classes: dict[int, str],
    has_points: bool,
    dims: int,
    findings: Findings,
) -> None:
    try:
        which, *numbers = map(float, line.split())
    except ValueError:
        findings.leave_out("label line that is not numbers", f"{where}: {line[:60]}")
        return
    is_pose = has_points and len(numbers) == 4 + dims * NUM_KEYPOINTS
    is_polygon = not has_points and len(numbers) >= 6 and len(numbers) % 2 == 0
    if not (len(numbers) in (4, 5) or is_pose or is_polygon):  # a fifth is a confidence
        findings.leave_out("label line of another length", f"{where}: {len(numbers) + 1} numbers")
        return
    if which not in classes:
        findings.leave_out("label of a class without a name", f"{where}: class {which:g} of {len(classes)}")
        return
    if is_polygon:
        x, y = numbers[::2], numbers[1::2]
        box = (min(x), min(y), max(x), max(y))
    else:
        cx, cy, w, h = numbers[:4]
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    collector.box(row, classes[int(which)], box)
    if is_pose:
        points = numbers[4:]
        triples = [points[i : i + dims] for i in range(0, len(points), dims)]
        collector.person(row, [x for p in triples for x in (p if dims == 3 else [*p, float(any(p))])])


def _read_names(path: Path) -> tuple[dict[int, str], bool, int]:
    """Class names by number, whether labels are poses of 17 points, and of how many numbers a point is."""
    if path.suffix not in (".yaml", ".yml"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return {i: class_name(line) for i, line in enumerate(lines) if line}, False, 0
    data: Any = decode_file(path.read_bytes(), path)
    names = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(i, int) for i in names):
        raise ValueError(f"{path}: no class names: give `names`, a list, or a mapping from numbers")
    shape = data.get("kpt_shape")
    if shape is not None and shape not in ([NUM_KEYPOINTS, 2], [NUM_KEYPOINTS, 3]):
        return {i: class_name(str(name)) for i, name in names.items()}, False, 0
    return {i: class_name(str(name)) for i, name in names.items()}, shape is not None, shape[1] if shape else 0


def _other_splits(names: Path) -> dict[Path, str]:
    """Folders of the splits of data.yaml beside `train`, where they are folders of their own."""
    if names.suffix not in (".yaml", ".yml"):
        return {}
    data: Any = decode_file(names.read_bytes(), names)
    bases = [names.parent / str(data.get("path") or ""), names.parent]

    def folders(split: str) -> set[Path]:
        given = data.get(split)
        parts = [part for part in (given if isinstance(given, list) else [given]) if isinstance(part, str)]
        # Roboflow's data.yaml says ../train/images for what lies beside it
        places = [base / (part.removeprefix("../") if i else part) for part in parts for base in bases for i in (0, 1)]
        return {place.resolve() for place in places if place.is_dir()}

    train = folders("train")
    return {folder: split for split in ("val", "test") for folder in folders(split) - train} if train else {}


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _has_labels(folder: Path) -> bool:
    return any(PurePosixPath(name).name.lower() not in _NOT_LABELS for name in _text_files(folder))


def _text_files(folder: Path) -> list[str]:
    return sorted(
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".txt")
    )


def _stem(name: str, folder: str) -> str:
    """The path without suffix and without the folder of that name, which labels and pictures do not share."""
    path = PurePosixPath(name).with_suffix("")
    return "/".join(part for part in path.parts if part != folder)
