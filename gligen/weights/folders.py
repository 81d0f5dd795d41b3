"""Folders as diffusers and transformers lay them out: sub-folders with a config.json and weight files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gligen.weights.names_clip import image_from_hf, text_from_hf
from gligen.weights.names_diffusers import unet_to_ldm, vae_to_ldm
from gligen.weights.tensors import LazyTensor

Tensors = Mapping[str, LazyTensor]
ReadTensors = Callable[[Path], tuple[dict[str, LazyTensor], list[str]]]
# transformers writes model.*, diffusers diffusion_pytorch_model.*, open_clip open_clip_*.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")


def weight_files(folder: Path) -> list[Path]:
    """The files that together hold a folder's weights: safetensors before pickles, whole before half precision.

    Raises ValueError if there are none, or shards that an index names are missing.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")) + sorted(folder.glob("*.bin.index.json")):
        shards = read_json(index).get("weight_map")
        if isinstance(shards, dict):
            files = [folder / Path(str(name)).name for name in sorted(set(shards.values()))]
            for file in files:
                if not file.is_file():
                    raise ValueError(f"{file}: missing, though {index.name} names it: is it fully downloaded?")
            return files
    for suffix in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for stem in _STEMS:
            if (folder / (stem + suffix)).is_file():
                return [folder / (stem + suffix)]
    others = sorted(
        file for file in folder.glob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".ckpt", ".pt")
    )
    if len(others) != 1:
        found = f"{len(others)} files that could be" if others else "no"
        raise ValueError(f"{folder}: holds {found} weights: give the file itself")
    return others


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return data


def read_diffusers(path: Path, read_tensors: ReadTensors) -> tuple[dict[str, Tensors], dict[str, Any], list[str]]:
    """The parts of a pipeline's folder, and what its configs add to the shapes, as a partial ModelConfig."""
    tensors, notes = read_tensors(path / "unet")
    parts: dict[str, Tensors] = {}
    parts["unet"], config = unet_part(tensors, read_json(path / "unet/config.json"))
    if (path / "vae").is_dir():
        tensors, more = read_tensors(path / "vae")
        parts["vae"] = vae_to_ldm(tensors)
        notes += more
        stated = read_json(path / "vae/config.json")
        if "scaling_factor" in stated:
            config["vae"] = {"scale_factor": stated["scaling_factor"]}
        size = read_json(path / "unet/config.json").get("sample_size")
        if isinstance(size, int):
            config["image_size"] = size * 2 ** (len(stated.get("block_out_channels", (1,) * 4)) - 1)
    if (path / "text_encoder").is_dir():
        tensors, more = read_tensors(path / "text_encoder")
        parts["text_encoder"] = text_from_hf({name.removeprefix("text_model."): t for name, t in tensors.items()})
        notes += more
        stated = read_json(path / "text_encoder/config.json")
        config |= _heads("text_encoder", stated)
        if stated.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError(f"{path}: its text encoder uses {stated['hidden_act']}, CLIP ViT-L/14 quick_gelu")
    if (path / "image_encoder").is_dir():
        tensors, more = read_tensors(path / "image_encoder")
        part = image_from_hf(tensors)
        notes += more
        if (path / "image_project").is_dir():
            # diffusers' linear layer holds CLIP's text projection (embed_dim, text_width) transposed: ours as it is.
            projection, _ = read_tensors(path / "image_project")
            if "project.weight" in projection:
                part["text_projection"] = projection["project.weight"]
        parts["image_encoder"] = part
        config |= _heads("image_encoder", read_json(path / "image_encoder/config.json"))
    config |= _schedule(path)
    return parts, config, notes


def unet_part(tensors: Tensors, stated: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A diffusers UNet under our names, and its heads as a partial ModelConfig."""
    part = unet_to_ldm(tensors)
    # diffusers calls the number of heads `attention_head_dim` in Stable Diffusion 1's configs.
    heads = stated.get("num_attention_heads") or stated.get("attention_head_dim")
    if isinstance(heads, list):
        if len(set(heads)) > 1:
            raise ValueError("its heads differ per level: Stable Diffusion 2 or XL, not a v1 UNet")
        heads = heads[0]
    return part, {"unet": {"num_heads": heads}} if heads else {}


def clip_heads(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """Heads from a CLIP folder's config.json, as a partial ModelConfig; None if it says nothing."""
    vision = stated.get("vision_config") if stated.get("model_type") == "clip" else stated
    if stated.get("model_type") == "clip_text_model":
        vision, text = {}, stated
    else:
        text = stated.get("text_config") or {}
    config = _heads("image_encoder", vision or {}) | _heads("text_encoder", text)
    return config or None


def _heads(part: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    heads = stated.get("num_attention_heads")
    return {part: {"heads": heads}} if heads else {}


def _schedule(path: Path) -> dict[str, Any]:
    stated = read_json(path / "scheduler/scheduler_config.json")
    if stated.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{path}: predicts {stated['prediction_type']}; only models that predict epsilon are known")
    if stated.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise ValueError(f"{path}: its beta_schedule is {stated['beta_schedule']}; only scaled_linear is known")
    names = {"num_train_timesteps": "timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
    found = {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    return {"schedule": found} if found else {}
