"""COCO's formats and metrics: asked boxes as a data set, detections of any tool, AP and AR by faster-coco-eval.

truth = asked_dataset(images)                                   # as asked.json holds it
detections = read_detections("detections.json", truth)
coco_metrics(truth, detections)                                 # {"AP": …, "AP50": …, …}
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gligen.data.example import Federation
from gligen.evaluation.asked import asked_entities, class_name
from gligen.fields import is_number
from gligen.request import NUM_KEYPOINTS, Request

Kind = Literal["bbox", "segm", "keypoints"]
Dataset = dict[str, Any]  # COCO: images, annotations, categories

INSTALL = "pip install -e .[evaluation]"
WITHOUT = -1.0  # what COCO's evaluation has for a metric of nothing
SMALL, LARGE = 32**2, 96**2  # pixels: COCO's small objects are below the first, its large ones above the second
WHOLE = 1e10
LVIS_DETECTIONS = 300  # an image, at most, that LVIS's AP looks at
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}  # LVIS's classes: in up to 10, in up to 100, in more images
PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
KEYPOINT_NAMES = ["nose", *(f"{side}_{part}" for part in PARTS for side in ("left", "right"))]
SHARES = {"1-3 %": (0.01, 0.03), "5-10 %": (0.05, 0.1), "30-50 %": (0.3, 0.5)}  # of the image; the paper's inpainting
FRAME = 1000.0  # pixels a side to which images are scaled where objects are told apart by their share of the image


@dataclass(frozen=True, kw_only=True)
class AskedImage:
    """One generated image and what was asked for. number: its id; size: (width, height) in pixels."""

    number: int
    file_name: str
    size: tuple[int, int]
    request: Request
    key: str = ""


@dataclass(kw_only=True)
class Detections:
    """Detections of asked images as COCO results: image_id, category_id of the asked data set, bbox xywh, score.

    unknown: class names that were not asked for anywhere and how many detections they had; as in COCO's evaluation,
    which looks at annotated classes alone, those count for nothing.
    """

    results: list[dict[str, Any]]
    unknown: Counter[str] = field(default_factory=Counter)

    def by_image(self) -> dict[Any, list[dict[str, Any]]]:
        grouped: dict[Any, list[dict[str, Any]]] = {}
        for result in self.results:
            grouped.setdefault(result["image_id"], []).append(result)
        return grouped


def require_evaluator() -> None:
    """Raises ValueError, one line, where faster-coco-eval is not installed."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ValueError(f"AP needs faster-coco-eval: {INSTALL}")


def asked_dataset(images: Sequence[AskedImage], federation: Federation | None = None) -> Dataset:
    """The asked boxes or keypoints of generated images as a COCO data set.

    A class is an asked phrase without article (`class_name`), in the order of the alphabet. bbox: x, y, width, height
    in pixels. An annotation's `phrase` is as it was asked for. A keypoint's visibility is 2; a person's box is that
    around the points, and so is its `area`, which OKS measures distances by: COCO has the area of the person's outline
    there, about half as large, so distances count for less here. federation: of the data set, if it has one: then
    images have LVIS's `neg_category_ids` and `not_exhaustive_category_ids`, and classes their `frequency`.
    """
    is_people = any(image.request.keypoints for image in images)
    phrases = {class_name(entity.phrase) for image in images for entity in asked_entities(image.request)}
    names = sorted(phrases | ({"person"} if is_people else set()))
    ids = {name: i for i, name in enumerate(names, start=1)}
    categories: list[dict[str, Any]] = [{"id": i, "name": name} for name, i in ids.items()]
    if is_people:
        categories[ids["person"] - 1]["keypoints"] = KEYPOINT_NAMES
    annotations: list[dict[str, Any]] = []

    def add(image: AskedImage, name: str, box: Sequence[float], more: Mapping[str, Any]) -> None:
        (W, H), (x0, y0, x1, y1) = image.size, box
        bbox = [x0 * W, y0 * H, (x1 - x0) * W, (y1 - y0) * H]
        area = bbox[2] * bbox[3]
        place = {"id": len(annotations) + 1, "image_id": image.number, "category_id": ids[name], "bbox": bbox}
        annotations.append({**place, "area": area, "iscrowd": 0, **more})

    for image in images:
        W, H = image.size
        for entity in asked_entities(image.request):
            add(image, class_name(entity.phrase), entity.box, {"phrase": entity.phrase})
        for person in image.request.keypoints:
            if points := [point for point in person if point]:
                (left, top), (right, bottom) = np.min(points, axis=0), np.max(points, axis=0)
                flat = [x for point in person for x in ((point[0] * W, point[1] * H, 2) if point else (0, 0, 0))]
                more = {"keypoints": flat, "num_keypoints": len(points)}
                add(image, "person", (float(left), float(top), float(right), float(bottom)), more)
    described: list[dict[str, Any]] = []
    for image in images:
        (W, H), caption = image.size, image.request.prompt
        facts = {"id": image.number, "file_name": image.file_name, "width": W, "height": H, "caption": caption}
        described.append(facts | ({"source": image.key} if image.key else {}))
    if federation is not None:
        frequency = {class_name(name): kind for name, kind in federation.frequency.items()}
        for category in categories:
            category |= {"frequency": frequency[category["name"]]} if category["name"] in frequency else {}
        for item, image in zip(described, images, strict=True):
            for field_name, names_of in (
                ("neg_category_ids", federation.absent),
                ("not_exhaustive_category_ids", federation.partial),
            ):
                known = map(class_name, names_of.get(image.key, ()))
                item[field_name] = sorted({ids[name] for name in known if name in ids})
    info = {"description": "what was asked for; images are generated"}
    return {"info": info, "images": described, "annotations": annotations, "categories": categories}


