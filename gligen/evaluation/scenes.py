"""How well images of the drawn world keep to what was asked: objects at their boxes, keypoints at their points.

`score_image` compares what the detector sees in one image with the asked objects, `summarize` makes the metrics of
many: shares, mean IoU and COCO's AP50, for all pairs and for those seen and held out in training, with their spread.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gligen.data.people import LIMBS
from gligen.data.scenes import Image, SceneObject
from gligen.data.shapes import HELD_OUT
from gligen.evaluation.detector import Detection, colored_regions
from gligen.evaluation.metrics import Float, average_precision, box_iou
from gligen.request import Person

FOUND_IOU = 0.5
TOUCH_IOU = 0.1  # below it a detection and an asked object have nothing to do with each other
RESAMPLES = 500  # of the images, for the spread
MIN_LIMB_AREA = 8 / 64**2  # of the image
UPPER_ENDS = {end for _, end in LIMBS.values()}  # a limb that starts at one of these is a lower one
NEAR_KEYPOINT = 0.05  # of the image's side: about a limb's width


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectResult:
    """The result for one asked object. detection: its partner in the image, None if there is none."""

    asked: SceneObject | Detection
    detection: Detection | None
    iou: float  # with the partner; 0 without

    @property
    def has_color(self) -> bool:
        return self.detection is not None and self.detection.color == self.asked.color

    @property
    def is_found(self) -> bool:
        """True at IoU ≥ 0.5 and in the right colour."""
        return self.has_color and self.iou >= FOUND_IOU

    @property
    def is_found_with_shape(self) -> bool:
        return self.is_found and self.detection is not None and self.detection.shape == self.asked.shape


def score_image(detections: Sequence[Detection], asked: Sequence[SceneObject | Detection]) -> list[ObjectResult]:
    """One result per asked object, in their order.

    Partners are one to one and at least at IoU 0.1. The best pairs come first: those that count as found, among
    them those of the right shape, then those of the right colour, each by IoU.
    """
    overlaps = box_iou([item.box for item in asked], [item.box for item in detections])
    results = [ObjectResult(asked=item, detection=None, iou=0.0) for item in asked]
    pairs = [
        ObjectResult(asked=item, detection=detection, iou=float(overlaps[i, j]))
        for i, item in enumerate(asked)
        for j, detection in enumerate(detections)
    ]
    order = sorted(
        (k for k, pair in enumerate(pairs) if pair.iou >= TOUCH_IOU),
        key=lambda k: (pairs[k].is_found, pairs[k].is_found_with_shape, pairs[k].has_color, pairs[k].iou),
        reverse=True,
    )
    taken: set[int] = set()
    for i, j, pair in ((*divmod(k, len(detections)), pairs[k]) for k in order):
        if results[i].detection is None and j not in taken:
            results[i] = pair
            taken.add(j)
    return results


def spare_objects(detections: Sequence[Detection], results: Sequence[ObjectResult]) -> int:
    """The number of detections that are no asked object's partner."""
    return len(detections) - sum(result.detection is not None for result in results)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric and its standard deviation over resampled sets of images (bootstrap)."""

    value: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Metrics of the asked objects of some pairs."""

    objects: int
    found: Metric  # share of asked objects at IoU ≥ 0.5 with the right colour
    found_with_shape: Metric  # … and the right shape
    mean_iou: Metric  # over all asked objects with their partner of the right colour; 0 where there is none
    mean_iou_found: Metric  # over those found
    ap50: float  # COCO's, a class being a pair of colour and shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Metrics of a set of images. seen, held_out: None where nothing of the kind was asked for."""

    images: int
    spare: Metric  # detections an image that belong to no asked object
    ap50_color: float  # COCO's, a class being a colour
    all: Group | None
    seen: Group | None
    held_out: Group | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what is undefined (a mean of nothing) is None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def summarize(images: Sequence[Sequence[Detection]], asked: Sequence[Sequence[SceneObject | Detection]]) -> Report:
    """The metrics of many images. images: each one's detections; asked: each one's objects.

    Raises ValueError without images, or if the two differ in length.
    """
    if not images or len(images) != len(asked):
        raise ValueError(f"{len(images)} images and {len(asked)} lists of objects: give as many, and at least one")
    results = [score_image(detections, objects) for detections, objects in zip(images, asked, strict=True)]
    draws = np.random.default_rng(0).multinomial(len(images), [1 / len(images)] * len(images), RESAMPLES)

    def metric(parts: Sequence[float], wholes: Sequence[float]) -> Metric:
        """Sum of parts / sum of wholes, both given per image."""
        part, whole = np.array(parts, float), np.array(wholes, float)
        with np.errstate(invalid="ignore"):
            ratios = (draws @ part) / (draws @ whole)
        ratios = ratios[np.isfinite(ratios)]
        value = part.sum() / whole.sum() if whole.sum() else math.nan
        return Metric(float(value), float(ratios.std()) if len(ratios) else math.nan)

    def group(kinds: Sequence[bool]) -> Group | None:
        rows = [[r for r in row if (r.asked.pair in HELD_OUT) in kinds] for row in results]
        counts = [len(row) for row in rows]
        if not sum(counts):
            return None
        found = [[r for r in row if r.is_found] for row in rows]
        return Group(
            objects=sum(counts),
            found=metric([len(row) for row in found], counts),
            found_with_shape=metric([sum(r.is_found_with_shape for r in row) for row in rows], counts),
            mean_iou=metric([sum(r.iou * r.has_color for r in row) for row in rows], counts),
            mean_iou_found=metric([sum(r.iou for r in row) for row in found], [len(row) for row in found]),
            ap50=average_precision(
                [[(d.pair, d.box, d.score) for d in detections] for detections in images],
                [[(r.asked.pair, r.asked.box) for r in row] for row in rows],
            ),
        )

    return Report(
        images=len(images),
        spare=metric([spare_objects(*pair) for pair in zip(images, results, strict=True)], [1] * len(images)),
        ap50_color=average_precision(
            [[(d.color, d.box, d.score) for d in detections] for detections in images],
            [[(item.color, item.box) for item in objects] for objects in asked],
        ),
        all=group((True, False)),
        seen=group((False,)),
        held_out=group((True,)),
    )


