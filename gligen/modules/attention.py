"""Attention and feed-forward layers of LDM's transformer blocks, under LDM's names.

Legend: B batch, L queries, S keys, N keys of a second segment, C channels, h heads, d = C / h.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

logger = logging.getLogger(__name__)

KeysValues = tuple[Tensor, Tensor]

BACKENDS = ("auto", "sdpa", "math", "flex", "triton")
"""auto: on Hopper GPUs, without gradients, our kernel for SD's heads (gligen/kernels/hopper.py), else sdpa. sdpa: the
library's kernels, chosen by shape. math: the formula written out. flex: FlexAttention, fused by torch.compile. triton:
our kernel (gligen/kernels/attention.py), which like Hopper's reads two segments where they lie."""

_backend = "auto"  # read at every call: under torch.compile one guard, and one compilation for each backend used


def available_backends(device: str | torch.device) -> tuple[str, ...]:
    """The backends that run on a device, in the order of `BACKENDS`.

    flex and triton need CUDA, and triton a card from Ampere on. On the CPU flex has no backward pass, and triton is
    there only with TRITON_INTERPRET=1 in the environment. Nothing is imported to find out.
    """
    device = torch.device(device)
    found = {"auto", "sdpa", "math"}
    has_triton = importlib.util.find_spec("triton") is not None
    if device.type == "cuda" and torch.cuda.is_available() and has_triton:
        found.add("flex")
        if torch.cuda.get_device_capability(device) >= (8, 0):
            found.add("triton")
    elif device.type == "cpu":
        found.add("flex")
        if has_triton and os.environ.get("TRITON_INTERPRET") == "1":
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
    if name in _SERVED:
        _announce(name)
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


_SERVED = {"flex": (16, 256), "triton": (1, 160)}  # head dims


@functools.cache
def _announce(name: str) -> None:
    low, high = _SERVED[name]
    logger.info("attention: %s for heads of %d to %d channels; others (the VAE's 512) by SDPA", name, low, high)


def _is_served(q: Tensor, num_heads: int) -> bool:
    """Whether the chosen fused kernel takes these queries; other head dims, and float64, go to SDPA."""
    if q.device.type == "cpu" and _backend == "flex":
        return True  # FlexAttention's plain code, which takes everything
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"attention backend '{_backend}' needs CUDA tensors, got {q.device.type}: try sdpa or math")
    low, high = _SERVED[_backend]
    return low <= q.shape[-1] // num_heads <= high and q.dtype != torch.float64


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
    if _backend == "flex" and _is_served(q, num_heads):
        return _flex(q, k, v, num_heads, extra, extra_bias)
    if _backend == "triton" and _is_served(q, num_heads):
        k_extra, v_extra = extra if extra is not None else (None, None)
        return torch.ops.gligen.attention(q, k, v, k_extra, v_extra, extra_bias, num_heads)[0]
    if _backend == "auto" and extra_bias is None and _has_hopper_kernel(q, k, num_heads):
        k_extra, v_extra = extra if extra is not None else (None, None)
        return torch.ops.gligen.hopper_attention(q, k, v, k_extra, v_extra, num_heads)[0]
    return _sdpa(q, k, v, num_heads, extra, extra_bias)


def _has_hopper_kernel(q: Tensor, k: Tensor, num_heads: int) -> bool:
    """Whether our kernel takes these tensors and is the fastest (docs/performance.md): not for short segments."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[1] >= 256
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
        and q.shape[-1] // num_heads in _hopper_head_dims(q.device)
    )


@torch.compiler.assume_constant_result
def _hopper_head_dims(device: torch.device) -> tuple[int, ...]:
    return _prepare_hopper(device)


@functools.cache
def _prepare_hopper(device: torch.device) -> tuple[int, ...]:
    """The head dims that our kernel serves on a device, none where it cannot be made; that is told once."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return ()
    try:
        from gligen.kernels.hopper import prepare

        return prepare(device)
    except (OSError, RuntimeError) as error:
        logger.warning("attention by SDPA: our kernel cannot be compiled here (%s)", str(error).split("\n")[0])
        return ()


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


def _flex(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None, extra_bias: Tensor | None
) -> Tensor:
    """FlexAttention. Two segments are two calls merged by their log-sum-exps; the CPU gives none, and joins them."""
    from torch.nn.attention.flex_attention import AuxRequest

    is_cuda = q.device.type == "cuda"
    flex = _flex_function(is_cuda)
    if extra is not None and not is_cuda:
        bias = _joined_bias(q, k, extra_bias)
        (k, v), extra = _join(k, v, extra), None
    else:
        bias = None if extra_bias is None else _joined_bias(q, k[:, :0], extra_bias)
    qh, kh, vh = (_split_heads(x, num_heads) for x in (q, k, v))
    if extra is None:
        out = flex(qh, kh, vh, score_mod=_add(bias), kernel_options=_flex_options(qh, kh))
        return rearrange(out, "b h l d -> b l (h d)")

    aux = AuxRequest(lse=True)
    k2, v2 = (_split_heads(x, num_heads) for x in extra)
    out1, aux1 = flex(qh, kh, vh, kernel_options=_flex_options(qh, kh), return_aux=aux)
    out2, aux2 = flex(qh, k2, v2, score_mod=_add(bias), kernel_options=_flex_options(qh, k2), return_aux=aux)
    share = torch.sigmoid(aux1.lse - aux2.lse)[..., None]  # the first segment's part of the softmax's sum
    out = (share * out1 + (1 - share) * out2).to(q.dtype)  # float32: the log-sum-exps are
    return rearrange(out, "b h l d -> b l (h d)")


def _add(bias: Tensor | None) -> Callable[..., Tensor] | None:
    """FlexAttention's way to add a bias (B or 1, 1, 1, S) to the scores."""
    if bias is None:
        return None
    shared = bias.shape[0] == 1
    rows = bias[:, 0, 0]

    def add(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + (rows[0, key] if shared else rows[image, key])

    return add


def _flex_function(is_cuda: bool) -> Callable[..., Any]:
    """FlexAttention as it is inside a compiled region and on the CPU; compiled by itself in eager code on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling() or not is_cuda:
        return flex_attention
    return _compiled_flex()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        # a UNet has a dozen pairs of lengths and three head dims; past the usual limit of 8 it would stop
        with torch._dynamo.config.patch(recompile_limit=256):
            return compiled(*args, **kwargs)

    return call


def _flex_options(q: Tensor, k: Tensor) -> dict[str, Any] | None:
    """Tiles for head dims 40, 80 and 160, which FlexAttention pads to 64, 128 and 256 but finds no tuned tile for.

    They are the ones its own tables give the padded head dims (torch/_inductor/heuristics/template/triton.py), with
    short key blocks for short segments. None leaves the choice to it: float32 and other devices. The backward pass
    keeps its own, which are by ranges of head dims.
    """
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return None
    is_hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    head_dim = q.shape[-1]
    if head_dim <= 64:
        block_m, block_n, warps, stages = (128, 128, 4, 3) if is_hopper else (128, 64, 4, 3)
    elif head_dim <= 128:
        block_m, block_n, warps, stages = 128, 64, 8, 3
    else:
        block_m, block_n, warps, stages = (64, 32, 4, 3) if is_hopper else (32, 64, 4, 3)
    if k.shape[2] <= 32:
        block_n = 32
    elif k.shape[2] <= 128:
        block_n = min(block_n, 64)
    return {
        "BACKEND": "TRITON",
        "fwd_BLOCK_M": block_m,
        "fwd_BLOCK_N": block_n,
        "fwd_num_warps": warps,
        "fwd_num_stages": stages,
    }


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
