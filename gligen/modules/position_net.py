"""Grounding tokens: what (a phrase, an image, a keypoint, a map) and where (box, point, grid) in one vector.

`build_position_net(config)` gives the tokenizer of a mode; `tokens = position_net(**inputs)`, where `inputs` is a dict
of tensors called *grounding inputs* throughout. Legend: B batch, N token slots, D token width, F feature width.

Masks are floats, 1 for present. Where a mask is 0 a learned null feature stands in, so that
- the content of an empty slot does not matter, and
- inputs whose masks are all 0 are the null grounding, of classifier-free guidance and of training's dropping alike
  (`null_where`; `null_inputs` where there are no inputs to take it of).

Inputs may stay in float32 whatever the model's precision; coordinates should, since bfloat16 has them to 1/256 only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.config import GroundingConfig
from gligen.modules.convnext import ConvNeXt
from gligen.modules.embeddings import fourier_embed

GroundingInputs = dict[str, Tensor]
NUM_KEYPOINTS = 17  # COCO's


def null_where(inputs: GroundingInputs, dropped: Tensor) -> GroundingInputs:
    """Grounding inputs with the null grounding, all masks 0, for the samples where `dropped` (B,) is true.

    A guided model must know both: training drops at random (Ho & Salimans alg. 1), sampling asks for the null branch.
    Masks are the inputs whose names end in "mask" or "masks".
    """
    masks = {name: value for name, value in inputs.items() if name.endswith(("mask", "masks"))}
    return inputs | {n: value.masked_fill(dropped.view(-1, *[1] * (value.ndim - 1)), 0) for n, value in masks.items()}


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The three-layer MLP that ends every tokenizer (GLIGEN eq. 5)."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, out_dim),
    )


def blend_null(value: Tensor, mask: Tensor, null: Tensor) -> Tensor:
    """value (..., F) where mask (...) is 1, the learned null feature (F,) where it is 0, in the latter's dtype.

    So the tokenizer can be told of nothing, as guidance needs it (Ho & Salimans alg. 1).
    """
    value, mask = value.to(null.dtype), mask[..., None].to(null.dtype)
    return value * mask + null * (1 - mask)


class PositionNet(nn.Module, ABC):
    """A grounding tokenizer: grounding inputs -> (B, N, D)."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each grounding input of one sample."""

    def null_inputs(self, batch: int) -> GroundingInputs:
        """The null grounding of `batch` samples, content and masks 0, on this module's device and dtype."""
        like = next(self.parameters())
        return {name: like.new_zeros(batch, *shape) for name, shape in self.input_shapes().items()}


class BoxTextNet(PositionNet):
    """Phrases in boxes: h = MLP([f_text(e), Fourier(l)]) (GLIGEN eq. 5)."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__(config)
        position_dim = 2 * config.num_freqs * 4
        self.linears = mlp(config.feature_dim + position_dim, config.hidden_dim, config.token_dim)
        self.null_positive_feature = nn.Parameter(torch.zeros(config.feature_dim))
        self.null_position_feature = nn.Parameter(torch.zeros(position_dim))

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        n = self.config.max_entities
        return {"boxes": (n, 4), "masks": (n,), "text_features": (n, self.config.feature_dim)}

    def forward(self, boxes: Tensor, masks: Tensor, text_features: Tensor) -> Tensor:
        """boxes: (B, N, 4) xyxy in [0, 1]; masks: (B, N); text_features: (B, N, F). Returns (B, N, D)."""
        # (B, N, 8·num_freqs), (B, N, F)
        position = blend_null(fourier_embed(boxes, self.config.num_freqs), masks, self.null_position_feature)
        text = blend_null(text_features, masks, self.null_positive_feature)
        return self.linears(torch.cat([text, position], dim=-1))  # (B, N, F + 8·num_freqs) -> (B, N, D)


class BoxTextImageNet(PositionNet):
    """Phrases and reference images in boxes (GLIGEN §4.1); two tokens an entity, all texts before all images."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__(config)
        position_dim = 2 * config.num_freqs * 4
        self.linears_text = mlp(config.feature_dim + position_dim, config.hidden_dim, config.token_dim)
        self.linears_image = mlp(config.feature_dim + position_dim, config.hidden_dim, config.token_dim)
        self.null_text_feature = nn.Parameter(torch.zeros(config.feature_dim))
        self.null_image_feature = nn.Parameter(torch.zeros(config.feature_dim))
        self.null_position_feature = nn.Parameter(torch.zeros(position_dim))

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        n, f = self.config.max_entities, self.config.feature_dim
        return {
            "boxes": (n, 4),
            "masks": (n,),
            "text_masks": (n,),
            "image_masks": (n,),
            "text_features": (n, f),
            "image_features": (n, f),
        }

    def forward(
        self,
        boxes: Tensor,
        masks: Tensor,
        text_masks: Tensor,
        image_masks: Tensor,
        text_features: Tensor,
        image_features: Tensor,
    ) -> Tensor:
        """BoxTextNet's inputs, with image_features (B, N, F) and a mask (B, N) for each of an entity's two features.

        Returns (B, 2·N, D).
        """
        # (B, N, 8·num_freqs), (B, N, F), (B, N, F)
        position = blend_null(fourier_embed(boxes, self.config.num_freqs), masks, self.null_position_feature)
        text = blend_null(text_features, text_masks, self.null_text_feature)
        image = blend_null(image_features, image_masks, self.null_image_feature)
        text_tokens = self.linears_text(torch.cat([text, position], dim=-1))  # (B, N, D)
        image_tokens = self.linears_image(torch.cat([image, position], dim=-1))  # (B, N, D)
        return torch.cat([text_tokens, image_tokens], dim=1)  # (B, 2·N, D)


