"""Batches made ahead by workers: what goes wrong in one is one line in the run."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gligen.training.engine.loader import StepBatches, iterate


@dataclass(frozen=True)
class Numbers:
    """Samples that are their own numbers; one of them is bad, or kills who makes it."""

    bad: int = -1
    deadly: int = -1
    cache: int = 0

    def batch(self, numbers: range, begin: int) -> Tensor:
        if self.bad in numbers:
            raise ValueError(f"sample {self.bad} is bad: mend it")
        if self.deadly in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(list(numbers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_no_sample_is_repeated_or_lost(workers: int, processes: int) -> None:
    taken: list[int] = []
    for rank in range(processes):
        parts = StepBatches(batches=Numbers(), batch_size=3, rank=rank, processes=processes, begin=6)
        taken += [n for batch in iterate(parts, 4, workers=workers, pin=False) for n in batch.tolist()]
    assert sorted(taken) == list(range(6, 6 + 12 * processes))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_one_line_wherever_it_is_made(workers: int) -> None:
    batches = iterate(StepBatches(batches=Numbers(bad=5), batch_size=2), 9, workers=workers, pin=False)
    assert next(batches).tolist() == [0, 1]
    assert next(batches).tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"^sample 5 is bad: mend it$"):
        next(batches)


def test_a_worker_that_dies_is_one_line() -> None:
    batches = iterate(StepBatches(batches=Numbers(deadly=5), batch_size=2), 9, workers=1, pin=False)
    with pytest.raises(OSError, match=r"^a process that makes batches has died.*goes on from the last checkpoint"):
        list(batches)
