"""Attribute binding: requests alike but for their colours, and metrics that tell a right colour from another one's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from gligen.data.scenes import make_scene
from gligen.data.streams import Series
from gligen.evaluation.binding import binding_scene, evaluate_binding, summarize_binding
from gligen.evaluation.detector import detect
from gligen.evaluation.run import NOISE_STRIDE
from gligen.evaluation.scenes import score_image
from gligen.evaluation.settings import Settings
from gligen.pipeline import Sample
from tests.generated import generated_model

SCENES = [binding_scene(0, index) for index in range(50)]


def test_sets_are_alike_but_for_colours_that_are_exchanged():
    for first in range(0, 50, 5):
        for rows in (SCENES[first : first + 2], SCENES[first + 2 : first + 5]):
            for which in range(len(rows)):
                items = [scene.objects[which] for scene in rows]
                assert len({(item.shape, item.center, item.radius, item.turn, item.box) for item in items}) == 1
                assert len({item.color for item in items}) == len(rows)  # everyone has had every colour
            for scene in rows:
                assert len(scene.objects) == len(rows)
                assert len({item.color for item in scene.objects}) == len({o.shape for o in scene.objects}) == len(rows)


def test_captions_and_pictures_follow_the_colours():
    for scene in SCENES:
        for item in scene.objects:
            assert item.phrase.split()[1:] == [item.color, item.shape]
            assert item.phrase in scene.caption
        results = score_image(detect(scene.image), scene.objects)
        assert all(result.is_found for result in results)
    assert SCENES[0].caption != SCENES[1].caption
    plain = next(
        scene
        for number in range(1000)
        if len((scene := make_scene(Series.BINDING, number, places=0.0)).objects) == 2
        and len({item.color for item in scene.objects}) == len({item.shape for item in scene.objects}) == 2
    )
    np.testing.assert_array_equal(SCENES[0].image, plain.image)  # drawn anew as it was drawn
    assert SCENES[0].caption == plain.caption


class Painter:
    """Stands for a pipeline: paints the request itself, or the one after it in its set."""

    def __init__(self, shift: int) -> None:
        self.config, self.mode, self.image_encoder, self.shift = (
            generated_model("box-text").config,
            "box-text",
            None,
            shift,
        )

    def generate(self, requests, *, batch_size, on_step):
        for i, request in enumerate(requests):
            group, turn = divmod(request.seed % NOISE_STRIDE, 5)
            other = (turn + self.shift) % 2 if turn < 2 else 2 + (turn - 2 + self.shift) % 3
            image = binding_scene(0, 5 * group + other).image
            yield Sample((i, 0), request, Image.fromarray(image), torch.zeros(4, 16, 16))


def test_right_colours_score_full_marks_and_exchanged_ones_none():
    settings = Settings(requests=50)
    right, wrong = (evaluate_binding(Painter(shift), settings).metrics["binding"] for shift in (0, 1))
    assert {name: group["instances"] for name, group in right.items()} == {"all": 130, "of 2": 40, "of 3": 90}
    for name in ("all", "of 2", "of 3"):
        assert right[name]["success"]["value"] > 0.95
        assert right[name]["mean_iou"]["value"] > 0.9
        assert right[name]["exchanged"]["value"] < 0.05
        assert wrong[name]["success"]["value"] == wrong[name]["mean_iou"]["value"] == 0
        assert wrong[name]["pictures"]["value"] == 0
        assert wrong[name]["exchanged"]["value"] > 0.95


def test_metrics_of_one_image_by_hand():
    scene = SCENES[0]
    perfect = detect(scene.image)
    one = [detection for detection in perfect if detection.color == scene.objects[0].color]
    wrong = [dataclasses.replace(d, color=scene.objects[0].color) for d in perfect if d not in one]
    metrics = summarize_binding([(one + wrong, score_image(one + wrong, scene.objects))])
    assert metrics["success"]["value"] == 0.5
    assert metrics["pictures"]["value"] == 0
    assert metrics["exchanged"]["value"] == 0.5
    assert 0.4 < metrics["mean_iou"]["value"] <= 0.5


def test_what_cannot_be_measured_is_refused():
    painter = Painter(0)
    painter.mode = "keypoint"
    with pytest.raises(ValueError, match="mode keypoint has none"):
        evaluate_binding(painter, Settings(requests=2))
    with pytest.raises(ValueError, match="pairs is seen: give all"):
        evaluate_binding(Painter(0), Settings(requests=2, pairs="seen"))
