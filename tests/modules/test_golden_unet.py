"""UNet, fusers and grounding tokenizers against the original's numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from gligen.config import GroundingConfig, UNetConfig
from gligen.modes import MODES
from gligen.modules.unet import UNetModel
from tests.conftest import case, error, filled, grounding_of, manifest

CASES = [
    ("unet_text", "box-text", "gatedSA", "small_gligen_text"),
    ("unet_text_null", "box-text", "gatedSA", "small_gligen_text"),
    ("unet_text_scale0.4", "box-text", "gatedSA", "small_gligen_text"),
    ("unet_text_scale0", "box-text", "gatedSA", "small_gligen_text"),
    ("unet_text_gatedCA", "box-text", "gatedCA", "small_gligen_text_gatedCA"),
    ("unet_text_image", "box-text-image", "gatedSA", "small_gligen_text_image"),
    ("unet_keypoint", "keypoint", "gatedSA", "small_gligen_keypoint"),
    ("unet_inpaint_text", "inpaint-box-text", "gatedSA", "small_gligen_inpaint_text"),
    ("unet_hed", "hed", "gatedSA", "small_gligen_hed"),
    ("unet_hed_gatedSA2", "hed", "gatedSA2", "small_gligen_hed_gatedSA2"),
    ("unet_sem", "sem", "gatedSA", "small_gligen_sem"),
]
MANIFEST_OF = {
    mode: "gligen_" + ("inpaint_" if row.is_inpainting else "") + row.original
    for mode, row in MODES.items()
    if row.original  # the others were never published
}


def run(unet: UNetModel, arrays: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Grounding tokens and ε of a golden case."""
    inputs = grounding_of(arrays, dtype)
    x, context = arrays["x"].to(dtype), arrays["context"].to(dtype)
    extra = arrays["inpainting_extra_input"].to(dtype) if "inpainting_extra_input" in arrays else None
    if "map" in inputs:
        extra = unet.map_channels(inputs["map"], *x.shape[2:])
    eps = unet(x, arrays["timesteps"], context, inputs, extra, arrays["config"].get("fuser_scale", 1.0))
    return unet.ground(inputs), eps


@pytest.mark.parametrize(("name", "mode", "fuser_type", "weights"), CASES, ids=[c[0] for c in CASES])
def test_unet_equals_the_original_in_float32_and_float64(small_unet, name, mode, fuser_type, weights):
    unet, arrays = small_unet(mode, fuser_type, weights), case(f"cases/{name}")
    objs, eps = run(unet, arrays, torch.float32)
    assert error(objs, arrays["objs"]) < 1e-5
    assert error(eps, arrays["eps"]) < 1e-5
    objs, eps = run(copy.deepcopy(unet).double(), arrays, torch.float64)
    assert error(objs, arrays["f64.objs"]) < 1e-9
    assert error(eps, arrays["f64.eps"]) < 1e-9


@pytest.mark.parametrize("mode", MANIFEST_OF)
def test_full_size_names_and_shapes_are_the_published_ones(mode):
    with torch.device("meta"):
        unet = UNetModel(UNetConfig(grounding=GroundingConfig(mode=mode)))
    assert {key: tuple(value.shape) for key, value in unet.state_dict().items()} == manifest(MANIFEST_OF[mode])


def test_base_model_has_stable_diffusions_names_and_shapes():
    with torch.device("meta"):
        unet = UNetModel(UNetConfig())
    prefix = "model.diffusion_model."
    published = {k.removeprefix(prefix): v for k, v in manifest("sd_v1").items() if k.startswith(prefix)}
    assert {key: tuple(value.shape) for key, value in unet.state_dict().items()} == published


@pytest.mark.slow
def test_full_size_unet_equals_the_original_block_by_block():
    arrays = case("full/unet_text_full")
    with torch.device("meta"):
        unet = UNetModel(UNetConfig(grounding=GroundingConfig())).eval().requires_grad_(False)
    unet.load_state_dict(filled("gligen_text"), assign=True)
    taps: list[torch.Tensor] = []
    for stage in (*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks):
        stage.register_forward_hook(lambda module, args, out: taps.append(out))
    unet.first_conv.register_forward_hook(lambda module, args, out: taps.append(out))
    objs, eps = run(unet, arrays, torch.float32)
    assert error(objs, arrays["objs"]) < 1e-5
    assert error(eps, arrays["eps"]) < 1e-5
    assert error(torch.stack([t.mean() for t in taps]), arrays["taps.mean"]) < 1e-4  # means cancel
    assert error(torch.stack([t.std() for t in taps]), arrays["taps.std"]) < 1e-5
    assert error(torch.stack([t.abs().max() for t in taps]), arrays["taps.absmax"]) < 1e-5
