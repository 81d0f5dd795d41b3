"""Layers in the form for the compiler: the plain layers' numbers under the plain layers' names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gligen.compiled_layers import ChannelsLastGroupNorm, TransposedUpsample, write_for_compiler
from gligen.modules.resample import Upsample
from gligen.runtime import compile_blocks
from tests.conftest import case, error, grounding_of


@pytest.mark.parametrize("offset", [0.0, 50.0])  # far from 0, sums of squares cancel
@pytest.mark.parametrize(("batch", "channels", "groups", "size"), [(2, 320, 32, 16), (1, 64, 8, 9), (3, 32, 32, 8)])
def test_group_norm_by_channels_equals_the_formula(batch, channels, groups, size, offset):
    torch.manual_seed(0)
    norm = ChannelsLastGroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(batch, channels, size, size + 1) + offset).to(memory_format=torch.channels_last)
    grouped = x.double().reshape(batch, groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    expected = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
    expected = expected * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    assert error(norm(x), expected) < (1e-6 if offset == 0 else 1e-5)


def test_one_transposed_convolution_is_nearest_neighbour_and_a_convolution():
    torch.manual_seed(0)
    plain = Upsample(6)
    fast = copy.deepcopy(plain)
    write_for_compiler(nn.Sequential(fast))
    assert isinstance(fast, TransposedUpsample)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 6, 5, 7)
    doubled = x.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(doubled, plain.conv.weight.double(), plain.conv.bias.double(), padding=1)
    assert error(fast(x), expected) < 1e-6


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_unet_written_for_the_compiler_equals_the_original(small_unet, is_compiled):
    arrays, unet = case("cases/unet_text"), copy.deepcopy(small_unet())
    names = list(unet.state_dict())
    write_for_compiler(unet)
    assert list(unet.state_dict()) == names
    if is_compiled:
        compile_blocks(unet, backend="eager")  # traced whole, or it raises
    with torch.inference_mode():
        cond = unet.condition(arrays["context"], grounding_of(arrays))
        eps = unet.denoise(arrays["x"], arrays["timesteps"], cond, torch.ones(()))
    assert error(eps, arrays["eps"]) < 1e-5


def test_the_table_of_timesteps_is_the_embedding(small_unet):
    unet = small_unet()
    timesteps = torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        half = unet.config.model_channels // 2
        angles = timesteps[:, None].double() * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        expected = unet.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).float())
        assert error(unet.embed_time(timesteps, torch.float32), expected) < 1e-4  # float32's angles, up to 999
