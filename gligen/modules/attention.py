"""Attention and feed-forward layers of LDM's transformer blocks, under LDM's names.

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
from torch import Tensor, nn

logger = logging.getLogger(__name__)

KeysValues = tuple[Tensor, Tensor]

BACKENDS = ("auto", "sdpa", "math", "triton")
"""auto: what docs/performance.md found fastest, which on Hopper GPUs, without gradients, is our kernel for heads of 40
channels (gligen/kernels/hopper.py), else sdpa. sdpa: the library's kernels, chosen by shape. math: the formula written
out. triton: our kernel for every head of the UNet, forward and backward (gligen/kernels/attention.py). Both of ours
read two segments where they lie."""

TRITON_HEAD_DIM = 160  # the widest that the Triton kernel serves
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
        import gligen.kernels.attention  # noqa: F401  # registers torch.ops.gligen.attention

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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    extra: KeysValues | None = None,
    extra_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d) v for each head (Vaswani et al., 2017, eq. 1). The one place attention is computed.

    q: (B, L, C); k, v: (B, S, C). There is never a mask: padding takes part, as published.
    extra: keys and values (B, N, C) of a second segment, under the same softmax as if they stood behind k and v.
    extra_bias: (N,) or (B, N), added to the second segment's logits: a key with bias log n counts as n equal ones. It
    is a constant; no gradient flows to it.
    Returns (B, L, C). Raises ValueError if extra_bias comes without extra, or the chosen backend does not run on q's
    device.
    """
    if extra_bias is not None:
        if extra is None:
            raise ValueError("extra_bias was given without extra, the segment whose logits it is added to")
        extra_bias = extra_bias.detach()
    if _backend == "math":
        return _math(q, k, v, num_heads, extra, extra_bias)
    if _backend == "triton" and _is_served(q, num_heads):
        k_extra, v_extra = extra if extra is not None else (None, None)
        return torch.ops.gligen.attention(q, k, v, k_extra, v_extra, extra_bias, num_heads)[0]
    if _backend == "auto" and extra_bias is None and _has_hopper_kernel(q, k, num_heads):
        k_extra, v_extra = extra if extra is not None else (None, None)
        return torch.ops.gligen.hopper_attention(q, k, v, k_extra, v_extra, num_heads)
    return _sdpa(q, k, v, num_heads, extra, extra_bias)


def _has_hopper_kernel(q: Tensor, k: Tensor, num_heads: int) -> bool:
    """Whether Hopper's kernel takes these tensors and is the faster one: not for short segments such as captions."""
    return (
        q.device.type == "cuda"
        and q.dtype == torch.bfloat16
        and q.shape[-1] == 40 * num_heads
        and k.shape[1] >= 256
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
        and _is_hopper(q.device)
    )


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return _prepare_hopper(device)


@functools.cache
def _prepare_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU on which our kernel works; where it does not, that is told once."""
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
    """Both segments as one."""
    return (k, v) if extra is None else (torch.cat([k, extra[0]], dim=1), torch.cat([v, extra[1]], dim=1))


def _joined_bias(q: Tensor, k: Tensor, extra_bias: Tensor | None) -> Tensor | None:
    """The bias of both segments' keys, (B or 1, 1, 1, S + N) in q's dtype: 0 for the first."""
    if extra_bias is None:
        return None
    rows = extra_bias.to(q.dtype).reshape(-1, extra_bias.shape[-1])
    return F.pad(rows, (k.shape[1], 0))[:, None, None]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None, extra_bias: Tensor | None
) -> Tensor:
    bias = _joined_bias(q, k, extra_bias)
    q, k, v = (_split_heads(x, num_heads) for x in (q, *_join(k, v, extra)))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h l d -> b l (h d)")


def _math(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None, extra_bias: Tensor | None
) -> Tensor:
    """The formula as it is read, in float32 at least: what the other backends are held against."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = _joined_bias(q.to(dtype), k, extra_bias)
    qh, kh, vh = (_split_heads(x.to(dtype), num_heads) for x in (q, *_join(k, v, extra)))
    scores = qh @ kh.transpose(-1, -2) / qh.shape[-1] ** 0.5  # (B, h, L, S + N)
    if bias is not None:
        scores = scores + bias
    return rearrange(scores.softmax(dim=-1) @ vh, "b h l d -> b l (h d)").to(q.dtype)


class Attention(nn.Module):
    """Multi-head attention from `query_dim`-wide queries to `context_dim`-wide keys and values.

    Projections of queries, keys and values have no bias; the output's has. The projections are methods of their
    own because keys and values of captions and grounding tokens are computed once per request.
    """

    def __init__(self, query_dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values (B, S, C) of a context (B, S, context_dim)."""
        return self.to_k(context), self.to_v(context)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three (B, L, C) of the same tokens x (B, L, C), for self-attention."""
        return self.to_q(x), *self.keys_values(x)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: KeysValues | None = None,
        extra_bias: Tensor | None = None,
    ) -> Tensor:
        """Ready queries (B, L, C) against ready keys and values (B, S, C), and `extra` ones (B, N, C) as `attention`
        takes them; returns (B, L, C).
        """
        return self.to_out(attention(q, k, v, self.num_heads, extra, extra_bias))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries from x (B, L, C) against ready keys and values (B, S, C); returns (B, L, C)."""
        return self.attend(self.to_q(x), k, v)


class GEGLU(nn.Module):
    """x W₁ · GELU(x W₂), with the exact GELU (Shazeer, 2020, eq. 6)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # the Identity stands where LDM has a dropout of 0, so that names agree
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
