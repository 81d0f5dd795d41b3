"""What a user asks for, as one type with one validation: the first stop on the way to a picture.

A request comes from a JSON or YAML file, from flags, or from a PNG this project wrote. `parse_request` checks
it by itself, `check_for_model` against a checkpoint, `check_files` against the disk. Every error is one line
that names the field, shows the value and says how to mend it. Imports neither torch nor numpy, so that these
checks answer at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gligen.fields import (
    Reader,
    decode_file,
    is_list,
    is_number,
    is_whole,
    read_fractions,
    read_list,
    read_number,
    read_object,
    read_path,
    read_text,
    read_whole,
    show,
)
from gligen.image_files import check_labels, open_image, read_png_request
from gligen.modes import MAP_MODES, MODES, Mode, Schedule, get_mode

Box = tuple[float, float, float, float]
Person = tuple[tuple[float, float] | None, ...]

SAMPLERS = ("ddpm", "ddim", "plms", "dpmpp")
NUM_KEYPOINTS = 17  # COCO's: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left first
MAX_PERSONS = 8  # of the published keypoint model
STYLE_BOX: Box = (0.0, 1.0, 0.0, 1.0)  # kept for published weights: marks a picture as a style, not a place


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A thing and its place: a phrase, a reference picture, or both, in a box.

    box: x0, y0, x1, y1 as fractions of width and height. An entity with an image may have STYLE_BOX, which
    makes the image a reference for style.
    """

    phrase: str = ""
    image: str | None = None  # path
    box: Box


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """The picture to repaint. Without a mask, the entities' boxes are what is repainted."""

    image: str  # path
    mask: str | None = None  # path; white = repaint


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. `parse_request` makes a checked one; the paths in it are absolute.

    At most one of entities, keypoints and the five maps is given; inpaint goes with entities. With none it is
    plain text-to-image. An absent keypoint is None.
    """

    prompt: str
    negative_prompt: str = ""
    entities: tuple[Entity, ...] = ()
    keypoints: tuple[Person, ...] = ()  # per person 17 points (x, y) in [0, 1], COCO order
    hed: str | None = None  # paths of maps
    canny: str | None = None
    depth: str | None = None
    normal: str | None = None
    sem: str | None = None  # single-channel label ids
    inpaint: Inpaint | None = None
    size: tuple[int, int] | None = None  # width, height in pixels; None = the model's
    steps: int = 50
    sampler: str = "plms"
    guidance: float = 7.5
    eta: float = 0.0  # DDIM only: 0 deterministic, 1 as noisy as DDPM
    schedule: Schedule | None = None  # stages of the fusers as fractions of the steps; None = the mode's
    seed: int = 0
    num_images: int = 1

    @property
    def grounding(self) -> str | None:
        """The one grounding field that is given ('entities', 'keypoints' or a map's name), or None."""
        return next((name for name in _GROUNDING if getattr(self, name)), None)


_GROUNDING = ("entities", "keypoints", *MAP_MODES)


def parse_request(data: Mapping[str, Any], *, folder: Path | None = None, where: str = "") -> Request:
    """The request that plain data (a JSON object) describes.

    folder: what relative paths start from; None is the working folder. where: in front of every error, such as
    'requests.json, request 3: ' (the first is 0, as in the names of pictures).
    `tau: t` is short for `schedule: [t, 0, 1 - t]`.
    Raises ValueError, one line, for the first thing that is wrong.
    """
    try:
        return _parse_request(data, folder)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def to_dict(request: Request) -> dict[str, Any]:
    """The request as plain JSON data: fields that differ from their defaults, paths absolute.

    `parse_request(to_dict(request)) == request` for every request that came from `parse_request`.
    """
    return _plain(request, "")


def merge(request: Request, overrides: Mapping[str, Any]) -> Request:
    """The request with some fields replaced, as by flags on the command line; checked again as a whole.

    overrides: as in a request file; paths start from the working folder. Raises ValueError as parse_request.
    """
    base = to_dict(request)
    if "tau" in overrides:
        base.pop("schedule", None)
    return parse_request({**base, **overrides})


def read_requests(path: str | Path) -> list[Request]:
    """The requests of a file: JSON or YAML with one or a list of them, or a PNG this project wrote.

    Relative paths in it start from its folder. Raises FileNotFoundError, or ValueError naming file and request.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"request file '{path}' does not exist") from None
    except OSError as error:
        raise ValueError(f"request file '{path}' cannot be read: {error.strerror}") from None
    if content.startswith(b"\x89PNG"):
        return [parse_request(read_png_request(path), folder=path.parent, where=f"{path.name}: ")]
    data = decode_file(content, path)
    if not isinstance(data, list):
        return [parse_request(data, folder=path.parent, where=f"{path.name}: ")]
    if not data:
        raise ValueError(f"{path.name}: the list is empty: give at least one request")
    return [parse_request(item, folder=path.parent, where=f"{path.name}, request {i}: ") for i, item in enumerate(data)]


def serving_modes(request: Request) -> tuple[str, ...]:
    """Names of the modes whose models can serve the request, in the order of gligen.modes.

    Without grounding every mode can (with its null input), inpainting ones if there is a picture to repaint.
    """

    def serves(mode: Mode) -> bool:
        if mode.is_inpainting != (request.inpaint is not None):
            return False
        if request.grounding == "entities":
            has_images = any(entity.image for entity in request.entities)
            return mode.takes_images if has_images else mode.takes_phrases
        if request.grounding == "keypoints":
            return mode.kind == "keypoint"
        return request.grounding in (None, mode.name)

    return tuple(name for name, mode in MODES.items() if serves(mode))


def check_for_model(
    request: Request,
    *,
    mode: str | None,
    size_multiple: int,
    max_entities: int,
    max_persons: int,
    default_size: int,
    where: str = "",
) -> Request:
    """The request, checked again and completed for one model: size and schedule are filled in.

    mode: the checkpoint's row of gligen.modes; None is a base model without grounding. It, and a request that
    grounds nothing, keep the schedule None: the fusers are never on, which is the base model itself.
    size_multiple, max_entities, max_persons, default_size: what the model takes.
    Raises ValueError, one line, where the model cannot serve the request.
    """
    request = parse_request(to_dict(request), where=where)  # a Request made by hand is not checked before
    modes = serving_modes(request)
    if mode not in modes and (mode or request.grounding or request.inpaint):
        has = _describe(request, mode)
        model = f"the checkpoint's mode is {mode}" if mode else "the checkpoint has no grounding"
        raise ValueError(f"{where}this request has {has}, but {model}: use a {' or '.join(modes)} checkpoint")
    for name, limit in (("entities", max_entities), ("keypoints", max_persons)):
        if mode and len(getattr(request, name)) > limit:
            raise ValueError(
                f"{where}{name} has {len(getattr(request, name))} entries: this model takes at most {limit}"
            )
    size = request.size or (default_size, default_size)
    if any(side % size_multiple for side in size):
        below, above = (
            " x ".join(str(max(1, step(side / size_multiple)) * size_multiple) for side in size)
            for step in (math.floor, math.ceil)
        )
        nearest = above if below == above else f"{below} or {above}"
        raise ValueError(
            f"{where}size is {size[0]} x {size[1]}: this model needs multiples of {size_multiple}, such as {nearest}"
        )
    schedule = request.schedule
    if schedule is None and mode and (request.grounding or request.inpaint):
        schedule = get_mode(mode).schedule
    return dataclasses.replace(request, size=size, schedule=schedule)


def check_files(request: Request, *, where: str = "") -> None:
    """Opens and decodes every picture the request names.

    Raises FileNotFoundError or ValueError, one line: missing, not an image, truncated, not a label map, a mask
    that is black or does not have its picture's shape.
    """
    try:
        sizes = {}
        for name, path in _paths(request):
            image = open_image(path, f"{name} is '{path}'")
            if name == "sem":
                check_labels(image, f"sem is '{path}'")
            if name == "inpaint.mask" and image.mode != "I;16" and not any(image.convert("L").histogram()[128:]):
                raise ValueError(f"inpaint.mask is '{path}', which is black: paint white what is to be repainted")
            sizes[name] = image.size
        if "inpaint.mask" in sizes:
            (W, H), (w, h) = sizes["inpaint.image"], sizes["inpaint.mask"]
            if abs(w * H / (h * W) - 1) > 0.01:
                raise ValueError(
                    f"inpaint.mask is {w} x {h} pixels, but inpaint.image {W} x {H}: "
                    "make a mask of the picture's own shape"
                )
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{where}{error}") from None


# What follows are readers: each takes a value and the name it goes by in errors, and gives the checked value.


def _parse_request(data: Any, folder: Path | None) -> Request:
    path = partial(read_path, folder=folder)
    readers: dict[str, Reader] = {
        "prompt": read_text,
        "negative_prompt": read_text,
        "entities": partial(_entities, folder=folder),
        "keypoints": _keypoints,
        **dict.fromkeys(MAP_MODES, path),
        "inpaint": partial(_inpaint, folder=folder),
        "size": _size,
        "steps": partial(read_whole, low=1, high=1000),
        "sampler": _sampler,
        "guidance": read_number,
        "eta": partial(read_number, low=0, high=1),
        "schedule": _schedule,
        "seed": partial(read_whole, low=0, high=2**63 - 1),
        "num_images": partial(read_whole, low=1),
        "tau": partial(read_number, low=0, high=1),
    }
    nullable = ("inpaint", "size", "schedule", "tau", *MAP_MODES)
    example = "the caption, or '' for none"
    values = read_object(data, "", readers, required="prompt", example=example, nullable=nullable)
    if "tau" in values:
        if "schedule" in values:
            raise ValueError("tau and schedule are both given: tau is short for schedule, leave one out")
        tau = values.pop("tau")
        values["schedule"] = (tau, 0.0, 1.0 - tau)
    request = Request(**values)
    _check_together(request)
    return request


def _check_together(request: Request) -> None:
    given = [name for name in _GROUNDING if getattr(request, name)]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} are both given: no model takes both, leave one out")
    if request.seed + request.num_images > 2**63:
        raise ValueError(f"seed is {request.seed}: image k has seed + k, so give one that leaves room for all images")
    if request.eta and request.sampler != "ddim":
        raise ValueError(f"eta is {request.eta}, but the sampler is {request.sampler!r}: leave eta out or use 'ddim'")
    if request.inpaint is None:
        return
    if given not in ([], ["entities"]):
        raise ValueError(f"inpaint and {given[0]} are both given: inpainting takes entities only, leave one out")
    if request.inpaint.mask is None and all(entity.box == STYLE_BOX for entity in request.entities):
        raise ValueError("inpaint has no mask, and there is no box to repaint: give inpaint.mask or entities")


def _entities(value: Any, name: str, *, folder: Path | None) -> tuple[Entity, ...]:
    return tuple(_entity(item, f"{name}[{i}]", folder) for i, item in enumerate(read_list(value, name, "entities")))


def _entity(data: Any, name: str, folder: Path | None) -> Entity:
    readers: dict[str, Reader] = {"phrase": read_text, "image": partial(read_path, folder=folder), "box": _box}
    example = "x0, y0, x1, y1 in [0, 1]"
    entity = Entity(**read_object(data, name, readers, required="box", example=example, nullable=("image",)))
    if not entity.phrase.strip() and entity.image is None:
        raise ValueError(f"{name}.phrase is {show(entity.phrase)}: name the thing, or give {name}.image")
    x0, y0, x1, y1 = box = entity.box
    is_style = box == STYLE_BOX and entity.image is not None
    if x0 >= x1 and not is_style:
        raise ValueError(f"{name}.box is {show(list(box))}: x0 must be below x1")
    if y0 >= y1 and not is_style:
        raise ValueError(f"{name}.box is {show(list(box))}: y0 must be below y1")
    return dataclasses.replace(entity, phrase=entity.phrase.strip())


def _box(value: Any, name: str) -> Box:
    wanted = "give four numbers x0, y0, x1, y1 as fractions of the picture's width and height"
    x0, y0, x1, y1 = read_fractions(value, name, 4, wanted)
    return (x0, y0, x1, y1)


def _keypoints(value: Any, name: str) -> tuple[Person, ...]:
    persons = read_list(value, name, "persons")
    if len(persons) > MAX_PERSONS:
        raise ValueError(f"{name} has {len(persons)} persons: give at most {MAX_PERSONS}")
    return tuple(_person(person, f"{name}[{i}]") for i, person in enumerate(persons))


def _person(value: Any, name: str) -> Person:
    points = read_list(value, name, "points")
    if len(points) != NUM_KEYPOINTS:
        raise ValueError(
            f"{name} has {len(points)} points: give {NUM_KEYPOINTS} in COCO order, null for those that are absent"
        )
    return tuple(_point(point, f"{name}[{i}]") for i, point in enumerate(points))


def _point(value: Any, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    wanted = "give x, y as fractions of the picture's width and height, or null if it is absent"
    x, y = read_fractions(value, name, 2, wanted)
    return (x, y) if (x, y) != (0, 0) else None  # the published encoding of an absent point


def _inpaint(data: Any, name: str, *, folder: Path | None) -> Inpaint:
    path = partial(read_path, folder=folder)
    readers = {"image": path, "mask": path}
    example = "the picture to repaint"
    return Inpaint(**read_object(data, name, readers, required="image", example=example, nullable=("mask",)))


def _size(value: Any, name: str) -> tuple[int, int]:
    if not is_list(value) or len(value) != 2 or not all(is_whole(side) and side > 0 for side in value):
        raise ValueError(f"{name} is {show(value)}: give width and height in pixels, two whole numbers above 0")
    return (value[0], value[1])


def _sampler(value: Any, name: str) -> str:
    if value not in SAMPLERS:
        raise ValueError(f"{name} is {show(value)}: give one of {', '.join(SAMPLERS)}")
    return value


def _schedule(value: Any, name: str) -> Schedule:
    wanted = "give three fractions of the steps (on, linear decay, off), each in [0, 1], that sum to 1"
    if not is_list(value) or len(value) != 3 or not all(is_number(part) for part in value):
        raise ValueError(f"{name} is {show(value)}: {wanted}")
    on, decay, off = (float(part) for part in value)
    if not all(0 <= part <= 1 for part in (on, decay, off)) or not abs(on + decay + off - 1) <= 1e-6:
        raise ValueError(f"{name} is {show(value)}: {wanted}")
    return (on, decay, off)


def _plain(value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        return {name: _plain(item, name) for name, item in given.items() if item != defaults[name]}
    if is_list(value):
        return [_plain(item, key) for item in value]
    if isinstance(value, str) and key in ("image", "mask", *MAP_MODES):
        return str(Path(value).absolute())
    return value


def _describe(request: Request, mode: str | None) -> str:
    """What of the request the model lacks a way for."""
    if mode and get_mode(mode).is_inpainting and request.inpaint is None:
        return "no inpaint picture"
    if request.inpaint is not None and not (mode and get_mode(mode).is_inpainting):
        return "an inpaint picture"
    if any(entity.image for entity in request.entities):
        return "entities with reference images"
    return f"a {request.grounding} map" if request.grounding in MAP_MODES else str(request.grounding)


def _paths(request: Request) -> Iterator[tuple[str, str]]:
    for i, entity in enumerate(request.entities):
        if entity.image:
            yield f"entities[{i}].image", entity.image
    for name in MAP_MODES:
        if path := getattr(request, name):
            yield name, path
    if request.inpaint:
        yield "inpaint.image", request.inpaint.image
        if request.inpaint.mask:
            yield "inpaint.mask", request.inpaint.mask
