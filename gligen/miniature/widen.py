"""A wider UNet that computes what a trained narrower one does (Net2WiderNet, Chen et al. 2016, §2.2).

Every channel becomes several copies of itself, side by side. What reads them takes a share of each copy, the shares
adding up to what it took of the one; they are drawn at random, so that the copies get different gradients and part
ways. Groups of GroupNorm, attention heads and the halves of GEGLU stay what they were, so if all levels grow by one
factor the wider UNet computes the same. Where they grow by different ones it is a little off, until it has trained on
for some hundred steps: groups change their members where a skip joins, and a residual block that no longer changes the
width loses the convolution of its skip.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gligen.config import UNetConfig, to_dict
from gligen.files import write_atomically
from gligen.modules.unet import UNetModel
from gligen.weights import Weights, hold, read_weights, without_weights, write_weights


def widen(file: Path, to: Path, model_channels: int, channel_mult: tuple[int, ...]) -> list[Path]:
    """Writes `file`, a base as `export` writes it or an adapter taught to one, for a wider UNet; returns what it wrote.

    to: a .safetensors in float16, with a .json beside it for a base. model_channels, channel_mult: as in UNetConfig, of
    the wider UNet; every level's width a multiple of what it was.
    Raises ValueError, one line, for a file of another kind, for widths that are no multiples of those it has, or where
    there is such a file already.
    """
    weights = read_weights(file)
    kind, old = weights.kind, weights.config.unet
    if kind not in ("sd", "adapter"):
        raise ValueError(f"{file}: neither a base in Stable Diffusion's layout nor an adapter")
    new = dataclasses.replace(old, model_channels=model_channels, channel_mult=channel_mult)
    tensors = {name: tensor.read(dtype=torch.float32) for name, tensor in weights.parts["unet"].items()}
    unet = hold(widen_unet(tensors, old, new, torch.Generator().manual_seed(0)))
    config = dataclasses.replace(weights.config, unet=new)
    beside = to.with_suffix(".json")
    if kind == "sd" and beside.exists():
        raise ValueError(f"{beside}: exists already; choose another name")
    wider = Weights(path=str(file), kind=kind, parts={**weights.parts, "unet": unet}, config=config)
    write_weights(wider, to, kind, dtype=torch.float16)
    if kind == "adapter":  # holds its config
        return [to]
    write_atomically(beside, (json.dumps(to_dict(config), indent=2) + "\n").encode())
    return [to, beside]


def widen_unet(
    tensors: Mapping[str, Tensor], old: UNetConfig, new: UNetConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of a UNet of config `old`, or some of them, for one of config `new`, which has more channels.

    By name, as in a state dict; convolutions that the wider UNet does not have are left out. generator: of the shares.
    Raises ValueError, one line, unless every level's width is a multiple of what it was.
    """
    if len(old.channel_mult) != len(new.channel_mult):
        raise ValueError(f"channel_mult has {len(new.channel_mult)} levels, the UNet {len(old.channel_mult)}")
    for width, wider in zip(_widths(old), _widths(new), strict=True):
        if wider % width:
            raise ValueError(f"{wider} channels are no multiple of the {width} there are now: choose other widths")
    with without_weights():
        shapes = {name: tensor.shape for name, tensor in UNetModel(new).state_dict().items()}
    joined = _joined(old, new)
    return {
        name: _widen(name, tensor, shapes[name], joined, generator)
        for name, tensor in tensors.items()
        if name in shapes  # a skip's convolution may be gone
    }


def _widen(
    name: str, old: Tensor, shape: torch.Size, joined: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    module = name.rpartition(".")[0]
    if old.ndim == 0:
        return old
    if old.ndim == 1:  # a bias belongs to what a layer gives, a norm's numbers to what it is given
        is_norm = module in joined and module.endswith(".in_layers.0")
        return old[joined[module] if is_norm else _copies(old.shape[0], shape[0])]
    new = old[_copies(old.shape[0], shape[0])]
    if module == "time_embed.0":  # sines of more frequencies, among which those of before lie at equal distances
        spread = torch.zeros(shape)
        spread[:, :: shape[1] // old.shape[1]] = new
        new = spread
    elif module in joined or shape[1] != old.shape[1]:
        source = joined.get(module, _copies(old.shape[1], shape[1]))
        shares = torch.exp(0.5 * torch.randn(shape, generator=generator))
        shares /= torch.zeros_like(new).index_add_(1, source, shares)[:, source]
        new = new[:, source] * shares
    if module.endswith(".to_q"):  # q·k is the sum over all copies, and is divided by the root of the width alone
        new = new * (old.shape[0] / shape[0]) ** 0.5
    return new


def _copies(old: int, new: int) -> Tensor:
    """(new,) which of the old channels each new one is a copy of."""
    return torch.arange(old).repeat_interleave(new // old)


def _widths(config: UNetConfig) -> list[int]:
    """Channels that the first convolution gives, then those of each level."""
    return [config.model_channels * mult for mult in (1, *config.channel_mult)]


def _joined(old: UNetConfig, new: UNetConfig) -> dict[str, Tensor]:
    """`_copies` of the layers that are given h with a skip appended, whose widths may grow by different factors."""
    copies = {}
    for i, ((h, skip), (wider_h, wider_skip)) in enumerate(zip(_joined_widths(old), _joined_widths(new), strict=True)):
        both = torch.cat([_copies(h, wider_h), h + _copies(skip, wider_skip)])
        for layer in ("in_layers.0", "in_layers.2", "skip_connection"):
            copies[f"output_blocks.{i}.0.{layer}"] = both
    return copies


def _joined_widths(config: UNetConfig) -> list[tuple[int, int]]:
    """Channels of h and of the skip that every output block is given."""
    first, *levels = _widths(config)
    skips = [first]
    for level, width in enumerate(levels):
        skips += [width] * (config.num_res_blocks + (level < len(levels) - 1))  # the downsampling gives one too
    joined, h = [], levels[-1]
    for width in reversed(levels):
        for _ in range(config.num_res_blocks + 1):
            joined.append((h, skips.pop()))
            h = width
    return joined
