"""Attention alone: every shape of the UNet with every backend, forward and backward.

    python -m benchmarks.attention [--device cuda] [--model sd] [--batch-size 2]

A row: milliseconds (the fastest of the repeats), TFLOP/s without counting padding or recomputation, and the share of
the matrix-product ceiling that was measured in the same run. A guided image has a batch of 2. Where FlashAttention-3
or -4 (`pip install flash-attn-4`) is installed, SDPA is measured by it too: it pads head dim 40 to 48 only, not to 64.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from gligen.config import ModelConfig
from gligen.device import pick_dtype
from gligen.kernels.backends import attention, available_backends
from gligen.runtime import attention_backend

FLASH = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}  # torch's names, and the packages' modules


def shapes(config: ModelConfig) -> Iterator[tuple[str, int, int, int]]:
    """Lists (kind, L, S, C) of every attention in the UNet."""
    unet, side = config.unet, config.image_size // config.vae.downsample_factor
    assert unet.grounding is not None
    places = []
    for level, mult in enumerate(unet.channel_mult):
        if 2**level in unet.attention_downsamples:
            places.append((side // 2**level, mult * unet.model_channels))
    places.append((side // unet.downsample_factor, unet.channel_mult[-1] * unet.model_channels))  # the middle
    for width, channels in dict.fromkeys(places):
        L = width * width
        for kind, S in (("self", L), ("fuser", L + unet.grounding.max_entities), ("caption", 77)):
            yield kind, L, S, channels


def compute(kind: str, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attends as the UNet calls it: a fuser's grounding tokens are a second segment."""
    if kind == "fuser":
        L = q.shape[1]
        return attention(q, k[:, :L], v[:, :L], num_heads, extra=(k[:, L:], v[:, L:]))
    return attention(q, k, v, num_heads)


def main() -> None:
    args = common.parser(__doc__, steps=1, repeats=5, batch_size=2).parse_args()
    device, model, _ = common.choose(args)
    config, dtype = common.MODELS[model], pick_dtype("auto", device)
    top = common.ceilings(device, dtype)
    facts = {"model": model, "dtype": str(dtype).removeprefix("torch."), "batch": args.batch_size}
    rows = common.Rows("attention", args, device, **facts, ceiling=top)
    backends = (*available_backends(device), *FLASH) if device.type == "cuda" else available_backends(device)
    for kind, L, S, channels in shapes(config):
        torch.manual_seed(0)
        q, k, v = (torch.randn(args.batch_size, n, channels, device=device, dtype=dtype) for n in (L, S, S))
        reference = common.written_out_attention(q.double(), k.double(), v.double(), config.unet.num_heads)
        flops = 4 * args.batch_size * L * S * channels
        for name in ("written out", *backends):
            if name in FLASH and not has_flash(name):
                continue
            try:
                metrics = measure(name, kind, (q, k, v), config.unet.num_heads, device, args.repeats, reference)
            except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
                if name not in FLASH:
                    raise
                print(f"{name} does not take {kind}, {L} x {S}, {channels} channels: {error}")
                continue
            shares = {
                f"{way}_share": flops * times / metrics[f"{way}_ms"] / 1e9 / top["tflops"]
                for way, times in (("forward", 1), ("backward", 2.5))  # backward computes the weights once more
                if f"{way}_ms" in metrics
            }
            shape = {"kind": kind, "queries": L, "keys": S, "channels": channels, "heads": config.unet.num_heads}
            rows.write(backend=name, **shape, **metrics, **shares)


def has_flash(name: str) -> bool:
    """True if the package of a flash implementation is installed."""
    try:
        return importlib.util.find_spec(FLASH[name]) is not None
    except ModuleNotFoundError:  # of what the module lies in
        return False


@contextlib.contextmanager
def flash(name: str) -> Iterator[None]:
    """SDPA by another FlashAttention than torch's own; it has no other choice while inside."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(name)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        restore_flash_attention_impl()


def measure(
    name: str,
    kind: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    device: torch.device,
    repeats: int,
    reference: Tensor,
) -> dict[str, float]:
    """Milliseconds forward and backward and the largest relative error; without backward where there is none."""
    is_plain = name == "written out"
    metrics: dict[str, float] = {}
    with contextlib.nullcontext() if is_plain else flash(name) if name in FLASH else attention_backend(name, device):

        def forward() -> Tensor:
            if is_plain:
                return common.written_out_attention(*qkv, num_heads)
            return compute(kind, *qkv, num_heads)

        with torch.no_grad():
            out = forward()
            metrics["error"] = float((out.double() - reference).abs().max() / reference.abs().max())
            metrics["forward_ms"] = 1000 * common.seconds(forward, device, repeats)["own"]
        for tensor in qkv:
            tensor.requires_grad_(True)
        try:
            metrics["backward_ms"] = 1000 * backward_seconds(forward, qkv, device, repeats)
        except (RuntimeError, NotImplementedError):  # FlexAttention has none on a CPU
            pass
        finally:
            for tensor in qkv:
                tensor.requires_grad_(False)
    return metrics


def backward_seconds(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], device: torch.device, n: int) -> float:
    out = forward()
    gradient = torch.ones_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    backward()
    return common.seconds(backward, device, n)["own"]


if __name__ == "__main__":
    main()
