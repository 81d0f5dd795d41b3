"""`python -m gligen.data`: the drawn world in every format reads as what was drawn, and `show` says and shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gligen.cli import run
from gligen.data.__main__ import COMMANDS, main
from gligen.data.draw import FORMATS
from gligen.data.flags import DRAWN_FORMATS
from gligen.data.maps import MAPS
from gligen.data.open import open_source
from gligen.data.people import make_people_scene
from gligen.data.scenes import make_scene
from gligen.data.streams import Series
from tests.data.sets import write_jsonl

ROOT = Path(__file__).parents[2]


def draw(out: Path, form: str, *more: str) -> int:
    return run(main, ["draw", "--format", form, "--out", str(out), "--count", "5", "--seed", "3", *more])


def test_every_format_can_be_drawn():
    assert tuple(FORMATS) == DRAWN_FORMATS


@pytest.mark.parametrize("form", DRAWN_FORMATS)
def test_what_was_drawn_is_what_is_read(form, tmp_path):
    assert draw(tmp_path, form) == 0
    source, findings = open_source(tmp_path)
    assert findings.images == source.size == 5
    assert not findings.left_out
    for n in range(5):
        scene, example = make_scene(Series.TRAINING + 3, n), source.example(n)
        assert [(e.phrase, e.box) for e in example.entities] == [(item.phrase, item.box) for item in scene.objects]
        if form == "tsv":  # holds JPEGs
            assert abs(example.image.astype(int) - scene.image).mean() < 3
        else:
            assert (example.image == scene.image).all()
        assert example.caption == (scene.caption if form in ("coco", "tsv", "tar", "folder") else "")


@pytest.mark.parametrize("form", ["coco", "yolo", "tar", "folder"])
def test_drawn_people_are_read(form, tmp_path):
    assert draw(tmp_path, form, "--mode", "keypoint") == 0
    source, findings = open_source(tmp_path, "keypoint")
    scenes = [make_people_scene(Series.TRAINING + 3, n) for n in range(5)]
    assert findings.persons == sum(len(scene.people) for scene in scenes)
    for n, scene in enumerate(scenes):
        for person, points in zip(source.example(n).keypoints, scene.people, strict=True):
            assert [p is None for p in person] == [p is None for p in points]
            assert np.allclose([p for p in person if p], [p for p in points if p], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MAPS)
def test_drawn_maps_are_read(mode, tmp_path):
    assert draw(tmp_path, "coco", "--mode", mode, "--size", "96") == 0
    source, _ = open_source(tmp_path, mode)
    for n in range(5):
        expected = MAPS[mode](make_scene(Series.TRAINING + 3, n, size=96), None)
        shown = source.example(n).map
        assert (shown == (expected if shown.ndim == expected.ndim else expected[..., None])).all()


def test_a_stopped_drawing_goes_on_to_the_same_bytes(tmp_path):
    assert draw(tmp_path / "whole", "coco") == draw(tmp_path / "stopped", "coco") == 0
    before = (tmp_path / "stopped/images/000001.png").stat().st_mtime_ns
    (tmp_path / "stopped/images/000003.png").unlink()
    (tmp_path / "stopped/annotations/instances_drawn.json").unlink()
    assert draw(tmp_path / "stopped", "coco") == 0
    assert (tmp_path / "stopped/images/000001.png").stat().st_mtime_ns == before
    files = [
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in sorted(tmp_path.iterdir())
    ]
    assert files[0] == files[1]


def test_another_drawing_is_not_mixed_in(tmp_path, capsys):
    assert draw(tmp_path / "a", "coco") == 0
    assert draw(tmp_path / "a", "coco", "--size", "96") == 2
    assert "holds another drawing" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    assert draw(tmp_path / "b", "coco") == 2
    assert "is not empty" in capsys.readouterr().err
    assert draw(tmp_path / "c", "voc", "--mode", "keypoint") == 2
    assert "holds no keypoints" in capsys.readouterr().err


def test_show_tells_and_draws(tmp_path, capsys):
    write_jsonl(tmp_path / "set")
    out = tmp_path / "deep/grid.png"
    assert run(main, ["show", str(tmp_path / "set"), "--out", str(out), "--count", "9", "--size", "128", "192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["pictures with metadata.jsonl: 3 images, 6 boxes, 3 phrases", str(out)]
    with Image.open(out) as sheet:
        assert sheet.width == 2 * 128 + 2
        assert sheet.height > 2 * 192
    assert run(main, ["show", str(tmp_path / "set")]) == 0  # words alone


@pytest.mark.parametrize("mode", ["canny", "box-text-image", "keypoint", "inpaint-box-text"])
def test_show_takes_every_kind_of_mode(mode, tmp_path, capsys):
    assert draw(tmp_path / "set", "folder", "--mode", mode) == 0
    out = tmp_path / "grid.png"
    more = ["--crop", "random", "--flip", "0.5", "--buckets", "--size", "128", "128"]
    assert run(main, ["show", str(tmp_path / "set"), "--mode", mode, "--out", str(out), *more]) == 0
    with Image.open(out) as sheet:
        assert np.asarray(sheet).std() > 10


def test_mistakes_are_one_line(tmp_path, capsys):
    assert run(main, ["show", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    write_jsonl(tmp_path / "set")
    assert run(main, ["show", str(tmp_path / "set"), "--out", str(tmp_path / "x.png"), "--size", "100", "100"]) == 2
    assert capsys.readouterr().err == "error: size is 100 x 100: give multiples of 64\n"


def test_show_counts_bad_pictures_and_ends_when_they_are_too_many(tmp_path, capsys, caplog):
    write_jsonl(tmp_path / "set")
    (tmp_path / "set/b.png").write_bytes(b"broken")
    arguments = ["show", str(tmp_path / "set"), "--out", str(tmp_path / "x.png")]
    assert run(main, arguments) == 2
    assert "1 bad examples, more than 1.00% of 3: 1 × picture: not an image file" in capsys.readouterr().err
    assert run(main, [*arguments, "--max-bad", "0.4"]) == 0
    assert "another example stands in for b.png: not an image file" in caplog.text


def test_check_counts_pictures_that_are_missing(tmp_path):
    assert draw(tmp_path / "set", "coco") == 0
    assert run(main, ["check", str(tmp_path / "set")]) == 0
    next((tmp_path / "set" / "images").glob("*.png")).unlink()
    assert run(main, ["check", str(tmp_path / "set")]) == 1


def test_build_refuses_a_size_before_it_builds(tmp_path, capsys):
    assert draw(tmp_path / "set", "coco") == 0
    words = ["build", str(tmp_path / "set"), "--out", str(tmp_path / "built"), "--latents", "--size", "100", "100"]
    assert run(main, words) == 2
    assert "size is 100 x 100: give multiples of 64" in capsys.readouterr().err
    assert not (tmp_path / "built").exists()


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nfrom gligen.data.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', *(m for m in ('torch', 'PIL', 'numpy', 'pyarrow') if m in sys.modules))"
    )
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", script, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "HEAVY"
        assert f"usage: python -m gligen.data {command}" in done.stdout


def test_settings_of_a_drawing_are_plain(tmp_path):
    assert draw(tmp_path, "folder", "--series", "evaluation") == 0
    settings = json.loads((tmp_path / ".drawn.json").read_text())
    assert settings == {"format": "folder", "mode": "box-text", "size": 64, "series": int(Series.EVALUATION) + 3}


@pytest.mark.parametrize("value", ["nan", "inf", "7", "-1"])
def test_shares_and_sizes_beyond_sense_are_refused(value, tmp_path, capsys):
    """A share that is no number would never be exceeded."""
    assert draw(tmp_path / "set", "folder") == 0
    for command in (["build", "--out", str(tmp_path / "out")], ["show", "--out", str(tmp_path / "page.png")]):
        assert run(main, [command[0], str(tmp_path / "set"), *command[1:], f"--max-bad={value}"]) == 2
        assert f"max_bad is {float(value)}: give a number" in capsys.readouterr().err
    if value != "7":
        size = f"--shard-size={value}"
        assert run(main, ["build", str(tmp_path / "set"), "--out", str(tmp_path / "out"), size]) == 2
        assert f"--shard-size is {float(value)}: give MB above 0" in capsys.readouterr().err
