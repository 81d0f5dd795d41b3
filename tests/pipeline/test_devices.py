"""No tensor is left on the CPU: sampling and training with networks on a CUDA device that is only pretended.

Fake tensors have a shape and a device but no numbers, so this runs anywhere; torch refuses operations that mix devices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gligen.pipeline
from gligen.config import ModelConfig
from gligen.diffusion.loss import x0_weights
from gligen.diffusion.schedule import Schedule
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.pipeline import Pipeline
from gligen.request import read_requests
from gligen.training.data import open_data
from gligen.training.diagnosis import Diagnosis
from gligen.training.objective import Objective
from gligen.training.presets import get_preset
from gligen.training.trainable import Networks
from tests.generated import generated_model

EXAMPLES = Path(__file__).parents[2] / "examples"
CUDA = torch.device("cuda", 0)


def networks(config: ModelConfig) -> Networks:
    """Networks without numbers on CUDA; inside of FakeTensorMode only."""
    assert config.image_encoder is not None
    with CUDA:
        return Networks(
            config,
            UNetModel(config.unet),
            AutoencoderKL(config.vae),
            CLIPTextEncoder(config.text_encoder),
            CLIPImageEncoder(config.image_encoder),
        )


# the other modes look at the numbers of their pictures
@pytest.mark.parametrize("mode", ["box-text", "box-text-image", "keypoint"])
def test_painting_stays_on_the_device(mode, monkeypatch):
    monkeypatch.setattr(gligen.pipeline, "to_pil", lambda image: image)  # which reads numbers
    config = generated_model(mode).config
    request = dataclasses.replace(
        read_requests(EXAMPLES / f"{mode}.json")[0], size=(64, 64), steps=3, schedule=(0.4, 0.3, 0.3), num_images=1
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = networks(config)
        pipe = Pipeline(config, made.unet, made.vae, made.text_encoder, made.image_encoder)
        (sample,) = pipe.generate([request])
    assert sample.image.device == CUDA
    assert sample.latents.device.type == "cpu"


@pytest.mark.parametrize("mode", ["box-text", "box-text-image", "keypoint", "sem", "inpaint-box-text"])
def test_the_loss_and_its_diagnosis_stay_on_the_device(mode):
    config = generated_model(mode).config
    assert config.unet.grounding is not None
    batch = open_data(get_preset(f"scenes-{mode}"), config).training.batch(range(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        schedule = Schedule(**dataclasses.asdict(config.schedule))
        objective = Objective(networks(config), schedule, weights=x0_weights(schedule, 0, 999, 10.0))
        loss, plain = objective.loss(objective.encode(batch))
        diagnosis = Diagnosis(objective, open_data(get_preset(f"scenes-{mode}"), config).held_out, samples=2, chunk=1)
        losses = objective.losses(diagnosis.inputs)
    assert {loss.device, plain.device, losses.device} == {CUDA}
