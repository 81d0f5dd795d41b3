"""Latents of any size: the way up meets the skips of the way down, which rounds halves up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gligen.compiled_layers import TransposedUpsample
from gligen.config import GroundingConfig, UNetConfig
from gligen.loading import build_pipeline
from gligen.modules.resample import Upsample
from gligen.modules.transformer import SpatialTransformer
from gligen.modules.unet import ResBlock, UNetModel
from gligen.request import Entity, Request
from tests.conftest import SMALL
from tests.generated import generated_model


def written_out(unet: UNetModel, x, timesteps, cond):
    """The UNet's way up as it is usual elsewhere: nearest neighbour to the size of the skip that comes next."""
    emb = unet.embed_time(timesteps, x.dtype)
    blocks = iter(cond.blocks)
    skips = []
    h = x
    for stage in unet.input_blocks:
        h = stage(h, emb, next(blocks) if stage.has_transformer else None)
        skips.append(h)
    h = unet.middle_block(h, emb, next(blocks))
    for stage in unet.output_blocks:
        h = torch.cat([h, skips.pop()], dim=1)
        for layer in stage:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, next(blocks), 1.0)
            else:
                h = layer.conv(F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
    return unet.out(h)


@pytest.mark.parametrize("size", [(3, 1), (1, 6), (7, 5), (9, 8), (13, 22), (16, 8)])
def test_the_unet_takes_every_size(size):
    grounding = GroundingConfig(token_dim=48, feature_dim=48)
    config = UNetConfig(**{**SMALL, "channel_mult": (1, 2, 2, 2)}, grounding=grounding)
    torch.manual_seed(0)
    unet = UNetModel(config).eval().requires_grad_(False)
    x, timesteps = torch.randn(1, 4, *size), torch.tensor([300])
    cond = unet.condition(torch.randn(1, 7, 48))
    found = unet.denoise(x, timesteps, cond)
    assert found.shape == x.shape
    assert torch.allclose(found, written_out(unet, x, timesteps, cond), atol=1e-5)


@pytest.mark.parametrize("size", [(7, 6), (8, 5), (7, 5), (8, 6)])
def test_the_compilers_upsampling_is_the_plain_one_at_every_size(size):
    torch.manual_seed(0)
    plain, x = Upsample(3), torch.randn(2, 3, 4, 3)
    faster = Upsample(3)
    faster.load_state_dict(plain.state_dict())
    faster.__class__ = TransposedUpsample
    faster.sum_weights()
    given = None if size == (8, 6) else size
    expected = plain.conv(F.interpolate(x, size=size, mode="nearest"))
    assert torch.allclose(plain(x, given), expected, atol=1e-6)
    assert torch.allclose(faster(x, given), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["box-text", "sem", "inpaint-box-text"])
def test_pictures_of_whole_latent_cells_are_painted(mode, tmp_path):
    pipe = build_pipeline(generated_model(mode), device="cpu", dtype="float32")
    assert pipe.config.size_multiple == 4
    Image.new("L", (68, 60), 3).save(tmp_path / "map.png")
    fields = {
        "box-text": {"entities": [Entity(phrase="a ball", box=(0.1, 0.2, 0.5, 0.7))]},
        "sem": {"sem": tmp_path / "map.png"},
        "inpaint-box-text": {
            "entities": [Entity(phrase="a ball", box=(0.1, 0.2, 0.5, 0.7))],
            "inpaint": {"image": tmp_path / "map.png"},
        },
    }[mode]
    (sample,) = pipe.generate([Request(prompt="a ball", size=(68, 60), steps=2, schedule=(0.5, 0, 0.5), **fields)])
    assert sample.image.size == (68, 60)
    assert sample.latents.shape == (4, 15, 17)
