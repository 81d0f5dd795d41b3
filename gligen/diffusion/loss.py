"""The noise-prediction loss, and the ways to weigh it by timestep; shared by every network that learns ε.

Legend: B batch, ε noise, ᾱ = alphas_cumprod, SNR = ᾱ / (1 - ᾱ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gligen.diffusion.schedule import Schedule


def noise_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """‖ε - ε_θ‖² of each sample as a mean over its numbers, (B,) float32 (DDPM eq. 14; latent diffusion eq. 3).

    eps: what the network predicts, noise: what was added (float32), both (B, ...).
    """
    return (eps.float() - noise).square().mean(dim=tuple(range(1, noise.ndim)))


def x0_weights(schedule: Schedule, low: int, high: int, limit: float) -> Tensor:
    """1/ᾱ_t up to `limit`, (T,) float32, scaled to a mean of 1 over the timesteps low … high that are drawn.

    An error of ε at timestep t is one of √((1-ᾱ)/ᾱ) times its size in x₀: nothing where t is small, much where layout
    is decided. Not the paper's, which weighs all timesteps alike.
    """
    weights = (1 / torch.from_numpy(schedule.alphas_cumprod)).clamp(max=limit)
    return (weights / weights[low : high + 1].mean()).float()


def min_snr_weights(schedule: Schedule, timesteps: Tensor, limit: float) -> Tensor:
    """min(SNR, limit) / SNR of timesteps (B,), (B,) float32 (Min-SNR §3.4, Hang et al., 2023, who take 5)."""
    return (limit / schedule.snr(timesteps)).clamp(max=1)
