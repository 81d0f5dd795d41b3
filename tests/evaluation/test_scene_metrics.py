"""The measure proven on drawn scenes, and its formulas against hand-made cases and pycocotools."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from gligen.data.maps import semantic_map
from gligen.data.people import make_people_scene
from gligen.data.scenes import draw_shape, make_scene, reference_image, to_image
from gligen.data.shapes import COLORS, HELD_OUT, SHAPES
from gligen.evaluation.detector import Detection, classify_shape, detect, label_regions, predict_labels
from gligen.evaluation.metrics import average_precision, box_iou, frechet_distance, mean_iou
from gligen.evaluation.scenes import keypoint_distances, score_image, spare_objects, summarize, summarize_keypoints

RED_STAR = Detection(box=(0.1, 0.1, 0.5, 0.5), color="red", shape="star", score=0.9)


def degrade(image: np.ndarray, sigma: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian blur of sigma pixels and noise of so many levels, as of an autoencoder and worse."""
    kernel = np.exp(-((np.arange(-4, 5) / sigma) ** 2) / 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image.astype(float), [(4, 4) if axis == k else (0, 0) for k in range(3)], mode="edge")
        image = sum(w * np.take(padded, range(k, k + image.shape[axis]), axis) for k, w in enumerate(kernel))
    return (image + noise * rng.standard_normal(image.shape)).clip(0, 255).round().astype(np.uint8)


def test_detector_finds_drawn_objects_with_color_and_shape():
    scenes = [make_scene(11, index) for index in range(1000)]
    report = summarize([detect(scene.image) for scene in scenes], [scene.objects for scene in scenes])
    assert report.all.found.value >= 0.995  # 1.0 when written
    assert report.all.found_with_shape.value >= 0.99  # 1.0
    assert report.all.mean_iou.value >= 0.98
    assert report.spare.value <= 0.01
    assert report.all.ap50 >= 0.99


@pytest.mark.parametrize(("sigma", "noise"), [(0.7, 6), (1.0, 10)])
def test_detector_bears_blur_and_noise(sigma: float, noise: float):
    rng = np.random.default_rng(0)
    scenes = [make_scene(12, index) for index in range(300)]
    images = [detect(degrade(scene.image, sigma, noise, rng)) for scene in scenes]
    report = summarize(images, [scene.objects for scene in scenes])
    assert report.all.found.value >= 0.97  # 1.0 when written
    assert report.all.found_with_shape.value >= 0.95  # 1.0
    assert report.spare.value <= 0.02


def test_detector_works_at_other_sizes():
    for size in (96, 128):
        scenes = [make_scene(13, index, size=size) for index in range(40)]
        report = summarize([detect(scene.image) for scene in scenes], [scene.objects for scene in scenes])
        assert report.all.found_with_shape.value == 1


def test_detector_reads_reference_images():
    for index in range(60):
        scene = make_scene(14, index)
        (seen,) = detect(reference_image(scene, 0))
        assert seen.pair == scene.objects[0].pair


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_told_at_every_turn_and_size(shape: str):
    for radius in (7 / 64, 11 / 64, 17 / 64):
        for turn in np.linspace(0, 2 * math.pi, 24):
            canvas = np.zeros((64, 64, 3), np.float32)
            draw_shape(canvas, shape, (0.51, 0.48), radius, float(turn), (1.0, 1.0, 1.0))
            assert classify_shape(canvas[..., 0])[0] == shape


def test_nothing_is_found_where_nothing_is():
    rng = np.random.default_rng(0)
    assert detect(np.full((64, 64, 3), 130, np.uint8)) == []
    grey = 130 + 10 * rng.standard_normal((64, 64, 3))
    assert detect(grey.clip(0, 255).astype(np.uint8)) == []


def test_odd_regions_are_classified_without_failing():
    red = np.empty((64, 64, 3), np.uint8)
    red[:] = COLORS["red"]
    assert [d.box for d in detect(red)] == [(0, 0, 1, 1)]
    lines = np.full((64, 64, 3), 128, np.uint8)
    lines[5] = COLORS["blue"]
    lines[np.arange(10, 60), np.arange(10, 60)] = COLORS["green"]
    assert {d.color for d in detect(lines)} == {"blue", "green"}
    rng = np.random.default_rng(0)
    for d in detect(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)):
        assert math.isfinite(d.score)


def test_regions_equal_a_flood_fill():
    rng = np.random.default_rng(1)
    for levels in (2, 3):
        classes = rng.integers(-1, levels, (23, 31))
        seen = np.full(classes.shape, -1)
        count = 0
        for start in np.ndindex(classes.shape):
            if classes[start] < 0 or seen[start] >= 0:
                continue
            stack = [start]
            while stack:
                y, x = stack.pop()
                if seen[y, x] < 0 and classes[y, x] == classes[start]:
                    seen[y, x] = count
                    near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                    stack += [(v, u) for v, u in near if 0 <= v < 23 and 0 <= u < 31]
            count += 1
        np.testing.assert_array_equal(label_regions(classes), seen)


