"""Parts back into files: the project's own safetensors, and every layout that can be read.

Each writer works beside its target and renames at the end, so that an interrupted one leaves nothing half-written.
What a published layout has no place for (heads, groups, a VAE's scale of our own small models; token slots; canny or
depth) is stored with it where its own programs do not look, and the file is read back before it
counts as written.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gligen.config import ModelConfig, to_dict
from gligen.files import remove, replacing
from gligen.weights import LAYOUTS
from gligen.weights.files import CONFIG_KEY, PART_NAMES, Weights, read_weights
from gligen.weights.folders import OWN_CONFIG
from gligen.weights.graft import PART_TITLES
from gligen.weights.infer import has_whole_unet, infer_config, is_grounding_name, possible_modes, schedule_buffers
from gligen.weights.names_clip import image_to_hf, text_to_hf
from gligen.weights.names_diffusers import unet_to_diffusers, vae_to_diffusers
from gligen.weights.names_ema import ema_name
from gligen.weights.original import apply_original_config, original_config
from gligen.weights.safetensors_file import write_safetensors
from gligen.weights.tensors import LazyTensor, hold, narrowed

Tensors = Mapping[str, LazyTensor]
AnyTensors = Mapping[str, Tensor | LazyTensor]


def save_model(
    path: str | Path, parts: Mapping[str, AnyTensors], config: ModelConfig, *, dtype: torch.dtype | None = None
) -> None:
    """Writes a whole model in the project's own layout: safetensors with the config in its metadata."""
    unknown = set(parts) - set(PART_NAMES)
    if unknown:
        raise ValueError(f"unknown part {sorted(unknown)[0]!r}: the known ones are {', '.join(PART_NAMES)}")
    tensors = {f"{part}.{name}": t for part, named in parts.items() for name, t in hold(named).items()}
    write_safetensors(path, tensors, _metadata("model", config), dtype=dtype)


def save_adapter(
    path: str | Path, tensors: AnyTensors, config: ModelConfig, *, dtype: torch.dtype | None = None
) -> None:
    """Writes what training changed of the UNet (names as in the `unet` part), with the config of the whole model."""
    named = {f"unet.{name}": t for name, t in hold(tensors).items()}
    write_safetensors(path, named, _metadata("adapter", config), dtype=dtype)


def write_weights(
    weights: Weights, path: str | Path, layout: str, *, dtype: torch.dtype | None = None, ema: bool = False
) -> None:
    """Writes `weights` as a file (or, for 'diffusers', a folder) of `layout`, one of LAYOUTS.

    dtype: of the floating-point tensors; None keeps what they are. ema: for 'sd' and 'ldm', also the averaged copies
    of the UNet that such files may hold, here equal to the weights.
    Raises ValueError, one line, if `path` exists, a part is missing, or what was written is not read back as the same
    model; nothing is left behind then.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: the known ones are {', '.join(LAYOUTS)}")
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: exists already; choose another name")
    if ema and layout not in ("sd", "ldm"):
        raise ValueError(f"layout {layout!r} has no place for averaged (EMA) weights: the ones that do are sd, ldm")
    if len(weights.modes) > 1 and layout in ("gligen", "model", "adapter"):
        raise ValueError(f"{weights.path} could be {' or '.join(weights.modes)}: say which with --mode")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path}: {path.parent} is a file, not a folder") from error
    _write(weights, path, layout, dtype, ema)
    try:
        _check_written(weights, path, layout)
    except ValueError:
        remove(path)
        raise


def _check_written(weights: Weights, path: Path, layout: str) -> None:
    """Raises ValueError, naming the fields, if the file's config or mode is another than the one meant."""
    again = read_weights(path)
    meant, found = weights.config, again.config
    if layout == "pruned":  # the rest is the base's
        meant = replace(found, unet=replace(found.unet, grounding=meant.unet.grounding))
    lost = difference(to_dict(found), to_dict(meant))
    if again.modes != _modes(weights):
        lost["mode"] = " or ".join(_modes(weights)) or None
    if lost:
        raise ValueError(f"layout {layout!r} cannot hold {json.dumps(lost)}: write layout 'model' instead")


