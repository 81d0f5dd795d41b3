"""Instances one by one, as COCO-MIG counts them: is what was asked for there, in its place and of its kind?

Source: Zhou et al., "MIGC" (2024) and its published evaluation: an instance's IoU is the largest of any detection of
its class; at 0.5 or more it is in its place, and if its attribute is right too it succeeds. Success rate is the share
of instances that do; mIoU is the mean over all instances of that IoU, 0 for those that do not succeed.

There the class is detected by GroundingDINO and the attribute, a colour, by the hue of its segment (right from a fifth
of its pixels on). Here both are the detection's class, 'red apple' for 'a red apple', however it was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gligen.evaluation.coco import Dataset, Detections
from gligen.evaluation.metrics import box_iou
from gligen.evaluation.run import Metrics, by_count, resampled

PLACE_IOU = 0.5
LEVELS = range(2, 7)  # COCO-MIG's: how many instances an image has


def instance_ious(truth: Dataset, detections: Detections, *, class_agnostic: bool = False) -> dict[Any, list[float]]:
    """For each image the largest IoU of each asked box with a detection of its class; 0 without one.

    A detection may serve several boxes, as in COCO-MIG. Images for which nothing was asked are not there.
    """
    found = detections.by_image()
    asked: dict[Any, list[Mapping[str, Any]]] = {}
    for item in truth["annotations"]:
        if not item.get("iscrowd"):
            asked.setdefault(item["image_id"], []).append(item)
    ious: dict[Any, list[float]] = {}
    for image, items in asked.items():
        boxes = [result for result in found.get(image, ()) if "bbox" in result]
        overlaps = box_iou([_corners(item) for item in items], [_corners(result) for result in boxes])
        ious[image] = [
            max(
                (
                    float(overlap)
                    for overlap, result in zip(row, boxes, strict=True)
                    if class_agnostic or result["category_id"] == item["category_id"]
                ),
                default=0.0,
            )
            for item, row in zip(items, overlaps, strict=True)
        ]
    return ious


def instance_metrics(ious: Mapping[Any, Sequence[float]]) -> Metrics:
    """Metrics of instance_ious: of all, and by how many instances an image has ('of 2', …: COCO-MIG's levels).

    instances: how many. success, mean_iou: see above. images: share of images all of whose instances succeed. Spreads
    are standard deviations over resampled sets of images.
    """
    return by_count(list(ious.values()), len, LEVELS, _summary)


def _summary(rows: Sequence[Sequence[float]]) -> Metrics:
    def share(sets: Sequence[Sequence[float]]) -> float:
        return sum(iou >= PLACE_IOU for row in sets for iou in row) / sum(map(len, sets))

    def mean_iou(sets: Sequence[Sequence[float]]) -> float:
        return sum(iou for row in sets for iou in row if iou >= PLACE_IOU) / sum(map(len, sets))

    def images(sets: Sequence[Sequence[float]]) -> float:
        return sum(all(iou >= PLACE_IOU for iou in row) for row in sets) / len(sets)

    spread = {"success": share, "mean_iou": mean_iou, "images": images}
    return {"instances": sum(map(len, rows))} | {name: resampled(metric, rows) for name, metric in spread.items()}


def _corners(item: Mapping[str, Any]) -> tuple[float, float, float, float]:
    x, y, w, h = item["bbox"]
    return (x, y, x + w, y + h)
