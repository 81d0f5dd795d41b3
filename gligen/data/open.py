"""Opens anybody's pictures: tells the format from what lies there, and says what it found.

Formats are rows of one table. A path that none recognises, or several do, is one line that says what was looked for and
what is there: nothing is guessed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gligen.data import coco, flickr, folder, parquet, tsv, voc, yolo
from gligen.data.annotations import AnnotatedSource, Annotations, Pictures
from gligen.data.edges import MAKERS
from gligen.data.example import Findings, Source
from gligen.data.faults import too_many
from gligen.data.files import PictureFiles
from gligen.data.flags import MAX_BAD
from gligen.data.geometry import MAX_BOXES, MIN_AREA
from gligen.data.map_files import MapFolder
from gligen.data.shards import ShardSource, find_tars
from gligen.data.storage import is_remote
from gligen.fields import read_number
from gligen.modes import Mode, get_mode


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices of a user about a set beside its path. maps: a folder, or 'canny' or 'scribble' to make them."""

    captions: Path | None = None
    images: Path | None = None
    maps: str | None = None
    masks: Path | None = None


@dataclass(frozen=True)
class Format:
    """One format. find: the files or folders that make a path this format's, [] if it is another's. open: reads them.

    looks_for: in words, for those whose folder nothing recognises. takes: which of the choices it can use.
    """

    name: str
    looks_for: str
    find: Callable[[Path], list[Path]]
    open: Callable[[Any, list[Path], Mode, Choices, Findings], Source]  # the path: for tar shards also a URL
    takes: tuple[str, ...] = ("images", "masks")


