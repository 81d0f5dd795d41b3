"""The original's own configs: module paths and parameters, as its trainer stored them in `config_dict`.

They are the only word on what tensors cannot show: heads, gatedSA2, canny or depth, the noise schedule.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gligen.config import FUSER_TYPES, GroundingConfig, ModelConfig, UNetConfig, VAEConfig
from gligen.grounding import kind_of
from gligen.modes import MODES


class Stated(NamedTuple):
    """The fields of an original-style config that shapes do not show."""

    mode: str | None
    config: ModelConfig


def apply_original_config(stated: Mapping[str, Any], config: ModelConfig, modes: tuple[str, ...]) -> Stated:
    """`config`, inferred from shapes, with what an original `config_dict` (as plain data) adds to it.

    modes: those the tensors allow. A config that contradicts the tensors is not believed.
    """
    model = _params(stated, "model")
    mode = original_mode(stated)
    if modes and mode not in modes:
        mode = None
    unet = _replace(config.unet, {"num_heads": model.get("num_heads")})
    if unet.grounding is not None:
        tokenizer = _mapping(_mapping(model.get("grounding_tokenizer")).get("params"))
        fuser_type = model.get("fuser_type")
        wanted: dict[str, Any] = {"mode": mode}
        if fuser_type in FUSER_TYPES and (fuser_type == "gatedCA") == (unet.grounding.fuser_type == "gatedCA"):
            wanted["fuser_type"] = fuser_type
        wanted["num_freqs"] = tokenizer.get("fourier_freqs")
        data = _mapping(stated.get("train_dataset_names"))
        boxes = [_mapping(params).get("max_boxes_per_data") for params in data.values()]
        wanted["max_entities"] = next((n for n in boxes if isinstance(n, int) and n > 0), None)
        unet = dataclasses.replace(unet, grounding=_replace(unet.grounding, wanted))
    vae = _replace(config.vae, {"scale_factor": _params(stated, "autoencoder").get("scale_factor")})
    diffusion = _params(stated, "diffusion")
    schedule = _replace(
        config.schedule,
        {
            "timesteps": diffusion.get("timesteps"),
            "beta_start": diffusion.get("linear_start"),
            "beta_end": diffusion.get("linear_end"),
        },
    )
    fields: dict[str, Any] = {"unet": unet, "vae": vae, "schedule": schedule}
    if isinstance(size := model.get("image_size"), int) and size > 0:  # of the latent
        fields["image_size"] = size * vae.downsample_factor
    return Stated(mode, dataclasses.replace(config, **fields))


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
    unet, grounding = config.unet, config.unet.grounding
    params: dict[str, Any] = {
        "image_size": config.image_size // config.vae.downsample_factor,
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
    modules = "ldm.modules"
    text_class = "FrozenCLIPEmbedder" if config.text_encoder.kind == "clip" else "BERTEmbedder"
    out: dict[str, Any] = {
        "diffusion": {
            "target": "ldm.models.diffusion.ldm.LatentDiffusion",
            "params": {
                "linear_start": config.schedule.beta_start,
                "linear_end": config.schedule.beta_end,
                "timesteps": config.schedule.timesteps,
            },
        },
        "model": {"target": f"{modules}.diffusionmodules.openaimodel.UNetModel", "params": params},
        "autoencoder": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "scale_factor": config.vae.scale_factor,
                "embed_dim": config.vae.latent_channels,
                "ddconfig": {
                    "double_z": True,
                    "z_channels": config.vae.latent_channels,
                    "resolution": config.image_size,
                    "in_channels": config.vae.in_channels,
                    "out_ch": config.vae.in_channels,
                    "ch": config.vae.base_channels,
                    "ch_mult": list(config.vae.channel_mult),
                    "num_res_blocks": config.vae.num_res_blocks,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
            },
        },
        "text_encoder": {"target": f"{modules}.encoders.modules.{text_class}"},
    }
    if grounding is not None:
        mode = grounding.spec
        params["fuser_type"] = grounding.fuser_type
        params["inpaint_mode"] = out["inpaint_mode"] = mode.is_inpainting
        tokenizer: dict[str, Any] = {"out_dim": grounding.token_dim} | kind_of(mode).original_params(grounding)
        if mode.original is None:
            raise ValueError(f"mode {mode.name} was never published, so GLIGEN's own layout has no words for it")
        if mode.is_map:
            downsampler: dict[str, Any] = {"out_dim": mode.extra_channels}
            if mode.hint_widths:
                downsampler["resize_input"] = config.image_size // config.vae.downsample_factor * 4
            if mode.has_labels:
                downsampler["in_dim"] = mode.map_channels
            params["grounding_downsampler"] = {
                "target": f"{modules}.diffusionmodules.{mode.original}_grounding_downsampler.GroundingDownsampler",
                "params": downsampler,
            }
            out["grounding_downsampler_input"] = {
                "target": f"grounding_input.{mode.original}_grounding_downsampler_input.GroundingDSInput"
            }
        params["grounding_tokenizer"] = {
            "target": f"{modules}.diffusionmodules.{mode.original}_grounding_net.PositionNet",
            "params": tokenizer,
        }
        out["grounding_tokenizer_input"] = {  # 'tokinzer' is the original's own spelling
            "target": f"grounding_input.{mode.original}_grounding_tokinzer_input.GroundingNetInput"
        }
    return out


def config_from_original(stated: Mapping[str, Any]) -> ModelConfig:
    """A whole `ModelConfig` from an original-style config alone, without tensors."""
    model, vae = _params(stated, "model"), _params(stated, "autoencoder")
    mode = original_mode(stated)
    tokenizer = _mapping(_mapping(model.get("grounding_tokenizer")).get("params"))
    grounding = None
    if mode:
        grounding = _replace(
            GroundingConfig(mode=mode),
            {
                "token_dim": tokenizer.get("out_dim"),
                "feature_dim": tokenizer.get({"keypoint": "out_dim", "map": ""}.get(MODES[mode].kind, "in_dim")),
                "num_freqs": tokenizer.get("fourier_freqs"),
                "max_persons": tokenizer.get("max_persons_per_image"),
                "map_size": tokenizer.get("resize_input"),
                "fuser_type": model.get("fuser_type"),
            },
        )
    unet = _replace(
        UNetConfig(),
        {
            "in_channels": model.get("in_channels"),
            "out_channels": model.get("out_channels"),
            "model_channels": model.get("model_channels"),
            "channel_mult": _tuple(model.get("channel_mult")),
            "num_res_blocks": model.get("num_res_blocks"),
            "attention_downsamples": _tuple(sorted(model.get("attention_resolutions") or ())),
            "context_dim": model.get("context_dim"),
            "grounding": grounding,
        },
    )
    dd = _mapping(vae.get("ddconfig"))
    bare = ModelConfig(
        unet=unet,
        vae=_replace(
            VAEConfig(),
            {
                "in_channels": dd.get("in_channels"),
                "base_channels": dd.get("ch"),
                "channel_mult": _tuple(dd.get("ch_mult")),
                "num_res_blocks": dd.get("num_res_blocks"),
                "latent_channels": vae.get("embed_dim"),
            },
        ),
    )
    return apply_original_config(stated, bare, (mode,) if mode else ()).config


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _params(stated: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _mapping(_mapping(stated.get(key)).get("params"))


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return tuple(values) if values else None


def _replace(config: Any, values: Mapping[str, Any]) -> Any:
    """`dataclasses.replace`, skipping values that are not stated."""
    return dataclasses.replace(config, **{name: v for name, v in values.items() if v is not None})
