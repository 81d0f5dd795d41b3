"""Several processes on one step: the gradients of one process with all of the samples."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gligen.training.engine.optim import ParameterGroup, build_optimizer
from gligen.training.engine.processes import Processes
from gligen.training.engine.step import OptimizerStep


def step_of(group: Processes, *, has_master_weights: bool) -> tuple[nn.Module, OptimizerStep]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    copy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)).bfloat16()
    network = copy if has_master_weights else model
    named = dict(model.named_parameters())

    def loss(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = (network(batch["x"].to(next(network.parameters()).dtype)).float() - batch["y"]).square().mean()
        return error, {"loss": error}

    optimizer = build_optimizer(named, [ParameterGroup(list(named), 1.0, 0.0)], 1e-3)
    copies = list(copy.parameters()) if has_master_weights else None
    return model, OptimizerStep(loss, named.values(), optimizer, copies=copies, group=group)


def batch(first: int, size: int) -> dict[str, Tensor]:
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    return {"x": x[first : first + size], "y": y[first : first + size]}


def work(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for has_master_weights in (False, True):
        model, step = step_of(Processes(rank, 2), has_master_weights=has_master_weights)
        for taken in ([batch(8 * rank, 8)], [batch(16 + 8 * rank, 8), batch(32 + 8 * rank, 8)]):  # accumulated, too
            metrics = step(*taken).read()
            found[f"{has_master_weights} {len(taken)}"] = (metrics, [p.grad for p in model.parameters()])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(work, (port, tmp_path), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for has_master_weights, tolerance in ((False, 1e-6), (True, 2e-2)):  # bfloat16 has 8 bits
        model, step = step_of(Processes(), has_master_weights=has_master_weights)
        for taken in ([batch(0, 16)], [batch(16, 16), batch(32, 16)]):
            metrics = step(*taken).read()
            for found, grads in (each[f"{has_master_weights} {len(taken)}"] for each in two):
                assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-5 if not has_master_weights else 1e-2)
                assert found["grad_norm"] == pytest.approx(
                    metrics["grad_norm"], rel=1e-5 if not has_master_weights else 2e-2
                )
                for ours, one in zip(grads, model.parameters(), strict=True):
                    assert one.grad is not None
                    assert (ours - one.grad).abs().max() <= tolerance * one.grad.abs().max()
            if has_master_weights:
                continue
            for (_, a), (_, b) in zip(
                *([each[f"{has_master_weights} {n}"] for n in (1, 2)] for each in two), strict=True
            ):
                assert all(map(torch.equal, a, b))  # both processes move alike
