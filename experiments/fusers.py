"""Kinds of fuser compared in the miniature: each from nothing, behind a tokenizer that is taught already.

    python -m experiments.fusers gatedSA train scenes-first --out runs/gatedSA --seed 0 --steps 2000
    python -m experiments.fusers gatedSA evaluate scenes --adapter runs/gatedSA/adapter.safetensors --out runs/scenes

What follows KIND is train.py's command or evaluate.py's, with all of their flags but --fuser-type and, in training,
--adapter: the new layers of --seed with the tokenizer of scenes-box-text, or of the adapter that --tokenizer, before
KIND, names, are written to OUT.begin.safetensors and trained from there. So what is compared is how fast layers learn
to read tokens that say what and where. Kinds beside gatedSA and gatedCA are gatedSA with one thing changed, to find out
what it is slow or fast by:

    one-head    one attention head as wide as the channels, instead of the base's 2
    8-heads     8 heads, each a quarter as wide as the base's
    repeated    each grounding token stands 8 times under the softmax that it shares with the visual tokens
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gligen import cli
from gligen.commands import evaluate, train
from gligen.loading import EMBEDDED
from gligen.modules.fusers import FUSERS, Fuser, GatedCrossAttention, GatedSelfAttention, Projected
from gligen.training.presets import TrainConfig, get_preset
from gligen.training.trainable import build_networks, trainable_parameters
from gligen.weights import read_weights
from gligen.weights.write import save_adapter


class OneHead(GatedSelfAttention):
    """Gated self-attention with one head."""

    def __init__(self, dim: int, token_dim: int, num_heads: int) -> None:
        super().__init__(dim, token_dim, 1)


class EightHeads(GatedSelfAttention):
    """Gated self-attention with 8 heads."""

    def __init__(self, dim: int, token_dim: int, num_heads: int) -> None:
        super().__init__(dim, token_dim, 8)


class RepeatedTokens(GatedSelfAttention):
    """Gated self-attention in which every grounding token counts 8 times: log 8 is added to its scores."""

    def project(self, tokens: Tensor) -> Projected:
        return tuple(x.repeat(1, 8, 1) for x in super().project(tokens))  # (B, N, D) -> (B, 8·N, C) each


KINDS: dict[str, type[Fuser]] = {
    "gatedSA": GatedSelfAttention,
    "gatedCA": GatedCrossAttention,
    "one-head": OneHead,
    "8-heads": EightHeads,
    "repeated": RepeatedTokens,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the kind and the command, whose flags are left to the command's own."""
    parser = cli.Parser("experiments.fusers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="with train: adapter for boxes whose tokenizer it begins with (default: scenes-box-text)",
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains or evaluates one kind. Raises as the two commands do."""
    args = build_parser().parse_args(argv)
    fuser_type = "gatedCA" if args.kind == "gatedCA" else "gatedSA"
    FUSERS[fuser_type] = KINDS[args.kind]  # weights have the same shapes, so that files say gatedSA
    if args.command == "evaluate":
        if args.tokenizer:
            raise ValueError("--tokenizer is what training begins with: leave it out of evaluate")
        evaluate.main(args.flags)
        return
    flags = [*args.flags, "--fuser-type", fuser_type]
    train.main([*flags, "--adapter", _begin(flags, args.tokenizer or EMBEDDED / "scenes-box-text.safetensors")])


def _begin(flags: Sequence[str], tokenizer: Path) -> str:
    """Writes what a run with train.py's flags begins with beside its folder, and returns the file's path.

    tokenizer: an adapter for boxes. Raises ValueError for a file that is none, for another mode than box-text, whose
    tokenizer it is, and for an --adapter.
    """
    args = train.build_parser(TrainConfig()).parse_args(flags)
    preset = get_preset(args.preset)
    config = dataclasses.replace(preset, **cli.config_fields(args, preset))
    if config.mode != "box-text" or config.adapter is not None:
        raise ValueError("kinds of fuser are compared from nothing in mode box-text: leave out --adapter and --mode")
    networks = build_networks(config, torch.device("cpu"))
    tensors = {name: parameter.detach() for name, parameter in trainable_parameters(networks).items()}
    taught = read_weights(tokenizer).parts.get("unet", {})
    for name in [name for name in tensors if "position_net." in name]:
        if name not in taught or taught[name].shape != tensors[name].shape:
            raise ValueError(f"{tokenizer} has no {name} of this size: give an adapter for boxes of the miniature")
        tensors[name] = taught[name].read(torch.device("cpu"), torch.float32)
    path = Path(f"{args.out}.begin.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(path, tensors, networks.config)
    return str(path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
