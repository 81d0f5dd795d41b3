"""From noise to latents: DDPM, DDIM, PLMS, DPM-Solver++, UniPC, Euler, its ancestral form and LCM, one signature.

    latents = SAMPLERS[name](model, x, schedule, num_steps, skip=…, noise=…, before_step=…, on_step=…)

model: `model(x, t, step) -> ε`, where x is (B, ...), t the timestep and step the index of the step, which is what
    scheduled sampling goes by.
x: (B, ...) standard normal at the highest timestep. Never edited in place.
skip: how many of the first steps are left out; x is then what is to be changed, noised to `start_timestep`
    (image-to-image). Steps are counted from the first that is made.
noise: draws standard normal noise like its argument; only called where its factor is not 0.
before_step: `before_step(x, t) -> x`, e.g. to put known pixels back when inpainting.
on_step: `on_step(step, x)`, called with the latents after each step.

Each sampler makes exactly `num_steps - skip` steps. Legend: ᾱ = alphas_cumprod (DDIM writes α); a = ᾱ_t of this step,
a_prev = ᾱ of the next; λ = log √(ᾱ / (1-ᾱ)), half the log signal-to-noise ratio; σ = √((1-ᾱ) / ᾱ), the noise beside a
signal of factor 1; in DDIM alone σ is the noise that a step adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gligen.diffusion.schedule import (
    Schedule,
    consistency_timesteps,
    equal_snr_timesteps,
    previous_timesteps,
    sampling_timesteps,
    spanning_timesteps,
)

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
    """√ᾱ_prev · x̂₀ + √(1 - ᾱ_prev - σ²) · ε: DDIM eq. 12 without its noise term."""
    x0, a_prev = schedule.x0_from_eps(x, t, eps), float(schedule.alphas_cumprod[t_prev])
    return math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * eps


def sample_ddpm(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    skip: int = 0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Ancestral sampling (DDPM alg. 2, Ho et al., 2020) over all T timesteps, or over a subset with its own betas
    (Nichol & Dhariwal, 2021, eq. 19). The last step goes to x₀ itself.
    """
    alphas = schedule.alphas_cumprod
    for i, t, t_prev in _walk(sampling_timesteps(num_steps, schedule.timesteps)[skip:]):
        is_last = i == num_steps - skip - 1
        a = float(alphas[t])
        a_prev = 1.0 if is_last else float(alphas[t_prev])  # ᾱ of x₀ itself is 1
        beta = 1 - a / a_prev  # of this step, longer than one of training where timesteps are left out
        x = before_step(x, t)  # (B, ...), as all that follows
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
    skip: int = 0,
    eta: float = 0.0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """DDIM eq. 12 (Song et al., 2021). eta in [0, 1]: 0 is deterministic, 1 has DDPM's variance (eq. 16)."""
    alphas = schedule.alphas_cumprod
    for i, t, t_prev in _walk(sampling_timesteps(num_steps, schedule.timesteps)[skip:]):
        a, a_prev = float(alphas[t]), float(alphas[t_prev])
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))  # eq. 16: η times DDPM's
        x = before_step(x, t)
        x = ddim_step(schedule, x, model(x, t, i), t, t_prev, sigma)  # (B, ...)
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
    skip: int = 0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Pseudo linear multistep (PNDM eqs. 11-13, Liu et al., 2022), deterministic: num_steps + 1 model calls.

    The first step is pseudo improved Euler, which asks the model again where the step leads; after it, Adams-Bashforth
    of order 2, 3, then 4 over the ε of the steps before. The paper's transfer φ is DDIM's step.
    """
    steps = sampling_timesteps(num_steps, schedule.timesteps)[skip:]
    history: list[Tensor] = []  # ε of up to three steps before, the latest first
    for i, t, t_prev in _walk(steps):
        x = before_step(x, t)
        e = model(x, t, i)  # (B, ...)
        match history:
            case []:
                t_next = steps[min(1, len(steps) - 1)]  # a single step has none, and asks at its own again, as LDM's
                e_prime = (e + model(ddim_step(schedule, x, e, t, t_prev), t_next, i)) / 2
            case [e1]:
                e_prime = (3 * e - e1) / 2
            case [e1, e2]:
                e_prime = (23 * e - 16 * e1 + 5 * e2) / 12
            case [e1, e2, e3]:
                e_prime = (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24
        history = [e, *history[:2]]  # of ε as predicted, not of the combination
        x = ddim_step(schedule, x, e_prime, t, t_prev)
        on_step(i, x)
    return x


def sample_dpmpp(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    skip: int = 0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """DPM-Solver++ alg. 2, its 2M (Lu et al., 2022), deterministic; about 20 steps do what PLMS does in 50.

    Steps are of equal length in λ, half the log signal-to-noise ratio, in which the solver's error is a power of the
    step: for Gaussian data 20 of them err 5 to 20 times less than 20 that are equal in t. With fewer than 15 steps the
    last is of first order, for stability, as in the paper's code.
    """
    alphas = schedule.alphas_cumprod
    half_log_snr = schedule.half_log_snr  # λ
    x0_before: Tensor | None = None
    h_before = 0.0
    for i, (t, t_prev) in enumerate(pairwise(equal_snr_timesteps(num_steps, half_log_snr)[skip:])):
        a, a_prev = float(alphas[t]), float(alphas[t_prev])
        x = before_step(x, t)
        x0 = schedule.x0_from_eps(x, t, model(x, t, i))
        h = float(half_log_snr[t_prev] - half_log_snr[t])  # the length of the step in λ, above 0
        direction = x0
        if x0_before is not None and not (i == num_steps - skip - 1 and num_steps < 15):
            direction = x0 + h / (2 * h_before) * (x0 - x0_before)  # x̂₀ half a step on, along the last two
        x = math.sqrt((1 - a_prev) / (1 - a)) * x - math.sqrt(a_prev) * math.expm1(-h) * direction
        x0_before, h_before = x0, h
        on_step(i, x)
    return x


def sample_unipc(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    skip: int = 0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """UniPC algs. 5 to 8 (Zhao et al., 2023), deterministic: predictor and corrector of order 2 on x̂₀, B(h) = e^h - 1.

    The corrector improves the latents of a step with the x̂₀ found there, which the predictor of the next needs anyway:
    order 3 for one model call a step. Steps as DPM-Solver++'s, the last likewise of first order below 15 steps.
    """
    alphas, half_log_snr = schedule.alphas_cumprod, schedule.half_log_snr
    found: list[tuple[float, Tensor]] = []  # (λ, x̂₀) of up to two steps before, the latest first
    before = x  # the corrected latents of the step before
    points = equal_snr_timesteps(num_steps, half_log_snr)[skip:]
    for i, (t, t_prev) in enumerate(pairwise(points)):
        x = before_step(x, t)
        here = (float(half_log_snr[t]), schedule.x0_from_eps(x, t, model(x, t, i)))
        if found:  # corrects the step that led here, now that its end is known
            x = _unipc_step(before, found, here[0], alphas, (points[i - 1], t), corrects_with=here[1])
        found = [here, *found[:1]]
        before = x
        is_first_order = i == num_steps - skip - 1 and num_steps < 15
        used = found[:1] if is_first_order else found
        x = _unipc_step(before, used, float(half_log_snr[t_prev]), alphas, (t, t_prev))
        on_step(i, x)
    return x


def _unipc_step(
    x: Tensor,
    found: list[tuple[float, Tensor]],
    to: float,
    alphas: np.ndarray,
    steps: tuple[int, int],
    *,
    corrects_with: Tensor | None = None,
) -> Tensor:
    """From the latents x of one timestep to those of the next, by UniP, or by UniC if the next one's x̂₀ is known.

    found: (λ, x̂₀) of the timestep itself and, for second order, of the one before it. to: λ of the next.
    """
    a, a_prev = (float(alphas[t]) for t in steps)
    (at, x0), h = found[0], to - found[0][0]
    b = math.expm1(-h)  # B at -h, since x̂₀ is what is predicted
    direction: Tensor | float
    slope = h * (found[1][1] - x0) / (found[1][0] - at) if len(found) == 2 else None  # of x̂₀, over a step
    if corrects_with is None:
        direction = 0.0 if slope is None else slope / 2
    elif slope is None:
        direction = (corrects_with - x0) / 2
    else:
        # ρ of R(h) ρ = φ(h) / B(h), the paper's condition for order 3, with points at r (behind) and 1 (ahead)
        r = (found[1][0] - at) / h
        phi_1 = b / -h - 1
        phi_2 = 2 * (phi_1 / -h - 0.5)
        rho = (phi_2 - phi_1) / b / (r - 1)
        direction = rho * slope + (phi_1 / b - rho) * (corrects_with - x0)
    return math.sqrt((1 - a_prev) / (1 - a)) * x - math.sqrt(a_prev) * b * (x0 + direction)


def sample_euler(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    skip: int = 0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
    is_ancestral: bool = False,
) -> Tensor:
    """Euler's method on dx̄/dσ = ε, where x̄ = x / √ᾱ (DDIM eq. 14; Karras et al., 2022, alg. 1 without the correction).

    It is DDIM's step; the timesteps, from T-1 to 0, and the end in x₀ itself are what people know under this name.
    is_ancestral: steps down to σ_down and puts noise of σ_up back, as DDPM's posterior has it (k-diffusion's ancestral
        sampling with η = 1): σ_up² = σ_prev² (σ² - σ_prev²) / σ², σ_down² = σ_prev² - σ_up².
    """
    steps = spanning_timesteps(num_steps, schedule.timesteps)[skip:]
    values = [float(schedule.alphas_cumprod[t]) for t in steps] + [1.0]  # ᾱ of each step, and of x₀
    for i, (t, a, a_prev) in enumerate(zip(steps, values, values[1:], strict=False)):
        sigma, sigma_prev = (math.sqrt((1 - value) / value) for value in (a, a_prev))
        up = sigma_prev * math.sqrt(1 - (sigma_prev / sigma) ** 2) if is_ancestral else 0.0
        down = math.sqrt(sigma_prev**2 - up**2)
        x = before_step(x, t)
        x = math.sqrt(a_prev) * (x / math.sqrt(a) + (down - sigma) * model(x, t, i))  # to x̄ and back: (B, ...)
        if up > 0:
            x = x + math.sqrt(a_prev) * up * noise(x)
        on_step(i, x)
    return x


CONSISTENCY_SCALE = 10.0  # of t in the boundary condition, and
CONSISTENCY_SPREAD = 0.5  # the data's spread there: kept for published weights


def sample_lcm(
    model: EpsModel,
    x: Tensor,
    schedule: Schedule,
    num_steps: int,
    *,
    skip: int = 0,
    noise: Noise = torch.randn_like,
    before_step: BeforeStep = _unchanged,
    on_step: OnStep = _ignore,
) -> Tensor:
    """Multistep sampling of a latent consistency model (LCM alg. 3, Luo et al., 2023), for such weights or such a LoRA.

    f = c_skip · x + c_out · x̂₀ (eq. 9), to which each step but the last adds noise again. 1 to 8 steps are usual, with
    a guidance scale of 1 to 2. With weights of another kind it is a poor sampler.
    """
    steps = consistency_timesteps(num_steps, schedule.timesteps)[skip:]
    for i, t in enumerate(steps):
        scaled = CONSISTENCY_SCALE * t
        total = scaled**2 + CONSISTENCY_SPREAD**2
        x = before_step(x, t)
        x0 = schedule.x0_from_eps(x, t, model(x, t, i))
        x = CONSISTENCY_SPREAD**2 / total * x + scaled / math.sqrt(total) * x0  # c_skip · x + c_out · x̂₀, (B, ...)
        if i < len(steps) - 1:
            x = schedule.q_sample(x, steps[i + 1], noise(x))
        on_step(i, x)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "plms": sample_plms,
    "dpmpp": sample_dpmpp,
    "unipc": sample_unipc,
    "euler": sample_euler,
    "euler-ancestral": partial(sample_euler, is_ancestral=True),
    "lcm": sample_lcm,
}


def build_sampler(name: str, eta: float = 0.0) -> Sampler:
    """The sampler called `name`; eta is DDIM's. Raises ValueError naming the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: the known ones are {', '.join(SAMPLERS)}")
    return partial(sample_ddim, eta=eta) if name == "ddim" else SAMPLERS[name]


def start_timestep(name: str, schedule: Schedule, num_steps: int, skip: int) -> int:
    """The timestep that the sampler called `name` begins at where it leaves out the first `skip` steps."""
    if name in ("dpmpp", "unipc"):
        return equal_snr_timesteps(num_steps, schedule.half_log_snr)[skip]
    steps = {"lcm": consistency_timesteps, "euler": spanning_timesteps, "euler-ancestral": spanning_timesteps}
    return steps.get(name, sampling_timesteps)(num_steps, schedule.timesteps)[skip]


def skipped_steps(num_steps: int, strength: float) -> int:
    """The number of first steps that image-to-image of this strength, in (0, 1], leaves out; the last is never."""
    return num_steps - max(1, min(num_steps, math.floor(num_steps * strength + 1e-6)))  # undoes 0.29 · 100 = 28.999…
