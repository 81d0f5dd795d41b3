"""LoRA: low-rank changes of a base's layers, put on when its weights are read (Hu et al., 2021).

    W + weight · (alpha / rank) · up · down

kohya's names, diffusers' and peft's are known, with convolutions (LoCon, also its `lora_mid`). A file is matched name
by name against the model's own layers; one that fits them in part only is refused, since half of it would be lost.
Nothing but headers is read before the model is built, and one layer's change at a time is held then.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gligen.fields import is_list, is_number, plain, read_path, show
from gligen.weights.files import read_tensors
from gligen.weights.folders import choose_weights, read_json
from gligen.weights.hub import local
from gligen.weights.infer import FIRST_WEIGHT, latent_channels
from gligen.weights.kinds import foreign
from gligen.weights.names_clip import text_to_hf
from gligen.weights.names_diffusers import ldm_grid, unet_name_to_diffusers
from gligen.weights.tensors import Device, LazyTensor

Parts = Mapping[str, Mapping[str, LazyTensor]]
Adapted = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
Loras = Adapted | Sequence[Adapted] | None
MAX_WEIGHT = 100.0  # of a LoRA: usual ones are within 2, of sliders within 20


@dataclass(frozen=True)
class Place:
    """The place of a layer's weight in the model: part, tensor's name, which of its rows, and the layer's shape.

    CLIP's text encoder holds queries, keys and values in one tensor, of which a LoRA's layer is a third. Of a first
    convolution that a mode has widened, the layer is the base's own channels, which come first.
    """

    part: str
    name: str
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """One layer's low-rank change. down: (r, in, ...), mid: (r, r, kh, kw) or None, up: (out, r, ...)."""

    down: LazyTensor
    up: LazyTensor
    mid: LazyTensor | None
    scale: float
    first_row: int

    def delta(self) -> Tensor:
        """scale · up · down as (out, in) or (out, in, kh, kw), float32."""
        down, up = self.down.borrow().float(), self.up.borrow().float().flatten(1)
        if self.mid is not None:
            delta = torch.einsum("oa,abyx,bi->oiyx", up, self.mid.borrow().float(), down.flatten(1))
            self.mid.release()
        else:
            delta = (up @ down.flatten(1)).view(len(up), *down.shape[1:])
        self.down.release()
        self.up.release()
        return self.scale * delta


