"""`sample.py` as people run it: what it writes, and one line for everything that can go wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.torch import save_file

from gligen import cli
from gligen import device as devices
from gligen.commands import sample
from gligen.image_files import read_record, write_new_image
from gligen.loading import build_pipeline
from gligen.modes import MODES
from gligen.request import parse_request, read_requests
from gligen.runtime import optimize
from gligen.weights import is_grounding_name, read_weights, save_model
from tests.generated import generated_model

ROOT = Path(__file__).parents[2]
BOX = ["--box", "a red ball", ".1", ".2", ".5", ".7"]
QUICK = ["--prompt", "a ball", "--steps", "2", "--schedule", "1", "0", "0", "--device", "cpu", *BOX]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(mode)`: a small model of that mode in our own layout, made once."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(mode: str = "box-text") -> Path:
        if mode not in made:
            pipe = build_pipeline(generated_model(mode), device="cpu", dtype="float32")
            parts = {
                "unet": pipe.unet.state_dict(),
                "vae": pipe.vae.state_dict(),
                "text_encoder": pipe.text_encoder.state_dict(),
            }
            made[mode] = folder / f"{mode}.safetensors"
            save_model(made[mode], parts, pipe.config)
        return made[mode]

    return make


def run(*args: object) -> int:
    return cli.run(sample.main, [str(arg) for arg in args])


def refusal(capsys, *args: object) -> str:
    """The one line that a run is refused with."""
    assert run(*args) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1, err
    assert err[0].startswith("error: ")
    return err[0]


def test_a_run_writes_numbered_pictures_that_run_again(tmp_path, capsys):
    assert run(*QUICK, "--num-images", 2, "--seed", 5, "--out", tmp_path / "a", "--annotate", "--grid") == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert sorted(p.name for p in written) == [
        "0000-0-annotated.png",
        "0000-0.png",
        "0000-1-annotated.png",
        "0000-1.png",
        "0000-grid.png",
    ]
    metadata = json.loads(Image.open(tmp_path / "a" / "0000-1.png").info["gligen"])
    assert metadata["request"]["seed"] == 6
    assert run("--request", tmp_path / "a" / "0000-1.png", "--device", "cpu", "--out", tmp_path / "b") == 0
    pictures = [np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a/0000-1.png", "b/0000-0.png")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_without_any_request_the_example_is_generated(tmp_path, capsys):
    assert run("--steps", 1, "--schedule", 1, 0, 0, "--out", tmp_path, "--device", "cpu") == 0
    record = read_record(capsys.readouterr().out.strip())
    (example,) = read_requests(ROOT / "examples" / "box-text.json")
    assert record["request"]["prompt"] == example.prompt
    assert "entities" in record["request"]


@pytest.mark.parametrize("changed", [{"images": 3, "model": 7}, {"images": ["a"], "model": [1]}, {"init_latents": 5}])
def test_a_record_of_other_types_is_no_obstacle(tmp_path, changed):
    write_new_image(Image.new("RGB", (64, 64)), tmp_path / "a.png", {"request": {"prompt": "x", "steps": 1}, **changed})
    assert run("--request", tmp_path / "a.png", "--out", tmp_path / "out", "--device", "cpu") == 0


def test_a_schedule_has_no_effect_without_grounding(tmp_path, caplog):
    base = ["--checkpoint", ROOT / "checkpoints" / "scenes-base.safetensors", "--prompt", "x", "--steps", 2]
    assert run(*base, "--schedule", 1, 0, 0, "--device", "cpu", "--out", tmp_path) == 0
    assert run(*base, "--device", "cpu", "--out", tmp_path) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"{n:04}-0.png")) for n in range(2))
    assert np.array_equal(first, second)


def test_existing_pictures_are_never_overwritten(tmp_path):
    (tmp_path / "0003-0.png").write_bytes(b"mine")
    for _ in range(2):
        assert run(*QUICK, "--out", tmp_path) == 0
    assert (tmp_path / "0003-0.png").read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0003-0.png", "0004-0.png", "0005-0.png"]


def test_flags_override_the_request_file(tmp_path):
    request = {"prompt": "a cat", "seed": 3, "steps": 50, "schedule": [1, 0, 0]}
    (tmp_path / "r.yaml").write_text(json.dumps([request, request | {"prompt": "a dog"}]))
    args = ("--request", tmp_path / "r.yaml", "--steps", 1, "--tau", 0.5, "--device", "cpu", "--out", tmp_path)
    assert run(*args) == 0
    for i, prompt in enumerate(("a cat", "a dog")):
        stored = json.loads(Image.open(tmp_path / f"000{i}-0.png").info["gligen"])["request"]
        assert (stored["prompt"], stored["seed"], stored["steps"]) == (prompt, 3, 1)
        assert stored["schedule"] == [0.5, 0.0, 0.5]


def test_latents_go_in_and_out(tmp_path):
    start = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    np.save(tmp_path / "start.npy", start)
    latents = []
    for name, seed in (("a", 1), ("b", 2)):
        files = ("--init-latents", tmp_path / "start.npy", "--save-latents", tmp_path / f"{name}.npy")
        assert run(*QUICK, "--seed", seed, *files, "--out", tmp_path) == 0
        latents.append(np.load(tmp_path / f"{name}.npy"))
    assert latents[0].shape == (1, 4, 16, 16)
    assert latents[0].dtype == np.float32
    assert np.array_equal(*latents)


def test_flags_without_effect_are_said(tmp_path, caplog, checkpoint):
    np.save(tmp_path / "x.npy", np.zeros((4, 16, 16), np.float32))
    latents = ("--init-latents", tmp_path / "x.npy", "--seed", 3, "--out", tmp_path)
    noisy = [("--sampler", name) for name in ("ddpm", "euler-ancestral", "lcm")] + [("--sampler", "ddim", "--eta", 0.5)]
    for more, is_said in (((), True), (("--sampler", "euler"), True), *((flags, False) for flags in noisy)):
        caplog.clear()
        assert run(*QUICK, *latents, *more) == 0
        assert ("--seed has no effect" in caplog.text) is is_said
    base = ROOT / "checkpoints" / "scenes-base.safetensors"  # which holds an image tower of CLIP's
    assert run(*QUICK, "--clip", base, "--out", tmp_path) == 0
    assert "--clip has no effect" in caplog.text


def test_a_checkpoint_paints_what_its_model_paints_in_memory(tmp_path, checkpoint):
    box = {"phrase": "a red ball", "box": [0.1, 0.2, 0.5, 0.7]}
    request = parse_request({"prompt": "a ball", "steps": 2, "schedule": [1, 0, 0], "entities": [box]})
    pipe = build_pipeline(generated_model("box-text"), device="cpu", dtype="float32")
    assert run(*QUICK, "--checkpoint", checkpoint(), "--out", tmp_path, "--save-latents", tmp_path / "x.npy") == 0
    optimize(pipe, compile=False, fuse_qkv=False, graphs=False)  # as the command does on a CPU
    painted = next(pipe.generate([request])).latents.numpy()
    assert np.array_equal(np.load(tmp_path / "x.npy")[0], painted)


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


@pytest.mark.parametrize(
    "mode", [mode for mode, row in MODES.items() if row.is_map or row.takes_images or row.is_inpainting]
)
def test_each_picture_file_is_opened_and_decoded_once_a_run(tmp_path, monkeypatch, mode):
    """Counted where Python opens files, and where PIL begins to decode one."""
    request = json.loads((ROOT / "examples" / f"{mode}.json").read_text())
    shutil.copytree(ROOT / "examples" / "inputs", tmp_path / "inputs")
    (tmp_path / "r.json").write_text(json.dumps([request, request | {"seed": 9}]))
    decoded = []
    load = PngImageFile.load_prepare  # called once before the pixels of a file are decoded
    monkeypatch.setattr(PngImageFile, "load_prepare", lambda self: (decoded.append(self), load(self))[1])
    OPENED.clear()
    args = ("--request", tmp_path / "r.json", "--steps", 2, "--num-images", 2, "--batch-size", 1, "--device", "cpu")
    assert run(*args, "--annotate", "--grid", "--schedule", 1, 0, 0, "--out", tmp_path / "out") == 0
    pictures = [path for path in OPENED if path.startswith(str(tmp_path / "inputs"))]
    asked = {str(source) for _, source in parse_request(request, folder=tmp_path).images}
    assert sorted(pictures) == sorted(asked)
    assert len(decoded) == len(asked)


def test_help_answers_without_importing_torch():
    code = "import sys; from gligen.commands import sample; sample.build_parser().format_help()\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    assert "--negative-prompt" in done.stdout


# as `python sample.py`, but Ctrl-C counts in a shell's background jobs too, which begin with it ignored
INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "sample.py"
runpy.run_path("sample.py", run_name="__main__")
"""


