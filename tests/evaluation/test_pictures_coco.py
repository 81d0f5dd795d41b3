"""COCO's metrics: the official 12 numbers, closed forms, and detections as tools write them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gligen import cli
from gligen.commands import evaluate
from gligen.data.example import Federation
from gligen.data.open import open_source
from gligen.evaluation import coco
from gligen.evaluation.coco import AskedImage, Detections, asked_dataset, coco_metrics, inside, shares_metrics
from gligen.evaluation.instances import instance_ious, instance_metrics
from gligen.request import Entity, Request
from tests.data.sets import coco_data, write_coco

pytest.importorskip("faster_coco_eval")

# beside the checkout, or beside the folder that holds it
FOLDERS = [parent / "shared" / "real" / "coco100" for parent in Path(__file__).parents[3:]]
COCO100 = next((folder for folder in FOLDERS if folder.is_dir()), None)
SIDE = 200


def image(number: int, *entities: tuple[str, tuple[float, float, float, float]], size=(SIDE, SIDE), keypoints=()):
    found = tuple(Entity(phrase=phrase, box=box) for phrase, box in entities)
    request = Request(prompt="", entities=found, keypoints=keypoints)
    return AskedImage(number=number, file_name=f"images/{number:06d}.png", size=size, request=request)


def results(*items: tuple[int, int, list[float], float]) -> Detections:
    keys = ("image_id", "category_id", "bbox", "score")
    return Detections(results=[dict(zip(keys, item, strict=True)) for item in items])


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(data))
    return path


def test_official_numbers_of_cocos_own_sample(capsys):
    """Printed by COCO's own evaluation for its 100 images and sample detections, crowds among them."""
    if COCO100 is None:
        pytest.skip(f"'{FOLDERS[0]}' is not here")
    truth = COCO100 / "instances_val2014_100.json"
    found = COCO100 / "instances_val2014_fakebbox100_results.json"
    args = ["detections", "--truth", str(truth), "--detections", str(found), "--json"]
    assert cli.run(evaluate.main, args) == 0
    metrics = json.loads(capsys.readouterr().out)
    official = [0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398]
    official += [0.386813, 0.593680, 0.595353, 0.639811, 0.566420, 0.564291]
    assert list(metrics.values()) == pytest.approx(official, abs=1e-6)


def test_one_of_two_objects_found_perfectly():
    """Precision is 1 up to recall 1/2: 51 of the 101 recalls 0, 0.01, …, 1 are read at 1."""
    truth = asked_dataset([image(0, ("a cat", (0.1, 0.1, 0.3, 0.3)), ("a cat", (0.5, 0.5, 1, 1)))])
    metrics = coco_metrics(truth, results((0, 1, [20, 20, 40, 40], 0.9)))
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == pytest.approx(51 / 101)
    assert metrics["AR1"] == metrics["AR100"] == 0.5
    assert metrics["AP medium"] == 1  # 40² pixels
    assert metrics["AP large"] == 0  # 100²
    assert metrics["AP small"] is None  # none was asked for


def test_overlap_decides_at_which_thresholds_a_box_is_found():
    """Boxes of 100 × 100 shifted by d overlap by (100 − d) / (100 + d): 0.613 at 24, which 0.5, 0.55 and 0.6 take."""
    truth = asked_dataset([image(0, ("a cat", (0, 0, 0.5, 0.5)))])
    found = results((0, 1, [24, 0, 100, 100], 0.9))
    metrics = coco_metrics(truth, found)
    assert metrics["AP"] == pytest.approx(0.3)
    assert (metrics["AP50"], metrics["AP75"]) == (1, 0)
    ious = instance_ious(truth, found)
    assert ious == {0: [pytest.approx(76 / 124)]}


def test_a_false_detection_counts_by_its_score():
    """Before the right one it halves precision, after it changes nothing."""
    truth = asked_dataset([image(0, ("a cat", (0, 0, 0.5, 0.5)))])
    right, wrong = [0, 0, 100, 100], [120, 120, 50, 50]
    first = coco_metrics(truth, results((0, 1, wrong, 0.9), (0, 1, right, 0.8)))
    last = coco_metrics(truth, results((0, 1, wrong, 0.7), (0, 1, right, 0.8)))
    assert (first["AP"], last["AP"]) == (pytest.approx(0.5), 1)


