"""Fixed features of numbers: of the timestep, and of normalised coordinates."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

NUM_TIMESTEPS = 1000  # T of latent diffusion and of every published model


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of the timestep, cosines first (DDPM's, in LDM's order).

    timesteps: (B,) integers in [0, T). Returns (B, dim) float32 whatever the default dtype: frequencies in lower
    precision would move ε. `dim` must be even.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)  # (dim/2,)
    angles = timesteps[:, None].float() * freqs.to(timesteps.device)  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fourier_frequencies(num_freqs: int) -> list[float]:
    """100^(k/num_freqs) for k = 0 … num_freqs - 1, what `fourier_embed` multiplies coordinates by, to float32."""
    return [float(np.float32(100.0 ** (k / num_freqs))) for k in range(num_freqs)]


def fourier_embed(coords: Tensor, num_freqs: int = 8) -> Tensor:
    """Sine and cosine features of normalised coordinates, Fourier(l) of grounding tokens (GLIGEN eq. 5).

    coords: (..., K) fractions of image width and height in [0, 1]; K is 4 for xyxy boxes, 2 for points.
    Returns (..., 2·num_freqs·K): for each of the frequencies all K sines, then all K cosines.
    Trained weights depend on this order, and on there being no 2π.
    """
    # by numbers, not by a tensor of them: a training step that is recorded can copy nothing from the host
    angles = torch.stack([coords * freq for freq in fourier_frequencies(num_freqs)], dim=-2)  # (..., num_freqs, K)
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)  # (..., num_freqs, 2, K), flattened