class KeypointNet(PositionNet):
    """Keypoints of people (GLIGEN §4.1): token 17·p + k carries person p's keypoint k; both embeddings are added."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__(config)
        position_dim = 2 * config.num_freqs * 2
        self.person_embeddings = nn.Parameter(torch.zeros(config.max_persons, config.token_dim))
        self.keypoint_embeddings = nn.Parameter(torch.zeros(NUM_KEYPOINTS, config.token_dim))
        self.linears = mlp(config.token_dim + position_dim, config.hidden_dim, config.token_dim)
        self.null_person_feature = nn.Parameter(torch.zeros(config.token_dim))
        self.null_xy_feature = nn.Parameter(torch.zeros(position_dim))

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        n = self.config.max_persons * NUM_KEYPOINTS
        return {"points": (n, 2), "masks": (n,)}

    def forward(self, points: Tensor, masks: Tensor) -> Tensor:
        """points: (B, 17·P, 2) xy in [0, 1]; masks: (B, 17·P). Returns (B, 17·P, D)."""
        identity = self.person_embeddings[:, None] + self.keypoint_embeddings[None]  # (P, 17, D)
        identity = blend_null(identity.flatten(0, 1), masks, self.null_person_feature)  # (B, 17·P, D)
        # (B, 17·P, 4·num_freqs)
        position = blend_null(fourier_embed(points, self.config.num_freqs), masks, self.null_xy_feature)
        return self.linears(torch.cat([identity, position], dim=-1))  # (B, 17·P, D)


class MapNet(PositionNet):
    """A spatially aligned map (GLIGEN §4.1): ConvNeXt features on their grid, row by row, plus a learned position."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__(config)
        mode = config.spec
        self.num_labels = mode.map_channels if mode.has_labels else 0
        if self.num_labels:
            self.in_conv = nn.Conv2d(self.num_labels, 3, 3, padding=1)
        self.convnext_tiny_backbone = ConvNeXt(config.map_depths, config.map_dims)
        width = config.map_dims[-1]
        self.pos_embedding = nn.Parameter(torch.empty(1, config.num_map_tokens, width).normal_(std=0.02))
        self.null_feature = nn.Parameter(torch.zeros(width))
        self.linears = mlp(width, config.hidden_dim, config.token_dim)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.config.map_size
        return {"map": (1 if self.num_labels else 3, size, size), "mask": (1,)}

    def forward(self, map: Tensor, mask: Tensor) -> Tensor:
        """map: (B, 3, H, W) in [-1, 1], or labels (B, 1, H, W) for 'sem'; mask: (B, 1). Returns (B, N, D).

        The map may have any size: it is resized (nearest) to the size the trunk was trained at.
        """
        # (B, 3 or 1, map_size, map_size)
        x = F.interpolate(map.to(self.null_feature.dtype), (self.config.map_size, self.config.map_size), mode="nearest")
        if self.num_labels:
            x = convolve_labels(self.in_conv, x)  # (B, 3, map_size, map_size)
        features = self.convnext_tiny_backbone(x).flatten(2).transpose(1, 2)  # (B, N, width)
        features = blend_null(features, mask.expand(-1, features.shape[1]), self.null_feature)
        return self.linears(features + self.pos_embedding)  # (B, N, width) -> (B, N, D)


def convolve_labels(conv: nn.Conv2d, labels: Tensor) -> Tensor:
    """A convolution (B, C, h, w) of label ids (B, 1, H, W), numbers of any dtype, as one-hot channels of that dtype.

    On a CPU of the labels that occur alone: all others' channels are 0, and most of 152 are others' (an eleventh of the
    time with 9 labels). Elsewhere to know which occur would mean waiting for the device.
    """
    ids, weight = labels[:, 0].long(), conv.weight  # (B, H, W)
    if labels.device.type == "cpu":
        found, ids = ids.unique(return_inverse=True)
        weight = weight[:, found]
    channels = F.one_hot(ids, weight.shape[1]).permute(0, 3, 1, 2).to(labels.dtype)  # (B, labels, H, W)
    return F.conv2d(channels, weight, conv.bias, conv.stride, conv.padding)


_NETS: dict[str, type[PositionNet]] = {
    "box-text": BoxTextNet,
    "box-text-image": BoxTextImageNet,
    "keypoint": KeypointNet,
    "map": MapNet,
}


def build_position_net(config: GroundingConfig) -> PositionNet:
    """The tokenizer of the config's mode."""
    return _NETS[config.spec.kind](config)
