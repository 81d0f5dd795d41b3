"""What an evaluation asks for: request files, published benchmarks' request files, and data sets, one image a number.

`read_request_set` knows a file's format by its content: our own requests (JSON, YAML or an image of ours), COCO-MIG's
YAML, and the CSV of 7Bench and cobench. `AskedExamples` asks for what a data set's images show.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gligen.data.example import BadExample, Example, Federation, Source
from gligen.evaluation.settings import NOISE_STRIDE, THROUGHOUT, UNGROUNDED, Captions
from gligen.files import write_atomically
from gligen.grounding import kind_of
from gligen.image_files import image_bytes
from gligen.modes import get_mode
from gligen.request import Entity, Inpaint, Request, merge, parse_request, read_requests, to_dict

CSV_SIDE = 512  # pixels a side of the image that the boxes of 7Bench's and cobench's CSV refer to
CSV_OBJECTS = 8  # at most, in columns obj1, bbox1, ...


class Asked(Protocol):
    """A numbered series of requests, each for one image."""

    description: str  # for people: the format and how much there is
    left_out: Counter[str]  # reason -> how many, as far as they have been read
    federation: Federation | None  # what of the data set is labelled where, if it says so

    @property
    def size(self) -> int:
        """The number of images, 0 to size - 1."""

    def request(self, n: int) -> Request | None:
        """Request n, for one image; None for an example that cannot be used, which is counted in `left_out`."""

    def key(self, n: int) -> str:
        """The name that the data set or request file has for it; '' for nothing."""

    def reference(self, n: int) -> NDArray[np.uint8] | None:
        """The real image (H, W, 3) that shows what is asked for, at the size that is generated; None without one."""

    def fingerprint(self) -> str:
        """Differs where other images would be generated."""


@dataclass(frozen=True, kw_only=True)
class How:
    """Options by which all of a set is asked for.

    captions: as they are; class names and commas ('detection'); or none ('null').
    ungrounded: captions alone (β = 0), measured against the same boxes.
    repaint: of inpainting, all entities of an image or one, drawn by the seed.
    seed: image n starts from noise seed · 2^20 + n; None is 0, or what a request file says.
    fields: of a request, that override all others: size, steps, sampler, guidance, eta, schedule, tau, num_images.
    """

    captions: Captions = "full"
    ungrounded: bool = False
    repaint: Literal["all", "one"] = "all"
    seed: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, request: Request, n: int, *, own_seed: bool = False) -> Request:
        """The request as it is asked for; n: its number, own_seed: whether to keep its seed where none is given."""
        fields = {key: value for key, value in self.fields.items() if key != "num_images"}
        if self.captions != "full":
            names = ", ".join(dict.fromkeys(class_name(entity.phrase) for entity in request.entities if entity.phrase))
            fields["prompt"] = names if self.captions == "detection" else ""
        if self.ungrounded:
            fields["schedule"] = UNGROUNDED
        if self.seed is not None or not own_seed:
            fields["seed"] = (self.seed or 0) * NOISE_STRIDE + n
        return merge(request, fields)


def class_name(phrase: str) -> str:
    """A phrase as a class: lower case, single spaces, without a leading article. 'A  red Star' is 'red star'.

    Detections and asked boxes belong together where this agrees.
    """
    words = phrase.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@dataclass
class AskedRequests:
    """The requests of a file, an image each."""

    description: str
    requests: Sequence[Request]
    keys: Sequence[str]
    left_out: Counter[str] = field(default_factory=Counter)
    federation: Federation | None = None

    @property
    def size(self) -> int:
        return len(self.requests)

    def request(self, n: int) -> Request:
        return self.requests[n]

    def key(self, n: int) -> str:
        return self.keys[n]

    def reference(self, n: int) -> None:
        return None

    def fingerprint(self) -> str:
        content = json.dumps([to_dict(request) for request in self.requests], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class AskedExamples:
    """The images of a data set, asked for as a mode asks.

    source: examples ready for the mode, at the size that is generated. folder: where images that requests name (maps,
    references, what is repainted) are written, when they are first asked for. Every box of an example is asked for;
    those with a reference image by phrase and image. count: so many of the first; None: all. federation: what the data
    set says is labelled where.
    Raises ValueError for a source without end and no count.
    """

    def __init__(
        self,
        source: Source,
        *,
        mode: str,
        how: How,
        folder: Path,
        description: str,
        count: int | None = None,
        federation: Federation | None = None,
    ) -> None:
        if source.size is None and count is None:
            raise ValueError("the data set has no end: say how many of it with --count")
        examples = min(x for x in (source.size, count) if x is not None)
        self.mode, self.how, self.folder, self.federation = get_mode(mode), how, folder, federation
        self.copies = int(how.fields.get("num_images", 1))
        self.size = examples * self.copies
        self.description = description
        self.left_out: Counter[str] = Counter()
        self._bad: set[int] = set()  # what has been counted in left_out already
        self._faulty: set[int] = set()
        self._read = lru_cache(maxsize=1)(source.example)  # asked for again and again by what follows

    def request(self, n: int) -> Request | None:
        example = self._example(n // self.copies)
        if example is None:
            return None
        height, width = example.image.shape[:2]
        fields: dict[str, Any] = {"prompt": example.caption, "schedule": THROUGHOUT, "size": (width, height)}
        request = parse_request(fields, where=f"example {n // self.copies}: ")
        try:
            request = dataclasses.replace(request, **self._grounding(example, n // self.copies))
            return self.how.applied(request, n)
        except BadExample as error:
            self._leave_out(n // self.copies, error)
            return None
        except ValueError as error:
            raise ValueError(f"example {n // self.copies}, '{example.key}': {error}") from None

    def key(self, n: int) -> str:
        example = self._example(n // self.copies)
        return example.key if example else ""

    def reference(self, n: int) -> NDArray[np.uint8] | None:
        example = self._example(n // self.copies)
        return None if example is None or not example.image.size else example.image

    def fingerprint(self) -> str:
        return f"{self.description}, {self.mode.name}, {self.size} images"

    def _example(self, i: int) -> Example | None:
        try:
            example = self._read(i)
        except BadExample as error:
            self._leave_out(i, error)
            return None
        if example.faults and i not in self._faulty:
            self._faulty.add(i)
            self.left_out.update(fault.reason for fault in example.faults)
        return example

    def _leave_out(self, i: int, error: BadExample) -> None:
        if i not in self._bad:
            self._bad.add(i)
            self.left_out[error.reason] += 1

    def _grounding(self, example: Example, i: int) -> dict[str, Any]:
        """Request fields that ground the mode in the example."""
        fields = kind_of(self.mode).asked(example, self.mode, partial(self._write, i))
        if not self.mode.is_inpainting:
            return fields
        entities = list(fields["entities"])
        if self.how.repaint == "one" and entities:
            entities = [entities[int(np.random.default_rng((self.how.seed or 0, i)).integers(len(entities)))]]
        mask = example.mask if self.how.repaint == "all" else None
        if mask is None and not entities:
            raise BadExample("nothing to repaint", f"example {i} has neither a box nor a mask")
        inpaint = Inpaint(
            image=self._write(i, "image", example.image),
            mask=None if mask is None else self._write(i, "mask", mask),
        )
        return {"entities": tuple(entities), "inpaint": inpaint}

    def _write(self, i: int, name: str, pixels: NDArray[np.uint8]) -> str:
        path = self.folder.absolute() / f"{i:06d}-{name}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, image_bytes(Image.fromarray(pixels), ".png"))
        return str(path)


def read_request_set(path: str | Path, how: How, count: int | None = None) -> AskedRequests:
    """The requests of a file, one for each image, the first `count` of its requests.

    Formats, told by content: ours (gligen.request.read_requests); COCO-MIG's YAML, caption → phrase → list of xyxy
    boxes in fractions, beside `coco_id`; the CSV of 7Bench and cobench, `prompt`, `obj1`, `bbox1` = "x0,y0,x1,y1" in
    pixels of 512 × 512, and so on. Those of benchmarks are grounded throughout (schedule 1, 0, 0) unless `how` says
    otherwise, and image n has seed n; our own requests keep their seeds, steps and schedules.
    Raises FileNotFoundError or ValueError, one line, naming file and request.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        kind, named = "7Bench CSV", _read_csv(path)
    elif path.suffix.lower() in (".yaml", ".yml") and (mapping := _read_mapping(path)) is not None:
        kind, named = "COCO-MIG", _read_mig(path, mapping)
    else:
        kind, named = "requests", [("", request) for request in read_requests(path)]
    is_own = kind == "requests"
    named = named[:count]
    requests: list[Request] = []
    keys: list[str] = []
    for key, request in named:
        copies = int(how.fields.get("num_images", request.num_images))
        for k in range(copies):
            alone = dataclasses.replace(request, num_images=1, seed=request.seed + k)
            requests.append(how.applied(alone, len(requests), own_seed=is_own))
            keys.append(key)
    boxes = sum(len(request.entities) for request in requests)
    return AskedRequests(f"{kind} '{path.name}': {len(requests)} images, {boxes} boxes", tuple(requests), tuple(keys))


