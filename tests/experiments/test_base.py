"""Changes to the miniature's base: how each of them begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from experiments.base import KINDS, SCENES_SEED, build_unet, main
from gligen.config import UNetConfig
from gligen.data.scenes import make_scene
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


@pytest.mark.parametrize("kind", ["same", "8-heads", "deeper", "wide"])
def test_training_begins_with_the_base_changed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(unet_stage, "UNetModel", UNetModel)
    begun = []
    monkeypatch.setattr("experiments.base.miniature.main", begun.append)
    main([kind, "train", "--out", str(tmp_path / "run"), "--steps", "7"])

    assert begun == [["unet", "--out", str(tmp_path / "run"), "--steps", "7"]]
    taught = read_weights(EMBEDDED / "scenes-base.safetensors").parts["unet"]
    state = stage_checkpoint(tmp_path / "run", "unet")
    weights = {name.removeprefix("unet."): tensor.read() for name, tensor in state.published().items()}
    assert weights.keys() >= taught.keys()
    for name, tensor in weights.items():
        is_new = ".second." in name or (kind in ("8-heads", "wide") and ".attn2." in name)
        like = taught.get(name)
        is_taught = (
            like is not None and like.shape == tensor.shape and torch.equal(tensor, like.read(dtype=torch.float32))
        )
        assert is_taught != is_new, name
    assert state.facts["vae"] == load_trained(tmp_path / "run", "vae").fingerprint

    main([kind, "train", "--out", str(tmp_path / "run"), "--steps", "9"])  # goes on
    assert len(begun) == 2
    other = next(other for other in KINDS if other != kind)
    for flags, message in (
        ([other, "train"], f"begun with kind {kind}"),
        ([other, "measure"], f"begun with kind {kind}"),
        ([kind, "measure", "--steps", "9"], "--steps: no flag of measure"),
        ([kind, "train", "--scenes", "9"], "--scenes: no flag of train"),
        ([kind, "train", "--no-resume"], "would begin without the base"),
        ([kind, "measure", "--scenes", "0"], "give 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*flags, "--out", str(tmp_path / "run")])


def test_objects_are_counted_by_colour_and_of_these_by_shape(tmp_path, monkeypatch, capsys):
    """Drawn scenes in the place of generated ones: of another colour, of another shape in the colour, two as asked."""
    monkeypatch.setattr(unet_stage, "UNetModel", UNetModel)
    scenes = [scene for i in range(160) if len((scene := make_scene(SCENES_SEED, i, places=0.0)).objects) == 1]
    (first,), (second,) = scenes[0].objects, scenes[1].objects
    recoloured = next(scene for scene in scenes if scene.objects[0].color != first.color)
    reshaped = next(
        scene for scene in scenes if scene.objects[0].color == second.color and scene.objects[0].shape != second.shape
    )
    images = [recoloured.image, reshaped.image, scenes[2].image, scenes[3].image]

    def generate(self, requests, batch_size):
        assert [request.prompt for request in requests] == [scene.caption for scene in scenes[:4]]
        assert not any(request.entities for request in requests)
        return [SimpleNamespace(index=(i, 0), image=image) for i, image in enumerate(images)]

    monkeypatch.setattr("experiments.base.Pipeline.generate", generate)
    main(["same", "measure", "--out", str(tmp_path / "run"), "--scenes", "4"])
    assert "step 0: of 4 objects 3 in their colour, of these 2 in their shape: 0.667" in capsys.readouterr().out