def test_ctrl_c_keeps_finished_pictures(tmp_path):
    args = ["--steps", "20", "--num-images", "500", "--batch-size", "1", "--out", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "--prompt", "a ball", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("stopped: ")
    Image.open(first).load()


def test_processes_share_a_request_file(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"prompt": "a", "steps": 1, "num_images": 3}] * 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = ["sample.py", "--request", str(tmp_path / "r.json"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(
        [*command, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [f"000{i}-{k}.png" for i in range(2) for k in range(3)]


BAD_BOXES = {
    "x0 must be below x1": (".6", ".1", ".4", ".9"),
    "y0 must be below y1": (".1", ".9", ".4", ".2"),
    "outside [0, 1]": ("-.1", ".1", ".4", ".9"),
    "in pixels?": ("10", "20", "200", "300"),
    "finite": ("nan", ".1", ".4", ".9"),
    "four numbers": ("left", ".1", ".4", ".9"),
}


@pytest.mark.parametrize("reason", BAD_BOXES)
def test_bad_boxes_are_refused(capsys, tmp_path, reason):
    assert reason in refusal(capsys, "--prompt", "a", "--box", "a ball", *BAD_BOXES[reason], "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused(capsys, tmp_path, checkpoint):
    box = ["0", "0", "1", "1"]
    model = ("--checkpoint", checkpoint(), "--out", tmp_path)
    many = [arg for i in range(31) for arg in ("--box", f"thing {i}", *box)]
    assert "31 entries: this model takes at most 30" in refusal(capsys, "--prompt", "a", *many, *model)
    assert "phrase is ''" in refusal(capsys, "--prompt", "a", "--box", "", *box)
    assert "multiples of 4" in refusal(capsys, *QUICK, "--size", 102, 64, *model)
    assert "ddpm, ddim, plms, dpmpp" in refusal(capsys, *QUICK, "--sampler", "heun")
    assert "sum to 1" in refusal(capsys, *QUICK, "--schedule", 0.5, 0.2, 0.2)
    assert "prompt is missing" in refusal(capsys, "--depth", ROOT / "examples/inputs/depth.png")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    repaint = ("--inpaint", ROOT / "examples/inputs/depth.png", "--mask", tmp_path / "black.png")
    assert "black" in refusal(capsys, *QUICK, *repaint, "--out", tmp_path)
    assert "no such file" in refusal(capsys, "--prompt", "a", "--depth", tmp_path / "missing.png")
    assert "does not exist" in refusal(capsys, "--request", tmp_path / "missing.json")
    assert "at least 1" in refusal(capsys, *QUICK, "--batch-size", 0)
    assert "--inpaint" in refusal(capsys, *QUICK, "--mask", "mask.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "not an image" in refusal(capsys, "--prompt", "a", "--depth", tmp_path / "bad.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-30])
    assert "truncated" in refusal(capsys, "--prompt", "a", "--depth", tmp_path / "cut.png")


def test_an_unknown_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--stepz", 3)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bad_outputs_are_refused_before_the_model_is_built(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen.loading.build_pipeline", None)  # would fail with a traceback if it were called
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refusal(capsys, *QUICK, "--out", tmp_path / "file" / "out")
    np.save(tmp_path / "l.npy", np.zeros((4, 8, 8), np.float32))
    assert "exists" in refusal(capsys, *QUICK, "--save-latents", tmp_path / "l.npy", "--out", tmp_path)
    wrong = refusal(capsys, *QUICK, "--init-latents", tmp_path / "l.npy", "--out", tmp_path)
    assert "(1, 4, 8, 8)" in wrong
    assert "(1, 4, 16, 16)" in wrong
    for content in (b"no numbers", b"PK\x03\x04 half a zip"):
        (tmp_path / "no.npy").write_bytes(content)
        assert "not an .npy file" in refusal(capsys, *QUICK, "--init-latents", tmp_path / "no.npy", "--out", tmp_path)


def test_a_read_only_output_folder_is_refused(capsys, tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gligen.output.tempfile.TemporaryFile", denied)  # root may write anywhere
    assert "cannot be written: Permission denied" in refusal(capsys, *QUICK, "--out", tmp_path)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_bad_checkpoints_are_refused(capsys, tmp_path, checkpoint):
    model = checkpoint()
    out = ("--out", tmp_path / "out")
    assert "no such file" in refusal(capsys, *QUICK, "--checkpoint", tmp_path / "missing.pth", *out)
    half = tmp_path / "half.safetensors"
    half.write_bytes(model.read_bytes()[:100_000])
    assert "downloaded" in refusal(capsys, *QUICK, "--checkpoint", half, *out)
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>not found</html>")
    assert "page.ckpt" in refusal(capsys, *QUICK, "--checkpoint", tmp_path / "page.ckpt", *out)
    torch.save({"state_dict": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "other.pth")
    assert "of no known layout" in refusal(capsys, *QUICK, "--checkpoint", tmp_path / "other.pth", *out)
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pth", pickle_module=pickle)
    assert "refused" in refusal(capsys, *QUICK, "--checkpoint", tmp_path / "hostile.pth", *out)
    assert not (tmp_path / "ran").exists()
    assert "unknown mode" in refusal(capsys, *QUICK, "--checkpoint", model, "--mode", "boxes", *out)
    assert "not of mode 'depth'" in refusal(capsys, *QUICK, "--checkpoint", model, "--mode", "depth", *out)
    grounding = {n: t.read() for n, t in read_weights(model).parts["unet"].items() if is_grounding_name(n)}
    save_file(grounding, tmp_path / "pruned.safetensors")  # of another base than the embedded one
    assert "does not fit" in refusal(capsys, *QUICK, "--adapter", tmp_path / "pruned.safetensors", *out)


def test_requests_that_the_checkpoint_cannot_serve_are_refused(capsys, tmp_path, checkpoint):
    out = ("--out", tmp_path / "out")
    keypoints = {"prompt": "a person", "keypoints": [[[0.5, 0.5]] * 17]}
    (tmp_path / "k.json").write_text(json.dumps(keypoints))
    line = refusal(capsys, "--request", tmp_path / "k.json", "--checkpoint", checkpoint(), *out)
    assert "keypoints" in line
    assert "box-text" in line
    depth = ("--prompt", "a house", "--depth", ROOT / "examples/inputs/depth.png")
    assert "box-text" in refusal(capsys, *depth, "--checkpoint", checkpoint(), *out)
    assert "--schedule 1 0 0" in refusal(capsys, *depth, "--checkpoint", checkpoint("depth"), *out)
    assert run(*depth, "--checkpoint", checkpoint("depth"), "--schedule", 1, 0, 0, "--steps", 1, *out) == 0
    capsys.readouterr()
    image = {"prompt": "a", "entities": [{"image": str(ROOT / "examples/inputs/depth.png"), "box": [0, 0, 1, 1]}]}
    (tmp_path / "i.json").write_text(json.dumps(image))
    line = refusal(capsys, "--request", tmp_path / "i.json", "--checkpoint", checkpoint("box-text-image"), *out)
    assert "--clip" in line


def test_a_map_checkpoint_borrows_the_bases_first_convolution(tmp_path, checkpoint):
    args = ("--prompt", "a house", "--depth", ROOT / "examples/inputs/depth.png", "--steps", 4, "--tau", 0.5)
    assert run(*args, "--checkpoint", checkpoint(), "--adapter", checkpoint("depth"), "--out", tmp_path) == 0


def test_not_enough_memory_is_told_before_weights_are_read(capsys, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda device: 2**20)
    line = refusal(capsys, *QUICK, "--checkpoint", checkpoint(), "--out", tmp_path)
    assert "GiB free" in line
    assert "--dtype" in line


def test_a_device_that_is_not_there_is_refused(capsys, tmp_path):
    args = ("--prompt", "a ball", "--steps", 1, "--out", tmp_path)
    for device in ("tpu9", "meta"):
        assert f"device is '{device}'" in refusal(capsys, *args, "--device", device)
    assert "dtype is 'int3'" in refusal(capsys, *args, "--device", "cpu", "--dtype", "int3")


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        run("--request", "missing.json", "--debug")
