"""Published metrics by their formulas, in NumPy: box overlap, COCO's average precision, the Fréchet distance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gligen.request import Box

Float = NDArray[np.float64]
Found = tuple[Hashable, Box, float]  # class, xyxy, score
Truth = tuple[Hashable, Box]


def box_iou(a: ArrayLike, b: ArrayLike) -> Float:
    """Intersection over union of each box of a (N, 4) with each of b (M, 4), xyxy. Returns (N, M)."""
    a, b = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    return overlap / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap)


def average_precision(
    found: Sequence[Sequence[Found]], truths: Sequence[Sequence[Truth]], threshold: float = 0.5
) -> float:
    """COCO's AP at one IoU threshold, over a list of images: the mean over all classes that some truth has.

    In each image and class the surest detection takes the truth it overlaps most, if by the threshold, and so on;
    precision is made monotone and read at 101 recalls. NaN without any truth. Equals pycocotools' AP50 for
    threshold 0.5 with areas 'all' and up to 100 detections an image.
    """
    classes = list(dict.fromkeys(name for image in truths for name, _ in image))
    if not classes:
        return float("nan")
    return float(np.mean([_class_precision(name, found, truths, threshold) for name in classes]))


def _class_precision(
    name: Hashable, found: Sequence[Sequence[Found]], truths: Sequence[Sequence[Truth]], threshold: float
) -> float:
    scores: list[float] = []
    hits: list[bool] = []
    total = 0
    for detections, objects in zip(found, truths, strict=True):
        boxes = [box for kind, box in objects if kind == name]
        total += len(boxes)
        ours = sorted((item for item in detections if item[0] == name), key=lambda item: -item[2])
        overlaps = box_iou([box for _, box, _ in ours], boxes)
        for (_, _, score), row in zip(ours, overlaps, strict=True):
            best = int(row.argmax()) if boxes else -1
            is_hit = best >= 0 and row[best] >= threshold
            if is_hit:
                overlaps[:, best] = -1  # taken
            scores.append(score)
            hits.append(bool(is_hit))
    order = np.argsort(-np.array(scores), kind="stable")
    right = np.cumsum(np.array(hits, float)[order])
    precision = right / np.arange(1, len(order) + 1)
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return float(precision[np.searchsorted(right / total, np.linspace(0, 1, 101), side="left")].mean())


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features (N, D): FID where they are Inception's.

    In float64. Raises ValueError for other shapes, fewer than two rows, or values that are not finite.
    Source: Heusel et al. (2017); `frechet_of_statistics` has the formula.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features are {a.shape} and {b.shape}: give two or more rows each, of the same width")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold NaN or infinity")
    return frechet_of_statistics(*statistics(a), *statistics(b))


def statistics(features: Float) -> tuple[Float, Float]:
    """Mean (D,) and covariance (D, D) of features (N, D), N ≥ 2."""
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_of_statistics(mean_a: Float, cov_a: Float, mean_b: Float, cov_b: Float) -> float:
    """Squared Fréchet distance of two Gaussians: |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½), in float64.

    The last trace is that of (Ca^½ Cb Ca^½)^½, which is symmetric, so that no complex root is needed.
    Source: Dowson and Landau (1982).
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    shift = mean_a - mean_b
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed)


def mean_iou(predicted: Sequence[NDArray[np.integer]], truths: Sequence[NDArray[np.integer]]) -> float:
    """Mean over the classes that the truths have of intersection / union, pixels counted over all label maps."""
    p, t = (np.concatenate([np.ravel(labels) for labels in maps]) for maps in (predicted, truths))
    bins = int(max(p.max(), t.max())) + 1
    both = np.bincount(t[p == t], minlength=bins)
    union = np.bincount(p, minlength=bins) + np.bincount(t, minlength=bins) - both
    return float(np.mean([both[c] / union[c] for c in np.unique(t)]))
