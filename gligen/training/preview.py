"""Images of held-out requests while training: to look at, and how many asked objects are where they should be.

Nothing is dropped here, and no random state is touched.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gligen.data.drawn import SceneSource
from gligen.data.example import Source
from gligen.data.requests import asked_objects, example_request
from gligen.data.scenes import SceneObject
from gligen.evaluation.detector import detect
from gligen.evaluation.scenes import score_image
from gligen.grounding import draw_request
from gligen.images import grid
from gligen.modes import get_mode
from gligen.pipeline import Pipeline
from gligen.request import Request
from gligen.training.trainable import Networks

GUIDANCE, STEPS, SAMPLER = 5.0, 20, "dpmpp"  # guidance as in the original's previews
SHEET = 16  # images that are drawn on the sheet, at most


@dataclass(frozen=True)
class Preview:
    """A request and the drawn world's objects that it asks for; none where it asks for people, or of photographs."""

    request: Request
    asked: tuple[SceneObject, ...]


def make_previews(source: Source, count: int, mode: str) -> list[Preview]:
    """The same requests every time, for what the first examples of a source show."""
    previews = []
    for i in range(count if source.size is None else min(count, source.size)):
        request = example_request(source.example(i), mode)
        request = dataclasses.replace(request, seed=i, guidance=GUIDANCE, steps=STEPS, sampler=SAMPLER)
        asked: tuple[SceneObject, ...] = ()
        if isinstance(source, SceneSource):
            asked = asked_objects(source.scene(i), get_mode(mode))
        previews.append(Preview(request, asked))
    return previews


def preview(networks: Networks, previews: list[Preview], path: Path, batch_size: int) -> dict[str, float]:
    """Writes one sheet, and returns the shares of asked objects found at IoU ≥ 0.5 in the right colour, and in the
    right colour and shape; nothing where no objects are asked for.

    Coarse, with so few images: `gligen/evaluation` measures properly.
    """
    pipe = Pipeline(networks.config, networks.unet, networks.vae, networks.text_encoder, networks.image_encoder)
    unsorted = pipe.generate([preview.request for preview in previews], batch_size=batch_size)
    samples = sorted(unsorted, key=lambda sample: sample.index)
    sheet = grid([draw_request(_large(sample.image), sample.request) for sample in samples[:SHEET]])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    results = [
        result
        for preview, sample in zip(previews, samples, strict=True)
        for result in score_image(detect(np.asarray(sample.image)), preview.asked)
    ]
    if not results:
        return {}
    return {
        "found": sum(result.is_found for result in results) / len(results),
        "found_with_shape": sum(result.is_found_with_shape for result in results) / len(results),
    }


def _large(image: Image.Image) -> Image.Image:
    """256 pixels along the longer side, so that labels can be read on small images."""
    scale = 256 / max(image.size)
    return image.resize((round(scale * image.width), round(scale * image.height)))
