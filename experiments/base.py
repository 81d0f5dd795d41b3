"""Changes to the miniature's base, one at a time: what would make the caption alone draw the asked shapes?

    python -m experiments.base 8-heads train --out runs/8-heads --batch-size 32 --steps 650
    python -m experiments.base 8-heads measure --out runs/8-heads

The first begins with scenes-base, changes it, and trains all of its UNet with the flags of `python -m gligen.miniature
unet`; the second generates drawn scenes of one object by their captions alone and counts colours and shapes, of scenes-
base with the change where nothing was trained yet. Only these commands know of the change: a run of theirs is not to be
continued or exported by `gligen.miniature`. Kinds:

    same        nothing is changed: what training on does by itself, for deeper
    deeper      a second transformer block at 16², the largest size with attention, begun as an identity
    2-heads     cross-attention begun anew with the base's 2 heads: what the following are to be compared with
    1-head      cross-attention begun anew, one head as wide as the channels
    8-heads     cross-attention begun anew, 8 heads, each a quarter as wide as the base's
    wide        cross-attention begun anew, 2 heads, each twice as wide as the base's
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gligen import cli
from gligen.config import UNetConfig, from_dict
from gligen.data.requests import scene_request
from gligen.data.scenes import Scene, make_scene
from gligen.evaluation.detector import detect
from gligen.loading import EMBEDDED
from gligen.miniature import __main__ as miniature
from gligen.miniature import unet as unet_stage
from gligen.miniature.config import UNetStage
from gligen.miniature.export import unpack
from gligen.miniature.stage import load_trained, save_begun, stage_checkpoint
from gligen.modules.attention import Attention
from gligen.modules.fusers import GateScale
from gligen.modules.transformer import BasicTransformerBlock, BlockConditioning
from gligen.modules.unet import UNetModel
from gligen.pipeline import Pipeline

KIND = "kind.txt"  # in a run's folder
SCENES_SEED = 771  # of the scenes that are asked for: no training or test series has it


class DeeperBlock(BasicTransformerBlock):
    """LDM's block with another one behind it, all of whose residuals begin at zero."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__(dim, num_heads, context_dim)
        self.second = BasicTransformerBlock(dim, num_heads, context_dim)
        for layer in (self.second.attn1.to_out[0], self.second.attn2.to_out[0], self.second.ff.net[-1]):
            _zero(layer)

    def condition(self, context: Tensor, tokens: Tensor | None) -> BlockConditioning:
        """Keys and values of both blocks side by side, (B, M, 2·C) each."""
        both = zip(self.attn2.keys_values(context), self.second.attn2.keys_values(context), strict=True)
        keys, values = (torch.cat(pair, dim=-1) for pair in both)
        return BlockConditioning((keys, values), None)

    def forward(self, visual: Tensor, cond: BlockConditioning, gate_scale: GateScale = 1.0) -> Tensor:
        keys, values = (x.chunk(2, dim=-1) for x in cond.caption)
        visual = super().forward(visual, BlockConditioning((keys[0], values[0]), None))
        return self.second(visual, BlockConditioning((keys[1], values[1]), None))


def deepen(unet: UNetModel) -> None:
    """Gives the transformers at the largest size with attention, on both ways, a second block."""
    config, transformers = unet.config, unet.transformers
    for transformer in (*transformers[: config.num_res_blocks], *transformers[-config.num_res_blocks - 1 :]):
        channels = transformer.proj_in.out_channels
        transformer.transformer_blocks[0] = DeeperBlock(channels, config.num_heads, config.context_dim)


def renew(heads: int, width: int = 1) -> Callable[[UNetModel], None]:
    """Begins cross-attention anew with so many heads in `width` times the channels; its residuals begin at zero."""

    def change(unet: UNetModel) -> None:
        for transformer in unet.transformers:
            dim = transformer.proj_in.out_channels
            attention = Attention(dim, unet.config.context_dim, heads)
            if width > 1:
                attention.to_q = nn.Linear(dim, width * dim, bias=False)
                attention.to_k, attention.to_v = (
                    nn.Linear(unet.config.context_dim, width * dim, bias=False) for _ in range(2)
                )
                attention.to_out = nn.Sequential(nn.Linear(width * dim, dim))
            _zero(attention.to_out[0])
            transformer.block.attn2 = attention

    return change


