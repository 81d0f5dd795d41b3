"""Reads Pascal VOC: JPEGImages/ and an XML file a picture in Annotations/, boxes xyxy in pixels.

Corners are taken as they are written. VOC itself counted pixels from 1, so that a left or top edge may be a pixel off;
what is written by today's tools (CVAT, labelImg) counts edges from 0, and nothing in a file says which it is.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from gligen.data.annotations import PIXELS, Annotations, Collector, Files
from gligen.data.example import Findings
from gligen.data.files import class_name, find_pictures


def find(path: Path) -> list[Path]:
    """The folder of XML files that makes a folder VOC's, [] if there is none, or it is Flickr30k's."""
    if not path.is_dir() or (path / "Sentences").is_dir():
        return []
    return [folder for folder in (path / "Annotations", path) if any(folder.glob("*.xml"))][:1]


def read(path: Path, findings: Findings, *, folder: Path, images: Path | None = None) -> tuple[Annotations, Files]:
    """The rows of a VOC folder. folder: that of the XML files, as `find` gives it.

    Raises FileNotFoundError where there are no pictures.
    """
    findings.format = f"Pascal VOC ({folder.name}/*.xml)"
    nearby = [base / name for base in (path, folder.parent) for name in ("JPEGImages", "images")]
    files = find_pictures(images, [*nearby, path])
    if (folder.parent / "ImageSets").is_dir():
        findings.notes.append("all pictures with an XML file are read, whatever ImageSets/ says")
    collector = Collector()
    taken: set[str] = set()
    for file in sorted(folder.glob("*.xml")):
        try:
            root = ET.parse(file).getroot()
        except (ET.ParseError, OSError, ValueError, LookupError) as error:  # an encoding that is none
            findings.lose("XML file that cannot be read", f"{file.name}: {error}")
            continue
        named = (root.findtext("filename") or "").strip()
        try:
            found = (files.find(named) if named else None) or next(
                filter(None, (files.find(file.stem + suffix) for suffix in (".jpg", ".jpeg", ".png", ".JPG"))), None
            )
        except ValueError as error:
            findings.lose("picture name that several files have", f"{file.name}: {error}")
            continue
        if found is None:
            findings.lose("picture file missing", f"{file.name}: {named or file.stem}, nowhere in {files.folder}")
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
    annotations = collector.annotations(findings)
    return annotations, Files(files.folder, annotations.keys)


def box_of(item: ET.Element) -> tuple[float, float, float, float] | None:
    """An object's box; None if it is not four numbers."""
    corners = [item.findtext(f"bndbox/{name}") or "" for name in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = map(float, corners)
    except ValueError:
        return None
    return x0, y0, x1, y1


def size_of(root: ET.Element) -> tuple[int, int]:
    """Width and height that the file tells, or PIXELS."""
    try:
        w, h = (int(float(root.findtext(f"size/{side}") or "")) for side in ("width", "height"))
    except ValueError:
        return PIXELS
    return (w, h) if w > 0 and h > 0 else PIXELS
