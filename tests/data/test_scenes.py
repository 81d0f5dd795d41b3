"""The drawn world: scenes are pure functions, and what is said of them is what their pixels show."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gligen.config import GroundingConfig
from gligen.data.captions import tokenize_captions
from gligen.data.maps import MAPS, SHAPE_LABELS, canny_map, depth_map, hed_map, normal_map, scribble_map, semantic_map
from gligen.data.people import LIMBS, POSES, make_people_scene
from gligen.data.requests import scene_request
from gligen.data.scenes import (
    RADII,
    Background,
    Scene,
    detection_caption,
    draw_background,
    draw_shape,
    make_scene,
    reference_image,
    to_image,
)
from gligen.data.shapes import COLORS, HELD_OUT, PAIRS, SEEN, SHAPES, distance
from gligen.images import load_map
from gligen.job import ModelFacts, complete
from gligen.modules.clip import tokenize
from gligen.request import check_files, parse_request, serving_modes, to_dict
from tests.generated import BASE

SCENES = [make_scene(7, index) for index in range(200)]
PEOPLE = [make_people_scene(7, index) for index in range(100)]


def covers(scene: Scene, which: int, size: int | None = None) -> np.ndarray:
    """(H, W) how much of each pixel one object covers by itself, 0..1, seen from what painting changes."""
    item, side = scene.objects[which], size or scene.size
    canvas = np.zeros((side, side, 3), np.float32)
    draw_shape(canvas, item.shape, item.center, item.radius, item.turn, (1.0, 1.0, 1.0))
    return canvas[..., 0]


def bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Slow: the pixels one by one."""
    H, W = mask.shape
    x = [column for column in range(W) for row in range(H) if mask[row, column]]
    y = [row for column in range(W) for row in range(H) if mask[row, column]]
    return min(x) / W, min(y) / H, (max(x) + 1) / W, (max(y) + 1) / H


