"""From checked requests, or examples, to the tensors of one batch: what the grounding tokenizer reads.

Each function returns grounding inputs (a dict of tensors, float32 on the CPU) for the tokenizer of that name in
gligen/modules/position_net.py; rows that a request leaves empty stay 0, which is their null feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.modules.position_net import NUM_KEYPOINTS, GroundingInputs
from gligen.request import Entity, Person


class Grounded(Protocol):
    """What says where things are: a `Request`, or an `Example` to learn from."""

    @property
    def entities(self) -> Sequence[Entity]: ...

    @property
    def keypoints(self) -> Sequence[Person]: ...


Encode = Callable[[Sequence[str]], dict[str, Tensor]]  # texts or paths -> a feature (F,) for each


def box_inputs(
    requests: Sequence[Grounded], config: GroundingConfig, encode_phrases: Encode, encode_images: Encode
) -> GroundingInputs:
    """boxes, masks and features of entities: (B, N, ...), N = config.max_entities."""
    entities = [(b, n, entity) for b, request in enumerate(requests) for n, entity in enumerate(request.entities)]
    shape = (len(requests), config.max_entities)
    # numpy writes single numbers five times as fast as torch does
    boxes, masks = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
    for b, n, entity in entities:
        boxes[b, n] = entity.box
        masks[b, n] = 1

    def features(key: Callable[[Entity], str | None], encode: Encode) -> tuple[Tensor, Tensor]:
        """Features (B, N, F) of what the entities hold under `key`, and a mask (B, N) of those that hold it."""
        held = [(b, n, value) for b, n, entity in entities if (value := key(entity))]
        encoded = encode(list(dict.fromkeys(value for _, _, value in held)))
        out, mask = torch.zeros(*shape, config.feature_dim), torch.zeros(shape)
        for b, n, value in held:
            out[b, n] = encoded[value].float().cpu()
            mask[b, n] = 1
        return out, mask

    text_features, text_masks = features(lambda entity: entity.phrase, encode_phrases)
    inputs = {"boxes": torch.from_numpy(boxes), "masks": torch.from_numpy(masks), "text_features": text_features}
    if config.spec.takes_images:
        image_features, image_masks = features(lambda entity: entity.image, encode_images)
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
