"""What a run leaves in its folder, and how it goes on from there.

`checkpoint.safetensors` holds all that the next step depends on: trained weights, AdamW's moments, the average, the
step, the config. There is no random state to keep, since everything random is a function of seed and sample number
(data.py). `adapter.safetensors` is what sample.py takes. Both are written beside and renamed into place, so that an
interrupted or failed write leaves the one before; reading runs no code of the file's.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gligen.config import ModelConfig, to_dict
from gligen.training.optim import Average
from gligen.training.presets import TrainConfig
from gligen.weights import LazyTensor, hold, save_adapter
from gligen.weights.safetensors_file import read_safetensors, write_safetensors

CHECKPOINT, ADAPTER, LOG, CONFIG = "checkpoint.safetensors", "adapter.safetensors", "log.jsonl", "config.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
FORMAT = "gligen-training"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. The loss is summed since the last line of the log, so that a resumed log has no seam."""

    step: int = 0  # optimiser steps done
    loss_sum: float = 0.0
    loss_count: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's contents, tensors still in the file."""

    path: Path
    progress: Progress
    config: dict[str, Any]
    frozen: str  # checksum of the frozen weights
    samples_per_step: int
    tensors: dict[str, LazyTensor]


def check_folder(folder: Path) -> None:
    """Makes the folder. Raises ValueError, one line, if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder '{folder}' cannot be written: {error.strerror}") from None


def save_checkpoint(
    folder: Path,
    *,
    progress: Progress,
    config: TrainConfig,
    model: ModelConfig,
    frozen: str,
    samples_per_step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> None:
    """Writes checkpoint, then adapter (of the averaged weights where there are some).

    Raises OSError, one line, where it cannot; what was there before is then still whole.
    """
    tensors = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        moments = optimizer.state.get(p, {})
        tensors |= {f"{kind}.{name}": moments[kind] for kind in MOMENTS if kind in moments}
    averaged = average.tensors if average else {}
    tensors |= {f"average.{name}": tensor for name, tensor in averaged.items()}
    facts = {
        "format": FORMAT,
        "progress": json.dumps(dataclasses.asdict(progress)),
        "config": json.dumps(to_dict(config)),
        "frozen": frozen,
        "samples_per_step": str(samples_per_step),
    }
    published = averaged or {name: p.detach() for name, p in parameters.items()}
    try:
        write_safetensors(folder / CHECKPOINT, hold(tensors), facts)
        save_adapter(folder / ADAPTER, published, model)
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        kept = read_checkpoint(folder)
        before = f"the checkpoint of step {kept.progress.step} is kept" if kept else "there is no earlier one"
        raise OSError(
            f"step {progress.step} cannot be saved to '{folder}': {why}; {before}: "
            "mend it and run the same command again"
        ) from error


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The folder's checkpoint, or None if there is none. Raises ValueError, one line, for one that is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    tensors, facts = read_safetensors(path)
    try:
        return Checkpoint(
            path=path,
            progress=Progress(**json.loads(facts["progress"])),
            config=json.loads(facts["config"]),
            frozen=facts["frozen"],
            samples_per_step=int(facts["samples_per_step"]),
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no checkpoint of a training run ({error}): remove it or use --no-resume") from error


def check_same_run(checkpoint: Checkpoint, config: TrainConfig, frozen: str, samples_per_step: int) -> None:
    """Raises ValueError naming what differs, unless going on with this config is going on with the same run."""
    now = json.loads(json.dumps(to_dict(config)))
    differing = []
    for field in dataclasses.fields(TrainConfig):
        is_free = field.metadata["is_free"] and not (field.name == "steps" and config.lr_schedule == "cosine")
        before = checkpoint.config.get(field.name, field.default)  # an older run knew fewer
        if not is_free and before != now[field.name]:
            differing.append(f"{field.name} {before} (now {now[field.name]})")
    if checkpoint.samples_per_step != samples_per_step:
        differing.append(f"samples a step {checkpoint.samples_per_step} (now {samples_per_step})")
    if checkpoint.frozen != frozen:
        differing.append("another base model")
    if differing:
        raise ValueError(
            f"'{checkpoint.path.parent}' holds a run with {', '.join(differing)}: give the same, another --out, or "
            "--no-resume to start over"
        )


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> None:
    """Puts a checkpoint's weights, moments and average where they were. Raises ValueError for one that does not fit."""

    def read(kind: str, name: str, like: Tensor) -> Tensor:
        tensor = checkpoint.tensors.get(f"{kind}.{name}")
        if tensor is None or tensor.shape != tuple(like.shape):
            raise ValueError(f"{checkpoint.path}: its {kind} of {name} is missing or of another shape")
        return tensor.read(like.device)

    for name, p in parameters.items():
        p.copy_(read("weights", name, p))
        if average is not None:
            average.tensors[name] = read("average", name, p)
        if checkpoint.progress.step:
            step = torch.tensor(float(checkpoint.progress.step), device=p.device)  # where fused AdamW counts
            optimizer.state[p] = {"step": step, **{kind: read(kind, name, p) for kind in MOMENTS}}
