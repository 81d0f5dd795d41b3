"""What `--data` opens: weights, a held-out part, and counts over all sets."""

from __future__ import annotations

from collections import Counter

import pytest

from gligen.data import order
from gligen.data.draw import Drawing, draw
from gligen.data.example import Fault
from gligen.data.geometry import Buckets
from gligen.data.prepare import Prepared
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
