"""Runs small enough to train in tests."""

from __future__ import annotations

import dataclasses
import json
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
