"""Layers written for the compiler: the same numbers as the plain ones, in a form that it makes faster code of.

Put in place of the plain ones by `gligen.runtime.optimize`, where a pipeline is compiled for CUDA. Parameter names do
not change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.modules.resample import Upsample


class ChannelsLastGroupNorm(nn.GroupNorm):
    """GroupNorm whose sums run over pixels first, channel by channel, and over a group's channels last.

    The compiler makes one reduction of `nn.GroupNorm`: over a group's pixels *and* channels, of which channels last
    keeps only C / G side by side (10 of Stable Diffusion's 320), so that a read fetches a few bytes of each line. Here
    neighbouring threads read neighbouring channels, and what came before (a bias, the timestep) joins the reading.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) of any dtype; statistics and scaling are float32."""
        (B, C, _, _), G = input.shape, self.num_groups
        x = input.float()
        # sums of squares around a value of the channel's own, or they would cancel where a mean is far from 0
        pivot = x[:, :, :1, :1]  # (B, C, 1, 1)
        centred = x - pivot
        mean = centred.mean((2, 3))  # (B, C)
        variance = (centred.square().mean((2, 3)) - mean.square()).view(B, G, -1)  # (B, G, C / G)
        mean = (mean + pivot[:, :, 0, 0]).view(B, G, -1)  # (B, G, C / G)
        # a group's variance is its channels' mean variance and the variance of their means
        group_mean = mean.mean(-1, keepdim=True)  # (B, G, 1)
        group_variance = (variance + (mean - group_mean).square()).mean(-1, keepdim=True)  # (B, G, 1)
        scale = (group_variance + self.eps).rsqrt() * self.weight.float().view(G, -1)  # (B, G, C / G)
        shift = self.bias.float().view(G, -1) - group_mean * scale
        return torch.addcmul(shift.reshape(B, C, 1, 1), x, scale.reshape(B, C, 1, 1)).to(input.dtype)


class TransposedUpsample(Upsample):
    """Nearest neighbour and a 3×3 convolution as one transposed 4×4 convolution of stride 2.

    Each pixel of the doubled map sees 2×2 pixels of the small one, some of them through several of the nine weights,
    which are added up beforehand: 4 multiplications instead of 9, and the doubled map is never written.
    """

    weight: Tensor

    def sum_weights(self) -> None:
        """Makes the 4×4 weights, anew when the convolution's have changed."""
        rows = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)  # 4 of 3
        rows = rows.to(self.conv.weight.device)
        weight = torch.einsum("yd,xe,oide->ioyx", rows, rows, self.conv.weight.detach().float())  # (C, C, 4, 4)
        weight = weight.to(self.conv.weight.dtype).to(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None:  # beyond the edge are zeros, not the row that was left out
            return super().forward(x, size)
        return F.conv_transpose2d(x, self.weight, self.conv.bias, stride=2, padding=1)  # (B, C, 2·H, 2·W)


def write_for_compiler(model: nn.Module, *, sums: bool = True) -> None:
    """Changes the kind of every layer that has a faster form here, in place; parameters stay.

    For inference, once the weights are final. sums: also those that keep sums of weights beside them, which do not move
    with the weights afterwards.
    """
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm
        elif sums and type(module) is Upsample:
            module.__class__ = TransposedUpsample
            module.sum_weights()  # type: ignore[operator]  # of its new class
