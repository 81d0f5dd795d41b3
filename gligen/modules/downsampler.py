"""From a spatially aligned map to extra channels beside the latent, in front of the first convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gligen.config import GroundingConfig
from gligen.modules.position_net import convolve_labels


class MapDownsampler(nn.Module):
    """(B, 3, H, W) in [-1, 1], or labels (B, 1, H, W) -> (B, C', h, w) at the latent's size.

    canny, depth: first channel, normal: all three, sem: one-hot labels; resized to four times the latent's size
    (bicubic; labels nearest), then two 4×4 convolutions of stride 2 with a SiLU between. hed: first channel, resized
    bicubically to the latent's size; no parameters. All as GLIGEN's weights have it.
    """

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        mode = config.spec
        self.num_channels = mode.hint_channels
        self.has_labels = mode.has_labels
        if mode.hint_widths:
            middle, out = mode.hint_widths
            self.layers = nn.Sequential(
                nn.Conv2d(self.num_channels, middle, 4, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(middle, out, 4, stride=2, padding=1),
            )

    def forward(self, map: Tensor, height: int, width: int) -> Tensor:
        """height, width: of the latent."""
        if self.has_labels:
            labels = F.interpolate(map, (4 * height, 4 * width), mode="nearest")  # (B, 1, 4·h, 4·w)
            first, activation, second = self.layers
            assert isinstance(first, nn.Conv2d)
            return second(activation(convolve_labels(first, labels)))  # (B, C', h, w)
        hint = map[:, : self.num_channels]  # all three of a normal map, the first of others
        if not hasattr(self, "layers"):
            return F.interpolate(hint, (height, width), mode="bicubic")
        return self.layers(F.interpolate(hint, (4 * height, 4 * width), mode="bicubic"))
