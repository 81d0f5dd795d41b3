"""The training loop that the three stages share: steps, figures, checkpoints. A stage says what a batch's loss is.

A run can be stopped by Ctrl-C, SIGTERM or the power switch and goes on from its last checkpoint as if nothing had
happened, on a CPU bit for bit: batches depend on the number of the step only (data.py), the learning rate too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import pickle
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from gligen.config import from_dict
from gligen.device import memory_errors, pick_training_dtype
from gligen.files import write_atomically
from gligen.miniature.config import STAGES, Recipe
from gligen.miniature.data import Batch, Batches
from gligen.runtime import attention_backend, compile_blocks, no_compiler
from gligen.training.clock import Clock
from gligen.training.data import leave_signals_to_parent, pick_workers
from gligen.training.parallel import Processes, processes
from gligen.training.step_graph import OptimizerStep, StepFigures, make_optimizer, pick_recorder, set_group_rate

log = logging.getLogger("gligen")


class StoppedError(Exception):
    """Training was asked to stop, and saved first."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Stage(ABC):
    """What is particular to one of the three networks.

    networks: what is trained, by part. facts: what else must be the same when a run goes on, as plain data.
    is_recorded: whether a step can be recorded as a graph, which takes batches of one shape.
    is_autocast: bfloat16 on CUDA by autocast, which computes norms in float32; else with bfloat16 copies of the weights
        throughout, as sampling does, which is faster. Then `loss` rounds what the networks read.
    """

    name: str
    config: Recipe
    networks: nn.ModuleDict
    batches: Batches
    facts: Mapping[str, str] = {}
    is_recorded: bool = True
    is_autocast: bool = True

    def prepare(self, batch: Batch, progress: float = 0.0) -> Batch:
        """What frozen networks make of a batch, without gradients: its tensors then have the same shapes in every step.
        Its tensors may be on the CPU before and after. progress: share of the run that is over, 0 to 1."""
        return batch

    @abstractmethod
    def loss(self, networks: nn.ModuleDict, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch on the device, and figures to log beside it. It is recorded as a graph on CUDA: see
        gligen/training/step_graph.py for what it must not do."""

    @abstractmethod
    def evaluate(self, networks: nn.ModuleDict) -> dict[str, float]:
        """Figures on scenes kept aside."""

    def preview(self, networks: nn.ModuleDict, step: int, out: Path, *, is_last: bool) -> None:
        """What there is to look at after this many steps; nothing unless a stage paints."""
        return

    def finish(self, networks: nn.ModuleDict) -> dict[str, float]:
        """What is measured once training is over and kept with the weights."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A stage's outcome, as later stages and the export need it.

    networks: part -> name -> tensor, averaged. measured: what `Stage.finish` found. fingerprint: of the weights.
    """

    config: Any  # CLIPStage, VAEStage or UNetStage
    networks: dict[str, dict[str, Tensor]]
    measured: dict[str, float]
    facts: dict[str, str]
    step: int
    fingerprint: str


def state_file(out: Path, name: str) -> Path:
    return out / f"{name}.pt"


def load_trained(out: Path, name: str) -> Trained:
    """Raises FileNotFoundError or ValueError, one line, unless the stage was trained to its end."""
    path = state_file(out, name)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python -m gligen.miniature {name} --out {out}` first")
    state = _read(path, name)
    if not state["is_done"]:
        raise ValueError(
            f"{path} has done {state['step']} of {state['config']['steps']} steps: call "
            f"`python -m gligen.miniature {name} --out {out}` again to finish it (or give --steps {state['step']})"
        )
    networks: dict[str, dict[str, Tensor]] = {}
    for full, tensor in state["average"].items():
        part, _, rest = full.partition(".")
        networks.setdefault(part, {})[rest] = tensor
    config = from_dict(STAGES[name], state["config"])
    return Trained(
        config=config,
        networks=networks,
        measured=state["measured"],
        facts=state["facts"],
        step=state["step"],
        fingerprint=_fingerprint(state["average"]),
    )


def begun_with(out: Path, name: str) -> dict[str, Any]:
    """What a stage's state in `out` holds it to, by field: sizes, seed and the like; nothing if there is no state."""
    path = state_file(out, name)
    if not path.exists():
        return {}
    begun = from_dict(STAGES[name], _read(path, name)["config"])
    return {f.name: getattr(begun, f.name) for f in dataclasses.fields(begun) if not f.metadata["is_free"]}


class Run:
    """A stage on its way: networks, their average, the optimiser, and how many steps they have had."""

    def __init__(self, stage: Stage, out: Path, device: torch.device, group: Processes, *, resume: bool) -> None:
        config = stage.config
        out.mkdir(parents=True, exist_ok=True)
        self.stage, self.config, self.out, self.device, self.group = stage, config, out, device, group
        self.path = state_file(out, stage.name)
        self.dtype = pick_training_dtype(config.dtype, device)
        # channels last: convolutions are a third faster on a CPU
        self.networks = stage.networks.to(device).to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.networks.parameters() if p.requires_grad]
        self.average = copy.deepcopy(self.networks).requires_grad_(False) if config.ema_decay else self.networks
        group_of_all = {"params": self.parameters, "lr": config.lr, "weight_decay": config.weight_decay}
        self.optimizer = make_optimizer([group_of_all], device)
        self.done, self.is_done = 0, False
        self.measured: dict[str, float] = {}
        if resume and self.path.exists():
            state = _read(self.path, stage.name)
            _check_same(self.path, stage, state)
            self.networks.load_state_dict(state["networks"])
            self.average.load_state_dict(state["average"])
            if state["optimizer"] is not None:  # None of an unpacked file
                groups = self.optimizer.state_dict()["param_groups"]  # rates and the like are this run's
                self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
            self.done, self.measured = state["step"], state["measured"]
            self.is_done = state["is_done"] and self.done >= config.steps
            log.info("%s: going on from step %d of %d", stage.name, self.done, config.steps)
        is_low = device.type == "cuda" and self.dtype != torch.float32 and not stage.is_autocast
        self.trained = copy.deepcopy(self.networks).to(self.dtype) if is_low else self.networks
        if config.compile and (reason := no_compiler(device)):
            log.warning("not compiled: %s; the same networks run eagerly instead", reason)
        elif config.compile:
            compile_blocks(self.trained)  # after the average was copied, which stays as it is
        self.weights: list[Tensor] = list(self.networks.parameters())
        self.averaged: list[Tensor] = list(self.average.parameters())
        self.optimizer_step = OptimizerStep(
            self._loss,
            self.parameters,
            self.optimizer,
            copies=[p for p in self.trained.parameters() if p.requires_grad] if is_low else None,
            clip_norm=config.clip_norm,
            group=group,
            recorder=pick_recorder(config.graphs and stage.is_recorded, device, group),
        )
        # Steps whose figures were not read yet. On CUDA one is left, or the device would wait for the host each time.
        self.unread: deque[tuple[int, float, StepFigures]] = deque()
        self.lag = 1 if device.type == "cuda" else 0
        self.latest: dict[str, float] = {}
        self.group.wait()  # all have read the state before the first may write it
        self.figures = Figures(out / f"{stage.name}.jsonl", self.done) if group.is_first else None

    def step(self, batch: Batch, spent: float = 0.0) -> None:
        """Starts one step of the optimiser; `read` gives its figures. spent: see `learning_rate`."""
        config, lr = self.config, learning_rate(self.config, self.done, spent)
        set_group_rate(self.optimizer.param_groups[0], lr)
        with torch.no_grad(), self._autocast():
            batch = self.stage.prepare(batch, max(self.done / config.steps, spent))
        self.unread.append((self.done, lr, self.optimizer_step(batch)))
        if self.average is not self.networks:
            # forgets faster early on, or the first weights would stay in it for long
            decay = min(config.ema_decay, (1 + self.done) / (10 + self.done))
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.weights, 1 - decay)
        self.done += 1

    def read(self, left: int = 0) -> dict[str, float]:
        """Figures of the latest step that was read, after reading all but the `left` latest.

        Raises ValueError for a loss or gradient that is no number; no weight was changed then.
        """
        while len(self.unread) > left:
            step, lr, found = self.unread.popleft()
            figures = {"loss": 0.0, "lr": lr, "grad_norm": 0.0} | found.read()
            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
                kept = f"the last good state is in {self.path}" if self.path.exists() else "nothing was saved yet"
                raise ValueError(
                    f"{self.stage.name}: step {step} gave a loss of {figures['loss']} and a gradient of "
                    f"{figures['grad_norm']}: lower --lr; {kept}"
                )
            self.latest = figures
        return self.latest

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast() if self.trained is self.networks else contextlib.nullcontext():
            loss, parts = self.stage.loss(self.trained, batch)
        return loss, {"loss": loss} | parts

    def evaluate(self) -> dict[str, float]:
        self.average.eval()
        with torch.inference_mode():
            return self.stage.evaluate(self.average)

    def finish(self) -> dict[str, float]:
        """The last evaluation and what is measured at the end; the state is then complete."""
        found = self.evaluate()
        with torch.inference_mode():
            self.measured = self.stage.finish(self.average)
        self.is_done = True
        self.log(found | self.measured)
        self.save()
        return found | self.measured

    def log(self, figures: Mapping[str, float]) -> None:
        if self.figures is not None:
            self.figures.write(self.done, figures)

    def save(self) -> None:
        """By the first process. Raises as `read`: what is no number is not saved."""
        self.read()
        if not self.group.is_first:
            return
        state = {
            "stage": self.stage.name,
            "config": dataclasses.asdict(self.config),
            "facts": dict(self.stage.facts),
            "step": self.done,
            "is_done": self.is_done,
            "measured": self.measured,
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        _write(self.path, state)


def save_state(
    path: Path,
    name: str,
    config: Recipe,
    networks: Mapping[str, Mapping[str, Tensor]],
    *,
    is_done: bool,
    measured: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes the state of a stage whose weights, by part, come from elsewhere: trained to its end, or to be trained."""
    weights = {f"{part}.{key}": tensor for part, tensors in networks.items() for key, tensor in tensors.items()}
    state = {
        "stage": name,
        "config": dataclasses.asdict(config),
        "facts": dict(facts or {}),
        "step": config.steps if is_done else 0,
        "is_done": is_done,
        "measured": dict(measured or {}),
        "networks": weights,
        "average": weights,
        "optimizer": None,
    }
    _write(path, state)


def train(stage: Stage, out: Path, device: torch.device, *, resume: bool = True, progress: bool = True) -> Path:
    """Trains to `config.steps` and returns the state's path.

    Raises ValueError for a state of another network or a loss that is no number, StoppedError after a signal, OSError
    for a folder that cannot be written, MemoryError; the last good checkpoint stays.
    """
    clock = Clock(stage.config.minutes)
    with attention_backend(stage.config.attention, device), processes(device) as group:
        run = Run(stage, out, device, group, resume=resume)
        if run.is_done:
            log.info("%s: nothing left to do; --steps asks for more", stage.name)
        else:
            _fit(run, clock, progress=progress and group.is_first)
    return run.path


def _fit(run: Run, clock: Clock, *, progress: bool) -> None:
    stage, config, group, name = run.stage, run.config, run.group, run.stage.name
    bar = tqdm(total=config.steps, initial=min(run.done, config.steps), desc=name, disable=not progress)
    since, samples = time.perf_counter(), 0
    advice = f"{config.batch_size} samples at once: lower --batch-size"
    with bar, stop_signals() as stopped, memory_errors(advice):
        for batch in _load(run):
            spent = clock.spent() if clock.deadline is None else group.max(clock.spent(), run.device)  # one for all
            run.step(batch, spent)
            run.read(run.lag)
            done, is_last = run.done, run.done >= config.steps or spent >= 1
            samples += config.batch_size * group.count
            bar.update()
            if done % config.log_every == 0 or is_last:
                figures = run.read()
                speed = samples / (time.perf_counter() - since)
                run.log(figures | {"samples_per_s": speed})
                bar.set_postfix_str(f"loss {figures['loss']:.4f}, {speed:.0f} samples/s")
                since, samples = time.perf_counter(), 0
            if group.is_first:
                if config.eval_every and done % config.eval_every == 0 and not is_last:
                    run.log(run.evaluate())
                    since, samples = time.perf_counter(), 0
                stage.preview(run.average, done, run.out, is_last=is_last)
            if group.any(bool(stopped()), run.device):
                run.save()
                group.wait()
                number = stopped() or signal.SIGTERM
                raise StoppedError(number, f"{name}: stopped after step {done}; the same call goes on there")
            if done % config.save_every == 0 and not is_last:
                run.save()
            if is_last:
                break
        found = run.finish()
    if group.is_first:
        log.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in found.items()))


def learning_rate(config: Recipe, step: int, spent: float = 0.0) -> float:
    """A linear rise over the warm-up, then a cosine down to 0, over the steps or the time, whichever is used up first.

    spent: share of the run's time that has gone by (`Clock.spent`).
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(step / config.steps, spent))))


