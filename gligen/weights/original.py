"""The original's own configs: module paths and parameters, as its trainer stored them in `config_dict`.

They are the only word on what tensors cannot show: heads, gatedSA2, canny or depth, the noise schedule.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from gligen.config import FUSER_TYPES, ModelConfig
from gligen.grounding import kind_of
from gligen.modes import MODES


def apply_original_config(
    stated: Mapping[str, Any], config: ModelConfig, modes: tuple[str, ...]
) -> tuple[str | None, ModelConfig]:
    """The mode that an original `config_dict` (as plain data) states, if any, and `config`, inferred from shapes, with
    what it adds to it.

    modes: those the tensors allow. A config that contradicts the tensors is not believed.
    """
    model, diffusion = _params(stated, "model"), _params(stated, "diffusion")
    mode = original_mode(stated)
    if modes and mode not in modes:
        mode = None
    grounding = config.unet.grounding
    if grounding is not None:
        fuser_type = model.get("fuser_type")
        if fuser_type not in FUSER_TYPES or (fuser_type == "gatedCA") != (grounding.fuser_type == "gatedCA"):
            fuser_type = None
        tokenizer = _params(model, "grounding_tokenizer")
        data = _mapping(stated.get("train_dataset_names"))
        boxes = [_mapping(params).get("max_boxes_per_data") for params in data.values()]
        grounding = _replace(
            grounding,
            mode=mode,
            fuser_type=fuser_type,
            num_freqs=tokenizer.get("fourier_freqs"),
            max_entities=next((n for n in boxes if isinstance(n, int) and n > 0), None),
        )
    size = model.get("image_size")  # of the latent
    return mode, _replace(
        config,
        unet=_replace(config.unet, num_heads=model.get("num_heads"), grounding=grounding),
        vae=_replace(config.vae, scale_factor=_params(stated, "autoencoder").get("scale_factor")),
        schedule=_replace(
            config.schedule,
            timesteps=diffusion.get("timesteps"),
            beta_start=diffusion.get("linear_start"),
            beta_end=diffusion.get("linear_end"),
        ),
        image_size=size * config.vae.downsample_factor if isinstance(size, int) and size > 0 else None,
    )


def original_mode(stated: Mapping[str, Any]) -> str | None:
    """The mode an original-style config names by its module paths; None if it names none we know."""
    model = _params(stated, "model")
    target = str(_mapping(model.get("grounding_tokenizer")).get("target", ""))
    match = re.search(r"(\w+)_grounding_net\b", target)
    is_inpainting = bool(model.get("inpaint_mode") or stated.get("inpaint_mode"))
    for mode in MODES.values():
        if match and mode.original == match[1] and mode.is_inpainting == is_inpainting:
            return mode.name
    return None


def original_config(config: ModelConfig) -> dict[str, Any]:
    """`config` in the original's style, as its trainer would have stored it (plain data)."""
    unet, vae, schedule, grounding = config.unet, config.vae, config.schedule, config.unet.grounding
    latent_size = config.image_size // vae.downsample_factor
    params: dict[str, Any] = {
        "image_size": latent_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "attention_resolutions": list(unet.attention_downsamples),
        "num_res_blocks": unet.num_res_blocks,
        "channel_mult": list(unet.channel_mult),
        "num_heads": unet.num_heads,
        "transformer_depth": 1,
        "context_dim": unet.context_dim,
        "use_checkpoint": False,
    }
    ddconfig = {
        "double_z": True,
        "z_channels": vae.latent_channels,
        "resolution": config.image_size,
        "in_channels": vae.in_channels,
        "out_ch": vae.in_channels,
        "ch": vae.base_channels,
        "ch_mult": list(vae.channel_mult),
        "num_res_blocks": vae.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    text_class = "FrozenCLIPEmbedder" if config.text_encoder.kind == "clip" else "BERTEmbedder"
    out: dict[str, Any] = {
        "diffusion": _built(
            "ldm.models.diffusion.ldm.LatentDiffusion",
            linear_start=schedule.beta_start,
            linear_end=schedule.beta_end,
            timesteps=schedule.timesteps,
        ),
        "model": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params},
        "autoencoder": _built(
            "ldm.models.autoencoder.AutoencoderKL",
            scale_factor=vae.scale_factor,
            embed_dim=vae.latent_channels,
            ddconfig=ddconfig,
        ),
        "text_encoder": {"target": f"ldm.modules.encoders.modules.{text_class}"},
    }
    if grounding is None:
        return out
    mode = grounding.spec
    if mode.original is None:
        raise ValueError(f"mode {mode.name} was never published, so GLIGEN's own layout has no words for it")
    params["fuser_type"] = grounding.fuser_type
    params["inpaint_mode"] = out["inpaint_mode"] = mode.is_inpainting
    network, reader = f"ldm.modules.diffusionmodules.{mode.original}", f"grounding_input.{mode.original}"
    if mode.is_map:
        downsampler: dict[str, Any] = {"out_dim": mode.extra_channels}
        if mode.hint_widths:
            downsampler["resize_input"] = latent_size * 4
        if mode.has_labels:
            downsampler["in_dim"] = mode.map_channels
        params["grounding_downsampler"] = _built(f"{network}_grounding_downsampler.GroundingDownsampler", **downsampler)
        out["grounding_downsampler_input"] = {"target": f"{reader}_grounding_downsampler_input.GroundingDSInput"}
    tokenizer = kind_of(mode).original_params(grounding)
    params["grounding_tokenizer"] = _built(
        f"{network}_grounding_net.PositionNet", out_dim=grounding.token_dim, **tokenizer
    )
    # 'tokinzer' is the original's own spelling
    out["grounding_tokenizer_input"] = {"target": f"{reader}_grounding_tokinzer_input.GroundingNetInput"}
    return out


def _built(target: str, **params: Any) -> dict[str, Any]:
    """An object of a class of the original, as its configs say it."""
    return {"target": target, "params": params}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _params(stated: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _mapping(_mapping(stated.get(key)).get("params"))


def _replace(config: Any, **values: Any) -> Any:
    """`dataclasses.replace`, skipping values that are not stated."""
    return dataclasses.replace(config, **{name: v for name, v in values.items() if v is not None})