def read_json(path: str | Path, what: str) -> Any:
    """A JSON file. what: begins errors. Raises FileNotFoundError or ValueError, one line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} '{path}': there is no such file") from None
    except OSError as error:
        raise ValueError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} '{path}' is not valid JSON: {error}") from None


def check_dataset(data: Any, what: str) -> Dataset:
    """COCO annotations, checked. Raises ValueError, one line, where it is not that."""
    parts = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
        raise ValueError(f"{what} is no COCO data set: it needs lists called {', '.join(parts)}")
    for part, needed in (
        ("images", ("id",)),
        ("categories", ("id", "name")),
        ("annotations", ("id", "image_id", "category_id", "bbox", "area")),
    ):
        for i, item in enumerate(data[part]):
            missing = [name for name in needed if not isinstance(item, dict) or name not in item]
            if missing:
                raise ValueError(f"{what}: {part}[{i}] has no {missing[0]}")
    return data


def read_detections(path: str | Path, truth: Dataset, categories: str | Path | None = None) -> Detections:
    """Detections that any tool wrote, as results of the `truth` (asked.json or other COCO annotations).

    The file is COCO's results, a list of {"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"} with, by
    kind, "segmentation" or "keypoints"; or a data set with them as "annotations", whose own images and categories say
    what its ids mean. Instead of ids an entry may have "file_name" and "category_name" (or "category", "name").
    categories: a COCO file whose `categories` say what category_id means, where it is not the truth's.
    Raises FileNotFoundError or ValueError, one line, with the first entry that cannot be.
    """
    what = "detections"
    data = read_json(path, what)
    own_names: dict[Any, str] = {}
    own_files: dict[Any, str] = {}
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        own_names = {item["id"]: item["name"] for item in data.get("categories", ())}
        own_files = {item["id"]: item["file_name"] for item in data.get("images", ())}
        data = data["annotations"]
    if not isinstance(data, list):
        raise ValueError(
            f"{what} '{path}' holds no list: give COCO's results, [{{image_id, category_id, bbox, score}}]"
        )
    if categories is not None:
        named = read_json(categories, "categories")
        if not isinstance(named, dict) or not isinstance(named.get("categories"), list):
            raise ValueError(f"categories '{categories}': no COCO file, it has no list called categories")
        own_names = {item["id"]: item["name"] for item in named["categories"]}
    reader = _Reader(truth, own_names, own_files)
    detections = Detections(results=[])
    for i, item in enumerate(data):
        where = f"{what} '{path}', entry {i}: "
        if not isinstance(item, dict):
            raise ValueError(f"{where}is no object: give image_id, category_id, bbox and score")
        result = reader.result(item, where)
        if isinstance(result, str):
            detections.unknown[result] += 1
        else:
            detections.results.append(result)
    if data and not detections.results:
        found = ", ".join(repr(name) for name, _ in detections.unknown.most_common(3))
        asked = ", ".join(repr(name) for name in list(reader.ids)[:3])
        raise ValueError(
            f"{what} '{path}': no class of it was asked for: it has {found}, asked for were {asked}; where its "
            "category_id has other names than asked.json, give them with --categories"
        )
    return detections


class _Reader:
    """Entries of a detections file as results of a data set."""

    def __init__(self, truth: Dataset, own_names: Mapping[Any, str], own_files: Mapping[Any, str]) -> None:
        self.ids = {class_name(item["name"]): item["id"] for item in truth["categories"]}
        self.known = {item["id"] for item in truth["categories"]}
        self.images = {item["id"] for item in truth["images"]}
        self.files = {
            PurePosixPath(item["file_name"]).name: item["id"] for item in truth["images"] if "file_name" in item
        }
        self.own_names, self.own_files = own_names, own_files

    def result(self, item: Mapping[str, Any], where: str) -> dict[str, Any] | str:
        """One result, or the name of a class that was not asked for."""
        score: Any = item.get("score")
        if not _is_finite(score):
            raise ValueError(f"{where}score is {score!r}: give a number, what AP sorts detections by")
        result: dict[str, Any] = {"image_id": self._image(item, where), "score": float(score)}
        if "bbox" in item:
            box = item["bbox"]
            if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
                raise ValueError(f"{where}bbox is {box!r}: give x, y, width, height in pixels")
            result["bbox"] = [float(x) for x in box]
        if "keypoints" in item:
            points = item["keypoints"]
            if not isinstance(points, list) or len(points) != 3 * NUM_KEYPOINTS or not all(map(_is_finite, points)):
                raise ValueError(f"{where}keypoints are not {NUM_KEYPOINTS} times x, y, visibility")
            result["keypoints"] = points
        if "segmentation" in item:
            result["segmentation"] = item["segmentation"]
        if len(result) == 2:
            raise ValueError(f"{where}has neither bbox, segmentation nor keypoints")
        name = next(
            (item[key] for key in ("category_name", "category", "name") if isinstance(item.get(key), str)), None
        )
        if name is None and "category_id" not in item:
            raise ValueError(f"{where}has neither category_id nor category_name")
        if name is None and self.own_names:
            if item["category_id"] not in self.own_names:
                raise ValueError(f"{where}category_id {item['category_id']!r} is not among its categories")
            name = self.own_names[item["category_id"]]
        if name is None:
            if item["category_id"] not in self.known:
                return f"category_id {item['category_id']}"
            return result | {"category_id": item["category_id"]}
        category = self.ids.get(class_name(name))
        return class_name(name) if category is None else result | {"category_id": category}

    def _image(self, item: Mapping[str, Any], where: str) -> Any:
        file = item.get("file_name", self.own_files.get(item.get("image_id")))
        if file is not None:
            number = self.files.get(PurePosixPath(str(file)).name)
            if number is None:
                raise ValueError(f"{where}file_name is '{file}', and no image that was asked for is called that")
            return number
        if "image_id" not in item:
            raise ValueError(f"{where}has neither image_id nor file_name")
        if item["image_id"] not in self.images:
            raise ValueError(f"{where}image_id is {item['image_id']!r}, and no image that was asked for has that id")
        return item["image_id"]


def is_federated(truth: Dataset) -> bool:
    """True for annotations that say, as LVIS's do, in which images a class is labelled."""
    return any("neg_category_ids" in item for item in truth["images"])


