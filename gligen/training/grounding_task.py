"""Teaching grounding to a frozen model, as a task of the training loop (engine/loop.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gligen.config import to_dict
from gligen.data.encode import fingerprint
from gligen.diffusion.loss import x0_weights
from gligen.diffusion.schedule import Schedule
from gligen.modules.unet import UNetModel
from gligen.training import positions
from gligen.training.batches import Batch, EncodedBatch, GroundingBatches
from gligen.training.data import open_data
from gligen.training.diagnosis import Diagnosis, advise, gates, summary
from gligen.training.engine.logs import RunLog
from gligen.training.engine.loop import run
from gligen.training.engine.optim import ParameterGroup, learning_rate
from gligen.training.engine.task import Event, Task, keeps_master_weights, speed_up
from gligen.training.objective import Objective
from gligen.training.presets import TrainConfig
from gligen.training.preview import make_previews, preview
from gligen.training.trainable import (
    GATES,
    Networks,
    build_networks,
    frozen_checksum,
    store_frozen,
    trainable_parameters,
)
from gligen.weights import save_adapter

ADAPTER = "adapter.safetensors"


def train(config: TrainConfig, out: str | Path, *, resume: bool = True) -> Path:
    """One run, from its folder's checkpoint if there is one; returns the adapter's path. As `engine.loop.run`."""

    def build(device: torch.device, dtype: torch.dtype) -> GroundingTask:
        return GroundingTask(config, build_networks(config, device), Path(out), dtype=dtype)

    run(build, config, Path(out), resume=resume)
    return Path(out) / ADAPTER


class GroundingTask(Task):
    """New layers in a frozen model learn to read where things are.

    networks: from `build_networks`; the loop moves what `trainable_parameters` lists. folder: for previews.
    """

    name = "training"
    config: TrainConfig
    network: UNetModel

    def __init__(
        self, config: TrainConfig, networks: Networks, folder: Path, *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.networks, self.folder, self.dtype = config, networks, folder, dtype
        self.network = networks.unet
        self.device = networks.unet.first_conv.weight.device
        self.has_master_weights = keeps_master_weights(self.device, dtype)
        checksum = frozen_checksum(networks)
        self.stored = checksum  # of the frozen weights as they are kept while training, see `cast_frozen`
        schedule = Schedule(**to_dict(networks.config.schedule))
        encoders: dict[str, nn.Module] = {"latents": networks.vae, "phrases": networks.text_encoder}
        if networks.image_encoder is not None:
            encoders["references"] = networks.image_encoder
        self.data = open_data(config, networks.config, lambda part: fingerprint(part, encoders[part]))
        self.facts = {"base model": checksum, **self.data.facts}
        self.batches: GroundingBatches = self.data.training
        weights = None
        if config.weighting == "x0":
            weights = x0_weights(schedule, config.timestep_low, config.timestep_high, config.weight_limit)
        self.objective = Objective(
            networks,
            schedule,
            dtype=dtype,
            weights=weights,
            batches=self.batches,
            phrases=self.data.phrases,
            casts_inputs=self.has_master_weights,
        )
        self.diagnosis: Diagnosis | None = None
        speed_up(networks.unet, config, self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.networks)

    def groups(self) -> Sequence[ParameterGroup]:
        """The gates have a group of their own: another rate, and no decay, which would shut them."""
        names = list(self.parameters())
        others = [name for name in names if not name.endswith(GATES)]
        gates = [name for name in names if name.endswith(GATES)]
        return [
            ParameterGroup(others, 1.0, self.config.weight_decay),
            ParameterGroup(gates, self.config.gate_lr_scale, 0.0),
        ]

    def cast_frozen(self) -> None:
        store_frozen(self.networks, self.dtype)
        self.stored = frozen_checksum(self.networks)

    def prepare(self, batch: Batch, progress: float) -> EncodedBatch:
        self.data.count(batch.faults)
        return self.objective.encode(batch)

    def loss(self, batch: EncodedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, error = self.objective.loss(batch)
        return loss, {"loss": error}

    def metrics(self) -> dict[str, Any]:
        mean, largest = summary(gates(self.networks.unet))
        return {"gates": {"mean": mean, "max": largest}}

    def lines(self) -> Sequence[str]:
        return self.data.found

    def events(self) -> Sequence[Event]:
        config = self.config
        found = []
        if config.diagnose_every:
            found.append(Event(self._diagnose, config.diagnose_every, at_start=True, at_end=True))
        if config.preview_every:
            found.append(Event(self._preview, config.preview_every, at_start=True, at_end=True))
        return found

    def publish(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The adapter that sample.py takes."""
        save_adapter(folder / ADAPTER, dict(weights), self.networks.config)

    def check(self) -> None:
        """Raises RuntimeError if a weight that must not change has."""
        if frozen_checksum(self.networks) != self.stored:
            raise RuntimeError("frozen weights have changed during training: a bug; the last adapter is not to be used")

    def _preview(self, step: int, run_log: RunLog) -> None:
        """DIR/previews/STEP.png, and grounding accuracy on it. One that cannot be made is logged, and stops nothing."""
        config, path = self.config, self.folder / "previews" / f"{step:07d}.png"
        try:
            previews = make_previews(self.data.preview, config.preview_images, config.mode)
            batch_size = min(config.batch_size, config.preview_images)
            found = preview(self.networks, previews, path, batch_size)
        except (ValueError, OSError, MemoryError) as error:
            run_log.info("no preview at step %d: %s", step, error)
            return
        run_log.write(step, {"preview": found})
        run_log.info("step %d: previews of %d held-out requests in '%s'", step, len(previews), path)
        if found:
            run_log.info(
                "step %d: %.0f %% of asked objects in place with their colour, %.0f %% with their shape too",
                step, 100 * found["found"], 100 * found["found_with_shape"],
            )  # fmt: skip

    def _diagnose(self, step: int, run_log: RunLog) -> None:
        """Losses with right, null, shuffled and moved grounding, of the weights that would be published."""
        config = self.config
        pictures = min(config.diagnosis_samples, self.data.held_out_size or config.diagnosis_samples)
        if self.diagnosis is None:
            # fewer pictures come again with other noise, all as often: no sample's neighbour is its own picture
            samples = config.diagnosis_samples // pictures * pictures
            self.diagnosis = Diagnosis(self.objective, self.data.held_out, samples, min(config.batch_size, samples))
        if step == 0 and pictures >= positions.FEWEST:
            self._log_positions(self.diagnosis.positions(pictures), run_log)
        losses, opened = self.diagnosis.losses(), gates(self.networks.unet)
        mean_gate, largest_gate = summary(opened)
        reach = config.gate_lr_scale * sum(learning_rate(config, before) for before in range(step))
        advice = advise(losses, largest_gate, step, reach)
        run_log.write(step, {"diagnosis": losses.metrics(), "fusers": opened} | ({"advice": advice} if advice else {}))
        run_log.info(
            "step %d: high-noise loss %.4f with the right grounding, %.4f with none; right/another's %.4f, "
            "right/moved %.4f%s; gates mean %.1e, max %.1e",
            step, losses.right, losses.null, losses.ratio, losses.where,
            "" if losses.shape is None else f", right/other shapes {losses.shape:.4f}", mean_gate, largest_gate,
        )  # fmt: skip
        if advice:
            run_log.info("advice: %s", advice)

    def _log_positions(self, found: dict[str, positions.Positions], run_log: RunLog) -> None:
        """What the model knows of places before the first step: the frozen base, with what --adapter gave it."""
        advice = positions.advise(found)
        errors = {place: each.error for place, each in found.items()}
        run_log.write(0, {"positions": errors} | ({"advice": advice} if advice else {}))
        run_log.info("%s", positions.summary(found))
        if advice:
            run_log.info("advice: %s", advice)
