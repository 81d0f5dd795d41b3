"""Schedule, gates and samplers against the original's numbers, step by step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gligen.diffusion.guidance import gate_schedule, guide
from gligen.diffusion.samplers import build_sampler
from gligen.diffusion.schedule import Schedule, previous_timesteps, sampling_timesteps
from gligen.grounding.inpainting import inpaint_channels, keep_known
from tests.conftest import case, error, grounding_of

ROOT = Path(__file__).parents[2]
STAGES = [(1.0, 0.0, 0.0), (0.3, 0.2, 0.5)]


def test_schedule_equals_the_original():
    arrays, schedule = case("cases/schedule"), Schedule()
    assert np.array_equal(schedule.betas.astype(np.float32), arrays["betas"].numpy())
    assert np.array_equal(schedule.alphas_cumprod.astype(np.float32), arrays["alphas_cumprod"].numpy())


@pytest.mark.parametrize("num_steps", [10, 20, 50, 100, 250])
def test_timesteps_where_they_divide_equal_the_original(num_steps):
    arrays, schedule = case("cases/schedule"), Schedule()
    steps = sampling_timesteps(num_steps)
    assert steps[::-1] == arrays[f"ddim{num_steps}.timesteps"].tolist()
    a = schedule.alphas_cumprod[steps[::-1]]
    assert error(torch.from_numpy(a), arrays[f"ddim{num_steps}.alphas"]) < 1e-6
    assert error(torch.from_numpy((1 - a) ** 0.5), arrays[f"ddim{num_steps}.sqrt_one_minus_alphas"]) < 1e-6
    previous = previous_timesteps(steps)[::-1]
    assert error(torch.from_numpy(schedule.alphas_cumprod[previous]), arrays[f"ddim{num_steps}.alphas_prev"]) < 1e-6


def test_fixed_embeddings_equal_the_original():
    """Under MKL_CBWR, as MKL's exp else differs in the last place between processors, which t = 999 makes visible."""
    script = """if True:
        from gligen.modules.embeddings import fourier_embed, timestep_embedding
        from tests.conftest import case, error
        arrays = case("cases/schedule")
        print(error(timestep_embedding(arrays["timestep_embedding.t"], 320), arrays["timestep_embedding.dim320"]))
        print(error(fourier_embed(arrays["fourier.boxes"]), arrays["fourier.num_freqs8"]))
    """
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2
    assert max(errors) < 1e-6


def test_gates_equal_the_original():
    arrays = case("cases/schedule")
    names = [key for key in arrays if key.startswith("alpha50.")]
    assert names
    for name in names:
        stages = tuple(float(s) for s in name.removeprefix("alpha50.[").rstrip("]").split(","))
        assert np.allclose(gate_schedule(stages, 50), arrays[name].numpy(), atol=1e-7), name


def guided_model(unet, arrays, stages, num_steps, extra=None):
    """ε(x, t, step) of the golden sampler runs: guidance 7.5, null grounding and `uc` on the null branch."""
    grounding = grounding_of(arrays)
    batch = arrays["x"].shape[0]
    null = unet.position_net.null_inputs(batch)
    both = {name: torch.cat([null[name], grounding[name]]) for name in grounding}
    context = torch.cat([arrays["uc"], arrays["context"]])
    cond = unet.condition(context, both, extra)
    gates = gate_schedule(stages, num_steps)

    def model(x, t, step):
        return guide(unet.denoise(x, torch.full((batch,), t), cond, gates[step]), 7.5)

    return model


def name_of(stages):
    return "[" + ",".join(f"{s:g}" for s in stages) + "]"


@pytest.mark.parametrize("stages", STAGES, ids=name_of)
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("sampler", ["plms", "ddim"])
def test_sampler_equals_the_original_step_by_step(small_unet, sampler, num_steps, stages):
    arrays, unet = case(f"cases/sampler_{sampler}"), small_unet()
    taken = []
    start = arrays["x"].clone()
    model = guided_model(unet, arrays, stages, num_steps)
    final = build_sampler(sampler)(model, start, Schedule(), num_steps, on_step=lambda step, x: taken.append(x))
    assert torch.equal(start, arrays["x"])
    assert len(taken) == num_steps
    key = f"S{num_steps}.alpha{name_of(stages)}"
    assert error(final, arrays[f"final.{key}"]) < 5e-5
    if num_steps == 10:
        for i, golden in enumerate(arrays[f"steps.{key}"]):
            assert error(taken[i], golden) < 5e-5, f"step {i}"


@pytest.mark.parametrize("stages", STAGES, ids=name_of)
@pytest.mark.parametrize("num_steps", [10, 50])
def test_inpainting_equals_the_original_step_by_step(small_unet, num_steps, stages):
    arrays = case("cases/sampler_plms_inpaint")
    unet, schedule = small_unet("inpaint-box-text", "gatedSA", "small_gligen_inpaint_text"), Schedule()
    keep, x0 = arrays["mask"], arrays["x0"]
    noises, taken = iter(arrays[f"q_noise.S{num_steps}"]), []

    def put_back(x, t):
        return keep_known(x, schedule.q_sample(x0, t, next(noises)), keep)

    final = build_sampler("plms")(
        guided_model(unet, arrays, stages, num_steps, inpaint_channels(x0, keep)),
        arrays["x"],
        schedule,
        num_steps,
        before_step=put_back,
        on_step=lambda step, x: taken.append(x),
    )
    key = f"S{num_steps}.alpha{name_of(stages)}"
    assert error(final, arrays[f"final.{key}"]) < 5e-5
    if num_steps == 10:
        for i, golden in enumerate(arrays[f"steps.{key}"]):
            assert error(taken[i], golden) < 5e-5, f"step {i}"
