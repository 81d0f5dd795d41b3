"""Built sets: what goes in comes out, whoever builds, however often it is killed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gligen.data import __main__ as commands
from gligen.data.build import build, read_part
from gligen.data.example import BadExample, Example, Fault, Findings
from gligen.data.open import open_source
from gligen.data.shards import INDEX, MANIFEST, ShardSource, index_shard
from gligen.data.storage import Storage
from gligen.request import Entity

ROOT = Path(__file__).parents[2]


class Photographs:
    """Pictures in files, some of them bad."""

    def __init__(self, size: int | None, bad: tuple[int, ...] = (), pictured: bool = True) -> None:
        self.size, self.bad = size, bad
        if pictured:
            self.picture = self._picture

    def key(self, n: int) -> str:
        return f"photo-{n}.jpg"

    def _picture(self, n: int) -> bytes:
        levels = np.random.default_rng(n).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(levels).resize((60, 40)).save(content, "JPEG", comment=f"number {n}")
        return content.getvalue()

    def example(self, n: int) -> Example:
        if n in self.bad:
            raise BadExample("damaged picture", f"{self.key(n)}: it is damaged")
        rng = np.random.default_rng((n, 1))
        entities = tuple(Entity(phrase=f"thing {n % 7}", box=_box(rng)) for _ in range(n % 4))
        return Example(
            image=np.asarray(Image.open(io.BytesIO(self._picture(n)))),
            caption=f"caption {n}",
            entities=entities,
            key=self.key(n),
            faults=(Fault(reason="box", message=f"{n}: a bad box", number=n),) if n % 10 == 3 else (),
        )


def _box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    x, y = np.sort(rng.random((2, 2))).tolist()
    return x[0], y[0], x[1], y[1]


FOUND = Findings(format="photographs")
SMALL = {"shard_size": 0.03}  # MB, about 8 pictures


def tree(folder: Path) -> dict[str, str]:
    """All files and what is in them."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_built_is_what_the_source_gives(tmp_path):
    source = Photographs(50)
    assert build(source, FOUND, tmp_path / "set", **SMALL)
    built = ShardSource(tmp_path / "set")
    assert built.size == 50
    assert len(built.shards) > 3
    assert not (tmp_path / "set" / ".building").exists()
    for n in range(50):
        example, expected = built.example(n), source.example(n)
        np.testing.assert_array_equal(example.image, expected.image)
        assert (example.caption, example.entities, example.key) == (expected.caption, expected.entities, expected.key)
        assert built.picture(n) == source.picture(n)
        words = built.words(n)
        assert words.entities == tuple((entity.phrase, entity.box) for entity in expected.entities)
        assert (words.caption, words.size) == (expected.caption, (60, 40))
    found = built.findings
    assert (found.format, found.images, found.phrases) == ("built set", 50, 7)
    assert found.entities == sum(len(source.example(n).entities) for n in range(50))
    assert (found.left_out, found.first_left_out, found.lost) == ({"box": 5}, {"box": "3: a bad box"}, 0)


def test_pythons_tarfile_and_an_index_made_anew_agree(tmp_path):
    source = Photographs(20)
    build(source, FOUND, tmp_path / "set", **SMALL)
    found = {}
    for path in sorted((tmp_path / "set").glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}
    assert list(found)[:2] == ["000000000.json", "000000000.jpg"]
    assert [found[f"{n:09d}.jpg"] for n in range(20)] == [source.picture(n) for n in range(20)]
    assert json.loads(found["000000003.json"])["source"] == "photo-3.jpg"
    index = np.load(tmp_path / "set" / INDEX)
    assert (index.dtype, index.shape) == (np.dtype("<u4"), (20, 4))
    storage, rows = Storage(tmp_path / "set"), []
    for k, shard in enumerate(ShardSource(tmp_path / "set").shards):
        rows += index_shard(storage, shard.name, k, shard.size)[0]
    assert index.tolist() == [list(row) for row in rows]


def test_a_source_without_files_is_stored_without_loss(tmp_path):
    source = Photographs(None, pictured=False)
    build(source, FOUND, tmp_path / "set", count=5)
    built = ShardSource(tmp_path / "set")
    np.testing.assert_array_equal(built.example(4).image, source.example(4).image)
    assert built.picture(4).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--count"):
        build(source, FOUND, tmp_path / "other")


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_make_what_one_makes(tmp_path, parts):
    source = Photographs(50, bad=(7,))
    build(source, FOUND, tmp_path / "one", max_bad=0.05, **SMALL)
    done = [
        build(source, FOUND, tmp_path / "parts", part=(i, parts), max_bad=0.05, **SMALL) for i in reversed(range(parts))
    ]
    assert done == [False] * (parts - 1) + [True]
    assert tree(tmp_path / "parts") == tree(tmp_path / "one")


