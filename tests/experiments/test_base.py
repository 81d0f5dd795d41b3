"""Changes to the miniature's base: how each of them begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.base import KINDS, build_unet, main
from gligen.config import UNetConfig
from gligen.loading import EMBEDDED
from gligen.miniature import unet as unet_stage
from gligen.miniature.stage import load_trained, stage_checkpoint
from gligen.modules.unet import UNetModel
from gligen.weights import read_weights
from tests.conftest import SMALL, error

CONFIG = UNetConfig(**SMALL)


def parts(kind: str) -> tuple[UNetModel, UNetModel, tuple[Tensor, ...]]:
    """A base of random weights, the same with the kind's change, and inputs of both."""
    torch.manual_seed(0)
    base = UNetModel(CONFIG).double().eval().requires_grad_(False)
    changed = build_unet(kind, CONFIG).double().eval().requires_grad_(False)
    weights = {k: v for k, v in base.state_dict().items() if kind == "deeper" or ".attn2." not in k}
    changed.load_state_dict(changed.state_dict() | weights)
    context = torch.randn(2, 77, CONFIG.context_dim).double()
    return base, changed, (torch.randn(2, 4, 16, 16).double(), torch.tensor([5, 900]), context)


def test_a_second_block_begins_as_an_identity_and_reads_the_caption_once_taught():
    base, deeper, inputs = parts("deeper")
    assert error(deeper(*inputs), base(*inputs)) < 1e-12
    second = deeper.transformers[0].block.second
    torch.nn.init.normal_(second.attn2.to_out[0].weight)
    assert error(deeper(*inputs), base(*inputs)) > 1e-3
    first = [".".join(name.split(".")[:4]) for name in deeper.state_dict() if ".second." in name]
    assert sorted(set(first)) == [  # both ways at the largest size with attention, and nowhere else
        "input_blocks.1.1.transformer_blocks",
        "output_blocks.2.1.transformer_blocks",
        "output_blocks.3.1.transformer_blocks",
    ]


@pytest.mark.parametrize(
    ("kind", "heads", "width"), [("1-head", 1, 1), ("2-heads", 2, 1), ("8-heads", 8, 1), ("wide", 2, 2)]
)
def test_new_cross_attention_says_nothing_at_first(kind: str, heads: int, width: int):
    _, renewed, (x, timesteps, context) = parts(kind)
    assert torch.equal(renewed(x, timesteps, context), renewed(x, timesteps, -context))
    for transformer in renewed.transformers:
        attention, channels = transformer.block.attn2, transformer.proj_in.out_channels
        assert (attention.num_heads, attention.to_k.out_features) == (heads, width * channels)
        torch.nn.init.normal_(attention.to_out[0].weight)
    assert error(renewed(x, timesteps, context), renewed(x, timesteps, -context)) > 1e-3


@pytest.mark.parametrize("kind", ["same", "8-heads"])
def test_training_begins_with_the_base_changed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(unet_stage, "UNetModel", UNetModel)
    begun = []
    monkeypatch.setattr("experiments.base.miniature.main", begun.append)
    main([kind, "train", "--out", str(tmp_path / "run"), "--steps", "7"])

    assert begun == [["unet", "--out", str(tmp_path / "run"), "--steps", "7"]]
    taught = read_weights(EMBEDDED / "scenes-base.safetensors").parts["unet"]
    state = stage_checkpoint(tmp_path / "run", "unet")
    weights = {name.removeprefix("unet."): tensor.read() for name, tensor in state.published().items()}
    assert weights.keys() == taught.keys()
    for name, tensor in weights.items():
        is_new = kind == "8-heads" and ".attn2." in name
        assert torch.equal(tensor, taught[name].read(dtype=torch.float32)) != is_new, name
    assert state.facts["vae"] == load_trained(tmp_path / "run", "vae").fingerprint

    main([kind, "train", "--out", str(tmp_path / "run"), "--steps", "9"])  # goes on
    assert len(begun) == 2
    others = next(other for other in KINDS if other != kind)
    with pytest.raises(ValueError, match=f"begun with kind {kind}"):
        main([others, "train", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="holds no run of kind"):
        main([others, "measure", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="no flag of measure"):
        main([kind, "measure", "--out", str(tmp_path / "run"), "--steps", "9"])
