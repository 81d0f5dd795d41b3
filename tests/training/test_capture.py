"""What a recorded step may do, seen on tensors that only pretend to be on CUDA: so without a GPU, and forward only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gligen.training.grounding_task as task_module
from gligen.training.engine.loader import StepBatches
from gligen.training.engine.step import map_tensors
from tests.training.helpers import loop_of, quick, write_base

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="steps are recorded for real where there is a GPU")
PRETENDED = FakeTensorMode()  # one for all: what is kept by device is kept between tests
WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class HostWatch(TorchDispatchMode):
    """Notes what touches a tensor of the host, or waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, made)) if isinstance(each, torch.Tensor)]
        if func in WAITING or any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return made


def move(module: nn.Module) -> None:
    """Weights and buffers that pretend to be on CUDA."""
    for layer in module.modules():
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(moved, False) if tensors is layer._parameters else moved


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


KINDS = ["box-text", "keypoint", "sem", "depth", "hed", "inpaint-box-text", "box-text-image"]


@pytest.mark.parametrize(("kind", "dtype"), [("box-text", torch.float32), *((kind, torch.bfloat16) for kind in KINDS)])
def test_a_step_asks_the_host_for_nothing(
    kind: str, dtype: torch.dtype, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_module, "keeps_master_weights", lambda device, dtype: dtype != torch.float32)
    config = quick(base, f"scenes-{kind}", weighting="x0")
    task = loop_of(config, tmp_path, dtype=dtype).task
    batch = task.objective.encode(StepBatches(batches=task.batches, batch_size=2)[0])
    with PRETENDED, torch.no_grad():
        for _, module in task.networks.modules():
            move(module)
        objective = task.objective
        objective.device = torch.device("cuda", 0)
        objective.no_caption = torch.empty(objective.no_caption.shape, device="cuda")
        assert objective.weights is not None
        objective.weights = torch.empty(objective.weights.shape, device="cuda")
        moved = map_tensors(batch, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        task.loss(moved)  # tables are made once
        with HostWatch() as watch:
            task.loss(moved)
        assert watch.found == []
        with HostWatch() as watch:  # it does see a copy
            task.loss(dataclasses.replace(moved, noise=torch.empty(moved.noise.shape)))
        assert watch.found
