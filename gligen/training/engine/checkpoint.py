"""What a run leaves in its folder, and how it goes on from there.

`checkpoint.safetensors` holds all that the next step depends on: trained weights, AdamW's moments, the average, the
step, the config. There is no random state to keep, since everything random is a function of seed and sample number
(gligen/data/streams.py). It is written beside and renamed into place, so that an interrupted or failed write leaves the
one before; reading runs no code of the file's.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gligen.config import to_dict
from gligen.training.engine.optim import Average
from gligen.training.engine.options import MODEL, RunConfig
from gligen.weights import LazyTensor, hold
from gligen.weights.safetensors_file import read_safetensors, write_safetensors

log = logging.getLogger("gligen")

CHECKPOINT, LOG, CONFIG = "checkpoint.safetensors", "log.jsonl", "config.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
FORMAT = "gligen-run-2"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come. Metrics are summed since the last line of the log, so that a resumed log has no seam."""

    step: int = 0  # optimiser steps done
    samples: int = 0  # taken so far, by all processes: the number of the next one
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    is_done: bool = False  # came to its end, and was measured
    results: dict[str, float] = field(default_factory=dict)  # what was measured then


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's contents, tensors still in the file."""

    path: Path
    progress: Progress
    config: dict[str, Any]
    facts: dict[str, str]  # what else must be the same, such as checksums of frozen weights
    samples_per_step: int
    tensors: dict[str, LazyTensor]

    def published(self) -> dict[str, LazyTensor]:
        """The outcome by name: averaged weights where there is an average, and what was fixed."""
        kinds = ("fixed", "average" if any(name.startswith("average.") for name in self.tensors) else "weights")
        split = [(*name.partition("."), tensor) for name, tensor in self.tensors.items()]
        return {name: tensor for kind, _, name, tensor in split if kind in kinds}


def check_folder(folder: Path) -> None:
    """Makes the folder. Raises ValueError, one line, if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder '{folder}' cannot be written: {error.strerror}") from None


def write_checkpoint(
    folder: Path,
    *,
    progress: Progress,
    config: RunConfig,
    facts: Mapping[str, str],
    samples_per_step: int,
    weights: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the folder's checkpoint. Raises OSError as the disk does; what was there before is then still whole.

    optimizer: of `weights`, whose moments are kept; None where it has made no step.
    """
    tensors = {f"weights.{name}": tensor.detach() for name, tensor in weights.items()}
    tensors |= {f"fixed.{name}": tensor.detach() for name, tensor in fixed.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in (average or {}).items()}
    if optimizer is not None:
        for name, p in weights.items():
            moments = optimizer.state.get(p, {})
            tensors |= {f"{kind}.{name}": moments[kind] for kind in MOMENTS if kind in moments}
    written = {
        "format": FORMAT,
        "progress": json.dumps(dataclasses.asdict(progress)),
        "config": json.dumps(to_dict(config)),
        "facts": json.dumps(dict(facts)),
        "samples_per_step": str(samples_per_step),
    }
    write_safetensors(folder / CHECKPOINT, hold(tensors), written)


@contextmanager
def saving(folder: Path, step: int) -> Iterator[None]:
    """Errors of the disk inside become one line that says what is kept. Raises OSError."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        kept = read_checkpoint(folder)
        before = f"the checkpoint of step {kept.progress.step} is kept" if kept else "there is no earlier one"
        raise OSError(
            f"step {step} cannot be saved to '{folder}': {why}; {before}: mend it and run the same command again"
        ) from error


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The folder's checkpoint, or None if there is none. Raises ValueError, one line, for one that is damaged or of an
    earlier version."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    tensors, facts = read_safetensors(path)
    if facts.get("format") == "gligen-training":
        raise ValueError(f"{path}: this run was begun by an earlier version: finish it there, or use --no-resume")
    try:
        if facts["format"] != FORMAT:
            raise ValueError(f"format is {facts['format']!r}")
        return Checkpoint(
            path=path,
            progress=Progress(**json.loads(facts["progress"])),
            config=json.loads(facts["config"]),
            facts=json.loads(facts["facts"]),
            samples_per_step=int(facts["samples_per_step"]),
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no checkpoint of a training run ({error}): remove it or use --no-resume") from error


def check_same_run(
    checkpoint: Checkpoint, config: RunConfig, facts: Mapping[str, str], samples_per_step: int
) -> list[str]:
    """Sentences on what a run that goes on with this config does otherwise than before, though it is the same run.

    Raises ValueError naming what differs, unless going on with this config is going on with the same run.
    """
    now = json.loads(json.dumps(to_dict(config)))
    differing = []
    for option in dataclasses.fields(config):
        before = checkpoint.config.get(option.name, option.default)
        if checkpoint.progress.step == 0 and option.metadata["group"] != MODEL:
            continue  # nothing was learnt with it
        if not option.metadata["is_free"] and before != now[option.name]:
            differing.append(f"{option.name} {before} (now {now[option.name]})")
    differing += [f"another {name}" for name, value in facts.items() if checkpoint.facts.get(name) != value]
    if differing:
        raise ValueError(
            f"'{checkpoint.path.parent}' holds a run with {', '.join(differing)}: give the same, another --out, or "
            "--no-resume to start over"
        )
    changed = []
    if checkpoint.samples_per_step != samples_per_step:
        changed.append(
            f"a step now takes {samples_per_step} samples instead of {checkpoint.samples_per_step} (--batch-size, "
            "--accumulate, or the number of processes): not what an unbroken run would have learnt"
        )
    if checkpoint.config["steps"] != config.steps and config.lr_schedule == "cosine":
        changed.append(f"the learning rate now falls to 0 at step {config.steps}, not {checkpoint.config['steps']}")
    return changed


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    fixed: Mapping[str, Tensor],
) -> None:
    """Puts a checkpoint's weights, moments and average where they were. Raises ValueError for one that does not fit."""

    def read(kind: str, name: str, like: Tensor) -> Tensor:
        tensor = checkpoint.tensors.get(f"{kind}.{name}")
        if tensor is None or tensor.shape != tuple(like.shape):
            raise ValueError(f"{checkpoint.path}: its {kind} of {name} is missing or of another shape")
        # laid out as the weight is: the fused AdamW goes through both in the order of memory, not of indices
        return torch.empty_like(like).copy_(tensor.read(like.device))

    has_moments = any(name.startswith(f"{MOMENTS[0]}.") for name in checkpoint.tensors)
    for name, tensor in fixed.items():
        tensor.copy_(read("fixed", name, tensor))
    for name, p in parameters.items():
        p.copy_(read("weights", name, p))
        if average is not None:
            average.tensors[name] = read("average", name, p)
        if has_moments:
            step = torch.tensor(float(checkpoint.progress.step), device=p.device)  # where fused AdamW counts
            optimizer.state[p] = {"step": step, **{kind: read(kind, name, p) for kind in MOMENTS}}
