"""On a CUDA device: the same numbers as on the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from gligen.loading import build_pipeline
from gligen.request import Entity, Request, read_requests
from tests.conftest import case, error, grounding_of
from tests.generated import generated_model

EXAMPLES = Path(__file__).parents[1] / "examples"

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