def killed(run: Callable[[], object], call: str, nth: int) -> bool:
    """Whether SIGKILL ended a copy of this process that ran this, at its nth call of os.`call`."""
    child = os.fork()
    if child == 0:
        calls, real = 0, getattr(os, call)

        def dying(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, call, dying)
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_anywhere_it_ends_in_the_same_bytes(tmp_path, call):
    source = Photographs(30, bad=(7,))
    build(source, FOUND, tmp_path / "unbroken", max_bad=0.05, **SMALL)
    expected = tree(tmp_path / "unbroken")
    nth, points = 1, 0
    while True:  # every time a point further on than the last
        out = tmp_path / f"{nth}"
        was_killed = killed(lambda out=out: build(source, FOUND, out, max_bad=0.05, **SMALL), call, nth)
        points += was_killed
        assert build(source, FOUND, out, max_bad=0.05, **SMALL)
        assert tree(out) == expected
        if not was_killed:
            break
        nth += 1
    assert points > 8  # two files a shard, the plan, the index


def test_killed_again_and_again_it_goes_on(tmp_path):
    source = Photographs(45)
    build(source, FOUND, tmp_path / "unbroken", **SMALL)
    rounds = 0
    while killed(lambda: build(source, FOUND, tmp_path / "set", **SMALL), "replace", 5):  # one more than the end takes
        rounds += 1
    assert rounds > 2
    assert tree(tmp_path / "set") == tree(tmp_path / "unbroken")


def test_killed_while_notes_are_removed(tmp_path):
    source = Photographs(30)
    build(source, FOUND, tmp_path / "unbroken", **SMALL)
    assert killed(lambda: build(source, FOUND, tmp_path / "set", **SMALL), "rmdir", 1)
    assert (tmp_path / "set" / ".building").exists()
    assert ShardSource(tmp_path / "set").size == 30
    assert build(source, FOUND, tmp_path / "set", **SMALL)
    assert tree(tmp_path / "set") == tree(tmp_path / "unbroken")


def test_a_full_disk_is_told_in_one_line_and_what_was_made_stays(tmp_path, monkeypatch):
    source = Photographs(50)
    build(source, FOUND, tmp_path / "unbroken", **SMALL)
    real, calls = os.fsync, 0

    def full(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left for .*: 2 of \d+ shards are finished") as caught:
        build(source, FOUND, tmp_path / "set", **SMALL)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "set").rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", real)
    assert build(source, FOUND, tmp_path / "set", **SMALL)
    assert tree(tmp_path / "set") == tree(tmp_path / "unbroken")


def test_bad_examples_are_counted_up_to_a_limit(tmp_path):
    source = Photographs(50, bad=(0, 7, 49))
    with pytest.raises(ValueError, match=r"2 of 50 examples cannot be read.*2 × damaged picture.*photo-0") as caught:
        build(source, FOUND, tmp_path / "set", max_bad=0.03, **SMALL)
    assert "\n" not in str(caught.value)
    assert build(source, FOUND, tmp_path / "set", max_bad=0.06, **SMALL)
    built = ShardSource(tmp_path / "set")
    assert built.size == 47
    assert built.findings.left_out["damaged picture"] == 3
    assert built.findings.first_left_out["damaged picture"] == "photo-0.jpg: it is damaged"
    assert [built.example(n).key for n in (0, 6, 46)] == ["photo-1.jpg", "photo-8.jpg", "photo-48.jpg"]


def test_the_limit_holds_over_all_parts(tmp_path):
    source = Photographs(50, bad=(0, 12))  # of shards 0 and 1, so of different parts
    build(source, FOUND, tmp_path / "set", part=(0, 2), max_bad=0.02, **SMALL)
    with pytest.raises(ValueError, match="2 of 50"):
        build(source, FOUND, tmp_path / "set", part=(1, 2), max_bad=0.02, **SMALL)


def test_another_command_does_not_go_into_the_same_folder(tmp_path):
    source = Photographs(20)
    assert build(source, FOUND, tmp_path / "set", **SMALL)
    assert build(source, FOUND, tmp_path / "set", **SMALL)  # nothing left to do
    before = tree(tmp_path / "set")
    for changed in ({"shard_size": 1.0}, {"mode": "keypoint"}, {"count": 10}):
        with pytest.raises(ValueError, match=f"begun with {next(iter({'count': 'last'}.get(k, k) for k in changed))}"):
            build(source, FOUND, tmp_path / "set", **(SMALL | changed))
    assert tree(tmp_path / "set") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else"):
        build(source, FOUND, tmp_path / "full", **SMALL)


def test_a_built_set_that_is_half_copied_is_refused(tmp_path):
    build(Photographs(20), FOUND, tmp_path / "set", **SMALL)
    (tmp_path / "set" / "00001.tar").rename(tmp_path / "00001.tar")
    with pytest.raises(ValueError, match=r"00001\.tar' is missing.*fully copied"):
        ShardSource(tmp_path / "set")
    (tmp_path / "set" / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"bytes long.*fully copied"):
        ShardSource(tmp_path / "set")


