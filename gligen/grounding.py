"""From checked requests, or examples, to the tensors of one batch: what the grounding tokenizer reads.

Each function returns grounding inputs (a dict of tensors, float32 on the CPU) for the tokenizer of that name in
gligen/modules/position_net.py; rows that a request leaves empty stay 0, which is their null feature.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.image_files import ImageSource
from gligen.modules.position_net import NUM_KEYPOINTS, GroundingInputs
from gligen.request import Entity, Person


class Grounded(Protocol):
    """What says where things are: a `Request`, or an `Example` to learn from."""

    @property
    def entities(self) -> Sequence[Entity]: ...

    @property
    def keypoints(self) -> Sequence[Person]: ...


EncodeTexts = Callable[[Sequence[str]], dict[str, Tensor]]  # a feature (F,) for each different text
EncodeImages = Callable[[Sequence[ImageSource]], dict[str | int, Tensor]]  # and for each image, by `image_key`


def image_key(source: ImageSource) -> str | int:
    """What tells images apart: the path of a file, the identity of an image in memory (which cannot be hashed)."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else id(source)


def box_inputs(
    requests: Sequence[Grounded], config: GroundingConfig, encode_phrases: EncodeTexts, encode_images: EncodeImages
) -> GroundingInputs:
    """boxes, masks and features of entities: (B, N, ...), N = config.max_entities."""
    entities = [(b, n, entity) for b, request in enumerate(requests) for n, entity in enumerate(request.entities)]
    shape = (len(requests), config.max_entities)
    # numpy writes single numbers five times as fast as torch does
    boxes, masks = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
    for b, n, entity in entities:
        boxes[b, n] = entity.box
        masks[b, n] = 1

    def features(held: Sequence[tuple[int, int, str | int]], encoded: Mapping[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """Features (B, N, F) of what entity n of request b holds, and a mask (B, N) of those that hold something."""
        out, mask = torch.zeros(*shape, config.feature_dim), torch.zeros(shape)
        for b, n, key in held:
            out[b, n] = encoded[key].float().cpu()
            mask[b, n] = 1
        return out, mask

    phrases = [(b, n, entity.phrase) for b, n, entity in entities if entity.phrase]
    text_features, text_masks = features(phrases, encode_phrases(list(dict.fromkeys(text for *_, text in phrases))))
    inputs = {"boxes": torch.from_numpy(boxes), "masks": torch.from_numpy(masks), "text_features": text_features}
    if config.spec.takes_images:
        images = [(b, n, entity.image) for b, n, entity in entities if entity.image is not None]
        different = {image_key(source): source for *_, source in images}
        image_features, image_masks = features(
            [(b, n, image_key(source)) for b, n, source in images], encode_images(list(different.values()))
        )
        inputs |= {"text_masks": text_masks, "image_features": image_features, "image_masks": image_masks}
    return inputs


def keypoint_inputs(requests: Sequence[Grounded], config: GroundingConfig) -> GroundingInputs:
    """points (B, 17·P, 2) and masks (B, 17·P) of people, P = config.max_persons."""
    shape = (len(requests), config.max_persons, NUM_KEYPOINTS)
    points, masks = np.zeros((*shape, 2), np.float32), np.zeros(shape, np.float32)
    for b, request in enumerate(requests):
        for p, person in enumerate(request.keypoints):
            for k, point in enumerate(person):
                if point is not None:
                    points[b, p, k] = point
                    masks[b, p, k] = 1
    return {"points": torch.from_numpy(points).flatten(1, 2), "masks": torch.from_numpy(masks).flatten(1)}


def map_inputs(maps: Sequence[Tensor | None], config: GroundingConfig, width: int, height: int) -> GroundingInputs:
    """map (B, C, H, W) and mask (B, 1); a request without a map has None, which becomes zeros under mask 0."""
    channels = 1 if config.spec.name == "sem" else config.spec.map_channels
    empty = torch.zeros(channels, height, width)
    return {
        "map": torch.stack([empty if m is None else m.float() for m in maps]),
        "mask": torch.tensor([[float(m is not None)] for m in maps]),
    }