KINDS: dict[str, Callable[[UNetModel], None]] = {
    "same": lambda unet: None,
    "deeper": deepen,
    "2-heads": renew(2),
    "1-head": renew(1),
    "8-heads": renew(8),
    "wide": renew(2, width=2),
}


def build_unet(kind: str, config: UNetConfig) -> UNetModel:
    """An untrained UNet of the kind."""
    unet = UNetModel(config)
    KINDS[kind](unet)
    return unet


def build_parser() -> argparse.ArgumentParser:
    """The parser of the kind and of --out; flags it does not know are training's."""
    parser = cli.Parser("experiments.base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the stages")
    parser.add_argument("--scenes", type=int, metavar="N", help="that measure asks for (default: 192)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a kind, or measures it. Raises ValueError, one line, for flags that the command does not have."""
    args, flags = build_parser().parse_known_args(argv)
    if args.command == "measure" and flags:
        raise ValueError(f"{flags[0]}: no flag of measure")
    if args.command == "train" and args.scenes is not None:
        raise ValueError("--scenes: no flag of train")
    if "--no-resume" in flags:
        raise ValueError("--no-resume would begin without the base: choose another --out")
    scenes = 192 if args.scenes is None else args.scenes
    if scenes < 1:
        raise ValueError(f"--scenes is {scenes}: give 1 or more")
    unet_stage.UNetModel = lambda config: build_unet(args.kind, config)  # type: ignore[misc,assignment]
    begin(args.kind, args.out)
    if args.command == "train":
        miniature.main(["unet", "--out", str(args.out), *flags])
    else:
        print(measure(args.out, scenes))


def begin(kind: str, out: Path) -> None:
    """Writes the stages of scenes-base into `out`, the UNet changed, to be trained from there; once.

    Raises ValueError, one line, where another kind was begun.
    """
    marker = out / KIND
    if marker.exists():
        if (begun := marker.read_text().strip()) != kind:
            raise ValueError(f"{out} was begun with kind {begun}: choose another --out")
        return
    unpack(EMBEDDED / "scenes-base.safetensors", out)
    state = stage_checkpoint(out, "unet")
    assert state is not None
    config = from_dict(UNetStage, state.config)
    taught = {name.removeprefix("unet."): tensor.read() for name, tensor in state.published().items()}
    torch.manual_seed(0)
    unet = build_unet(kind, config.unet(context_dim=load_trained(out, "clip").config.text_width))
    made = unet.state_dict()
    is_kept = kind in ("same", "deeper")  # cross-attention as it was taught
    unet.load_state_dict(made | {name: tensor for name, tensor in taught.items() if is_kept or ".attn2." not in name})
    save_begun(out, "unet", config, {"unet": unet.state_dict()}, is_done=False, facts=state.facts)
    marker.write_text(kind + "\n")


def measure(out: Path, count: int) -> str:
    """Shares of `count` drawn scenes of one object whose caption alone gives its colour and, of these, its shape."""
    clip, vae, state = load_trained(out, "clip"), load_trained(out, "vae"), stage_checkpoint(out, "unet")
    assert state is not None
    config = dataclasses.replace(from_dict(UNetStage, state.config), cache=0)
    task = unet_stage.UNetTask(config, clip, vae, out / "unet", torch.device("cpu"), torch.float32)
    task.network.load_state_dict({name: tensor.read() for name, tensor in state.published().items()})
    unet = cast(UNetModel, task.network["unet"])
    pipeline = Pipeline(task.model, unet.eval(), task.vae, task.text_encoder)
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = make_scene(SCENES_SEED, index, places=0.0)
        scenes += [scene] if len(scene.objects) == 1 else []
        index += 1
    sampling: dict[str, Any] = {"entities": (), "sampler": "dpmpp", "steps": 20, "guidance": 4.0}
    requests = [dataclasses.replace(scene_request(scene), **sampling) for scene in scenes]
    colours = shapes = 0
    for sample in pipeline.generate(requests, batch_size=32):
        (asked,) = scenes[sample.index[0]].objects
        found = [other for other in detect(np.asarray(sample.image)) if other.color == asked.color]
        colours += bool(found)
        shapes += any(other.shape == asked.shape for other in found)
    share = shapes / colours if colours else 0.0
    spread = math.sqrt(share * (1 - share) / max(colours, 1))
    return (
        f"step {state.progress.step}: of {count} objects {colours} in their colour, of these {shapes} in their shape: "
        f"{share:.3f} ± {spread:.3f}"
    )


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


if __name__ == "__main__":
    sys.exit(cli.run(main))
