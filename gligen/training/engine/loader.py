"""Batches, made ahead by worker processes. Numbers run on through accumulated batches and processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gligen.training.engine.task import Batches


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """Batch k of a process: samples that no other process and no other k has, from sample `begin` on.

    Accumulated batches and processes share out what one large batch would hold.
    """

    batches: Batches
    batch_size: int
    rank: int = 0
    processes: int = 1
    begin: int = 0

    def __getitem__(self, k: int) -> Any:
        first = self.begin + (k * self.processes + self.rank) * self.batch_size
        return self.batches.batch(range(first, first + self.batch_size), self.begin)


def pick_workers(workers: int, device: torch.device) -> int:
    """The number of worker processes. -1: 0 on a CPU, which is busy with the model, else two less than cores, up to
    14."""
    if workers >= 0:
        return workers
    return 0 if device.type == "cpu" else max(1, min(14, (os.cpu_count() or 2) - 2))


def iterate(batches: StepBatches, count: int, *, workers: int, pin: bool) -> Iterator[Any]:
    """Batches 0 … count - 1, made ahead by `workers` processes where there are any."""
    rounds = batches.batches.cache // batches.batch_size
    # then an example that comes again comes to the worker that knows it
    workers = next((n for n in range(workers, workers // 2, -1) if rounds % n == 0), workers)
    if workers == 0:
        return (batches[k] for k in range(count))
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Told(batches),  # type: ignore[arg-type]  # it only needs __getitem__
        sampler=range(count),
        batch_size=None,  # what it gives is a batch already
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=4,
        worker_init_fn=_leave_signals_to_parent,
    )
    return _received(loader)


@dataclass(frozen=True)
class _Failed:
    """What went wrong in a worker; torch would make a traceback of it."""

    error: Exception


@dataclass(frozen=True)
class _Told:
    """Batches, or why there is none."""

    batches: StepBatches

    def __getitem__(self, k: int) -> Any:
        try:
            return self.batches[k]
        except (ValueError, OSError) as error:
            return _Failed(error)


def _received(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches. Raises what went wrong in a worker, and OSError, one line, for a worker that died."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError) as error:  # the last two where it dies while it sends
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            why = next(iter(str(error).splitlines()), "nothing more came from it")
            raise OSError(
                "a process that makes batches has died, perhaps for want of memory: the same command goes on from the "
                f"last checkpoint, with fewer --workers if need be ({why})"
            ) from error
        if isinstance(batch, _Failed):
            raise batch.error
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole group; the parent saves first, and workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
