"""The change of size that UNet and autoencoder share; their downsamplings differ in padding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a convolution. (B, C, H, W) -> (B, C, 2·H, 2·W).

    size: (height, width) where the half was rounded up: the doubled map's last row or column is then left out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")  # (B, C, 2·H, 2·W)
        return self.conv(x if size is None else x[:, :, : size[0], : size[1]])
