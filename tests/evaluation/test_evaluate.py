"""Whole models measured: perfect pictures score full marks, others none; and `evaluate.py` as people run it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gligen import cli
from gligen.commands import evaluate
from gligen.data.maps import semantic_map
from gligen.data.scenes import detection_caption
from gligen.data.streams import Series
from gligen.evaluation.detector import predict_labels
from gligen.evaluation.metrics import mean_iou
from gligen.evaluation.report import make_sheet, table
from gligen.evaluation.run import (
    NOISE_STRIDE,
    Settings,
    embed_images,
    evaluate_scenes,
    make,
)
from gligen.loading import build_pipeline
from gligen.modes import MODES, get_mode
from gligen.modules.clip import CLIPImageEncoder
from gligen.pipeline import Sample
from tests.generated import generated_model

ROOT = Path(__file__).parents[2]
QUICK = ("scenes", "--requests", 2, "--steps", 2, "--device", "cpu")
N = 24


class Oracle:
    """Stands for a pipeline: paints the very scene that is asked for, or with `shift` another one."""

    def __init__(self, mode: str, settings: Settings, shift: int = 0) -> None:
        self.config = generated_model(mode).config
        self.mode, self.settings, self.shift = mode, settings, shift
        self.image_encoder = None
        self.requests = []

    def scene(self, request, shift=0):
        index = request.seed % NOISE_STRIDE + shift
        return make(self.settings, self.config, get_mode(self.mode), Series.EVALUATION, index)

    def generate(self, requests, *, batch_size, on_step):
        self.requests = list(requests)
        for i, request in reversed(list(enumerate(requests))):  # pictures may come in any order
            image = Image.fromarray(self.scene(request, self.shift).image)
            yield Sample((i, 0), request, image, torch.zeros(4, 16, 16))

    def kept_image(self, request):
        image = self.scene(request).image
        x0, y0, x1, y1 = (round(64 * edge) for edge in request.entities[0].box)
        keep = torch.ones(64, 64, dtype=torch.bool)
        keep[y0:y1, x0:x1] = False
        return Image.fromarray(np.where(image > 100, image - 1, image)), keep


def evaluated(mode: str, shift: int = 0, **fields):
    settings = Settings(**({"requests": N} | fields))
    pipe = Oracle(mode, settings, shift)
    return evaluate_scenes(pipe, settings), pipe


@pytest.mark.parametrize("mode", MODES)
def test_perfect_pictures_score_full_marks_and_others_none(mode: str):
    perfect, other = (evaluated(mode, shift)[0].metrics for shift in (0, 1000))
    if mode == "keypoint":
        assert perfect["joints"]["near"]["value"] >= 0.95
        assert other["joints"]["near"]["value"] < 0.3
        return
    for name in ("objects", *(("by_phrase", "by_picture") if get_mode(mode).takes_images else ())):
        assert perfect[name]["all"]["found_with_shape"]["value"] >= 0.99
        assert perfect[name]["all"]["ap50"] >= 0.99
        assert perfect[name]["spare"]["value"] == 0
        assert other[name]["all"]["found_with_shape"]["value"] < 0.1
    assert other["objects"]["spare"]["value"] > 0.5
    if get_mode(mode).is_map:
        assert perfect["silhouettes"]["value"] > 0.97
        assert other["silhouettes"]["value"] < 0.7
        assert 0 < perfect["silhouettes"]["spread"] < 0.01
    assert ("labels" in perfect) == (mode == "sem")


def test_labels_are_measured_as_mean_iou_does():
    evaluation, _ = evaluated("sem", shift=1000, requests=5)
    maps = [(predict_labels(picture.pixels), semantic_map(picture.scene)) for picture in evaluation.images]
    assert evaluation.metrics["labels"]["value"] == pytest.approx(mean_iou(*zip(*maps, strict=True)))


def test_objects_are_told_apart_by_how_they_were_asked_for():
    evaluation, _ = evaluated("box-text-image", requests=6)
    total = sum(len(picture.asked) for picture in evaluation.images)
    counts = [evaluation.metrics[name]["all"]["objects"] for name in ("objects", "by_phrase", "by_picture")]
    assert counts[0] == counts[1] + counts[2] == total
    assert counts[2] == sum((len(picture.asked) + 1) // 2 for picture in evaluation.images)


def test_inpainting_is_compared_outside_the_mask_only():
    evaluation, _ = evaluated("inpaint-box-text")
    kept = evaluation.metrics["kept"]
    assert kept["original"] == {
        "mean": {"value": 0, "spread": 0},
        "largest": {"value": 0, "spread": 0},
        "max": 0,
    }
    assert kept["reconstruction"]["max"] == 1
    assert 0 < kept["reconstruction"]["mean"]["value"] < 1
    assert evaluation.metrics["objects"]["all"]["objects"] == N


def test_a_real_inpainting_model_changes_nothing_that_it_keeps():
    """The picture's own pixels come back, which the autoencoder alone would not give."""
    pipe = build_pipeline(generated_model("inpaint-box-text"), device="cpu", dtype="float32")
    settings = Settings(requests=2, steps=1, guidance=1)
    metrics = evaluate_scenes(pipe, settings).metrics["kept"]
    assert metrics["original"]["max"] == 0
    assert metrics["reconstruction"]["mean"]["value"] > 1


