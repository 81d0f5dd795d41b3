"""Images of held-out requests while training: to look at, and how many asked objects are where they should be.

Nothing is dropped here, and no random state is touched.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gligen.data.people import make_people_scene
from gligen.data.requests import scene_request
from gligen.data.scenes import SceneObject, make_scene
from gligen.data.streams import Series
from gligen.evaluation.scenes import detect, score_image
from gligen.images import draw_request, grid
from gligen.pipeline import Pipeline
from gligen.request import Request
from gligen.training.trainable import Networks

GUIDANCE, STEPS, SAMPLER = 5.0, 20, "dpmpp"  # guidance as in the original's previews
SHEET = 16  # pictures that are drawn on the sheet, at most


@dataclass(frozen=True)
class Preview:
    """A request and the objects that it asks for (none where it asks for people)."""

    request: Request
    asked: tuple[SceneObject, ...]


def make_previews(networks: Networks, count: int, seed: int, folder: Path) -> list[Preview]:
    """The same held-out requests every time; pictures they ask with are written into `folder`."""
    grounding = networks.config.unet.grounding
    assert grounding is not None  # build_networks adds it
    make = make_people_scene if grounding.spec.kind == "keypoint" else make_scene
    previews = []
    for i in range(count):
        scene = make(Series.PREVIEW + seed, i, size=networks.config.image_size)
        request = scene_request(scene, grounding.mode, folder)
        asked = scene.objects[-1:] if grounding.spec.is_inpainting else scene.objects  # as scene_request does
        request = dataclasses.replace(request, guidance=GUIDANCE, steps=STEPS, sampler=SAMPLER)
        previews.append(Preview(request, asked))
    return previews


def preview(networks: Networks, previews: list[Preview], path: Path, batch_size: int) -> dict[str, float]:
    """Writes one sheet, and returns the shares of asked objects found at IoU ≥ 0.5 in the right colour, and in the
    right colour and shape; nothing where no objects are asked for.

    Coarse, with so few pictures: `gligen/evaluation` measures properly.
    """
    pipe = Pipeline(networks.config, networks.unet, networks.vae, networks.text_encoder, networks.image_encoder)
    painted = pipe.generate([preview.request for preview in previews], batch_size=batch_size)
    samples = sorted(painted, key=lambda sample: sample.index)
    large = (256, 256)  # so that labels can be read on small pictures
    sheet = grid([draw_request(sample.image.resize(large), sample.request) for sample in samples[:SHEET]])
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
