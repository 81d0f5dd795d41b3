"""What all benchmarks share: models of generated weights, the machine's own ceilings, clocks, and rows of metrics."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gligen.config import GroundingConfig, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from gligen.device import pick_device
from gligen.modules import attention as attention_module
from gligen.modules import autoencoder as autoencoder_module
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import CLIPTextEncoder
from gligen.modules.unet import UNetModel

ROWS = Path(__file__).parent / "rows"
MODELS = {
    "tiny": ModelConfig(  # the tests' sizes: seconds on any machine
        unet=UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_downsamples=(1, 2),
            num_heads=4,
            context_dim=64,
            grounding=GroundingConfig(token_dim=64, feature_dim=64),  # its other widths are built into diffusers
        ),
        vae=VAEConfig(base_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1),
        text_encoder=TextEncoderConfig(width=64, layers=2, heads=4),
        image_size=64,
    ),
    "small": ModelConfig(  # Stable Diffusion's shape with fewer channels: what a CPU can measure
        unet=UNetConfig(model_channels=96, channel_mult=(1, 2, 4), num_res_blocks=1, grounding=GroundingConfig()),
        vae=VAEConfig(base_channels=32, num_res_blocks=1),
        text_encoder=TextEncoderConfig(layers=2),
        image_size=256,
    ),
    "sd": ModelConfig(unet=UNetConfig(grounding=GroundingConfig())),
}


def parser(doc: str | None, *, steps: int, repeats: int, batch_size: int) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n", maxsplit=1)[0])
    made.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    made.add_argument("--model", choices=MODELS, help="default: sd with CUDA, else tiny")
    made.add_argument("--batch-size", type=int, default=batch_size, metavar="N")
    made.add_argument("--steps", type=int, default=steps, metavar="N")
    made.add_argument("--repeats", type=int, default=repeats, metavar="N", help="the fastest of these counts")
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, help="rungs with torch.compile (CUDA: on)")
    made.add_argument("--rows", type=Path, default=ROWS, metavar="DIR", help="where rows are appended")
    return made


class Rows:
    """Rows of one run, appended to FOLDER/NAME.jsonl and printed; all carry what they were measured on."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, **facts: Any) -> None:
        args.rows.mkdir(parents=True, exist_ok=True)
        self.path = args.rows / f"{name}.jsonl"
        self.facts = {
            "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seed": 0,
            **facts,
        }

    def write(self, **metrics: Any) -> None:
        line = json.dumps(self.facts | metrics, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(json.dumps(metrics, ensure_ascii=False), flush=True)


def choose(args: argparse.Namespace) -> tuple[torch.device, str, bool]:
    """Device, model, and whether rungs are compiled."""
    device = pick_device(args.device)
    is_cuda = device.type == "cuda"
    return device, args.model or ("sd" if is_cuda else "tiny"), is_cuda if args.compile is None else args.compile


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return f"CPU {line.split(':', 1)[1].strip()}"
    return f"{device.type} {platform.machine()}"


def networks(config: ModelConfig, device: torch.device) -> tuple[UNetModel, AutoencoderKL, CLIPTextEncoder]:
    """Generated weights, the same at every call; gates stand half open, so that grounding takes part."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        made = UNetModel(config.unet), AutoencoderKL(config.vae), CLIPTextEncoder(config.text_encoder)
    for network in made:
        network.to(device).eval().requires_grad_(False)
    for fuser in made[0].fusers.values():
        fuser.alpha_attn.fill_(0.5)
        fuser.alpha_dense.fill_(0.5)
    return made


# -- clocks ------------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Times a call. wall: seconds of the fastest of `repeats` calls; cpu: this process's, of the call with the fewest.

    own: what rows are made from. It is wall, but on a CPU with one thread cpu, which other programs hardly change.
    """
    walls, cpus = [], []
    for _ in range(repeats):
        synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return {"wall": min(walls), "cpu": min(cpus), "own": min(cpus if is_alone else walls)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Gives a function that tells the peak GiB since: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**30
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # Linux: the peak starts from what there is now
    yield _resident_peak


def _resident_peak() -> float:
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- ceilings ----------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measures what this machine reaches now: tflops of a large matrix product, gb_per_second read and written by a
    copy."""
    n, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(size // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    times = []
    for run in (lambda: a @ b, lambda: target.copy_(source)):
        run()
        times.append(seconds(run, device, 10)["own"])
    return {"tflops": 2 * n**3 / times[0] / 1e12, "gb_per_second": 2 * size / times[1] / 1e9}


def unet_flops(config: UNetConfig, size: tuple[int, int], *, is_grounded: bool, branches: int = 1) -> int:
    """Counts the arithmetic of one evaluation of one latent (h, w), conditioning ready; two for a multiplication and
    addition. branches: of guidance, for which the same latent is evaluated at once."""
    with torch.device("meta"), torch.no_grad():
        unet = UNetModel(config).eval()
        grounding = unet.position_net.null_inputs(branches) if is_grounded else None
        cond = unet.condition(torch.empty(branches, 77, config.context_dim), grounding)
        x, timesteps = torch.empty(1, config.in_channels, *size), torch.zeros(1, dtype=torch.int64)
    return _flops(lambda: unet.denoise(x, timesteps, cond, torch.ones((), device="meta") if is_grounded else 0.0))


def decoder_flops(config: VAEConfig, size: tuple[int, int]) -> int:
    with torch.device("meta"), torch.no_grad():
        vae, latents = AutoencoderKL(config).eval(), torch.empty(1, config.latent_channels, *size)
    return _flops(lambda: vae.decode(latents))


@torch.no_grad()
def _flops(run: Callable[[], object]) -> int:
    with written_out(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# -- what others compute -----------------------------------------------------------------------------------------------


def written_out_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Computes softmax(q kᵀ / √d) v, with the whole matrix of weights in memory, as the original computes it."""
    if extra is not None:
        k, v = torch.cat([k, extra[0]], dim=1), torch.cat([v, extra[1]], dim=1)
    (B, L, C), S, d = q.shape, k.shape[1], q.shape[2] // num_heads
    q, k, v = (x.reshape(B, n, num_heads, d) for x, n in ((q, L), (k, S), (v, S)))
    weights = (torch.einsum("blhd,bshd->bhls", q, k) * d**-0.5).softmax(dim=-1)
    return torch.einsum("bhls,bshd->blhd", weights, v).reshape(B, L, C)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Attention written out in UNet and autoencoder while inside."""
    with contextlib.ExitStack() as stack:
        for module in (attention_module, autoencoder_module):
            stack.enter_context(mock.patch.object(module, "attention", written_out_attention))
        yield


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
