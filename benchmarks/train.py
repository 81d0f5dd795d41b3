"""Training: images a second, memory and share of the floor, with each speed-up on top of the one before it.

    python -m benchmarks.train [--device cuda] [--model sd] [--batch-size 16]

A row: images a second (the fastest of the repeats of --steps optimiser steps), processor seconds a step, peak memory,
and the share of the floor: the step's arithmetic (forward; backward through activations, and through what trains) at
the matrix-product ceiling measured in the same run. Steps follow each other as in a run, with nobody waiting for one's
numbers. The last row says how fast one process draws scenes; nothing waits for them while workers × that is above
images a second. --miniature measures the embedded base UNet's own training instead.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import common
from gligen.config import ModelConfig
from gligen.device import keep_freed_memory, pick_training_dtype
from gligen.miniature.config import UNetStage
from gligen.miniature.data import Tensors
from gligen.miniature.export import unpack
from gligen.miniature.stage import begun_with, load_trained
from gligen.miniature.unet import UNetTask
from gligen.runtime import to_channels_last
from gligen.training.engine.loader import StepBatches
from gligen.training.engine.loop import Loop
from gligen.training.engine.step import WARM_UP
from gligen.training.grounding_task import GroundingTask
from gligen.training.presets import TrainConfig
from gligen.training.trainable import Networks, trainable_parameters


def ladder(device: torch.device, is_compiled: bool, batch_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rungs (name, fields of TrainConfig and `channels_last`, `keep`), each on top of the one before it."""
    is_cuda = device.type == "cuda"
    at: dict[str, Any] = {"dtype": "float32", "compile": False, "graphs": False, "channels_last": False, "keep": False}
    yield "float32, eager", at
    steps: list[tuple[str, bool, dict[str, Any]]] = [
        ("+ bfloat16, rounded from float32 weights", is_cuda, {"dtype": "auto"}),
        ("+ channels last", True, {"channels_last": True}),
        ("+ freed memory is kept", not is_cuda, {"keep": True}),
        ("+ scenes encoded once", True, {"cache": batch_size}),
        ("+ compiled blocks", is_compiled, {"compile": True}),
        ("+ steps recorded as one graph", is_cuda, {"graphs": True}),
        ("+ checkpointing (for memory)", True, {"checkpointing": True}),
    ]
    for name, is_there, change in steps:
        if is_there:
            at = at | change
            yield name, at


def build(config: ModelConfig, device: torch.device, folder: Path, fields: dict[str, Any], batch_size: int) -> Loop:
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
    return Loop(GroundingTask(run, networks, folder, dtype=pick_training_dtype(run.dtype, device)), folder)


def floor_seconds(config: ModelConfig, tflops: float) -> float:
    """Floor of one image: forward and backward through activations cost one forward each, the fusers' weights as much
    as they do forward; encoding is left out, since it can be cached."""
    side = config.image_size // config.vae.downsample_factor
    grounded, plain = (common.unet_flops(config.unet, (side, side), is_grounded=on) for on in (True, False))
    return (2 * grounded + (grounded - plain)) / tflops / 1e12


def main() -> None:
    parser = common.parser(__doc__, steps=1, repeats=4, batch_size=4)
    parser.add_argument("--only", action="append", metavar="TEXT", help="rungs whose name holds it; may be repeated")
    parser.add_argument("--miniature", action="store_true", help="the embedded base UNet instead, samples a second")
    args = parser.parse_args()
    device, model, is_compiled = common.choose(args)
    if args.miniature:
        measure_miniature(args, device, is_compiled)
        return
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
        loop = build(config, device, Path(folder), {"channels_last": True, "keep": False}, args.batch_size)
        drawing = StepBatches(batches=loop.task.batches, batch_size=args.batch_size)
        number = itertools.count()
        times = common.seconds(lambda: drawing[next(number)], torch.device("cpu"), args.repeats)
        rows.write(rung="one process draws", images_per_second=args.batch_size / times["own"])


def measure(loop: Loop, args: argparse.Namespace, floor: float) -> dict[str, Any]:
    device = loop.task.device
    made = StepBatches(batches=loop.task.batches, batch_size=args.batch_size)
    is_kept, count = bool(loop.task.batches.cache), 1 + WARM_UP + args.repeats * args.steps
    drawn = [made[k] for k in range(2 if is_kept else count)]  # so that drawing is not in the number
    if device.type == "cuda":
        drawn = [batch.pin_memory() for batch in drawn]  # as the loader does
    batches = iter([drawn[0]] + [drawn[1]] * count) if is_kept else iter(drawn)

    def run() -> None:
        for _ in range(args.steps):
            loop.train_step(batches)

    with common.peak_memory(device) as peak:
        for _ in range(1 + WARM_UP):
            loop.train_step(batches)  # compiles, makes the optimiser's state, and records
        times = {name: each / args.steps for name, each in common.seconds(run, device, args.repeats).items()}
        return {
            "dtype": str(loop.task.dtype).removeprefix("torch."),
            "images_per_second": args.batch_size / times["own"],
            "cpu_seconds_per_step": times["cpu"],
            "wall_seconds_per_step": times["wall"],
            "floor_share": floor * args.batch_size / times["own"],
            "peak_gib": peak(),
        }


def measure_miniature(args: argparse.Namespace, device: torch.device, is_compiled: bool) -> None:
    """Rows of the UNet stage at the embedded sizes, on kept scenes: samples a second of steps as in a run."""
    top = common.ceilings(device, pick_training_dtype("auto", device))
    rows = common.Rows("train_miniature", args, device, model="miniature", batch=args.batch_size, ceiling=top)
    rungs: list[tuple[str, dict[str, Any]]] = [("eager", {"graphs": False})]
    if device.type == "cuda":
        rungs.append(("+ steps recorded as one graph", {"graphs": True}))
    if is_compiled:
        rungs.append(("+ compiled blocks", {"graphs": True, "compile": True}))
    base = Path(__file__).parents[1] / "checkpoints" / "scenes-base.safetensors"
    for name, fields in rungs:
        if args.only and not any(text in name for text in args.only):
            continue
        with TemporaryDirectory() as folder:
            out = Path(folder)
            unpack(base, out)
            sizes = {"batch_size": args.batch_size, "cache": args.batch_size}
            config = UNetStage(**begun_with(out, "unet") | sizes | fields)
            dtype = pick_training_dtype(config.dtype, device)
            stage = UNetTask(config, load_trained(out, "clip"), load_trained(out, "vae"), out, device, dtype)
            loop, made = Loop(stage, out), StepBatches(batches=stage.batches, batch_size=args.batch_size)
            batches = [made[n] for n in range(2)]
            if device.type == "cuda":
                batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]

            def steps(loop: Loop = loop, batch: Tensors = batches[1]) -> None:
                for _ in range(args.steps):
                    loop.train_step(iter([batch]))

            with common.peak_memory(device) as peak:
                for batch in [batches[0]] + [batches[1]] * WARM_UP:
                    loop.train_step(iter([batch]))
                times = common.seconds(steps, device, args.repeats)
                rate = args.batch_size * args.steps / times["own"]
                unet = stage.model.unet
                side = stage.model.image_size // stage.model.vae.downsample_factor
                flops = 3 * common.unet_flops(unet, (side, side), is_grounded=False)  # backward is twice forward
                share = rate * flops / top["tflops"] / 1e12
                rows.write(rung=name, samples_per_second=rate, floor_share=share, peak_gib=peak())


if __name__ == "__main__":
    main()
