"""Boxes with phrases, and boxes with phrases and reference images: a slot of tokens for each entity."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.grounding.kind import Canvas, Grounded, Kind, Readers, Shown, State, TextEncoder, Write
from gligen.image_files import ImageSource
from gligen.images import COLORS, draw_label, legible
from gligen.modes import Mode
from gligen.modules.position_net import GroundingInputs
from gligen.request import STYLE_BOX, Entity


def image_key(source: ImageSource) -> str | int:
    """The key that an image is known by: the path of a file, the identity of one in memory (which cannot be hashed)."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else id(source)


class Boxes(Kind):
    """Phrases in boxes."""

    marker = "position_net.null_positive_feature"
    place = "boxes"

    def inputs(self, asked: Sequence[Grounded], config: GroundingConfig, readers: Readers) -> GroundingInputs:
        """Makes boxes (B, N, 4), masks (B, N) and text_features (B, N, F) of entities, N = config.max_entities."""
        entities, shape = _entities(asked), (len(asked), config.max_entities)
        # numpy writes single numbers five times as fast as torch does
        boxes, masks = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
        for b, n, entity in entities:
            boxes[b, n] = entity.box
            masks[b, n] = 1
        phrases = [(b, n, entity.phrase) for b, n, entity in entities if entity.phrase]
        different = list(dict.fromkeys(text for *_, text in phrases))
        text_features, _ = _features(phrases, readers.phrases(different), (*shape, config.feature_dim))
        return {"boxes": torch.from_numpy(boxes), "masks": torch.from_numpy(masks), "text_features": text_features}

    def asked(self, example: Shown, mode: Mode, write: Write) -> dict[str, Any]:
        return {"entities": tuple(example.entities)}

    def original_params(self, config: GroundingConfig) -> dict[str, Any]:
        return {"in_dim": config.feature_dim}

    def moved(self, inputs: GroundingInputs) -> GroundingInputs:
        return inputs | {"boxes": (1 - inputs["boxes"][..., [2, 3, 0, 1]]) * inputs["masks"][..., None]}

    def draw(self, canvas: Canvas, asked: Grounded) -> None:
        """Draws boxes in colours, each with its phrase."""
        W, H = canvas.image.size
        places = [(entity, COLORS[i % len(COLORS)]) for i, entity in enumerate(asked.entities)]
        for entity, color in places:
            if entity.box != STYLE_BOX:
                x0, y0, x1, y1 = entity.box
                corners = (round(x0 * (W - 1)), round(y0 * (H - 1)), round(x1 * (W - 1)), round(y1 * (H - 1)))
                canvas.draw.rectangle(corners, outline=color, width=canvas.line)
        taken: list[tuple[float, ...]] = []
        for i, (entity, color) in enumerate(places):  # after all boxes, so that no line crosses a label
            is_style = entity.box == STYLE_BOX
            text = entity.phrase or ("(style)" if is_style else "(image)")
            text, font = legible(" ".join(text.split()), i + 1, max(9, round(min(W, H) / 32)))
            x, y = (0.0, 0.0) if is_style else (entity.box[0] * (W - 1), entity.box[1] * (H - 1))
            taken.append(draw_label(canvas.draw, text, font, (x, y), color, taken, canvas.image.size))

    def sizes(self, unet: State) -> dict[str, Any]:
        feature, position = unet.get(self.marker), unet.get("position_net.null_position_feature")
        found = {} if feature is None else {"feature_dim": feature.shape[0]}
        # sine and cosine of x0, y0, x1, y1
        return found if position is None else found | {"num_freqs": position.shape[0] // 8}


class BoxesAndImages(Boxes):
    """Phrases, reference images or both in boxes."""

    marker = "position_net.null_text_feature"
    mlp = "linears_text"

    def inputs(self, asked: Sequence[Grounded], config: GroundingConfig, readers: Readers) -> GroundingInputs:
        """The inputs of Boxes, and text_masks (B, N), image_features (B, N, F) and image_masks (B, N)."""
        inputs = super().inputs(asked, config, readers)
        entities, shape = _entities(asked), (len(asked), config.max_entities, config.feature_dim)
        images = [(b, n, entity.image) for b, n, entity in entities if entity.image is not None]
        different = {image_key(source): source for *_, source in images}
        image_features, image_masks = _features(
            [(b, n, image_key(source)) for b, n, source in images], readers.images(list(different.values())), shape
        )
        text_masks = torch.zeros(shape[:2])
        for b, n, entity in entities:
            text_masks[b, n] = float(bool(entity.phrase))
        return inputs | {"text_masks": text_masks, "image_features": image_features, "image_masks": image_masks}

    def asked(self, example: Shown, mode: Mode, write: Write) -> dict[str, Any]:
        pairs = zip(example.entities, example.references or (None,) * len(example.entities), strict=True)
        return {
            "entities": tuple(
                entity if pixels is None else replace(entity, image=write(f"entity-{k}", pixels))
                for k, (entity, pixels) in enumerate(pairs)
            )
        }

    def start_from_boxes(self, boxes: State, fresh: State, text_encoder: TextEncoder) -> dict[str, Tensor]:
        """Both MLPs are the phrases' own."""

        def source(name: str) -> str:
            return re.sub(r"linears_(text|image)", "linears", re.sub(r"null_(text|image)_", "null_positive_", name))

        own = [name for name in fresh if name.startswith("position_net.")]
        return {name: boxes[source(name)].read(dtype=torch.float32) for name in own}


def _entities(asked: Sequence[Grounded]) -> list[tuple[int, int, Entity]]:
    """Every entity, with the number of its request and its own there."""
    return [(b, n, entity) for b, each in enumerate(asked) for n, entity in enumerate(each.entities)]


def _features(
    held: Sequence[tuple[int, int, str | int]], encoded: Mapping[Any, Tensor], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Features (B, N, F) of what entity n of request b holds, and a mask (B, N) of those that hold something."""
    out, mask = torch.zeros(shape), torch.zeros(shape[:2])
    for b, n, key in held:
        out[b, n] = encoded[key].float().cpu()
        mask[b, n] = 1
    return out, mask
