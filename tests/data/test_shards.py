"""Tar shards: written and read back, others' tars, damage, and reading from many processes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gligen.data.example import BadExample, Example, Source
from gligen.data.records import pack
from gligen.data.shards import INDEX, MANIFEST, ShardSource, index_shard
from gligen.data.storage import Storage
from gligen.data.tars import TarError, ending, entry, members, walk
from gligen.request import Entity


def jpeg(seed: int, size: tuple[int, int] = (48, 32), **options: object) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", **options)
    return content.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> None:
    """By Python's own tarfile, as other people's tools do."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            tar.addfile(info, io.BytesIO(content))


def foreign(folder: Path, count: int = 5, tars: int = 2) -> None:
    """As img2dataset writes them."""
    folder.mkdir(exist_ok=True)
    for k in range(tars):
        files = []
        for i in range(count):
            key = f"{k:05d}{i:04d}"
            facts = {"caption": f"picture {key}", "url": "http://x", "key": key, "status": "success", "width": 9}
            files += [
                (f"{key}.jpg", jpeg(100 * k + i)),
                (f"{key}.txt", b"not this"),
                (f"{key}.json", json.dumps(facts).encode()),
            ]
        write_tar(folder / f"{k:05d}.tar", files)


def test_what_is_written_is_what_pythons_tarfile_reads():
    files = [("a.json", b"{}"), ("a.jpg", bytes(range(256)) * 5), ("b/" + "n" * 90 + ".txt", b""), ("c.x", b"1" * 512)]
    content = b"".join(entry(name, data) for name, data in files)
    content += ending(len(content))
    assert len(content) % 10240 == 0
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for info, (name, data) in zip(tar, files, strict=True):
            assert (info.name, info.size, info.mtime, info.uid, info.gid) == (name, len(data), 0, 0, 0)
            assert tar.extractfile(info).read() == data


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_walking_agrees_with_pythons_tarfile(tmp_path, form):
    names = ["a.jpg", "folder/b.c.png", "x" * 99, "ä.txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" * 40 + "name.jpg", "é" * 120 + ".json"]
    files = [(name, os.urandom(100 + 300 * i)) for i, name in enumerate(names)]
    write_tar(tmp_path / "a.tar", files, form)
    content = (tmp_path / "a.tar").read_bytes()
    found = list(walk(lambda at, length: content[at : at + length], len(content)))
    assert [(m.name, content[m.offset : m.offset + m.size]) for m in found] == files
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.start, m.offset) for m in found] == [(info.offset, info.offset_data) for info in tar]
    # any record alone is a run of members too
    assert [m.name for m in members(content[found[1].start : found[2].end])] == names[1:3]


def test_folders_and_links_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "d/link.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "there" * 40
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("d/a.jpg"))
    content = (tmp_path / "a.tar").read_bytes()
    assert [m.name for m in walk(lambda at, length: content[at : at + length], len(content))] == ["d/a.jpg"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:1600], "cut off within 'b.jpg'"),
        (lambda c: c[:1300], "cut off, 1300"),
        (lambda c: c[:1024] + b"x" + c[1025:], "header is damaged at byte 1024"),
        (lambda c: b"\x1f\x8b" + c[2:], "not a tar file"),
    ],
)
def test_damage_is_told(damage, message):
    content = damage(entry("a.jpg", b"1" * 100) + entry("b.jpg", b"2" * 500))
    with pytest.raises(TarError, match=message):
        list(walk(lambda at, length: content[at : at + length], len(content)))


def test_foreign_tars_are_indexed_once_and_read_by_number(tmp_path, caplog):
    caplog.set_level("INFO")
    foreign(tmp_path / "set")
    source = ShardSource(tmp_path / "set")
    assert isinstance(source, Source)
    assert (source.size, source.findings.images, source.findings.entities) == (10, 10, 0)
    example = source.example(7)
    assert example.caption == "picture 000010002"
    expected = Image.open(io.BytesIO(jpeg(102))).convert("RGB")
    np.testing.assert_array_equal(example.image, np.asarray(expected))
    assert source.picture(7) == jpeg(102)
    assert len({source.key(n) for n in range(10)}) == 10
    for n in (-1, 10):
        with pytest.raises(IndexError):
            source.example(n)
    index = np.load(tmp_path / "set" / ".gligen-index" / INDEX, mmap_mode="r")
    assert index.nbytes == 16 * 10
    assert "reading the headers of 2 tars" in caplog.text
    caplog.clear()
    ShardSource(tmp_path / "set")
    assert "reading the headers" not in caplog.text


