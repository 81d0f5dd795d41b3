"""How weights move: AdamW, the learning rate over the steps, and the running average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gligen.training.engine.options import RunConfig


class ParameterGroup(NamedTuple):
    """Parameters by name whose learning rate is `lr_scale` times the run's, with a weight decay of their own."""

    names: Sequence[str]
    lr_scale: float
    weight_decay: float


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], lr: float
) -> torch.optim.AdamW:
    """AdamW, fused where that is known to work; on CUDA it can be recorded, the learning rates being tensors."""
    device = next(iter(parameters.values())).device
    made: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": lr,
            "scale": group.lr_scale,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    optimizer = torch.optim.AdamW(made, fused=device.type in ("cpu", "cuda"), capturable=device.type == "cuda")
    optimizer._warned_capturable_if_run_uncaptured = True  # warming up is no mistake
    if device.type == "cuda":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate from the next step on; a group's own is `scale` times it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["scale"])
        else:
            group["lr"] = lr * group["scale"]


def learning_rate(config: RunConfig, step: int, spent: float = 0.0) -> float:
    """The rate of optimiser step `step`, from 0: a linear rise over the warm-up, then constant or a cosine down to 0.

    spent: share of the run's time that has gone by (`Clock.spent`); the cosine ends with steps or time, the earlier.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return config.lr * rise
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(progress, spent, 0.0))))


class Average:
    """A running average of the trained weights: what is looked at and published, while training goes on beside it.

    Early on it forgets faster, (1 + n) / (10 + n), or the first weights would stay in it for long.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [parameters[n] for n in self.tensors], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The averaged weights stand in the model while inside."""
        trained = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(self.tensors[name])
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.copy_(trained[name])
