"""EMA copies in Stable Diffusion files: `model_ema.` + the name with every dot dropped.

Dropping dots loses where one number ends and the next begins; the grammar of UNet names brings it back, since
the second index of a block is always one digit and the words inside a block are a closed list.
"""

from __future__ import annotations

import re

PREFIX = "model_ema.diffusion_model"

_RES = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_BLOCK = (
    *(f"{attn}.{word}" for attn in ("attn1", "attn2", "fuser.attn") for word in _ATTENTION),
    *(f"{prefix}{word}" for prefix in ("", "fuser.") for word in _FEED_FORWARD),
    *("norm1", "norm2", "norm3", "fuser.linear", "fuser.norm1", "fuser.norm2"),
)
_TRANSFORMER = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{word}" for word in _BLOCK))
_INSIDE = {  # what may follow a block's two indices
    name.replace(".", ""): name
    for name in (
        "weight",  # input_blocks.0.0 is the convolution itself
        "bias",
        *(f"{word}.{leaf}" for word in (*_RES, *_TRANSFORMER, "op", "conv") for leaf in ("weight", "bias")),
        *(f"transformer_blocks.0.fuser.{gate}" for gate in ("alpha_attn", "alpha_dense")),
    )
}
_PATTERNS = (
    (r"(input_blocks|output_blocks)(\d+)(\d)(\D.*)", lambda m: f"{m[1]}.{m[2]}.{m[3]}.{_INSIDE[m[4]]}"),
    (r"(middle_block)(\d)(\D.*)", lambda m: f"{m[1]}.{m[2]}.{_INSIDE[m[3]]}"),
    (r"(time_embed|out)(\d)(weight|bias)", r"\1.\2.\3"),
    (r"(position_net|downsample_net)(linears|linears_text|linears_image|layers)(\d)(weight|bias)", r"\1.\2.\3.\4"),
    (r"position_net(in_conv)(weight|bias)", r"position_net.\1.\2"),
    (
        r"position_netconvnext_tiny_backbonedownsample_layers(\d)(\d)(weight|bias)",
        r"position_net.convnext_tiny_backbone.downsample_layers.\1.\2.\3",
    ),
    (
        r"position_netconvnext_tiny_backbonestages(\d)(\d+)(dwconv|norm|pwconv1|pwconv2)(weight|bias)",
        r"position_net.convnext_tiny_backbone.stages.\1.\2.\3.\4",
    ),
    (
        r"position_netconvnext_tiny_backbonestages(\d)(\d+)gamma",
        r"position_net.convnext_tiny_backbone.stages.\1.\2.gamma",
    ),
    (r"position_net(null_\w+|pos_embedding|person_embeddings|keypoint_embeddings)", r"position_net.\1"),
)


def ema_name(name: str) -> str:
    """The name under which a UNet tensor's average stands in a Stable Diffusion file."""
    return PREFIX + name.replace(".", "")


def unet_name(ema: str) -> str | None:
    """The inverse of `ema_name`; None for a name that is no UNet's."""
    if not ema.startswith(PREFIX):
        return None
    dotless = ema.removeprefix(PREFIX)
    for pattern, name in _PATTERNS:
        if match := re.fullmatch(pattern, dotless):
            try:
                return name(match) if callable(name) else match.expand(name)
            except KeyError:
                return None
    return None