@pytest.mark.parametrize(
    ("fields", "prompts", "schedule"),
    [
        ({}, "full", (1, 0, 0)),
        ({"tau": 0.25}, "full", (0.25, 0, 0.75)),
        ({"schedule": (0.5, 0.25, 0.25)}, "full", (0.5, 0.25, 0.25)),
        ({"ungrounded": True}, "full", (0, 0, 1)),
        ({"captions": "null"}, "null", (1, 0, 0)),
        ({"captions": "detection", "pairs": "held-out", "seed": 3}, "detection", (1, 0, 0)),
    ],
)
def test_settings_reach_the_requests(fields, prompts, schedule):
    evaluation, pipe = evaluated("box-text", requests=3, steps=7, sampler="dpmpp", guidance=2.0, **fields)
    assert evaluation.metrics["objects"]["all"]["found"]["value"] == 1  # whatever was asked, the objects are the same
    for i, (request, picture) in enumerate(zip(pipe.requests, evaluation.images, strict=True)):
        scene = picture.scene
        assert (request.steps, request.sampler, request.guidance) == (7, "dpmpp", 2)
        assert request.schedule == schedule
        assert request.prompt == {"full": scene.caption, "null": "", "detection": detection_caption(scene)}[prompts]
        assert [entity.box for entity in request.entities] == [item.box for item in scene.objects]
        assert request.seed == fields.get("seed", 0) * NOISE_STRIDE + i
        assert scene.seed == Series.EVALUATION + fields.get("seed", 0)
        assert fields.get("pairs") != "held-out" or any(item.is_held_out for item in scene.objects)


def test_ungrounded_pictures_are_the_base_models(caplog):
    pipe = build_pipeline(generated_model("box-text"), device="cpu", dtype="float32")
    settings = Settings(requests=2, steps=2, ungrounded=True)
    pictures = evaluate_scenes(pipe, settings).images
    plain = [dataclasses.replace(picture.request, entities=(), schedule=None) for picture in pictures]
    for picture, sample in zip(pictures, pipe.generate(plain), strict=True):
        assert np.array_equal(picture.pixels, np.asarray(sample.image))
    assert "never on" not in caplog.text  # it is meant to be off