def test_predicted_labels_match_the_semantic_map():
    scenes = [make_scene(15, index) for index in range(60)]
    predicted, truths = [predict_labels(s.image) for s in scenes], [semantic_map(s) for s in scenes]
    assert mean_iou(predicted, truths) > 0.97
    assert mean_iou(truths, truths) == 1
    assert mean_iou(predicted[1:] + predicted[:1], truths) < 0.2


def test_mean_iou_of_a_case_counted_by_hand():
    truth, predicted = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 2]])
    assert mean_iou([predicted], [truth]) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_iou_of_boxes_counted_by_hand():
    ious = box_iou([(0, 0, 2, 2), (0, 0, 1, 1)], [(1, 1, 3, 3), (0, 0, 2, 2), (5, 5, 6, 6)])
    np.testing.assert_allclose(ious, [[1 / 7, 1, 0], [0, 1 / 4, 0]])
    assert box_iou([], [(0, 0, 1, 1)]).shape == (0, 1)


def test_partners_are_one_to_one_and_the_best():
    moved = replace(RED_STAR, box=(0.12, 0.1, 0.52, 0.5))
    (first, second) = score_image([RED_STAR], [moved, RED_STAR])
    assert (first.detection, first.is_found, first.iou) == (None, False, 0)
    assert second.detection is RED_STAR
    assert second.is_found_with_shape
    assert second.iou == 1


def test_right_color_goes_before_a_better_place():
    blue, red = replace(RED_STAR, color="blue"), replace(RED_STAR, box=(0.15, 0.1, 0.5, 0.5))
    (result,) = score_image([blue, red], [RED_STAR])
    assert result.detection is red
    assert spare_objects([blue, red], [result]) == 1


def test_results_tell_color_shape_and_place_apart():
    (ring,) = score_image([replace(RED_STAR, shape="ring")], [RED_STAR])
    assert (ring.is_found, ring.is_found_with_shape) == (True, False)
    (blue,) = score_image([replace(RED_STAR, color="blue")], [RED_STAR])
    assert (blue.has_color, blue.is_found, blue.iou) == (False, False, 1)
    (half,) = score_image([replace(RED_STAR, box=(0.1, 0.1, 0.5, 0.29))], [RED_STAR])
    assert (half.has_color, half.is_found) == (True, False)
    (far,) = score_image([replace(RED_STAR, box=(0.6, 0.6, 0.9, 0.9))], [RED_STAR])
    assert far.detection is None
    assert score_image([], [RED_STAR])[0].detection is None
    assert score_image([RED_STAR], []) == []


def test_report_of_a_case_counted_by_hand():
    held_out = Detection(box=(0.6, 0.6, 0.9, 0.9), color="red", shape="ring", score=0.8)
    assert held_out.pair in HELD_OUT
    narrow = replace(RED_STAR, box=(0.1, 0.1, 0.5, 0.4))  # IoU 3/4
    report = summarize([[narrow, held_out], [held_out]], [[RED_STAR, held_out], [RED_STAR]])
    assert (report.images, report.all.objects, report.seen.objects, report.held_out.objects) == (2, 3, 2, 1)
    assert report.all.found.value == pytest.approx(2 / 3)
    assert report.all.mean_iou.value == pytest.approx(1.75 / 3)
    assert report.all.mean_iou_found.value == pytest.approx(1.75 / 2)
    assert (report.seen.found.value, report.held_out.found.value) == (0.5, 1)
    assert report.spare.value == 0.5
    assert report.held_out.ap50 == 1
    assert report.seen.ap50 == pytest.approx(51 / 101)
    assert json.loads(json.dumps(report.to_dict()))["seen"]["found"]["value"] == 0.5


def test_report_without_held_out_pairs_says_none():
    report = summarize([[], []], [[RED_STAR], []])
    assert report.held_out is None
    assert report.all.found.value == 0
    assert report.to_dict()["all"]["mean_iou_found"]["value"] is None
    json.dumps(report.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="0 images"):
        summarize([], [])


def test_spread_is_that_of_resampled_images():
    """Of n independent images with one object each, found with probability p: √(p(1−p)/n)."""
    images = [[RED_STAR] if i % 4 else [] for i in range(400)]
    report = summarize(images, [[RED_STAR]] * 400)
    assert report.all.found.value == 0.75
    assert report.all.found.spread == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.15)


def test_ap_of_cases_counted_by_hand():
    box, off = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.4)
    assert average_precision([[("a", box, 0.9)]], [[("a", box)]]) == 1
    assert average_precision([[("a", off, 0.9)]], [[("a", box)]]) == 0
    assert average_precision([[]], [[("a", box)]]) == 0
    assert average_precision([[("a", box, 0.9)]], [[("b", box)]]) == 0
    # the second detection of one truth is wrong, and surer ones come first
    assert average_precision([[("a", box, 0.9), ("a", box, 0.8)]], [[("a", box)]]) == 1
    assert average_precision([[("a", off, 0.9), ("a", box, 0.8)]], [[("a", box)]]) == 0.5
    # so that the other truth is the third detection: precision 1, 1/2, 2/3
    other = (2.0, 0.0, 3.0, 1.0)
    thrice = [("a", box, 0.9), ("a", box, 0.8), ("a", other, 0.7)]
    assert average_precision([thrice], [[("a", box), ("a", other)]]) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # recall 1/2 is reached at 51 of the 101 places
    assert average_precision([[("a", box, 0.9)], []], [[("a", box)], [("a", box)]]) == pytest.approx(51 / 101)
    assert math.isnan(average_precision([[]], [[]]))


