"""Image-to-image: begun from a noised picture, with every sampler, and together with grounding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from gligen.diffusion.noise import NoiseStream
from gligen.loading import build_pipeline
from gligen.modules.unet import UNetModel
from gligen.request import SAMPLERS, Entity, Request, parse_request, to_dict
from tests.generated import generated_model

BALL = Entity(phrase="a ball", box=(0.1, 0.2, 0.5, 0.7))


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(generated_model(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((96, 64)).save(path)
    return path


def paint(pipe, **fields) -> torch.Tensor:
    return next(iter(pipe.generate([Request(prompt="a ball", size=(64, 64), **fields)]))).latents


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_step_sees_the_picture_noised_to_its_own_timestep(pipe, picture, monkeypatch, sampler):
    seen = []
    real = UNetModel.denoise

    def spy(self, x, timesteps, cond, scale=1.0):
        seen.append((x[-1].clone(), int(timesteps[0])))
        return real(self, x, timesteps, cond, scale)

    monkeypatch.setattr(UNetModel, "denoise", spy)
    paint(pipe, sampler=sampler, steps=8, seed=5, init_image=picture, strength=0.5)
    assert len({t for _, t in seen}) == 4
    first, t = seen[0]
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(5))  # of the seed, as without a picture
    pixels = torch.tensor(np.asarray(Image.open(picture).crop((16, 0, 80, 64)))).permute(2, 0, 1) / 127.5 - 1
    x0 = pipe.vae.encode(pixels[None], NoiseStream([5], "autoencoder")(first[None]))[0]
    signal = pipe.schedule.alphas_cumprod[t]
    assert torch.allclose(first, signal**0.5 * x0 + (1 - signal) ** 0.5 * noise, atol=1e-4)


def test_less_strength_stays_nearer_and_all_of_it_makes_every_step(pipe, picture):
    whole = paint(pipe, steps=10, init_image=picture, strength=1.0)
    little = paint(pipe, steps=10, init_image=picture, strength=0.1)
    plain = paint(pipe, steps=10)
    assert (whole - plain).abs().max() > 1e-3  # at the highest timestep a trace of the picture is left
    assert (whole - plain).abs().mean() < (little - plain).abs().mean()


def test_grounding_is_scheduled_over_the_steps_that_are_made(pipe, picture, monkeypatch):
    gates = []
    real = UNetModel.denoise

    def spy(self, x, timesteps, cond, scale=1.0):
        gates.append(float(scale))
        return real(self, x, timesteps, cond, scale)

    monkeypatch.setattr(UNetModel, "denoise", spy)
    grounded = {"entities": (BALL,), "schedule": (0.5, 0.0, 0.5), "sampler": "ddim"}
    with_box = paint(pipe, steps=8, init_image=picture, strength=0.5, **grounded)
    assert gates == [1, 1, 0, 0]
    without = paint(pipe, steps=8, init_image=picture, strength=0.5, sampler="ddim")
    assert (with_box - without).abs().max() > 1e-3


def test_pictures_with_and_without_a_start_keep_apart(pipe, picture):
    requests = [
        Request(prompt="a ball", size=(64, 64), steps=4, init_image=picture, strength=s) for s in (0.5, 1.0)
    ] + [Request(prompt="a ball", size=(64, 64), steps=4)]  # fmt: skip
    together = sorted(pipe.generate(requests), key=lambda sample: sample.index)
    for sample, request in zip(together, requests, strict=True):
        alone = next(iter(pipe.generate([request])))
        assert torch.allclose(sample.latents, alone.latents, atol=1e-5)


def test_its_request_is_stored_and_wrong_ones_are_refused(picture):
    request = parse_request({"prompt": "a", "init_image": picture.name, "strength": 0.4}, folder=picture.parent)
    assert request.init_image == str(picture)
    assert parse_request(to_dict(request)) == request
    assert [name for name, _ in request.images] == ["init_image"]
    for fields, message in (
        ({"strength": 0.4}, "no init_image"),
        ({"init_image": picture, "strength": 0}, "above 0"),
        ({"init_image": picture, "strength": 1.5}, "from 0 to 1"),
        ({"init_image": picture, "inpaint": {"image": picture, "mask": picture}}, "inpaint and init_image"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_request({"prompt": "a", **fields})


def test_a_seed_of_minus_one_is_drawn_and_said(caplog, monkeypatch):
    caplog.set_level("INFO")
    request = parse_request({"prompt": "a", "seed": -1})
    assert 0 <= request.seed < 2**32
    assert caplog.messages == [f"seed -1: drew {request.seed}"]
    assert parse_request({"prompt": "a", "seed": -1}) != request
    assert dataclasses.replace(request, steps=3).seed == request.seed == parse_request(to_dict(request)).seed
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes"):
        parse_request({"prompt": "a", "seed": -1})
