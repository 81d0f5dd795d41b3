"""Keypoints of people: a token for each of their 17."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.grounding.kind import Canvas, Grounded, Kind, Readers, Shown, State, TextEncoder, Write
from gligen.images import COLORS, draw_person
from gligen.modes import Mode
from gligen.modules.embeddings import fourier_frequencies
from gligen.modules.position_net import NUM_KEYPOINTS, GroundingInputs

KEYPOINT_RADIUS = 1 / 16  # half a side of the box as which a keypoint begins, as a fraction of the image's


class Keypoints(Kind):
    """Keypoints of people, COCO's 17 each."""

    marker = "position_net.person_embeddings"
    place = "points"

    def inputs(self, asked: Sequence[Grounded], config: GroundingConfig, readers: Readers) -> GroundingInputs:
        """Makes points (B, 17·P, 2) and masks (B, 17·P) of people, P = config.max_persons."""
        shape = (len(asked), config.max_persons, NUM_KEYPOINTS)
        points, masks = np.zeros((*shape, 2), np.float32), np.zeros(shape, np.float32)
        for b, each in enumerate(asked):
            for p, person in enumerate(each.keypoints):
                for k, point in enumerate(person):
                    if point is not None:
                        points[b, p, k] = point
                        masks[b, p, k] = 1
        return {"points": torch.from_numpy(points).flatten(1, 2), "masks": torch.from_numpy(masks).flatten(1)}

    def asked(self, example: Shown, mode: Mode, write: Write) -> dict[str, Any]:
        return {"keypoints": tuple(example.keypoints)}

    def original_params(self, config: GroundingConfig) -> dict[str, Any]:
        return {"max_persons_per_image": config.max_persons}

    def moved(self, inputs: GroundingInputs) -> GroundingInputs:
        return inputs | {"points": (1 - inputs["points"]) * inputs["masks"][..., None]}

    def draw(self, canvas: Canvas, asked: Grounded) -> None:
        """Draws skeletons, a colour a person."""
        for i, person in enumerate(asked.keypoints):
            draw_person(canvas.draw, person, COLORS[i % len(COLORS)], canvas.line, canvas.image.size)

    def sizes(self, unet: State) -> dict[str, Any]:
        found = {"max_persons": unet[self.marker].shape[0]}
        for name, field, shares in (
            ("null_person_feature", "feature_dim", 1),
            ("null_xy_feature", "num_freqs", 4),  # sine and cosine of x, y
        ):
            if (feature := unet.get(f"position_net.{name}")) is not None:
                found[field] = feature.shape[0] // shares
        return found

    def start_from_boxes(self, boxes: State, fresh: State, text_encoder: TextEncoder) -> dict[str, Tensor]:
        """A keypoint's token begins as that of "a person" in a small box there; person_embeddings are new.

        sin and cos of f·(x ± r) are sums of those of f·x, so a matrix turns what reads Fourier(box) into what reads
        Fourier(point). Only null tokens are not quite the same.
        """
        held = {name: t.read(dtype=torch.float32) for name, t in boxes.items() if name.startswith("position_net.")}
        first, null = held.pop("position_net.linears.0.weight"), held.pop("position_net.null_position_feature")
        num_freqs = len(null) // 8
        box_of_point = torch.zeros(num_freqs, 2, 4, num_freqs, 2, 2)  # (frequency, sine or cosine, side or axis), twice
        for k, freq in enumerate(fourier_frequencies(num_freqs)):
            for side, shift in enumerate((-KEYPOINT_RADIUS,) * 2 + (KEYPOINT_RADIUS,) * 2):  # x0, y0, x1, y1
                sine, cosine = math.sin(freq * shift), math.cos(freq * shift)
                box_of_point[k, :, side, k, :, side % 2] = torch.tensor([[cosine, sine], [-sine, cosine]])
        matrix = box_of_point.reshape(len(null), -1)  # (8·num_freqs, 4·num_freqs)
        with torch.no_grad():
            ids = text_encoder.tokenize(["a person"])[0].to(next(text_encoder.parameters()).device)
            feature = text_encoder.phrase_features(ids)[0].cpu()
        width = len(feature)  # in front of the position, in what the first layer reads
        linears = {name: tensor for name, tensor in held.items() if ".linears." in name}
        return linears | {
            "position_net.linears.0.weight": torch.cat([first[:, :width], first[:, width:] @ matrix], dim=1),
            "position_net.null_xy_feature": torch.linalg.lstsq(matrix, null[:, None]).solution[:, 0],
            "position_net.null_person_feature": held["position_net.null_positive_feature"],
            "position_net.keypoint_embeddings": feature.expand(NUM_KEYPOINTS, -1).clone(),
        }