def test_a_stale_index_is_made_again(tmp_path):
    foreign(tmp_path / "set")
    assert ShardSource(tmp_path / "set").size == 10
    write_tar(tmp_path / "set" / "00001.tar", [("new.jpg", jpeg(5)), ("new.txt", b"a new one")])
    source = ShardSource(tmp_path / "set")
    assert (source.size, source.example(5).caption) == (6, "a new one")
    (tmp_path / "set" / "00000.tar").unlink()
    assert ShardSource(tmp_path / "set").size == 1
    # same size, other content and time
    old = (tmp_path / "set" / "00001.tar").stat()
    write_tar(tmp_path / "set" / "00001.tar", [("new.jpg", jpeg(5)), ("new.txt", b"a new two")])
    os.utime(tmp_path / "set" / "00001.tar", ns=(old.st_atime_ns, old.st_mtime_ns + 10**9))
    assert (tmp_path / "set" / "00001.tar").stat().st_size == old.st_size
    assert ShardSource(tmp_path / "set").example(0).caption == "a new two"


def test_an_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    foreign(tmp_path / "set")
    (tmp_path / "set" / ".gligen-index").write_text("in the way")  # as good as a folder without the right to write
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert ShardSource(tmp_path / "set").size == 10
    assert [path.name for path in (tmp_path / "cache" / "gligen" / "indexes").glob("*/*.json")] == [MANIFEST]
    assert ShardSource(tmp_path / "set").size == 10


def test_one_tar_patterns_and_braces_name_parts_of_a_set(tmp_path):
    foreign(tmp_path / "set", tars=4)
    assert ShardSource(tmp_path / "set" / "00002.tar").example(0).caption == "picture 000020000"
    assert ShardSource(tmp_path / "set" / "{00001..00003}.tar").size == 15
    assert ShardSource(tmp_path / "set" / "0000[12].tar").size == 10
    assert ShardSource(tmp_path / "set").size == 20
    with pytest.raises(FileNotFoundError):
        ShardSource(tmp_path / "set" / "{00003..00005}.tar")


def test_boxes_of_foreign_json_are_read(tmp_path):
    tmp_path.joinpath("set").mkdir()
    own = {"caption": "two", "entities": [{"phrase": "a dog", "box": [0.1, 0.2, 0.30000000000000004, 0.9]}]}
    grit = {"caption": "a red car and a tree", "noun_chunks": [[0, 9, 0.1, 0.2, 0.5, 0.6, 0.98]]}
    write_tar(
        tmp_path / "set" / "0.tar",
        [
            ("a.json", json.dumps(own).encode()),
            ("a.jpg", jpeg(1)),
            ("b.json", json.dumps(grit).encode()),
            ("b.webp", jpeg(2)),
        ],
    )
    source = ShardSource(tmp_path / "set", "box-text")
    assert source.example(0).entities == (Entity(phrase="a dog", box=(0.1, 0.2, 0.30000000000000004, 0.9)),)
    assert source.example(1).entities == (Entity(phrase="a red car", box=(0.1, 0.2, 0.5, 0.6)),)
    assert (source.findings.entities, source.findings.phrases) == (2, 2)
    assert source.words(1).caption == "a red car and a tree"


def test_boxes_that_cannot_be_are_left_out_as_faults_and_the_others_clipped(tmp_path):
    boxes = [("x", [0.6, 0.5, 0.4, 0.7]), ("y", [-0.1, 0.25, 0.5, 1.2]), (" ", [0, 0, 1, 1]), ("z", [1.1, 0, 1.2, 1])]
    facts = {"entities": [{"phrase": phrase, "box": box} for phrase, box in boxes]}
    write_tar(tmp_path / "0.tar", [("a.json", json.dumps(facts).encode()), ("a.jpg", jpeg(1))])
    source = ShardSource(tmp_path / "0.tar")
    example = source.example(0)
    assert example.entities == (Entity(phrase="y", box=(0.0, 0.25, 0.5, 1.0)),)
    assert [fault.message.partition("0.tar, record 0, ")[2] for fault in example.faults] == [
        "'x' at fractions 0.6, 0.5, 0.4, 0.7",
        "box 2",
        "'z' at fractions 1.1, 0, 1.2, 1",
    ]
    assert [box for _, box in source.words(0).entities] == [tuple(map(float, box)) for _, box in boxes]  # untouched