def test_same_seed_and_index_give_the_same_scene_in_any_order():
    forwards = [make_scene(3, index) for index in range(20)]
    backwards = [make_scene(3, index) for index in reversed(range(20))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.image.tobytes() == b.image.tobytes()
        assert dataclasses.replace(a, image=b.image) == b
    assert len({scene.image.tobytes() for scene in forwards}) == 20
    assert make_scene(4, 0).image.tobytes() != forwards[0].image.tobytes()


def test_scene_is_the_same_in_another_process():
    code = "from gligen.data.scenes import *; import hashlib; s = make_scene(1, 2)\n"
    code += "print(hashlib.sha256(s.image.tobytes()).hexdigest(), s.caption)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    scene = make_scene(1, 2)
    assert out.strip() == f"{hashlib.sha256(scene.image.tobytes()).hexdigest()} {scene.caption}"


def test_scenes_are_those_that_shipped_checkpoints_were_taught_on():
    digest = hashlib.sha256()
    for index in range(50):
        scene = make_scene(0, index)
        digest.update(scene.image.tobytes() + scene.caption.encode() + repr([o.box for o in scene.objects]).encode())
    assert digest.hexdigest()[:16] == "4c64349eb6d35d4c"


def test_picture_is_square_bytes_of_the_size_asked_for():
    for size in (16, 64, 100):
        image = make_scene(0, 1, size=size).image
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8


def test_scene_is_the_same_at_every_size():
    for index in range(20):
        small, large = make_scene(0, index), make_scene(0, index, size=256)
        assert small.caption == large.caption
        assert [o.center for o in small.objects] == [o.center for o in large.objects]
        for a, b in zip(small.objects, large.objects, strict=True):
            assert np.abs(np.subtract(a.box, b.box)).max() <= 2 / 64  # whole pixels, and tips thinner than one
        shrunk = large.image.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 2  # edges are anti-aliased by distance, not by area


def test_boxes_are_tight_around_the_drawn_pixels():
    for scene in SCENES[:60]:
        ground = draw_background(scene.background, scene.size)
        for item in scene.objects:
            canvas = ground.copy()
            draw_shape(canvas, item.shape, item.center, item.radius, item.turn, item.rgb)
            whole = np.linalg.norm(np.array(item.rgb) - ground, axis=-1)
            share = np.linalg.norm(to_image(canvas) - to_image(ground).astype(float), axis=-1) / whole
            inner, outer = bounds(share >= 0.5 + 0.02), bounds(share >= 0.5 - 0.02)  # levels are rounded
            for edge, low, high in zip(item.box, inner, outer, strict=True):
                assert min(low, high) <= edge <= max(low, high)


def test_shapes_are_as_their_outlines_say_at_many_times_the_resolution():
    """Coverage against counting 16 × 16 points in each pixel."""
    for shape in SHAPES:
        canvas = np.zeros((32, 32, 3), np.float32)
        draw_shape(canvas, shape, (0.5, 0.5), 0.36, 0.7, (1.0, 1.0, 1.0))
        ticks = ((np.arange(512) + 0.5) / 512 - 0.5).astype(np.float32)
        fine = distance(shape, ticks, ticks[:, None], 0.36, 0.7) <= 0
        exact = fine.reshape(32, 16, 32, 16).mean((1, 3))
        error = np.abs(canvas[..., 0] - exact)
        assert error.max() < 0.35, shape  # at corners
        assert error.mean() < 0.006, shape


def test_reach_of_each_shape_is_that_of_its_farthest_point():
    ticks = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    for name, (outline, reach) in SHAPES.items():
        inside = outline(*np.meshgrid(ticks, ticks)) <= 0
        radius = np.hypot(*np.meshgrid(ticks, ticks))[inside].max()
        assert reach - 0.05 < radius <= reach + 0.005, name


def test_objects_are_large_enough_to_read_and_whole():
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= 4
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            assert RADII[0] <= item.radius <= RADII[1]
            assert 10 / 64 <= max(x1 - x0, y1 - y0) <= 38 / 64
            assert min(x0, y0) >= 0
            assert max(x1, y1) <= 1
            assert covers(scene, scene.objects.index(item)).sum() >= 40


def test_objects_hardly_hide_one_another():
    hidden = []
    for scene in SCENES:
        masks = [covers(scene, i) >= 0.5 for i in range(len(scene.objects))]
        for i, mask in enumerate(masks[:-1]):
            hidden.append((mask & np.any(masks[i + 1 :], axis=0)).sum() / mask.sum())
        for a, b in itertools.combinations(range(len(masks)), 2):
            if scene.objects[a].color == scene.objects[b].color:
                assert not (masks[a] & masks[b]).any()
    assert max(hidden) < 0.1
    assert np.mean(hidden) < 0.005


def test_background_is_too_grey_to_be_an_object():
    for scene in SCENES:
        ground = to_image(draw_background(scene.background, 64)).astype(int)
        assert (ground.max(-1) - ground.min(-1)).max() <= 17 + 18  # tint and light; half the palest colour's is 60


def test_light_is_the_same_on_every_background_and_has_no_two_places_alike():
    plain = Background(tones=((128, 128, 128), (128, 128, 128)), slope=None)
    ramp = Background(tones=((100, 100, 100), (160, 160, 160)), slope=(1.0, 0.0))
    fall = draw_background(plain, 64) - 128
    x = (np.arange(64, dtype=np.float64) + 0.5) / 64
    assert np.allclose(draw_background(ramp, 64) - (100 + 60 * x)[None, :, None], fall, atol=1e-3)
    assert np.abs(fall).max() < 33
    assert abs(fall.mean()) < 3
    patches = fall.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).reshape(64, 3)
    apart = np.abs(patches[:, None] - patches[None]).max(-1) + 99 * np.eye(64)
    assert apart.min() > 0.5


def test_every_color_shape_and_count_occurs_about_evenly():
    pairs = [o.pair for index in range(1500) for o in make_scene(2, index).objects]
    for names, position in ((COLORS, 0), (SHAPES, 1)):
        for name in names:
            share = sum(pair[position] == name for pair in pairs) / len(pairs)
            assert 0.09 < share < 0.16, name
    assert set(pairs) == set(PAIRS)


def test_held_out_pairs_have_each_color_and_each_shape_once():
    assert sorted(color for color, _ in HELD_OUT) == sorted(COLORS)
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    assert len(SEEN) == 56


def test_seen_scenes_have_no_held_out_pair_and_held_out_ones_do():
    for index in range(400):
        assert not any(o.is_held_out for o in make_scene(5, index, pairs="seen").objects)
        assert any(o.is_held_out for o in make_scene(5, index, pairs="held-out").objects)


def test_pairs_within_a_scene_differ():
    assert all(len({o.pair for o in scene.objects}) == len(scene.objects) for scene in SCENES)


@pytest.mark.parametrize("places", [0.0, 1.0])
def test_captions_name_exactly_the_objects(places: float):
    for index in range(150):
        scene = make_scene(9, index, places=places)
        named = re.findall(rf"\b(an?) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", scene.caption)
        assert sorted((color, shape) for _, color, shape in named) == sorted(o.pair for o in scene.objects)
        assert all(f"{article} {color} {shape}" in {o.phrase for o in scene.objects} for article, color, shape in named)
        assert all((article == "an") == (color == "orange") for article, color, _ in named)