def test_ap_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(0)
    for _ in range(5):
        found, truths = [], []
        for _ in range(30):
            boxes = rng.uniform(0, 60, (rng.integers(0, 5), 2))
            boxes = np.concatenate([boxes, boxes + rng.uniform(10, 40, boxes.shape)], 1)
            kinds = rng.integers(0, 4, len(boxes))
            truths.append([(int(k), tuple(b)) for k, b in zip(kinds, boxes, strict=True)])
            guesses = []
            for kind, box in zip(np.repeat(kinds, 2), np.repeat(boxes, 2, 0), strict=True):
                kind = kind if rng.random() < 0.8 else rng.integers(0, 4)
                moved = box + rng.normal(0, 4, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                guesses.append((int(kind), tuple(moved), float(rng.random())))
            found.append(guesses)
        ids = range(30)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = {
                "images": [{"id": i} for i in ids],
                "categories": [{"id": k} for k in range(4)],
                "annotations": [
                    {
                        "id": n + 1,
                        "image_id": i,
                        "category_id": k,
                        "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]],
                        "area": (b[2] - b[0]) * (b[3] - b[1]),
                        "iscrowd": 0,
                    }
                    for n, (i, (k, b)) in enumerate((i, t) for i in ids for t in truths[i])
                ],
            }
            truth.createIndex()
            guessed = truth.loadRes(
                [
                    {
                        "image_id": i,
                        "category_id": k,
                        "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]],
                        "score": s,
                    }
                    for i in ids
                    for k, b, s in found[i]
                ]
            )
            evaluation = cocoeval.COCOeval(truth, guessed, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert average_precision(found, truths) == pytest.approx(evaluation.stats[1], abs=1e-9)
        assert average_precision(found, truths, 0.75) == pytest.approx(evaluation.stats[2], abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Samples shaped to have exactly the mean and covariance; commuting covariances have a root by hand."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 4))
    white -= white.mean(0)
    white @= np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    a, b = np.array([1.0, 2.0, 3.0, 0.5]), np.array([2.0, 0.1, 3.0, 4.0])
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    shift = np.array([1.0, -2.0, 0.0, 3.0])
    expected = shift @ shift + ((a - b) ** 2).sum()
    assert frechet_distance(white * a @ turn, white * b @ turn + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(white * b @ turn + shift, white * a @ turn) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_bears_fewer_samples_than_features():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((10, 30)), rng.standard_normal((12, 30)) + 1
    assert 0 < frechet_distance(a.astype(np.float32), b.astype(np.float32)) < 200
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_equals_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((300, 8)) + 0.3
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros((5, 3)), np.zeros(4), np.full((5, 4), np.nan)])
def test_frechet_distance_refuses_what_it_cannot_fit(bad: np.ndarray):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(bad, np.eye(4))


def test_drawn_keypoints_are_where_they_were_asked():
    people = [make_people_scene(2, index) for index in range(150)]
    metrics = summarize_keypoints([keypoint_distances(scene.image, scene.people) for scene in people])
    assert metrics["found"] > 0.99
    assert metrics["distance"] < 0.01  # 0.0035 when written: a quarter of a pixel
    assert metrics["near"] > 0.99
    rng = np.random.default_rng(0)
    blurred = summarize_keypoints([keypoint_distances(degrade(s.image, 1.0, 10, rng), s.people) for s in people])
    assert blurred["distance"] < 0.015
    assert blurred["near"] > 0.98


def test_another_requests_keypoints_are_far():
    people = [make_people_scene(2, index) for index in range(100)]
    others = [keypoint_distances(a.image, b.people) for a, b in itertools.pairwise(people)]
    assert summarize_keypoints(others)["distance"] > 0.15
    assert summarize_keypoints(others)["near"] < 0.15


def test_absent_keypoints_are_not_asked_for_and_absent_limbs_are_missed():
    scene = make_people_scene(2, 0)
    nobody = to_image(np.full((64, 64, 3), 128, np.float32))
    missed = keypoint_distances(nobody, scene.people)
    assert missed.shape == (len(scene.people), 8, 2)
    assert np.isinf(missed[~np.isnan(missed)]).all()
    assert summarize_keypoints([missed])["distance"] is None
    without_wrist = tuple(tuple(None if k == 9 else p for k, p in enumerate(person)) for person in scene.people)
    assert np.isnan(keypoint_distances(scene.image, without_wrist)[:, 1]).all()  # the left forearm
    assert summarize_keypoints([keypoint_distances(scene.image, ())])["joints"] == 0