def test_what_is_forgotten_is_measured(tmp_path):
    assert run(*QUICK, "--ungrounded", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"]["max_difference"] == 0  # the embedded adapter on the embedded base
    pipe, other = (build_pipeline(generated_model("box-text"), device="cpu", dtype="float32") for _ in range(2))
    other.unet.first_conv.weight[0] += 0.1
    settings = Settings(requests=2, steps=2, ungrounded=True)
    assert evaluate_scenes(pipe, settings, base=other).metrics["max_difference"] > 1e-3
    assert "max_difference" not in evaluate_scenes(pipe, Settings(requests=2, steps=2), base=other).metrics


def test_perfect_pictures_have_the_floor_for_fid():
    settings = Settings(requests=N)
    pipe = Oracle("box-text", settings)
    torch.manual_seed(0)
    encoder = CLIPImageEncoder(pipe.config.image_encoder).eval()
    fid = evaluate_scenes(pipe, settings, encoder).metrics["fid"]
    assert fid["pictures"] == fid["floor"]
    assert fid["floor"]["value"] > 0
    images = [pipe.scene(request).image for request in pipe.requests[:3]]
    lower = embed_images(encoder.bfloat16(), images)
    assert np.abs(lower - embed_images(encoder.float(), images)).max() < 0.01  # weights of 8 bits
    assert evaluate_scenes(Oracle("box-text", settings), settings).metrics["fid"] is None


@pytest.mark.parametrize("mode", ["box-text", "keypoint", "sem", "normal", "inpaint-box-text-image"])
def test_sheet_and_table_can_be_made(mode: str):
    evaluation, _ = evaluated(mode, requests=2)
    sheet = make_sheet(evaluation.images, get_mode(mode))
    is_pair = mode in ("sem", "normal", "inpaint-box-text-image")
    assert sheet.size == (2 * (514 if is_pair else 256) + 2, 256)
    assert ("joints near" if mode == "keypoint" else "spare objects") in table(evaluation)
    json.dumps(evaluation.metrics, allow_nan=False)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"requests": 0}, "requests is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sheet": -1}, "sheet is -1"),
        ({"seed": 10**9}, "seed is 1000000000"),
        ({"places": float("nan")}, "places is nan"),
        ({"pairs": "none"}, "all, seen, held-out"),
        ({"captions": "none"}, "full, detection, null"),
        ({"steps": 0}, "steps is 0: give a whole number from 1 to 1000"),
        ({"sampler": "heun"}, "ddpm, ddim, plms, dpmpp"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"tau": 2.0}, "tau is 2.0"),
        ({"schedule": (1.0, 0.0)}, "sum to 1"),
        ({"tau": 0.5, "schedule": (1.0, 0.0, 0.0)}, "leave one out"),
        ({"tau": 0.5, "ungrounded": True}, "ungrounded and tau"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Settings(**fields)


def run(*args: object) -> int:
    return cli.run(evaluate.main, [str(arg) for arg in args])


def refusal(capsys, *args: object) -> str:
    """The one line that a run is refused with."""
    capsys.readouterr()
    assert run(*args) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1, err
    assert err[0].startswith("error: ")
    return err[0]


def test_a_run_writes_report_and_sheet_and_overwrites_no_other(tmp_path, capsys):
    assert run(*QUICK, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "spare objects" in out
    assert out.splitlines()[-2:] == [str(tmp_path / "report.json"), str(tmp_path / "sheet.png")]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["requests"] == 2
    assert report["settings"]["schedule"] == [1, 0, 0]
    assert report["model"]["name"] == "scenes-base.safetensors + scenes-box-text.safetensors"
    assert report["torch"] == torch.__version__
    assert report["device"] == "cpu"
    assert report["seconds"] > 0
    assert (
        {"value", "spread"}
        == set(report["figures"]["objects"]["all"]["found"])
        == set(report["figures"]["fid"]["floor"])
    )
    assert Image.open(tmp_path / "sheet.png").width == 2 * 256 + 2
    before = (tmp_path / "report.json").read_bytes()
    assert "steps 2" in refusal(capsys, *QUICK, "--steps", 3, "--out", tmp_path)
    assert "mode box-text" in refusal(capsys, *QUICK, "--mode", "keypoint", "--out", tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "sheet.png"]


def test_what_cannot_be_is_refused_before_the_model_is_built(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen.loading.build_pipeline", None)  # would fail with a traceback if it were called
    out = ("--out", tmp_path / "out")
    assert "requests is 0" in refusal(capsys, *QUICK, "--requests", 0, *out)
    assert "people" in refusal(capsys, *QUICK, "--mode", "keypoint", "--pairs", "seen", *out)
    assert "people" in refusal(capsys, *QUICK, "--mode", "keypoint", "--captions", "detection", *out)
    assert "no such file" in refusal(capsys, *QUICK, "--checkpoint", tmp_path / "missing", *out)
    assert "no such file" in refusal(capsys, *QUICK, "--adapter", tmp_path / "missing", *out)
    assert "dtype is 'int3'" in refusal(capsys, *QUICK, "--dtype", "int3", *out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refusal(capsys, *QUICK, "--out", tmp_path / "file" / "out")
    for name, reason in (("sheet.png", "without a report"), ("report.json", "is no report")):
        (tmp_path / name).write_text("{}")
        assert reason in refusal(capsys, *QUICK, "--out", tmp_path)


def test_help_answers_without_importing_torch():
    code = (
        "import sys; from gligen.commands import evaluate; evaluate.build_parser().format_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
