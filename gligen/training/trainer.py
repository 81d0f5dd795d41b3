"""The loop: batches → gradients → steps, with figures, diagnoses, previews and checkpoints on the way."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from gligen.config import to_dict
from gligen.device import keep_freed_memory, memory_errors, pick_device, pick_training_dtype
from gligen.diffusion.loss import x0_weights
from gligen.diffusion.schedule import Schedule
from gligen.modules.unet import UNetModel
from gligen.runtime import attention_backend, checkpoint_blocks, compile_blocks, no_compiler
from gligen.training import positions
from gligen.training.clock import Clock
from gligen.training.data import Batch, SceneSource, StepBatches, iterate, pick_workers
from gligen.training.diagnosis import Diagnosis, advise, gates, summary
from gligen.training.logs import RunLog
from gligen.training.objective import Objective, encode_world
from gligen.training.optim import Average, build_optimizer, learning_rate, set_learning_rate
from gligen.training.parallel import Processes, processes
from gligen.training.presets import TrainConfig
from gligen.training.preview import make_previews, paint_previews
from gligen.training.state import (
    ADAPTER,
    CHECKPOINT,
    CONFIG,
    Checkpoint,
    Progress,
    check_folder,
    check_same_run,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from gligen.training.step_graph import OptimizerStep, StepFigures, pick_recorder
from gligen.training.trainable import (
    Networks,
    build_networks,
    frozen_checksum,
    store_frozen,
    trainable_parameters,
)

log = logging.getLogger("gligen")

MEMORY_ADVICE = "lower --batch-size and raise --accumulate by as much, use --checkpointing or --dtype bfloat16"


class Stopped(KeyboardInterrupt):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved."""


def train(config: TrainConfig, out: str | Path, *, resume: bool = True) -> Path:
    """One run, from its folder's checkpoint if there is one; returns the adapter's path.

    resume False starts over: an earlier run's log goes at once, its checkpoint and adapter when the first are saved.
    Raises ValueError, OSError or MemoryError, one line, for what is wrong; Stopped after saving on a signal.
    """
    clock = Clock(config.minutes)
    device = pick_device(config.device)
    dtype = pick_training_dtype(config.dtype, device)
    attention = attention_backend(config.attention, device)
    if device.type == "cpu":
        keep_freed_memory()
    folder = Path(out)
    check_folder(folder)
    checkpoint = read_checkpoint(folder) if resume else None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with memory_errors("the model does not fit: use another --device"):
        networks = build_networks(config, device)
    with attention, processes(device) as group:
        Trainer(config, networks, folder, dtype=dtype, group=group, checkpoint=checkpoint, clock=clock).fit()
    return folder / ADAPTER