def _read_csv(path: Path) -> list[tuple[str, Request]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"request file '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"request file '{path}' cannot be read as CSV: {error}") from None
    wanted = ("prompt", "obj1", "bbox1")
    if not rows or not set(wanted) <= rows[0].keys():
        raise ValueError(f"{path.name}: a CSV of requests has rows under the columns {', '.join(wanted)}, ...")
    found = []
    for i, row in enumerate(rows):
        where = f"{path.name}, row {i + 1}: "
        entities = []
        for k in range(1, CSV_OBJECTS + 1):
            phrase, box = (row.get(f"obj{k}") or "").strip(), (row.get(f"bbox{k}") or "").strip()
            if bool(phrase) != bool(box):
                raise ValueError(f"{where}obj{k} is {phrase!r} and bbox{k} {box!r}: give both or neither")
            if phrase:
                entities.append({"phrase": phrase, "box": _pixel_box(box, f"{where}bbox{k}")})
        data = {"prompt": row["prompt"] or "", "entities": entities, "schedule": list(THROUGHOUT)}
        found.append((row.get("id") or str(i), parse_request(data, where=where)))
    return found


def _pixel_box(text: str, name: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or not all(0 <= number <= CSV_SIDE for number in numbers):
        raise ValueError(f"{name} is {text!r}: give x0,y0,x1,y1 in pixels of {CSV_SIDE} x {CSV_SIDE}")
    return [number / CSV_SIDE for number in numbers]


def _read_mapping(path: Path) -> dict[Any, Any] | None:
    """A YAML file that maps captions; None for one of ours. Raises ValueError where a caption comes twice."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen when it runs
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        pairs = [
            (loader.construct_object(key, True), loader.construct_object(value, True)) for key, value in node.value
        ]
        twice = [key for key, times in Counter(str(key) for key, _ in pairs).items() if times > 1]
        if twice:
            raise ValueError(f"{path.name}: {twice[0]!r} is there twice, and only the last would count: rename one")
        return dict(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return None  # read_requests says what is wrong
    is_mig = isinstance(data, dict) and data and "prompt" not in data
    return data if is_mig and all(isinstance(value, dict) for value in data.values()) else None


def _read_mig(path: Path, data: Mapping[Any, Any]) -> list[tuple[str, Request]]:
    found = []
    for i, (caption, phrases) in enumerate(data.items()):
        entities = []
        for phrase, boxes in phrases.items():
            if phrase == "coco_id":
                continue
            if not isinstance(boxes, list):
                raise ValueError(f"{path.name}, request {i}: '{phrase}' has {boxes!r}: give a list of boxes")
            entities += [{"phrase": str(phrase), "box": box} for box in boxes]
        fields = {"prompt": str(caption), "entities": entities, "schedule": list(THROUGHOUT)}
        key = str(phrases.get("coco_id", i))
        found.append((key, parse_request(fields, where=f"{path.name}, request {i}: ")))
    return found


def asked_entities(request: Request) -> tuple[Entity, ...]:
    """The entities that have a place and a phrase, which detections can be compared with."""
    return tuple(entity for entity in request.entities if entity.phrase and entity.box[0] < entity.box[2])
