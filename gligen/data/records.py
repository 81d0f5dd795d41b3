"""A record of a tar set: what its files are called, and what its JSON says.

    000012.json         {"caption": ..., "entities": [{"phrase": ..., "box": [x0, y0, x1, y1]}], "width": ...,
                         "height": ..., "source": ...}, and where there are any "captions" (others of the same
                         picture) and "keypoints" (17 of [x, y] or null a person)
    000012.jpg          the picture's file as it was
    000012.hed.png      the map, under its mode's name
    000012.mask.png     what inpainting repaints: white
    000012.ref0.png     the picture of its own that shows entity 0

Boxes and points are fractions of the upright picture. Read are also the records of others: WebDataset's and
img2dataset's (.jpg .txt .json), and GRIT's JSON with noun_chunks.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gligen.data.annotations import make_entities
from gligen.data.example import NO_IMAGE, BadExample, Example, Fault, Latents, Map, Pixels
from gligen.data.pictures import decode_pixels
from gligen.data.tars import Member, TarError, entry, members
from gligen.image_files import check_labels, image_bytes, mask_levels, open_image
from gligen.images import load_rgb
from gligen.modes import MAP_MODES, Mode
from gligen.request import NUM_KEYPOINTS, Box, Entity, Person

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif", "ppm")
WORDS = ("json", "txt")  # what is read without the picture


class Labelled(NamedTuple):
    """A phrase and its box as the record has them, unchecked."""

    phrase: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class Words:
    """All that a record says beside its pictures. size: width and height of the upright picture, where it is told."""

    caption: str
    other_captions: tuple[str, ...] = ()
    entities: tuple[Labelled, ...] = ()
    keypoints: tuple[Person, ...] = ()
    size: tuple[int, int] | None = None
    source: str = ""


def pack(example: Example, name: str, map_name: str = "map", picture: bytes | None = None) -> bytes:
    """The example's files one after another as they stand in a tar, its words first.

    name: that of all files, without a dot. map_name: the mode of its map. picture: the file of its image; without, or
    where it is of a kind that readers do not know, the pixels are stored as PNG.
    Raises BadExample for numbers or text that JSON does not have.
    """
    H, W, _ = example.image.shape
    facts: dict[str, Any] = {"caption": example.caption}
    facts["entities"] = [{"phrase": e.phrase, "box": [float(x) for x in e.box]} for e in example.entities]
    if example.other_captions:
        facts["captions"] = list(example.other_captions)
    if example.keypoints:
        facts["keypoints"] = [[p and [float(x) for x in p] for p in person] for person in example.keypoints]
    facts |= {"width": W, "height": H, "source": example.key}
    try:
        text = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise BadExample("text that is no Unicode", f"{example.key}: a caption or phrase is no Unicode") from None
    except ValueError:
        raise BadExample("a coordinate that is not finite", f"{example.key}: a coordinate is not finite") from None
    extension = "png" if picture is None else picture_extension(picture)
    if extension not in IMAGE_EXTENSIONS:
        extension, picture = "png", None
    parts = [
        entry(f"{name}.json", text),
        entry(f"{name}.{extension}", _png(example.image) if picture is None else picture),
    ]
    others = {map_name: example.map, "mask": example.mask}
    others |= {f"ref{i}": pixels for i, pixels in enumerate(example.references)}
    parts += [entry(f"{name}.{what}.png", _png(pixels)) for what, pixels in others.items() if pixels is not None]
    return b"".join(parts)


def picture_extension(content: bytes) -> str:
    """The extension of files of this kind. Raises ValueError for bytes that are no picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            name = (image.format or "").lower()
    except UnidentifiedImageError:
        raise ValueError("not an image file") from None
    return {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif"}.get(name, name)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():  # maps of greys, which are read as RGB again
        pixels = pixels[..., 0]
    return bytes(image_bytes(Image.fromarray(pixels), ".png"))


def head_length(files: Sequence[Member]) -> int:
    """Bytes from a record's start in which all its words lie; 0 where something else comes before them."""
    last = max((i for i, file in enumerate(files) if file.extension in WORDS), default=-1)
    return 0 if last < 0 or any(f.extension not in WORDS for f in files[:last]) else files[last].end - files[0].start


def has_picture(extensions: Iterable[str]) -> bool:
    return any(extension in IMAGE_EXTENSIONS for extension in extensions)


def map_names(extensions: Iterable[str]) -> set[str]:
    """The map modes whose maps are among files of these extensions."""
    parts = (extension.rpartition(".") for extension in extensions)
    return {name for name, _, kind in parts if kind in IMAGE_EXTENSIONS and name in MAP_MODES}


def split(content: bytes, key: str) -> dict[str, bytes]:
    """A record's files by extension. Raises BadExample, one line that begins with `key`."""
    try:
        return {m.extension: content[m.offset : m.offset + m.size] for m in members(content)}
    except TarError as error:
        raise BadExample("damaged tar", f"{key}: {error}") from None


def picture_of(files: Mapping[str, bytes], key: str) -> bytes:
    """The picture's file. Raises BadExample where there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in files:
            return files[extension]
    raise BadExample("no picture", f"{key}: holds no picture, but {', '.join(files) or 'nothing'}")


def unpack(files: Mapping[str, bytes], key: str, mode: Mode, number: int, *, needs_map: bool = True) -> Example:
    """The example that these files are, decoded; of grounding only what the mode reads.

    number: the example's, for its faults. needs_map: of a map mode, whether a record without its map is bad.
    Raises BadExample, one line that begins with `key`.
    """
    words = read_words(files, key)
    name = words.source or key
    found = _file(files, mode.name) if mode.is_map else None
    mask = _file(files, "mask") if mode.is_inpainting else None
    if mode.is_map and needs_map and found is None:
        raise BadExample(f"no {mode.name} map", f"{key}: holds no {mode.name} map")
    example = _told(words, files, mode, number, name)
    try:
        return replace(
            example,
            image=decode_pixels(picture_of(files, key), name),
            map=None if found is None else _map(found, mode.name, f"{name}: its {mode.name} map"),
            mask=None if mask is None else np.asarray(mask_levels(open_image(mask, f"{name}: its mask"))),
        )
    except BadExample:
        raise
    except ValueError as error:
        raise BadExample("map or mask that cannot be read", str(error)) from None


def described(words: Words, latents: Latents, key: str, mode: Mode, number: int) -> Example:
    """The example that a record's words and stored latents are, without its picture; as `unpack` for a mode that reads
    nothing else of it. Raises BadExample where the picture's size is not told."""
    if words.size is None:
        raise BadExample("a picture whose size is not told", f"{key}: says no width and height")
    return replace(_told(words, {}, mode, number, words.source or key), latents=latents, size=words.size)


def _told(words: Words, files: Mapping[str, bytes], mode: Mode, number: int, name: str) -> Example:
    """The example without its picture: what the mode reads of the words, entities clipped to the picture and with
    pictures of their own.

    Entities without a phrase or outside the picture become faults.
    """
    seen: list[Entity] = []
    references: list[Pixels | None] = []
    faults: list[Fault] = []
    for i, (phrase, box) in enumerate(words.entities if mode.takes_phrases else ()):
        if not phrase.strip():
            faults.append(Fault(reason="box without a phrase", message=f"{name}, box {i}", number=number))
            continue
        made = make_entities(np.array([box]), [phrase], number, name, faults)
        seen += made
        if made and mode.takes_images:
            own = _file(files, f"ref{i}")
            references.append(None if own is None else decode_pixels(own, f"{name}: its reference {i}"))
    return Example(
        image=NO_IMAGE,
        caption=words.caption,
        other_captions=words.other_captions,
        entities=tuple(seen),
        keypoints=words.keypoints if mode.kind == "keypoint" else (),
        references=tuple(references) if any(picture is not None for picture in references) else (),
        key=name,
        faults=tuple(faults),
    )


def _file(files: Mapping[str, bytes], what: str) -> bytes | None:
    return next((files[f"{what}.{ext}"] for ext in IMAGE_EXTENSIONS if f"{what}.{ext}" in files), None)


def _map(content: bytes, name: str, subject: str) -> Map:
    """Labels (H, W) for 'sem', else (H, W, 3)."""
    if name != "sem":
        return np.asarray(load_rgb(content, subject))
    image = open_image(content, subject)
    check_labels(image, subject)
    return np.asarray(image).astype(np.uint8)


def read_words(files: Mapping[str, bytes], key: str) -> Words:
    """Reads what a record's .json and .txt say. Raises BadExample, one line that begins with `key`."""
    facts: Any = {}
    if "json" in files:
        try:
            facts = json.loads(files["json"])
        except (ValueError, RecursionError) as error:
            raise BadExample("broken JSON", f"{key}: its JSON cannot be read ({error})") from None
        if not isinstance(facts, dict):
            raise BadExample("broken JSON", f"{key}: its JSON is a {type(facts).__name__}, not an object")
    caption = facts.get("caption")
    if caption is None:
        try:
            caption = files.get("txt", b"").decode().strip()
        except UnicodeDecodeError:
            raise BadExample("text that is no Unicode", f"{key}: its .txt is not UTF-8") from None
    captions = facts.get("captions", [])
    if not isinstance(caption, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadExample("broken JSON", f"{key}: its captions are {caption!r:.60} and {captions!r:.60}, not text")
    try:
        entities = tuple(map(_entity, facts.get("entities") or _noun_chunks(facts, caption)))
        keypoints = tuple(map(_person, facts.get("keypoints") or ()))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadExample("broken boxes or points", f"{key}: {cause}") from None
    width, height, source = facts.get("width"), facts.get("height"), facts.get("source")
    return Words(
        caption=caption,
        other_captions=tuple(captions),
        entities=entities,
        keypoints=keypoints,
        size=(width, height) if isinstance(width, int) and isinstance(height, int) else None,
        source=source if isinstance(source, str) else "",
    )


def _entity(data: Mapping[str, Any]) -> Labelled:
    phrase, box = data["phrase"], tuple(map(float, data["box"]))
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"box is {data['box']!r:.80}, not four finite numbers")
    if not isinstance(phrase, str):
        raise TypeError(f"phrase is {phrase!r:.60}, not text")
    return Labelled(phrase, (box[0], box[1], box[2], box[3]))


def _noun_chunks(facts: Mapping[str, Any], caption: str) -> list[dict[str, Any]]:
    """GRIT's: [start, end, x0, y0, x1, y1, score], characters of the caption and fractions of the picture."""
    chunks = facts.get("noun_chunks") or ()
    return [{"phrase": caption[int(start) : int(end)], "box": box} for start, end, *box, _ in chunks]


def _person(data: Sequence[Any]) -> Person:
    person = tuple(None if p is None else (float(p[0]), float(p[1])) for p in data)
    if len(person) != NUM_KEYPOINTS or not all(map(math.isfinite, (x for p in person if p for x in p))):
        raise ValueError(f"a person has {len(person)} points, or one that is not finite: give {NUM_KEYPOINTS}")
    return person
