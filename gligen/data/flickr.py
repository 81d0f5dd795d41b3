"""Reads Flickr30k Entities: Sentences/*.txt, five captions a picture with linked phrases, and Annotations/*.xml.

A sentence reads `[/EN#283585/people Two young guys] with [/EN#283587/bodyparts shaggy hair]`; the XML has boxes, xyxy
in pixels, under these numbers. Every sentence is an example of its own, with the boxes of its phrases. Phrases without
boxes (`nobndbox`, `scene`) are words of the caption alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from gligen.data.annotations import Annotations, Collector, Files
from gligen.data.example import Findings
from gligen.data.files import find_pictures
from gligen.data.voc import box_of, read_xml, size_of

_PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]+)\]")


def find(path: Path) -> list[Path]:
    """The folders Sentences and Annotations that make a folder Flickr30k's, [] if it is not."""
    folders = [path / "Sentences", path / "Annotations"]
    return folders if path.is_dir() and all(folder.is_dir() for folder in folders) else []


def read(path: Path, findings: Findings, *, images: Path | None = None) -> tuple[Annotations, Files]:
    """The rows of a folder, one a sentence. Raises FileNotFoundError where there are no pictures."""
    findings.format = "Flickr30k Entities (a sentence an example)"
    files = find_pictures(images, [path / name for name in ("flickr30k-images", "flickr30k_images", "images", "")])
    collector = Collector()
    for file in sorted((path / "Sentences").glob("*.txt")):
        found = files.find_or_lose(findings, "", f"{file.stem}.jpg")
        root = read_xml(path / "Annotations" / f"{file.stem}.xml", findings) if found else None
        if found is None or root is None:
            continue
        boxes: dict[str, list[tuple[float, float, float, float]]] = {}
        for item in root.findall("object"):
            if item.find("bndbox") is None:
                continue
            box = box_of(item)
            if box is None:
                findings.leave_out("object without a box of four numbers", f"{file.stem}.xml")
                continue
            for name in item.findall("name"):
                boxes.setdefault((name.text or "").strip(), []).append(box)
        for sentence in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if not sentence.strip():
                continue
            row = collector.picture(found, size_of(root))
            collector.caption(row, _PHRASE.sub(r"\2", sentence))
            for number, phrase in _PHRASE.findall(sentence):
                for box in boxes.get(number, ()):
                    collector.box(row, phrase, box)
    return collector.annotations(findings), Files(files.folder, collector.keys)
