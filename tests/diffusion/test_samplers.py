"""Properties of schedules, gates and samplers, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gligen import request
from gligen.diffusion.guidance import gate_schedule, guide
from gligen.diffusion.samplers import SAMPLERS, build_sampler, skipped_steps, start_timestep
from gligen.diffusion.schedule import Schedule, equal_snr_timesteps, sampling_timesteps
from tests.conftest import case

SCHEDULE = Schedule()
SPREAD = 0.6  # of the data in `gaussian_model`


def exact_model(x0):
    """ε that x_t and a known x₀ imply."""

    def model(x, t, step):
        a = float(SCHEDULE.alphas_cumprod[t])
        return (x - math.sqrt(a) * x0) / math.sqrt(1 - a)

    return model


def gaussian_model(x, t, step):
    """The best possible ε for data N(0, SPREAD²): √(1-ᾱ) x / Var(x_t)."""
    a = float(SCHEDULE.alphas_cumprod[t])
    return math.sqrt(1 - a) * x / (a * SPREAD**2 + 1 - a)


def no_noise(x):
    raise AssertionError("noise was drawn")


def test_the_request_knows_every_sampler():
    assert set(request.SAMPLERS) == set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [2, 7, 20, 30])
def test_every_sampler_recovers_x0_from_exact_eps(name, num_steps):
    torch.manual_seed(0)
    x0, start = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    before = start.clone()
    final = build_sampler(name)(exact_model(x0), start, SCHEDULE, num_steps)
    assert torch.equal(start, before)
    if name in ("ddpm", "euler", "euler-ancestral"):
        assert torch.allclose(final, x0)
    elif name == "lcm":  # its boundary condition mixes c_skip of the last latents in, at most 2e-4 for 30 steps
        assert torch.allclose(final, x0, atol=1e-3)
    else:  # the others keep ε and end at timestep 0: x = √ᾱ₀ x₀ + √(1-ᾱ₀) ε
        first = 999 if name in ("dpmpp", "unipc") else sampling_timesteps(num_steps)[0]
        eps = exact_model(x0)(start, first, 0)
        assert torch.allclose(final, SCHEDULE.q_sample(x0, 0, eps))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [*range(1, 40), 101, 251, 333, 499, 501, 999, 1000])
def test_exactly_as_many_steps_as_asked_all_of_them_in_range(name, num_steps):
    seen, steps = [], []

    def model(x, t, step):
        seen.append(t)
        return x

    build_sampler(name)(model, torch.zeros(1, 1), SCHEDULE, num_steps, on_step=lambda i, x: steps.append(i))
    assert steps == list(range(num_steps))
    assert len(seen) == num_steps + (name == "plms")
    assert all(isinstance(t, int) and 0 <= t <= 999 for t in seen)
    assert len(set(seen)) == num_steps


@pytest.mark.parametrize("num_steps", range(1, 1001))
def test_timesteps_descend_and_keep_the_originals_where_it_divides(num_steps):
    steps = sampling_timesteps(num_steps)
    assert len(steps) == num_steps
    assert steps == sorted(set(steps), reverse=True)
    assert 0 <= steps[-1] <= steps[0] <= 999
    if 1000 % num_steps == 0 and num_steps < 1000:
        assert steps[::-1] == [t + 1 for t in range(0, 1000, 1000 // num_steps)]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    for name in SAMPLERS:
        with pytest.raises(ValueError, match="1 to 1000"):
            build_sampler(name)(gaussian_model, torch.zeros(1, 1), SCHEDULE, num_steps)


def test_an_unknown_sampler_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"heun.*ddpm, ddim, plms, dpmpp, unipc, euler, euler-ancestral, lcm"):
        build_sampler("heun")


@pytest.mark.parametrize("name", ["ddim", "plms", "dpmpp", "unipc", "euler"])
def test_deterministic_samplers_draw_no_noise(name):
    build_sampler(name)(gaussian_model, torch.ones(1, 1), SCHEDULE, 10, noise=no_noise)


def ode_error(name: str, num_steps: int, schedule: Schedule = SCHEDULE) -> float:
    """Distance from the exact solution of the probability-flow ODE, which for Gaussian data only scales x."""
    first = []

    def model(x, t, step):
        first.append(t)
        a = float(schedule.alphas_cumprod[t])
        return math.sqrt(1 - a) * x / (a * SPREAD**2 + 1 - a)

    x = torch.ones(1, dtype=torch.float64)
    final = build_sampler(name)(model, x, schedule, num_steps)
    last = 1.0 if name == "euler" else schedule.alphas_cumprod[0]  # Euler ends in x₀ itself
    variance = [a * SPREAD**2 + 1 - a for a in (schedule.alphas_cumprod[first[0]], last)]
    return abs(final.item() - math.sqrt(variance[1] / variance[0]))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1.0), ("plms", 2.0), ("dpmpp", 2.0), ("euler", 1.0)])
def test_samplers_converge_at_their_order(name, order):
    """Four times the steps bring the error down by about 4^order; 15 % of the order is left to the far end."""
    assert ode_error(name, 20) / ode_error(name, 80) > 4 ** (0.85 * order)


def test_unipc_converges_with_the_third_power_where_timesteps_are_fine_enough():
    """Of 1000 timesteps whole ones limit it: of 100 times as many the error falls by nearly 4³ for four times the
    steps."""
    fine = Schedule(timesteps=100_000, beta_start=0.0000085, beta_end=0.00012)
    assert ode_error("unipc", 20, fine) / ode_error("unipc", 80, fine) > 4 ** (0.85 * 3)
    assert ode_error("unipc", 20) < ode_error("dpmpp", 20) / 2


def published_euler(num_steps: int, noise: list[float], ancestral: bool) -> float:
    """Karras et al.'s and k-diffusion's form, on x̄ = x / √ᾱ with the denoiser D(x̄, σ) = s² x̄ / (s² + σ²)."""
    times = np.round(np.linspace(999, 0, num_steps)).astype(int)
    a = SCHEDULE.alphas_cumprod[times]
    sigmas = np.append(np.sqrt((1 - a) / a), 0.0)
    x = 1 / math.sqrt(a[0])
    for i in range(num_steps):
        d = (x - SPREAD**2 * x / (SPREAD**2 + sigmas[i] ** 2)) / sigmas[i]
        up = min(sigmas[i + 1], math.sqrt(sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2))
        up = up if ancestral else 0.0
        x += d * (math.sqrt(sigmas[i + 1] ** 2 - up**2) - sigmas[i]) + up * noise[i]
    return x


@pytest.mark.parametrize("num_steps", [2, 9, 30])
@pytest.mark.parametrize("name", ["euler", "euler-ancestral"])
def test_euler_is_the_published_one(name, num_steps):
    draws = [math.sin(i) for i in range(num_steps)]
    left = iter(draws)
    x = torch.ones(1, dtype=torch.float64)
    final = build_sampler(name)(gaussian_model, x, SCHEDULE, num_steps, noise=lambda x: torch.full_like(x, next(left)))
    assert final.item() == pytest.approx(published_euler(num_steps, draws, name != "euler"), rel=1e-10)


def published_unipc(num_steps: int) -> float:
    """UniPC with its linear systems R ρ = b solved as they stand in the paper (B₂, x̂₀ form, order 2)."""
    half_log_snr = SCHEDULE.half_log_snr
    points = equal_snr_timesteps(num_steps, half_log_snr)
    lam = [float(half_log_snr[t]) for t in points]
    alpha = [math.sqrt(SCHEDULE.alphas_cumprod[t]) for t in points]
    sigma = [math.sqrt(1 - SCHEDULE.alphas_cumprod[t]) for t in points]

    def denoised(x, i):
        return alpha[i] * SPREAD**2 * x / (alpha[i] ** 2 * SPREAD**2 + sigma[i] ** 2)

    def coefficients(h, rs):
        # hh = -h; φ₁(hh) = e^hh - 1; φ_k+1 = φ_k / hh - 1/k!
        hh, phi, b = -h, math.expm1(-h), []
        for k in range(1, len(rs) + 1):
            phi = phi / hh - 1 / math.factorial(k)
            b.append(phi * math.factorial(k) / math.expm1(hh))
        return np.linalg.solve(np.array([[r ** (k - 1) for r in rs] for k in range(1, len(rs) + 1)]), b)

    x, models = 1.0, [denoised(1.0, 0)]
    for i in range(1, num_steps + 1):
        order = 1 if i == 1 or (i == num_steps and num_steps < 15) else 2
        h = lam[i] - lam[i - 1]
        plain = sigma[i] / sigma[i - 1] * x - alpha[i] * math.expm1(-h) * models[-1]
        r = (lam[i - 2] - lam[i - 1]) / h if order == 2 else None
        d = (models[-2] - models[-1]) / r if order == 2 else 0.0
        predicted = plain - alpha[i] * math.expm1(-h) * 0.5 * d
        if i == num_steps:
            return predicted
        models.append(denoised(predicted, i))
        new = models[-1] - models[-2]
        if order == 1:
            x = plain - alpha[i] * math.expm1(-h) * 0.5 * new
        else:
            rho = coefficients(h, [r, 1.0])
            x = plain - alpha[i] * math.expm1(-h) * (rho[0] * d + rho[1] * new)
    raise AssertionError


@pytest.mark.parametrize("num_steps", [2, 3, 9, 20])
def test_unipc_is_the_published_one(num_steps):
    final = build_sampler("unipc")(gaussian_model, torch.ones(1, dtype=torch.float64), SCHEDULE, num_steps)
    assert final.item() == pytest.approx(published_unipc(num_steps), rel=1e-9)


@pytest.mark.parametrize(("num_steps", "times"), [(4, [999, 759, 499, 259]), (1, [999]), (2, [999, 499])])
def test_lcm_is_the_published_one(num_steps, times):
    """Alg. 3 at the timesteps of the published models, noise of 1 at every draw."""
    x, values = 1.0, SCHEDULE.alphas_cumprod
    for i, t in enumerate(times):
        a = values[t]
        predicted = (x - math.sqrt(1 - a) * math.sqrt(1 - a) * x / (a * SPREAD**2 + 1 - a)) / math.sqrt(a)
        s = 10 * t
        x = 0.25 / (s**2 + 0.25) * x + s / math.sqrt(s**2 + 0.25) * predicted
        if i < num_steps - 1:
            x = math.sqrt(values[times[i + 1]]) * x + math.sqrt(1 - values[times[i + 1]])
    start = torch.ones(1, dtype=torch.float64)
    final = build_sampler("lcm")(gaussian_model, start, SCHEDULE, num_steps, noise=torch.ones_like)
    assert final.item() == pytest.approx(x, rel=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_lcm_of_an_exact_consistency_function_has_the_datas_spread(num_steps):
    """For Gaussian data it is x · s / √Var(x_t): every number of steps then draws from the data."""

    def model(x, t, step):
        a = float(SCHEDULE.alphas_cumprod[t])
        x0 = x * SPREAD / math.sqrt(a * SPREAD**2 + 1 - a)
        return (x - math.sqrt(a) * x0) / math.sqrt(1 - a)

    torch.manual_seed(0)
    final = build_sampler("lcm")(model, torch.randn(20000, dtype=torch.float64), SCHEDULE, num_steps)
    assert final.std().item() == pytest.approx(SPREAD, rel=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("skip", [0, 3, 8, 9])
def test_skipped_steps_are_the_first_and_the_rest_is_the_same(name, skip):
    """Begun in the middle with the latents of an unbroken run, a sampler of one step goes the same way."""
    seen, taken = [], []

    def model(x, t, step):
        seen.append((t, step))
        return gaussian_model(x, t, step)

    start = torch.ones(1, dtype=torch.float64)
    build_sampler(name)(model, start, SCHEDULE, 10, noise=torch.ones_like, on_step=lambda i, x: taken.append(x))
    times = list(dict.fromkeys(t for t, _ in seen))
    assert [start_timestep(name, SCHEDULE, 10, k) for k in range(10)] == times
    seen.clear()
    steps = []
    final = build_sampler(name)(
        model,
        taken[skip - 1] if skip else start,
        SCHEDULE,
        10,
        skip=skip,
        noise=torch.ones_like,
        on_step=lambda i, x: steps.append(i),
    )
    assert list(dict.fromkeys(t for t, _ in seen)) == times[skip:]
    assert steps == sorted({step for _, step in seen}) == list(range(10 - skip))
    if name not in ("plms", "dpmpp", "unipc"):  # which remember steps before
        assert torch.equal(final, taken[-1])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
def test_a_noised_start_has_the_datas_spread_at_the_end(name):
    """Data noised to the timestep of the first step that is made: with the best ε the rest leads back to the data.

    What is kept of the data is what x_t knows of them, corr(x₀, x_t), for the samplers that only scale x_t; ancestral
    ones draw anew from x₀ given x_t, which squares it.
    """
    torch.manual_seed(0)
    x0 = SPREAD * torch.randn(20000, dtype=torch.float64)
    for strength in (0.3, 0.7):
        skip = skipped_steps(250, strength)
        t = start_timestep(name, SCHEDULE, 250, skip)
        x = SCHEDULE.q_sample(x0, t, torch.randn_like(x0))
        final = build_sampler(name)(gaussian_model, x, SCHEDULE, 250, skip=skip)
        assert final.std().item() == pytest.approx(SPREAD, rel=0.03)
        signal = SCHEDULE.alphas_cumprod[t] * SPREAD**2
        known = signal / (signal + 1 - SCHEDULE.alphas_cumprod[t])  # corr(x₀, x_t)²
        kept = torch.corrcoef(torch.stack([x0, final]))[0, 1].item()
        assert kept == pytest.approx(known if name in ("ddpm", "euler-ancestral") else math.sqrt(known), abs=0.03)


def test_strength_is_a_share_of_the_steps():
    assert [skipped_steps(50, s) for s in (0.001, 0.29, 0.5, 1.0)] == [49, 36, 25, 0]
    assert skipped_steps(100, 0.29) == 71
    assert skipped_steps(1, 0.1) == 0


def test_multistep_samplers_beat_ddim_at_equal_steps():
    assert ode_error("plms", 50) < ode_error("ddim", 50) / 5
    assert ode_error("dpmpp", 20) < ode_error("ddim", 50)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("euler-ancestral", 0.0)])
def test_ancestral_sampling_has_the_datas_spread(name, eta):
    torch.manual_seed(0)
    final = build_sampler(name, eta)(gaussian_model, torch.randn(20000, dtype=torch.float64), SCHEDULE, 250)
    assert final.std().item() == pytest.approx(SPREAD, rel=0.03)
    assert abs(final.mean().item()) < 0.02


@pytest.mark.parametrize("num_steps", [10, 20, 50, 100, 250])
def test_ddim_noise_has_the_originals_size(num_steps):
    """With ε = 0 and x = 0 a step of DDIM leaves σ times the noise; the golden σ for η = 1."""
    golden = case("cases/schedule")[f"ddim{num_steps}.sigmas_eta1"].numpy()[::-1]
    taken = []
    build_sampler("ddim", 1.0)(
        lambda x, t, step: torch.zeros_like(x),
        torch.zeros(1, dtype=torch.float64),
        SCHEDULE,
        num_steps,
        noise=torch.ones_like,
        before_step=lambda x, t: torch.zeros_like(x),
        on_step=lambda i, x: taken.append(x.item()),
    )
    assert np.allclose(taken, golden, rtol=1e-5, atol=1e-7)


def test_guidance_is_the_null_branch_plus_the_scaled_difference():
    null, conditional = torch.randn(2, 3), torch.randn(2, 3)
    both = torch.cat([null, conditional])
    assert torch.allclose(guide(both, 7.5), -6.5 * null + 7.5 * conditional, atol=1e-5)
    assert torch.allclose(guide(both, 1.0), conditional, atol=1e-6)
    assert torch.equal(guide(both, 0.0), null)


def test_gates_fit_every_number_of_steps():
    for num_steps in range(1, 301):
        for stages in ((0.3, 0.2, 0.5), (0.1, 0.7, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.0, 1.0, 0.0), (0.29, 0.0, 0.71)):
            betas = gate_schedule(stages, num_steps)
            assert len(betas) == num_steps
            assert betas == sorted(betas, reverse=True)
            assert all(0 <= b <= 1 for b in betas)


def test_gates_lose_no_step_to_float_rounding():
    assert gate_schedule((0.29, 0.0, 0.71), 100) == [1.0] * 29 + [0.0] * 71
    assert gate_schedule((0.3, 0.0, 0.7), 50) == [1.0] * 15 + [0.0] * 35
    assert gate_schedule((0.1, 0.2, 0.7), 10) == [1.0, 0.5, 0.0] + [0.0] * 7


@pytest.mark.parametrize("decay", [49, 98, 103, 107])
def test_decays_that_the_original_cannot_make(decay):
    betas = gate_schedule((0.0, 1.0, 0.0), decay)
    assert np.allclose(betas, [(decay - 1 - i) / decay for i in range(decay)], atol=1e-12)


def test_stages_may_miss_one_by_rounding_only():
    assert len(gate_schedule((0.1, 0.2, 0.7000000001), 10)) == 10
    for stages in ((0.5, 0.2, 0.2), (0.5, 0.6, -0.1), (1.2, 0.0, 0.0)):
        with pytest.raises(ValueError, match="sum to 1"):
            gate_schedule(stages, 10)


def test_q_sample_and_x0_are_inverse_for_one_and_for_many_timesteps():
    torch.manual_seed(0)
    x0, noise = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    for t in (0, 500, 999, torch.tensor([0, 500, 999])):
        x = SCHEDULE.q_sample(x0, t, noise)
        assert torch.allclose(SCHEDULE.x0_from_eps(x, t, noise), x0)
    a = SCHEDULE.alphas_cumprod[[0, 500, 999]]
    expected = np.sqrt(a)[:, None, None] * x0.numpy() + np.sqrt(1 - a)[:, None, None] * noise.numpy()
    assert np.allclose(SCHEDULE.q_sample(x0, torch.tensor([0, 500, 999]), noise).numpy(), expected)