def coco_metrics(
    truth: Dataset,
    detections: Detections,
    kind: Kind = "bbox",
    *,
    class_agnostic: bool = False,
    areas: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, float | None]:
    """COCO's metrics of detections: AP (mean over IoU 0.5, 0.55, … 0.95 and classes), AP50, AP75, AP and AR by size.

    AR1, AR10, AR100: largest recall with so many detections an image (20 for keypoints, named AR alone).
    areas: name -> pixels from, to: sizes other than COCO's small (to 32²), medium (to 96²) and large; then only AP and
    AR of all and of each are given. class_agnostic: a detection of any class may find a box.
    None where there is nothing to measure, as no object of a size. By faster-coco-eval, whose 12 numbers are
    pycocotools' own. Raises ValueError without it.
    Of a truth that `is_federated` boxes and masks have LVIS's AP, but for class_agnostic: in an image only detections
    of classes count that have boxes in it or are known to be absent, what finds nothing of a partly labelled class
    counts for nothing, up to 300 detections an image are looked at, and AP is given by the classes' frequency too.
    Source: Gupta et al., "LVIS" (2019).
    """
    require_evaluator()
    from faster_coco_eval import COCO, COCOeval_faster

    needed = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    results = [result for result in detections.results if needed in result]
    is_lvis = is_federated(truth) and kind != "keypoints" and not class_agnostic
    categories = truth["categories"]
    if is_lvis:  # the evaluator wants a frequency of each
        categories = [{"frequency": "f"} | item for item in categories]
    ground = COCO({**truth, "categories": categories, "annotations": [dict(item) for item in truth["annotations"]]})
    read = ("image_id", "category_id", "score", needed)  # alone: loadRes infers the kind from what it finds first
    found = ground.loadRes([{key: result[key] for key in read} for result in results])
    evaluation = COCOeval_faster(ground, found, kind, print_function=lambda *args: None, lvis_style=is_lvis)
    params = evaluation.params
    if is_lvis:
        params.maxDets = [LVIS_DETECTIONS]
    if areas is not None:
        params.areaRng = [[0, WHOLE], *(list(limits) for limits in areas.values())]
        params.areaRngLbl = ["all", *areas]
    params.useCats = int(not class_agnostic)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # (T, R, K, A, M), (T, K, A, M)
    metrics = {"AP": _mean(precision[..., 0, -1])}
    if areas is None:
        metrics |= {"AP50": _mean(precision[0, ..., 0, -1]), "AP75": _mean(precision[5, ..., 0, -1])}
    names = list(params.areaRngLbl)
    metrics |= {f"AP {name}": _mean(precision[..., i, -1]) for i, name in enumerate(names) if i}
    if is_lvis and areas is None:
        kinds = {item["id"]: item.get("frequency") for item in truth["categories"]}
        for name, letter in FREQUENCIES.items():
            of_kind = [k for k, number in enumerate(params.catIds) if kinds[number] == letter]
            metrics[f"AP {name}"] = _mean(precision[:, :, of_kind, 0, -1])
    limits = list(params.maxDets) if areas is None else []
    label = "AR{}" if kind != "keypoints" else "AR"
    metrics |= {label.format(limit): _mean(recall[..., 0, m]) for m, limit in enumerate(limits)}
    return metrics | {f"AR {name}": _mean(recall[..., i, -1]) for i, name in enumerate(names) if i}


