"""Several processes on one step: DistributedDataParallel against averaging by hand once the backward pass is over.

    python -m benchmarks.processes [--processes 2]

A row of each: seconds a step (the fastest of the repeats, on the clock), of the grounded model on a CPU, each process
with one thread and its own samples, in turn in one run. By hand means what an earlier version did: gradients in a few
flat messages, none of which is sent before all of them are there.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks import common, train
from gligen.training.engine.loader import StepBatches
from gligen.training.engine.loop import Loop
from gligen.training.engine.processes import Processes, SharedLoss

BUCKET = 2**24  # numbers in one message, by hand
FIELDS = {"dtype": "float32", "compile": False, "graphs": False, "channels_last": True, "keep": True}


def average_by_hand(parameters: list[nn.Parameter], count: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    while gradients:
        taken: list[Tensor] = []
        while gradients and sum(g.numel() for g in taken) < BUCKET:
            taken.append(gradients.pop(0))
        flat = torch.cat([g.flatten() for g in taken])
        dist.all_reduce(flat)
        flat /= count
        for gradient, part in zip(taken, flat.split([g.numel() for g in taken]), strict=True):
            gradient.copy_(part.view_as(gradient))


def by_hand(loop: Loop, group: Processes) -> None:
    """Puts averaging by hand into a loop that was built for one process."""
    step = loop.optimizer_step
    move = step.optimizer.step

    def averaged() -> None:
        average_by_hand(step.parameters, group.count)
        move()

    step.optimizer.step = averaged  # type: ignore[method-assign, assignment]


def work(rank: int, count: int, port: int, args: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, device = Processes(rank, count), torch.device("cpu")
    config = common.MODELS[args.model or "tiny"]
    times: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        loops = {}
        for name in ("averaged by hand", "DistributedDataParallel"):
            loop = train.build(config, device, Path(folder), dict(FIELDS), args.batch_size)
            if name == "averaged by hand":
                by_hand(loop, group)
            else:
                loop.optimizer_step.loss = SharedLoss(loop.task.loss, loop.parameters.values(), group)
            loops[name] = loop
        made = StepBatches(batches=loop.task.batches, batch_size=args.batch_size, rank=rank, processes=count)
        batch = loop.task.prepare(made[0], 0.0)
        with mock.patch.object(type(loop.task), "prepare", lambda self, batch, progress: batch):
            for _ in range(args.repeats):
                for name, loop in loops.items():
                    loop.train_step(iter([batch]))
                    dist.barrier()
                    began = time.perf_counter()
                    for _ in range(args.steps):
                        loop.train_step(iter([batch])).read()
                    took = (time.perf_counter() - began) / args.steps
                    times[name] = min(times.get(name, took), took)
    if rank == 0:
        torch.set_num_threads(1)
        numbers = sum(p.numel() for p in loop.parameters.values())
        rows = common.Rows("processes", args, device, model=args.model or "tiny", batch=args.batch_size)
        for name, seconds in times.items():
            rows.write(how=name, processes=count, parameters=numbers, seconds_per_step=seconds)
    dist.destroy_process_group()


def main() -> None:
    parser = common.parser(__doc__, steps=5, repeats=6, batch_size=2)
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    args = parser.parse_args()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(work, (args.processes, port, args), nprocs=args.processes)


if __name__ == "__main__":
    main()