def difference(found: Mapping[str, Any], meant: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of nested plain data `meant` that are others in `found`."""
    out: dict[str, Any] = {}
    for name, value in meant.items():
        other = found.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if inner := difference(other, value):
                out[name] = inner
        elif value != other:
            out[name] = value
    return out


def _not_inferred(weights: Weights, inferred: ModelConfig, possible: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config that reading gets wrong. inferred: the config as read; possible: the modes as read."""
    stored = difference(to_dict(inferred), to_dict(weights.config))
    modes = _modes(weights)
    if len(modes) == 1 and possible != modes:
        unet = stored.setdefault("unet", {})
        unet["grounding"] = {**(unet.get("grounding") or {}), "mode": modes[0]}
    return stored


def _modes(weights: Weights) -> tuple[str, ...]:
    """The modes of weights read from a file, or the config's where they were made in memory without saying."""
    grounding = weights.config.unet.grounding
    return weights.modes or ((grounding.mode,) if grounding else ())


def _by_shapes(parts: Mapping[str, Tensors]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config and the possible modes as reading infers them from tensors alone."""
    possible = possible_modes(parts.get("unet", {}))
    return infer_config(parts, possible[0] if possible else None), possible


def _write(weights: Weights, path: Path, layout: str, dtype: torch.dtype | None, ema: bool) -> None:
    if layout in ("pruned", "adapter"):
        _write_grounding(weights, path, layout, dtype)
        return
    _require(weights, "whole UNet", has_whole_unet(weights.parts.get("unet", {})))
    if layout == "model":
        save_model(path, weights.parts, weights.config, dtype=dtype)
        return
    for part, title in PART_TITLES.items():
        _require(weights, title, part in weights.parts)
    if layout in ("sd", "ldm"):
        _write_stable_diffusion(weights, path, layout, dtype, ema)
    elif layout == "gligen":
        _write_gligen(weights, path, dtype)
    else:
        _write_diffusers(weights, path, dtype)


def _metadata(kind: str, config: ModelConfig) -> dict[str, str]:
    return {"format": "gligen", "kind": kind, "config": json.dumps(to_dict(config))}


def _require(weights: Weights, name: str, is_there: bool) -> None:
    if is_there:
        return
    advice = "convert a base that has one, with this as --adapter"
    if not weights.modes and has_whole_unet(weights.parts.get("unet", {})):
        advice = "layout 'model' holds whatever there is"
    raise ValueError(f"{weights.path}: holds no {name}, which this layout needs: {advice}")


def _write_grounding(weights: Weights, path: Path, layout: str, dtype: torch.dtype | None) -> None:
    unet, grounding = weights.parts.get("unet", {}), weights.config.unet.grounding
    if grounding is None:
        raise ValueError(f"{weights.path}: holds no grounding to write as {layout!r}")
    tensors = {name: t for name, t in unet.items() if is_grounding_name(name)}
    if layout == "adapter":
        if grounding.spec.extra_channels:  # the widened first convolution was trained too
            tensors |= {name: t for name, t in unet.items() if name.startswith("input_blocks.0.0.")}
        save_adapter(path, tensors, weights.config, dtype=dtype)
        return
    if grounding.spec.extra_channels and has_whole_unet(unet):
        raise ValueError(
            f"layout 'pruned' has no place for the first convolution that mode {grounding.mode} trains: use 'adapter'"
        )
    stored = _not_inferred(weights, *_by_shapes({"unet": tensors})).get("unet", {}).get("grounding")
    own = _config_metadata({"unet": {"grounding": stored}} if stored else {})
    write_safetensors(path, tensors, {"format": "pt"} | own, dtype=dtype)


def _config_metadata(stored: Mapping[str, Any]) -> dict[str, str]:
    return {CONFIG_KEY: json.dumps(stored)} if stored else {}


def _prefixed(prefix: str, tensors: Tensors) -> dict[str, LazyTensor]:
    return {f"{prefix}{name}": t for name, t in tensors.items()}


def _text_names(weights: Weights) -> dict[str, LazyTensor]:
    """The text encoder as checkpoints name it, behind `transformer.`."""
    text = weights.parts["text_encoder"]
    return dict(text) if weights.config.text_encoder.kind == "bert" else _prefixed("text_model.", text_to_hf(text))


def _write_stable_diffusion(weights: Weights, path: Path, layout: str, dtype: torch.dtype | None, ema: bool) -> None:
    kind = weights.config.text_encoder.kind
    if (layout == "ldm") != (kind == "bert"):
        raise ValueError(
            f"{weights.path}: its text encoder is {kind}: use layout {'ldm' if kind == 'bert' else 'sd'!r}"
        )
    unet, buffers = weights.parts["unet"], schedule_buffers(weights.config.schedule)
    tensors = (
        hold(buffers)
        | _prefixed("model.diffusion_model.", unet)
        | _prefixed("first_stage_model.", weights.parts["vae"])
        | _prefixed("cond_stage_model.transformer.", _text_names(weights))
    )
    for extra in ("image_encoder", "base_first_conv"):
        tensors |= _prefixed(f"{extra}.", weights.parts.get(extra, {}))
    if ema:
        tensors |= {ema_name(name): t for name, t in unet.items()}
        counted = torch.tensor(0, dtype=torch.int32)
        tensors |= hold({"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": counted})
    stored = _config_metadata(_not_inferred(weights, *_by_shapes(weights.parts)))
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, {"format": "pt"} | stored, dtype=dtype, keep=buffers)
    else:
        with replacing(path) as temporary:
            torch.save({"global_step": 0, "state_dict": _read_all(tensors, dtype, buffers), **stored}, temporary)


def _write_gligen(weights: Weights, path: Path, dtype: torch.dtype | None) -> None:
    parts = weights.parts
    stated = original_config(weights.config)
    shapes, possible = _by_shapes(weights.parts)
    mode, inferred = apply_original_config(stated, shapes, possible)
    value: dict[str, Any] = {
        "model": _read_all(parts["unet"], dtype),
        "text_encoder": _read_all(_prefixed("transformer.", _text_names(weights)), dtype),
        "autoencoder": _read_all(parts["vae"], dtype),
        "diffusion": schedule_buffers(weights.config.schedule),
        # The original's trainer stores vars() of its OmegaConf config, and its scripts read `_content`.
        "config_dict": {"_metadata": None, "_parent": None, "_content": stated},
        **_config_metadata(_not_inferred(weights, inferred, (mode,) if mode else possible)),
    }
    for extra in ("image_encoder", "base_first_conv"):
        if extra in parts:
            value[extra] = _read_all(parts[extra], dtype)
    with replacing(path) as temporary:
        torch.save(value, temporary)


def _read_all(tensors: Tensors, dtype: torch.dtype | None, keep: Container[str] = ()) -> dict[str, Tensor]:
    """In the file's own precision these stay views of the mapped file, so nothing is held twice."""
    out = {}
    for name, tensor in tensors.items():
        if dtype in (None, tensor.dtype) or name in keep or not tensor.dtype.is_floating_point:
            out[name] = tensor.read()
        else:
            out[name] = narrowed(name, tensor.borrow(), dtype)
            tensor.release()
    return out


# --- diffusers -------------------------------------------------------------------------------------------------------

_ATTENTION_TYPES = {None: "default", "box-text": "gated", "box-text-image": "gated-text-image"}


def _write_diffusers(weights: Weights, path: Path, dtype: torch.dtype | None) -> None:
    grounding = weights.config.unet.grounding
    if grounding is not None and (grounding.spec.kind not in _ATTENTION_TYPES or grounding.fuser_type != "gatedSA"):
        raise ValueError(
            f"diffusers has no model of mode {grounding.mode} with {grounding.fuser_type}: "
            "only boxes with text (and images), with gatedSA"
        )
    if weights.config.text_encoder.kind != "clip":
        raise ValueError(f"{weights.path}: its text encoder is LDM's, which diffusers' Stable Diffusion has not")
    with replacing(path) as folder:
        _diffusers_folder(weights, folder, dtype)


def _diffusers_folder(weights: Weights, folder: Path, dtype: torch.dtype | None) -> None:
    config, parts = weights.config, weights.parts
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],  # its files are not a model's: get them from CLIP
    }
    if config.unet.grounding is not None:
        with_images = config.unet.grounding.spec.takes_images
        index["_class_name"] = f"StableDiffusionGLIGEN{'TextImage' if with_images else ''}Pipeline"

    def put_json(name: str, stated: Mapping[str, Any]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(stated, indent=2), encoding="utf-8")

    def put(name: str, tensors: Tensors, stated: Mapping[str, Any], stem: str = "diffusion_pytorch_model") -> None:
        put_json(f"{name}/config.json", stated)
        write_safetensors(folder / name / f"{stem}.safetensors", tensors, {"format": "pt"}, dtype=dtype)

    put("unet", unet_to_diffusers(parts["unet"]), _unet_json(config))
    put("vae", vae_to_diffusers(parts["vae"]), _vae_json(config))
    put("text_encoder", _text_names(weights), _text_json(config), stem="model")
    if "image_encoder" in parts and config.image_encoder is not None:
        image = image_to_hf(parts["image_encoder"])
        image.pop("text_projection.weight", None)
        put("image_encoder", image, _image_json(config), stem="model")
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        if "text_projection" in parts["image_encoder"]:
            projection = {"project.weight": parts["image_encoder"]["text_projection"]}
            stated = {"_class_name": "CLIPImageProjection", "hidden_size": config.image_encoder.embed_dim}
            put("image_project", projection, stated)
            index["image_project"] = ["stable_diffusion_gligen_text_image", "CLIPImageProjection"]
    put_json("scheduler/scheduler_config.json", _scheduler_json(config))
    put_json("model_index.json", index)
    again = read_weights(folder)
    if stored := _not_inferred(weights, again.config, again.modes):
        put_json(OWN_CONFIG, stored)


