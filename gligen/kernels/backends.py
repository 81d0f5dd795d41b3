"""Attention over one or two segments of keys, and which code computes it.

Legend: B batch, L queries, S keys, N keys of a second segment, C channels, h heads, d = C / h.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

logger = logging.getLogger(__name__)

KeysValues = tuple[Tensor, Tensor]

BACKENDS = ("auto", "sdpa", "math", "triton")
"""auto: what docs/performance.md found fastest: on Hopper GPUs, without gradients, our kernel for heads of 40 channels
(gligen/kernels/hopper.py); on a CPU, with gradients in bfloat16, math for few keys; else sdpa. sdpa: the library's
kernels, chosen by shape. math: the formula written out. triton: our kernel for every head of the UNet, forward and
backward (gligen/kernels/two_segments.py). Both of ours read two segments where they lie."""

TRITON_HEAD_DIM = 160  # the widest that the Triton kernel serves
SHORT = 128  # keys, up to which training in bfloat16 on a CPU is faster with the formula written out
_backend = "auto"  # read at every call: under torch.compile one guard, and one compilation for each backend used


def available_backends(device: str | torch.device) -> tuple[str, ...]:
    """The backends that run on a device, in the order of `BACKENDS`.

    triton needs CUDA and a card from Ampere on; on the CPU it is there only with TRITON_INTERPRET=1 in the environment.
    Nothing is imported to find out.
    """
    device = torch.device(device)
    found = {"auto", "sdpa", "math"}
    if importlib.util.find_spec("triton") is not None:
        is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        is_cuda = device.type == "cuda" and torch.cuda.is_available()
        if is_interpreted or (is_cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
            found.add("triton")
    return tuple(name for name in BACKENDS if name in found)


def current_backend() -> str:
    """The backend that `attention` uses now."""
    return _backend


def set_backend(name: str) -> None:
    """Choose the backend of every `attention` from here on; for a stretch of code there is `use_backend`.

    Raises ValueError if the name is unknown, or if no device of this machine has that backend.
    """
    global _backend  # noqa: PLW0603  # a choice for the whole process, as torch's own backend flags are
    here = {*available_backends("cpu"), *(available_backends("cuda") if torch.cuda.is_available() else ())}
    works = ", ".join(b for b in BACKENDS if b in here)
    if name not in BACKENDS:
        raise ValueError(f"attention backend is '{name}': here the known ones are {works}")
    if name not in here:
        raise ValueError(f"attention backend '{name}' needs triton and a CUDA device (Ampere or newer): try {works}")
    if name == "triton":
        import gligen.kernels.two_segments  # noqa: F401  # registers torch.ops.gligen.attention

        _announce()
    _backend = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`attention` inside uses this backend. Raises ValueError as `set_backend` does.

    Wrap forward and backward together where activations are recomputed, so that both use the same one.
    """
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@functools.cache
def _announce() -> None:
    logger.info("attention: triton for heads of up to %d channels; others (the VAE's 512) by SDPA", TRITON_HEAD_DIM)


def _is_served(q: Tensor, num_heads: int) -> bool:
    """Whether the Triton kernel takes these queries; wider heads, and float64, go to SDPA."""
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"attention backend 'triton' needs CUDA tensors, got {q.device.type}: try sdpa or math")
    return q.shape[-1] // num_heads <= TRITON_HEAD_DIM and q.dtype != torch.float64


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v for each head (Vaswani et al., 2017, eq. 1; latent diffusion §3.3).

    The one place attention is computed.

    q: (B, L, C); k, v: (B, S, C). There is never a mask: padding takes part, as published.
    extra: keys and values (B, N, C) of a second segment, under the same softmax as if they stood behind k and v.
    Returns (B, L, C). Raises ValueError if the chosen backend does not run on q's device.
    """
    k_extra, v_extra = extra if extra is not None else (None, None)
    if _backend == "math" or (_backend == "auto" and _is_faster_written_out(q, k, extra)):
        return _math(q, k, v, num_heads, extra)
    if _backend == "triton" and _is_served(q, num_heads):
        return torch.ops.gligen.attention(q, k, v, k_extra, v_extra, num_heads)[0]
    if _backend == "auto" and _has_hopper_kernel(q, k, v, num_heads, extra):
        return torch.ops.gligen.hopper_attention(q, k, v, k_extra, v_extra, num_heads)
    return _sdpa(q, k, v, num_heads, extra)


def _is_faster_written_out(q: Tensor, k: Tensor, extra: KeysValues | None) -> bool:
    """For captions and small latents: there the library's backward pass takes up to three times as long on a CPU."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and k.shape[1] + (extra[0].shape[1] if extra is not None else 0) <= SHORT
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (q, k))
    )


def _has_hopper_kernel(q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None) -> bool:
    """Whether Hopper's kernel takes these tensors and is the faster one: not for short segments such as captions."""
    return (
        q.device.type == "cuda"
        and q.dtype == torch.bfloat16
        and q.shape[-1] == 40 * num_heads
        and k.shape[1] >= 256
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(extra or ()))))
        and _is_hopper(q.device)
    )


def _is_hopper(device: torch.device) -> bool:
    return _prepare_hopper(device)


# as torch.compiler.assume_constant_result marks it, which imports the compiler: 1.5 seconds of every start
_is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _prepare_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU on which our kernel works; where it does not, that is logged once."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from gligen.kernels.hopper import check

        check(device.index or 0)
    except (OSError, RuntimeError) as error:
        logger.warning("attention by SDPA: our kernel does not work here (%s)", str(error).split("\n")[0])
        return False
    return True


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "b s (h d) -> b h s d", h=num_heads)


def _join(k: Tensor, v: Tensor, extra: KeysValues | None) -> KeysValues:
    """Both segments as one, (B, S + N, C)."""
    return (k, v) if extra is None else (torch.cat([k, extra[0]], dim=1), torch.cat([v, extra[1]], dim=1))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None) -> Tensor:
    q, k, v = (_split_heads(x, num_heads) for x in (q, *_join(k, v, extra)))  # (B, h, L or S + N, d)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")  # (B, L, C)


def _math(q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None) -> Tensor:
    """The formula as it is read, in float32 at least: what the other backends are held against."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (_split_heads(x.to(dtype), num_heads) for x in (q, *_join(k, v, extra)))
    scores = qh @ kh.transpose(-1, -2) / qh.shape[-1] ** 0.5  # (B, h, L, S + N)
    return rearrange(scores.softmax(dim=-1) @ vh, "b h l d -> b l (h d)").to(q.dtype)
