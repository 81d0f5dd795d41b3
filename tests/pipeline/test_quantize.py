"""Linear layers in 8 bits: what is rounded, by how much, and what is refused."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gligen import cli
from gligen.commands import sample
from gligen.loading import build_pipeline
from gligen.modules.unet import UNetModel
from gligen.quantize import check_quantization, quantize
from gligen.runtime import optimize
from tests.conftest import error, small_unet_config
from tests.generated import generated_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture
def unet() -> UNetModel:
    torch.manual_seed(0)
    unet = UNetModel(small_unet_config()).eval().requires_grad_(False)
    for fuser in unet.fusers.values():
        fuser.alpha_attn.fill_(0.5)
        fuser.alpha_dense.fill_(0.5)
    return unet


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each row at the nearest of 255 even steps between its largest value and the opposite of it."""
    step = weight.abs().amax(dim=1, keepdim=True) / 127.5
    return (weight / step).round().clamp(-128, 127) * step


def paint(unet: UNetModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 16, 8), (7, 48)))
    grounding = unet.position_net.null_inputs(2)
    grounding["boxes"][:, 0] = torch.tensor([0.1, 0.2, 0.6, 0.7])
    grounding["masks"][:, 0] = 1
    return unet(x, torch.full((2,), 500), context, grounding)


def test_weights_are_rounded_row_by_row_in_transformers_alone(unet: UNetModel) -> None:
    plain = copy.deepcopy(unet)
    count = quantize(unet, "int8-weights")
    checked = 0
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        before = plain.get_submodule(name)
        x = torch.randn(5, layer.in_features)
        if ".transformer_blocks." in name:
            checked += 1
            assert error(layer(x), F.linear(x, rounded(before.weight), before.bias)) < 5e-3
            assert error(layer(x), before(x)) < 0.02
        else:
            assert torch.equal(layer(x), before(x)), name
    assert count == checked > 0
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            assert torch.equal(module.weight, plain.get_submodule(name).weight)


@pytest.mark.parametrize("kind", ["int8-weights", "int8", "fp8-weights"])
def test_a_quantised_unet_is_near_the_plain_one(unet: UNetModel, kind: str) -> None:
    plain = paint(unet)
    quantize(unet, kind)
    assert 0 < error(paint(unet), plain) < 0.05


def test_what_does_not_go_together_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = build_pipeline(generated_model(), device="cpu")
    with pytest.raises(ValueError, match="fused QKV"):
        optimize(pipe, compile=False, graphs=False, fuse_qkv=True, quantize="int8")
    with pytest.raises(ValueError, match="known ones are int8-weights, int8"):
        check_quantization("int4", torch.device("cpu"))
    with pytest.raises(ValueError, match="no products of 8-bit floats"):
        check_quantization("fp8", torch.device("cpu"))
    assert cli.run(sample.main, ["--quantize", "int8", "--low-memory", "--device", "cpu"]) == 2
    assert "--low-memory do not go together" in capsys.readouterr().err


def test_without_torchao_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao"):
        check_quantization("int8", torch.device("cpu"))
