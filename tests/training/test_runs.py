"""Runs: killed, stopped, shared by processes, resumed with other flags, on a full disk; and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import gligen.training.grounding_task as task_module
from gligen import cli
from gligen.commands import train as script
from gligen.training.engine.checkpoint import read_checkpoint
from gligen.training.engine.loop import Stopped
from gligen.training.grounding_task import train
from gligen.training.objective import Objective
from gligen.training.presets import PRESETS
from gligen.training.trainable import build_networks, store_frozen, trainable_parameters
from gligen.weights import read_weights
from gligen.weights.safetensors_file import write_safetensors
from tests.training.helpers import (
    CPU,
    KILLED_IN_STEP_6,
    PLAIN,
    flags,
    lines,
    loop_of,
    quick,
    start,
    timeless,
    write_base,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_killed_and_resumed_equals_unbroken_bit_for_bit(tmp_path: Path, base: Path) -> None:
    fields = {"steps": 8, "save_every": 2, "log_every": 3, "ema_decay": 0.9, "accumulate": 2, "warmup_steps": 3}
    killed = start(KILLED_IN_STEP_6, flags(base, tmp_path / "killed", **fields))
    config = quick(base, **fields)
    unbroken = train(config, tmp_path / "unbroken")
    assert killed.wait(120) == -signal.SIGKILL
    assert read_checkpoint(tmp_path / "killed").progress.step == 4
    resumed = train(config, tmp_path / "killed")
    assert resumed.read_bytes() == unbroken.read_bytes()
    name = "checkpoint.safetensors"
    a, b = (read_checkpoint(tmp_path / run).tensors for run in ("killed", "unbroken"))
    assert set(a) == set(b)
    assert all(torch.equal(a[name].read(), b[name].read()) for name in a)
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "unbroken")
    assert [line["step"] for line in timeless(tmp_path / "killed")] == [3, 6]
    assert (tmp_path / "killed" / name).exists()


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path: Path, base: Path) -> None:
    process = start(PLAIN, flags(base, tmp_path, steps=100_000, lr_schedule="constant"))
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() or len((tmp_path / "log.jsonl").read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    saved = read_checkpoint(tmp_path).progress.step
    assert saved >= 2
    assert f"stopped: step {saved} is saved" in err.decode().splitlines()[-1]
    config = quick(base, steps=saved + 1, lr_schedule="constant")
    train(config, tmp_path)
    assert read_checkpoint(tmp_path).progress.step == saved + 1
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, saved + 2))


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, base: Path) -> None:
    fields = {"steps": 3, "log_every": 1, "lr": 1e-3, "clip_norm": 0.0}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = flags(base, tmp_path / "two", batch_size=2, **fields)
    two = [start(PLAIN, arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]
    train(quick(base, batch_size=4, **fields), tmp_path / "one")
    printed = []
    for process in two:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        printed.append(out.decode())
    assert printed[1] == ""  # rank 0 writes and speaks
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    one, other = (read_weights(tmp_path / run / "adapter.safetensors").parts["unet"] for run in ("one", "two"))
    # Adam divides by a gradient's size, so where gradients are rounding errors a few numbers may differ by a step
    difference = torch.cat([(one[name].read() - other[name].read()).abs().flatten() for name in one])
    assert difference.quantile(0.99) < 1e-6 if difference.numel() < 2**24 else difference.mean() < 1e-6
    gates = [name for name in one if "alpha" in name]
    assert all(torch.allclose(one[name].read(), other[name].read(), atol=1e-6) for name in gates)


def test_nan_stops_before_any_weight_changes_and_keeps_the_checkpoint(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(quick(base, steps=2, lr_schedule="constant"), tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes(), (tmp_path / "adapter.safetensors").read_bytes()
    encode = Objective.inputs

    def with_nan(self: Objective, batch: object) -> object:
        inputs = encode(self, batch)  # type: ignore[arg-type]
        return dataclasses.replace(inputs, noise=inputs.noise * float("nan"))

    monkeypatch.setattr(Objective, "inputs", with_nan)
    with pytest.raises(ValueError, match=r"step 3: the loss is nan .* the checkpoint of step 2 is kept: lower --lr"):
        train(quick(base, steps=4, lr_schedule="constant"), tmp_path)
    assert before == (
        (tmp_path / "checkpoint.safetensors").read_bytes(),
        (tmp_path / "adapter.safetensors").read_bytes(),
    )
    networks = build_networks(quick(base), CPU)
    trainer = loop_of(quick(base), tmp_path, networks)
    state = {name: tensor.clone() for name, tensor in networks.unet.state_dict().items()}
    with pytest.raises(ValueError, match="no weight was changed"):
        trainer.check(trainer.train_step(iter([trainer.task.batches.batch([0])])), 1)
    assert all(torch.equal(state[name], tensor) for name, tensor in networks.unet.state_dict().items())


def test_full_disk_is_told_and_the_last_checkpoint_kept(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(quick(base, steps=2, lr_schedule="constant"), tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gligen.weights.safetensors_file.os.fsync", full)
    with pytest.raises(
        OSError, match=r"step 3 cannot be saved to '.*': the disk is full; the checkpoint of step 2 is kept"
    ):
        train(quick(base, steps=3, lr_schedule="constant"), tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_resuming_with_another_config_says_what_differs(tmp_path: Path, base: Path) -> None:
    train(quick(base), tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with lr 0\.001 \(now 0\.1\).*--no-resume"):
        train(quick(base, lr=0.1), tmp_path)
    train(quick(base, batch_size=1, accumulate=2), tmp_path)  # as many, which is what out of memory advises
    other = tmp_path / "other.safetensors"
    part = dict(read_weights(base).parts["vae"])
    whole = {f"{p}.{n}": t for p, named in read_weights(base).parts.items() for n, t in named.items()}
    from gligen.weights import hold

    whole |= hold({"vae.quant_conv.bias": part["quant_conv.bias"].read() + 1})
    from gligen.weights.safetensors_file import read_safetensors

    write_safetensors(other, whole, read_safetensors(base)[1])
    with pytest.raises(ValueError, match="another base model"):
        train(quick(other), tmp_path)
    train(quick(base, device="cpu", save_every=1, log_every=2), tmp_path)  # what changes nothing may change
    train(quick(base, lr=0.1), tmp_path, resume=False)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1


def test_damaged_checkpoints_are_told(tmp_path: Path, base: Path) -> None:
    train(quick(base), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="fully downloaded"):
        train(quick(base), tmp_path)
    write_safetensors(path, {}, {"format": "other"})
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        train(quick(base), tmp_path)


def test_out_of_memory_comes_with_advice(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Objective, inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Objective, "losses", too_large)
    with pytest.raises(MemoryError, match="lower --batch-size and raise --accumulate"):
        train(quick(base), tmp_path)


def one_line_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says, once, when it refuses."""
    with contextlib.suppress(SystemExit):  # argparse's own way out
        assert cli.run(script.main, arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in last)
    return last[-1]