class LoRATensor(LazyTensor):
    """A base's tensor with changes added in float32 when it is read, rounded once."""

    def __init__(self, base: LazyTensor, changes: Sequence[Change]) -> None:
        self.base = base
        self.changes = tuple(changes)
        self.shape, self.dtype = base.shape, base.dtype

    def borrow(self) -> Tensor:
        return self.read()

    def read(self, device: Device = None, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.base.borrow().float().clone()  # a borrowed one may be the file's own memory
        self.base.release()
        for change in self.changes:
            delta = change.delta()
            rows = weight[change.first_row : change.first_row + len(delta)]
            rows[:, : delta.shape[1]] += delta.view(*delta.shape[:2], *rows.shape[2:])
        return weight.to(device or "cpu", dtype or self.dtype)


@dataclass
class _Layer:
    """The tensors that a file holds for one layer, under its own name. config: peft's, of the network it is of."""

    text: bool
    config: Mapping[str, Any]
    tensors: dict[str, LazyTensor] = field(default_factory=dict)  # down, up, mid, alpha


def parse_lora(value: Adapted) -> tuple[Path, float]:
    """The file and weight of `FILE`, `FILE:weight` or (FILE, weight).

    Raises ValueError, one line, for what is none of these, and for a weight of 0, beyond MAX_WEIGHT or not finite.
    """
    weight = 1.0
    if isinstance(value, (tuple, list)) and _is_pair(value):
        path, weight = Path(local(read_path(value[0], "lora"))).expanduser(), float(plain(value[1]))
    else:
        if is_list(value):
            raise ValueError(f"lora is {show(value)}: give 'FILE', 'FILE:weight' or (path, weight)")
        path = Path(local(read_path(value, "lora"))).expanduser()
        head, colon, tail = str(path).rpartition(":")
        if colon and head and not path.exists():
            with contextlib.suppress(ValueError):  # a colon of the name's own, or a drive letter's
                weight = float(tail)
                path = Path(head)
    if not 0 < abs(weight) <= MAX_WEIGHT:
        raise ValueError(
            f"--lora '{path}' has weight {weight:g}: give a number other than 0 between -{MAX_WEIGHT:g} and "
            f"{MAX_WEIGHT:g}, such as 0.8"
        )
    return path, weight


def _is_pair(value: Any) -> bool:
    """Whether it is (path, weight), and not two paths."""
    return is_list(value) and len(value) == 2 and is_number(plain(value[1]))


def _listed(loras: Any) -> Sequence[Any]:
    """LoRAs as a list: one is a list of one. Raises ValueError for what is neither."""
    if isinstance(loras, (str, os.PathLike)) or _is_pair(loras):
        return [loras]
    if loras is not None and not is_list(loras):
        raise ValueError(f"loras is {show(loras)}: give a list of 'FILE', 'FILE:weight' or (path, weight)")
    return loras or ()


def add_loras(parts: Parts, loras: Loras) -> Parts:
    """The parts of a model with every LoRA on the layers that it names; nothing is read yet. Without any, as given.

    loras: one or a list of paths, 'FILE:weight' or (path, weight). Files, or folders as peft and diffusers write them.
    Raises FileNotFoundError, or ValueError in one line for a file that is none or does not fit all its layers.
    """
    listed = _listed(loras)
    if not listed:
        return parts
    merged = {part: dict(tensors) for part, tensors in parts.items()}
    places = _places(parts)
    for lora in listed:
        path, weight = parse_lora(lora)
        layers = _read(path)
        changes: dict[tuple[str, str], list[Change]] = {}
        unknown = []
        for name, layer in layers.items():
            found = places.get(("text_encoder" if layer.text else "unet", name.replace(".", "_")))
            if found is None:
                unknown.append(name)
                continue
            for place in found:
                change = _change(path, name, layer, place, weight)
                changes.setdefault((place.part, place.name), []).append(change)
        if unknown:
            named = f"{', '.join(unknown[:2])}{', …' if len(unknown) > 2 else ''}"
            raise ValueError(
                f"--lora '{path}' does not fit this model, which has no layer for {len(unknown)} of its {len(layers)} "
                f"({named}){_kind(layers)}"
            )
        for (part, name), more in changes.items():
            old = merged[part][name]
            base, before = (old.base, old.changes) if isinstance(old, LoRATensor) else (old, ())
            merged[part][name] = LoRATensor(base, (*before, *more))
    return merged


def _change(path: Path, name: str, layer: _Layer, place: Place, weight: float) -> Change:
    """One layer's change, checked against the weight it changes."""
    try:
        down, up, mid = layer.tensors["down"], layer.tensors["up"], layer.tensors.get("mid")
    except KeyError as missing:
        raise ValueError(f"--lora '{path}': {name} has no {missing}: is the file whole?") from None
    rank, kernel = down.shape[0], (mid or down).shape[2:]
    shape = (up.shape[0], down.shape[1], *kernel)
    wanted = place.shape
    shape += (1,) * (len(wanted) - len(shape))  # a 1×1 convolution's, without its kernel
    while len(shape) > len(wanted) and shape[-1] == 1:
        shape = shape[:-1]
    inner = {rank, up.shape[1], *(mid.shape[:2] if mid is not None else ())}
    if len(inner) > 1:
        raise ValueError(
            f"--lora '{path}': the factors of {name} do not go together: their inner sides are "
            f"{', '.join(map(str, sorted(inner)))}"
        )
    if shape != wanted:
        raise ValueError(
            f"--lora '{path}' does not fit this model: {name} is made for a layer of {_sides(shape)}, which is "
            f"{_sides(wanted)} here{_kind({name: layer}, down.shape[1])}"
        )
    if "alpha" in layer.tensors:
        scale = float(layer.tensors["alpha"].read()) / rank
    else:
        scale = _stated_scale(layer.config, name, rank)
    return Change(down, up, mid, weight * scale, place.first_row)


def _stated_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank of a layer that holds no alpha: peft and diffusers keep it in a config. Else alpha is the rank."""
    alpha = config.get("lora_alpha")
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = own
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _sides(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


# --- names -----------------------------------------------------------------------------------------------------------


def _places(parts: Parts) -> dict[tuple[str, str], list[Place]]:
    """(part, name with underscores) -> where it is, for every name that a LoRA may call a layer by.

    Underscores stand for dots in kohya's names; those of the others are written the same way here, so that one table
    serves all. The UNet goes by LDM's and by diffusers' names, the text encoder by Hugging Face's.
    """
    places: dict[tuple[str, str], list[Place]] = {}

    def add(part: str, layer: str, place: Place) -> None:
        places.setdefault((part, layer.replace(".", "_")), []).append(place)

    unet = parts.get("unet", {})
    grid = ldm_grid(unet)
    for name, tensor in unet.items():
        if name.endswith(".weight") and len(shape := tensor.shape) in (2, 4):
            if name == FIRST_WEIGHT:
                shape = (shape[0], latent_channels(unet), *shape[2:])
            for layer in dict.fromkeys((name, unet_name_to_diffusers(name, grid))):
                add("unet", layer.removesuffix(".weight"), Place("unet", name, 0, shape))
                if name == FIRST_WEIGHT and "base_first_conv" in parts:
                    add("unet", layer.removesuffix(".weight"), Place("base_first_conv", "weight", 0, shape))
    text = parts.get("text_encoder", {})
    if "token_embedding.weight" in text:  # CLIP's: nobody makes LoRAs of LDM's own encoder
        for name, tensor in text.items():
            first = 0
            for theirs, part in text_to_hf({name: tensor}).items():
                if theirs.endswith(".weight") and len(tensor.shape) == 2:
                    for prefix in ("text_model.", ""):
                        place = Place("text_encoder", name, first, part.shape)
                        add("text_encoder", prefix + theirs.removesuffix(".weight"), place)
                    first += part.shape[0]
    return places


_WORDS = {"lora_down": "down", "lora_up": "up", "lora_mid": "mid", "lora_A": "down", "lora_B": "up"}
_KEYS = (  # (layer, word) of a key, as one tool or another writes it
    re.compile(r"(?P<layer>.+)\.(?P<word>lora_(?:down|up|mid))\.weight"),  # kohya
    re.compile(r"(?P<layer>.+)\.(?P<word>lora_[AB])(?:\.[^.]+)?\.weight"),  # peft, with or without an adapter's name
    re.compile(r"(?P<layer>.+)\.lora(?:_linear_layer)?\.(?P<word>down|up)\.weight"),  # diffusers, old
    re.compile(r"(?P<layer>.+?)(?:\.processor)?\.to_(?P<old>q|k|v|out)_lora\.(?P<word>down|up)\.weight"),  # older
    re.compile(r"(?P<layer>.+)\.(?P<word>alpha)"),
)
_TEXT_PREFIXES = ("lora_te1_", "lora_te_", "text_encoder.")
_UNET_PREFIXES = ("lora_unet_", "unet.", "model.diffusion_model.", "diffusion_model.")
_OTHER_METHODS = {"hada_w1": "LoHa", "lokr_w1": "LoKr", "dora_scale": "DoRA", "oft_": "OFT", "lora_magnitude": "DoRA"}


def _layers(path: Path, tensors: Mapping[str, LazyTensor], text: bool = False) -> Iterator[tuple[str, bool, str, str]]:
    """(layer's name, whether it is the text encoder's, word, key) of every tensor. Raises ValueError for strange ones.

    text: the file as a whole is of the text encoder, as peft's folders are of one network.
    """
    strange = []
    for key in tensors:
        match = next((found for pattern in _KEYS if (found := pattern.fullmatch(key))), None)
        if match is None:
            strange.append(key)
            continue
        layer = match["layer"].removeprefix("base_model.model.")
        is_text = text or layer.startswith((*_TEXT_PREFIXES, "text_model.", "encoder.layers."))
        layer = layer.removeprefix(next(filter(layer.startswith, (*_TEXT_PREFIXES, *_UNET_PREFIXES)), ""))
        old = match.groupdict().get("old")
        if old:
            names = {"out": "out_proj"} if is_text else {"out": "to_out.0"}
            layer += "." + names.get(old, f"{old}_proj" if is_text else f"to_{old}")
        yield layer, is_text, _WORDS.get(match["word"], match["word"]), key
    if strange:
        method = next((m for word, m in _OTHER_METHODS.items() if any(word in key for key in strange)), None)
        what = f"of {method}, which is not read: LoRA and LoCon are" if method else "no LoRA's"
        raise ValueError(f"--lora '{path}': {len(strange)} of its {len(tensors)} tensors are {what} ({strange[0]})")


def _kind(layers: Mapping[str, _Layer], width: int = 0) -> str:
    """The model that a file that does not fit was made for, as far as its names show it."""
    names = list(layers)
    if width == 2048 or any(re.search(r"te2_|text_encoder_2|[._]transformer_blocks[._][1-9]", n) for n in names):
        return ": it is made for Stable Diffusion XL"
    if width == 1024:
        return ": it is made for Stable Diffusion 2"
    if any("single_blocks" in n or "double_blocks" in n or "single_transformer_blocks" in n for n in names):
        return ": it is made for Flux"
    if any("joint_blocks" in n or n.startswith("transformer") for n in names):
        return ": it is made for a diffusion transformer"
    return ""


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, _Layer]:
    """The layers of a LoRA's file or folder."""
    if not path.exists():
        raise FileNotFoundError(f"--lora '{path}': there is no such file or folder")
    configs: dict[bool, Mapping[str, Any]] = {}  # by whether it is the text encoder's
    text = False
    file = path
    if path.is_dir():
        file = _file_of(path)
        if config := read_json(path / "adapter_config.json"):
            if config.get("use_dora"):
                raise ValueError(f"--lora '{path}': of DoRA, which is not read: LoRA and LoCon are")
            text = "q_proj" in str(config.get("target_modules"))
            configs[text] = config
    value, metadata, _ = read_tensors(file)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    tensors = {k: t for k, t in value.items() if isinstance(t, LazyTensor)} if isinstance(value, dict) else {}
    if not tensors:
        raise ValueError(f"--lora '{path}': holds no tensors")
    if not any(pattern.fullmatch(key) for key in tensors for pattern in _KEYS[:4]) and not any(
        word in key for key in tensors for word in _OTHER_METHODS
    ):
        kind = foreign(tensors)
        what = f"is {kind}" if kind else f"is no LoRA (its first names are {', '.join(list(tensors)[:3])})"
        if any(".fuser." in name or "position_net." in name for name in tensors):
            what = "holds GLIGEN's own layers: give it with --adapter FILE"
        raise ValueError(f"--lora '{path}' {what}")
    if stated := metadata.get("lora_adapter_metadata"):  # diffusers': {"unet.lora_alpha": 8, …}
        try:
            flat = json.loads(stated)
        except ValueError:
            raise ValueError(f"--lora '{path}': its lora_adapter_metadata is no JSON") from None
        for is_text, prefix in ((False, "unet."), (True, "text_encoder.")):
            configs[is_text] = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
    layers: dict[str, _Layer] = {}
    for name, is_text, word, key in _layers(path, tensors, text):
        layers.setdefault(name, _Layer(is_text, configs.get(is_text, {}))).tensors[word] = tensors[key]
    return layers


def _file_of(folder: Path) -> Path:
    """The weights of a LoRA's folder: peft's or diffusers' file, or the only one."""
    names = (
        f"{stem}{suffix}" for stem in ("adapter_model", "pytorch_lora_weights") for suffix in (".safetensors", ".bin")
    )
    return next((folder / name for name in names if (folder / name).is_file()), None) or choose_weights(folder)[0][0]