def test_what_is_wrong_in_foreign_tars_is_counted_with_the_first(tmp_path):
    tmp_path.joinpath("set").mkdir()
    files = [
        ("good.jpg", jpeg(1)),
        ("broken.jpg", jpeg(2)),
        ("broken.json", b"{"),
        ("nopicture.json", b"{}"),
        ("nan.jpg", jpeg(3)),
        ("nan.json", b'{"entities": [{"phrase": "x", "box": [0, NaN, 1, 1]}]}'),
        ("notpicture.jpg", b"this is text"),
        ("last.jpg", jpeg(4)),
    ]
    write_tar(tmp_path / "set" / "0.tar", files)
    source = ShardSource(tmp_path / "set")
    found = source.findings
    assert found.left_out == {"broken JSON": 1, "record without a picture": 1, "broken boxes or points": 1}
    assert found.lost == 3
    assert "0.tar/broken" in found.first_left_out["broken JSON"]
    assert source.size == 3
    with pytest.raises(BadExample, match=r"0\.tar, record 1: not an image") as caught:
        source.example(1)
    assert caught.value.reason == "picture: not an image file"


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    foreign(tmp_path / "set", count=4, tars=1)
    path = tmp_path / "set" / "00000.tar"
    with tarfile.open(path) as tar:
        fourth = [info.offset for info in tar][9]
    path.write_bytes(path.read_bytes()[: fourth + 700])
    source = ShardSource(tmp_path / "set")
    assert source.size == 2  # the third was followed by a cut, so that its end is unknown
    assert "damaged tar, read as far as it goes" in source.findings.left_out
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut off"):
        ShardSource(tmp_path / "set")


def test_a_tar_that_shrinks_behind_its_index_gives_bad_examples(tmp_path):
    foreign(tmp_path / "set", tars=1)
    source = ShardSource(tmp_path / "set")
    os.truncate(tmp_path / "set" / "00000.tar", 4000)
    with pytest.raises(BadExample, match="ends within the record"):
        source.example(4)


def test_what_is_no_set_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / MANIFEST).write_text("{}")
    for path, kind, message in (
        ("nowhere", FileNotFoundError, "does not exist"),
        ("empty", ValueError, "no .tar"),
        ("text.tar", ValueError, "not a tar"),
        ("none.tar", FileNotFoundError, "none.tar"),
        ("built", ValueError, "not a built set"),
    ):
        with pytest.raises(kind, match=message) as caught:
            ShardSource(tmp_path / path)
        assert "\n" not in str(caught.value)


def test_a_mode_that_the_set_cannot_serve_is_refused(tmp_path):
    foreign(tmp_path / "set", tars=1)
    with pytest.raises(ValueError, match="holds no hed maps"):
        ShardSource(tmp_path / "set", "hed")
    with pytest.raises(ValueError, match="holds no keypoints"):
        ShardSource(tmp_path / "set", "keypoint")


def _take(source: ShardSource, numbers: range, out: multiprocessing.Queue) -> None:
    out.put([(n, source.example(n).caption) for n in numbers])


@pytest.mark.parametrize("readers", [2, 4])
def test_interleaved_readers_give_each_record_once(tmp_path, readers):
    foreign(tmp_path / "set", count=10, tars=3)
    source = ShardSource(tmp_path / "set")
    source.example(3)  # its file is open before the fork
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = [
        context.Process(target=_take, args=(source, range(rank, source.size, readers), out)) for rank in range(readers)
    ]
    for process in processes:
        process.start()
    taken = [pair for _ in processes for pair in out.get(timeout=60)]
    for process in processes:
        process.join()
    expected = [f"picture {k:05d}{i:04d}" for k in range(3) for i in range(10)]
    assert sorted(taken) == list(enumerate(expected))


def test_a_pickled_source_is_small_and_reads_the_same(tmp_path):
    foreign(tmp_path / "set", count=40, tars=1)
    source = ShardSource(tmp_path / "set")
    text = pickle.dumps(source)
    again = pickle.loads(text)
    assert len(text) < 3000
    assert again.example(39).caption == source.example(39).caption