def keypoint_distances(image: Image, people: Sequence[Person]) -> Float:
    """Distances of the drawn limbs' ends from the asked ones, in fractions of the image's side.

    image: (H, W, 3) uint8, H = W. Returns (people, 8 limbs in the order of LIMBS, 2 ends): NaN where an end was
    not asked for (as when it lies outside), infinity where the limb is not in the image.
    A limb is a region of its colour, of several the one that fits best. Its axis and length come from its pixels'
    second moments, and which end is which from the better fit.
    """
    size = len(image)
    drawn: dict[str, list[Float]] = {color: [] for color in LIMBS}
    for color, region, strength in colored_regions(image, MIN_LIMB_AREA):
        y, x = np.nonzero(region)
        points = (np.stack([x, y], -1) + 0.5) / size
        drawn[color] += _ends(points, strength[region], is_lower=LIMBS[color][0] in UPPER_ENDS)
    distances = np.full((len(people), len(LIMBS), 2), np.nan)
    for i, person in enumerate(people):
        for k, (color, (a, b)) in enumerate(LIMBS.items()):
            if (start := person[a]) and (end := person[b]):
                fits = [np.linalg.norm(ends - np.array([start, end]), axis=-1) for ends in drawn[color]]
                distances[i, k] = min(fits, key=np.sum, default=math.inf)
    return distances


def summarize_keypoints(distances: Sequence[Float]) -> dict[str, Any]:
    """Metrics of many images' keypoint_distances, as JSON data.

    joints: limb ends asked for; found: share whose limb is in the image; distance: mean of those found;
    near: share within 0.05 of the image's side (PCK), where missing ones count as wrong.
    """
    every = np.concatenate([np.ravel(each) for each in distances])
    every = every[~np.isnan(every)]
    there = every[np.isfinite(every)]
    metrics = {
        "found": len(there) / len(every) if len(every) else math.nan,
        "distance": float(there.mean()) if len(there) else math.nan,
        "near": float((every <= NEAR_KEYPOINT).mean()) if len(every) else math.nan,
    }
    return {"images": len(distances), "joints": len(every), **_plain(metrics)}


def _ends(points: Float, weights: Float, *, is_lower: bool) -> list[Float]:
    """Where the ends (2, 2) of a limb are, from its pixels (N, 2), for both ways it may point.

    A limb is a bar with round ends, of which a lower one's first lies under the upper limb's.
    """
    center = np.average(points, axis=0, weights=weights)
    variances, axes = np.linalg.eigh(np.cov(points.T, aweights=weights, ddof=0))
    width, length = np.sqrt(12 * variances.clip(0))  # a bar's variance is its length² / 12
    round_end = math.pi / 8 * width  # as long a piece of bar has a half disc's area
    first = length / 2 + (width / 2 if is_lower else -round_end)
    return [
        np.stack([center - first * axis, center + (length / 2 - round_end) * axis]) for axis in (axes.T[1], -axes.T[1])
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None