def shares_metrics(truth: Dataset, detections: Detections, *, class_agnostic: bool = False) -> dict[str, float | None]:
    """COCO's AP by the object's share of the image's area (SHARES), as the paper measures inpainting.

    Boxes are scaled to a frame of 1000 × 1000, which changes no IoU, so that images may differ in size. As with COCO's
    sizes, objects of other shares, what finds them, and unmatched detections of other sizes count for nothing.
    """
    scales = {item["id"]: (FRAME / item["width"], FRAME / item["height"]) for item in truth["images"]}

    def scaled(item: Mapping[str, Any]) -> dict[str, Any]:
        (sx, sy), (x, y, w, h) = scales[item["image_id"]], item["bbox"]
        kept = {key: item[key] for key in ("id", "image_id", "category_id", "score", "iscrowd") if key in item}
        return kept | {"bbox": [x * sx, y * sy, w * sx, h * sy], "area": w * sx * h * sy}

    framed = {**truth, "annotations": [scaled(item) for item in truth["annotations"]]}
    results = [scaled(item) for item in detections.results if "bbox" in item]
    areas = {name: (low * FRAME**2, high * FRAME**2) for name, (low, high) in SHARES.items()}
    found = coco_metrics(framed, Detections(results=results), class_agnostic=class_agnostic, areas=areas)
    metrics: dict[str, float | None] = {name: found[f"AP {name}"] for name in SHARES}
    for name, (low, high) in areas.items():
        metrics[f"objects of {name}"] = sum(low <= item["area"] <= high for item in framed["annotations"])
    return metrics


def inside(detections: Detections, region_of: Callable[[Any], NDArray[np.bool_]]) -> tuple[Detections, int]:
    """The detections half of whose box or more lies where an image was repainted, and how many others there were.

    region_of: image_id -> (H, W), true where repainted. What lies around it is a photograph, which nobody asked for.
    """
    kept = []
    for image, results in detections.by_image().items():
        region = region_of(image)
        for result in results:
            x, y, w, h = result.get("bbox", (0, 0, 0, 0))
            part = region[max(0, math.floor(y)) : math.ceil(y + h), max(0, math.floor(x)) : math.ceil(x + w)]
            if part.size and part.mean() >= 0.5:
                kept.append(result)
    return Detections(results=kept, unknown=detections.unknown), len(detections.results) - len(kept)


def _mean(values: NDArray[np.float64]) -> float | None:
    there = values[values > WITHOUT]
    return float(there.mean()) if there.size else None


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
