"""What an image records of how it was generated, and what is logged when it is generated again with something else."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gligen import cli
from gligen.commands import sample
from gligen.output import OutputFolder
from gligen.pipeline import Sample
from gligen.provenance import WHOLE, compare, fingerprint, portable_path, record
from gligen.request import Request, parse_request, read_requests, to_dict

ROOT = Path(__file__).parents[2]
BASE, ADAPTER = (ROOT / "checkpoints" / f"scenes-{name}.safetensors" for name in ("base", "box-text"))
QUICK = ("--prompt", "a ball", "--steps", 1, "--tau", 1, "--device", "cpu", "--box", "a red ball", 0.1, 0.2, 0.5, 0.7)


def run(*args: object) -> int:
    return cli.run(sample.main, [str(arg) for arg in args])


def metadata(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["gligen"])


def test_a_fingerprint_is_of_the_content_and_not_of_the_name(tmp_path):
    content = np.random.default_rng(0).bytes(WHOLE + 3 * 2**20)
    for name, kept in (("a.bin", len(content)), ("small.bin", 1000), ("b.bin", len(content))):
        (tmp_path / name).write_bytes(content[:kept])
    assert fingerprint(tmp_path / "a.bin") == fingerprint(tmp_path / "b.bin") != fingerprint(tmp_path / "small.bin")
    noisy = bytes(byte ^ 1 for byte in content[: 2**20])  # as a fine-tuned layer in the middle
    changed = content[: 5 * 2**20] + noisy + content[6 * 2**20 :]
    (tmp_path / "b.bin").write_bytes(changed)
    assert fingerprint(tmp_path / "a.bin") != fingerprint(tmp_path / "b.bin")
    for name in ("one", "two"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "unet" / "config.json").write_text("{ }")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_differences_are_named(tmp_path):
    for name, content in (("a.ckpt", b"a"), ("same.ckpt", b"a"), ("l.safetensors", b"l")):
        (tmp_path / name).write_bytes(content)
    plain = {"mode": "box-text", "dtype": "float32", "ema": False, "quantize": None}
    stored = {"model": record({"checkpoint": tmp_path / "a.ckpt"}, plain)}
    assert stored["model"] == {
        "checkpoint": {"file": "a.ckpt", "fingerprint": fingerprint(tmp_path / "a.ckpt")},
        "mode": "box-text",
        "dtype": "float32",
    }
    assert compare(stored, record({"checkpoint": tmp_path / "same.ckpt"}, plain), {}) is None
    lora = record({"checkpoint": tmp_path / "a.ckpt", "lora": [f"{tmp_path / 'l.safetensors'}:0.8"]}, plain)
    assert compare(stored, lora, {}) == "lora none, now 'l.safetensors' at 0.8"
    assert compare(stored, record({"checkpoint": tmp_path / "a.ckpt"}, plain | {"ema": True}), {}) == "ema none, now on"
    (tmp_path / "a.ckpt").write_bytes(b"b")
    assert "checkpoint 'a.ckpt' of other content" in str(
        compare(stored, record({"checkpoint": tmp_path / "a.ckpt"}, plain), {})
    )
    old = {"checkpoint": "a.ckpt", "mode": "box-text", "dtype": "bfloat16"}  # as PNGs were written before
    assert compare(old, record({"checkpoint": tmp_path / "a.ckpt"}, plain), {}) == "dtype bfloat16, now float32"


def test_a_picture_painted_again_with_another_model_is_said(tmp_path, caplog):
    shutil.copy(BASE, tmp_path / "other.safetensors")
    shutil.copy(BASE.with_suffix(".json"), tmp_path / "other.json")
    model = ("--checkpoint", tmp_path / "other.safetensors", "--adapter", ADAPTER)
    assert run(*QUICK, *model, "--out", tmp_path / "o") == 0
    again = ("--request", tmp_path / "o" / "0000-0.png", "--device", "cpu", "--out", tmp_path / "p")
    assert run(*again) == 0  # the same content under another name
    assert not caplog.messages
    shutil.copy(ROOT / "checkpoints" / "scenes-early-box-text.safetensors", tmp_path / "early.safetensors")
    assert run(*again, "--adapter", tmp_path / "early.safetensors", "--dtype", "bfloat16") == 0
    expected = (
        "0000-0.png was generated with adapter 'scenes-box-text.safetensors', now 'early.safetensors'; "
        "dtype float32, now bfloat16: what comes out will differ"
    )
    assert caplog.messages == [expected]
    assert metadata(tmp_path / "p" / "0001-0.png")["model"]["adapter"]["file"] == "early.safetensors"
    caplog.clear()
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 16, 16), np.float32))
    assert run(*QUICK, "--init-latents", tmp_path / "x.npy", "--out", tmp_path / "q") == 0
    caplog.clear()
    assert run("--request", tmp_path / "q" / "0000-0.png", "--device", "cpu", "--out", tmp_path / "p") == 0
    assert "initial latents 'x.npy', now none" in caplog.text


def test_pictures_of_a_request_are_found_again(tmp_path, monkeypatch, caplog):
    home = tmp_path / "home" / "somebody"
    for folder in ("pictures", "out"):
        (home / folder).mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "inputs" / "depth.png", home / "pictures")
    monkeypatch.setenv("HOME", str(home))
    args = ("--prompt", "a", "--depth", home / "pictures" / "depth.png", "--steps", 1, "--tau", 1, "--device", "cpu")
    assert run(*args, "--out", home / "out") == 0
    assert run(*args, "--out", tmp_path / "elsewhere") == 0
    inside, outside = home / "out" / "0000-0.png", tmp_path / "elsewhere" / "0000-0.png"
    assert metadata(inside)["request"]["depth"] == "../pictures/depth.png"
    assert metadata(outside)["request"]["depth"] == "~/pictures/depth.png"
    start = Request(prompt="x", init_image=home / "pictures" / "depth.png")
    assert to_dict(start, tmp_path)["init_image"] == "~/pictures/depth.png"
    for png in (inside, outside):
        assert "somebody" not in json.dumps(metadata(png))
        assert read_requests(png)[0].depth is not None
        assert os.path.samefile(read_requests(png)[0].depth, home / "pictures" / "depth.png")
    caplog.clear()
    Image.new("L", (64, 64), 9).save(home / "pictures" / "depth.png")
    assert run("--request", inside, "--device", "cpu", "--out", tmp_path / "again") == 0
    assert "was generated with depth of other content" in caplog.text
    shutil.move(inside, tmp_path / "moved.png")
    shutil.move(home / "pictures" / "depth.png", tmp_path / "depth.png")
    with caplog.at_level(logging.INFO, logger="gligen"):
        (request,) = read_requests(tmp_path / "moved.png")
    assert request.depth == str(tmp_path / "depth.png")
    assert "moved.png: depth is taken from beside it, 'depth.png'" in caplog.text


def test_paths_are_stored_without_a_home_folders_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for picture, folder, expected in (
        ("me/a/x.png", "me/a", "x.png"),
        ("me/a/x.png", "me/b/c", "../../a/x.png"),
        ("me/a/x.png", "out", "~/a/x.png"),
        ("data/x.png", "data/out", "../x.png"),
        ("data/x.png", "me/out", "../../data/x.png"),
        ("men/x.png", "out", "../men/x.png"),  # begins like the home folder, and is another
    ):
        assert portable_path(str(tmp_path / picture), tmp_path / folder) == expected


def painted(number: int, image: int = 0, level: int = 0) -> Sample:
    return Sample((number, image), Request(prompt=f"{number}"), Image.new("RGB", (2, 2), (level, 0, 0)), torch.zeros(1))


def test_two_runs_into_one_folder_lose_nothing(tmp_path):
    folders = [OutputFolder(tmp_path) for _ in range(3)]  # all begin at 0
    written: list[Path] = []

    def write(folder: OutputFolder, level: int) -> None:
        for number in range(10):
            for image in range(2):
                written.append(folder.write(painted(number, image, level), {}))

    threads = [threading.Thread(target=write, args=(folder, level)) for level, folder in enumerate(folders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 3 * 10 * 2 == len(list(tmp_path.iterdir()))
    found = sorted((Image.open(path).getpixel((0, 0))[0], metadata(path)["request"]["prompt"]) for path in written)
    assert found == sorted((level, str(number)) for level in range(3) for number in range(10) for _ in range(2))


def test_extras_stay_with_their_picture(tmp_path):
    out = OutputFolder(tmp_path)
    (tmp_path / "0000-0.png").write_bytes(b"another run's")
    assert out.write(painted(0), {}).name == "0001-0.png"
    assert out.write_extra(Image.new("RGB", (2, 2)), 0, "0-annotated").name == "0001-0-annotated.png"
    assert out.write(painted(1), {}).name == "0002-0.png"
    assert (tmp_path / "0000-0.png").read_bytes() == b"another run's"


def test_a_size_beyond_all_memory_is_refused_before_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gligen.loading.build_pipeline", None)  # would fail with a traceback if it were called
    assert run(*QUICK, "--size", 64000, 64000, "--out", tmp_path) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: an image of 64000 x 64000 needs ")
    assert "smaller --size" in line
    assert len(line.splitlines()) == 1


def test_the_least_memory_of_an_image_is_that_of_its_largest_convolution():
    """Stable Diffusion's decoder ends with 128 channels at full size: read and written, in float32."""
    from tests.request.test_request import facts, for_model

    job = for_model(parse_request({"prompt": "x", "size": [1024, 512]}), None)
    assert job.least_memory(facts(None).config, 4, 128) == (2 * 128 * 4 + 12) * 1024 * 512
    assert job.least_memory(facts(None).config, 2, 32) == 2 * 128 * 2 * 256**2 + 12 * 1024 * 512
