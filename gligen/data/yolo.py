"""Reads YOLO: pictures and a text file for each, lines of `class cx cy w h` in fractions, and a file of class names.

Layouts: ultralytics' images/ and labels/ with data.yaml (and Roboflow's train/images), darknet's text files beside the
pictures with obj.names or classes.txt, labels alone in a folder with the pictures in a sibling. Lines may be polygons
(class x1 y1 x2 y2 …), whose bounds are the box, or poses where data.yaml says so (`kpt_shape`).

Splits: data.yaml's `train`, `val` and `test`, each a folder, a text file that lists pictures, or several of these;
darknet's train.txt and valid.txt; or folders of these names. A set read whole is its training split; a list or a
split's folder can be given itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gligen.data.annotations import FRACTIONS, Annotations, Collector, Files
from gligen.data.example import Findings
from gligen.data.files import PictureFiles, class_name, find_pictures
from gligen.data.pictures import SUFFIXES
from gligen.fields import decode_file
from gligen.request import NUM_KEYPOINTS

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "obj.names", "classes.txt", "_darknet.labels")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # -> names of lists, folders
TRAIN = "train"
LOOK = 100  # pictures that may be without a label file before a folder is taken for something else
ABOVE = 3  # folders above a list or a split's pictures in which class names are looked for
_YAML = (".yaml", ".yml")
_LISTS = tuple(f"{name}.txt" for names in SPLITS.values() for name in names)
_NOT_LABELS = ("classes.txt", *_LISTS, "readme.txt", "requirements.txt", "notes.txt")


def find(path: Path) -> list[Path]:
    """The file of class names that makes a path YOLO's, [] if there is none.

    It lies in the folder or its labels', is named itself, or lies above a list of pictures or a split's folder.
    """
    if path.is_file():
        if path.suffix in _YAML and "names" in _described(path):
            return [path]
        if path.name in NAMES:
            return [path] if _has_labels(path.parent) else []
        return _names_above(path) if is_list(path) else []
    names = [folder / name for folder in _homes(path) for name in NAMES if (folder / name).is_file()]
    if names:
        return names[:1] if _has_labels(path) else []
    above = _names_above(path)
    return above if above and _is_labelled(path) else []


def is_list(path: Path) -> bool:
    """True for a text file whose first line names a picture."""
    if path.suffix != ".txt" or not path.is_file():
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return next((line for line in file if line.strip()), "").strip().lower().endswith(SUFFIXES)


def looks_without_names(path: Path) -> bool:
    """True if a folder has YOLO's images/ and labels/ but no names: then that is what is wrong with it."""
    return (path / "images").is_dir() and (path / "labels").is_dir() and any((path / "labels").rglob("*.txt"))


def root(path: Path, names: Path) -> Path:
    """The folder that pictures and labels are found under, and maps beside. names: as `find` gives it."""
    if path.is_dir() and names.parent in _homes(path):
        return path
    if names.suffix not in _YAML:
        return names.parent
    told = names.parent / str(_described(names).get("path") or "")
    train = [place for place in _places(names, names.parent).get(TRAIN, ()) if place]
    above = [Path(str(place).rpartition("images")[0]) for place in train if "images" in place.parts]
    spots = [spot for spot in (told, names.parent, *above) if spot.is_dir()]
    return next(filter(_has_labels, spots), names.parent)


