"""One step of the optimiser: forward and backward pass, clipping, AdamW. On CUDA recorded as one graph.

A step of a small model is thousands of kernels that are shorter than their launch, and even one of Stable Diffusion's
size waits for the host for a fifth of its time; a graph is a single launch. So nothing in a step may depend on the
host: what the loss reads are tensors that are copied into the graph's own, numbers that change are tensors (the
learning rate), and metrics are read when they have arrived. A step whose loss or gradient is not finite changes no
weight, decided on the device.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gligen.training.engine.processes import Loss, Processes, SharedLoss

log = logging.getLogger("gligen")

WARM_UP = 3  # steps of a shape before it is recorded: they compile, and libraries choose their kernels
MOST = 4  # shapes that are recorded; steps of others run as they are

T = TypeVar("T")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same structure of tuples, dicts and dataclasses with every tensor changed."""
    made: Any = value
    if isinstance(value, Tensor):
        made = change(value)
    elif isinstance(value, dict):
        made = {name: map_tensors(each, change) for name, each in value.items()}
    elif isinstance(value, tuple):
        made = tuple(map_tensors(each, change) for each in value)
    elif isinstance(value, list):
        raise TypeError("a batch holds a list, whose tensors nobody would move: give a tuple")
    elif dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        made = dataclasses.replace(made, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields})
    return made


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of such a structure, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found


def _shape_key(value: Any) -> Any:
    """What two such structures have in common if one's tensors can be copied into the other's."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return tuple((name, _shape_key(each)) for name, each in value.items())
    if isinstance(value, tuple):
        return tuple(map(_shape_key, value))
    if dataclasses.is_dataclass(value):
        return type(value), tuple(_shape_key(getattr(value, f.name)) for f in dataclasses.fields(value))
    return value


class StepMetrics:
    """A step's metrics, by name, on their way from the device: one small copy that nobody waits for until `read`."""

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self.names, self.values, self.arrived = names, values, None
        if values.device.type == "cuda":
            # pinned, or the copy would wait for the device; an event, or `read` would see numbers not there yet
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Recorder(Protocol):
    """Runs a step before it is recorded, and records it."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor: ...

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns a function that repeats `run` with the same tensors. `run` itself is called, but need not have been
        carried out."""
        ...


