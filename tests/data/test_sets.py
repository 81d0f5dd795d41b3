"""What `--data` opens: weights, a held-out part, and counts over all sets."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gligen.data import order
from gligen.data.build import build
from gligen.data.draw import FORMATS, Drawing, draw
from gligen.data.example import Example, Fault
from gligen.data.geometry import Buckets
from gligen.data.open import open_source
from gligen.data.order import split
from gligen.data.prepare import Prepared
from gligen.data.scenes import make_scene
from gligen.data.sets import open_sets
from gligen.data.streams import rng
from gligen.modes import get_mode
from tests.data.sets import write_jsonl


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two sets of the drawn world, of 40 and 10 pictures."""
    folders = []
    for series, count in ((1, 40), (2, 10)):
        folder = tmp_path_factory.mktemp("drawn") / f"set{series}"
        draw(Drawing(mode=get_mode("box-text"), count=count, size=64, series=series), "coco", folder)
        folders.append(str(folder))
    return folders


def test_one_set_is_shuffled_without_end(drawn):
    sets = open_sets(drawn[:1], "box-text", series=7)
    assert sets.held_out is None
    assert (sets.examples, sets.lost, sets.training.size) == (40, 0, None)
    for epoch in range(2):
        keys = [sets.training.key(k) for k in range(40 * epoch, 40 * (epoch + 1))]
        assert len(set(keys)) == 40


def test_sets_come_by_their_weights(drawn):
    sets = open_sets([f"{drawn[0]}:3", f"{drawn[1]}:1"], "box-text", series=7)
    images = {sets.training.example(k).image.tobytes() for k in range(40)}
    small = open_sets(drawn[1:], "box-text", series=0)
    of_small = {small.training.example(k).image.tobytes() for k in range(10)}
    assert len(images & of_small) == 10
    assert len(images) == 40
    assert len(sets.findings) == 2
    assert sets.examples == 50


def test_held_out_pictures_are_never_trained_on(drawn):
    sets = open_sets(drawn[:1], "box-text", series=7, held_out=0.25)
    assert sets.held_out is not None
    out = {sets.held_out.key(n) for n in range(sets.held_out.size)}
    trained = Counter(sets.training.key(k) for k in range(200))
    assert out
    assert out.isdisjoint(trained)
    assert len(out) + len(trained) == 40


def test_sets_are_prepared_for_training(drawn):
    sets = open_sets(drawn, "canny", series=7, maps="canny")
    assert sets.made_maps == "canny"
    prepared = Prepared(
        source=sets.training, mode=get_mode("canny"), image_size=(64, 64), series=7, flip=0.5, maps=sets.made_maps
    )
    example = prepared.example(3)
    assert example.map.shape == (64, 64)
    assert example.image.shape == (64, 64, 3)


def test_buckets_give_batches_of_one_size_whatever_is_bad(tmp_path):
    """Pictures of three shapes in two sets; what stands in for a bad one must have its bucket."""
    for part in ("one", "two"):
        write_jsonl(tmp_path / part)
    sets = open_sets(
        [f"{tmp_path / 'one'}:2", str(tmp_path / "two")],
        "box-text",
        series=3,
        buckets=Buckets(256),
        batch_size=2,
        max_bad=0.4,
    )
    (tmp_path / "two/a.png").write_bytes(b"broken")  # alone in its bucket
    of_its_bucket = [k for k in range(60) if sets.training.image_size(k) == Buckets(256).nearest((80, 60))]
    with pytest.raises(ValueError, match="not an image file"):
        [sets.training.example(k) for k in of_its_bucket]
    write_jsonl(tmp_path / "two")
    prepared = Prepared(source=sets.training, mode=get_mode("box-text"), image_size=sets.training, series=3)
    shapes = [prepared.example(k).image.shape for k in range(60)]
    assert all(shapes[k] == shapes[k + 1] for k in range(0, 60, 2))
    assert len(set(shapes)) == 3
    assert all(shape[:2] == sets.training.image_size(k)[::-1] for k, shape in enumerate(shapes))


def test_a_fault_log_knows_what_was_lost_before(tmp_path):
    write_jsonl(tmp_path)
    (tmp_path / "b.png").unlink()
    sets = open_sets([str(tmp_path)], "box-text", series=0, max_bad=0.34)
    assert sets.lost == 1
    with pytest.raises(ValueError, match="1 bad examples and 1 when the set was opened, more than 34"):
        sets.fault_log().add([Fault(reason="x", message="y", number=0, is_lost=True)])


def test_no_data_is_told():
    with pytest.raises(ValueError, match="name at least one set with --data"):
        open_sets([], "box-text", series=0)


def test_tar_shards_have_shapes_for_buckets(tmp_path):
    draw(Drawing(mode=get_mode("box-text"), count=6, size=64, series=4), "tar", tmp_path / "set")
    sets = open_sets([str(tmp_path / "set")], "box-text", series=0, buckets=Buckets(128), batch_size=2)
    assert [sets.training.image_size(k) for k in range(6)] == [(128, 128)] * 6
    assert len({sets.training.key(k) for k in range(6)}) == 6


