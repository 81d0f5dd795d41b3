"""Data parallelism under torchrun, on one machine or several: every process has the whole model and its own samples.

Gradients are averaged by torch's DistributedDataParallel while the backward pass still runs, and once a step where
several batches make one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gligen import cli

Loss = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Processes:
    """This process's place among those of a run."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor of metrics."""
        if self.count > 1:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def max(self, value: float, device: torch.device) -> float:
        """The largest of all processes' numbers, on every process."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float32, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared)

    def any(self, flag: bool, device: torch.device) -> bool:
        """True on every process if it is on one."""
        return bool(self.max(float(flag), device))

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


class SharedLoss:
    """A loss whose gradients, once its backward pass is over, are the mean over all processes.

    parameters: what trains, the same on every process. loss: of a batch, through them.
    """

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter], group: Processes) -> None:
        self.loss: Loss = loss
        self.parallel: DistributedDataParallel | None = None
        if group.count > 1:
            # every process has made or read the same weights: there is nothing to send before the first gradients
            forward = _Forward(loss, parameters)
            self.parallel = DistributedDataParallel(forward, init_sync=False, gradient_as_bucket_view=True)
            self.loss = self.parallel

    def __call__(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch)

    def keep_local(self) -> AbstractContextManager[Any]:
        """While inside, backward passes add to this process's gradients alone, for the next one outside to average."""
        return nullcontext() if self.parallel is None else self.parallel.no_sync()


class _Forward(nn.Module):
    """The loss as a module's forward pass, which is what DistributedDataParallel wraps. It holds nothing frozen."""

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.loss, self.trained = loss, nn.ParameterList(parameters)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes of torchrun, joined while inside (nccl on CUDA, else gloo); this one alone without torchrun."""
    rank, count = cli.world()
    if count == 1 and "MASTER_ADDR" not in os.environ:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's barrier takes the current one
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count)
    finally:
        dist.destroy_process_group()
