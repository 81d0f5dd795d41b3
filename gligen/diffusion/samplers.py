"""From noise to latents: DDPM, DDIM, PLMS and DPM-Solver++, one signature.

    latents = SAMPLERS[name](model, x, schedule, num_steps, noise=…, before_step=…, on_step=…)

model: `model(x, t, step) -> ε`, where x is (B, ...), t the timestep and step the index of the step, which is what
    scheduled sampling goes by.
x: (B, ...) standard normal at the highest timestep. Never edited in place.
noise: draws standard normal noise like its argument; only called where its factor is not 0.
before_step: `before_step(x, t) -> x`, e.g. to put known pixels back when inpainting.
on_step: `on_step(step, x)`, told of the latents after each step.

Each sampler makes exactly `num_steps` steps. Legend: ᾱ = alphas_cumprod; a = ᾱ_t of this step, a_prev = ᾱ of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gligen.diffusion.schedule import Schedule, equal_snr_timesteps, previous_timesteps, sampling_timesteps

EpsModel = Callable[[Tensor, int, int], Tensor]
Noise = Callable[[Tensor], Tensor]
BeforeStep = Callable[[Tensor, int], Tensor]
OnStep = Callable[[int, Tensor], None]
Sampler = Callable[..., Tensor]


def _walk(steps: list[int]) -> Iterator[tuple[int, int, int]]:
    """(index, timestep, timestep it leads to) of each step."""
    return zip(range(len(steps)), steps, previous_timesteps(steps), strict=True)


def _unchanged(x: Tensor, t: int) -> Tensor:
    return x


def _ignore(step: int, x: Tensor) -> None:
    pass


def ddim_step(schedule: Schedule, x: Tensor, eps: Tensor, t: int, t_prev: int, sigma: float = 0.0) -> Tensor:
    """√ā_prev · x̂₀ + √(1 - ā_prev - σ²) · ε: DDIM eq. 12 without its noise term."""
    x0, a_prev = schedule.x0_from_eps(x, t, eps), float(schedule.alphas_cumprod[t_prev])
    return math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * eps


def sample_ddpm(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Ancestral sampling (Ho et al., 2020, alg. 2) over all T timesteps, or over a subset with its own betas
    (Nichol & Dhariwal, 2021, eq. 19). The last step goes to x₀ itself.
    """
    alphas = schedule.alphas_cumprod
    steps = sampling_timesteps(num_steps, schedule.timesteps)
    for i, t, t_prev in _walk(steps):
        is_last = i == num_steps - 1
        a = float(alphas[t])
        a_prev = 1.0 if is_last else float(alphas[t_prev])
        beta = 1 - a / a_prev
        x = before_step(x, t)
        eps = model(x, t, i)
        x0 = schedule.x0_from_eps(x, t, eps)
        # mean and variance of q(x_prev | x_t, x₀): DDPM eqs. 6 and 7
        x = math.sqrt(a_prev) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - a_prev) / (1 - a) * x
        if not is_last:
            x = x + math.sqrt(beta * (1 - a_prev) / (1 - a)) * noise(x)
        on_step(i, x)
    return x


def sample_ddim(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Song et al. (2021), eq. 12. eta in [0, 1]: 0 is deterministic, 1 has DDPM's variance (eq. 16)."""
    alphas = schedule.alphas_cumprod
    for i, t, t_prev in _walk(sampling_timesteps(num_steps, schedule.timesteps)):
        a, a_prev = float(alphas[t]), float(alphas[t_prev])
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x = before_step(x, t)
        x = ddim_step(schedule, x, model(x, t, i), t, t_prev, sigma)
        if sigma > 0:
            x = x + sigma * noise(x)
        on_step(i, x)
    return x


def sample_plms(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Pseudo linear multistep (Liu et al., 2022, eqs. 11-13), deterministic: num_steps + 1 model calls.

    The first step is pseudo improved Euler, which asks the model again where the step leads; after it, Adams-Bashforth
    of order 2, 3, then 4 over the ε of the steps before.
    """
    steps = sampling_timesteps(num_steps, schedule.timesteps)
    history: list[Tensor] = []  # ε of up to three steps before, the latest first
    for i, t, t_prev in _walk(steps):
        x = before_step(x, t)
        e = model(x, t, i)
        match history:
            case []:
                t_next = steps[min(1, num_steps - 1)]
                e_prime = (e + model(ddim_step(schedule, x, e, t, t_prev), t_next, i)) / 2
            case [e1]:
                e_prime = (3 * e - e1) / 2
            case [e1, e2]:
                e_prime = (23 * e - 16 * e1 + 5 * e2) / 12
            case [e1, e2, e3]:
                e_prime = (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24
        history = [e, *history[:2]]
        x = ddim_step(schedule, x, e_prime, t, t_prev)
        on_step(i, x)
    return x


def sample_dpmpp(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, alg. 2), deterministic; about 20 steps do what PLMS does in 50.

    Steps are of equal length in λ, half the log signal-to-noise ratio, in which the solver's error is a power of the
    step: for Gaussian data 20 of them err 5 to 20 times less than 20 that are equal in t. With fewer than 15 steps the
    last is of first order, for stability, as in the paper's code.
    """
    alphas = schedule.alphas_cumprod
    half_log_snr = 0.5 * np.log(alphas / (1 - alphas))  # λ
    x0_before: Tensor | None = None
    h_before = 0.0
    for i, (t, t_prev) in enumerate(pairwise(equal_snr_timesteps(num_steps, half_log_snr))):
        a, a_prev = float(alphas[t]), float(alphas[t_prev])
        x = before_step(x, t)
        x0 = schedule.x0_from_eps(x, t, model(x, t, i))
        h = float(half_log_snr[t_prev] - half_log_snr[t])
        direction = x0
        if x0_before is not None and not (i == num_steps - 1 and num_steps < 15):
            direction = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = math.sqrt((1 - a_prev) / (1 - a)) * x - math.sqrt(a_prev) * math.expm1(-h) * direction
        x0_before, h_before = x0, h
        on_step(i, x)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "plms": sample_plms,
    "dpmpp": sample_dpmpp,
}


def build_sampler(name: str, eta: float = 0.0) -> Sampler:
    """The sampler called `name`; eta is DDIM's. Raises ValueError naming the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: the known ones are {', '.join(SAMPLERS)}")
    return partial(sample_ddim, eta=eta) if name == "ddim" else SAMPLERS[name]