def read(path: Path, findings: Findings, *, names: Path, images: Path | None = None) -> tuple[Annotations, Files]:
    """The rows of a YOLO set, of its training split if it has several, or of a list or split's folder in it. names: the
    file of class names, as `find` gives it.

    Pictures without a label file, or with an empty one, are negatives: they have no boxes. images names the folder of
    other pictures.
    Raises ValueError for names that are none, FileNotFoundError where there are no pictures or no training split.
    """
    findings.format = f"YOLO (class names from {names.name})"
    folder = root(path, names)
    classes, dims = _read_names(names)
    files = find_pictures(images, [folder, folder.parent / "images", folder.parent])
    if images is None:
        chosen, others = _choose(path, names, folder, files, findings)
    else:
        chosen, others = set(files.names()), {}
        splits = [split for split, found in _places(names, folder).items() if _pictures(found, folder, files, None)]
        if len(splits) > 1:
            findings.notes.append(f"{images} holds pictures of the splits {', '.join(splits)}: all are read")
    labels = {_stem(name, "labels"): folder / name for name in sorted(_label_files(folder))}
    collector = Collector()
    pictures: dict[str, str] = {}
    place, top = files.folder.resolve(), folder.resolve()
    inside = place.relative_to(top) if place.is_relative_to(top) else Path()
    for name in files.names():
        stem = _stem(str(inside / name), "images")
        if stem in pictures:
            raise ValueError(f"{files.folder}: {pictures[stem]} and {name} have one label file: remove one")
        pictures[stem] = name
        label = labels.pop(stem, None)
        if name not in chosen:
            if others is not None:
                findings.leave_out(f"picture of {others.get(name, 'no split')}", name)
            continue
        row = collector.picture(name, FRACTIONS)
        if label is None:
            findings.leave_out("label file (a picture without one has no boxes)", name)
            continue
        for number, line in enumerate(label.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if line.strip():
                _add_line(line, f"{label.name}, line {number}", row, collector, classes, dims, findings)
    for stem, label in labels.items():
        if others is None or (images is not None and inside != Path()) or is_list(label):
            continue  # of another split, which was not asked for, or no labels
        findings.lose("picture file missing", f"{label.name} labels no picture {stem}.* in {files.folder}")
    return collector.annotations(findings), Files(files.folder, collector.keys)


def _add_line(
    line: str, where: str, row: int, collector: Collector, classes: dict[int, str], dims: int, findings: Findings
) -> None:
    try:
        which, *numbers = map(float, line.split())
    except ValueError:
        findings.leave_out("label line that is not numbers", f"{where}: {line[:60]}")
        return
    is_pose = dims > 0 and len(numbers) == 4 + dims * NUM_KEYPOINTS
    is_polygon = not dims and len(numbers) >= 6 and len(numbers) % 2 == 0
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


def _read_names(path: Path) -> tuple[dict[int, str], int]:
    """Class names by number, and of how many numbers a point is where labels are poses of 17 points, else 0."""
    if path.suffix not in _YAML:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return {i: class_name(line) for i, line in enumerate(lines) if line}, 0
    data = _described(path)
    names = data.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(i, int) for i in names):
        raise ValueError(f"{path}: no class names: give `names`, a list, or a mapping from numbers")
    shape: Any = data.get("kpt_shape")
    is_pose = shape in ([NUM_KEYPOINTS, 2], [NUM_KEYPOINTS, 3])
    return {i: class_name(str(name)) for i, name in names.items()}, shape[1] if is_pose else 0


def _described(path: Path) -> dict[str, Any]:
    data: Any = decode_file(path.read_bytes(), path)
    return data if isinstance(data, dict) else {}


def _choose(
    path: Path, names: Path, folder: Path, files: PictureFiles, findings: Findings
) -> tuple[set[str], dict[str, str] | None]:
    """The pictures that are read, and of the others whose they are; None where a part of the set was given."""
    within = every = set(files.names())
    if path not in (names, folder):
        place = os.path.relpath(path, folder)
        findings.format += f", those {'in' if path.is_dir() else 'listed in'} {place}"
        within = _pictures([path], folder, files, findings)
    places = _places(names, folder)
    if path.is_file() and path != names:
        return within, None
    if path not in (names, folder):  # a folder: a split's, or one above several
        train = _pictures(places.get(TRAIN, ()), folder, files, None)
        if within <= train or not within & train:
            return within, None
    if TRAIN not in places:
        if any(map(any, places.values())):
            findings.notes.append(f"all pictures are read, as there is no split {TRAIN}; fewer by {_words(places)}")
        return every, {}
    if missing := [part for part, place in zip(_parts(names, TRAIN), places[TRAIN], strict=False) if place is None]:
        raise FileNotFoundError(
            f"{names}: its {TRAIN} is '{missing[0]}', which is not there: mend it, or name the pictures with --images"
        )
    chosen = _pictures(places[TRAIN], folder, files, findings) & within
    others: dict[str, str] = {}
    apart: dict[str, list[Path | None]] = {}
    for split in (split for split in places if split != TRAIN):
        own = _pictures(places[split], folder, files, None)
        others |= dict.fromkeys(own - chosen, f"the split {split}")
        if own & chosen:
            count = "all" if own <= chosen else f"{len(own & chosen):,} of {len(own):,}"
            findings.notes.append(f"{count} pictures of the split {split} are in {TRAIN} too")
        if own - chosen:
            apart[split] = places[split]
    if apart:
        findings.notes.append(f"the split {TRAIN} alone is read; others by {_words(apart)}")
    return chosen, others


def _words(places: Mapping[str, Sequence[Path | None]]) -> str:
    """How splits are named, on the command line."""
    return ", ".join(" ".join(f"--data {place}" for place in found if place) for found in places.values() if any(found))


def _parts(names: Path, split: str) -> list[str]:
    """What data.yaml has for a split; [] for other files of names."""
    given = _described(names).get(split) if names.suffix in _YAML else None
    return [part for part in (given if isinstance(given, list) else [given]) if isinstance(part, str) and part]


