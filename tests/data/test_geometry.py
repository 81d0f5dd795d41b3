"""Pixels, boxes, points, maps and masks move together, and what a crop leaves is what the rules say."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from gligen.data.example import BadExample, Example
from gligen.data.geometry import (
    MIRRORED,
    Buckets,
    boxes_to_upright,
    check_size,
    crop_boxes,
    crop_map,
    crop_person,
    crop_pixels,
    crop_window,
    says_side,
    select_boxes,
    select_people,
    to_upright,
)
from gligen.data.pictures import annotated_frame, decode_picture
from gligen.data.prepare import Prepared, cut_out, detection_caption
from gligen.data.streams import Series
from gligen.images import fit
from gligen.modes import get_mode
from gligen.request import STYLE_BOX, Entity


class Given:
    """A source of examples that are given."""

    def __init__(self, *examples: Example) -> None:
        self.examples = examples

    @property
    def size(self) -> int:
        return len(self.examples)

    def example(self, n: int) -> Example:
        return self.examples[n % len(self.examples)]

    def key(self, n: int) -> str:
        return self.examples[n].key


def marked(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A black picture in which the box (pixels) is white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def where_white(pixels: np.ndarray) -> np.ndarray:
    """The box of what is at least half white, in fractions."""
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    y, x = np.nonzero(grey >= 128)
    H, W = grey.shape
    return np.array([x.min() / W, y.min() / H, (x.max() + 1) / W, (y.max() + 1) / H])


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("picture", [(320, 200), (200, 320), (128, 128), (97, 301)])
@pytest.mark.parametrize("size", [(128, 128), (192, 128), (64, 256)])
def test_boxes_maps_and_masks_go_where_the_pixels_go(picture, size, place, is_flipped):
    W, H = picture
    box = (W // 4, H // 3, W // 2, 2 * H // 3)
    pixels = marked(W, H, box)
    window = crop_window(picture, size, place, is_flipped=is_flipped)
    seen = crop_pixels(pixels, window)
    assert seen.shape == (size[1], size[0], 3)
    fractions = np.array([[box[0] / W, box[1] / H, box[2] / W, box[3] / H]])
    (moved,) = crop_boxes(fractions, window, picture)
    if moved[0] + 2 / min(size) > moved[2] or moved[1] + 2 / min(size) > moved[3]:
        assert (seen >= 128).mean() < 0.1  # outside the crop, or hardly inside
        return
    assert np.allclose(where_white(seen), moved, rtol=0, atol=1.01 / min(size))
    half = np.asarray(Image.fromarray(pixels).resize((2 * W, 2 * H), Image.Resampling.NEAREST))
    for kind, shown in (("depth", half), ("sem", half[..., 0]), ("mask", half[..., 0])):
        result = crop_map(shown, kind, window, picture)
        assert np.allclose(where_white(result), moved, rtol=0, atol=1.01 / min(size)), kind


@pytest.mark.parametrize("picture", [(320, 200), (201, 333), (64, 64)])
def test_the_centre_crop_is_the_originals(picture):
    pixels = np.random.default_rng(0).integers(0, 256, (picture[1], picture[0], 3), dtype=np.uint8)
    for size in ((128, 128), (192, 64)):
        expected = np.asarray(fit(Image.fromarray(pixels), *size))
        assert (crop_pixels(pixels, crop_window(picture, size)) == expected).all()


def test_flipped_people_have_left_and_right_exchanged():
    person = tuple((0.1 + i / 40, i / 17) for i in range(17))
    window = crop_window((100, 100), (64, 64), is_flipped=True)
    flipped = crop_person(person, window, (100, 100))
    parts = ("eye", "ear", "sho", "elb", "wri", "hip", "kne", "ank")
    names = ["nose", *(side + part for part in parts for side in "lr")]
    swap = {"l": "r", "r": "l"}
    for i, name in enumerate(names):
        j = names.index(swap.get(name[0], name[0]) + name[1:]) if i else 0
        assert MIRRORED[i] == j
        assert np.allclose(flipped[i], (1 - person[j][0], person[j][1]))
    assert np.allclose(crop_person(flipped, window, (100, 100)), person)


def test_points_outside_the_crop_are_absent():
    window = crop_window((200, 100), (64, 64))  # shows x from 50 to 150
    person = ((0.1, 0.5), (0.5, 0.5), None, *[None] * 14)
    assert crop_person(person, window, (200, 100)) == (None, (0.5, 0.5), None, *[None] * 14)


def test_flipped_normals_have_x_inverted():
    normals = np.zeros((64, 64, 3), np.uint8)
    normals[:, :32] = (200, 10, 30)
    flipped = crop_map(normals, "normal", crop_window((64, 64), (64, 64), is_flipped=True), (64, 64))
    assert (flipped[:, 32:] == (55, 10, 30)).all()
    assert (flipped[:, :32] == (255, 0, 0)).all()
    plain = crop_map(normals, "depth", crop_window((64, 64), (64, 64), is_flipped=True), (64, 64))
    assert (plain[:, 32:] == (200, 10, 30)).all()


def test_masks_keep_thin_strokes():
    mask = np.zeros((512, 512), np.uint8)
    mask[:, 100] = 255
    assert (crop_map(mask, "mask", crop_window((512, 512), (64, 64)), (512, 512))[:, 12] == 255).all()


def test_small_boxes_are_dropped_and_the_largest_kept_in_their_order():
    sides = [0.5, 0.09, 0.1, 0.3, 0.11]
    boxes = np.array([[0, 0, side, side] for side in sides])
    assert select_boxes(boxes) == [0, 2, 3, 4]
    assert select_boxes(boxes, most=2) == [0, 3]
    many = np.array([[0, 0, 0.1 + i / 1000, 0.5] for i in range(100)])
    assert select_boxes(many) == list(range(70, 100))
    assert select_boxes(np.zeros((0, 4))) == []


def test_boxes_are_clipped_to_the_crop():
    window = crop_window((200, 100), (64, 64))
    boxes = np.array([[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.2, 1.0]])
    assert np.allclose(crop_boxes(boxes, window, (200, 100)), [[0, 0, 0.5, 1], [0, 0, 0, 1]])


def test_people_that_reach_farthest_are_kept():
    people = [tuple((s * i / 16, s * i / 16) for i in range(17)) for s in (0.1, 0.5, 0.3)] + [(None,) * 17]
    assert select_people(people, 2) == [1, 2]
    assert select_people(people, 8) == [0, 1, 2]


def test_texts_that_say_left_or_right():
    for text in ("a man on the left", "Right hand", "the leftmost cup", "a right-handed player"):
        assert says_side([text]), text
    for text in ("bright lights", "leftovers", "copyright", ""):
        assert not says_side([text]), text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_boxes_and_points_as_it_turns_pixels(orientation):
    pixels = marked(96, 64, (12, 8, 36, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", exif=exif)
    picture = decode_picture(content.getvalue(), "x.png")
    assert picture.orientation == orientation
    with Image.open(content) as stored:
        assert (picture.pixels == np.asarray(ImageOps.exif_transpose(stored))).all()
    box = np.array([[12 / 96, 8 / 64, 36 / 96, 24 / 64]])
    assert np.allclose(boxes_to_upright(box, orientation)[0], where_white(picture.pixels))
    centre = (where_white(picture.pixels)[:2] + where_white(picture.pixels)[2:]) / 2
    assert np.allclose(to_upright(np.array([24 / 96, 16 / 64]), orientation), centre)
    # the annotation's size tells in which frame its boxes are
    swapped = orientation >= 5
    assert annotated_frame(picture, (96, 64), "x") == (96, 64, orientation if swapped else 1)
    upright = (64, 96) if swapped else (96, 64)
    assert annotated_frame(picture, upright, "x") == (*upright, 1)
    assert annotated_frame(picture, (0, 0), "x") == (*upright, 1)
    assert annotated_frame(picture, (1, 1), "x") == (1, 1, 1)
    with pytest.raises(BadExample, match="but annotated as 50 x 64"):
        annotated_frame(picture, (50, 64), "x")


def test_buckets_have_about_the_same_area_and_lose_little():
    buckets = Buckets(512)
    assert (512, 512) in buckets.sizes
    for width, height in buckets.sizes:
        check_size((width, height))
        assert abs(width * height / 512**2 - 1) < 0.13
        assert max(width / height, height / width) <= 2
    assert buckets.nearest((1000, 1000)) == (512, 512)
    assert buckets.nearest((640, 480)) == (576, 448)
    wide, tall = buckets.nearest((5000, 1000)), buckets.nearest((1000, 5000))
    assert wide[0] / wide[1] == max(w / h for w, h in buckets.sizes)
    assert tall == wide[::-1]
    with pytest.raises(ValueError, match="size is 500 x 500: give multiples of 64"):
        Buckets(500)


# whole examples


def test_preparing_is_a_function_of_the_number_and_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    image.setflags(write=False)
    entities = (Entity(phrase="a", box=(0.1, 0.1, 0.9, 0.9)), Entity(phrase="b", box=(0.0, 0.0, 0.05, 0.05)))
    example = Example(image=image, caption="", entities=entities, key="x")
    prepared = Prepared(
        source=Given(example), mode=get_mode("box-text"), image_size=(64, 64), series=1, crop="random", flip=0.5
    )
    first = [prepared.example(n) for n in range(20)]
    for n, other in enumerate(first):
        again = prepared.example(n)
        assert (again.image == other.image).all()
        assert again.entities == other.entities
    assert len({other.image.tobytes() for other in first}) > 10
    assert example.entities == entities
    assert all(other.caption == "a" for other in first)  # what was too small is not named
    whole = Prepared(source=Given(example), mode=get_mode("box-text"), image_size=(64, 64), series=1)
    assert whole.example(0).entities == whole.example(7).entities


def test_pictures_that_say_left_are_not_flipped():
    image = marked(64, 64, (0, 0, 32, 64))
    for caption, phrase, flips in (("a cat", "cat", True), ("left", "cat", False), ("", "the right cup", False)):
        example = Example(image=image, caption=caption, entities=(Entity(phrase=phrase, box=(0, 0, 0.5, 1)),))
        prepared = Prepared(source=Given(example), mode=get_mode("box-text"), image_size=(64, 64), series=0, flip=1)
        result = prepared.example(0)
        assert result.entities[0].box == ((0.5, 0, 1, 1) if flips else (0, 0, 0.5, 1))
        assert np.allclose(where_white(result.image), result.entities[0].box)


def test_captions_are_the_pictures_or_the_names_or_none():
    entities = tuple(Entity(phrase=name, box=(0, 0, 1, 1)) for name in ("person", "car", "person"))
    for caption, captions, expected in (
        ("its own", "full", "its own"),
        ("", "full", "person, car"),
        ("its own", "detection", "person, car"),
        ("its own", "null", ""),
    ):
        example = Example(image=marked(64, 64, (0, 0, 1, 1)), caption=caption, entities=entities)
        prepared = Prepared(
            source=Given(example), mode=get_mode("box-text"), image_size=(64, 64), series=0, captions=captions
        )
        assert prepared.example(0).caption == expected
    assert detection_caption(["a", "b", "a"]) == "a, b"


def test_one_of_a_pictures_captions_is_drawn():
    example = Example(image=marked(64, 64, (0, 0, 1, 1)), caption="a", other_captions=("b", "c"))
    prepared = Prepared(source=Given(example), mode=get_mode("keypoint"), image_size=(64, 64), series=0)
    assert {prepared.example(n).caption for n in range(40)} == {"a", "b", "c"}


def test_references_are_what_is_in_the_boxes_at_full_resolution():
    image = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    entities = (Entity(phrase="a", box=(0.25, 0.1, 0.75, 0.9)), Entity(phrase="tiny", box=(0, 0, 0.01, 0.01)))
    example = Example(image=image, caption="", entities=entities)
    prepared = Prepared(source=Given(example), mode=get_mode("box-text-image"), image_size=(64, 64), series=0)
    (reference,) = prepared.example(0).references
    assert (reference == image[10:90, 50:150]).all()
    flipped = Prepared(source=Given(example), mode=get_mode("box-text-image"), image_size=(64, 64), series=0, flip=1)
    assert (flipped.example(0).references[0] == image[10:90, 50:150][:, ::-1]).all()
    assert cut_out(image, (0.999, 0.999, 1.0, 1.0)).shape == (1, 1, 3)


def test_style_references_are_no_place():
    entities = (Entity(image="style.png", box=STYLE_BOX), Entity(phrase="a", box=(0.1, 0.1, 0.9, 0.9)))
    pictures = (np.zeros((2, 2, 3), np.uint8), None)
    example = Example(image=marked(128, 64, (0, 0, 1, 1)), caption="", entities=entities, references=pictures)
    prepared = Prepared(source=Given(example), mode=get_mode("box-text-image"), image_size=(64, 64), series=0, flip=1)
    result = prepared.example(0)
    assert result.entities[0].box == STYLE_BOX
    assert result.entities[1].box == pytest.approx((0, 0.1, 1, 0.9))
    assert result.references[0] is pictures[0]
    assert result.references[1] is None


def test_a_map_mode_needs_a_map():
    example = Example(image=marked(64, 64, (9, 9, 40, 40)), caption="", key="x.png")
    prepared = Prepared(source=Given(example), mode=get_mode("canny"), image_size=(64, 64), series=0)
    with pytest.raises(BadExample, match=r"x.png: has no canny map"):
        prepared.example(0)
    made = Prepared(source=Given(example), mode=get_mode("canny"), image_size=(64, 64), series=0, maps="canny")
    assert made.example(0).map.max() == 255
    with pytest.raises(ValueError, match="canny or scribble, not 'depth'"):
        Prepared(
            source=Given(example), mode=get_mode("depth"), image_size=(64, 64), series=Series.TRAINING, maps="depth"
        )
