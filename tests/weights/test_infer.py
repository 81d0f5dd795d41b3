"""Configs from shapes and from the original's own configs, against the numbers the manifests were made with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gligen.config import GroundingConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from gligen.modes import get_mode
from gligen.weights import hold, possible_modes, schedule_buffers
from gligen.weights.infer import infer_image_encoder, infer_text_encoder, infer_unet, infer_vae
from gligen.weights.names_clip import image_from_hf, text_from_hf
from gligen.weights.original import apply_original_config, original_config, original_mode
from gligen.weights.tensors import LazyTensor
from tests.conftest import GOLDEN, SMALL, SMALL_VAE, manifest

MODES = {
    "text": ("box-text",),
    "text_image": ("box-text-image",),
    "keypoint": ("keypoint",),
    "hed": ("hed",),
    "canny": ("canny", "depth"),
    "depth": ("canny", "depth"),
    "normal": ("normal",),
    "sem": ("sem",),
    "inpaint_text": ("inpaint-box-text",),
    "inpaint_text_image": ("inpaint-box-text-image",),
}
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("unet_*.npz"))


def meta(name: str) -> dict[str, LazyTensor]:
    return hold({key: torch.empty(shape, device="meta") for key, shape in manifest(name).items()})


@pytest.mark.parametrize(("name", "modes"), MODES.items())
def test_published_unets_are_recognised(name, modes):
    unet = meta(f"gligen_{name}")
    assert possible_modes(unet) == modes
    assert infer_unet(unet, modes[0]) == UNetConfig(grounding=GroundingConfig(mode=modes[0]))


def test_pruned_unets_leave_open_what_they_do_not_hold():
    def pruned(name: str) -> tuple[str, ...]:
        unet = meta(f"gligen_{name}")
        return possible_modes({k: t for k, t in unet.items() if k.startswith("position_net.") or ".fuser." in k})

    assert pruned("text") == pruned("inpaint_text") == ("box-text",)
    assert pruned("normal") == pruned("hed") == ("hed", "canny", "depth", "normal")
    assert pruned("sem") == ("sem",)


def test_base_models_have_no_mode():
    unet = {k.removeprefix("model.diffusion_model."): t for k, t in meta("sd_v1").items() if k.startswith("model.d")}
    assert possible_modes(unet) == ()
    assert infer_unet(unet) == UNetConfig()


def test_small_sizes_are_read_off():
    grounding = GroundingConfig(token_dim=48, feature_dim=48, fuser_type="gatedCA")
    assert infer_unet(meta("small_gligen_text_gatedCA"), "box-text") == UNetConfig(**SMALL, grounding=grounding)
    assert infer_vae(meta("small_autoencoder")) == SMALL_VAE
    assert infer_vae(meta("autoencoder")) == VAEConfig()


def test_text_and_image_encoders_are_read_off():
    def text(name: str) -> dict[str, LazyTensor]:
        return text_from_hf({k.removeprefix("transformer.text_model."): t for k, t in meta(name).items()})

    assert infer_text_encoder(text("text_encoder")) == TextEncoderConfig()
    assert infer_text_encoder(text("small_text_encoder")) == TextEncoderConfig(width=64, layers=3, heads=1)
    bert = {
        k.removeprefix("cond_stage_model.transformer."): t
        for k, t in meta("ldm_text2img_large").items()
        if k.startswith("cond_stage_model.")
    }
    assert infer_text_encoder(bert) == TextEncoderConfig(
        kind="bert", width=1280, layers=32, heads=8, head_dim=64, vocab_size=30522
    )
    assert infer_image_encoder(image_from_hf(meta("small_clip_image"))) == ImageEncoderConfig(
        image_size=56, patch_size=14, width=64, layers=3, heads=1, embed_dim=48, text_width=48
    )


def config_from_original(stated: dict) -> ModelConfig:
    """The whole config that an original one describes, read key by key and without tensors."""
    model = stated["model"]["params"]
    mode = original_mode(stated)
    tokenizer = model["grounding_tokenizer"]["params"]
    sizes = {
        "token_dim": tokenizer.get("out_dim"),
        "feature_dim": tokenizer.get({"keypoint": "out_dim", "map": ""}.get(get_mode(mode).kind, "in_dim")),
        "num_freqs": tokenizer.get("fourier_freqs"),
        "max_persons": tokenizer.get("max_persons_per_image"),
        "map_size": tokenizer.get("resize_input"),
        "fuser_type": model["fuser_type"],
    }
    unet = UNetConfig(
        in_channels=model["in_channels"],
        out_channels=model["out_channels"],
        model_channels=model["model_channels"],
        channel_mult=tuple(model["channel_mult"]),
        num_res_blocks=model["num_res_blocks"],
        attention_downsamples=tuple(sorted(model["attention_resolutions"])),
        context_dim=model["context_dim"],
        grounding=GroundingConfig(mode=mode, **{name: size for name, size in sizes.items() if size is not None}),
    )
    vae = VAEConfig()
    if "autoencoder" in stated:
        params = stated["autoencoder"]["params"]
        vae = VAEConfig(
            in_channels=params["ddconfig"]["in_channels"],
            base_channels=params["ddconfig"]["ch"],
            channel_mult=tuple(params["ddconfig"]["ch_mult"]),
            num_res_blocks=params["ddconfig"]["num_res_blocks"],
            latent_channels=params["embed_dim"],
        )
    return apply_original_config(stated, ModelConfig(unet=unet, vae=vae), (mode,))[1]


@pytest.mark.parametrize("case", CASES)
def test_original_configs_agree_with_the_tensors_they_came_with(case):
    stated = json.loads(str(np.load(GOLDEN / f"cases/{case}.npz")["config"]))
    unet = meta(stated["weights"].removeprefix("manifests/").removesuffix(".json"))
    modes = possible_modes(unet)
    shapes = ModelConfig(unet=infer_unet(unet, modes[0]))
    mode, config = apply_original_config(stated, shapes, modes)
    assert mode == modes[0]
    assert config.unet.grounding.fuser_type == stated["model"]["params"]["fuser_type"]
    assert config.unet.num_heads == 8
    alone = config_from_original(stated)
    assert alone.unet == config.unet
    assert alone.image_size == 16 * 8
    assert config_from_original(original_config(config)) == config


def test_config_tells_canny_from_depth():
    unet = meta("gligen_depth")
    stated = original_config(ModelConfig(unet=UNetConfig(grounding=GroundingConfig(mode="depth"))))
    shapes = ModelConfig(unet=infer_unet(unet, "canny"))
    assert apply_original_config(stated, shapes, possible_modes(unet))[1].unet.grounding.mode == "depth"


def test_schedule_buffers_equal_the_originals():
    golden = np.load(GOLDEN / "cases/schedule.npz")
    buffers = schedule_buffers(ModelConfig().schedule)
    assert {f"diffusion.{name}" for name in buffers} == {k for k in golden.files if k.startswith("diffusion.")}
    for name, values in buffers.items():
        expected = torch.from_numpy(golden[f"diffusion.{name}"])
        assert values.dtype == torch.float32
        # a few units in the last place of float32: only the order of float64 operations differs
        torch.testing.assert_close(values, expected, rtol=3e-7, atol=0)