def _places(names: Path, folder: Path) -> dict[str, list[Path | None]]:
    """Folders and lists of the splits that a set has, the same that lie elsewhere now; None for one that is nowhere."""
    told = {split: parts for split in SPLITS if (parts := _parts(names, split))}
    if told:
        return {split: [_place(part, names, folder) for part in parts] for split, parts in told.items()}
    lists: dict[str, list[Path | None]] = {}
    folders: dict[str, list[Path | None]] = {}
    for split, called in SPLITS.items():
        lists[split] = [*filter(is_list, (names.parent / f"{name}.txt" for name in called))]
        spots = (place for name in called for place in (folder / "images" / name, folder / name / "images"))
        folders[split] = [*filter(Path.is_dir, spots)]
    return {split: found for split, found in (lists if lists[TRAIN] else folders).items() if found}


def _place(part: str, names: Path, folder: Path) -> Path | None:
    """A split's folder or list, wherever the set was unpacked."""
    bases = [names.parent / str(_described(names).get("path") or ""), names.parent, folder]
    plain = PurePosixPath(part.replace("\\", "/"))
    parts = [p for p in plain.parts if p not in ("..", ".", "/")]
    # Roboflow's data.yaml says ../train/images for what lies beside it
    spots = [base / spot for base in bases for spot in (plain, PurePosixPath(*parts))]
    spots += [base.joinpath(*parts[k:]) for base in bases[1:] for k in range(1, len(parts) - 1)]
    if plain.suffix == ".txt":
        spots += [base / plain.name for base in bases]
    return next((spot for spot in spots if spot.exists()), None)


def _pictures(places: Sequence[Path | None], folder: Path, files: PictureFiles, findings: Findings | None) -> set[str]:
    """The pictures in folders and lists, as `files` names them; those that are listed and nowhere are lost."""
    names = set(files.names())
    top = os.path.abspath(files.folder)  # links inside it have the names they are listed with
    found: set[str] = set()
    for place in filter(None, places):
        if place.is_dir():
            inside = os.path.relpath(place, top).replace(os.sep, "/")
            start = "" if inside == "." else f"{inside}/"
            found |= {name for name in names if name.startswith(start)}
            continue
        for line in place.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            if line := line.strip().replace("\\", "/"):
                name = _listed(line, (place.parent, folder), top, names, files)
                if name is not None:
                    found.add(name)
                elif findings is not None:
                    findings.lose("picture that is listed and not there", f"{place.name}: {line}")
    return found


def _listed(line: str, bases: Sequence[Path], top: str, names: set[str], files: PictureFiles) -> str | None:
    """The picture of a list's line: relative to the list or the set, else the one of that name in a folder of that
    name, wherever the set was unpacked."""
    for base in bases:
        name = os.path.relpath(os.path.join(base, line), top).replace(os.sep, "/")
        if name in names:
            return name
    try:
        found = files.find(line)
    except ValueError:  # several
        return None
    if found is None:
        return None
    folders = [PurePosixPath(path).parts[-2:-1] for path in (found, line)]
    return found if not all(folders) or folders[0] == folders[1] else None


def _homes(path: Path) -> list[Path]:
    """Folders in which the class names of a set may lie."""
    homes = [folder for folder in (path, path / "labels") if folder.is_dir()]
    return [*homes, path.parent] if path.name in ("labels", "obj_train_data") else homes


def _names_above(path: Path) -> list[Path]:
    above = [folder / name for folder in path.parents[:ABOVE] for name in NAMES if (folder / name).is_file()]
    return [names for names in above if _has_labels(names.parent)][:1]


def _is_labelled(path: Path) -> bool:
    """True for a folder of pictures that have a label file of numbers where YOLO has it: labels/ for images/."""
    looked = 0
    for parent, folders, names in os.walk(path, followlinks=True):
        folders.sort()
        parts = list(Path(parent).parts)
        if "images" in parts:
            parts[-1 - parts[::-1].index("images")] = "labels"
        for name in sorted(names):
            if not name.lower().endswith(SUFFIXES):
                continue
            label, looked = Path(*parts, name).with_suffix(".txt"), looked + 1
            if looked > LOOK:
                return False
            if label.is_file():
                words = label.read_text(encoding="utf-8", errors="replace").split()
                return len(words) >= 5 and all(re.fullmatch(r"[-+.\deE]+", word) for word in words[:5])
    return False


def _has_labels(folder: Path) -> bool:
    return any(True for _ in _label_files(folder))


def _label_files(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.endswith(".txt") and name.lower() not in _NOT_LABELS:
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _stem(name: str, folder: str) -> str:
    """The path without suffix and without the folder of that name, which labels and pictures do not share."""
    path = PurePosixPath(name).with_suffix("")
    return "/".join(part for part in path.parts if part != folder)
