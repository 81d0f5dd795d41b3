"""Training on people's own pictures: the drawn world, written as such sets are, read back through `--data`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gligen import cli
from gligen.commands import train as script
from gligen.config import TextEncoderConfig
from gligen.data.__main__ import main as data_command
from gligen.data.encode import fingerprint
from gligen.data.scenes import make_scene
from gligen.data.streams import Series
from gligen.diffusion.schedule import Schedule
from gligen.loading import build_pipeline, open_model
from gligen.modes import MODES
from gligen.modules.bert import BERTTextEncoder
from gligen.request import parse_request
from gligen.training.data import Data, open_data
from gligen.training.engine.checkpoint import read_checkpoint
from gligen.training.engine.loader import StepBatches
from gligen.training.engine.loop import Loop
from gligen.training.grounding_task import GroundingTask, train
from gligen.training.objective import Objective
from gligen.training.trainable import build_networks
from gligen.weights import hold, read_weights, save_model
from tests.generated import generated_base
from tests.training.helpers import CPU, KILLED_IN_STEP_6, flags, lines, quick, start, timeless, write_base

COUNT = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "coco"
    draw(folder, "box-text")
    return folder


def draw(folder: Path, mode: str) -> None:
    words = ["draw", "--format", "coco", "--out", str(folder), "--count", str(COUNT), "--mode", mode, "--size", "64"]
    data_command(words)


@pytest.mark.parametrize("mode", [*(m for m in MODES if m != "box-text"), "box-text"])
def test_every_mode_trains_on_pictures(mode: str, tmp_path: Path, base: Path) -> None:
    draw(tmp_path / "set", mode)
    fields = {"data": (str(tmp_path / "set"),), "size": (64, 64), "held_out": 0.3, "gate_lr_scale": 50.0}
    config = quick(base, f"scenes-{mode}", **fields, diagnose_every=2, diagnosis_samples=4, preview_every=2)
    adapter = train(dataclasses.replace(config, preview_images=2), tmp_path / "run")
    assert read_weights(adapter).modes == (mode,)
    diagnosis = [line["diagnosis"] for line in lines(tmp_path / "run") if "diagnosis" in line]
    assert len(diagnosis) == 2
    assert "reshaped" not in diagnosis[0]  # nobody knows the shapes of things in photographs
    assert (tmp_path / "run/previews/0000002.png").exists()
    gates = [t.read() for name, t in read_weights(adapter).parts["unet"].items() if name.endswith("alpha_attn")]
    assert all(gate != 0 for gate in gates)


def test_a_sample_is_the_picture_with_its_own_boxes_and_phrases(base: Path, boxes: Path) -> None:
    config = quick(base, data=(str(boxes),), size=(64, 64), held_out=0.0)
    data = open_data(config, build_networks(config, CPU).config)
    batch = data.training.batch(range(COUNT))
    scenes = [make_scene(Series.TRAINING, i, size=64) for i in range(COUNT)]
    shown = {hash(scene.image.tobytes()): scene for scene in scenes}
    assert batch.phrases is not None
    assert batch.images is not None
    for b in range(COUNT):
        scene = shown[hash(batch.images[b].permute(1, 2, 0).numpy().tobytes())]
        n = len(scene.objects)
        found = batch.grounding["boxes"][b, :n].numpy()
        np.testing.assert_allclose(found, [item.box for item in scene.objects], atol=0.51 / 64)
        asked = {entity: batch.phrases[which] for sample, entity, which in batch.phrase_slots.tolist() if sample == b}
        assert asked == {i: item.phrase for i, item in enumerate(scene.objects)}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_has_every_picture_once(processes: int, base: Path, boxes: Path) -> None:
    config = quick(base, data=(str(boxes),), size=(64, 64), held_out=0.0)
    data = open_data(config, build_networks(config, CPU).config)
    seen: list[int] = []
    for rank in range(processes):
        parts = StepBatches(batches=data.training, batch_size=2, rank=rank, processes=processes)
        for k in range(COUNT // (2 * processes)):
            images = parts[k].images
            assert images is not None
            seen += [hash(image.numpy().tobytes()) for image in images]
    assert len(set(seen)) == len(seen) == COUNT


def test_held_out_pictures_are_not_trained_on(base: Path, boxes: Path) -> None:
    config = quick(base, data=(str(boxes),), size=(64, 64), held_out=0.3)
    data = open_data(config, build_networks(config, CPU).config)
    assert data.held_out_size is not None
    held_out = {hash(image.numpy().tobytes()) for image in data.held_out.batch(range(data.held_out_size)).images}
    trained = {hash(image.numpy().tobytes()) for image in data.training.batch(range(3 * COUNT)).images}
    assert len(held_out) == data.held_out_size >= 2
    assert len(trained) == COUNT - data.held_out_size
    assert not held_out & trained


def test_few_held_out_pictures_come_again_with_other_noise(tmp_path: Path, base: Path, boxes: Path) -> None:
    config = quick(base, data=(str(boxes),), size=(64, 64), held_out=0.3, diagnose_every=1, diagnosis_samples=64)
    task = GroundingTask(config, build_networks(config, CPU), tmp_path)
    size = task.data.held_out_size
    assert size is not None
    batch = task.data.held_out.batch([0, size, 1])
    assert batch.images is not None
    assert torch.equal(batch.images[0], batch.images[1])
    assert not torch.equal(batch.images[0], batch.images[2])
    assert not torch.equal(batch.noise[0], batch.noise[1])
    Loop(task, tmp_path).fit()
    assert task.diagnosis is not None
    boxes_of = task.diagnosis.inputs.grounding["boxes"]
    assert len(boxes_of) == 64 // size * size
    assert all(not torch.equal(own, other) for own, other in zip(boxes_of, boxes_of.roll(1, 0), strict=True))


def test_bad_pictures_are_counted_and_too_many_end_the_run(tmp_path: Path, base: Path, boxes: Path) -> None:
    shutil.copytree(boxes, tmp_path / "set")
    pictures = sorted((tmp_path / "set").rglob("*.png"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:200])
    config = quick(base, data=(str(tmp_path / "set"),), size=(64, 64), held_out=0.0, steps=COUNT // 2, max_bad=0.05)
    train(config, tmp_path / "run")
    pictures[5].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 bad examples, more than 5.00% of 24.*--max-bad"):
        train(config, tmp_path / "other")


def test_a_run_goes_on_where_the_pictures_have_moved_but_not_on_others(tmp_path: Path, base: Path, boxes: Path) -> None:
    config = quick(base, data=(str(boxes),), size=(64, 64), held_out=0.0, lr_schedule="constant")
    train(config, tmp_path / "run")
    shutil.copytree(boxes, tmp_path / "moved")
    train(dataclasses.replace(config, data=(str(tmp_path / "moved"),), steps=3), tmp_path / "run")
    listed = tmp_path / "moved" / "annotations" / "instances_drawn.json"
    known = json.loads(listed.read_text())
    known["images"] = known["images"][: COUNT // 2]
    listed.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="another set of pictures"):
        train(dataclasses.replace(config, data=(str(tmp_path / "moved"),), steps=4), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_boxes_of_the_same_pictures(tmp_path: Path, base: Path, boxes: Path) -> None:
    shutil.copytree(boxes, tmp_path / "set")
    config = quick(base, data=(str(tmp_path / "set"),), size=(64, 64), held_out=0.0, lr_schedule="constant")
    train(config, tmp_path / "run")
    listed = tmp_path / "set" / "annotations" / "instances_drawn.json"
    known = json.loads(listed.read_text())
    known["annotations"][5]["bbox"][2] -= 1
    listed.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"holds a run with another set of captions, phrases, boxes, .*--no-resume"):
        train(dataclasses.replace(config, steps=4), tmp_path / "run")


def test_what_cannot_be_trained_on_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        assert cli.run(script.main, [*words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "name them with --data DIR" in fails("box-text")
    assert "there is no such file or folder" in fails("box-text", "--data", str(tmp_path / "none"))
    assert "multiples of 64" in fails("box-text", "--data", str(tmp_path), "--size", "64", "65")
    assert "maps is given without data" in fails("scenes-depth", "--maps", "x")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert "without one picture for box-text" in fails("box-text", "--data", str(tmp_path))


def test_two_sets_come_in_proportion_to_their_weights(tmp_path: Path, base: Path, boxes: Path) -> None:
    shutil.copytree(boxes, tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.png"):
        Image.new("RGB", (64, 64), "white").save(path)
    config = quick(base, data=(f"{boxes}:2", f"{tmp_path / 'b'}:1"), size=(64, 64), held_out=0.0)
    images = open_data(config, build_networks(config, CPU).config).training.batch(range(300)).images
    assert images is not None
    white = (images.flatten(1) == 255).all(1)
    assert white.float().mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert not torch.equal(white[:150], white[150:])


def test_sets_with_and_without_stored_latents_do_not_mix(tmp_path: Path, base: Path, boxes: Path) -> None:
    """Said before the first step; and where buckets of several sizes cannot use what is stored, that is said."""
    more = ["--size", "64", "64", "--device", "cpu", "--latents", "--base", str(base)]
    data_command(["build", str(boxes), "--out", str(tmp_path / "a"), *more])
    networks = build_networks(quick(base, data=(str(boxes),)), CPU)

    def opened(**fields: Any) -> Data:
        config = quick(base, size=(64, 64), held_out=0.3, **fields)
        return open_data(config, networks.config, lambda part: fingerprint(part, networks.vae))

    with pytest.raises(ValueError, match="some sets have stored latents and others not"):
        opened(data=(str(tmp_path / "a"), str(boxes)))
    assert any("--buckets has several" in line for line in opened(data=(str(tmp_path / "a"),), buckets=True).found)


def test_stored_latents_train_as_pictures_do(tmp_path: Path, base: Path, boxes: Path) -> None:
    """Of a built set, to the rounding of float16 in which they are stored; another autoencoder is refused by name."""
    for name, more in (("plain", []), ("encoded", ["--latents", "--base", str(base)])):
        words = ["build", str(boxes), "--out", str(tmp_path / name), "--size", "64", "64", "--device", "cpu", *more]
        data_command(words)
    fields = {"size": (64, 64), "held_out": 0.3, "steps": 3, "lr": 1e-4, "diagnose_every": 3, "diagnosis_samples": 2}
    for name in ("plain", "encoded"):
        train(quick(base, data=(str(tmp_path / name),), **fields), tmp_path / f"run-{name}")
    one, other = (lines(tmp_path / f"run-{name}") for name in ("plain", "encoded"))
    losses = [[line["loss"] for line in of if "loss" in line] for of in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]
    config = quick(base, data=(str(tmp_path / "encoded"),), **fields)
    networks = build_networks(config, CPU)
    data = open_data(config, networks.config, lambda part: fingerprint(part, networks.vae))
    batch = data.training.batch(range(2))
    assert batch.images is None
    assert batch.latents is not None
    assert any("stored latents are used" in line for line in data.found)
    with pytest.raises(ValueError, match="is another: build a set for it"):
        open_data(config, networks.config, lambda part: "0" * 64)
    flipped = open_data(dataclasses.replace(config, flip=0.5), networks.config, lambda part: "0" * 64)
    assert any("not mirrored" in line for line in flipped.found)
    with pytest.raises(ValueError, match="stored latents are used already"):
        train(dataclasses.replace(config, cache=4), tmp_path / "kept")


def test_stored_features_train_as_encoding_does(
    tmp_path: Path, base: Path, boxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`build --features`: neither encoder of CLIP's reads a phrase or a picture again, but for mirrored pictures."""
    mode = "box-text-image"
    for name, more in (("plain", []), ("encoded", ["--features", "--base", str(base)])):
        words = ["build", str(boxes), "--mode", mode, "--out", str(tmp_path / name), "--device", "cpu", *more]
        data_command(words)
    fields: dict[str, Any] = {"size": (64, 64), "held_out": 0.3, "feature_drop": 0.3, "batch_size": 4}
    config = quick(base, f"scenes-{mode}", data=(str(tmp_path / "encoded"),), **fields)
    networks = build_networks(config, CPU)
    encoders = {"phrases": networks.text_encoder, "references": networks.image_encoder}

    def opened(**more: Any) -> Data:
        made = dataclasses.replace(config, **more)
        return open_data(made, networks.config, lambda part: fingerprint(part, encoders[part]))

    plain, stored = opened(data=(str(tmp_path / "plain"),)), opened()
    assert any("stored features of phrases and references are used" in line for line in stored.found)
    expected = [Objective(networks, Schedule()).encode(plain.training.batch(range(k, k + 4))) for k in (0, 4)]

    def no_call(*_: Any) -> None:
        raise AssertionError("encoded again")

    objective = Objective(networks, Schedule(), phrases=stored.phrases)
    batches = [stored.training.batch(range(k, k + 4)) for k in (0, 4)]
    assert all(batch.references is None and batch.images is not None for batch in batches)
    with monkeypatch.context() as patch:
        patch.setattr(networks.text_encoder, "phrase_features", no_call)
        patch.setattr(networks.image_encoder, "image_features", no_call)
        found = [objective.encode(batch) for batch in batches]
    for one, other in zip(found, expected, strict=True):
        for name in one.grounding:
            torch.testing.assert_close(one.grounding[name], other.grounding[name], rtol=1e-3, atol=1e-3)
        assert other.grounding["image_masks"].any()
    half = opened(flip=0.5).training.batch(range(24))
    assert half.references is not None
    assert 0 < len(half.references) < half.grounding["image_masks"].sum()
    with pytest.raises(ValueError, match="is another: build a set for it"):
        open_data(config, networks.config, lambda part: "0" * 64)