def test_classes_are_phrases_without_article_and_may_be_left_aside():
    truth = asked_dataset([image(0, ("A  red Star", (0, 0, 0.5, 0.5)), ("the dog", (0.5, 0.5, 1, 1)))])
    assert [item["name"] for item in truth["categories"]] == ["dog", "red star"]
    assert [item["id"] for item in truth["annotations"]] == [1, 2]  # 0 would be no match to COCO's evaluation
    swapped = results((0, 1, [0, 0, 100, 100], 0.9), (0, 2, [100, 100, 100, 100], 0.9))
    assert coco_metrics(truth, swapped)["AP"] == 0
    assert coco_metrics(truth, swapped, class_agnostic=True)["AP"] == 1
    assert instance_ious(truth, swapped) == {0: [0, 0]}
    assert instance_ious(truth, swapped, class_agnostic=True) == {0: [1, 1]}


def test_lvis_counts_in_an_image_what_is_labelled_there():
    """Four images of one class, a box in the first only. Detections of it elsewhere are wrong where it is known to be
    absent, and count for nothing where nobody looked for it, or not all of them have boxes."""
    box, other = [0, 0, 100, 100], [120, 120, 60, 60]
    images = [image(n, *([("a cat", (0, 0, 0.5, 0.5))] if n == 0 else [("a dog", (0, 0, 0.5, 0.5))])) for n in range(4)]
    images = [dataclasses.replace(each, key=f"{each.number}.jpg") for each in images]
    absent, partial = {"1.jpg": ("A cat", "zebra")}, {"3.jpg": ("cat",)}
    truth = asked_dataset(images, Federation(absent=absent, partial=partial, frequency={"cat": "r", "dog": "f"}))
    assert [item["neg_category_ids"] for item in truth["images"]] == [[], [1], [], []]
    assert [item["not_exhaustive_category_ids"] for item in truth["images"]] == [[], [], [], [1]]
    dogs = [(n, 2, box, 0.5) for n in (1, 2, 3)]

    def ap(*cats: tuple[int, int, list[float], float]) -> float:
        metrics = coco_metrics(truth, results(*cats, *dogs))
        assert metrics["AP frequent"] == 1
        assert metrics["AP common"] is None
        assert metrics["AP"] == pytest.approx((metrics["AP rare"] + 1) / 2)
        return metrics["AP rare"]

    right = (0, 1, box, 0.6)
    assert ap(right) == 1
    assert ap(right, (2, 1, other, 0.9)) == 1  # nobody looked for cats there
    assert ap(right, (1, 1, other, 0.9)) == pytest.approx(1 / 2)  # there is none: precision 1 of 2
    assert ap(right, (1, 1, other, 0.9), (2, 1, other, 0.9), (1, 1, box, 0.8)) == pytest.approx(1 / 3)
    everywhere = {**truth, "images": [{"id": n, "width": 200, "height": 200} for n in range(4)]}
    assert coco_metrics(everywhere, results(right, (2, 1, other, 0.9), *dogs))["AP"] == pytest.approx(3 / 4)
    partly = asked_dataset(images, Federation(absent={}, partial={"0.jpg": ("cat",)}, frequency={}))
    metrics = coco_metrics(partly, results(right, (0, 1, other, 0.9), *dogs))
    assert (metrics["AP"], metrics["AP rare"], metrics["AR300"]) == (1, None, 1)  # the other may well be a cat
    assert coco_metrics(truth, results(right, (2, 1, other, 0.9), *dogs), class_agnostic=True)["AP"] < 1


def test_an_lvis_json_says_what_is_labelled_where(tmp_path):
    data = coco_data()
    data["categories"] = [{**item, "frequency": letter} for item, letter in zip(data["categories"], "rcf", strict=True)]
    data["images"][0] |= {"neg_category_ids": [7], "not_exhaustive_category_ids": [5]}
    data["images"][1] |= {"neg_category_ids": [6, 7], "not_exhaustive_category_ids": []}
    federation = open_source(write_coco(tmp_path, data))[1].federation
    assert federation.absent == {"a.png": ("dog",), "b.png": ("red car", "dog")}
    assert federation.partial == {"a.png": ("cat",), "b.png": ()}
    assert federation.frequency == {"cat": "r", "red car": "c", "dog": "f"}
    assert open_source(write_coco(tmp_path / "plain"))[1].federation is None


def test_nothing_found_is_zero():
    truth = asked_dataset([image(0, ("a cat", (0, 0, 0.5, 0.5)))])
    assert coco_metrics(truth, Detections(results=[]))["AP"] == 0


