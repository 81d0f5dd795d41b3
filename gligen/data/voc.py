"""Reads Pascal VOC: JPEGImages/ and an XML file a picture in Annotations/, boxes xyxy in pixels.

Lists in ImageSets/Main/ tell splits apart: a name without suffix on each line, and in those of a class (dog_train.txt)
1, -1 (no dog) or 0 (only dogs that are hard to see) behind it.

Corners are taken as they are written. VOC itself counted pixels from 1, so that a left or top edge may be a pixel off;
what is written by today's tools (CVAT, labelImg) counts edges from 0, and nothing in a file says which it is.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath

from gligen.data.annotations import PIXELS, Annotations, Collector, Files, four_numbers
from gligen.data.example import Findings
from gligen.data.files import class_name, find_pictures
from gligen.data.pictures import SUFFIXES

LISTS = Path("ImageSets/Main")
TRAIN = "train"


def find(path: Path) -> list[Path]:
    """The folder of XML files that makes a folder VOC's, or a list of its pictures; [] if it is something else, such as
    Flickr30k's."""
    if path.is_file():
        bases = list(path.parents[:3]) if path.suffix == ".txt" else []  # ImageSets/Main/train.txt, or beside
        return [base / "Annotations" for base in bases if any((base / "Annotations").glob("*.xml"))][:1]
    if not path.is_dir() or (path / "Sentences").is_dir():
        return []
    return [folder for folder in (path / "Annotations", path) if any(folder.glob("*.xml"))][:1]


def read(path: Path, findings: Findings, *, folder: Path, images: Path | None = None) -> tuple[Annotations, Files]:
    """The rows of a VOC folder, of which a list names the pictures, or of a list. folder: that of the XML files, as
    `find` gives it.

    Of a folder with lists for several splits `train` is read, and the others are named.
    Raises FileNotFoundError where there are no pictures, and ValueError for a list that is none.
    """
    above = path if folder == path else folder.parent
    findings.format = f"Pascal VOC ({folder.name}/*.xml)"
    nearby = [base / name for base in (above, folder.parent) for name in ("JPEGImages", "images")]
    files = find_pictures(images, [*nearby, above])
    listed = _listed(path, folder, findings)
    collector = Collector()
    taken: set[str] = set()
    for file in sorted(folder.glob("*.xml")):
        if listed is not None and file.stem not in listed:
            if path.is_dir():  # else it was not asked for
                findings.leave_out(f"picture that {TRAIN}.txt does not list", file.stem)
            continue
        root = read_xml(file, findings)
        if root is None:
            continue
        named = (root.findtext("filename") or "").strip()
        guessed = (file.stem + suffix for suffix in (".jpg", ".jpeg", ".png", ".JPG"))
        found = files.find_or_lose(findings, f"{file.name}: ", named or file.stem, *guessed)
        if found is None:
            continue
        if found in taken:
            findings.lose("picture annotated twice", f"{file.name}: {found}")
            continue
        taken.add(found)
        row = collector.picture(found, size_of(root))
        for item in root.findall("object"):
            box = box_of(item)
            if box is None:
                findings.leave_out("object without a box of four numbers", f"{file.name}: {item.findtext('name')}")
            else:
                collector.box(row, class_name(item.findtext("name") or ""), box)
    for name in sorted(listed or ()):
        if not (folder / f"{name}.xml").is_file():
            findings.lose("picture that is listed without an XML file", f"{name}: no {folder.name}/{name}.xml")
    return collector.annotations(findings), Files(files.folder, collector.keys)


def _listed(path: Path, folder: Path, findings: Findings) -> set[str] | None:
    """The names that are read: of the list that was given, else of the one for training; None: all."""
    if path.is_file():
        findings.format += f", those that {path.name} lists"
        return _read_list(path, folder)
    lists = {name: folder.parent / LISTS / f"{name}.txt" for name in (TRAIN, "val", "trainval", "test")}
    there = {name: file for name, file in lists.items() if file.is_file()}
    others = [f"--data {file}" for name, file in there.items() if name != TRAIN]
    if TRAIN not in there:
        if there:
            findings.notes.append(f"all pictures are read, as {LISTS} has no {TRAIN}.txt; fewer by {', '.join(others)}")
        return None
    told = f"; others by {', '.join(others)}" if others else ""
    findings.notes.append(f"the split {TRAIN} alone is read, by {LISTS}/{TRAIN}.txt{told}")
    return _read_list(there[TRAIN], folder)


def _read_list(path: Path, folder: Path) -> set[str]:
    """The names in a list, without those that a class is said not to be in. Raises ValueError where there is none."""
    names = set()
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        name, flag = line.strip(), ""
        if not (folder / f"{name}.xml").is_file():  # names may have spaces
            name, flag = (*line.split()[:2], "", "")[:2]
        if name and flag != "-1":
            name = PurePosixPath(name.replace("\\", "/")).name  # some list paths of pictures
            names.add(name[: name.rindex(".")] if name.lower().endswith(SUFFIXES) else name)
    if not names:
        raise ValueError(f"{path}: lists no pictures")
    return names


def read_xml(file: Path, findings: Findings) -> ET.Element | None:
    """The root of an XML file; the picture of one that cannot be read is lost."""
    try:
        return ET.parse(file).getroot()
    except (ET.ParseError, OSError, ValueError, LookupError) as error:  # an encoding that is none
        findings.lose("XML file that cannot be read", f"{file.name}: {error}")
        return None


def box_of(item: ET.Element) -> tuple[float, float, float, float] | None:
    """An object's box; None if it is not four numbers."""
    return four_numbers(item.findtext(f"bndbox/{name}") or "" for name in ("xmin", "ymin", "xmax", "ymax"))


def size_of(root: ET.Element) -> tuple[int, int]:
    """Width and height that the file tells, or PIXELS."""
    try:
        w, h = (int(float(root.findtext(f"size/{side}") or "")) for side in ("width", "height"))
    except ValueError:
        return PIXELS
    return (w, h) if w > 0 and h > 0 else PIXELS
