"""Folders as diffusers and transformers lay them out: sub-folders with a config.json and weight files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gligen.weights.diffusers_configs import (
    FoundConfig,
    check_preprocessor,
    check_tokenizer,
    schedule_config,
    tower_config,
    unet_config,
    vae_config,
)
from gligen.weights.names_clip import image_from_hf
from gligen.weights.names_diffusers import unet_to_ldm, vae_to_ldm
from gligen.weights.tensors import LazyTensor

Tensors = Mapping[str, LazyTensor]
ReadTensors = Callable[[Path], tuple[dict[str, LazyTensor], list[str]]]
OWN_CONFIG = "gligen.json"  # what diffusers' own configs have no place for, as write.py stores it
# of a pipeline: those that are read, and one that looks at finished images
_SUBFOLDERS = (
    *("unet", "vae", "text_encoder", "image_encoder", "image_project", "scheduler", "tokenizer"),
    *("feature_extractor", "safety_checker"),
)
# transformers writes model.*, diffusers diffusion_pytorch_model.*, open_clip open_clip_*.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
_INDEX = re.compile(r"(?P<stem>.+?)(?P<before>\.\w+)?\.(?P<kind>safetensors|bin)\.index(?P<behind>\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)*\.(safetensors|bin)")


def lone_file(folder: Path) -> Path | None:
    """The file of weights in a folder that says nothing more about it: of no pipeline, and without a config.json."""
    if any((folder / name).exists() for name in ("unet", "model_index.json", "config.json")):
        return None
    files, _ = choose_weights(folder)
    return files[0] if len(files) == 1 else None


def choose_weights(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that together hold a folder's weights, and notes on what stands beside and was not taken.

    Safetensors go before pickles, whole before half precision, a whole file before shards of the same kind; an index
    whose shards are not all there is what an earlier saving or a partial download left, if anything else can be read.
    Raises ValueError if there are none, or shards that an index names are missing.
    """
    names = {file.name for file in folder.iterdir() if file.is_file()}
    found: list[tuple[tuple[int, int, int], str, list[str]]] = []  # (rank, what to call it, its files)
    for name in sorted(names):
        if match := _INDEX.fullmatch(name):
            shards = read_json(folder / name).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                continue
            variant = match["before"] or match["behind"] or ""
            files = [Path(str(shard)).name for shard in sorted(set(shards.values()))]
            found.append((_rank(match["kind"], variant, is_whole=False), name, files))
    for kind in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in _STEMS:
                if (name := f"{stem}{variant}.{kind}") in names:
                    found.append((_rank(kind, variant, is_whole=True), name, [name]))
    found.sort(key=lambda choice: choice[0])
    whole = [choice for choice in found if names.issuperset(choice[2])]
    if whole:
        _, taken, files = whole[0]
        notes = [
            f"{folder.name}/{name} was not read: its shards are not all there, {taken} is"
            for _, name, shards in found if not names.issuperset(shards)
        ] + [
            f"{folder.name}/{name} was not read: {taken} goes before it"
            for rank, name, _ in whole[1:] if rank[:2] == whole[0][0][:2]
        ]  # fmt: skip
        return [folder / name for name in files], notes
    if found:
        _, index, files = found[0]
        lost = next(name for name in files if name not in names)
        raise ValueError(f"{folder / lost}: missing, though {index} names it: is it fully downloaded?")
    return _unnamed(folder, names), []


def _rank(kind: str, variant: str, *, is_whole: bool) -> tuple[int, int, int]:
    return kind != "safetensors", variant != "", not is_whole


