"""Spatially aligned maps: edges, depth, normals, labels, one image of the result's shape."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.grounding.kind import Grounded, Kind, Readers, Shown, State, TextEncoder, Write
from gligen.image_files import ImageSource
from gligen.images import label_tensor, load_map, to_tensor
from gligen.modes import Mode
from gligen.modules.embeddings import fourier_embed
from gligen.modules.position_net import GroundingInputs

TRUNK = "position_net.convnext_tiny_backbone"
TRUNK_END = f"{TRUNK}.downsample_layers.3.1"  # ConvNeXt's last change of width


class Maps(Kind):
    """A map, whose tokens lie on its grid and whose pixels also reach the first convolution."""

    marker = "position_net.pos_embedding"
    place = "map"

    def inputs(self, asked: Sequence[Grounded], config: GroundingConfig, readers: Readers) -> GroundingInputs:
        """Makes map (B, C, H, W) and mask (B, 1); where there is none, zeros under mask 0."""
        maps = [None if each.map is None else read_map(each.map, config.spec, readers.size) for each in asked]
        empty = torch.zeros(1 if config.spec.has_labels else config.spec.map_channels, *reversed(readers.size))
        empty = next((torch.zeros_like(m) for m in maps if m is not None), empty)
        return {
            "map": torch.stack([empty.float() if m is None else m.float() for m in maps]),
            "mask": torch.tensor([[float(m is not None)] for m in maps]),
        }

    def asked(self, example: Shown, mode: Mode, write: Write) -> dict[str, Any]:
        return {mode.field: write("map", example.map)} if isinstance(example.map, np.ndarray) else {}

    def original_params(self, config: GroundingConfig) -> dict[str, Any]:
        labels = {"in_dim": config.spec.map_channels} if config.spec.has_labels else {}
        return {"resize_input": config.map_size} | labels

    def moved(self, inputs: GroundingInputs) -> GroundingInputs:
        return inputs | {"map": inputs["map"].flip(-1, -2)}

    def matches(self, mode: Mode, unet: State) -> bool:
        """Decides by the channels that the map has, and by its downsampler where the file holds one."""
        in_conv = unet.get("position_net.in_conv.weight")
        if mode.map_channels != (in_conv.shape[1] if in_conv is not None else 3):
            return False
        first, second = (unet.get(f"downsample_net.layers.{i}.weight") for i in (0, 2))
        if first is not None and second is not None:
            return mode.hint_widths == (first.shape[0], second.shape[0]) and mode.hint_channels == first.shape[1]
        return "time_embed.0.weight" not in unet or not mode.hint_widths  # a pruned file holds none, a whole one all

    def sizes(self, unet: State) -> dict[str, Any]:
        stages = [re.fullmatch(rf"{re.escape(TRUNK)}\.stages\.(\d+)\.(\d+)\.gamma", name) for name in unet]
        found = sorted((int(stage[1]), int(stage[2]) + 1) for stage in stages if stage)
        depths = list(dict(found).values())  # the last block of each
        return {
            "map_depths": tuple(depths),
            "map_dims": tuple(unet[f"{TRUNK}.stages.{i}.0.gamma"].shape[0] for i in range(len(depths))),
            "map_size": math.isqrt(unet[self.marker].shape[1]) * 2 ** (len(depths) + 1),
        }

    def start_from_boxes(self, boxes: State, fresh: State, text_encoder: TextEncoder) -> dict[str, Tensor]:
        """A cell's token begins as that of "an object" in a box as large as the cell.

        Nothing where the trunk is narrower than phrase and box together. The trunk's features are added to the
        phrase's, so that it need only learn which phrase a cell deserves; where that is, the fusers know.
        """
        held = {name: t.read(dtype=torch.float32) for name, t in boxes.items() if name.startswith("position_net.")}
        first, null_text = held["position_net.linears.0.weight"], held["position_net.null_positive_feature"]
        positions = fresh["position_net.pos_embedding"].read(dtype=torch.float32)  # (1, N, W)
        cells, width = positions.shape[1:]
        side, features = math.isqrt(cells), len(null_text)
        linears = [name for name in held if ".linears." in name]
        if width < first.shape[1] or any(
            held[n].shape != fresh[n].shape for n in linears if n != "position_net.linears.0.weight"
        ):
            return {}
        at = torch.arange(side) / side
        left, top = at.repeat(side), at.repeat_interleave(side)  # (N,) each, row by row
        cell_boxes = torch.stack([left, top, left + 1 / side, top + 1 / side], dim=-1)  # (N, 4)
        with torch.no_grad():
            ids = text_encoder.tokenize(["an object"])[0].to(next(text_encoder.parameters()).device)
            phrase = text_encoder.phrase_features(ids)[0].cpu()
        asked = torch.cat(
            [phrase.expand(cells, -1), fourier_embed(cell_boxes, (first.shape[1] - features) // 8)], dim=-1
        )
        begun = torch.zeros(1, cells, width)  # the learned positions, in which phrase and box stand first
        begun[0, :, : first.shape[1]] = asked
        null = torch.zeros(width)
        null[:features] = null_text - phrase  # the position's phrase is added to it again
        last = {leaf: fresh[f"{TRUNK_END}.{leaf}"].read(dtype=torch.float32).clone() for leaf in ("weight", "bias")}
        for tensor in last.values():
            tensor[features : first.shape[1]] = 0  # a place is not the map's to change, at first
        rest = torch.zeros(len(first), width - first.shape[1])
        return {name: held[name] for name in linears} | {
            "position_net.linears.0.weight": torch.cat([first, rest], dim=1),
            "position_net.pos_embedding": begun,
            "position_net.null_feature": null,
            **{f"{TRUNK_END}.{leaf}": tensor for leaf, tensor in last.items()},
        }


def read_map(source: ImageSource | NDArray[np.uint8], mode: Mode, size: tuple[int, int]) -> Tensor:
    """A map as its tokenizer reads it: labels (1, H, W) int64, or (3, H, W) in [-1, 1].

    A file or image is fitted to the size (width, height) and checked, as `load_map`; an example's pixels are as they
    should be.
    """
    if not isinstance(source, np.ndarray):
        return load_map(source, mode.name, *size)
    image = Image.fromarray(source)
    return label_tensor(image) if mode.has_labels else to_tensor(image.convert("RGB"))
