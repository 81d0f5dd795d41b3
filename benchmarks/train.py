"""Training: images a second, memory and share of the floor, with each speed-up on top of the one before it.

    python -m benchmarks.train [--device cuda] [--model sd] [--batch-size 16]

A row: images a second (the fastest of the repeats of one optimiser step), processor seconds a step, peak memory, and
the share of the floor: the step's arithmetic (forward; backward through activations, and through what trains) at the
matrix-product ceiling measured in the same run. The last row says how fast one process draws scenes; nothing waits for
them while workers × that is above images a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import common
from gligen.config import ModelConfig
from gligen.runtime import keep_freed_memory, pick_training_dtype, to_channels_last
from gligen.training.data import Batch, StepBatches
from gligen.training.presets import TrainConfig
from gligen.training.trainable import Networks, trainable_parameters
from gligen.training.trainer import Trainer


def ladder(device: torch.device, is_compiled: bool, batch_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields of TrainConfig and `channels_last`, `keep`), each on top of the one before it."""
    is_cuda = device.type == "cuda"
    at: dict[str, Any] = {"dtype": "float32", "compile": False, "channels_last": False, "keep": False}
    yield "float32, eager", at
    steps: list[tuple[str, bool, dict[str, Any]]] = [
        ("+ bfloat16 autocast, frozen weights in bfloat16", is_cuda, {"dtype": "auto"}),
        ("+ channels last", True, {"channels_last": True}),
        ("+ freed memory is kept", not is_cuda, {"keep": True}),
        ("+ scenes encoded once", True, {"cache": batch_size}),
        ("+ compiled blocks", is_compiled, {"compile": True}),
        ("+ checkpointing (for memory)", True, {"checkpointing": True}),
    ]
    for name, is_there, change in steps:
        if is_there:
            at = at | change
            yield name, at


def build(config: ModelConfig, device: torch.device, folder: Path, fields: dict[str, Any], batch_size: int) -> Trainer:
    fields = dict(fields)
    has_channels_last, keeps = fields.pop("channels_last"), fields.pop("keep")
    if keeps:
        keep_freed_memory()
    grounding = config.unet.grounding
    assert grounding is not None
    options: dict[str, Any] = {
        "hidden_dim": grounding.hidden_dim,
        "batch_size": batch_size,
        "clip_norm": 1.0,
        "ema_decay": 0.999,
    }
    run = TrainConfig(**options, warmup_steps=0, diagnose_every=0, preview_every=0, device=str(device), **fields)
    networks = Networks(config, *common.networks(config, device))
    for _, network in networks.modules():
        if has_channels_last:
            to_channels_last(network)
    for parameter in trainable_parameters(networks).values():
        parameter.requires_grad_(True)
    return Trainer(run, networks, folder, dtype=pick_training_dtype(run.dtype, device))


def floor_seconds(config: ModelConfig, tflops: float) -> float:
    """Of one image: forward and backward through activations cost one forward each, the fusers' weights as much as
    they do forward; encoding is left out, since it can be cached."""
    side = config.image_size // config.vae.downsample_factor
    grounded, plain = (common.unet_flops(config.unet, (side, side), is_grounded=on) for on in (True, False))
    return (2 * grounded + (grounded - plain)) / tflops / 1e12


def main() -> None:
    parser = common.parser(__doc__, steps=1, repeats=4, batch_size=4)
    parser.add_argument("--only", action="append", metavar="TEXT", help="rungs whose name holds it; may be repeated")
    args = parser.parse_args()
    device, model, is_compiled = common.choose(args)
    config = common.MODELS[model]
    top = common.ceilings(device, pick_training_dtype("auto", device))
    rows = common.Rows("train", args, device, model=model, batch=args.batch_size, ceiling=top)
    floor = floor_seconds(config, top["tflops"])
    with TemporaryDirectory() as folder:
        for name, fields in ladder(device, is_compiled, args.batch_size):
            if args.only and not any(text in name for text in args.only):
                continue
            rows.write(rung=name, **measure(build(config, device, Path(folder), fields, args.batch_size), args, floor))
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if args.only:
            return
        trainer = build(config, device, Path(folder), {"channels_last": True, "keep": False}, args.batch_size)
        drawing = StepBatches(source=dataclasses.replace(trainer.source), batch_size=args.batch_size)
        number = itertools.count()
        times = common.seconds(lambda: drawing[next(number)], torch.device("cpu"), args.repeats)
        rows.write(rung="one process draws", images_per_second=args.batch_size / times["own"])


def measure(trainer: Trainer, args: argparse.Namespace, floor: float) -> dict[str, Any]:
    device = trainer.objective.device
    made = StepBatches(source=trainer.source, batch_size=args.batch_size)
    batches: Iterator[Batch] = (made[k] for k in itertools.count())
    drawn = [next(batches) for _ in range(args.repeats + 2)]  # so that drawing is not in the figure

    def step() -> None:
        trainer.train_step(iter([drawn[-1]] if trainer.config.cache else [drawn.pop()]))

    with common.peak_memory(device) as peak:
        for _ in range(2):
            step()  # compiles, and makes the optimiser's state
        times = common.seconds(step, device, args.repeats)
        return {
            "dtype": str(trainer.objective.dtype).removeprefix("torch."),
            "images_per_second": args.batch_size / times["own"],
            "cpu_seconds_per_step": times["cpu"],
            "wall_seconds_per_step": times["wall"],
            "floor_share": floor * args.batch_size / times["own"],
            "peak_gib": peak(),
        }


if __name__ == "__main__":
    main()