def _unet_json(config: ModelConfig) -> dict[str, Any]:
    unet = config.unet
    has_attention = [2**level in unet.attention_downsamples for level in range(len(unet.channel_mult))]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.first_conv_channels,
        "out_channels": unet.out_channels,
        "sample_size": config.image_size // config.vae.downsample_factor,
        "block_out_channels": [mult * unet.model_channels for mult in unet.channel_mult],
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)],
        "attention_head_dim": unet.num_heads,  # diffusers' name for the number of heads in SD 1's configs
        "cross_attention_dim": unet.context_dim,
        "norm_num_groups": unet.norm_groups,
        "attention_type": _ATTENTION_TYPES[unet.grounding.spec.kind if unet.grounding else None],
    }


def _vae_json(config: ModelConfig) -> dict[str, Any]:
    vae = config.vae
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": [mult * vae.base_channels for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
        "layers_per_block": vae.num_res_blocks,
        "sample_size": config.image_size,
        "norm_num_groups": vae.norm_groups,
        "scaling_factor": vae.scale_factor,
    }


def _text_json(config: ModelConfig) -> dict[str, Any]:
    text = config.text_encoder
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size,
        "hidden_act": "quick_gelu",
        "projection_dim": text.width,
        "bos_token_id": text.vocab_size - 2,  # CLIP's 49406 and 49407
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1,
    }


def _image_json(config: ModelConfig) -> dict[str, Any]:
    image = config.image_encoder
    assert image is not None
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": image.width,
        "intermediate_size": 4 * image.width,
        "num_hidden_layers": image.layers,
        "num_attention_heads": image.heads,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "projection_dim": image.embed_dim,
        "hidden_act": "quick_gelu",
    }


def _scheduler_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": config.schedule.timesteps,
        "beta_start": config.schedule.beta_start,
        "beta_end": config.schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    }
