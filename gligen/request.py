"""What a user asks for, as one type with one validation: the first stop on the way to an image.

A request comes from a JSON or YAML file, from flags, from an image this project wrote, or is made in Python. However it
is made it checks itself; `check_files` checks it against the disk, `gligen.job.complete` against a model. Each error is
one line that names the field, shows the value and says how to mend it. Imports neither torch nor numpy, so that these
checks answer at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gligen.fields import (
    Reader,
    decode_file,
    decode_lines,
    given_fields,
    is_image,
    is_list,
    is_number,
    is_whole,
    plain,
    read_fractions,
    read_image,
    read_list,
    read_number,
    read_text,
    read_truth,
    read_whole,
    show,
)
from gligen.image_files import (
    ImageFiles,
    ImageSource,
    check_labels,
    check_mask,
    hole,
    is_image_file,
    is_invisible,
    map_note,
    read_record,
    unused_note,
)
from gligen.modes import MAP_MODES, MODES, Mode, Schedule
from gligen.prompts import Reading, parse_prompt
from gligen.provenance import portable_path

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("gligen")

Box = tuple[float, float, float, float]
Person = tuple[tuple[float, float] | None, ...]

SamplerName = Literal["ddpm", "ddim", "plms", "dpmpp", "unipc", "euler", "euler-ancestral", "lcm"]
SAMPLERS: tuple[SamplerName, ...] = typing.get_args(SamplerName)
OTHER_SAMPLERS = {  # what other programs call them, without spaces and signs
    **{name.replace("-", ""): name for name in SAMPLERS},
    **dict.fromkeys(("eulera",), "euler-ancestral"),
    **dict.fromkeys(("dpm2m", "dpmpp2m", "dpmsolver", "dpmsolvermultistep"), "dpmpp"),
    **dict.fromkeys(("pndm", "lms"), "plms"),
}
STRENGTH = 0.75  # of image-to-image, where it is not given
NUM_KEYPOINTS = 17  # COCO's: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left first
MAX_PERSONS = 8  # of the published keypoint model
LINES = (".jsonl", ".ndjson")  # what files of JSON Lines are called
MAX_GUIDANCE = 1000.0  # usual scales are 1 to 15
MAX_IMAGES = 10**6  # of one request
STYLE_BOX: Box = (0.0, 1.0, 0.0, 1.0)  # kept for published weights: marks an image as a style, not a place


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A thing and its place: a phrase, a reference image, or both, in a box.

    image: the path of a file (str or os.PathLike; kept as absolute text) or a PIL image.
    box: x0, y0, x1, y1 as fractions of width and height: numbers, an array or a tensor. An entity with an image may
        have STYLE_BOX, which makes the image a reference for style.
    Raises ValueError, one line, for what is wrong with it.
    """

    phrase: str = ""
    image: ImageSource | None = None
    box: Box

    def __post_init__(self) -> None:
        _set(self, _entity_fields(vars(self), "entity"))


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """The image to repaint. Without a mask its transparent hole is what is repainted, or else the entities' boxes.

    image, mask: as Entity.image; the mask is white where is to be repainted (gligen.image_files.mask_levels).
    """

    image: ImageSource
    mask: ImageSource | None = None

    def __post_init__(self) -> None:
        _set(self, _inpaint_fields(vars(self), "inpaint"))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, checked when it is made; paths become absolute.

    Fields take what a request file may hold and what Python has besides: Entity and Inpaint objects, os.PathLike and
    PIL images, arrays and tensors for boxes and keypoints, NumPy's numbers. A request whose images are paths can be
    hashed and written as JSON (`to_dict`).
    At most one of entities, keypoints and the maps is given; inpaint goes with entities. With none it is
    plain text-to-image. An absent keypoint is None.
    Raises ValueError, one line, for the first thing that is wrong.
    """

    prompt: str
    negative_prompt: str = ""
    prompt_weights: bool = False  # whether brackets in both prompts are weights (gligen.prompts)
    clip_skip: int = 1  # the layer of CLIP's text encoder that prompts are read at; 1 is the last
    long_prompts: bool = False  # whether prompts go on in more windows of 77 tokens, or are cut
    entities: tuple[Entity, ...] = ()
    keypoints: tuple[Person, ...] = ()  # per person 17 points (x, y) in [0, 1], COCO order
    hed: ImageSource | None = None  # maps
    canny: ImageSource | None = None
    depth: ImageSource | None = None
    normal: ImageSource | None = None
    sem: ImageSource | None = None  # single-channel label ids
    scribble: ImageSource | None = None  # white strokes on black
    inpaint: Inpaint | None = None
    init_image: ImageSource | None = None  # what to begin with instead of noise alone (image-to-image)
    strength: float = STRENGTH  # share of the steps that are made of it, in (0, 1]
    size: tuple[int, int] | None = None  # width, height in pixels; None = the model's
    steps: int = 50
    sampler: str = "plms"
    guidance: float = 7.5
    eta: float = 0.0  # DDIM only: 0 deterministic, 1 as noisy as DDPM
    schedule: Schedule | None = None  # stages of the fusers as fractions of the steps; None = the mode's
    seed: int = 0
    num_images: int = 1

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None or name not in NULLABLE}
        _set(self, {name: READERS[name](value, name) for name, value in given.items()})
        _check_together(self)

    @property
    def reading(self) -> Reading:
        """The way in which its prompts are read."""
        return Reading(weights=self.prompt_weights, clip_skip=self.clip_skip, long=self.long_prompts)

    @property
    def grounding(self) -> str | None:
        """The one grounding field that is given ('entities', 'keypoints' or a map's name), or None."""
        return next((name for name in _GROUNDING if getattr(self, name)), None)

    @property
    def map(self) -> ImageSource | None:
        """The one map that is given, or None."""
        return next((source for name in MAP_MODES if (source := getattr(self, name)) is not None), None)

    @property
    def images(self) -> Iterator[tuple[str, ImageSource]]:
        """Every image that the request uses, by the name of its field ('entities[0].image', 'inpaint.mask', ...)."""
        for i, entity in enumerate(self.entities):
            if entity.image is not None:
                yield f"entities[{i}].image", entity.image
        for name in MAP_MODES:
            if (source := getattr(self, name)) is not None:
                yield name, source
        if self.inpaint:
            yield "inpaint.image", self.inpaint.image
            if self.inpaint.mask is not None:
                yield "inpaint.mask", self.inpaint.mask
        if self.init_image is not None:
            yield "init_image", self.init_image

    def with_images(self, replace: Callable[[str, ImageSource], ImageSource]) -> Request:
        """The request with each of its images, as `images` names them, replaced by what `replace` gives for it."""
        new = {name: replace(name, source) for name, source in self.images}
        changed: dict[str, Any] = {name: new.get(name) for name in (*MAP_MODES, "init_image")}
        changed["entities"] = tuple(
            dataclasses.replace(entity, image=new.get(f"entities[{i}].image")) for i, entity in enumerate(self.entities)
        )
        changed["inpaint"] = self.inpaint and Inpaint(image=new["inpaint.image"], mask=new.get("inpaint.mask"))
        return dataclasses.replace(self, **changed)


_GROUNDING = ("entities", "keypoints", *MAP_MODES)


def parse_request(data: Mapping[str, Any], *, folder: Path | None = None, where: str = "") -> Request:
    """The request that plain data (a JSON object) describes.

    folder: what relative paths start from; None is the working folder. where: in front of every error, such as
    'requests.json, request 3: ' (the first is 0, as in the names of images).
    `tau: t` is short for `schedule: [t, 0, 1 - t]`.
    Raises ValueError, one line, for the first thing that is wrong.
    """
    fields = (*READERS, "tau")
    optional = [name for name in fields if name != "prompt"]  # null is what a field that is not given may hold
    example = "the caption, or '' for none"
    try:
        values = given_fields(data, "", fields, required="prompt", example=example, nullable=optional)
        if "tau" in values:
            if "schedule" in values:
                raise ValueError("tau and schedule are both given: tau is short for schedule, leave one out")
            tau = read_number(values.pop("tau"), "tau", low=0, high=1)
            values["schedule"] = (tau, 0.0, 1.0 - tau)
        for name in ("entities", "inpaint", "init_image", *MAP_MODES):
            if name in values:
                values[name] = READERS[name](values[name], name, folder=folder)
        return Request(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def to_dict(request: Request, folder: str | Path | None = None) -> dict[str, Any]:
    """The request as plain JSON data: fields that differ from their defaults, paths absolute.

    folder: where the data will lie; paths are then as gligen.provenance.portable_path stores them.
    `parse_request(to_dict(request)) == request` for every request whose images are files.
    Raises ValueError for one that holds an image in memory.
    """
    for name, source in request.images:
        if is_image(source):
            raise ValueError(f"{name} is an image in memory, which JSON cannot hold: save it and give its path")
    data: dict[str, Any] = _plain(request)
    if folder is not None:
        for holder in (data, data.get("inpaint", {}), *data.get("entities", ())):
            for key in ("image", "mask", "init_image", *MAP_MODES):
                if key in holder and isinstance(holder[key], str):
                    holder[key] = portable_path(holder[key], folder)
    return data


def merge(request: Request, overrides: Mapping[str, Any]) -> Request:
    """The request with some fields replaced, as by flags on the command line; checked again as a whole.

    overrides: as in a request file; paths start from the working folder. Raises ValueError as parse_request.
    """
    base = dict(vars(request))
    if "tau" in overrides:
        base.pop("schedule")
    return parse_request({**base, **overrides})


def read_requests(path: str | Path) -> list[Request]:
    """The requests of a file: JSON or YAML with one or a list of them, JSON Lines with one a line, or an image this
    project wrote.

    Relative paths in it start from its folder. Raises FileNotFoundError, or ValueError naming file and request.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"request file '{path}' does not exist") from None
    except OSError as error:
        raise ValueError(f"request file '{path}' cannot be read: {error.strerror}") from None
    if is_image_file(content):
        data = read_record(path)["request"]
        request = parse_request(data, folder=path.parent.resolve(), where=f"{path.name}: ")
        return [request.with_images(partial(_found_again, path))]
    if path.suffix.lower() in LINES:
        lines = decode_lines(content, path)
        if not lines:
            raise ValueError(f"{path.name}: no line holds a request: give at least one")
        return [parse_request(item, folder=path.parent, where=f"{path.name}, line {n}: ") for n, item in lines]
    data = decode_file(content, path)
    if not isinstance(data, list):
        return [parse_request(data, folder=path.parent, where=f"{path.name}: ")]
    if not data:
        raise ValueError(f"{path.name}: the list is empty: give at least one request")
    return [parse_request(item, folder=path.parent, where=f"{path.name}, request {i}: ") for i, item in enumerate(data)]


def _found_again(png: Path, name: str, source: ImageSource) -> ImageSource:
    """The path of an image of a stored request: where it was, or else beside the image that holds it."""
    assert isinstance(source, str)  # plain data holds paths
    beside = png.parent.resolve() / os.path.basename(source)
    if os.path.exists(source) or not beside.exists():
        return source
    log.info("%s: %s is taken from beside it, '%s'", png.name, name, beside.name)
    return str(beside)


def serving_modes(request: Request) -> tuple[str, ...]:
    """Names of the modes whose models can serve the request, in the order of gligen.modes.

    Without grounding every mode can (with its null input), inpainting ones if there is an image to repaint.
    """

    def serves(mode: Mode) -> bool:
        if mode.is_inpainting != (request.inpaint is not None):
            return False
        has_images = any(entity.image for entity in request.entities)
        return request.grounding in (None, mode.field) and (mode.takes_images or not has_images)

    return tuple(name for name, mode in MODES.items() if serves(mode))


def check_files(request: Request, images: ImageFiles | None = None, *, where: str = "") -> list[str]:
    """Opens and decodes every image of the request; returns notes on them to be logged, a line each.

    images: those of the run, where each file is opened once. Raises FileNotFoundError or ValueError, one line: missing,
    not an image, truncated, not a label map, a mask that is none or does not have its image's shape, nothing to
    repaint.
    """
    images = images or ImageFiles()
    notes = []
    try:
        for name, source in request.images:
            subject = name_image(name, source)
            image = open_field(images, name, source)
            if name == "sem":
                check_labels(image, subject)
            elif name in MAP_MODES and (odd := map_note(image, name)):
                notes.append(f"{subject}, {odd}")
            is_holed = hole(image) is not None and name in ("inpaint.image", "inpaint.mask")  # told below
            if (unused := unused_note(image)) and not is_holed:
                notes.append(f"{name} {unused}")
        if request.inpaint is not None:
            notes += _check_inpaint(request, request.inpaint, images)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{where}{error}") from None
    return notes


def _check_inpaint(request: Request, inpaint: Inpaint, images: ImageFiles) -> list[str]:
    image = open_field(images, "inpaint.image", inpaint.image)
    transparent = hole(image)
    if is_invisible(image):
        raise ValueError("inpaint.image is transparent everywhere: make transparent only what is to be repainted")
    if inpaint.mask is None:
        if transparent is not None:
            share = 100 * transparent.histogram()[255] / (image.width * image.height)
            boxes = ", not the boxes" if request.entities else ""
            return [f"the transparent part of inpaint.image, {share:.0f} % of it, is what is repainted{boxes}"]
        if all(entity.box == STYLE_BOX for entity in request.entities):
            raise ValueError(
                "inpaint has no mask, and there is no box to repaint: give inpaint.mask or entities, or make "
                "transparent what is to be repainted"
            )
        return []
    mask = open_field(images, "inpaint.mask", inpaint.mask)
    (W, H), (w, h) = image.size, mask.size
    if abs(w * H / (h * W) - 1) > 0.01:
        raise ValueError(
            f"inpaint.mask is {w} x {h} pixels, but inpaint.image {W} x {H}: make a mask of that image's shape"
        )
    notes = [check_mask(mask, name_image("inpaint.mask", inpaint.mask))]
    if transparent is not None:
        notes.append("inpaint.image has transparent parts, which become white: inpaint.mask says what is repainted")
    return [note for note in notes if note]


def open_field(images: ImageFiles, name: str, source: ImageSource) -> Image.Image:
    """The image that a request's field holds, `name` as Request.images gives it."""
    return images.open(source, name_image(name, source), lossless=name == "sem")


def name_image(name: str, source: ImageSource) -> str:
    """The words that errors about an image of a request begin with."""
    return name if is_image(source) else f"{name} is '{source}'"


# What follows are readers: each takes a value and the name it goes by in errors, and gives the checked value. Those of
# fields that hold images also take the folder that relative paths start from.


def _set(instance: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)  # frozen from here on


def _check_together(request: Request) -> None:
    given = [name for name in _GROUNDING if getattr(request, name)]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} are both given: no model takes both, leave one out")
    if request.seed + request.num_images > 2**63:
        raise ValueError(f"seed is {request.seed}: image k has seed + k, so give one that leaves room for all images")
    if request.eta and request.sampler != "ddim":
        raise ValueError(f"eta is {request.eta}, but the sampler is {request.sampler!r}: leave eta out or use 'ddim'")
    if request.strength != STRENGTH and request.init_image is None:
        raise ValueError(f"strength is {request.strength}, but there is no init_image that it could be of: give one")
    for name in ("prompt", "negative_prompt"):
        try:
            parse_prompt(getattr(request, name), request.reading)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    if request.inpaint is not None and request.init_image is not None:
        raise ValueError("inpaint and init_image are both given: what is repainted begins as noise, leave one out")
    if request.inpaint is not None and given not in ([], ["entities"]):
        raise ValueError(f"inpaint and {given[0]} are both given: inpainting takes entities only, leave one out")


def _entities(value: Any, name: str, *, folder: Path | None = None) -> tuple[Entity, ...]:
    return tuple(_entity(item, f"{name}[{i}]", folder) for i, item in enumerate(read_list(value, name, "entities")))


def _entity(data: Any, name: str, folder: Path | None) -> Entity:
    if isinstance(data, Entity):
        return data
    names = [field.name for field in dataclasses.fields(Entity)]
    example = "x0, y0, x1, y1 in [0, 1]"
    given = given_fields(data, name, names, required="box", example=example, nullable=("image",))
    return Entity(**_entity_fields({"phrase": "", "image": None, **given}, name, folder))


def _entity_fields(values: Mapping[str, Any], name: str, folder: Path | None = None) -> dict[str, Any]:
    """An entity's fields, each checked and all together."""
    phrase = read_text(values["phrase"], f"{name}.phrase").strip()
    image = values["image"]
    if image is not None:
        image = read_image(image, f"{name}.image", folder=folder)
    if not phrase and image is None:
        raise ValueError(f"{name}.phrase is {show(values['phrase'])}: name the thing, or give {name}.image")
    x0, y0, x1, y1 = box = _box(values["box"], f"{name}.box")
    if box != STYLE_BOX or image is None:
        for low, high, axis in ((x0, x1, "x"), (y0, y1, "y")):
            if low >= high:
                raise ValueError(f"{name}.box is {show(list(box))}: {axis}0 must be below {axis}1")
    return {"phrase": phrase, "image": image, "box": box}


def _box(value: Any, name: str) -> Box:
    wanted = "give four numbers x0, y0, x1, y1 as fractions of the image's width and height"
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
    wanted = "give x, y as fractions of the image's width and height, or null if it is absent"
    x, y = read_fractions(value, name, 2, wanted)
    return (x, y) if (x, y) != (0, 0) else None  # the published encoding of an absent point


def _inpaint(data: Any, name: str, *, folder: Path | None = None) -> Inpaint:
    if isinstance(data, Inpaint):
        return data
    example = "the image to repaint"
    given = given_fields(data, name, ("image", "mask"), required="image", example=example, nullable=("mask",))
    return Inpaint(**_inpaint_fields(given, name, folder))


def _inpaint_fields(values: Mapping[str, Any], name: str, folder: Path | None = None) -> dict[str, Any]:
    given = {key: value for key, value in values.items() if value is not None or key != "mask"}
    return {key: read_image(value, f"{name}.{key}", folder=folder) for key, value in given.items()}


def _size(value: Any, name: str) -> tuple[int, int]:
    value = plain(value)
    value = [plain(side) for side in value] if is_list(value) else value
    if not is_list(value) or len(value) != 2 or not all(is_whole(side) and side > 0 for side in value):
        raise ValueError(f"{name} is {show(value)}: give width and height in pixels, two whole numbers above 0")
    return (value[0], value[1])


def _strength(value: Any, name: str) -> float:
    strength = read_number(value, name, low=0, high=1)
    if strength == 0:
        raise ValueError(f"{name} is 0, which leaves the image as it is: give a number above 0, up to 1")
    return strength


def _seed(value: Any, name: str) -> int:
    """A seed; -1 draws one, which is logged."""
    if plain(value) != -1 or isinstance(value, bool):
        return read_whole(value, name, low=0, high=2**63 - 1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process would draw another
        raise ValueError(f"{name} is -1, which draws one: give one where several processes share the images")
    drawn = secrets.randbelow(2**32)
    log.info("%s -1: drew %d", name, drawn)
    return drawn


def _num_images(value: Any, name: str) -> int:
    count = read_whole(value, name, low=1)
    if count > MAX_IMAGES:
        raise ValueError(f"{name} is {show(count)}: give at most {MAX_IMAGES}")
    return count


def _sampler(value: Any, name: str) -> str:
    value = plain(value)
    if value not in SAMPLERS:
        other = OTHER_SAMPLERS.get(re.sub(r"^k_|[ _+-]|karras$", "", value.lower())) if isinstance(value, str) else None
        hint = f"did you mean '{other}'? " if other else ""
        raise ValueError(f"{name} is {show(value)}: {hint}give one of {', '.join(SAMPLERS)}")
    return value


def _schedule(value: Any, name: str) -> Schedule:
    wanted = "give three fractions of the steps (on, linear decay, off), each in [0, 1], that sum to 1"
    value = plain(value)
    value = [plain(part) for part in value] if is_list(value) else value
    if not is_list(value) or len(value) != 3 or not all(is_number(part) for part in value):
        raise ValueError(f"{name} is {show(value)}: {wanted}")
    on, decay, off = (float(part) for part in value)
    if not all(0 <= part <= 1 for part in (on, decay, off)) or not abs(on + decay + off - 1) <= 1e-6:
        raise ValueError(f"{name} is {show(value)}: {wanted}")
    return (on, decay, off)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in given.items() if item != defaults[name]}
    return [_plain(item) for item in value] if is_list(value) else value


READERS: dict[str, Reader] = {
    "prompt": read_text,
    "negative_prompt": read_text,
    "prompt_weights": read_truth,
    "clip_skip": partial(read_whole, low=1),
    "long_prompts": read_truth,
    "entities": _entities,
    "keypoints": _keypoints,
    **dict.fromkeys(MAP_MODES, read_image),
    "inpaint": _inpaint,
    "init_image": read_image,
    "strength": _strength,
    "size": _size,
    "steps": partial(read_whole, low=1, high=1000),
    "sampler": _sampler,
    "guidance": partial(read_number, low=-MAX_GUIDANCE, high=MAX_GUIDANCE),
    "eta": partial(read_number, low=0, high=1),
    "schedule": _schedule,
    "seed": _seed,
    "num_images": _num_images,
}
NULLABLE = ("inpaint", "init_image", "size", "schedule", *MAP_MODES)  # fields for which null means not given
