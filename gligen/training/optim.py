"""How weights move: AdamW with the gates in a group of their own, the learning rate over the steps, and the average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gligen.training.presets import TrainConfig
from gligen.training.step_graph import make_optimizer, set_group_rate
from gligen.training.trainable import GATES


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups, gates last; `scale` of a group multiplies its learning rate."""
    lr = config.lr
    gates = [p for name, p in parameters.items() if name.endswith(GATES)]
    others = [p for name, p in parameters.items() if not name.endswith(GATES)]
    groups = [
        {"params": others, "lr": lr, "scale": 1.0, "weight_decay": config.weight_decay},
        {"params": gates, "lr": lr, "scale": config.gate_lr_scale, "weight_decay": 0.0},  # decay would shut them
    ]
    return make_optimizer(groups, next(iter(parameters.values())).device)


def learning_rate(config: TrainConfig, step: int, spent: float = 0.0) -> float:
    """Of optimiser step `step`, from 0: a linear rise over the warm-up, then constant or a cosine down to 0.

    spent: share of the run's time that has gone by (`Clock.spent`); the cosine ends with steps or time, the earlier.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return config.lr * rise
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(progress, spent, 0.0))))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        set_group_rate(group, lr * group["scale"])


class Average:
    """A running average of the trained weights: what is painted with and published, while training goes on beside it.

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
