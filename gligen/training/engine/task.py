"""What is particular to a network that is taught. The loop (loop.py) knows nothing else of it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gligen.runtime import checkpoint_blocks, compile_blocks, no_compiler
from gligen.training.engine.logs import RunLog
from gligen.training.engine.optim import ParameterGroup
from gligen.training.engine.options import RunConfig

log = logging.getLogger("gligen")

MEMORY_ADVICE = "lower --batch-size and raise --accumulate by as much, use --checkpointing or --dtype bfloat16"


class Batches(Protocol):
    """Samples by number, as batches."""

    @property
    def cache(self) -> int:
        """The number of examples before they come again; 0: this is not known."""

    def batch(self, numbers: range, begin: int) -> Any:
        """The batch of these samples, a pure function: a structure that `map_tensors` knows, tensors on the CPU.

        begin: the first sample that this call of the program takes. An example that comes again is given whole only
        where it comes for the first time since.
        """


@dataclass(frozen=True)
class Event:
    """Something that happens on the way, on the first process, with the weights that would be published.

    run: gets the step and the log. every: steps in between; 0 never. Besides, before the first step and after the last.
    """

    run: Callable[[int, RunLog], None]
    every: int
    at_start: bool = False
    at_end: bool = False


class Task(ABC):
    """Networks, the loss of a batch under them, and what is looked at on the way.

    name: in messages. network: holds all that trains; `parameters` gives what does. facts: what else must be the same
    when a run goes on, such as a checksum of frozen weights.
    has_master_weights: with a dtype below float32, the network computes with weights rounded to it throughout, as
        sampling does; the loop moves float32 ones and rounds them once a step. Else `loss` autocasts, which keeps norms
        in float32.
    is_recorded: whether a step can be recorded as a graph, which takes batches of one shape.
    """

    name: str
    config: RunConfig
    network: nn.Module
    batches: Batches
    device: torch.device
    dtype: torch.dtype
    facts: Mapping[str, str] = {}
    has_master_weights: bool = False
    is_recorded: bool = True

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def fixed(self) -> dict[str, Tensor]:
        """Tensors that do not train and yet belong to the outcome: they are kept with it, by name.

        The miniature's CLIP has one, a projection that stays as it was drawn.
        """
        return {}

    def groups(self) -> Sequence[ParameterGroup]:
        """Groups (names of parameters, factor of their learning rate, weight decay), together all that train."""
        return [ParameterGroup(list(self.parameters()), 1.0, self.config.weight_decay)]

    def cast_frozen(self) -> None:
        """Rounds what does not train to `dtype`; called once, if has_master_weights."""
        return

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, batch: Any, progress: float) -> Any:
        """Encodes a batch with frozen networks, without gradients, so that what is left is of one shape in every step.

        Its tensors may be on the CPU before and after. progress: share of the run that is over, 0 to 1.
        """
        return batch

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise (a scalar) of a batch on the device, and detached metrics for the log, `loss` among
        them.

        It is recorded as a graph on CUDA: see step.py for what it must not do.
        """

    def metrics(self) -> dict[str, Any]:
        """Metrics of the task's own for every line of the log."""
        return {}

    def lines(self) -> Sequence[str]:
        """Lines that people should read before the first step."""
        return ()

    def events(self) -> Sequence[Event]:
        return ()

    def finish(self, run_log: RunLog, step: int) -> dict[str, float]:
        """Measures the published weights once training is over; the results are kept with them."""
        return {}

    def publish(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes what other programs read, beside the checkpoint."""
        return

    def check(self) -> None:
        """Raises RuntimeError if something that must not change has."""
        return


def keeps_master_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the UNet computes with weights in `dtype` throughout, as sampling does, rounded from float32 ones once
    a step; else autocast rounds them at every product and keeps norms in float32, which is slower on a GPU."""
    return device.type == "cuda" and dtype != torch.float32


def speed_up(network: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Compiles and checkpoints a network's blocks as a run asks, in that order."""
    if config.compile and (reason := no_compiler(device)):
        log.warning("not compiled: %s; the same network runs eagerly instead", reason)
    elif config.compile:
        compile_blocks(network)
    if config.checkpointing:
        checkpoint_blocks(network)