def computes_low(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the UNet computes with weights in `dtype` throughout, as sampling does, rounded from float32 ones once a
    step; else autocast rounds them at every product and keeps norms in float32, which is slower on a GPU."""
    return device.type == "cuda" and dtype != torch.float32


def speed_up(unet: UNetModel, config: TrainConfig, device: torch.device) -> None:
    """Compiles and checkpoints the UNet's blocks as the run asks, in that order."""
    if config.compile and (reason := no_compiler(device)):
        log.warning("not compiled: %s; the same UNet runs eagerly instead", reason)
    elif config.compile:
        compile_blocks(unet)
    if config.checkpointing:
        checkpoint_blocks(unet)


class Trainer:
    """State of a run over time: weights, optimiser, average, step."""

    def __init__(
        self,
        config: TrainConfig,
        networks: Networks,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        group: Processes | None = None,
        checkpoint: Checkpoint | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.clock = clock or Clock(config.minutes)
        self.networks = networks
        self.folder = folder
        self.group = group or Processes()
        self.dtype = dtype
        device = networks.unet.first_conv.weight.device
        self.is_low = computes_low(device, dtype)
        self.live = trainable_parameters(networks)  # what the UNet computes with
        self.parameters = self.live  # what the optimiser moves, float32
        if self.is_low:
            self.parameters = {name: nn.Parameter(p.detach().clone()) for name, p in self.live.items()}
        self.optimizer = build_optimizer(self.parameters, config)
        self.average = Average(self.parameters, config.ema_decay) if config.ema_decay else None
        self.frozen = frozen_checksum(networks)
        self.samples_per_step = config.batch_size * config.accumulate * self.group.count
        self.progress = Progress()
        if checkpoint is not None:
            check_same_run(checkpoint, config, self.frozen, self.samples_per_step)
            restore(checkpoint, self.parameters, self.optimizer, self.average)
            self.progress = checkpoint.progress

        schedule = Schedule(**to_dict(networks.config.schedule))
        self.source = SceneSource.build(config, networks.config, encode_world(networks))
        self.stored = self.frozen  # the checksum of the frozen weights as they are kept while training
        if self.is_low:
            store_frozen(networks, dtype)
            self.stored = frozen_checksum(networks)
            for parameter in self.live.values():
                parameter.data = parameter.data.to(dtype)
            self._publish()
        speed_up(networks.unet, config, device)
        weights = None
        if config.weighting == "x0":
            weights = x0_weights(schedule, config.timestep_low, config.timestep_high, config.weight_limit)
        self.objective = Objective(
            networks, schedule, dtype=dtype, weights=weights, source=self.source, is_low=self.is_low
        )
        self.optimizer_step = OptimizerStep(
            self._loss,
            self.parameters.values(),
            self.optimizer,
            copies=self.live.values() if self.is_low else None,
            clip_norm=config.clip_norm,
            group=self.group,
            recorder=pick_recorder(config.graphs, device, self.group),
        )
        # Steps whose figures were not read yet. On CUDA one is left, or the device would wait for the host each time.
        self.unread: deque[tuple[int, StepFigures]] = deque()
        self.lag = 1 if device.type == "cuda" else 0
        self.spent = 0.0  # share of the run's minutes, see `_look_at_clock`
        self.norm = 0.0  # of the gradient, of the step that was read last
        self.diagnosis: Diagnosis | None = None
        self.is_stopping = False

    @property
    def step(self) -> int:
        return self.progress.step

    def fit(self) -> None:
        """Trains up to config.steps. Raises Stopped, when it has saved, if a signal asked for it."""
        config, first = self.config, self.step
        if self.group.is_first:
            text = json.dumps({**to_dict(config), "samples_per_step": self.samples_per_step}, indent=2)
            (self.folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        with (
            RunLog(self.folder, step=first, steps=config.steps, is_writing=self.group.is_first) as run_log,
            self._stop_on_signals(),
        ):
            run_log.say("%s", config)
            if first:
                run_log.say("going on from step %d of '%s'", first, self.folder / CHECKPOINT)
            if first >= config.steps > 0:
                run_log.say("nothing to do: the run has its %d steps; raise --steps to go on", config.steps)
            if first == 0:
                self._diagnose(run_log)
                if config.preview_every:
                    self.preview(run_log)  # what there was before
            self._run(run_log)
        self.check_frozen()
        if self.step > first or first == 0:
            self.save()
        if not self.is_over():
            raise Stopped(f"stopped: step {self.step} is saved in '{self.folder}'; run the same command to go on")

    def _run(self, run_log: RunLog) -> None:
        config = self.config
        batches = StepBatches(
            source=self.source, batch_size=config.batch_size, rank=self.group.rank, processes=self.group.count
        )
        ahead = iterate(
            batches,
            self.step * config.accumulate,
            config.steps * config.accumulate,
            workers=pick_workers(config.workers, self.objective.device),
            pin=self.objective.device.type == "cuda",
        )
        since, counted, first = time.monotonic(), self.step, self.step
        self._look_at_clock()
        is_last = self.is_over()
        while not is_last and not self.group.any(self.is_stopping, self.objective.device):
            with memory_errors(MEMORY_ADVICE):
                lr = learning_rate(config, self.step, self.spent)
                self.unread.append((self.step + 1, self.train_step(ahead)))
            self.progress = replace(self.progress, step=self.step + 1)
            self._look_at_clock()
            is_last = self.is_over()
            self._read(run_log, self.lag)
            if self._is_due(config.log_every):
                self._read(run_log)
                seconds = time.monotonic() - since
                self._log_figures(run_log, lr, (self.step - counted) * self.samples_per_step / seconds)
                since, counted = time.monotonic(), self.step
            if self._is_due(config.diagnose_every):
                self._read(run_log)
                self._diagnose(run_log)
            if self._is_due(config.preview_every) or (config.preview_every and is_last):
                self._read(run_log)
                self.preview(run_log)
            if self._is_due(config.save_every) and not is_last:
                self._read(run_log)
                self.save()
        self._read(run_log)
        if self.spent >= 1 and self.step < config.steps:
            if self.step == first:
                raise ValueError(
                    f"minutes is {config.minutes:g}: loading, diagnosis and previews took all of it before the first "
                    "step: give more, or --diagnose-every 0 --preview-every 0"
                )
            run_log.say("the %g minutes are over after step %d", config.minutes, self.step)

    def _look_at_clock(self) -> None:
        """The share of the time that has gone by, the same on every process: rates that differ would part them."""
        if self.clock.deadline is not None:
            self.spent = self.group.max(self.clock.spent(), self.objective.device)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def is_over(self) -> bool:
        """All steps done, or the time for them used up."""
        return self.step >= self.config.steps or self.spent >= 1

    def train_step(self, batches: Iterator[Batch]) -> StepFigures:
        """Starts one optimiser step on the next `accumulate` batches; gives its figures, for `check`."""
        taken = [self.objective.encode(next(batches)) for _ in range(self.config.accumulate)]
        set_learning_rate(self.optimizer, learning_rate(self.config, self.step, self.spent))
        figures = self.optimizer_step(*taken)
        if self.average is not None:
            self.average.update(self.parameters, self.step)
        return figures

    def check(self, figures: StepFigures, step: int) -> tuple[float, float]:
        """The mean squared error and the gradient norm of a step, when they are there.

        Raises ValueError if either is not a finite number; no weight was changed then.
        """
        found = figures.read()
        loss, norm = found["loss"], found["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = read_checkpoint(self.folder)
            before = f"the checkpoint of step {kept.progress.step} is kept" if kept else "nothing was saved yet"
            raise ValueError(
                f"step {step}: the loss is {loss} and the gradient norm {norm}, so no weight was "
                f"changed and {before}: lower --lr, set --clip-norm 1, or use --dtype float32"
            )
        return loss, norm

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, error = self.objective.loss(batch)
        return loss, {"loss": error}

    def _read(self, run_log: RunLog, left: int = 0) -> None:
        """Takes account of the steps that have run, but for the `left` latest."""
        while len(self.unread) > left:
            step, figures = self.unread.popleft()
            loss, self.norm = self.check(figures, step)
            done = self.progress
            self.progress = replace(done, loss_sum=done.loss_sum + loss, loss_count=done.loss_count + 1)
            run_log.advance(loss)

    def save(self) -> None:
        """Checkpoint and adapter, by the first process; see state.py."""
        if self.group.is_first:
            save_checkpoint(
                self.folder,
                progress=self.progress,
                config=self.config,
                model=self.networks.config,
                frozen=self.frozen,
                samples_per_step=self.samples_per_step,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
            )
        self.group.wait()

    def check_frozen(self) -> None:
        """Raises RuntimeError if a weight that must not change has."""
        if frozen_checksum(self.networks) != self.stored:
            raise RuntimeError("frozen weights have changed during training: a bug; the last adapter is not to be used")

    def preview(self, run_log: RunLog) -> None:
        """DIR/previews/STEP.png, and grounding accuracy on it. One that cannot be made is told, and stops nothing."""
        if not self.group.is_first:
            return
        config, folder = self.config, self.folder / "previews"
        try:
            previews = make_previews(self.networks, config.preview_images, config.seed, folder / "inputs")
            batch_size = min(config.batch_size, config.preview_images)
            with self._averaged():
                found = paint_previews(self.networks, previews, folder / f"{self.step:07d}.png", batch_size)
        except (ValueError, OSError, MemoryError) as error:
            run_log.say("no preview at step %d: %s", self.step, error)
            return
        if found:
            run_log.write(self.step, {"preview": found})
            run_log.say(
                "step %d: %.0f %% of asked objects in place with their colour, %.0f %% with their shape too",
                self.step, 100 * found["found"], 100 * found["found_with_shape"],
            )  # fmt: skip

    def _log_figures(self, run_log: RunLog, lr: float, rate: float) -> None:
        done = self.progress
        self._publish()
        mean_gate, largest_gate = summary(gates(self.networks.unet))
        figures = {
            "loss": done.loss_sum / done.loss_count,
            "lr": lr,
            "grad_norm": self.norm,
            "gates": {"mean": mean_gate, "max": largest_gate},
            "images_per_second": round(rate, 1),
        }
        if self.objective.device.type == "cuda":
            figures["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        run_log.write(self.step, figures)
        self.progress = replace(done, loss_sum=0.0, loss_count=0)

    def _tell_positions(self, found: dict[str, positions.Positions], run_log: RunLog) -> None:
        """What the model knows of places before the first step: the frozen base, with what --adapter gave it."""
        advice = positions.advise(found)
        errors = {place: each.error for place, each in found.items()}
        run_log.write(self.step, {"positions": errors} | ({"advice": advice} if advice else {}))
        run_log.say("%s", positions.summary(found))
        if advice:
            run_log.say("advice: %s", advice)

    def _diagnose(self, run_log: RunLog) -> None:
        """Losses with right, null, shuffled and moved grounding, of the weights that would be published."""
        config = self.config
        if not config.diagnose_every or not self.group.is_first:
            return
        with memory_errors(MEMORY_ADVICE), self._averaged():
            if self.diagnosis is None:
                chunk = min(config.batch_size, config.diagnosis_samples)
                self.diagnosis = Diagnosis(self.objective, self.source, config.diagnosis_samples, chunk, config.seed)
            if self.step == 0:
                self._tell_positions(self.diagnosis.positions(), run_log)
            losses, opened = self.diagnosis.losses(), gates(self.networks.unet)
        mean_gate, largest_gate = summary(opened)
        advice = advise(losses, largest_gate, self.step)
        run_log.write(
            self.step,
            {"diagnosis": losses.figures(), "fusers": opened} | ({"advice": advice} if advice else {}),
        )
        run_log.say(
            "step %d: high-noise loss %.4f with the right grounding, %.4f with none; right/another's %.4f, "
            "right/moved %.4f%s; gates mean %.1e, max %.1e",
            self.step, losses.right, losses.null, losses.ratio, losses.where,
            "" if losses.shape is None else f", right/other shapes {losses.shape:.4f}", mean_gate, largest_gate,
        )  # fmt: skip
        if advice:
            run_log.say("advice: %s", advice)

    def _averaged(self) -> AbstractContextManager[None]:
        """The weights that would be published stand in the UNet while inside."""
        self._publish()
        return self.average.swapped_in(self.live) if self.average else nullcontext()

    @torch.no_grad()
    def _publish(self) -> None:
        """Puts the weights into the UNet where it computes with rounded copies: a step does so only when it begins."""
        if self.is_low:
            torch._foreach_copy_(list(self.live.values()), list(self.parameters.values()))

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end the run after the step at hand; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.is_stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
