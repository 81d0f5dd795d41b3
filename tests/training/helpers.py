"""Runs small enough to train in tests."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gligen.training.batches import GroundingBatches
from gligen.training.data import open_data
from gligen.training.engine.loop import Loop
from gligen.training.grounding_task import GroundingTask
from gligen.training.presets import TrainConfig, get_preset
from gligen.training.trainable import Networks, build_networks
from gligen.weights import save_model
from tests.generated import generated_base

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "hidden_dim": 32,
    "warmup_steps": 0,
    "log_every": 1,
    "save_every": 0,
    "diagnose_every": 0,
    "preview_every": 0,
    "ema_decay": 0.0,
    "map_size": 64,
    "map_depths": (1, 1, 1, 1),
    "map_dims": (8, 8, 16, 16),
    "device": "cpu",
    "dtype": "float32",
}


def write_base(folder: Path) -> Path:
    """The generated base for pictures of 32 pixels, as a file."""
    path = folder / "base.safetensors"
    config, parts = generated_base()
    save_model(path, parts, dataclasses.replace(config, image_size=32))
    return path


def quick(base: Path, preset: str = "scenes-box-text", **fields: Any) -> TrainConfig:
    return dataclasses.replace(get_preset(preset), **{**QUICK, "base": str(base), **fields})


def batches_of(config: TrainConfig, networks: Networks | None = None) -> GroundingBatches:
    return open_data(config, (networks or build_networks(config, CPU)).config).training


def loop_of(
    config: TrainConfig, folder: Path, networks: Networks | None = None, dtype: torch.dtype = torch.float32
) -> Loop:
    networks = networks or build_networks(config, CPU)
    return Loop(GroundingTask(config, networks, folder, dtype=dtype), folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """A log's lines without what a clock says."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(folder)]


def flags(base: Path, out: Path, **fields: object) -> list[str]:
    """The command line of `quick`."""
    given = ["scenes-box-text", "--out", str(out), "--base", str(base)]
    for name, value in {**QUICK, **fields}.items():
        words = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        given += [f"--{name.replace('_', '-')}", *words]
    return given


def start(code: str, arguments: list[str], **environment: str) -> subprocess.Popen:
    """A Python process that runs `code` on these arguments, with as many threads as this one (sums depend on it)."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


PLAIN = (
    "import sys; from gligen import cli; from gligen.commands import train; sys.exit(cli.run(train.main, sys.argv[1:]))"
)
KILLED_IN_STEP_6 = """
import os, signal, sys
from gligen.commands import train
from gligen.training.engine.loop import Loop
train_step = Loop.train_step
def killed_in_step_6(self, batches):
    result = train_step(self, batches)
    if self.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Loop.train_step = killed_in_step_6
train.main(sys.argv[1:])
"""
