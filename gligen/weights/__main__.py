"""`python -m gligen.weights`: what a model file is, and the same weights in another layout."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gligen import cli
from gligen.weights import LAYOUTS

if TYPE_CHECKING:
    from gligen.weights import Weights

log = logging.getLogger("gligen")

DTYPES = ("float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's flags, with a subcommand for each thing it does."""
    parser = cli.Parser(prog="python -m gligen.weights", description=__doc__)
    debug = {"action": "store_true", "help": "show the traceback of an error instead of one line"}
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser("inspect", help="say what a model file or folder holds, without reading its weights")
    inspect.add_argument("file", metavar="FILE", help="a checkpoint, adapter or folder of any known layout")
    inspect.add_argument("--mode", help="the mode, where the file leaves several open")
    inspect.add_argument("--debug", **debug)  # type: ignore[arg-type]  # the stub wants each keyword apart

    convert = commands.add_parser("convert", help="write a model file in another layout")
    convert.add_argument("source", metavar="IN", help="a checkpoint, adapter or folder of any known layout")
    convert.add_argument("target", metavar="OUT", help="the file (diffusers: folder) to write; must not exist")
    convert.add_argument(
        "--to",
        required=True,
        choices=LAYOUTS,
        help="sd or ldm: Stable Diffusion or LDM checkpoint (.ckpt or .safetensors); gligen: the original's .pth; "
        "pruned: grounding only, as node-based UIs exchange it; diffusers: a folder; model, adapter: this project's "
        "own safetensors, whole or grounding only",
    )
    convert.add_argument("--adapter", metavar="FILE", help="GLIGEN weights (or CLIP) to join to IN first")
    convert.add_argument("--mode", help="the mode, where the files leave several open (canny and depth are alike)")
    convert.add_argument("--dtype", choices=DTYPES, help="precision to write; default: as in the file")
    convert.add_argument("--ema", action="store_true", help="take IN's averaged (EMA) UNet weights")
    convert.add_argument("--debug", **debug)  # type: ignore[arg-type]  # as above
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. arguments: by default the process's own. Raises as `gligen.cli.run` reports it."""
    args = build_parser().parse_args(arguments)
    if args.command == "inspect":
        from gligen.weights import read_weights

        print("\n".join(describe(read_weights(args.file, mode=args.mode))))
    else:
        _convert(args)


def _convert(args: argparse.Namespace) -> None:
    import torch

    from gligen.weights import combine, read_weights, write_weights

    weights = read_weights(args.source, mode=None if args.adapter else args.mode, ema=args.ema)
    if args.adapter:
        adapter = read_weights(args.adapter)
        if adapter.kind == "clip":  # the mode is then the source's
            weights = read_weights(args.source, mode=args.mode, ema=args.ema)
        elif args.mode:
            adapter = read_weights(args.adapter, mode=args.mode)
        weights = combine(weights, adapter)
    averaged = (note for note in weights.notes if note.startswith("holds averaged"))
    for line in (*weights.warnings, *weights.unused, *averaged):
        log.warning("%s: %s", weights.path, line)
    write_weights(weights, args.target, args.to, dtype=getattr(torch, args.dtype) if args.dtype else None)
    print(args.target)


def describe(weights: Weights) -> list[str]:
    """The lines that `inspect` prints."""
    from gligen.weights import missing_for_sampling

    lines = [f"file      {weights.path}", f"kind      {_KINDS[weights.kind]}"]
    lines.append(f"mode      {' or '.join(weights.modes) if weights.modes else 'none: not grounded'}")
    for name, tensors in weights.parts.items():
        numbers = sum(t.numel() for t in tensors.values())
        size = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
        lines.append(
            f"part      {name}: {len(tensors)} tensors, {numbers / 1e6:,.2f} million numbers, "
            f"{size / 2**20:,.1f} MiB, {dtypes}"
        )
    lines += [f"config    {line}" for line in _summary(weights)]
    lines += [f"missing   {line}" for line in missing_for_sampling(weights)]
    lines += [f"warning   {line}" for line in weights.warnings]
    lines += [f"note      {line}" for line in weights.notes]
    return lines


_KINDS = {
    "sd": "sd (Stable Diffusion 1 checkpoint)",
    "ldm": "ldm (LDM text-to-image checkpoint)",
    "gligen": "gligen (checkpoint of the original trainer)",
    "pruned": "pruned (GLIGEN's tokenizer and fusers only)",
    "diffusers": "diffusers (folder)",
    "clip": "clip (CLIP model)",
    "model": "model (this project's own)",
    "adapter": "adapter (this project's own)",
}


def _summary(weights: Weights) -> list[str]:
    """One line per part that is there."""
    config, parts, lines = weights.config, weights.parts, []
    unet = config.unet
    if "time_embed.0.weight" in parts.get("unet", {}):
        lines.append(
            f"unet: {unet.model_channels} channels × {unet.channel_mult}, {unet.num_res_blocks} residual blocks, "
            f"attention at 1/{unet.attention_downsamples}, {unet.num_heads} heads, context {unet.context_dim}"
        )
    if unet.grounding is not None:
        g = unet.grounding
        lines.append(f"grounding: {g.fuser_type}, tokens of {g.token_dim}, features of {g.feature_dim}")
    if "vae" in parts:
        vae = config.vae
        lines.append(f"vae: {vae.base_channels} channels × {vae.channel_mult}, latents × {vae.scale_factor}")
    if "text_encoder" in parts:
        t = config.text_encoder
        lines.append(f"text_encoder: {t.kind}, {t.layers} layers, width {t.width}, {t.heads} heads")
    if "image_encoder" in parts and config.image_encoder:
        i = config.image_encoder
        lines.append(f"image_encoder: {i.layers} layers, width {i.width}, {i.image_size} px, shared {i.embed_dim}")
    return lines


def entry() -> int:
    """The command `gligen-weights`."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(entry())