class CUDAGraphs:
    """Records on a stream of its own. All graphs share their memory: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        # on the stream that records: what libraries set up at a stream's first use is there when recording begins
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            made = run()
        current.wait_stream(self.stream)
        return made

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        try:
            # thread-local: the loader's thread may pin memory meanwhile
            with (
                torch.cuda.device(self.stream.device),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                made = run()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        self.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return made

        return replay


def pick_recorder(wanted: bool, device: torch.device, group: Processes) -> CUDAGraphs | None:
    """None where steps are not recorded: elsewhere than on CUDA, and where processes average their gradients."""
    return CUDAGraphs(device) if wanted and device.type == "cuda" and group.count == 1 else None


@dataclass
class _Shape:
    """Batches of one shape: the tensors that they are copied into, steps taken, and the recorded one."""

    inputs: tuple[Any, ...]
    steps: int = 0
    replay: Callable[[], Tensor] | None = None


class OptimizerStep:
    """A callable: `step(*batches)` takes one step of the optimiser on the mean of the batches' losses.

    loss: batch -> (what is minimised, metrics by name), all on the device. To be recorded it must not ask the device
        for a value, make tensors from the host's, nor branch on what tensors hold.
    parameters: which train, of `optimizer`, whose steps never move them in memory.
    copies: of the parameters in lower precision, in order, if the loss is computed with these: each step begins by
        rounding the parameters into them, and their gradients become the parameters' own.
    clip_norm: gradients are scaled down to this norm; 0 never.
    A batch is a structure that `map_tensors` knows, its tensors on the CPU (pinned is faster) or on the device.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        copies: Iterable[nn.Parameter] | None = None,
        clip_norm: float = 0.0,
        group: Processes | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.group = group or Processes()
        self.parameters = list(parameters)
        self.copies = None if copies is None else list(copies)
        self.loss = SharedLoss(loss, self.parameters if self.copies is None else self.copies, self.group)
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.recorder = recorder
        self.device = self.parameters[0].device
        self.shapes: dict[tuple[Any, ...], _Shape] = {}
        self.names: tuple[str, ...] = ()

    def __call__(self, *batches: Any) -> StepMetrics:
        """The mean of each of the loss's metrics, and grad_norm, of all processes; not finite: nothing was changed."""
        values = self._take(batches)  # which also names them
        return StepMetrics(self.names, values)

    def _take(self, batches: tuple[Any, ...]) -> Tensor:
        shape = self._shape_of(batches) if self.recorder is not None else None
        if shape is None:
            return self._run(map_tensors(batches, lambda tensor: tensor.to(self.device, non_blocking=True)))
        assert self.recorder is not None
        # a graph reads the addresses that it was recorded with, so the batch is copied to where it looks
        for own, new in zip(tensors_in(shape.inputs), tensors_in(batches), strict=True):
            own.copy_(new, non_blocking=True)
        shape.steps += 1
        if shape.steps <= WARM_UP:
            return self.recorder.warm_up(lambda: self._run(shape.inputs))
        if shape.replay is None:
            self._begin()  # frees the gradients: their memory is the graph's
            try:
                shape.replay = self.recorder.record(lambda: self._run(shape.inputs))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                log.warning("steps are not recorded as CUDA graphs and run on without: %s", reason)
                self.recorder = None
                self.shapes.clear()  # frees what the graphs held
                return self._run(shape.inputs)
        return shape.replay()  # the recorded step too: recording carried nothing out

    def _shape_of(self, batches: tuple[Any, ...]) -> _Shape | None:
        key = _shape_key(batches)
        if key not in self.shapes:
            if len(self.shapes) >= MOST:  # each holds a batch and its share of memory for good
                return None
            self.shapes[key] = _Shape(
                map_tensors(batches, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device))
            )
        return self.shapes[key]

    def _run(self, batches: tuple[Any, ...]) -> Tensor:
        """The step itself, and its metrics (F,). What is recorded: reads and writes the same memory at every call."""
        self._begin()
        total: Tensor | None = None
        for i, batch in enumerate(batches):
            # rounded gradients are averaged every time: added up before, they would be rounded again
            is_last = i == len(batches) - 1 or self.copies is not None
            with nullcontext() if is_last else self.loss.keep_local():
                loss, metrics = self.loss(batch)  # (), {name: ()}
                (loss / len(batches)).backward()  # gradients add up to those of the mean
            self._take_gradients()
            values = torch.stack([metric.detach().float() for metric in metrics.values()]) / len(batches)  # (F - 1,)
            total = values if total is None else total + values
        assert total is not None
        self.names = (*metrics, "grad_norm")
        # DDP has averaged the gradients by now, so the norm is the same on every process and needs no mean
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        made = torch.cat([self.group.mean(total), norm[None]])  # (F,)
        is_wrong = made.isfinite().all().logical_not()  # of all processes: they skip the step together or not at all
        if self.optimizer.param_groups[0]["fused"]:  # the kernel itself skips, so the host need not know
            self.optimizer.found_inf = is_wrong.float()  # type: ignore[attr-defined]  # as GradScaler sets it
            self.optimizer.step()
        elif not is_wrong:
            self.optimizer.step()
        return made

    @torch.no_grad()
    def _begin(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # the first backward pass writes gradients, and need not add to 0
        if self.copies is not None:
            for copy in self.copies:
                copy.grad = None
            torch._foreach_copy_(self.copies, self.parameters)  # type: ignore[arg-type]  # lists are invariant

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """The copies' gradients go to the parameters, in whose precision those of several batches add up."""
        if self.copies is None:
            return
        pairs = [(p, c) for p, c in zip(self.parameters, self.copies, strict=True) if c.grad is not None]
        made = [torch.empty_like(p) for p, _ in pairs]
        given = [c.grad for _, c in pairs if c.grad is not None]
        torch._foreach_copy_(made, given)  # two kernels, not one for each of hundreds
        sums, more = [], []
        for (parameter, copy), new in zip(pairs, made, strict=True):
            copy.grad = None  # so that the next batch does not add to a rounded sum
            if parameter.grad is None:
                parameter.grad = new
            else:
                sums.append(parameter.grad)
                more.append(new)
        if sums:
            torch._foreach_add_(sums, more)
