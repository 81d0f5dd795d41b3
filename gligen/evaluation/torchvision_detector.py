"""Torchvision's detectors, with weights of a file: images → COCO results, as any other tool would write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gligen.evaluation.features import load_strictly, read_state_dict

UNNAMED = "N/A"  # COCO's ids that no class has


def known_detectors() -> list[str]:
    """Names that torchvision has."""
    from torchvision.models import detection, list_models

    return list_models(detection)


def class_names(name: str, path: str | Path | None = None) -> list[str]:
    """The names of a detector's labels, label 0, the background, first.

    path: a text file with a name a line, from label 1 on; None: COCO's, which published weights have.
    Raises ValueError, one line, for an unknown detector or an empty file.
    """
    from torchvision.models import get_model_weights

    if name not in known_detectors():
        raise ValueError(f"--detector '{name}': torchvision has {', '.join(known_detectors())}")
    if path is None:
        return list(next(iter(get_model_weights(name))).meta["categories"])
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise FileNotFoundError(f"--detector-classes '{path}': there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--detector-classes '{path}' cannot be read: {error}") from None
    if not any(lines):
        raise ValueError(f"--detector-classes '{path}' is empty: give a class name a line, from label 1 on")
    return ["__background__", *(line for line in lines if line)]


def build_detector(name: str, weights: str | Path, names: Sequence[str], device: torch.device) -> nn.Module:
    """The detector with the file's weights, ready to look. Raises ValueError, one line, where they do not fit."""
    from torchvision.models import get_model

    state = read_state_dict(weights, "detector weights")
    network = get_model(name, weights=None, weights_backbone=None, num_classes=len(names))
    load_strictly(network, state, f"detector weights '{weights}' as {name} with {len(names)} labels")
    return network.to(device).eval()


@torch.inference_mode()
def detect_images(
    network: nn.Module,
    names: Sequence[str],
    images: Iterable[tuple[int, NDArray[np.uint8]]],
    device: torch.device,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """COCO results of (number, (H, W, 3)) images: image_id, category_name, bbox xywh, score, keypoints if any."""
    results: list[dict[str, Any]] = []
    left = iter(images)
    while batch := list(islice(left, batch_size)):
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device) / 255 for _, image in batch]
        for (number, _), seen in zip(batch, network(tensors), strict=True):
            points = seen.get("keypoints")
            for i, (x0, y0, x1, y1) in enumerate(seen["boxes"].tolist()):
                name = names[int(seen["labels"][i])]
                if name != UNNAMED:
                    result = {"image_id": number, "category_name": name, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                    result["score"] = float(seen["scores"][i])
                    if points is not None:
                        result["keypoints"] = points[i].flatten().tolist()
                    results.append(result)
    return results
