"""The forward process and the subsets of timesteps that samplers walk back through.

Legend: T = 1000 training steps, t in [0, T), ᾱ = `alphas_cumprod`, x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε (DDPM eq. 4).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Schedule:
    """ᾱ of every timestep, in float64: betas = linspace(√β_start, √β_end, T)² as in latent diffusion.

    alphas_cumprod: (T,) numpy float64. Numbers derived from it are Python floats, so that samplers compute in the
    precision of their latents and stay free of device and dtype.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        self.timesteps = timesteps
        self.betas = np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        bar = self.alphas_cumprod  # (T,)
        self.half_log_snr = 0.5 * np.log(bar / (1.0 - bar))  # λ of every timestep, (T,), descending
        self._values = {"signal": bar**0.5, "noise": (1.0 - bar) ** 0.5, "snr": bar / (1.0 - bar)}
        self._tables: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def q_sample(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_t of x0 (B, ...) and noise of the same shape; t: one timestep, or (B,) of them (DDPM eq. 4)."""
        return self._signal(x0, t) * x0 + self._noise(x0, t) * noise

    def x0_from_eps(self, x: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """The x₀ that x_t and ε imply (DDIM eq. 9)."""
        return (x - self._noise(x, t) * eps) / self._signal(x, t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise ᾱ_t / (1 - ᾱ_t) of timesteps (B,), float32 on their device."""
        return self._table("snr", torch.float32, t.device)[t]

    def _signal(self, like: Tensor, t: int | Tensor) -> Tensor | float:
        return self._gather("signal", like, t)

    def _noise(self, like: Tensor, t: int | Tensor) -> Tensor | float:
        return self._gather("noise", like, t)

    def _gather(self, name: str, like: Tensor, t: int | Tensor) -> Tensor | float:
        if isinstance(t, int):
            return float(self._values[name][t])
        picked = self._table(name, like.dtype, like.device)[t.to(like.device)]
        return picked.view(-1, *[1] * (like.ndim - 1))  # (B, 1, ...), beside (B, ...)

    def _table(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All timesteps' values. Kept, so that a step that is recorded as a graph copies nothing from the host."""
        key = (name, dtype, device)
        if key not in self._tables:
            with torch.inference_mode(False):
                # cast before it moves: not every device has float64
                self._tables[key] = torch.from_numpy(self._values[name]).to(dtype).to(device)
        return self._tables[key]


def sampling_timesteps(num_steps: int, timesteps: int = 1000) -> list[int]:
    """Exactly `num_steps` timesteps, evenly spaced, in descending order: ⌊i·T/S⌋ + 1 for i = S-1 … 0.

    Where S divides T these are DDIM's usual range(0, T, T//S) + 1. For S = T they are 0 … T-1, since T itself is no
    timestep. Raises ValueError unless 1 ≤ num_steps ≤ T.
    """
    if not 1 <= num_steps <= timesteps:
        raise ValueError(f"steps is {num_steps}: give a number from 1 to {timesteps}")
    shift = 1 if num_steps < timesteps else 0
    return [i * timesteps // num_steps + shift for i in reversed(range(num_steps))]


def spanning_timesteps(num_steps: int, timesteps: int = 1000) -> list[int]:
    """Exactly `num_steps` timesteps from T-1 down to 0, evenly spaced and rounded; one step is T-1.

    Raises ValueError unless 1 ≤ num_steps ≤ T.
    """
    sampling_timesteps(num_steps, timesteps)  # refuses what is no number of steps
    return [round((timesteps - 1) * (1 - i / max(num_steps - 1, 1))) for i in range(num_steps)]


def consistency_timesteps(num_steps: int, timesteps: int = 1000) -> list[int]:
    """Exactly `num_steps` of the 50 timesteps T/50 · k - 1 that latent consistency models are distilled at.

    Evenly picked from the highest on (999, 759, 499, 259 for 4). More than 50 steps take as many timesteps instead.
    Raises ValueError unless 1 ≤ num_steps ≤ T.
    """
    sampling_timesteps(num_steps, timesteps)  # refuses what is no number of steps
    trained = min(max(50, num_steps), timesteps)
    return [(trained - i * trained // num_steps) * timesteps // trained - 1 for i in range(num_steps)]


def previous_timesteps(steps: list[int]) -> list[int]:
    """The timestep that each of `sampling_timesteps` leads to: the next one, at the end 0 (ᾱ₀, as published)."""
    return [*steps[1:], 0]


def equal_snr_timesteps(num_steps: int, half_log_snr: np.ndarray) -> list[int]:
    """Gives num_steps + 1 timesteps from T-1 down to 0, as nearly equal in λ as whole, different timesteps can be.

    half_log_snr: λ of every timestep, (T,), descending. For T steps the last one stays at 0.
    Raises ValueError unless 1 ≤ num_steps ≤ T.
    """
    timesteps = len(half_log_snr)
    if not 1 <= num_steps < timesteps:
        return [*sampling_timesteps(num_steps, timesteps), 0]
    targets = np.linspace(half_log_snr[-1], half_log_snr[0], num_steps + 1)
    points: list[int] = []
    for i, target in enumerate(targets):
        nearest = int(np.abs(half_log_snr - target).argmin())
        below_last = points[-1] - 1 if points else timesteps - 1
        points.append(max(min(nearest, below_last), num_steps - i))  # leaves room for those that follow
    return points
