"""Whole pictures → examples as a mode trains on them: cropped, flipped, filtered, with caption, map and references.

Everything drawn about sample n comes from `streams.rng(series, n, Purpose.GEOMETRY)`, so that a picture that comes
again in another epoch, under another number, is cropped anew, and the same sample is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gligen.data.edges import MAKERS
from gligen.data.example import NO_IMAGE, BadExample, Example, Map, Pixels, Wrapped
from gligen.data.geometry import (
    MAX_BOXES,
    MIN_AREA,
    Buckets,
    Window,
    check_size,
    crop_boxes,
    crop_map,
    crop_person,
    crop_pixels,
    crop_window,
    says_side,
    select_boxes,
    select_people,
)
from gligen.data.order import Sized
from gligen.data.streams import Purpose, rng
from gligen.modes import Mode
from gligen.request import MAX_PERSONS, STYLE_BOX, Box, Entity

Captions = Literal["full", "detection", "null"]


@dataclass(frozen=True, kw_only=True)
class Prepared(Wrapped):
    """Examples of a mode at a size.

    image_size: (width, height), multiples of 64; Buckets, of which each picture gets the nearest; or what says it of
    every sample, so that those of a batch have one (gligen.data.order.Bucketed).
    crop: 'center', or 'random' along the side that is cut. flip: the share of pictures that are flipped; those that say
    left or right, in a phrase or the caption, are not.
    captions: 'full' is a picture's own (one of them, drawn), and the names of what is in its boxes where it has none,
    'a, b, c'; 'detection' the names always; 'null' none, as the paper's best detection numbers were trained.
    series: whose stream is drawn from (gligen.data.streams), the user's seed added.
    maps: 'canny' or 'scribble', made from the cropped picture where the example has no map; '' if they all have.
    """

    mode: Mode
    image_size: tuple[int, int] | Buckets | Sized
    series: int
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0
    captions: Captions = "full"
    maps: str = ""
    min_area: float = MIN_AREA
    max_boxes: int = MAX_BOXES
    max_persons: int = MAX_PERSONS

    def __post_init__(self) -> None:
        if isinstance(self.image_size, tuple):
            check_size(self.image_size)
        if self.maps and self.maps not in MAKERS:
            raise ValueError(f"maps made from pictures are {' or '.join(MAKERS)}, not {self.maps!r}")

    def example(self, n: int) -> Example:
        """Raises BadExample as the source, and for a picture without the map that the mode needs."""
        example = self.source.example(n)
        drawn = rng(self.series, n, Purpose.GEOMETRY).random(4).tolist()
        captions = (example.caption, *example.other_captions)
        caption = captions[int(drawn[3] * len(captions))]
        picture = _size_of(example)
        size = self._size(n, picture)
        place = (drawn[0], drawn[1]) if self.crop == "random" else (0.5, 0.5)
        texts = (caption, *(entity.phrase for entity in example.entities))
        window = crop_window(picture, size, place, is_flipped=drawn[2] < self.flip and not says_side(texts))

        image = NO_IMAGE if example.latents is not None else crop_pixels(example.image, window)
        kept, entities = self._entities(example, window) if self.mode.takes_phrases else ([], ())
        people = [crop_person(person, window, picture) for person in example.keypoints]
        if self.captions == "detection" or (self.captions == "full" and not caption):
            caption = detection_caption([entity.phrase for entity in entities])
        return Example(
            image=image,
            caption="" if self.captions == "null" else caption,
            entities=entities,
            keypoints=tuple(people[i] for i in select_people(people, self.max_persons)),
            map=self._map(example, image, window),
            references=self._references(example, kept, window) if self.mode.takes_images else (),
            # of a mirrored picture nobody has made any
            reference_features=()
            if window.is_flipped or not example.reference_features or not self.mode.takes_images
            else tuple(example.reference_features[i] for i in kept),
            mask=None if example.mask is None else crop_map(example.mask, "mask", window, picture),
            latents=example.latents,
            size=size if example.latents is not None else None,
            key=example.key,
            faults=example.faults,
        )

    def _entities(self, example: Example, window: Window) -> tuple[list[int], tuple[Entity, ...]]:
        """Which entities are kept, and what becomes of them. A style's box is a mark, not a place: it stays."""
        boxes = np.array([entity.box for entity in example.entities], np.float64).reshape(-1, 4)
        moved = crop_boxes(boxes, window, _size_of(example))
        styles = [i for i, entity in enumerate(example.entities) if entity.box == STYLE_BOX]
        moved[styles] = 0  # without area, so that they take no other's room
        kept = sorted({*select_boxes(moved, self.min_area, self.max_boxes - len(styles)), *styles})
        moved[styles] = STYLE_BOX
        return kept, tuple(replace(example.entities[i], box=_box(moved[i].tolist())) for i in kept)

    def _size(self, n: int, picture: tuple[int, int]) -> tuple[int, int]:
        if isinstance(self.image_size, tuple):
            return self.image_size
        if isinstance(self.image_size, Buckets):
            return self.image_size.nearest(picture)
        return self.image_size.image_size(n)

    def _map(self, example: Example, image: Pixels, window: Window) -> Map | None:
        if not self.mode.is_map:
            return None
        if example.map is None and self.maps:
            return MAKERS[self.maps](image)
        if example.map is None:
            raise BadExample(f"no {self.mode.name} map", f"{example.key}: has no {self.mode.name} map")
        return crop_map(example.map, self.mode.name, window, _size_of(example))

    def _references(self, example: Example, kept: Sequence[int], window: Window) -> tuple[Pixels | None, ...]:
        """The picture in each entity's box, whole and in full resolution, where the example brings none."""
        if example.references:
            return tuple(example.references[i] for i in kept)
        return tuple(cut_out(example.image, example.entities[i].box, is_flipped=window.is_flipped) for i in kept)


def _size_of(example: Example) -> tuple[int, int]:
    """Width and height of the picture, which may have been encoded before."""
    return example.size or (example.image.shape[1], example.image.shape[0])


def cut_out(pixels: Pixels, box: Box, *, is_flipped: bool = False) -> Pixels:
    """A copy of the part of a picture that a box (fractions) shows, whole pixels outwards, at least one."""
    H, W = pixels.shape[:2]
    left, top = min(int(box[0] * W), W - 1), min(int(box[1] * H), H - 1)
    right, bottom = max(left + 1, int(np.ceil(box[2] * W))), max(top + 1, int(np.ceil(box[3] * H)))
    part = pixels[top:bottom, left:right]
    return (part[:, ::-1] if is_flipped else part).copy()


def detection_caption(phrases: Sequence[str]) -> str:
    """The pseudo-caption of detection data: different names and commas, 'person, car', in the boxes' order."""
    return ", ".join(dict.fromkeys(phrases))


def _box(numbers: list[float]) -> Box:
    x0, y0, x1, y1 = numbers
    return x0, y0, x1, y1
