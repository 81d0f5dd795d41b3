"""On a CUDA device: the same numbers as on the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.common import MODELS, networks
from gligen.loading import build_pipeline
from gligen.low_memory import offload
from gligen.pipeline import Pipeline
from gligen.quantize import QUANTIZATIONS, check_quantization
from gligen.request import Entity, Request, read_requests
from gligen.runtime import compilations, optimize, warm_up
from gligen.training.grounding_task import train
from tests.conftest import case, error, grounding_of
from tests.generated import generated_model
from tests.training.helpers import quick, write_base

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_float32():
    """float32 as it is written: TensorFloat-32 would round products to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_unet_on_cuda_equals_the_original(small_unet, dtype, bound):
    unet, arrays = copy.deepcopy(small_unet()).to("cuda", dtype), case("cases/unet_text")
    grounding = {name: value.cuda() for name, value in grounding_of(arrays).items()}
    if dtype == torch.float64:
        grounding = {name: value.double() for name, value in grounding.items()}
    x, context = (arrays[name].to("cuda", dtype) for name in ("x", "context"))
    eps = unet(x, arrays["timesteps"].cuda(), context, grounding).cpu()
    assert error(eps, arrays["f64.eps"]) < bound


def test_a_picture_painted_on_cuda_is_the_cpus():
    request = Request(
        prompt="a ball",
        entities=(Entity(phrase="a red ball", box=(0.1, 0.2, 0.5, 0.7)),),
        steps=4,
        schedule=(0.5, 0.0, 0.5),
        num_images=2,
    )
    latents = []
    for device in ("cpu", "cuda"):
        pipe = build_pipeline(generated_model("box-text"), device=device, dtype="float32")
        samples = sorted(pipe.generate([request]), key=lambda sample: sample.index)
        latents.append(torch.stack([sample.latents for sample in samples]))
    assert error(latents[1], latents[0]) < 1e-3


@pytest.mark.parametrize("mode", ["box-text-image", "keypoint", "sem", "inpaint-box-text"])
def test_every_kind_paints_on_cuda_in_its_own_precision(mode):
    pipe = build_pipeline(generated_model(mode), device="cuda")
    fields = {"size": None, "steps": 2, "schedule": (0.5, 0.0, 0.5)}
    for request in read_requests(EXAMPLES / f"{mode}.json"):
        for sample in pipe.generate([dataclasses.replace(request, **fields)]):
            assert sample.image.size == (64, 64)


# -- speed and memory (gligen/runtime.py) ------------------------------------------------------------------------------

BALL = Request(
    prompt="a ball",
    entities=(Entity(phrase="a red ball", box=(0.1, 0.2, 0.5, 0.7)),),
    steps=4,
    schedule=(0.25, 0.5, 0.25),
)


def paint(pipe: Pipeline, request: Request = BALL) -> torch.Tensor:
    samples = sorted(pipe.generate([request]), key=lambda sample: sample.index)
    return torch.stack([sample.latents for sample in samples])


def stable_diffusion() -> Pipeline:
    """Stable Diffusion's size with generated weights, on the CPU in bfloat16."""
    config = MODELS["sd"]
    return Pipeline(config, *(network.to(torch.bfloat16) for network in networks(config, torch.device("cpu"))))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 1e-1)])
@pytest.mark.parametrize(
    "steps",
    [
        {"compile": False, "graphs": False},
        {"compile": False, "graphs": True},
        {"compile": True, "graphs": False},
        {"compile": True, "graphs": True},
    ],
    ids=str,
)
def test_every_speed_up_paints_the_plain_picture(steps, dtype, bound):
    plain = build_pipeline(generated_model(), device="cuda", dtype="float32")
    fast = build_pipeline(generated_model(), device="cuda", dtype=dtype)
    optimize(fast, **steps)
    for request in (BALL, dataclasses.replace(BALL, prompt="another", num_images=3), BALL):  # graphs take new requests
        assert error(paint(fast, request), paint(plain, request)) < bound


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_linear_layers_in_8_bits_paint_nearly_the_plain_picture(kind):
    pytest.importorskip("torchao")
    plain, fast = (build_pipeline(generated_model(), device="cuda", dtype="bfloat16") for _ in range(2))
    try:
        check_quantization(kind, fast.device)
    except ValueError as reason:
        pytest.skip(str(reason))
    optimize(fast, quantize=kind)
    assert 0 < error(paint(fast), paint(plain)) < 0.3


def test_nothing_is_compiled_or_recorded_again_for_another_request():
    pipe = build_pipeline(generated_model(), device="cuda")
    optimize(pipe)
    warm_up(pipe, BALL)
    made, recorded = compilations(), len(pipe.recorded.graphs)
    entities = tuple(Entity(phrase=f"cube {i}", box=(0.1 * i, 0.2, 0.6, 0.7)) for i in range(4))
    paint(pipe, dataclasses.replace(BALL, prompt="cubes", entities=entities, steps=9, schedule=(0.0, 0.8, 0.2)))
    assert (compilations(), len(pipe.recorded.graphs)) == (made, recorded)
    paint(pipe, dataclasses.replace(BALL, num_images=3))  # another batch: recorded anew, but not compiled
    assert compilations() == made


@pytest.mark.slow
def test_stable_diffusions_size_fits_into_4_gib_and_with_turns_into_2_and_a_half():
    request = dataclasses.replace(BALL, size=(512, 512))
    for has_turns, bound in ((True, 2.5), (False, 4.0)):
        pipe = stable_diffusion()
        if has_turns:
            offload(pipe, torch.device("cuda", 0))
        else:
            for network in (pipe.unet, pipe.vae, pipe.text_encoder):
                network.to("cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        paint(pipe, request)
        assert torch.cuda.max_memory_allocated() / 2**30 < bound
        del pipe


def test_low_memory_goes_with_compiling():
    plain, small = (build_pipeline(generated_model(), device=name, dtype="float32") for name in ("cuda", "cpu"))
    offload(small, torch.device("cuda", 0))
    steps = optimize(small)
    assert not steps["fuse_qkv"]
    assert error(paint(small), paint(plain)) < 1e-4


def test_frozen_weights_in_bfloat16_train_and_are_not_changed(tmp_path):
    config = quick(write_base(tmp_path), steps=3, dtype="auto", device="cuda", preview_every=3, preview_images=1)
    config = dataclasses.replace(config, checkpointing=True)
    train(config, tmp_path / "run")  # compiled; checks its frozen weights itself
    assert (tmp_path / "run" / "previews" / "0000003.png").exists()