def test_a_built_set_can_be_read_from_a_url(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = Photographs(20)
    build(source, FOUND, tmp_path / "set", **SMALL)
    fsspec.filesystem("memory").put(str(tmp_path / "set") + "/", "/built/", recursive=True)
    built = ShardSource("memory://built")
    assert [built.example(n).caption for n in (0, 19)] == ["caption 0", "caption 19"]
    np.testing.assert_array_equal(built.example(11).image, source.example(11).image)


def test_a_set_built_for_a_mode_is_refused_to_others(tmp_path):
    build(Photographs(20), FOUND, tmp_path / "set", mode="inpaint-box-text", **SMALL)
    assert ShardSource(tmp_path / "set", "box-text-image").size == 20
    with pytest.raises(ValueError, match="no keypoints"):
        ShardSource(tmp_path / "set", "keypoint")
    assert json.loads((tmp_path / "set" / MANIFEST).read_text())["mode"] == "inpaint-box-text"


def test_parts_are_read(monkeypatch):
    assert read_part("3/4") == (3, 4)
    for wrong in ("4/4", "1", "-1/2", "1/0", "a/b"):
        with pytest.raises(ValueError, match="0/N to N-1/N"):
            read_part(wrong)
    assert read_part(None) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read_part(None) == (2, 8)


def test_shards_are_about_as_large_as_asked(tmp_path):
    build(Photographs(200), FOUND, tmp_path / "set", shard_size=0.1)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "set").glob("*.tar"))]
    assert all(0.9e5 < size < 1.2e5 for size in sizes[:-1])


def test_the_commands_end_in_what_was_drawn(tmp_path):
    """Drawn world as COCO -> build in a process that is killed -> the same pictures, boxes and phrases."""
    drawn, out = tmp_path / "coco", tmp_path / "set"
    command = [sys.executable, "-m", "gligen.data"]
    count, environment = "40", os.environ | {"OMP_NUM_THREADS": "1"}
    commands.main(["draw", "--format", "coco", "--count", count, "--out", str(drawn)])
    build_it = ["build", str(drawn), "--out", str(out), "--shard-size", "0.02"]
    with subprocess.Popen([*command, *build_it], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(out.glob("*.tar")):
            time.sleep(0.001)
        process.kill()
    commands.main(build_it)
    commands.main([*build_it[:3], str(tmp_path / "unbroken"), *build_it[4:]])
    assert tree(out) == tree(tmp_path / "unbroken")
    source, _ = open_source(drawn)
    built, findings = open_source(out)
    assert built.size == source.size == 40
    assert findings.lines()[0].startswith("built set: 40 images")
    for n in range(40):
        example, expected = built.example(n), source.example(n)
        np.testing.assert_array_equal(example.image, expected.image)
        assert (example.caption, example.entities, example.key) == (expected.caption, expected.entities, expected.key)
        assert built.picture(n) == (drawn / "images" / expected.key).read_bytes()


@pytest.mark.parametrize("mode", ["keypoint", "depth"])
def test_people_and_maps_survive(tmp_path, mode, capsys):
    commands.main(["draw", "--format", "folder", "--count", "4", "--mode", mode, "--out", str(tmp_path / "drawn")])
    commands.main(["build", str(tmp_path / "drawn"), "--mode", mode, "--out", str(tmp_path / "set")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "set")
    source, _ = open_source(tmp_path / "drawn", mode)
    built, _ = open_source(tmp_path / "set", mode)
    for n in range(4):
        example, expected = built.example(n), source.example(n)
        assert example.keypoints == expected.keypoints
        if mode == "depth":
            np.testing.assert_array_equal(example.map, expected.map)
    with pytest.raises(ValueError, match=f"was built for mode {mode} without boxes"):
        open_source(tmp_path / "set", "box-text")


def test_maps_that_are_made_from_pictures_are_made_from_tars_too(tmp_path):
    build(Photographs(5), FOUND, tmp_path / "set")
    _, findings = open_source(tmp_path / "set", "canny")
    assert findings.made_maps == "canny"
    _, findings = open_source(tmp_path / "set", "hed", maps="scribble")
    assert findings.made_maps == "scribble"
    with pytest.raises(ValueError, match="leave out --masks"):
        open_source(tmp_path / "set", "inpaint-box-text", masks=tmp_path)


@pytest.mark.parametrize("mode", ["box-text", "keypoint", "sem"])
def test_the_drawn_world_as_tars_is_the_drawn_world_as_a_folder(tmp_path, mode):
    for form in ("folder", "tar"):
        commands.main(["draw", "--format", form, "--count", "6", "--mode", mode, "--out", str(tmp_path / form)])
    folder, _ = open_source(tmp_path / "folder", mode)
    tars, findings = open_source(tmp_path / "tar", mode)
    assert tars.size == folder.size == findings.images == 6
    for n in range(6):
        example, expected = tars.example(n), folder.example(n)
        np.testing.assert_array_equal(example.image, expected.image)
        assert (example.caption, example.keypoints) == (expected.caption, expected.keypoints)
        assert [e.phrase for e in example.entities] == [e.phrase for e in expected.entities]
        np.testing.assert_allclose([e.box for e in example.entities], [e.box for e in expected.entities], atol=1e-6)
        if mode == "sem":
            np.testing.assert_array_equal(example.map, expected.map)