def test_share_of_captions_with_places_is_as_asked():
    words = re.compile(r" (on the (left|right)|at the|in the middle|above|below|to the)\b")
    for places in (0.0, 0.25, 1.0):
        told = [bool(words.search(make_scene(0, index, places=places).caption)) for index in range(400)]
        assert abs(np.mean(told) - places) < 0.07
    assert make_scene(0, 3, places=0).image.tobytes() == make_scene(0, 3, places=1).image.tobytes()


def test_places_in_captions_are_true():
    seen = set()
    for index in range(600):
        scene = make_scene(1, index, places=1)
        by_phrase = {o.phrase: o.center for o in scene.objects}
        phrase = "|".join(by_phrase)
        for name, where in re.findall(rf"({phrase}) (on the \w+|at the \w+(?: \w+)?|in the middle)", scene.caption):
            x, y = by_phrase[name]
            seen.add(where.split(" and")[0])
            assert ("left" not in where) or x < 0.5
            assert ("right" not in where) or x > 0.5
            assert ("top" not in where) or y < 0.5
            assert ("bottom" not in where) or y > 0.5
        relation = re.search(rf"({phrase}) (above|below|to the left of|to the right of) ({phrase})", scene.caption)
        if relation:
            a, word, b = relation.groups()
            seen.add(word)
            (x0, y0), (x1, y1) = by_phrase[a], by_phrase[b]
            assert {"above": y0 < y1, "below": y0 > y1, "to the left of": x0 < x1, "to the right of": x0 > x1}[word]
    assert {"above", "below", "to the left of", "to the right of", "on the left", "on the right"} <= seen


def test_detection_caption_is_class_names_and_commas():
    for scene in SCENES[:20]:
        assert detection_caption(scene).split(", ") == [f"{o.color} {o.shape}" for o in scene.objects]


@pytest.mark.parametrize("bad", [{"size": 8}, {"pairs": "unseen"}])
def test_impossible_scenes_are_refused_in_one_line(bad: dict):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        make_scene(0, 0, **bad)


def test_two_thousand_scenes_a_second():
    make_scene(0, 0)
    best = 0.0
    for _ in range(3):  # of processor time: other work on the machine counts little
        start = time.process_time()
        for index in range(300):
            make_scene(0, index)
        best = max(best, 300 / (time.process_time() - start))
    assert best >= 1000  # 3,700 on an idle core; half of the goal here, for slow and busy ones


def test_semantic_map_has_the_shape_on_top_in_every_pixel():
    for scene in SCENES[:40]:
        expected = np.zeros((64, 64), np.uint8)
        for i, item in enumerate(scene.objects):
            expected[covers(scene, i) >= 0.5] = SHAPE_LABELS[item.shape]
        np.testing.assert_array_equal(semantic_map(scene), expected)


def test_maps_fit_the_picture():
    """Where the picture has an object's own colour its map says so, and on the background the map is empty."""
    for scene in SCENES[:40]:
        ground = np.abs(scene.image - draw_background(scene.background, 64)).max(-1) < 1
        assert depth_map(scene)[ground].max() <= 12  # the faintest rims round to the background's level
        assert (normal_map(scene)[ground & (semantic_map(scene) == 0)] == (128, 128, 255)).all()
        for item in scene.objects:
            pure = np.abs(scene.image - np.array(item.rgb)).max(-1) < 1
            assert pure.any()
            assert (semantic_map(scene)[pure] == SHAPE_LABELS[item.shape]).all()
            assert (depth_map(scene)[pure] >= 255 * item.depth * 0.8 - 1).all()
            assert (depth_map(scene)[pure] <= 255 * item.depth + 1).all()


def test_nearer_objects_lie_on_top():
    assert all(a.depth < b.depth for scene in SCENES for a, b in itertools.pairwise(scene.objects))


def test_normals_have_unit_length_and_point_outwards_at_the_rim():
    for scene in SCENES[:20]:
        normals = (normal_map(scene, 128).astype(float) - 128) / 127.5
        assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 0.02
        assert normals[..., 2].min() > 0.3
    scene = next(s for s in SCENES if len(s.objects) == 1 and s.objects[0].shape == "circle")
    x0, y0, x1, y1 = (round(128 * edge) for edge in scene.objects[0].box)
    normals = normal_map(scene, 128).astype(int) - 128
    middle = (x0 + x1) // 2, (y0 + y1) // 2
    assert normals[middle[1], x0 + 1, 0] < -60 < 60 < normals[middle[1], x1 - 2, 0]  # red is to the right
    assert normals[y1 - 2, middle[0], 1] < -60 < 60 < normals[y0 + 1, middle[0], 1]  # green is up


