"""Properties of schedules, gates and samplers, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gligen import request
from gligen.diffusion.guidance import gate_schedule, guide
from gligen.diffusion.samplers import SAMPLERS, build_sampler
from gligen.diffusion.schedule import Schedule, sampling_timesteps
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
    if name == "ddpm":
        assert torch.allclose(final, x0)
    else:  # the others keep ε and end at timestep 0: x = √ᾱ₀ x₀ + √(1-ᾱ₀) ε
        first = 999 if name == "dpmpp" else sampling_timesteps(num_steps)[0]
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
    with pytest.raises(ValueError, match=r"euler.*ddpm, ddim, plms, dpmpp"):
        build_sampler("euler")


@pytest.mark.parametrize("name", ["ddim", "plms", "dpmpp"])
def test_deterministic_samplers_draw_no_noise(name):
    build_sampler(name)(gaussian_model, torch.ones(1, 1), SCHEDULE, 10, noise=no_noise)


def ode_error(name: str, num_steps: int) -> float:
    """Distance from the exact solution of the probability-flow ODE, which for Gaussian data only scales x."""
    first = []

    def model(x, t, step):
        first.append(t)
        return gaussian_model(x, t, step)

    x = torch.ones(1, dtype=torch.float64)
    final = build_sampler(name)(model, x, SCHEDULE, num_steps)
    variance = [a * SPREAD**2 + 1 - a for a in (SCHEDULE.alphas_cumprod[first[0]], SCHEDULE.alphas_cumprod[0])]
    return abs(final.item() - math.sqrt(variance[1] / variance[0]))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1.0), ("plms", 2.0), ("dpmpp", 2.0)])
def test_samplers_converge_at_their_order(name, order):
    """Four times the steps bring the error down by about 4^order; 15 % of the order is left to the far end."""
    assert ode_error(name, 20) / ode_error(name, 80) > 4 ** (0.85 * order)


def test_multistep_samplers_beat_ddim_at_equal_steps():
    assert ode_error("plms", 50) < ode_error("ddim", 50) / 5
    assert ode_error("dpmpp", 20) < ode_error("ddim", 50)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
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