class Figures:
    """JSON lines {"step": n, ...}. What lies beyond the step a run goes on from is dropped first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = []
        if start and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut off by a kill
                    if json.loads(line)["step"] <= start:
                        kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | rounded) + "\n")


def _write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save tells of a full disk in many lines, a plain write in one
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """`stopped()` gives the number of a SIGINT or SIGTERM that came, else 0. A second one acts at once."""
    caught = 0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, _: Any) -> None:
        nonlocal caught
        caught = number
        put_back()

    try:
        for number in before:
            signal.signal(number, catch)
        yield lambda: caught
    finally:
        put_back()


def _load(run: Run) -> DataLoader[Batch]:
    """This process's batches: of every step's, one after another, each process has its own."""
    config, group = run.config, run.group
    workers = pick_workers(config.workers, run.device)
    run.stage.batches.begin = run.done * group.count * config.batch_size
    return DataLoader(
        run.stage.batches,
        batch_size=None,  # what the dataset gives is a batch already
        sampler=range(run.done * group.count + group.rank, config.steps * group.count, group.count),
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_parent,
    )


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of this command ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(state, dict) or state.get("stage") != name:
        raise ValueError(f"{path} is no checkpoint of the stage {name}")
    return state


def _check_same(path: Path, stage: Stage, state: dict[str, Any]) -> None:
    """Raises ValueError if what a run was begun with has changed."""
    for field in dataclasses.fields(stage.config):
        before, now = state["config"].get(field.name), getattr(stage.config, field.name)
        if before != now and not field.metadata["is_free"]:
            raise ValueError(
                f"{path} was begun with {field.name} {before}, now it is {now}: begin anew with --no-resume or "
                "another --out"
            )
    for fact, value in stage.facts.items():
        if state["facts"].get(fact) != value:
            raise ValueError(f"{path} was begun with another {fact}: begin anew with --no-resume or another --out")


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
