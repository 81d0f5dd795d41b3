"""Noise by seed: the same for an image whatever its batch and device."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def start_latents(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal latents (B, *shape) float32 on the CPU, each from its own seed and none from its neighbours."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class NoiseStream:
    """Standard normal noise for a batch, each image from its own seed, so that batches do not matter.

    purpose: names the stream. Draws for one purpose never move those of another, so a deterministic sampler gives the
    same image whether or not noise is also drawn for inpainting.
    """

    def __init__(self, seeds: list[int], purpose: str) -> None:
        words = [np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1)[0] for seed in seeds]
        self.generators = [torch.Generator().manual_seed(int(word)) for word in words]

    def __call__(self, like: Tensor) -> Tensor:
        """Noise like `like` (B, ...). Drawn on the CPU in float32, so that it is the same on every device."""
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(like)
