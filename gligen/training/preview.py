"""Sheets of held-out requests painted while training, with what was asked for drawn on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gligen.data.people import make_people_scene
from gligen.data.requests import scene_request
from gligen.data.scenes import make_scene
from gligen.images import draw_request, grid
from gligen.pipeline import Pipeline
from gligen.request import Request
from gligen.training.data import PREVIEW_SERIES
from gligen.training.trainable import Networks

GUIDANCE, STEPS, SAMPLER = 5.0, 20, "dpmpp"  # guidance as in the original's previews


def preview_requests(networks: Networks, count: int, seed: int, folder: Path) -> list[Request]:
    """The same held-out requests at every preview; pictures they ask with are written into `folder`."""
    grounding = networks.config.unet.grounding
    assert grounding is not None
    make = make_people_scene if grounding.spec.kind == "keypoint" else make_scene
    size = networks.config.image_size
    scenes = [make(PREVIEW_SERIES + seed, i, size=size) for i in range(count)]
    requests = [scene_request(scene, grounding.mode, folder) for scene in scenes]
    return [dataclasses.replace(r, guidance=GUIDANCE, steps=STEPS, sampler=SAMPLER) for r in requests]


def paint_preview(networks: Networks, requests: list[Request], path: Path, batch_size: int) -> None:
    """Writes one sheet. Nothing is dropped in it, and no random state is touched."""
    pipe = Pipeline(networks.config, networks.unet, networks.vae, networks.text_encoder, networks.image_encoder)
    samples = sorted(pipe.generate(requests, batch_size=batch_size), key=lambda sample: sample.index)
    sheet = grid([draw_request(sample.image.resize((256, 256)), sample.request) for sample in samples])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
