"""diffusers' names of the UNet and the VAE on the one side, LDM's (ours) on the other.

LDM numbers its blocks through (`input_blocks.7`), diffusers by level (`down_blocks.2.resnets.0`); which is which
follows from the number of levels and of residual blocks per level, and those from the names themselves. Inside
transformers, fusers and `position_net` the names agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gligen.weights.tensors import LazyTensor, reshape

Tensors = dict[str, LazyTensor]

_RESNET = {  # LDM's UNet residual block -> diffusers
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {theirs: ours for ours, theirs in _RESNET.items()}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The way in which a UNet's blocks are counted.

    attention: per level of the way up (deepest first), whether transformers stand there: LDM numbers an
    upsampler behind the transformer if there is one.
    """

    levels: int
    num_res_blocks: int
    attention: tuple[bool, ...]


def ldm_grid(names: Iterable[str]) -> Grid:
    """The grid of a UNet under LDM's names. Raises ValueError if they are not one's."""
    names = set(names)
    downs = sorted(
        int(match[1]) for name in names if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    outputs = 1 + max((int(n.split(".")[1]) for n in names if n.startswith("output_blocks.")), default=-1)
    levels = len(downs) + 1
    per_level = outputs // levels
    if outputs == 0 or outputs % levels or downs != [per_level * i for i in range(1, levels)]:
        raise ValueError(f"{len(downs)} downsamplers and {outputs} output blocks do not make a UNet")
    attention = tuple(
        any(name.startswith(f"output_blocks.{level * per_level}.1.transformer_blocks.") for name in names)
        for level in range(levels)
    )
    return Grid(levels=levels, num_res_blocks=per_level - 1, attention=attention)


def diffusers_grid(names: Iterable[str]) -> Grid:
    """The grid of a UNet under diffusers' names."""
    names = set(names)
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("down_blocks.")}
    resnets = {int(name.split(".")[3]) for name in names if name.startswith("down_blocks.0.resnets.")}
    if not blocks or not resnets:
        raise ValueError("no down_blocks with resnets: not a UNet of diffusers")
    attention = tuple(
        any(name.startswith(f"up_blocks.{level}.attentions.") for name in names) for level in sorted(blocks)
    )
    return Grid(levels=len(blocks), num_res_blocks=len(resnets), attention=attention)


def unet_name_to_diffusers(name: str, grid: Grid) -> str:
    """One name, LDM -> diffusers; unknown names come back unchanged."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    parts = name.split(".")
    per_level = grid.num_res_blocks + 1
    if parts[0] == "middle_block":
        return f"mid_block.{_MIDDLE[parts[1]]}.{_inner(parts[2:], _RESNET)}"
    if parts[0] not in ("input_blocks", "output_blocks"):
        return name
    way = "down" if parts[0] == "input_blocks" else "up"
    level, index = divmod(int(parts[1]) - (way == "down"), per_level)  # input block 0 is the first convolution
    if parts[3] in ("op", "conv"):
        return f"{way}_blocks.{level}.{way}samplers.0.conv.{parts[4]}"
    kind = "resnets" if parts[2] == "0" else "attentions"
    return f"{way}_blocks.{level}.{kind}.{index}.{_inner(parts[3:], _RESNET)}"


def unet_name_to_ldm(name: str, grid: Grid) -> str:
    """One name, diffusers -> LDM; the inverse of `unet_name_to_diffusers`."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    parts = name.split(".")
    per_level = grid.num_res_blocks + 1
    if parts[0] == "mid_block":
        place = {theirs: ours for ours, theirs in _MIDDLE.items()}[".".join(parts[1:3])]
        return f"middle_block.{place}.{_inner(parts[3:], _RESNET_BACK)}"
    if parts[0] not in ("down_blocks", "up_blocks"):
        return name
    level, kind, index = int(parts[1]), parts[2], int(parts[3])
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0.op.{parts[5]}"
    if kind == "upsamplers":
        last = (level + 1) * per_level - 1
        return f"output_blocks.{last}.{2 if grid.attention[level] else 1}.conv.{parts[5]}"
    block = f"input_blocks.{1 + level * per_level + index}"
    if parts[0] == "up_blocks":
        block = f"output_blocks.{level * per_level + index}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{_inner(parts[4:], _RESNET_BACK)}"


def _inner(parts: list[str], table: Mapping[str, str]) -> str:
    """The rest of a name inside a block: residual blocks' words are translated, transformers' agree."""
    head, leaf = ".".join(parts[:-1]), parts[-1]
    return f"{table.get(head, head)}.{leaf}" if head else leaf


def unet_to_diffusers(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """LDM's UNet under diffusers' names; no tensor changes."""
    grid = ldm_grid(tensors)
    return {unet_name_to_diffusers(name, grid): t for name, t in tensors.items()}


def unet_to_ldm(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """The inverse of `unet_to_diffusers`."""
    grid = diffusers_grid(tensors)
    return {unet_name_to_ldm(name, grid): t for name, t in tensors.items()}


_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION_BACK = {theirs: ours for ours, theirs in _VAE_ATTENTION.items()} | {
    "query": "q",  # diffusers before 0.17
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_VAE_WORDS = (  # LDM's and diffusers', either way in this order
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    ("encoder.down.", "encoder.down_blocks."),
    ("decoder.up.", "decoder.up_blocks."),  # whose levels are counted from the other end
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
)


def vae_to_diffusers(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """LDM's VAE as AutoencoderKL; the attention's 1×1 convolutions become linear layers."""
    return _vae(tensors, _VAE_WORDS, _VAE_ATTENTION, kernel=())


def vae_to_ldm(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """The inverse of `vae_to_diffusers`; old and new names of the attention are both known."""
    return _vae(tensors, [(theirs, ours) for ours, theirs in _VAE_WORDS], _VAE_ATTENTION_BACK, kernel=(1, 1))


def _vae(
    tensors: Mapping[str, LazyTensor],
    words: Iterable[tuple[str, str]],
    attention: Mapping[str, str],
    kernel: tuple[int, ...],
) -> Tensors:
    """A VAE under the names that `words` and, within its attention, `attention` lead to.

    kernel: the sizes behind the attention's projections.
    """
    levels = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"encoder\.down\w*\.(\d+)\.", name))), default=0)
    out: Tensors = {}
    for name, tensor in tensors.items():
        for here, there in words:
            name = name.replace(here, there)
        name = re.sub(r"^(decoder\.up\w*)\.(\d+)", lambda match: f"{match[1]}.{levels - 1 - int(match[2])}", name)
        if match := re.fullmatch(r"(.+\.mid(?:\.attn_1|_block\.attentions\.0))\.(.+)\.(\w+)", name):
            name = f"{match[1]}.{attention.get(match[2], match[2])}.{match[3]}"
            if len(tensor.shape) > 1:
                tensor = reshape(tensor, (*tensor.shape[:2], *kernel))
        out[name] = tensor
    return out
