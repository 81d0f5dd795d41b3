"""Names both ways: the tables lose nothing, and agree with the libraries whose names they translate."""

from __future__ import annotations

import pytest
import torch

from gligen.weights import hold
from gligen.weights.names_clip import image_from_hf, image_to_hf, split_open_clip, text_from_hf, text_to_hf
from gligen.weights.names_diffusers import (
    diffusers_grid,
    ldm_grid,
    unet_name_to_diffusers,
    unet_name_to_ldm,
    unet_to_diffusers,
    vae_to_diffusers,
    vae_to_ldm,
)
from gligen.weights.names_ema import ema_name, unet_name
from tests.conftest import GOLDEN, filled, manifest

UNETS = sorted(path.stem for path in (GOLDEN / "manifests").glob("*gligen_*.json"))


def meta(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in manifest(name).items()}


@pytest.mark.parametrize("name", UNETS)
def test_unet_names_go_to_diffusers_and_back(name):
    names = list(manifest(name))
    grid = ldm_grid(names)
    theirs = [unet_name_to_diffusers(key, grid) for key in names]
    assert len(set(theirs)) == len(names)
    assert not any(key.startswith(("input_blocks.", "middle_block.", "output_blocks.", "out.")) for key in theirs)
    assert diffusers_grid(theirs) == grid
    assert [unet_name_to_ldm(key, grid) for key in theirs] == names


@pytest.mark.parametrize("name", UNETS)
def test_ema_names_get_their_dots_back(name):
    for key in manifest(name):
        assert unet_name(ema_name(key)) == key


def test_ema_name_is_the_name_without_dots():
    expected = "model_ema.diffusion_modelinput_blocks110in_layers0weight"
    assert ema_name("input_blocks.11.0.in_layers.0.weight") == expected
    assert unet_name("model_ema.decay") is None
    assert unet_name("model_ema.diffusion_modelnonsense") is None


@pytest.mark.parametrize(("mode", "attention_type"), [("text", "gated"), ("text_image", "gated-text-image")])
def test_unet_names_and_shapes_are_those_of_diffusers(mode, attention_type):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_type=attention_type)
    theirs = {name: tuple(t.shape) for name, t in unet.state_dict().items()}
    ours = {name: t.shape for name, t in unet_to_diffusers(hold(meta(f"gligen_{mode}"))).items()}
    assert ours == theirs


def test_unet_with_other_levels_has_the_names_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            layers_per_block=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
        )
    theirs = list(unet.state_dict())
    grid = diffusers_grid(theirs)
    assert (grid.levels, grid.num_res_blocks, grid.attention) == (3, 3, (False, True, False))
    ours = [unet_name_to_ldm(key, grid) for key in theirs]
    assert "output_blocks.3.1.conv.weight" in ours  # no transformer before this upsampler,
    assert "output_blocks.7.2.conv.weight" in ours  # one before this
    assert ldm_grid(ours) == grid
    assert [unet_name_to_diffusers(key, grid) for key in ours] == theirs


@pytest.mark.parametrize("name", ["autoencoder", "small_autoencoder"])
def test_vae_goes_to_diffusers_and_back(name):
    ours = hold(meta(name))
    back = vae_to_ldm(vae_to_diffusers(ours))
    assert {key: t.shape for key, t in back.items()} == manifest(name)


def test_vae_names_and_shapes_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    theirs = {name: tuple(t.shape) for name, t in vae.state_dict().items()}
    assert {name: t.shape for name, t in vae_to_diffusers(hold(meta("autoencoder"))).items()} == theirs


def test_vae_attention_of_old_diffusers_is_the_same():
    new = vae_to_diffusers(hold(filled("small_autoencoder")))
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in new.items():
        for now, then in words.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        old[name] = tensor
    assert set(old) != set(new)
    back = vae_to_ldm(old)
    for name, tensor in filled("small_autoencoder").items():
        assert torch.equal(back[name].read(), tensor), name


def test_clip_text_stacks_queries_keys_values_in_this_order():
    state = filled("small_text_encoder")
    bare = {name.removeprefix("transformer.text_model."): t for name, t in state.items()}
    ours = text_from_hf(hold(bare))
    hf = "encoder.layers.1.self_attn"
    stacked = ours["transformer.resblocks.1.attn.in_proj_weight"].read()
    for i, letter in enumerate("qkv"):
        assert torch.equal(stacked[64 * i : 64 * (i + 1)], bare[f"{hf}.{letter}_proj.weight"])
    assert not any("position_ids" in name for name in ours)
    back = text_to_hf(ours)
    assert set(back) == {name for name in bare if not name.endswith("position_ids")}
    for name, tensor in back.items():
        assert torch.equal(tensor.read(), bare[name]), name


def test_clip_image_projections_are_transposed():
    state = filled("small_clip_image")
    ours = image_from_hf(hold(state))
    assert torch.equal(ours["visual.proj"].read(), state["visual_projection.weight"].t())
    assert torch.equal(ours["text_projection"].read(), state["text_projection.weight"].t())
    back = image_to_hf(ours)
    assert set(back) == {name for name in state if not name.endswith("position_ids")}
    for name, tensor in back.items():
        assert torch.equal(tensor.read(), state[name]), name


def test_clip_names_are_those_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        clip = open_clip.model.CLIP(
            embed_dim=48,
            vision_cfg={"image_size": 56, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
            quick_gelu=True,
        )
    theirs = {name: tuple(t.shape) for name, t in clip.state_dict().items()}
    bare = {k.removeprefix("transformer.text_model."): t for k, t in meta("small_text_encoder").items()}
    ours = {name: t.shape for name, t in text_from_hf(hold(bare)).items()}
    image = {name: t.shape for name, t in image_from_hf(hold(meta("small_clip_image"))).items()}
    del image["text_projection"]  # the golden one is square
    assert ours | image == {name: s for name, s in theirs.items() if name not in ("logit_scale", "text_projection")}
    text, vision = split_open_clip(hold({**clip.state_dict()}))
    assert set(text) == set(ours)
    assert set(vision) == {*image, "text_projection"}