def test_keypoints_are_measured_by_oks():
    """All 17 points off by d: OKS is the mean of exp(−d² / (2 · area · (2σ)²))."""
    sigmas = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
    rng = np.random.default_rng(0)
    person = tuple((float(x), float(y)) for x, y in rng.uniform(0.2, 0.8, (17, 2)))
    truth = asked_dataset([image(0, keypoints=(person,))])
    (asked,) = truth["annotations"]
    xs, ys = np.array(person).T * SIDE
    assert asked["area"] == pytest.approx(np.ptp(xs) * np.ptp(ys))
    assert asked["num_keypoints"] == 17
    for d in (2.0, 6.0, 9.0, 14.0):
        oks = np.exp(-(d**2) / (2 * asked["area"] * (2 * sigmas) ** 2)).mean()
        points = [value for x, y in zip(xs, ys, strict=True) for value in (x + d, y, 1)]
        found = Detections(results=[{"image_id": 0, "category_id": 1, "keypoints": points, "score": 0.5}])
        expected = sum(oks >= threshold for threshold in np.linspace(0.5, 0.95, 10)) / 10
        assert coco_metrics(truth, found, "keypoints")["AP"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_masks_are_measured_by_their_pixels():
    from faster_coco_eval.core import mask

    pixels = np.zeros((SIDE, SIDE), np.uint8, order="F")
    pixels[20:120, 20:120] = 1
    moved = np.asfortranarray(np.roll(pixels, 24, axis=1))  # IoU 76 / 124
    truth = asked_dataset([image(0, ("a cat", (0.1, 0.1, 0.6, 0.6)))])
    truth["annotations"][0]["segmentation"] = [[20, 20, 120, 20, 120, 120, 20, 120]]
    for seen, expected in ((pixels, 1), (moved, 0.3)):
        rle = mask.encode(seen)
        found = Detections(results=[{"image_id": 0, "category_id": 1, "segmentation": rle, "score": 0.5}])
        assert coco_metrics(truth, found, "segm")["AP"] == pytest.approx(expected)


def test_inpainting_is_told_by_the_objects_share_of_its_image():
    """Images of two sizes: shares are what counts. That of 2 % is found in one image of two, that of 40 % in none."""
    small, large = (0.1, 0.1, 0.3, 0.2), (0.1, 0.1, 0.9, 0.6)
    truth = asked_dataset(
        [image(0, ("a cat", small)), image(1, ("a cat", small), size=(400, 400)), image(2, ("a cat", large))]
    )
    found = results((0, 1, [20, 20, 40, 20], 0.9), (2, 1, [0, 0, 60, 60], 0.8))
    metrics = shares_metrics(truth, found)
    assert metrics["1-3 %"] == pytest.approx(51 / 101)
    assert metrics["5-10 %"] is None
    assert metrics["30-50 %"] == 0
    assert [metrics[f"objects of {name}"] for name in coco.SHARES] == [2, 0, 1]


def test_what_is_detected_around_the_repainted_region_is_left_out():
    region = np.zeros((SIDE, SIDE), bool)
    region[:100, :100] = True
    found = results((0, 1, [0, 0, 100, 100], 0.9), (0, 1, [50, 0, 110, 50], 0.9), (0, 1, [120, 0, 50, 50], 0.9))
    kept, outside = inside(found, lambda number: {0: region}[number])
    assert [item["bbox"] for item in kept.results] == [[0, 0, 100, 100]]
    assert outside == 2


def test_instances_are_counted_as_coco_mig_counts_them():
    """One detection may serve two boxes; below 0.5, and of another class, an instance's IoU counts as 0."""
    truth = asked_dataset(
        [
            image(0, ("a red cup", (0, 0, 0.5, 0.5)), ("a red cup", (0.05, 0, 0.5, 0.5))),
            image(
                1, ("a red cup", (0, 0, 0.5, 0.5)), ("a blue cup", (0.5, 0.5, 1, 1)), ("a blue cup", (0, 0.5, 0.5, 1))
            ),
        ]
    )
    red, blue = (next(c["id"] for c in truth["categories"] if c["name"] == name) for name in ("red cup", "blue cup"))
    found = results(
        (0, red, [0, 0, 100, 100], 0.9),
        (1, blue, [0, 0, 100, 100], 0.9),  # in place, of another colour
        (1, blue, [100, 100, 100, 40], 0.9),  # IoU 0.4
        (1, blue, [0, 100, 100, 80], 0.1),  # IoU 0.8
    )
    ious = instance_ious(truth, found)
    assert ious == {0: [1, pytest.approx(0.9)], 1: [0, pytest.approx(0.4), pytest.approx(0.8)]}
    metrics = instance_metrics(ious)
    assert metrics["all"]["instances"] == 5
    assert metrics["all"]["success"]["value"] == pytest.approx(3 / 5)
    assert metrics["all"]["mean_iou"]["value"] == pytest.approx((1 + 0.9 + 0.8) / 5)
    assert metrics["all"]["images"]["value"] == 0.5
    assert metrics["of 2"]["success"]["value"] == 1
    assert metrics["of 3"]["success"]["value"] == pytest.approx(1 / 3)
    assert "of 4" not in metrics


BOX = {"bbox": [0, 0, 100, 100], "score": 0.5}


@pytest.mark.parametrize(
    "entries",
    [
        [{"image_id": 3, "category_id": 2, **BOX}],
        [{"image_id": 3, "category_name": "The Cat", **BOX}],
        [{"file_name": "/elsewhere/000003.png", "category": "cat", **BOX}],
        {
            "images": [{"id": 77, "file_name": "000003.png"}],
            "categories": [{"id": 17, "name": "cat"}],
            "annotations": [{"image_id": 77, "category_id": 17, **BOX}],
        },
    ],
)
def test_detections_are_read_as_tools_write_them(tmp_path, entries):
    truth = asked_dataset([image(3, ("a cat", (0, 0, 0.5, 0.5)), ("a bat", (0.5, 0.5, 1, 1)))])
    detections = coco.read_detections(written(tmp_path, entries), truth)
    assert detections.results == [{"image_id": 3, "category_id": 2, "bbox": [0, 0, 100, 100], "score": 0.5}]


def test_ids_get_their_names_from_another_file(tmp_path):
    truth = asked_dataset([image(0, ("a cat", (0, 0, 0.5, 0.5)))])
    named = tmp_path / "instances.json"
    named.write_text(json.dumps({"categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]}))
    entries = [{"image_id": 0, "category_id": 17, **BOX}, {"image_id": 0, "category_id": 18, **BOX}]
    detections = coco.read_detections(written(tmp_path, entries), truth, named)
    assert [item["category_id"] for item in detections.results] == [1]
    assert detections.unknown == {"dog": 1}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": 1}, "holds no list"),
        ([3], "entry 0: is no object"),
        ([{"category_id": 1, **BOX}], "neither image_id nor file_name"),
        ([{"image_id": 9, "category_id": 1, **BOX}], "image_id is 9"),
        ([{"file_name": "x.png", "category_id": 1, **BOX}], "file_name is 'x.png'"),
        ([{"image_id": 0, **BOX}], "neither category_id nor category_name"),
        ([{"image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1]}], "score is None"),
        ([{"image_id": 0, "category_id": 1, "score": 1}], "neither bbox"),
        ([{"image_id": 0, "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}], "bbox is"),
        ([{"image_id": 0, "category_id": 1, "bbox": [0, 0, float("nan"), 1], "score": 1}], "bbox is"),
        ([{"image_id": 0, "category_id": 1, "keypoints": [0, 0, 1], "score": 1}], "keypoints are not 17"),
        ([{"image_id": 0, "category_name": "dog", **BOX}], "no class of it was asked for: it has 'dog'"),
        ([{"image_id": 0, "category_id": 44, **BOX}], "it has 'category_id 44'"),
    ],
)
def test_detections_that_cannot_be_are_refused(tmp_path, entries, reason):
    truth = asked_dataset([image(0, ("a cat", (0, 0, 0.5, 0.5)))])
    with pytest.raises(ValueError, match=reason):
        coco.read_detections(written(tmp_path, entries), truth)


def test_detections_command_refuses_in_one_line(tmp_path, capsys):
    def refusal(*args: object) -> str:
        assert cli.run(evaluate.main, ["detections", *map(str, args)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    bad, truth = tmp_path / "bad.json", tmp_path / "truth.json"
    bad.write_text("{")
    truth.write_text(json.dumps({"images": [{"id": 0}], "categories": [{"id": 1}], "annotations": []}))
    assert "no such file" in refusal("--truth", tmp_path / "none", "--detections", bad)
    assert "not valid JSON" in refusal("--truth", bad, "--detections", bad)
    assert "categories[0] has no name" in refusal("--truth", truth, "--detections", bad)


def test_without_the_library_ap_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e .\[evaluation\]"):
        coco.require_evaluator()
