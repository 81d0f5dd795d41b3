"""Training on a CUDA device: a step recorded as one graph computes what the same step does unrecorded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gligen.device import pick_training_dtype
from gligen.miniature.__main__ import build_task
from gligen.miniature.config import UNetStage
from gligen.miniature.export import unpack
from gligen.training.batches import Batch
from gligen.training.engine.checkpoint import read_checkpoint
from gligen.training.engine.loader import StepBatches
from gligen.training.engine.loop import Loop, run
from gligen.training.grounding_task import GroundingTask, train
from gligen.training.presets import TrainConfig
from gligen.training.trainable import build_networks
from tests.training.helpers import lines, quick, write_base

EMBEDDED = Path(__file__).parents[2] / "checkpoints" / "scenes-base.safetensors"
MOVING: dict[str, Any] = {"device": "cuda", "batch_size": 4, "gate_lr_scale": 50.0, "ema_decay": 0.9, "clip_norm": 1.0}

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def make(config: TrainConfig, folder: Path) -> Loop:
    device = torch.device("cuda", 0)
    dtype = pick_training_dtype(config.dtype, device)
    return Loop(GroundingTask(config, build_networks(config, device), folder, dtype=dtype), folder)


def take(trainer: Loop, batches: list[Batch]) -> list[tuple[float, float]]:
    """One step on each batch, with the learning rate of its place; errors and gradient norms."""
    steps = [trainer.train_step(iter([batch.pin_memory()])) for batch in batches]
    found = [trainer.check(metrics, i + 1) for i, metrics in enumerate(steps)]
    return [(each["loss"], each["grad_norm"]) for each in found]


def is_recorded(trainer: Loop) -> int:
    """How many shapes of batches are."""
    return sum(shape.replay is not None for shape in trainer.optimizer_step.shapes.values())


def assert_alike(one: Loop, other: Loop, before: dict[str, torch.Tensor]) -> None:
    """Weights, and their average, have gone the same way. Adam makes a step of any rounding error where gradients are
    about 0, so single numbers may differ by a step."""
    assert one.average is not None
    assert other.average is not None
    for a, b in ((one.parameters, other.parameters), (one.average.tensors, other.average.tensors)):
        moved = torch.cat([(a[name].detach().cpu() - before[name]).flatten() for name in before])
        apart = torch.cat([(a[name] - b[name]).detach().cpu().flatten() for name in before])
        assert moved.abs().mean() > 1e-5
        assert apart.abs().mean() < 0.05 * moved.abs().mean()


@pytest.mark.parametrize("kind", ["box-text", "keypoint", "sem", "inpaint-box-text", "box-text-image"])
def test_recorded_steps_equal_plain_ones(kind: str, tmp_path: Path, base: Path) -> None:
    config = quick(base, f"scenes-{kind}", steps=8, **MOVING)
    plain, recorded = (make(dataclasses.replace(config, graphs=graphs), tmp_path) for graphs in (False, True))
    before = {name: p.detach().cpu().clone() for name, p in plain.parameters.items()}
    made = StepBatches(batches=plain.task.batches, batch_size=4)
    batches = [made[k] for k in range(8)]
    expected, found = take(plain, batches), take(recorded, batches)
    assert (is_recorded(plain), is_recorded(recorded)) == (0, 1)
    for (loss, norm), (loss_, norm_) in zip(expected, found, strict=True):
        assert loss_ == pytest.approx(loss, rel=1e-3)
        assert norm_ == pytest.approx(norm, rel=2e-2)
    assert_alike(plain, recorded, before)


def test_recorded_steps_in_bfloat16_and_with_checkpointing(tmp_path: Path, base: Path) -> None:
    config = quick(base, steps=8, **MOVING, dtype="auto", checkpointing=True, accumulate=2)
    plain, recorded = (make(dataclasses.replace(config, graphs=graphs), tmp_path) for graphs in (False, True))
    made = StepBatches(batches=plain.task.batches, batch_size=4)
    for trainer in (plain, recorded):
        found = [trainer.train_step(iter([made[2 * k].pin_memory(), made[2 * k + 1].pin_memory()])) for k in range(6)]
        losses = [trainer.check(figures, 0)["loss"] for figures in found]
        if trainer is plain:
            expected = losses
    assert is_recorded(recorded) == 1
    assert losses == pytest.approx(expected, rel=0.02)


def test_two_batch_sizes_are_two_graphs(tmp_path: Path, base: Path) -> None:
    config = quick(base, steps=12, **MOVING)
    plain, recorded = (make(dataclasses.replace(config, graphs=graphs), tmp_path) for graphs in (False, True))
    before = {name: p.detach().cpu().clone() for name, p in plain.parameters.items()}
    batches = [plain.task.batches.batch(range(8 * k, 8 * k + (2, 6)[k % 2])) for k in range(12)]
    expected, found = take(plain, batches), take(recorded, batches)
    assert is_recorded(recorded) == 2
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-3)
    assert_alike(plain, recorded, before)


def test_a_batch_that_is_no_number_changes_nothing_and_ends_the_run(tmp_path: Path, base: Path) -> None:
    trainer = make(quick(base, steps=8, **MOVING), tmp_path)
    made = StepBatches(batches=trainer.task.batches, batch_size=4)
    take(trainer, [made[k] for k in range(6)])
    assert is_recorded(trainer) == 1
    state = [*trainer.parameters.values(), *(s for p in trainer.optimizer.state.values() for s in p.values())]
    kept = [tensor.detach().clone() for tensor in state]
    spoilt = dataclasses.replace(made[6], noise=made[6].noise * float("nan"))
    figures = trainer.train_step(iter([spoilt.pin_memory()]))
    later = trainer.train_step(iter([made[7].pin_memory()]))  # begun before anybody read the one before it
    with pytest.raises(ValueError, match=r"step 7: the loss is nan .* no weight was changed and nothing was saved yet"):
        trainer.check(figures, 7)
    assert torch.isfinite(torch.tensor(list(trainer.check(later, 8).values()))).all()
    trainer = make(quick(base, steps=8, **MOVING), tmp_path)
    take(trainer, [made[k] for k in range(6)])
    state = [*trainer.parameters.values(), *(s for p in trainer.optimizer.state.values() for s in p.values())]
    kept = [tensor.detach().clone() for tensor in state]
    trainer.train_step(iter([spoilt.pin_memory()])).read()
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))


def test_a_run_with_kept_scenes_is_recorded_logged_and_resumed(tmp_path: Path, base: Path) -> None:
    config = quick(
        base, **MOVING, dtype="auto", steps=9, lr_schedule="constant", cache=16, reuse=1, workers=2, save_every=4,
        diagnose_every=5, diagnosis_samples=4,
    )  # fmt: skip
    train(config, tmp_path)
    train(dataclasses.replace(config, steps=14), tmp_path)
    figures = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in figures] == list(range(1, 15))
    assert all(0 < line["loss"] < 10 and 0 < line["grad_norm"] < 100 for line in figures)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.progress.step == 14


def stage_losses(out: Path, **fields: Any) -> list[float]:
    """Of a small UNet trained on the embedded autoencoder and CLIP."""
    unpack(EMBEDDED, out)
    shutil.rmtree(out / "unet")
    config = UNetStage(
        model_channels=32, channel_mult=(1, 1), attention_downsamples=(2,), num_heads=1, batch_size=64, lr=3e-3,
        warmup_steps=4, log_every=1, eval_every=0, eval_scenes=64, preview_every=0, save_every=1000, workers=2,
        min_snr=5.0, device="cuda", **fields,
    )  # fmt: skip
    run(partial(build_task, "unet", config, out), config, out / "unet")
    rows = [json.loads(line) for line in (out / "unet" / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_miniatures_unet_learns_on_cuda(tmp_path: Path) -> None:
    losses = stage_losses(tmp_path, steps=20, cache=640, reuse=1)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_miniatures_recorded_steps_equal_plain_ones(tmp_path: Path) -> None:
    one, other = (stage_losses(tmp_path / str(g), steps=8, dtype="float32", graphs=g) for g in (False, True))
    assert other == pytest.approx(one, rel=1e-2)


def test_compiled_blocks_are_recorded_too(tmp_path: Path, base: Path) -> None:
    config = quick(base, steps=8, **MOVING, dtype="auto")
    plain = make(dataclasses.replace(config, graphs=False), tmp_path)
    compiled = make(dataclasses.replace(config, compile=True), tmp_path)
    made = StepBatches(batches=plain.task.batches, batch_size=4)
    expected, found = (take(trainer, [made[k] for k in range(6)]) for trainer in (plain, compiled))
    assert is_recorded(compiled) == 1
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=0.02)