@pytest.mark.parametrize("buckets", [None, Buckets(128)], ids=["one size", "buckets"])
def test_epochs_and_mixtures_draw_from_streams_of_their_own(drawn, monkeypatch, buckets):
    """Nested mixtures and a set's epochs: whatever draws, draws from words that nothing else has."""
    words = []

    def recorded(*each):
        words.append(tuple(map(int, each)))
        return rng(*each)

    monkeypatch.setattr(order, "rng", recorded)
    order._epoch.cache_clear()  # what is kept is not drawn
    order._block.cache_clear()
    sets = open_sets(drawn, "box-text", series=7, buckets=buckets, batch_size=2)
    for k in range(120):
        sets.training.key(k)
    assert len(words) >= 5
    assert len(set(words)) == len(words)


def test_every_format_holds_out_the_same_pictures(tmp_path):
    """The same drawn pictures, also packed: their names decide, without folder and suffix."""
    places = {}
    for form in FORMATS:
        places[form] = tmp_path / form
        draw(Drawing(mode=get_mode("box-text"), count=24, size=64, series=1), form, places[form])
    for form in ("coco", "tsv"):
        places[f"built from {form}"] = tmp_path / f"built-{form}"
        build(*open_source(places[form]), places[f"built from {form}"])
    places["built again"] = tmp_path / "built-again"
    build(*open_source(places["built from coco"]), places["built again"])
    places["built by an earlier version"] = tmp_path / "built-before"
    build(*open_source(places["coco"]), places["built by an earlier version"])
    (tmp_path / "built-before/names.npy").unlink()
    scenes = [make_scene(1, n, size=64) for n in range(24)]

    def shown(example: Example) -> int:
        """The scene; JPEG moves pixels a little."""
        apart = [np.abs(example.image.astype(int) - scene.image).mean() for scene in scenes]
        return int(np.argmin(apart))

    held_out = {}
    for name, place in places.items():
        part = split(open_source(place)[0], 0.25)[1]
        held_out[name] = sorted(shown(part.example(n)) for n in range(part.size))
    assert len(held_out["coco"]) == 6
    assert len(set(map(tuple, held_out.values()))) == 1, held_out


def test_a_set_beside_its_built_set_is_told_and_neither_trains_on_what_the_other_holds_out(tmp_path, drawn):
    build(*open_source(drawn[0]), tmp_path / "built", count=30)  # fewer, of which others are held out
    sets = open_sets([drawn[0], str(tmp_path / "built")], "box-text", series=7, held_out=0.25)
    assert any("30 of its 30 pictures have names of pictures of" in note for note in sets.notes)
    out = {sets.held_out.example(n).image.tobytes() for n in range(sets.held_out.size)}
    trained = {sets.training.example(k).image.tobytes() for k in range(200)}
    assert out
    assert out.isdisjoint(trained)
    with pytest.raises(ValueError, match="twice: name it once, with a weight"):
        open_sets([drawn[0], f"{drawn[0]}/../{Path(drawn[0]).name}:2"], "box-text", series=7)


def change_coco(folder: Path, change: str) -> None:
    kind = "captions" if change == "caption" else "instances"
    path = folder / f"annotations/{kind}_drawn.json"
    data = json.loads(path.read_text())
    item = data["annotations"][-1]
    if change == "caption":
        item["caption"] += "."
    elif change == "box":
        item["bbox"][0] += 0.5
    else:
        data["categories"][item["category_id"] - 1]["name"] += "s"
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("change", ["caption", "box", "phrase"])
@pytest.mark.parametrize("is_built", [False, True])
def test_a_fingerprint_is_of_what_is_said_of_pictures(tmp_path, drawn, change, is_built):
    def taught(folder: Path, mode: str = "box-text") -> str:
        if is_built:
            build(*open_source(folder), tmp_path / "built" / folder.name)
            folder = tmp_path / "built" / folder.name
        return open_sets([str(folder)], mode, series=0).fingerprint

    one = taught(Path(drawn[0]))
    for name in ("same", "other"):
        shutil.copytree(drawn[0], tmp_path / name)
    assert taught(tmp_path / "same") == one
    change_coco(tmp_path / "other", change)
    assert taught(tmp_path / "other") != one
    if not is_built and change != "caption":  # of boxes an edge map's mode learns nothing
        assert taught(tmp_path / "other", "canny") == taught(tmp_path / "same", "canny")


def test_a_fingerprint_is_of_maps_masks_points_and_tsv_rows(tmp_path):
    def taught(mode: str, folder: str, **more: str) -> str:
        return open_sets([str(tmp_path / folder)], mode, series=0, **more).fingerprint

    for mode, form, name in (("depth", "coco", "depth"), ("keypoint", "coco", "people"), ("box-text", "tsv", "tsv")):
        draw(Drawing(mode=get_mode(mode), count=3, size=64, series=1), form, tmp_path / name)
    before = taught("depth", "depth")
    Image.new("RGB", (64, 64)).save(tmp_path / "depth/depth/000002.png")
    assert taught("depth", "depth") != before
    masks = {"masks": str(tmp_path / "depth/depth")}
    before = taught("inpaint-box-text", "depth", **masks)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "depth/depth/000002.png")
    assert taught("inpaint-box-text", "depth", **masks) != before
    before = taught("keypoint", "people")
    path = tmp_path / "people/annotations/person_keypoints_drawn.json"
    data = json.loads(path.read_text())
    points = data["annotations"][0]["keypoints"]
    points[next(i for i, x in enumerate(points) if x)] += 1
    path.write_text(json.dumps(data))
    assert taught("keypoint", "people") != before
    before = taught("box-text", "tsv")
    path = tmp_path / "tsv/train-0000.tsv"
    path.write_text(path.read_text().replace(" and ", " und ", 1))
    assert taught("box-text", "tsv") != before
