"""The log of a run: JSON lines in its folder, TensorBoard where it is installed, a bar with the time left."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from gligen.files import write_atomically
from gligen.training.engine.checkpoint import LOG

log = logging.getLogger("gligen")


class RunLog:
    """The log of a run, where metrics go. Of several processes only the first has one that writes.

    step: that the run goes on from. Lines behind it, of steps that a stopped run did not save, are taken out.
    """

    def __init__(self, folder: Path, *, step: int, steps: int, is_writing: bool, name: str = "training") -> None:
        self.path = folder / LOG
        self.is_writing = is_writing
        self.board: Any = None
        self.bar = tqdm(total=steps, initial=step, unit="step", desc=name, disable=None if is_writing else True)
        if is_writing:
            before = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            kept = "".join(f"{line}\n" for line in before.splitlines() if step and _step(line) <= step)
            if kept != before:
                write_atomically(self.path, kept.encode())
            self.board = _tensorboard(folder, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def advance(self, loss: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line; numbers, nested ones too, also go to TensorBoard."""
        if not self.is_writing:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.bar.disable and "loss" in metrics:  # no terminal: a line instead of a bar
            log.info("step %d: loss %.4f, %.0f images/s", step, metrics["loss"], metrics["images_per_second"])
        if self.board is not None:
            for name, value in _flat(metrics):
                self.board.add_scalar(name, value, step)

    def info(self, message: str, *args: Any) -> None:
        """Logs a line for people, from the first process only, that does not tear the bar."""
        if self.is_writing:
            with tqdm.external_write_mode():
                log.info(message, *args)


def _step(line: str) -> int:
    """A line's step; a line cut off by a kill counts as behind everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            flat += _flat({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat.append((f"{prefix}{name}", float(value)))
    return flat


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer into DIR/tensorboard, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)
