"""What can be set of every training run, whatever the network. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from gligen.fields import MAX_SEED

MODEL, DATA, OBJECTIVE, OPTIMISER, RUN = "model", "data", "objective", "optimiser", "run"


def option(default: Any, help: str, group: str, *, metavar: str | None = None, is_free: bool = False) -> Any:
    """A field with its default, the unit or reason that --help shows, and its group.

    is_free: does not change what is learnt from one step to the next, so that a resumed run may have another value.
    """
    return field(default=default, metadata={"help": help, "group": group, "metavar": metavar, "is_free": is_free})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whatever the network. `__post_init__` raises ValueError, one line, for what cannot work."""

    lr: float = option(1e-3, "learning rate after warm-up, AdamW", OPTIMISER)
    weight_decay: float = option(0.0, "AdamW's decay", OPTIMISER)
    warmup_steps: int = option(200, "steps over which the learning rate rises from 0", OPTIMISER)
    lr_schedule: Literal["constant", "cosine"] = option(
        "cosine", "after warm-up; cosine falls to 0 at --steps, or with --minutes when they are over", OPTIMISER
    )
    clip_norm: float = option(1.0, "gradients are scaled down to this norm; 0 never", OPTIMISER)
    accumulate: int = option(1, "batches whose gradients make one step", OPTIMISER, is_free=True)
    ema_decay: float = option(
        0.999, "what is kept is a running average of the weights with this decay; 0 is off", OPTIMISER
    )

    steps: int = option(1000, "optimiser steps in all, those of earlier runs in --out included", RUN, is_free=True)
    minutes: float = option(
        0.0,
        "minutes from the call's start after which training ends, however few the steps; 0: no limit",
        RUN,
        is_free=True,
    )
    batch_size: int = option(32, "samples a step, of each process, before accumulation", RUN, is_free=True)
    seed: int = option(0, "of the first weights, the data and the noise", RUN)
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu", RUN, is_free=True)
    dtype: str = option(
        "auto", "of the computation; weights stay float32. auto (bfloat16 on CUDA), float32 or bfloat16", RUN
    )
    compile: bool = option(False, "torch.compile the repeated blocks, which takes minutes at first", RUN, is_free=True)
    graphs: bool = option(
        True,
        "on CUDA, one process: record a step as one graph, a single launch instead of thousands",
        RUN,
        is_free=True,
    )
    checkpointing: bool = option(
        False, "compute each block's insides again for its gradients instead of keeping them", RUN, is_free=True
    )
    attention: str | None = option(
        None, "how attention is computed (default: torch's own choice)", RUN, metavar="NAME", is_free=True
    )
    workers: int = option(
        -1, "processes that make batches ahead; 0 makes them in between; -1 is 0 on a CPU, else up to 14", RUN,
        is_free=True,
    )  # fmt: skip
    save_every: int = option(1000, "steps between checkpoints; 0 only at the end", RUN, is_free=True)
    log_every: int = option(50, "steps between lines of log.jsonl", RUN, is_free=True)

    def __post_init__(self) -> None:
        self._one_of("lr_schedule", "constant", "cosine")
        self._one_of("dtype", "auto", "float32", "bfloat16")
        for name in ("batch_size", "accumulate", "log_every"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("steps", "warmup_steps", "save_every", "minutes", "weight_decay", "clip_norm"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        self._require("seed", 0 <= self.seed < MAX_SEED, f"0 to {MAX_SEED - 1}")
        self._require("lr", 0 < self.lr <= 1, "a number above 0, up to 1; usual ones are 1e-5 to 1e-3")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0, or a decay below 1 such as 0.999")
        self._require("workers", self.workers >= -1, "-1 or more")

    def lines(self) -> list[str]:
        """Every field and its value, a line for each group of them, as --help groups them."""
        groups: dict[str, list[str]] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            groups.setdefault(option.metadata["group"], []).append(f"{option.name} {text or 'none'}")
        return [f"{group}: {', '.join(values)}" for group, values in groups.items()]

    def _one_of(self, name: str, *known: str) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ValueError(f"{name} is {value!r}: the known ones are {', '.join(known)}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}: give {wanted}")

    def _require_shares(self, *names: str) -> None:
        for name in names:
            self._require(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