def test_buckets_train_on_pictures_of_many_shapes(tmp_path: Path, base: Path) -> None:
    rows = []
    for i in range(24):
        width, height = ((128, 64), (64, 128), (64, 64))[i % 3]
        Image.new("RGB", (width, height), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
        box = {"phrase": "a thing", "box": [0.1, 0.1, 0.9, 0.9]}
        rows.append(json.dumps({"file_name": f"{i}.png", "text": "a picture", "entities": [box]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    config = quick(base, data=(str(tmp_path),), size=(128, 64), buckets=True, held_out=0.2, steps=6)
    batches = open_data(config, build_networks(config, CPU).config).training
    shapes = set()
    for k in range(12):
        batch = batches.batch(range(2 * k, 2 * k + 2))
        assert batch.images is not None
        assert batch.noise.shape[2:] == tuple(side // batches.factor for side in batch.images.shape[2:])
        shapes.add(tuple(batch.images.shape[2:]))
    assert len(shapes) == 2 or len(shapes) == 3
    train(config, tmp_path / "run")


def test_an_ldm_with_a_text_encoder_of_its_own_is_taught(tmp_path: Path, boxes: Path) -> None:
    """As LDM text2img-large: WordPiece captions, phrases by the same encoder; and sample.py takes the outcome."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "star", "ring", "and", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config, parts = generated_base()
    text = TextEncoderConfig(
        kind="bert", width=64, layers=1, heads=2, head_dim=16, vocab_size=len(words), context_length=12
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BERTTextEncoder(text)
    parts = {name: part for name, part in parts.items() if name != "image_encoder"}
    parts["text_encoder"] = hold(encoder.state_dict())
    ldm = dataclasses.replace(config, text_encoder=text, image_encoder=None, image_size=64)
    save_model(tmp_path / "ldm.safetensors", parts, ldm)
    vocab = str(tmp_path / "vocab.txt")
    run = quick(tmp_path / "ldm.safetensors", data=(str(boxes),), held_out=0.3, diagnose_every=2, diagnosis_samples=2)
    with pytest.raises(ValueError, match="with --vocab FILE"):
        train(run, tmp_path / "run")
    adapter = train(dataclasses.replace(run, vocab=vocab), tmp_path / "run")
    pipe = build_pipeline(open_model(tmp_path / "ldm.safetensors", adapter, vocab=vocab), device="cpu")
    entity = {"phrase": "a red star", "box": [0.1, 0.1, 0.6, 0.6]}
    (sample,) = pipe.generate([parse_request({"prompt": "a red star", "steps": 2, "entities": [entity]})])
    assert torch.isfinite(sample.latents).all()


def test_killed_on_pictures_and_called_again_equals_unbroken(
    tmp_path: Path, base: Path, boxes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL between two checkpoints and within an epoch: the same run ends in the same bytes and log."""
    fields = {"data": (str(boxes),), "size": (64, 64), "held_out": 0.25, "crop": "random", "flip": 0.5}
    fields |= {"steps": 8, "save_every": 2, "log_every": 3, "diagnose_every": 4, "diagnosis_samples": 4}
    killed = start(KILLED_IN_STEP_6, flags(base, tmp_path / "killed", **fields))
    config = quick(base, **fields)
    unbroken = train(config, tmp_path / "unbroken")
    assert killed.wait(120) == -signal.SIGKILL
    saved = read_checkpoint(tmp_path / "killed")
    assert saved is not None
    assert saved.progress.step == 4
    with caplog.at_level("INFO", "gligen"):
        resumed = train(config, tmp_path / "killed")
    assert f"going on from step 4 of '{tmp_path}/killed/checkpoint.safetensors'" in caplog.text
    assert resumed.read_bytes() == unbroken.read_bytes()
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "unbroken")
    assert {line["step"] for line in timeless(tmp_path / "killed")} == {0, 3, 4, 6, 8}


def test_a_run_on_pictures_is_resumed_bit_for_bit(tmp_path: Path, base: Path, boxes: Path) -> None:
    """Over the end of an epoch, with random crops and mirrored pictures, and with workers or without."""
    fields = {"size": (64, 64), "held_out": 0.0, "crop": "random", "flip": 0.5, "lr_schedule": "constant"}
    config = quick(base, data=(str(boxes),), **fields, batch_size=COUNT // 4)
    train(dataclasses.replace(config, steps=6), tmp_path / "whole")
    train(dataclasses.replace(config, steps=3), tmp_path / "broken")
    train(dataclasses.replace(config, steps=6, workers=2), tmp_path / "broken")
    one, other = (read_checkpoint(tmp_path / name) for name in ("whole", "broken"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(other.tensors[name].read(), tensor.read()) for name, tensor in one.tensors.items())


def test_another_number_of_processes_goes_on_with_the_next_picture(
    tmp_path: Path, base: Path, boxes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = quick(base, data=(str(boxes),), size=(64, 64), held_out=0.0, lr_schedule="constant", steps=2)
    train(config, tmp_path)  # took samples 0 to 3
    with caplog.at_level("INFO", "gligen"):
        train(dataclasses.replace(config, batch_size=3, steps=3), tmp_path)
    assert "a step now takes 3 samples instead of 2" in caplog.text
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.progress.samples == 7