def _unnamed(folder: Path, names: set[str]) -> list[Path]:
    """The one file of weights under a name nobody agreed on, or shards whose index is missing."""
    if {"adapter.safetensors", "checkpoint.safetensors"} <= names:  # of a training run: what was learnt, and its state
        return [folder / "adapter.safetensors"]
    others = sorted(name for name in names if Path(name).suffix in (".safetensors", ".bin", ".pth", ".ckpt", ".pt"))
    shards = [match for name in others if (match := _SHARD.fullmatch(name))]
    if shards and len(shards) == len(others) and len({(m[1], m[3], m[5]) for m in shards}) == 1:
        if len(shards) < int(shards[0][3]):
            raise ValueError(f"{folder}: holds {len(shards)} of {int(shards[0][3])} shards: is it fully downloaded?")
        return [folder / name for name in others]
    if len(others) != 1:
        found = f"{len(others)} files that could be" if others else "no"
        raise ValueError(f"{folder}: holds {found} weights: give the file itself")
    return [folder / others[0]]


def check_no_shard(path: Path) -> None:
    """Raises ValueError for a file that by its name is one of several that a model was cut into."""
    if (match := _SHARD.fullmatch(path.name)) and int(match[3]) > 1:
        raise ValueError(f"{path}: one of {int(match[3])} files that hold the model together: give their folder")


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


def read_diffusers(path: Path, read_tensors: ReadTensors) -> tuple[dict[str, Tensors], FoundConfig, list[str]]:
    """The parts of a pipeline's folder, what its configs add to the shapes, and notes.

    The text encoder still has Hugging Face's names.
    """
    parts: dict[str, Tensors] = {}
    notes: list[str] = []

    def read(name: str) -> tuple[dict[str, LazyTensor], dict[str, Any], str]:
        tensors, more = read_tensors(path / name)
        notes.extend(more)
        return tensors, read_json(path / name / "config.json"), f"{name}/config.json"

    tensors, unet, where = read("unet")
    parts["unet"], found = unet_part(tensors, unet, where)
    if (path / "vae").is_dir():
        tensors, stated, where = read("vae")
        found.add(vae_config(stated, where))
        parts["vae"] = vae_to_ldm(tensors)
        size = unet.get("sample_size")
        sides = set(size) if isinstance(size, list) else {size}
        if len(sides) > 1:
            found.warnings.append(f"unet/config.json says sample_size is {size}: images are square unless asked for")
        elif isinstance(size := sides.pop(), int):
            found.config["image_size"] = size * 2 ** (len(stated.get("block_out_channels", (1,) * 4)) - 1)
    if (path / "text_encoder").is_dir():
        parts["text_encoder"], stated, where = read("text_encoder")
        found.add(tower_config("text_encoder", stated, where))
        for name in ("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"):
            check_tokenizer(read_json(path / name), name)
    if (path / "text_encoder_2").is_dir():
        raise ValueError("has two text encoders: Stable Diffusion XL or later, not a v1 model")
    if (path / "image_encoder").is_dir():
        tensors, stated, where = read("image_encoder")
        found.add(tower_config("image_encoder", stated, where))
        part = image_from_hf(tensors)
        if (path / "image_project").is_dir():
            # diffusers' linear layer holds CLIP's text projection (embed_dim, text_width) transposed: ours as it is.
            projection, _ = read_tensors(path / "image_project")
            if "project.weight" in projection:
                part["text_projection"] = projection["project.weight"]
        parts["image_encoder"] = part
        name = "feature_extractor/preprocessor_config.json"
        check_preprocessor(read_json(path / name), name)
    found.warnings += [
        f"has {file.parent.name}/, which is not used here"
        for file in sorted(path.glob("*/config.json")) if file.parent.name not in _SUBFOLDERS
    ]  # fmt: skip
    scheduler = "scheduler/scheduler_config.json"
    found.add(schedule_config(read_json(path / scheduler), scheduler))
    found.config = overlaid(found.config, read_json(path / OWN_CONFIG))
    return parts, found, notes


def unet_part(tensors: Tensors, stated: Mapping[str, Any], where: str) -> tuple[Tensors, FoundConfig]:
    """A diffusers UNet under our names, and what its config (the file `where`) adds to the shapes."""
    found = unet_config(stated, where)
    if not stated:
        found.warnings.append(f"has no {where}: 8 heads are taken for granted")
    return unet_to_ldm(tensors), found


def overlaid(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data with `above`'s values over `below`'s."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), dict):
            value = overlaid(merged[name], value)
        merged[name] = value
    return merged