def test_more_shards_than_files_that_may_be_open(tmp_path, monkeypatch):
    foreign(tmp_path / "set", count=1, tars=9)
    monkeypatch.setattr("gligen.data.storage.MAX_OPEN", 2)
    source = ShardSource(tmp_path / "set")
    before = len(os.listdir("/proc/self/fd"))
    for n in (*range(9), 0, 1):
        assert source.example(n).caption == f"picture {n:05d}0000"
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_remote_tars_are_read_by_ranges(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "set").glob("*.tar"):
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())
    for path in ("memory://shards", "memory://shards/{00000..00001}.tar", "memory://shards/*.tar"):
        source = ShardSource(path)
        assert [source.example(n).caption for n in (0, 9)] == ["picture 000000000", "picture 000010004"]
        assert pickle.loads(pickle.dumps(source)).example(4).image.shape == (32, 48, 3)
    with pytest.raises(FileNotFoundError):
        ShardSource("memory://nowhere")


def test_without_fsspec_a_url_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"pip install gligen\[data\]"):
        ShardSource("s3://bucket/set")


def test_a_driver_that_is_not_there_is_named():
    pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match="nosuch"):
        ShardSource("nosuch://bucket/set")


def test_an_upright_picture_keeps_its_boxes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    tmp_path.joinpath("set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", [("a.jpg", jpeg(1, exif=exif))])
    assert ShardSource(tmp_path / "set").example(0).image.shape == (48, 32, 3)


def test_a_record_says_what_the_example_says(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    entities = (Entity(phrase="ein Bär", box=(0.1, 1 / 3, 0.5, 0.9)), Entity(phrase="all", box=(0.0, 0.0, 1.0, 1.0)))
    example = Example(
        image=image,
        caption="two of them",
        other_captions=("a pair",),
        entities=entities,
        references=(None, image[:8, :8]),
        mask=np.where(rng.random((32, 48)) < 0.5, 255, 0).astype(np.uint8),
        key="folder/a.bmp",
    )
    content = pack(example, "000000007")
    first = members(content)[0]
    assert (first.name, json.loads(content[first.offset : first.offset + first.size])) == (
        "000000007.json",
        {
            "caption": "two of them",
            "entities": [
                {"phrase": "ein Bär", "box": [0.1, 0.3333333333333333, 0.5, 0.9]},
                {"phrase": "all", "box": [0.0, 0.0, 1.0, 1.0]},
            ],
            "captions": ["a pair"],
            "width": 48,
            "height": 32,
            "source": "folder/a.bmp",
        },
    )
    (tmp_path / "0.tar").write_bytes(content + ending(len(content)))
    again = ShardSource(tmp_path / "0.tar", "inpaint-box-text-image").example(0)
    assert (again.caption, again.other_captions) == (example.caption, example.other_captions)
    assert again.entities == entities
    np.testing.assert_array_equal(again.image, image)
    np.testing.assert_array_equal(again.mask, example.mask)
    assert again.references[0] is None
    np.testing.assert_array_equal(again.references[1], image[:8, :8])
    plain = ShardSource(tmp_path / "0.tar", "box-text").example(0)
    assert (plain.references, plain.mask) == ((), None)


@pytest.mark.parametrize("mode", ["hed", "sem", "keypoint"])
def test_maps_and_people_go_with_their_record(tmp_path, mode):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    levels = rng.integers(0, 151, (32, 48), dtype=np.uint8)
    person = tuple(None if k % 3 else (k / 17, 0.1 + k / 50) for k in range(17))
    is_map = mode != "keypoint"
    example = Example(
        image=image, caption="c", map=levels if is_map else None, keypoints=() if is_map else (person,), key="k"
    )
    content = pack(example, "0", mode)
    (tmp_path / "0.tar").write_bytes(content + ending(len(content)))
    again = ShardSource(tmp_path / "0.tar", mode).example(0)
    if is_map:
        expected = levels if mode == "sem" else np.stack([levels] * 3, -1)
        np.testing.assert_array_equal(again.map, expected)
    else:
        assert again.keypoints == (person,)


def test_an_index_is_the_same_whoever_makes_it(tmp_path):
    """A slow, obvious one: names and places by tarfile."""
    foreign(tmp_path / "set", count=6, tars=1)
    rows, tally = index_shard(Storage(tmp_path / "set"), "00000.tar", 3, (tmp_path / "set/00000.tar").stat().st_size)
    with tarfile.open(tmp_path / "set/00000.tar") as tar:
        infos = tar.getmembers()
    starts = [info.offset // 512 for info in infos[::3]]
    ends = [(info.offset_data + -(-info.size // 512) * 512) // 512 for info in infos[2::3]]
    assert rows == [(3, start, end - start, 0) for start, end in zip(starts, ends, strict=True)]
    assert tally.records == 6
