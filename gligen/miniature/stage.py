"""What the three stages share as tasks of the training loop (gligen/training/engine), and a stage's outcome.

A stage's run lies in OUT/NAME: its checkpoint and log, and what it looked at on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gligen.config import from_dict
from gligen.miniature.config import STAGES, Recipe
from gligen.miniature.data import SceneBatches, Tensors
from gligen.training.engine.checkpoint import Checkpoint, Progress, check_folder, read_checkpoint, write_checkpoint
from gligen.training.engine.logs import RunLog
from gligen.training.engine.options import MODEL
from gligen.training.engine.task import Event, Task, speed_up


class StageTask(Task):
    """One of the three networks. network: what is trained, by part."""

    config: Recipe
    network: nn.ModuleDict
    batches: SceneBatches

    def __init__(
        self,
        config: Recipe,
        network: nn.ModuleDict,
        batches: SceneBatches,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.batches, self.device, self.dtype = config, batches, device, dtype
        # channels last: convolutions are a third faster on a CPU
        self.network = network.to(device).to(memory_format=torch.channels_last)
        speed_up(self.network, config, device)

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out scenes."""

    def measure(self) -> dict[str, float]:
        """Measures what later stages need to know of the outcome, beside its weights."""
        return {}

    def held_out(self) -> Iterator[Tensors]:
        """Batches of an evaluation, on the device."""
        size = self.config.batch_size
        for i in range(max(1, self.config.eval_scenes // size)):
            batch = self.batches.held_out(range(i * size, (i + 1) * size))
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def events(self) -> Sequence[Event]:
        return [Event(self._evaluate, self.config.eval_every)]

    def finish(self, run_log: RunLog, step: int) -> dict[str, float]:
        results = self.measure()
        run_log.write(step, self._evaluated() | results)
        return results

    def _evaluate(self, step: int, run_log: RunLog) -> None:
        if step < self.config.steps:  # at the end `finish` does
            found = self._evaluated()
            run_log.write(step, found)
            run_log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

    def _evaluated(self) -> dict[str, float]:
        self.network.eval()
        try:
            return self.evaluate()
        finally:
            self.network.train()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A stage's outcome, as later stages and the export need it.

    networks: part -> name -> tensor, averaged. measured: what `StageTask.measure` found. fingerprint: of the weights.
    """

    config: Any  # CLIPStage, VAEStage or UNetStage
    networks: dict[str, dict[str, Tensor]]
    measured: dict[str, float]
    facts: dict[str, str]
    step: int
    fingerprint: str


def load_trained(out: Path, name: str) -> Trained:
    """Raises FileNotFoundError or ValueError, one line, unless the stage was trained to its end."""
    state = stage_checkpoint(out, name)
    if state is None:
        raise FileNotFoundError(f"{out / name} holds no run: run `python -m gligen.miniature {name} --out {out}` first")
    step = state.progress.step
    if not state.progress.is_done:
        raise ValueError(
            f"{out / name} has done {step} of {state.config['steps']} steps: call "
            f"`python -m gligen.miniature {name} --out {out}` again to finish it (or give --steps {step})"
        )
    tensors = {full: tensor.read() for full, tensor in state.published().items()}
    networks: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        part, _, rest = full.partition(".")
        networks.setdefault(part, {})[rest] = tensor
    return Trained(
        config=from_dict(STAGES[name], state.config),
        networks=networks,
        measured=state.progress.results,
        facts=state.facts,
        step=step,
        fingerprint=_fingerprint(tensors),
    )


def stage_checkpoint(out: Path, name: str) -> Checkpoint | None:
    """The checkpoint of a stage in `out`, or None. Raises ValueError, one line, for one of an earlier version or a
    damaged one."""
    if (out / f"{name}.pt").exists() and not (out / name).exists():
        raise ValueError(f"{out / name}.pt was begun by an earlier version: finish it there, or give another --out")
    return read_checkpoint(out / name)


def begun_with(out: Path, name: str) -> dict[str, Any]:
    """The fields that a stage's run in `out` is bound to, such as sizes; nothing if there is none."""
    state = stage_checkpoint(out, name)
    if state is None:
        return {}
    begun = from_dict(STAGES[name], state.config)
    fields = [f for f in dataclasses.fields(begun) if not f.metadata["is_free"]]
    if state.progress.step == 0:  # nothing was learnt with the rest
        fields = [f for f in fields if f.metadata["group"] == MODEL]
    return {f.name: getattr(begun, f.name) for f in fields}


def save_begun(
    out: Path,
    name: str,
    config: Recipe,
    networks: Mapping[str, Mapping[str, Tensor]],
    *,
    is_done: bool,
    fixed: Sequence[str] = (),
    measured: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes the checkpoint of a stage whose weights, by part, come from elsewhere: trained to its end, or to be.

    fixed: full names of those that do not train.
    """
    whole = {f"{part}.{key}": tensor for part, tensors in networks.items() for key, tensor in tensors.items()}
    weights = {key: tensor for key, tensor in whole.items() if key not in fixed}
    check_folder(out / name)
    write_checkpoint(
        out / name,
        progress=Progress(step=config.steps if is_done else 0, is_done=is_done, results=dict(measured or {})),
        config=config,
        facts=facts or {},
        samples_per_step=config.batch_size,
        weights=weights,
        fixed={key: whole[key] for key in fixed},
        average=weights if config.ema_decay else None,
    )
    return out / name


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