def test_user_mistakes_are_one_clear_line(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    error = one_line_error(["boxes", *out], capsys)
    assert all(name in error for name in PRESETS)
    assert "no such file" in one_line_error(["scenes-box-text", *out, "--base", str(tmp_path / "none.ckpt")], capsys)
    adapter = train(quick(base, steps=0), tmp_path / "first")
    error = one_line_error(["scenes-box-text", *out, "--base", str(adapter)], capsys)
    assert "holds no whole UNet and no autoencoder and no text encoder" in error
    assert "kind 'adapter' of mode box-text" in error
    assert "0.9" not in one_line_error(["scenes-box-text", *out, "--lr", "fast"], capsys)
    assert "lr is -1.0" in one_line_error(["scenes-box-text", *out, "--lr", "-1"], capsys)
    assert "a share from 0 to 1" in one_line_error(["scenes-box-text", *out, "--caption-drop", "2"], capsys)
    assert "unknown mode 'boxes'" in one_line_error(["scenes-box-text", *out, "--mode", "boxes"], capsys)
    assert "float32, bfloat16" in one_line_error(["scenes-box-text", *out, "--dtype", "float16"], capsys)
    error = one_line_error(["scenes-box-text", *out, "--base", str(base), "--timestep-high", "1000"], capsys)
    assert "last timestep is 999" in error
    blocked = tmp_path / "file"
    blocked.write_text("")
    error = one_line_error(["scenes-box-text", "--out", str(blocked / "run")], capsys)
    assert "cannot be written" in error


def test_every_field_is_a_flag_and_help_needs_no_torch() -> None:
    code = (
        "import sys; from gligen.commands import train\n"
        "try: train.main(['scenes-sem', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    began = time.monotonic()
    process = start(code, [])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    assert time.monotonic() - began < 2
    for field in dataclasses.fields(PRESETS["scenes-sem"]):
        assert f"--{field.name.replace('_', '-')}" in out.decode()
    assert "(default: sem)" in out.decode()


def test_flags_override_the_preset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}
    monkeypatch.setattr(task_module, "train", lambda config, out, resume: seen.update(c=config, o=out, r=resume))
    words = f"--out {tmp_path} --no-resume --lr 0.01 --map-dims 8 8 16 16 --fuser-type gatedSA2 --base b.ckpt"
    script.main(["scenes-hed", *words.split()])
    expected = dataclasses.replace(
        PRESETS["scenes-hed"], lr=0.01, map_dims=(8, 8, 16, 16), fuser_type="gatedSA2", base="b.ckpt"
    )
    assert (seen["c"], seen["o"], seen["r"]) == (expected, str(tmp_path), False)


@pytest.mark.parametrize(("preset", "fuser_type"), [("scenes-box-text", "gatedCA"), ("scenes-depth", "gatedSA2")])
def test_other_fusers_train_and_load(preset: str, fuser_type: str, tmp_path: Path, base: Path) -> None:
    from gligen.loading import open_model

    adapter = train(quick(base, preset, fuser_type=fuser_type), tmp_path)
    assert open_model(base, adapter).config.unet.grounding.fuser_type == fuser_type


def test_a_stopped_run_raises_after_saving(tmp_path: Path, base: Path) -> None:
    trainer = loop_of(quick(base, steps=5), tmp_path)
    trainer.stop_signal = signal.SIGTERM
    with pytest.raises(Stopped, match="stopped: step 0 is saved"):
        trainer.fit()
    assert read_checkpoint(tmp_path).progress.step == 0
    train(quick(base, steps=5), tmp_path)  # a checkpoint of step 0 holds no moments yet


@pytest.mark.parametrize(("preset", "cache"), [("scenes-box-text", 4), ("scenes-depth", 0)])
def test_a_stopped_run_is_resumed_bit_for_bit(preset: str, cache: int, tmp_path: Path, base: Path) -> None:
    """On kept scenes too, and with the channels-last convolutions of a map, whose moments lie in memory as they do."""
    config = quick(base, preset, cache=cache, steps=5, ema_decay=0.9, lr_schedule="constant", gate_lr_scale=50.0)
    broken = tmp_path / "broken"
    train(dataclasses.replace(config, steps=3), broken)
    train(config, broken)
    train(config, tmp_path / "whole")
    a, b = (read_checkpoint(folder) for folder in (broken, tmp_path / "whole"))
    assert a is not None
    assert b is not None
    assert all(torch.equal(a.tensors[name].read(), b.tensors[name].read()) for name in b.tensors)


def test_checkpointing_trains_the_same_and_frozen_weights_may_be_stored_low(tmp_path: Path, base: Path) -> None:
    steps = []
    for number, fields in enumerate(({}, {"checkpointing": True})):
        config = quick(base, **fields)
        trainer = loop_of(config, tmp_path / str(number))
        steps.append(trainer.check(trainer.train_step(iter([trainer.task.batches.batch(range(2))])), 1))
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    networks = build_networks(config, CPU)
    trainer = loop_of(config, tmp_path, networks, torch.bfloat16)
    store_frozen(networks, torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in networks.unet.named_parameters()}
    assert {kinds[name] for name in trainable_parameters(networks)} == {torch.float32}
    assert networks.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    found = trainer.check(trainer.train_step(iter([trainer.task.batches.batch(range(2))])), 1)
    assert found["loss"] == pytest.approx(steps[0]["loss"], rel=0.05)
    assert found["grad_norm"] > 0


def test_a_run_with_rounded_weights_learns_alike_and_is_resumed_bit_for_bit(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA does in bfloat16, here on the CPU: float32 weights are moved, rounded ones computed with."""
    fields: dict[str, object] = {"steps": 6, "gate_lr_scale": 50.0, "lr_schedule": "constant", "diagnose_every": 2}
    fields |= {"diagnosis_samples": 2, "preview_every": 3, "preview_images": 1}
    train(quick(base, **fields), tmp_path / "float32")
    config = quick(base, **fields, dtype="bfloat16")
    monkeypatch.setattr(task_module, "keeps_master_weights", lambda device, dtype: dtype != torch.float32)
    train(config, tmp_path / "whole")
    train(dataclasses.replace(config, steps=4), tmp_path / "broken")
    train(config, tmp_path / "broken")
    full, low, again = (
        [line for line in lines(tmp_path / name) if "loss" in line] for name in ("float32", "whole", "broken")
    )
    assert [line["loss"] for line in low] == pytest.approx([line["loss"] for line in full], rel=0.03)
    assert [line["gates"]["max"] for line in low] == pytest.approx([line["gates"]["max"] for line in full], rel=0.2)
    assert [line["loss"] for line in again] == [line["loss"] for line in low]
    one, other = (read_checkpoint(tmp_path / name).tensors for name in ("whole", "broken"))
    assert all(torch.equal(one[name].read(), other[name].read()) for name in one)
    kept = [tensor.read() for name, tensor in one.items() if name.startswith("weights.")]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept)
