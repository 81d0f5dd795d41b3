"""The loop: batches → gradients → steps, with a log, a task's events and checkpoints on the way. It knows no network.

A run can be stopped by Ctrl-C, SIGTERM or the power switch and goes on from its last checkpoint as if nothing had
happened, on a CPU bit for bit: batches depend on the numbers of their samples only, the learning rate on that of the
step.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from gligen.config import to_dict
from gligen.device import keep_freed_memory, memory_errors, pick_device, pick_training_dtype
from gligen.runtime import attention_backend
from gligen.training.engine.checkpoint import (
    CHECKPOINT,
    CONFIG,
    Checkpoint,
    Progress,
    check_folder,
    check_same_run,
    read_checkpoint,
    restore,
    saving,
    write_checkpoint,
)
from gligen.training.engine.clock import Clock
from gligen.training.engine.loader import StepBatches, iterate, pick_workers
from gligen.training.engine.logs import RunLog
from gligen.training.engine.optim import Average, build_optimizer, learning_rate, set_learning_rate
from gligen.training.engine.options import RunConfig
from gligen.training.engine.processes import Processes, processes
from gligen.training.engine.step import OptimizerStep, StepMetrics, pick_recorder
from gligen.training.engine.task import MEMORY_ADVICE, Event, Task

log = logging.getLogger("gligen")


class Stopped(KeyboardInterrupt):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved. status: that shells expect of such a command."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


def run(
    build: Callable[[torch.device, torch.dtype], Task], config: RunConfig, folder: Path, *, resume: bool = True
) -> None:
    """One run, from its folder's checkpoint if there is one.

    build: makes the task on a device, computing in a dtype. resume False starts over: an earlier run's log goes at
    once, its checkpoint and what it published when the first are saved.
    Raises ValueError, OSError or MemoryError, one line, for what is wrong; Stopped after saving on a signal.
    """
    clock = Clock(config.minutes)  # loading counts: who gives minutes wants the shell back after them
    device = pick_device(config.device)
    dtype = pick_training_dtype(config.dtype, device)
    attention = attention_backend(config.attention, device)
    if device.type == "cpu":
        keep_freed_memory()
    check_folder(folder)
    checkpoint = read_checkpoint(folder) if resume else None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with memory_errors("the model does not fit: use another --device"):
        task = build(device, dtype)
    with attention, processes(device) as group:
        Loop(task, folder, group=group, checkpoint=checkpoint, clock=clock).fit()


class Loop:
    """A run on its way: the float32 weights, the optimiser, their average, and how far it has come."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        *,
        group: Processes | None = None,
        checkpoint: Checkpoint | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.task, self.config, self.folder = task, task.config, folder
        self.group = group or Processes()
        config = self.config
        self.clock = clock or Clock(config.minutes)
        self.live = task.parameters()  # what the network computes with
        self.parameters = self.live  # what the optimiser moves, float32
        if task.has_master_weights:  # steps of 1e-5 would be lost in bfloat16's 8 bits: the optimiser moves float32
            self.parameters = {name: nn.Parameter(p.detach().clone()) for name, p in self.live.items()}
        self.optimizer = build_optimizer(self.parameters, task.groups(), config.lr)
        self.average = Average(self.parameters, config.ema_decay) if config.ema_decay else None
        self.samples_per_step = config.batch_size * config.accumulate * self.group.count
        self.progress = Progress()
        self.changed: list[str] = []  # since the run was interrupted
        if checkpoint is not None:
            # everything random is a function of (seed, sample number), so no random state is restored
            self.changed = check_same_run(checkpoint, config, task.facts, self.samples_per_step)
            restore(checkpoint, self.parameters, self.optimizer, self.average, task.fixed())
            self.progress = checkpoint.progress
        self.group.wait()  # all have read the checkpoint before the first may write it
        if task.has_master_weights:  # last, so that what was restored is rounded too
            task.cast_frozen()
            for parameter in self.live.values():
                parameter.data = parameter.data.to(task.dtype)
            self._round()
        self.optimizer_step = OptimizerStep(
            task.loss,
            self.parameters.values(),
            self.optimizer,
            copies=self.live.values() if task.has_master_weights else None,
            clip_norm=config.clip_norm,
            group=self.group,
            recorder=pick_recorder(config.graphs and task.is_recorded, task.device, self.group),
        )
        # Steps whose metrics were not read yet. On CUDA one is left, or the device would wait for the host each time.
        self.unread: deque[tuple[int, StepMetrics]] = deque()
        self.lag = 1 if task.device.type == "cuda" else 0
        self.spent = 0.0  # share of the run's minutes, see `_look_at_clock`
        self.norm = 0.0  # of the gradient, of the step that was read last
        self.stop_signal = 0

    @property
    def step(self) -> int:
        return self.progress.step

    def fit(self) -> None:
        """Trains up to config.steps, or until its minutes are over. Raises Stopped, when it has saved, on a signal."""
        config, first = self.config, self.step
        with (
            RunLog(self.folder, step=first, steps=config.steps, is_writing=self.group.is_first, name=self.task.name) as
            run_log,
            self._stop_on_signals(),
        ):  # fmt: skip
            for line in self.task.lines():
                run_log.info("%s", line)
            if self.progress.is_done and first >= config.steps > 0:
                asked = f"--steps is {config.steps}: raise it" if config.steps < first else "raise --steps"
                run_log.info("nothing to do: the run has its %d steps; %s to go on", first, asked)
                return
            self._describe(run_log)
            if self.group.is_first:
                text = json.dumps({**to_dict(config), "samples_per_step": self.samples_per_step}, indent=2)
                (self.folder / CONFIG).write_text(text + "\n", encoding="utf-8")
            if first == 0:  # a resumed run has its first events in the log already
                self._run_events(run_log, lambda event: event.at_start)
            self.progress = replace(self.progress, is_done=False)  # of a run that is lengthened
            self._run(run_log)
            self.task.check()  # before the last checkpoint is written
            if self.is_over():
                self._finish(run_log)
        if self.step > first or first == 0 or self.progress.is_done:  # else the file says all of this already
            self.save()
        if not self.is_over():
            raise Stopped(
                f"stopped: step {self.step} is saved in '{self.folder}'; run the same command to go on",
                self.stop_signal or signal.SIGTERM,  # another process got it
            )

    def _describe(self, run_log: RunLog) -> None:
        """Logs what will happen, what comes first first: from where, what is otherwise than before, with what."""
        config, first, place = self.config, self.step, self.folder / CHECKPOINT
        if first >= config.steps > 0:
            run_log.info("going on from step %d of '%s': no step is left, only the run's end", first, place)
        elif first:
            run_log.info("going on from step %d of '%s'", first, place)
            for line in self.changed:
                run_log.info("%s", line)
            if self.progress.is_done and config.lr_schedule == "cosine":
                run_log.info("the run had come to its end: its learning rate, which was 0, begins anew")
        for line in config.lines():
            run_log.info("%s", line)

    def _run(self, run_log: RunLog) -> None:
        config, device = self.config, self.task.device
        batches = StepBatches(
            batches=self.task.batches,
            batch_size=config.batch_size,
            rank=self.group.rank,
            processes=self.group.count,
            begin=self.progress.samples,
        )
        ahead = iterate(
            batches,
            max(0, config.steps - self.step) * config.accumulate,  # batches, several to a step
            workers=pick_workers(config.workers, device),
            pin=device.type == "cuda",
        )
        since, counted, first = time.monotonic(), self.step, self.step
        self._look_at_clock()
        is_last = self.is_over()
        # a signal may reach one process alone, and the others would wait for its gradients: all ask all, at every step
        while not is_last and not self.group.any(bool(self.stop_signal), device):
            with memory_errors(MEMORY_ADVICE):
                lr = learning_rate(config, self.step, self.spent)  # for the log, before the step moves on
                self.unread.append((self.step + 1, self.train_step(ahead)))
            self._look_at_clock()
            is_last = self.is_over()
            self._read(run_log, self.lag)  # raises if that step's loss was not finite
            if self.step % config.log_every == 0:
                self._read(run_log)  # waits for the device, so that the time is that of finished steps
                seconds = time.monotonic() - since
                self._log_metrics(run_log, lr, (self.step - counted) * self.samples_per_step / seconds)
                since, counted = time.monotonic(), self.step
            paused = time.monotonic()
            self._run_events(run_log, self._is_due)
            if config.save_every and self.step % config.save_every == 0 and not is_last:  # `fit` saves the last
                self._read(run_log)  # the sums that are saved are those of all steps taken
                self.save()
            since += time.monotonic() - paused  # neither counts as training
        self._read(run_log)
        if self.spent >= 1 and self.step < config.steps:
            if self.step == first:
                raise ValueError(
                    f"minutes is {config.minutes:g}: loading and what comes before the first step took all of it: give "
                    "more, or --diagnose-every 0 --preview-every 0"
                )
            run_log.info("the %g minutes are over after step %d", config.minutes, self.step)

    def _is_due(self, event: Event) -> bool:
        """After this step; what happens at the end anyhow is left to it."""
        is_due = event.every > 0 and self.step % event.every == 0
        return is_due and not (event.at_end and self.is_over())

    def _look_at_clock(self) -> None:
        """The share of the time that has gone by, the same on every process: rates that differ would part them."""
        if self.clock.deadline is not None:
            self.spent = self.group.max(self.clock.spent(), self.task.device)

    def is_over(self) -> bool:
        """All steps done, or the time for them used up."""
        return self.step >= self.config.steps or self.spent >= 1

    def train_step(self, batches: Iterator[Any]) -> StepMetrics:
        """Starts one optimiser step on the next `accumulate` batches; gives its metrics, for `check`."""
        config, step = self.config, self.step
        # a run ends with its steps or its minutes, whichever comes first; a schedule follows the one that is nearer
        progress = max(step / config.steps if config.steps else 0.0, self.spent)
        # frozen encoders run here, outside the recorded step: which samples lack encodings differs from step to step
        with torch.no_grad(), self.task.autocast():
            taken = [self.task.prepare(next(batches), progress) for _ in range(config.accumulate)]
        set_learning_rate(self.optimizer, learning_rate(config, step, self.spent))
        metrics = self.optimizer_step(*taken)
        if self.average is not None:
            self.average.update(self.parameters, step)
        # samples, not step × samples a step: the number of processes may change from one call to the next
        self.progress = replace(self.progress, step=step + 1, samples=self.progress.samples + self.samples_per_step)
        return metrics

    def check(self, metrics: StepMetrics, step: int) -> dict[str, float]:
        """The metrics of a step, when they are there.

        Raises ValueError if loss or gradient norm is not a finite number; no weight was changed then.
        """
        found = metrics.read()
        loss, norm = found["loss"], found["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = read_checkpoint(self.folder)  # what is on the disk, not what this call has saved
            before = f"the checkpoint of step {kept.progress.step} is kept" if kept else "nothing was saved yet"
            raise ValueError(
                f"step {step}: the loss is {loss} and the gradient norm {norm}, so no weight was "
                f"changed and {before}: lower --lr, set --clip-norm 1, or use --dtype float32"
            )
        return found

    def _read(self, run_log: RunLog, left: int = 0) -> None:
        """Takes account of the steps that have run, but for the `left` latest."""
        while len(self.unread) > left:
            step, metrics = self.unread.popleft()
            found = self.check(metrics, step)
            self.norm = found.pop("grad_norm")
            done = self.progress
            sums = {name: done.sums.get(name, 0.0) + value for name, value in found.items()}
            self.progress = replace(done, sums=sums, count=done.count + 1)
            run_log.advance(found["loss"])

    def _log_metrics(self, run_log: RunLog, lr: float, rate: float) -> None:
        done, device = self.progress, self.task.device
        self._round()  # the task's metrics read the network, which still has the weights before this step
        metrics: dict[str, Any] = {name: total / done.count for name, total in done.sums.items()}
        metrics |= {"lr": lr, "grad_norm": self.norm} | self.task.metrics() | {"images_per_second": round(rate, 1)}
        if device.type == "cuda":
            metrics["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        run_log.write(self.step, metrics)
        self.progress = replace(done, sums={}, count=0)

    def _run_events(self, run_log: RunLog, is_due: Callable[[Event], bool]) -> None:
        """The task's events that are due, on the first process; the others wait at the next step."""
        due = [event for event in self.task.events() if is_due(event)] if self.group.is_first else []
        if due:
            self._read(run_log)  # a loss that is not finite ends the run now, not after minutes of previews
            with memory_errors(MEMORY_ADVICE), self._published_weights():
                for event in due:
                    event.run(self.step, run_log)

    def _finish(self, run_log: RunLog) -> None:
        self._run_events(run_log, lambda event: event.at_end)
        with memory_errors(MEMORY_ADVICE), self._published_weights():
            results = self.task.finish(run_log, self.step)
        self.progress = replace(self.progress, is_done=True, results=results)

    def save(self) -> None:
        """Checkpoint, and what the task publishes, by the first process."""
        if self.group.is_first:
            task, average = self.task, self.average.tensors if self.average else None
            with saving(self.folder, self.step):
                write_checkpoint(
                    self.folder,
                    progress=self.progress,
                    config=self.config,
                    facts=task.facts,
                    samples_per_step=self.samples_per_step,
                    weights=self.parameters,
                    fixed=task.fixed(),
                    optimizer=self.optimizer,
                    average=average,
                )
                task.publish(self.folder, average or {name: p.detach() for name, p in self.parameters.items()})
        self.group.wait()

    @contextmanager
    def _published_weights(self) -> Iterator[None]:
        """The weights that would be published stand in the network while inside, and nothing is trained."""
        self._round()
        swapped: AbstractContextManager[None] = (
            self.average.swapped_in(self.live) if self.average is not None else nullcontext()
        )
        with torch.no_grad(), swapped:
            yield

    @torch.no_grad()
    def _round(self) -> None:
        """Puts the weights into the network where it computes with rounded copies: a step does so when it begins."""
        if self.task.has_master_weights:
            torch._foreach_copy_(list(self.live.values()), list(self.parameters.values()))

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end the run after the step at hand; a second signal acts at once."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def stop(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            put_back()  # so that a second signal acts at once

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            put_back()
