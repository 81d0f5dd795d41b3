"""The miniature's base: each stage learns, goes on where it was killed, and the whole is a small Stable Diffusion."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gligen
from gligen import cli
from gligen.config import GroundingConfig
from gligen.data.scenes import make_scene
from gligen.data.shapes import COLORS
from gligen.loading import embedded_adapter
from gligen.miniature.__main__ import build_task, main
from gligen.miniature.cells import begin_cells, cell_tokens, shape_features
from gligen.miniature.clip import CLIPTask, contrastive_loss, embed_images, embed_texts
from gligen.miniature.config import CLIPStage, UNetStage, VAEStage
from gligen.miniature.data import crop, draw, draw_timesteps, swapped_captions
from gligen.miniature.export import MAX_BYTES, export, unpack
from gligen.miniature.stage import StageTask, load_trained
from gligen.miniature.unet import init_for_training
from gligen.miniature.widen import widen_unet
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import IMAGE_FEATURE_NORM, CLIPImageEncoder, CLIPTextEncoder, tokenize
from gligen.modules.unet import UNetModel
from gligen.training.engine.checkpoint import read_checkpoint, restore
from gligen.training.engine.logs import RunLog
from gligen.training.engine.loop import Stopped
from gligen.training.engine.loop import run as run_task
from gligen.training.engine.optim import learning_rate
from gligen.training.objective import PhraseFeatures
from gligen.training.presets import get_preset
from gligen.training.trainable import build_networks
from gligen.weights import combine, read_weights
from gligen.weights.load import load_part

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")

COMMON: dict[str, Any] = {
    "warmup_steps": 5,
    "ema_decay": 0.9,
    "save_every": 1000,
    "log_every": 1,
    "eval_every": 0,
    "eval_scenes": 16,
    "device": "cpu",
}
CLIP = CLIPStage(
    **COMMON,
    steps=24,
    batch_size=32,
    lr=3e-3,
    text_width=32,
    text_layers=1,
    vocab_size=2048,
    image_width=32,
    image_layers=1,
    patch_size=16,
)
VAE = VAEStage(**COMMON, steps=20, batch_size=4, lr=1e-3, channel_mult=(1, 1, 2))
UNET = UNetStage(
    **COMMON,
    steps=24,
    batch_size=8,
    lr=3e-3,
    model_channels=32,
    channel_mult=(1, 1),
    attention_downsamples=(2,),
    num_heads=1,
    preview_every=0,
)
CONFIGS: dict[str, Any] = {"clip": CLIP, "vae": VAE, "unet": UNET}


def stage(name: str, out: Path, **changes: Any) -> StageTask:
    return build_task(name, dataclasses.replace(CONFIGS[name], **changes), out, CPU, torch.float32)


def run(name: str, out: Path, spoil: Callable[[StageTask], None] = lambda task: None, **changes: Any) -> None:
    """Trains a stage. spoil: does something to its task before."""
    config = dataclasses.replace(CONFIGS[name], **{k: v for k, v in changes.items() if k != "resume"})

    def build(device: torch.device, dtype: torch.dtype) -> StageTask:
        task = build_task(name, config, out, device, dtype)
        spoil(task)
        return task

    run_task(build, config, out / name, resume=changes.get("resume", True))


def figures(out: Path, name: str, figure: str) -> list[float]:
    rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    return [row[figure] for row in rows if figure in row]


def steps_done(out: Path, name: str) -> int:
    checkpoint = read_checkpoint(out / name)
    return checkpoint.progress.step if checkpoint else 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages, tiny and short."""
    out = tmp_path_factory.mktemp("miniature")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in CONFIGS:
        run(name, out)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_falls_in_a_short_run(trained, name):
    assert len(figures(trained, name, "loss")) == CONFIGS[name].steps
    made = stage(name, trained)
    size = CONFIGS[name].batch_size
    batches = [made.prepare(made.batches.held_out(range(i * size, (i + 1) * size)), 0.0) for i in range(2)]
    with torch.no_grad():
        before = sum(made.loss(batch)[0] for batch in batches)
        state = read_checkpoint(trained / name)
        restore(state, made.parameters(), torch.optim.AdamW(made.parameters().values()), None, made.fixed())
        after = sum(made.loss(batch)[0] for batch in batches)
    assert after < 0.9 * before
    for figure in {"clip": ("object_top1", "swap"), "vae": ("psnr", "scale_factor"), "unet": ("eval_loss",)}[name]:
        assert np.isfinite(figures(trained, name, figure)[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_killed_and_resumed_equals_unbroken(trained, tmp_path, name, one_thread):
    """A run that dies between checkpoints (here by an error, which saves nothing) repeats what it lost."""
    for other in ("clip", "vae"):
        if name == "unet":
            shutil.copytree(trained / other, tmp_path / other)

    def die_at_the_sixth(task: StageTask) -> None:
        loss, calls = task.loss, itertools.count(1)

        def dying(batch: Any) -> Any:
            if next(calls) == 6:
                raise RuntimeError("power cut")
            return loss(batch)

        task.loss = dying  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="power cut"):
        run(name, tmp_path, die_at_the_sixth, save_every=3)
    assert steps_done(tmp_path, name) == 3
    run(name, tmp_path)
    one, other_ = (read_checkpoint(folder / name) for folder in (trained, tmp_path))
    assert one.tensors.keys() == other_.tensors.keys()
    assert all(torch.equal(tensor.read(), other_.tensors[key].read()) for key, tensor in one.tensors.items())
    assert one.progress.results == other_.progress.results
    assert figures(trained, name, "loss") == figures(tmp_path, name, "loss")


def test_sigkill_and_sigterm_lose_nothing_that_was_saved(tmp_path):
    command = [sys.executable, "-m", "gligen.miniature", "vae", "--out", str(tmp_path), "--device", "cpu"]
    command += ["--steps", "100000", "--batch-size", "1", "--save-every", "1", "--log-every", "1", "--workers", "1"]
    command += ["--channel-mult", "1", "1", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    reached = 0
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "vae/log.jsonl").exists() and len(figures(tmp_path, "vae", "loss")) > reached + 2:
                break
            time.sleep(0.05)
        os.killpg(process.pid, number)  # the process that draws scenes, too, as torchrun and a terminal do
        _, told = process.communicate(timeout=60)
        assert process.returncode == status, told
        step = steps_done(tmp_path, "vae")
        assert step > reached
        assert f"going on from step {reached} of" in told or not reached
        reached = step
    assert f"stopped: step {reached} is saved" in told.splitlines()[-1]


def test_workers_change_nothing(trained, tmp_path, one_thread):
    run("clip", tmp_path, workers=2)
    assert figures(trained, "clip", "loss") == figures(tmp_path, "clip", "loss")


def test_latents_have_unit_spread(trained):
    config = read_weights(_exported(trained)).config
    vae = AutoencoderKL(config.vae)
    vae.load_state_dict(load_trained(trained, "vae").networks["vae"])
    images = torch.from_numpy(np.stack([draw(7, n, 0.15).image for n in range(64)])).permute(0, 3, 1, 2)
    noise = torch.randn((64, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latents = vae.encode((images.float() / 255 - 0.5) / 0.5, noise)
    assert config.vae.scale_factor != 1
    assert latents.std().item() == pytest.approx(1, abs=0.1)  # measured on other scenes


def _exported(trained: Path) -> Path:
    file = trained / "base.safetensors"
    return file if file.exists() else export(trained, file)


def test_export_is_a_stable_diffusion_file_that_paints(trained):
    weights = read_weights(_exported(trained))
    assert weights.kind == "sd"
    assert weights.modes == ()
    assert set(weights.parts) == {"unet", "vae", "text_encoder", "image_encoder"}
    pipe = gligen.load(_exported(trained), device="cpu")
    image = pipe(prompt="a red star and a ring", steps=2, seed=1)[0]
    assert image.size == (64, 64)
    clip = load_trained(trained, "clip")
    text_encoder = CLIPTextEncoder(clip.config.text_encoder)
    text_encoder.load_state_dict(clip.networks["text_encoder"])
    expected = text_encoder.phrase_features(text_encoder.tokenize(["a red star"])[0])[0]
    assert torch.allclose(pipe.encode_phrases(["a red star"])["a red star"], expected, atol=0.02)  # float16


def test_training_goes_on_from_an_exported_file(trained, tmp_path, capsys):
    file = _exported(trained)
    unpack(file, tmp_path)
    loaded = load_trained(tmp_path, "vae")
    assert loaded.measured == pytest.approx(load_trained(trained, "vae").measured)
    argv = ["unet", "--out", str(tmp_path), "--device", "cpu"]
    few = "--steps 1 --batch-size 2 --eval-scenes 2 --lr 1e-12 --warmup-steps 0"
    main([*argv, *few.split()])  # sizes are the file's, not the defaults
    with pytest.raises(ValueError, match=r"holds a run with num_heads 1 \(now 4\)"):
        main([*argv, "--num-heads", "4"])
    again = read_weights(export(tmp_path, tmp_path / "again"))
    first = read_weights(file)
    assert again.config == first.config
    for part, tensors in first.parts.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(again.parts[part][name].read(), tensor.read(), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="exists already"):
        unpack(file, tmp_path)


@pytest.mark.parametrize("fuser", [None, "gatedSA", "gatedCA"])
def test_a_wider_unet_computes_what_the_narrow_one_did(fuser):
    """Every level grown by one factor: equal outputs, with the gates open too; and the copies do not learn alike."""
    grounding = None if fuser is None else GroundingConfig(fuser_type=fuser, feature_dim=24, token_dim=24)
    old = dataclasses.replace(UNET.unet(context_dim=24), channel_mult=(1, 2), grounding=grounding)
    new = dataclasses.replace(old, model_channels=2 * old.model_channels)
    torch.manual_seed(0)
    narrow, wide = UNetModel(old), UNetModel(new)
    for name, parameter in narrow.named_parameters():
        if "alpha" in name:
            nn.init.constant_(parameter, 0.7)
    wide.load_state_dict(widen_unet(narrow.state_dict(), old, new, torch.Generator().manual_seed(0)))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    inputs = None
    if grounding is not None:
        inputs = {"boxes": torch.rand(2, 3, 4), "masks": torch.ones(2, 3), "text_features": torch.randn(2, 3, 24)}
    given = (x, torch.tensor([7, 900]), context, inputs)
    torch.testing.assert_close(wide(*given), narrow(*given), rtol=1e-4, atol=1e-5)
    wide(*given).square().mean().backward()
    gradient = wide.input_blocks[1][0].in_layers[2].weight.grad
    assert gradient is not None
    assert not torch.allclose(gradient[0::2], gradient[1::2], rtol=0.05)


def test_widened_files_are_a_base_and_its_adapter(tmp_path, capsys):
    """The embedded ones, by the command, every level doubled: joined, they predict what the narrow ones do."""
    files = [REPOSITORY / "checkpoints" / f"scenes-{name}.safetensors" for name in ("base", "box-text")]
    narrow = combine(*map(read_weights, files))
    channels, mult = 2 * narrow.config.unet.model_channels, [str(n) for n in narrow.config.unet.channel_mult]
    for file in files:
        command = ["widen", "--file", str(file), "--to", str(tmp_path / file.name), "--model-channels"]
        assert cli.run(main, [*command, str(channels), "--channel-mult", *mult]) == 0
    wide = combine(*(read_weights(tmp_path / file.name) for file in files))
    assert wide.config == dataclasses.replace(
        narrow.config, unet=dataclasses.replace(narrow.config.unet, model_channels=channels)
    )
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 16, 16), (1, 48, 96)))
    boxes, features = torch.rand(1, 2, 4, generator=generator), torch.randn(1, 2, 96, generator=generator)
    inputs = {"boxes": boxes, "masks": torch.ones(1, 2), "text_features": features}
    outputs = []
    for weights in (narrow, wide):
        unet = UNetModel(weights.config.unet)
        load_part(unet, weights.parts["unet"], dtype=torch.float32, what=weights.path)
        with torch.no_grad():
            outputs.append(unet(x, torch.tensor([500]), context, inputs))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.02)  # both files are float16
    capsys.readouterr()
    for given, message in (
        ([str(channels * 3 // 4), "--channel-mult", *mult], "are no multiple of"),
        ([str(channels), "--channel-mult", *mult[1:]], "levels"),
        ([str(channels), "--channel-mult", *mult], "exists already"),
    ):
        assert cli.run(main, [*command, *given]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_kept_scenes_teach_what_drawn_ones_do(trained, tmp_path):
    """Six steps of eight scenes without a second round: the same weights to the bit; with one, other weights."""
    found = []
    for i, cache in enumerate((0, 64, 16)):
        out = tmp_path / str(i)
        shutil.copytree(trained, out)
        run("unet", out, steps=6, cache=cache, resume=False)
        found.append(load_trained(out, "unet").fingerprint)
    assert found[0] == found[1] != found[2]


def test_two_processes_end_a_run_together(trained, tmp_path):
    """One log and one state, after as many steps as were asked for."""
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["--out", str(tmp_path / "run"), "--no-resume", "--device", "cpu", "--steps", "4", "--batch-size", "4"]
    arguments += ["--model-channels", "32", "--channel-mult", "1", "1", "--attention-downsamples", "2"]
    arguments += ["--num-heads", "1", "--eval-scenes", "4", "--log-every", "1", "--preview-every", "0"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *command, "-m", "gligen.miniature", "unet", *arguments],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    assert load_trained(tmp_path / "run", "unet").step == 4
    assert len(figures(tmp_path / "run", "unet", "images_per_second")) == 4


def test_export_refuses_what_is_too_large_there_already_or_mixed(trained, tmp_path):
    with pytest.raises(ValueError, match=r"big.safetensors would be \d+ bytes, more than 1000"):
        export(trained, tmp_path / "big.safetensors", max_bytes=1000)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists already"):
        export(trained, _exported(trained))
    for name in CONFIGS:
        shutil.copytree(trained / name, tmp_path / name)
    run("vae", tmp_path, steps=21)
    with pytest.raises(ValueError, match="was trained with another vae"):
        export(tmp_path, tmp_path / "mixed")
    with pytest.raises(ValueError, match="holds a run with another vae"):
        run("unet", tmp_path)


def test_the_default_sizes_fit_into_one_file(tmp_path):
    """16 MiB in float16, header and schedule included; below the first level heads of 32 channels and more."""
    clip, vae, unet = CLIPStage(), VAEStage(), UNetStage()
    with torch.device("meta"):
        networks = [
            CLIPTextEncoder(clip.text_encoder),
            CLIPImageEncoder(clip.image_encoder),
            AutoencoderKL(vae.vae),
            UNetModel(unet.unet(context_dim=clip.text_width)),
        ]
    states = [network.state_dict() for network in networks]
    numbers = sum(tensor.numel() for state in states for tensor in state.values())
    header = 200 * sum(map(len, states))  # bytes a tensor's entry takes at most
    assert 2 * numbers + header + 12 * 4000 < MAX_BYTES
    assert all(mult * unet.model_channels // unet.num_heads >= 32 for mult in unet.channel_mult[1:])
    assert vae.vae.downsample_factor == 4


@pytest.mark.parametrize("timestep", [10, 200, 900])
def test_little_noise_weighs_less_when_asked(trained, timestep):
    """min(SNR, 2)/SNR, SNR from LDM's schedule: β is the square of a line from √0.00085 to √0.012."""
    plain, weighted = stage("unet", trained), stage("unet", trained, min_snr=2.0)
    batch = plain.prepare(plain.batches.batch(range(UNET.batch_size), 0), 0.0)
    batch |= {"timesteps": torch.full((UNET.batch_size,), timestep)}
    signal = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[: timestep + 1] ** 2)
    snr = signal / (1 - signal)
    losses = [of.loss(batch)[0].item() for of in (plain, weighted)]
    assert losses[1] / losses[0] == pytest.approx(min(snr, 2) / snr, rel=1e-4)


def test_untrained_unet_predicts_nothing():
    config = UNET.unet(context_dim=8)
    unet = UNetModel(config)
    init_for_training(unet)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 3, 8)
    assert torch.equal(unet(x, t, context), torch.zeros_like(x))


def test_phrases_and_pictures_point_alike_in_both_spaces():
    """Carrying a picture back by Pᵀ undoes the text projection, so cosines agree before and after it."""
    networks = CLIPTask(CLIP, CPU, torch.float32).network
    text_encoder, image_encoder = networks["text_encoder"], networks["image_encoder"]
    ids = tokenize(["a red star", "a blue ring"], CLIP.context_length, CLIP.vocab_size)[0]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        shared = embed_images(networks, images) @ embed_texts(networks, ids).T
        pixels = image_encoder.preprocess((images.float() / 255 - 0.5) / 0.5)
        pictures, phrases = image_encoder.image_features(pixels), text_encoder.phrase_features(ids)
    before = nn.functional.normalize(pictures, dim=-1) @ nn.functional.normalize(phrases, dim=-1).T
    assert torch.allclose(before, shared, atol=1e-5)
    assert torch.allclose(pictures.norm(dim=-1), torch.tensor(IMAGE_FEATURE_NORM))
    assert not image_encoder.text_projection.requires_grad


def test_contrastive_loss_shares_its_target_among_equal_texts():
    labels = torch.tensor([0, 1, 0, -1])  # three pictures; the fourth text belongs to none
    logits = torch.zeros(3, 4)
    logits[0, [0, 2]] = logits[2, [0, 2]] = logits[1, 1] = 50.0
    assert contrastive_loss(logits, labels).item() == pytest.approx((2 * np.log(2) / 3), abs=1e-5)
    worse = logits.clone()
    worse[1, 3] = 50.0  # the wrong caption as near as the right one
    assert contrastive_loss(worse, labels) > contrastive_loss(logits, labels)


def test_a_short_vocabulary_writes_any_text():
    ids, cuts = tokenize(["a triangle, 日本", "<|endoftext|>"], 77, 1024)
    assert ids.max() == 1023
    assert ids[0, 0] == 1022
    assert ids[1].tolist() == [1022] + [1023] * 76
    assert cuts == ["", ""]
    assert torch.equal(tokenize(["a red star"])[0][0, 1:4], tokenize(["a red star"], 77, 8192)[0][0, 1:4])
    with pytest.raises(ValueError, match="vocab_size is 500"):
        tokenize(["a"], 77, 500)


def test_swapped_captions_exchange_colours():
    scene = next(s for n in range(50) if len((s := draw(0, n, 0.0, places=0.0)).objects) == 2 and swapped_captions(s))
    a, b = scene.objects
    (swapped,) = swapped_captions(scene)
    assert f"{b.color} {a.shape}" in swapped
    assert f"{a.color} {b.shape}" in swapped
    assert a.phrase not in swapped


def test_crops_show_the_object():
    rng = np.random.default_rng(0)
    for n in range(20):
        scene = draw(3, n, 0.0)
        item = scene.objects[-1]  # on top of all others
        picture = crop(scene, item, rng)
        assert picture.shape == (64, 64, 3)
        near = np.abs(picture.astype(float) - np.array(item.rgb)).sum(axis=-1) < 60
        assert near.mean() > 0.08


def test_learning_rate_rises_and_falls_to_nothing():
    config = VAEStage(steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert max(rates) == pytest.approx(rates[9], rel=0.05)
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == 0
    assert learning_rate(config, 20, spent=0.5) == pytest.approx(0.5)
    assert learning_rate(config, 20, spent=1.0) == 0


def test_timesteps_come_from_the_middle_as_often_as_asked():
    config = UNetStage(focus=0.7, focus_low=250, focus_high=849)
    drawn = draw_timesteps(np.random.default_rng(0), 20_000, config, 1000)
    assert (drawn.min(), drawn.max()) == (0, 999)
    is_middle = (drawn >= 250) & (drawn <= 849)
    assert is_middle.mean() == pytest.approx(0.7 + 0.3 * 0.6, abs=0.01)  # three standard deviations are 0.007
    for low, high in ((0, 124), (125, 249), (850, 999)):  # the rest is even
        share = ((drawn >= low) & (drawn <= high)).mean()
        assert share == pytest.approx(0.3 * (high + 1 - low) / 1000, abs=0.005)
    middle = drawn[is_middle]
    assert middle.mean() == pytest.approx(549.5, abs=4)
    even = draw_timesteps(np.random.default_rng(0), 20_000, UNetStage(focus=0.0), 1000)
    assert np.histogram(even, 10, (0, 1000))[0] == pytest.approx(2000, abs=150)


def test_the_last_steps_take_all_timesteps_alike(trained):
    unet = stage("unet", trained, focus=1.0, focus_low=500, focus_high=509, finish=0.2)
    batch = unet.batches.batch(range(UNET.batch_size), 0)
    for progress in (0.0, 0.79):
        assert ((unet.prepare(batch, progress)["timesteps"] - 504.5).abs() < 5).all()
    assert (unet.prepare(batch, 0.81)["timesteps"] - 504.5).abs().max() > 100


def test_a_stage_ends_with_its_time_and_counts_as_done(trained, tmp_path, monkeypatch):
    seconds = itertools.count()  # one goes by whenever the clock is looked at, on whatever machine
    monkeypatch.setattr("gligen.training.engine.clock.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    for name in ("clip", "vae"):
        shutil.copytree(trained / name, tmp_path / name)
    run("unet", tmp_path, steps=100_000, minutes=0.5)
    done = load_trained(tmp_path, "unet")  # raises for a stage that is not done
    assert 5 < done.step <= 30  # a second each
    rates = [
        line["lr"] for line in map(json.loads, (tmp_path / "unet/log.jsonl").read_text().splitlines()) if "lr" in line
    ]
    assert rates[-1] < 0.5 * max(rates)


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    with RunLog(tmp_path, step=1, steps=9, is_writing=True) as log:
        log.write(2, {"psnr": 0.25})
    assert (tmp_path / "log.jsonl").read_text().splitlines() == ['{"step": 1, "loss": 1}', '{"step": 2, "psnr": 0.25}']


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path):
    def spoil_the_fourth(task: StageTask) -> None:
        loss, calls = task.loss, itertools.count(1)

        def spoilt(batch: Any) -> Any:
            value, parts = loss(batch)
            if next(calls) == 4:
                value, parts = value * float("nan"), parts | {"loss": parts["loss"] * float("nan")}
            return value, parts

        task.loss = spoilt  # type: ignore[method-assign]

    with pytest.raises(ValueError, match=r"step 4: the loss is nan .* the checkpoint of step 2 is kept: lower --lr"):
        run("vae", tmp_path, spoil_the_fourth, save_every=2)
    assert steps_done(tmp_path, "vae") == 2


def test_what_cannot_work_is_one_line(trained, tmp_path, capsys):
    def fails(*arguments: str) -> str:
        assert cli.run(main, ["unet", "--device", "cpu", *arguments]) == 2
        told = capsys.readouterr().err.strip()
        assert "\n" not in told
        return told

    assert "clip holds no run: run `python -m gligen.miniature clip" in fails("--out", str(tmp_path))
    assert "batch_size is 0: give 1 or more" in fails("--batch-size", "0")
    assert "focus_low is 950 and focus_high 949: give" in fails("--focus-low", "950")
    assert "channels: GroupNorm needs a multiple of 8" in fails("--model-channels", "44")
    (tmp_path / "clip.pt").write_bytes(b"PK")
    assert "was begun by an earlier version" in fails("--out", str(tmp_path))
    assert "holds a run with seed 0 (now 5)" in fails("--out", str(trained), "--seed", "5", *_unet_flags())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/vae' cannot be written"):
        run("vae", tmp_path / "file")
    for name in ("clip", "vae"):
        shutil.copytree(trained / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="unet"):
        export(tmp_path, tmp_path / "base")


def _unet_flags() -> list[str]:
    sizes = {name: getattr(UNET, name) for name in ("model_channels", "num_heads", "ema_decay")}
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*flags, "--channel-mult", "1", "1", "--attention-downsamples", "2"]


def test_unfinished_stages_are_not_built_upon(trained, tmp_path):
    def interrupt(task: StageTask) -> None:
        loss = task.loss

        def interrupted(batch: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return loss(batch)

        task.loss = interrupted  # type: ignore[method-assign]

    with pytest.raises(Stopped, match="stopped: step 1 is saved") as stopped:
        run("vae", tmp_path, interrupt)
    assert stopped.value.status == 130
    shutil.copytree(trained / "clip", tmp_path / "clip")
    with pytest.raises(ValueError, match="has done 1 of 20 steps"):
        stage("unet", tmp_path)


def test_a_finished_run_can_be_lengthened(tmp_path, caplog):
    """It ends where one that was meant to be as long does, if its rate is constant; a cosine says what changes."""
    for name, first in (("whole", 6), ("longer", 3)):
        for steps in sorted({first, 6}):
            run("vae", tmp_path / name, steps=steps, lr_schedule="constant")
    one, other = (load_trained(tmp_path / name, "vae") for name in ("whole", "longer"))
    assert (one.step, other.step) == (6, 6)
    assert one.fingerprint == other.fingerprint
    run("vae", tmp_path / "cosine", steps=3)
    with caplog.at_level("INFO", "gligen"):
        run("vae", tmp_path / "cosine", steps=4)
    assert "the learning rate now falls to 0 at step 4, not 3" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "gligen"):
        run("vae", tmp_path / "cosine", steps=4)
    assert "nothing to do" in caplog.text


def test_help_answers_without_importing_torch():
    script = "import sys\nfrom gligen.miniature.__main__ import build_parser\nbuild_parser().format_help()\n"
    script += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_a_maps_cell_says_what_a_box_says(tmp_path):
    """The cell in which an object's middle lies gets the token of its phrase in its box, in every colour's mean; the
    others that of an empty slot. The file starts train.py, with the boxes' fusers as they are."""
    adapter = embedded_adapter("box-text")
    assert adapter is not None
    boxes = build_networks(dataclasses.replace(get_preset("scenes-box-text"), adapter=str(adapter)), CPU)
    teacher, features = boxes.unet.position_net, PhraseFeatures(boxes.text_encoder, CPU)
    scene = make_scene(5, 4)  # two objects in cells far apart
    phrases = shape_features(features)
    tokens, weights = cell_tokens([scene], teacher, phrases, side=4)
    asked = []
    for item in scene.objects:
        named = [f"{'an' if color == 'orange' else 'a'} {color} {item.shape}" for color in COLORS]
        phrased = list(features.encode(named))
        x0, y0, x1, y1 = item.box
        cell = 4 * int(2 * (y0 + y1)) + int(2 * (x0 + x1))
        box = {
            "boxes": torch.tensor([[item.box]]),
            "masks": torch.ones(1, 1),
            "text_features": sum(phrased)[None, None] / 8,
        }
        torch.testing.assert_close(tokens[0, cell], teacher(**box)[0, 0])
        asked.append(cell)
    empty = teacher(**teacher.null_inputs(1))[0, 0]
    rest = [cell for cell in range(16) if cell not in asked]
    torch.testing.assert_close(tokens[0, rest], empty.expand(14, -1))
    assert weights[0, asked].min() > weights[0, rest].max() > 0
    file = begin_cells("sem", adapter, tmp_path / "sem.safetensors", minutes=0.05)
    maps = build_networks(dataclasses.replace(get_preset("scenes-sem"), adapter=str(file)), CPU)
    gates = [[fuser.alpha_attn for fuser in networks.unet.fusers.values()] for networks in (boxes, maps)]
    assert all(map(torch.equal, *gates))