def test_edges_run_where_labels_change():
    for scene in SCENES[:40]:
        labels, edges, soft = semantic_map(scene).astype(int), canny_map(scene), hed_map(scene)
        assert set(np.unique(edges)) == {0, 255}
        across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
        assert (edges[:, 1:] | edges[:, :-1])[across].all()
        assert (edges[1:] | edges[:-1])[down].all()
        inside = np.ones((64, 64), bool)
        inside[:, 1:] &= ~across
        inside[:, :-1] &= ~across
        inside[1:] &= ~down
        inside[:-1] &= ~down
        if len({o.shape for o in scene.objects}) == len(scene.objects):
            assert not edges[inside].any()
        assert (soft[edges > 0] >= 120).all()
        assert (soft > 0).mean() < 0.75


def test_strokes_follow_outlines_and_are_a_hands():
    near = 1 + round(128 * (1 / 48 + 1 / 64) * 1.3)  # half a stroke's width and how far it strays, at most
    for scene in SCENES[:40]:
        strokes, edges = scribble_map(scene, 128) > 0, canny_map(scene, 128) > 0
        around, reached = (
            np.lib.stride_tricks.sliding_window_view(np.pad(m, near), (2 * near + 1,) * 2).any((2, 3))
            for m in (edges, strokes)
        )
        assert strokes[around].sum() >= 0.95 * strokes.sum()  # some corners are longer
        assert reached[edges].mean() > 0.97  # what is hidden where things overlap apart
        assert strokes.sum() > 2 * edges.sum()  # thick
        assert (scribble_map(scene, 128) > 0).tolist() == strokes.tolist()
    circle = next(s for s in SCENES if len(s.objects) == 1 and s.objects[0].shape == "circle")
    rows, columns = np.nonzero(scribble_map(circle, 256))
    (item,) = circle.objects
    radii = np.hypot((columns + 0.5) / 256 - item.center[0], (rows + 0.5) / 256 - item.center[1])
    angles = np.arctan2(rows / 256 - item.center[1], columns / 256 - item.center[0])
    middles = [radii[(angles > a) & (angles < a + 0.3)].mean() for a in np.arange(-3, 2.9, 0.3)]
    assert 0.002 < np.std(middles) < 1 / 64  # no compass drew it
    assert np.mean(middles) == pytest.approx(item.radius, abs=1 / 64)


def test_maps_are_what_request_files_hold(tmp_path: Path):
    for mode in MAPS:
        request = scene_request(SCENES[0], mode, tmp_path)
        loaded = load_map(getattr(request, mode), mode, 64, 64)
        expected = MAPS[mode](SCENES[0], None)
        if mode == "sem":
            np.testing.assert_array_equal(loaded[0].numpy(), expected)
        else:
            levels = (loaded.permute(1, 2, 0).numpy() * 127.5 + 127.5).round().astype(int)
            np.testing.assert_array_equal(levels, expected if expected.ndim == 3 else np.stack([expected] * 3, -1))


def test_maps_of_people_are_refused():
    with pytest.raises(ValueError, match="people"):
        depth_map(PEOPLE[0])


def test_things_stand_within_twenty_degrees():
    turns = np.degrees([item.turn for scene in SCENES for item in scene.objects])
    assert np.abs(turns).max() <= 20
    assert turns.min() < -18
    assert turns.max() > 18
    assert np.std(turns) == pytest.approx(40 / math.sqrt(12), rel=0.1)  # evenly


def test_reference_image_shows_a_turn_of_its_own_that_stands_too():
    """A triangle of at most 20 degrees has its tip above its middle; its turn is not the object's."""
    for scene in SCENES[:100]:
        for i, item in enumerate(scene.objects):
            if item.shape == "triangle":
                image = reference_image(scene, i, 128).astype(int)
                rows, columns = np.nonzero(image.max(-1) - image.min(-1) > 50)
                tip = columns[rows == rows.min()].mean() + 0.5
                height = 64 - rows.min()
                assert abs(math.degrees(math.atan2(tip - 64, height))) <= 20 + 2


