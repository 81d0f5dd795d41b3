"""Every speed-up against the plain path: the same numbers, the same names in files, no code made twice."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gligen.device import keep_freed_memory
from gligen.fused_qkv import FusedAttention, fuse_qkv
from gligen.loading import build_pipeline
from gligen.low_memory import offload
from gligen.modes import MODES, get_mode
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.unet import UNetModel
from gligen.pipeline import Pipeline
from gligen.request import Entity, Request
from gligen.runtime import checkpoint_blocks, compilations, compile_blocks, optimize, to_channels_last, warm_up
from gligen.tiles import decode_tiled
from tests.conftest import SMALL_VAE, error, small_unet_config
from tests.generated import generated_model

ROOT = Path(__file__).parents[2]
BALL = Request(
    prompt="a ball",
    entities=(Entity(phrase="a red ball", box=(0.1, 0.2, 0.5, 0.7)),),
    steps=4,
    schedule=(0.25, 0.5, 0.25),  # full, decaying, off
)


@pytest.fixture(params=["gatedSA", "gatedCA"])
def unet(request: pytest.FixtureRequest) -> UNetModel:
    torch.manual_seed(0)
    unet = UNetModel(small_unet_config(fuser_type=request.param)).eval().requires_grad_(False)
    for fuser in unet.fusers.values():
        fuser.alpha_attn.fill_(0.5)
        fuser.alpha_dense.fill_(0.5)
    return unet


def inputs(unet: UNetModel, batch: int = 2, height: int = 16, width: int = 8) -> tuple[Tensor, Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(batch)
    grounding = unet.position_net.null_inputs(batch)
    grounding["boxes"][:, 0] = torch.tensor([0.1, 0.2, 0.6, 0.7])
    grounding["masks"][:, 0] = 1
    x, context = (torch.randn(batch, *s, generator=generator) for s in ((4, height, width), (7, 48)))
    return x, torch.full((batch,), 500), context, grounding


def paint(pipe: Pipeline, request: Request = BALL, **kwargs: int) -> Tensor:
    samples = sorted(pipe.generate([request], **kwargs), key=lambda sample: sample.index)
    return torch.stack([sample.latents for sample in samples])


def pipeline() -> Pipeline:
    return build_pipeline(generated_model(), device="cpu", dtype="float32")


def test_fused_projections_give_the_plain_numbers(unet):
    args = inputs(unet)
    plain = unet(*args)
    assert fuse_qkv(unet) == 3 * len(unet.transformers)
    assert error(unet(*args), plain) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_speed_ups_are_exact_in_every_mode_at_any_size_batch_and_gate(mode):
    """float32 to 1e-5 of the plain evaluation; bfloat16, which rounds to 2^-9, to 5e-2 of the float32 one."""
    plain = build_pipeline(generated_model(mode), device="cpu", dtype="float32").unet
    fast = copy.deepcopy(plain)
    fuse_qkv(fast)
    to_channels_last(fast)
    low = copy.deepcopy(fast).bfloat16()
    for batch, height, width in ((1, 16, 24), (3 if get_mode(mode).is_map else 16, 16, 8)):
        generator = torch.Generator().manual_seed(batch)
        x, context = (torch.randn(batch, *s, generator=generator) for s in ((4, height, width), (7, 64)))
        grounding = {
            name: torch.ones_like(value)
            if name.endswith(("mask", "masks"))
            else torch.rand(value.shape, generator=generator)
            for name, value in plain.position_net.null_inputs(batch).items()
        }
        extra = torch.rand(batch, get_mode(mode).extra_channels, height, width, generator=generator)
        given = (context, grounding, extra if get_mode(mode).extra_channels else None)
        timesteps, own, ours = torch.full((batch,), 500), plain.condition(*given), fast.condition(*given)
        for gate in (0.0, torch.tensor(0.3), 1.0):
            eps = plain.denoise(x, timesteps, own, gate)
            assert error(fast.denoise(x, timesteps, ours, gate), eps) < 1e-5
        if batch == 1:  # slow where a CPU has no bfloat16
            assert error(low(x.bfloat16(), timesteps, *in_bfloat16(given)), eps) < 5e-2


def in_bfloat16(value: Any) -> Any:
    """The tensors of a nest of them; None stays."""
    if isinstance(value, dict):
        return {name: in_bfloat16(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(in_bfloat16(each) for each in value)
    return None if value is None else value.bfloat16()


def test_fused_projections_are_saved_and_loaded_under_the_plain_names(unet):
    args, plain, fused = inputs(unet), copy.deepcopy(unet), unet
    fuse_qkv(fused)
    before, after = plain.state_dict(), fused.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name, part in fused.named_modules() if isinstance(part, FusedAttention)}
    other = {name: torch.randn_like(tensor) / 10 for name, tensor in before.items()}
    plain.load_state_dict(other)
    fused.load_state_dict(other)
    assert error(fused(*args), plain(*args)) < 1e-5  # weights of noise make numbers of some hundreds
    with pytest.raises(RuntimeError, match=r"attn1.*weight"):
        fused.load_state_dict({name: tensor for name, tensor in other.items() if "attn1.to_k" not in name})


def test_weights_in_training_are_not_fused(unet):
    with pytest.raises(ValueError, match="trained"):
        fuse_qkv(unet.requires_grad_(True))


def test_channels_last_gives_the_plain_numbers(unet):
    args = inputs(unet)
    plain = unet(*args)
    to_channels_last(unet)
    assert error(unet(*args), plain) < 1e-5


def test_checkpointing_gives_the_plain_gradients(unet):
    unet.requires_grad_(False)
    trained = [p for name, p in unet.named_parameters() if ".fuser." in name or "position_net" in name]
    args, gradients = inputs(unet), []
    for prepare in (lambda _: 0, checkpoint_blocks):
        prepare(unet)
        for parameter in trained:
            parameter.requires_grad_(True).grad = None
        unet(*args).square().mean().backward()
        gradients.append([p.grad.clone() for p in trained if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(*gradients, strict=True))


def test_tiles_that_hold_the_latent_decode_it_exactly_and_smaller_ones_without_seams():
    torch.manual_seed(0)
    vae = AutoencoderKL(SMALL_VAE).eval().requires_grad_(False)
    latents = torch.randn(2, 4, 12, 20)
    plain = vae.decode(latents)
    assert error(decode_tiled(vae, latents, tile=20), plain) < 1e-5  # one at a time
    tiled = decode_tiled(vae, latents, tile=12, overlap=6)
    assert tiled.shape == plain.shape
    step = (tiled[..., 1:] - tiled[..., :-1]).abs().amax()
    assert step < 1.5 * (plain[..., 1:] - plain[..., :-1]).abs().amax()
    with pytest.raises(ValueError, match="overlap is 12"):
        decode_tiled(vae, latents, tile=12, overlap=12)


def test_offloaded_networks_paint_the_same_picture():
    plain, turning = pipeline(), pipeline()
    offload(turning, torch.device("cpu"))
    assert torch.equal(paint(turning), paint(plain))
    assert turning.offload.on_device is turning.vae  # the last that was needed


def test_an_optimised_pipeline_paints_what_the_plain_one_paints():
    plain, fast = pipeline(), pipeline()
    steps = optimize(fast, compile=False, fuse_qkv=True)
    assert steps == {"compile": False, "channels_last": True, "fuse_qkv": True, "graphs": False}
    assert error(paint(fast), paint(plain)) < 1e-4  # four steps of 1e-5
    with pytest.raises(ValueError, match="graphs need CUDA"):
        optimize(fast, graphs=True)


def test_nothing_is_compiled_again_for_other_prompts_gates_steps_or_batches():
    plain, fast = pipeline(), pipeline()
    optimize(fast, compile=True, channels_last=False, backend="eager")  # traced, without a compiler's minutes
    warm_up(fast, BALL)
    made = compilations()
    assert made > 0
    other = dataclasses.replace(
        BALL,
        prompt="two cubes on a table",
        entities=tuple(Entity(phrase=f"cube {i}", box=(0.1 * i, 0.2, 0.6, 0.7)) for i in range(4)),
        steps=6,
        schedule=(0.0, 0.8, 0.2),
        num_images=3,
    )
    assert error(paint(fast, other, batch_size=3), paint(plain, other, batch_size=3)) < 1e-5
    paint(fast, dataclasses.replace(other, num_images=5, sampler="dpmpp"), batch_size=5)
    assert compilations() == made


@pytest.mark.slow
@pytest.mark.parametrize("unet", ["gatedSA", pytest.param("gatedCA", marks=pytest.mark.exhaustive)], indirect=True)
def test_compiled_blocks_give_the_plain_numbers(unet):
    args = inputs(unet)
    plain = unet(*args)
    compile_blocks(unet)
    assert error(unet(*args), plain) < 1e-5
    made = compilations()
    unet(*inputs(unet, batch=3))
    assert compilations() == made


def test_a_device_without_a_compiler_is_told_and_paints_all_the_same(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    pipe = pipeline()
    assert not optimize(pipe, compile=True)["compile"]
    assert "not compiled: there is no C++ compiler" in caplog.text


def test_freed_memory_is_kept_where_glibc_is():
    assert keep_freed_memory() in (True, False)


def test_open_clip_is_whole_after_a_part_of_it_was_used():
    script = """if True:
        import sys
        from gligen.modules.clip import tokenize
        from gligen.modules.late_import import open_clip_module
        tokenize(["a ball"])
        tower = open_clip_module("transformer").TextTransformer
        assert not {"timm", "open_clip.model", "torchvision.models"} & set(sys.modules)
        import open_clip, torchvision
        assert open_clip.transformer.TextTransformer is tower
        assert open_clip.create_model and open_clip.__version__ and torchvision.__version__
        from torchvision.transforms import functional
        import torch
        boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
        assert len(torchvision.ops.nms(boxes, torch.tensor([0.5, 0.6]), 0.5)) == 1
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