def _coco(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    file = coco.choose(found, mode.kind == "keypoint")
    read = coco.read(file, findings, images=choices.images, captions=choices.captions)
    return annotated(*read, file.parent, mode, choices, findings)


def _yolo(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    read = yolo.read(path, findings, names=found[0], images=choices.images)
    return annotated(*read, yolo.root(path, found[0]), mode, choices, findings)


def _voc(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    read = voc.read(path, findings, folder=found[0], images=choices.images)
    return annotated(*read, path if path.is_dir() else found[0].parent, mode, choices, findings)


def _folder(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    read = folder.read(path, findings, said=found, images=choices.images)
    return annotated(*read, path, mode, choices, findings)


def _flickr(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    return annotated(*flickr.read(path, findings, images=choices.images), path, mode, choices, findings)


def _tsv(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    return tsv.read(found, findings, mode, choices.maps)


def _parquet(path: Path, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    return annotated(*parquet.read(found, findings), path, mode, choices, findings)


def _tars(path: Path | str, found: list[Path], mode: Mode, choices: Choices, findings: Findings) -> Source:
    for name in ("images", "masks"):
        if getattr(choices, name):
            raise ValueError(f"{path}: tar shards hold their {name} themselves: leave out --{name}")
    source = ShardSource(path, mode.name, maps=choices.maps)
    vars(findings).update(vars(source.findings))
    return source


TARS = Format("tar shards", "a built set, or .tar files of pictures with .json or .txt", find_tars, _tars)
FORMATS = (
    Format(
        "COCO JSON",
        "a .json with 'images' and 'annotations', here or in annotations/",
        coco.find,
        _coco,
        ("captions", "images", "masks"),
    ),
    Format("YOLO", "label files and data.yaml, obj.names or classes.txt, or a list of them", yolo.find, _yolo),
    Format("Pascal VOC", "Annotations/*.xml or *.xml, or a list in ImageSets/Main", voc.find, _voc),
    Format("Flickr30k Entities", "Sentences/ and Annotations/", flickr.find, _flickr),
    Format("GLIGEN TSV", "*.tsv with id, tab, JSON", tsv.find, _tsv, ()),
    Format("parquet", "*.parquet, here or in data/", parquet.find, _parquet, ("masks",)),
    TARS,
)
# what every folder with pictures is, if it is nothing else
PICTURES = Format("pictures", "pictures with .txt or .caption files, a .jsonl or a .csv", folder.find, _folder)


def open_given(
    args: argparse.Namespace, mode: str | None = None, max_bad: float | None = None
) -> tuple[Source, Findings]:
    """The set that a command's flags name (`gligen.data.flags.add_source_flags`), by `open_source`."""
    return open_source(
        args.data,
        args.mode if mode is None else mode,
        captions=args.captions_file,
        images=args.images,
        maps=args.maps,
        masks=args.masks,
        max_bad=args.max_bad if max_bad is None else max_bad,
    )


def open_source(
    path: str | Path,
    mode: str = "box-text",
    *,
    captions: str | Path | None = None,
    images: str | Path | None = None,
    maps: str | None = None,
    masks: str | Path | None = None,
    max_bad: float = MAX_BAD,
) -> tuple[Source, Findings]:
    """A set of pictures as examples of a mode (gligen.modes): whole pictures, all their boxes; and what was found.

    path: a folder, or the file in it that tells most (a COCO JSON, data.yaml, a JSONL or CSV, a list of a VOC or YOLO
    set's pictures, of which a folder named whole is the training split); of tar shards also a URL of a folder, or
    several by a pattern ('set/{00000..00031}.tar').
    captions, images: COCO's captions file, and the folder of pictures, where they lie elsewhere.
    maps: for map modes, the folder of maps (else the one beside named after the mode), or 'canny' or 'scribble', made
    from the pictures by `gligen.data.prepare`.
    masks: for inpainting, the folder of masks, white where to repaint; else the boxes.
    max_bad: the share of pictures that faults may cost.
    Pictures that the mode can learn nothing from (without boxes, people or map) are left out and counted.
    Raises FileNotFoundError or ValueError, one line.
    """
    spec = get_mode(mode)
    max_bad = read_number(max_bad, "max_bad", low=0, high=1)
    captions, images, masks = (None if each is None else Path(each) for each in (captions, images, masks))
    choices = Choices(captions=captions, images=images, maps=maps, masks=masks)
    if maps is not None and not spec.is_map:
        raise ValueError(f"maps are for the map modes, but the mode is {mode}: leave them out")
    if masks is not None and not spec.is_inpainting:
        raise ValueError(f"masks are for the inpainting modes, but the mode is {mode}: leave them out")
    found: list[Path] = []
    if is_remote(path) or (not Path(path).expanduser().exists() and str(path).endswith(".tar")):  # a URL, a pattern
        form = TARS
    else:
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        form, found = recognise(path)
    for name in ("captions", "images", "masks"):
        if getattr(choices, name) is not None and name not in form.takes:
            raise ValueError(f"{path} is {form.name}, which takes no {name} from elsewhere: leave them out")
    findings = Findings(format=form.name)
    source = form.open(path, found, spec, choices, findings)
    whole = findings.images + findings.lost
    if too_many(findings.lost, whole, max_bad):
        raise ValueError(
            f"{path}: {findings.lost} of {whole} pictures are lost to faults, more than {max_bad:.2%}: "
            f"{'; '.join(findings.lines()[1:])}. Mend or remove them, or allow more with --max-bad"
        )
    return source, findings


def recognise(path: Path) -> tuple[Format, list[Path]]:
    """The format of a path, and the files in it that tell. Raises ValueError where none or several fit."""
    fitting = [(form, found) for form in FORMATS if (found := form.find(path))]
    if len(fitting) > 1:
        told = ", ".join(f"{form.name} ({found[0].name})" for form, found in fitting)
        raise ValueError(f"{path} could be {told}: name the one that is meant, such as {fitting[0][1][0]}")
    if fitting:
        return fitting[0]
    if yolo.is_list(path):
        raise ValueError(
            f"{path}: a list of pictures, with neither class names ({' or '.join(yolo.NAMES)}) beside or above it nor "
            "Annotations/ of Pascal VOC"
        )
    found = PICTURES.find(path)
    if found or (path.is_dir() and len(PictureFiles(path))):
        if yolo.looks_without_names(path):
            raise ValueError(f"{path}: YOLO's images/ and labels/, but no class names: add {' or '.join(yolo.NAMES)}")
        return PICTURES, found
    looked = "; ".join(f"{form.name}: {form.looks_for}" for form in (*FORMATS, PICTURES))
    raise ValueError(f"{path}: not a set of pictures that is known. Looked for {looked}. There is {_listing(path)}")


def annotated(
    known: Annotations, pictures: Pictures, folder: Path, mode: Mode, choices: Choices, findings: Findings
) -> AnnotatedSource:
    """The source of a mode from annotations. folder: where maps may lie beside.

    Raises ValueError if no picture is left.
    """
    rows = np.arange(len(known))

    def keep(usable: NDArray[np.bool_], reason: str) -> None:
        nonlocal rows
        if len(without := rows[~usable]):
            findings.leave_out(reason, known.keys[int(without[0])], len(without))
        rows = rows[usable]

    def in_folder(files: MapFolder) -> NDArray[np.bool_]:
        return np.array([files.find(known.keys[int(row)]) is not None for row in rows], bool)

    if mode.takes_phrases:
        keep(np.diff(known.box_starts) > 0, "picture without boxes")
    if mode.kind == "keypoint":
        keep(np.diff(known.point_starts) > 0, "picture without people's keypoints")
    maps = _map_folder(folder, mode, choices, findings) if mode.is_map else None
    if maps is not None:
        keep(in_folder(maps), f"picture without {mode.name} map")
    masks = None if choices.masks is None else MapFolder.open(choices.masks, "mask")
    if masks is not None:
        keep(in_folder(masks), "picture without a mask")
    if not len(rows):
        told = "; ".join(findings.lines()[1:])
        raise ValueError(
            f"{folder} ({findings.format}): without one picture for {mode.name}{': ' + told if told else ''}"
        )
    findings.images = len(rows)
    if mode.takes_phrases:
        used = np.zeros(len(known), bool)
        used[rows] = True
        ids = known.phrase_ids[np.repeat(used, np.diff(known.box_starts))]
        findings.entities, findings.phrases = len(ids), len(np.unique(ids))
        _note_boxes(known, findings)
    else:
        findings.entities = findings.phrases = 0
    if mode.kind == "keypoint":
        findings.persons = int(np.diff(known.point_starts)[rows].sum())
    captions = int((np.diff(known.caption_starts)[rows] > 0).sum())
    if captions < len(rows):
        instead = "the names of what is in the boxes" if mode.takes_phrases else "none"
        findings.notes.append(f"{len(rows) - captions:,} images have no caption: {instead} instead")
    return AnnotatedSource(annotations=known, pictures=pictures, mode=mode, rows=rows, maps=maps, masks=masks)


def _note_boxes(known: Annotations, findings: Findings) -> None:
    """Says how many boxes preparing whole pictures will leave out: it is a rule, but not a silent one."""
    owner = np.repeat(np.arange(len(known)), np.diff(known.box_starts))
    side = known.sizes[owner].astype(np.float64)
    corners = known.boxes.reshape(-1, 2, 2).clip(0, side[:, None])
    is_small = (corners[:, 1] - corners[:, 0]).prod(1) < MIN_AREA * side.prod(1)  # false where the size is unknown, 0
    if is_small.any():
        findings.notes.append(
            f"{int(is_small.sum()):,} boxes are under {MIN_AREA:.0%} of their picture: they are used only where a crop "
            "makes them larger"
        )
    counts = np.bincount(owner[~is_small], minlength=len(known))
    beyond = int((counts - MAX_BOXES).clip(0).sum())
    if beyond:
        findings.notes.append(
            f"{int((counts > MAX_BOXES).sum()):,} pictures have more than {MAX_BOXES} boxes, up to {counts.max()}: the "
            f"{MAX_BOXES} largest are used, {beyond:,} are not"
        )


def _map_folder(folder: Path, mode: Mode, choices: Choices, findings: Findings) -> MapFolder | None:
    """The folder of maps; None where they are made from the pictures."""
    name = choices.maps or mode.name
    beside = [base / name for base in (folder, folder.parent) if (base / name).is_dir()]
    given = Path(name)
    if choices.maps and given.is_dir():
        beside = [given]
    if beside:
        findings.notes.append(f"{mode.name} maps from {beside[0]}")
        return MapFolder.open(beside[0], mode.name)
    if name in MAKERS:
        findings.make_maps(mode.name, name)
        return None
    raise FileNotFoundError(
        f"{folder}: no folder '{name}' with {mode.name} maps beside the pictures: name one with --maps FOLDER, "
        f"or make them with --maps {' or '.join(MAKERS)}"
    )


def _listing(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(item.name + "/" * item.is_dir() for item in path.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def split_weight(text: str) -> tuple[str, float]:
    """Splits 'PATH' or 'PATH:WEIGHT' into path and weight, 1 unless given. Raises ValueError for one that is not above
    0."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not value > 0 or value == float("inf"):
        raise ValueError(f"--data {text}: the weight is {weight}, give a number above 0")
    return path, value