def test_reference_image_has_the_object_alone_turned_and_larger():
    for scene in SCENES[:40]:
        for i, item in enumerate(scene.objects):
            image = reference_image(scene, i).astype(int)
            assert (image[0] == image[0, 0]).all()
            chroma = image.max(-1) - image.min(-1)
            area = (chroma > 50).sum()
            assert area > 0.9 * covers(scene, i).sum()
            assert image.shape == (64, 64, 3)
            np.testing.assert_array_equal(image, reference_image(scene, i))
            assert np.abs(image[chroma >= 0.95 * chroma.max()].mean(0) - COLORS[item.color]).max() < 25


@pytest.mark.parametrize(
    "mode", ["box-text", "box-text-image", "sem", "hed", "inpaint-box-text", "inpaint-box-text-image"]
)
def test_request_of_a_scene_is_valid_and_served_by_its_mode(mode: str, tmp_path: Path):
    for scene in SCENES[:5]:
        request = scene_request(scene, mode, tmp_path)
        assert parse_request(to_dict(request)) == request
        assert mode in serving_modes(request)
        check_files(request)
        config = dataclasses.replace(BASE, unet=dataclasses.replace(BASE.unet, grounding=GroundingConfig(mode=mode)))
        complete(request, ModelFacts(config=config, has_image_encoder=True, has_base_conv=True))


def test_box_request_asks_for_each_object_and_writes_nothing():
    request = scene_request(SCENES[0])
    assert [(e.phrase, e.box) for e in request.entities] == [(o.phrase, o.box) for o in SCENES[0].objects]
    assert request.prompt == SCENES[0].caption


def test_request_refuses_what_the_scene_lacks():
    with pytest.raises(ValueError, match="people"):
        scene_request(PEOPLE[0], "box-text")
    with pytest.raises(ValueError, match="shapes"):
        scene_request(SCENES[0], "keypoint")
    with pytest.raises(ValueError, match="folder"):
        scene_request(SCENES[0], "depth")


def test_people_are_pure_functions_too():
    again = [make_people_scene(7, index) for index in reversed(range(100))][::-1]
    assert all(
        a.image.tobytes() == b.image.tobytes() and a.people == b.people for a, b in zip(PEOPLE, again, strict=True)
    )
    digest = hashlib.sha256(b"".join(scene.image.tobytes() + scene.caption.encode() for scene in PEOPLE))
    assert digest.hexdigest()[:16] == "78689e7fbf9275d0"
    assert {len(scene.people) for scene in PEOPLE} == {1, 2}
    assert all(any(pose in scene.caption for pose in POSES) for scene in PEOPLE)


def test_keypoints_lie_on_the_drawn_limbs():
    """Just inside each end of a limb the picture has its colour, unless another limb or a head lies over it."""
    hits = []
    for scene in PEOPLE:
        for person in scene.people:
            for color, (a, b) in LIMBS.items():
                start, end = person[a], person[b]
                if start is None or end is None:
                    continue
                for share in (0.35, 0.65, 0.9):
                    x, y = (int(64 * (s + share * (e - s))) for s, e in zip(start, end, strict=True))
                    pixel = scene.image[min(y, 63), min(x, 63)].astype(float)
                    hits.append(np.abs(pixel - COLORS[color]).max() < 60)
    assert np.mean(hits) > 0.93


def test_keypoints_outside_the_image_are_absent_and_others_are_not():
    absent = 0
    for scene in PEOPLE:
        for person in scene.people:
            assert len(person) == 17
            for point in person:
                absent += point is None
                assert point is None or (min(point) >= 0 and max(point) <= 1)
    assert 0.01 < absent / sum(17 * len(scene.people) for scene in PEOPLE) < 0.25


def test_a_persons_left_is_on_the_pictures_right():
    for scene in PEOPLE:
        for person in scene.people:
            for left, right in ((1, 2), (3, 4), (5, 6), (11, 12)):
                a, b = person[left], person[right]
                assert not (a and b) or a[0] > b[0]


def test_request_of_people_is_valid():
    for scene in PEOPLE[:20]:
        request = scene_request(scene, "keypoint")
        assert parse_request(to_dict(request)) == request
        assert request.keypoints == scene.people


def test_captions_are_spelt_word_by_word_as_clip_spells_them() -> None:
    captions = [make_scene(3, n, places=n % 2).caption for n in range(200)]
    captions += [detection_caption(make_scene(3, n)) for n in range(20)]
    captions += [make_people_scene(3, n).caption for n in range(50)]
    captions += ["", "it's <|endoftext|> 7 pm", "a café &amp; bar", "an  orange,blue RING", "a red star " * 40]
    for context_length, vocab_size in ((48, 8192), (77, 49408)):
        expected = tokenize(captions, context_length, vocab_size)[0]
        assert torch.equal(tokenize_captions(captions, context_length, vocab_size), expected)
