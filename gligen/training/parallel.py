"""Data parallelism under torchrun: every process has the whole model and its own samples.

Gradients are averaged once a step, by hand: the frozen base has none, and what is left fits into a few messages, so
DistributedDataParallel's overlap with the backward pass is not worth its wrapper here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gligen import cli

BUCKET = 2**24  # numbers in one message


@dataclass(frozen=True)
class Processes:
    """This process's place among those of a run."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that writes."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process's gradients become their mean over all processes."""
        if self.count == 1:
            return
        with torch.no_grad():
            bucket: list[Tensor] = []
            for parameter in parameters:
                if parameter.grad is None:  # unused on this process, but perhaps not on others
                    parameter.grad = torch.zeros_like(parameter)
                bucket.append(parameter.grad)
                if sum(g.numel() for g in bucket) >= BUCKET:
                    self._average(bucket)
                    bucket = []
            if bucket:
                self._average(bucket)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor of figures."""
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

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


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
