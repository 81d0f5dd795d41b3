"""Attention over two key/value segments as one Triton kernel, forward and backward.

The gated layer's visual queries look at visual and grounding tokens under one softmax. The grounding tokens' keys and
values are made once per request, so joining them to the visual ones at every step would only copy memory; the kernel
walks over both where they lie. The method is FlashAttention-2's (Dao, 2023): scores live in registers block by block,
a running maximum and sum give the softmax, and the backward pass recomputes the scores from the log-sum-exp.

Legend: B batch, L queries, S keys of the first segment, N of the second, h heads, d channels of a head, C = h·d.

Registered as `torch.ops.gligen.attention`: `torch.compile` traces it whole-graph, and it differentiates. With
TRITON_INTERPRET=1 in the environment before Triton is imported, it runs on the CPU (slowly, for tests).
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

LOG2E = tl.constexpr(1.4426950408889634)

# Triton's tiles are powers of two wide, and the heads of SD's UNet are 40, 80 and 160. Rounded up they would become
# 64, 128 and 256: 1.6 times the arithmetic and registers. So a head is cut in two pieces, each a power of two:
# 40 → 32 + 16 (the tensor cores' shortest product is 16; the last 8 columns are masked off and never read),
# 80 → 64 + 16 and 160 → 128 + 32 with nothing padded. q·k is the sum of both pieces' products; p·v is two products.


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Widths (first, second) of a head's pieces: powers of two ≥ 16 that cover it; second is 0 where one will do."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = max(16, triton.next_power_of_2(rest))
    return (first, second) if second < first else (2 * first, 0)


# Tensors are (B, length, C) with the last stride 1; a pointer handed to a helper is already that of one image and head.


@triton.jit
def _load(ptr, rows, stride, end, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of some rows; 0 beyond `end` (if MASKED) and beyond D."""
    columns = FIRST + tl.arange(0, WIDTH)
    at = ptr + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > D:
        if MASKED:
            tile = tl.load(at, mask=(rows[:, None] < end) & (columns[None, :] < D), other=0.0)
        else:
            tile = tl.load(at, mask=columns[None, :] < D, other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=rows[:, None] < end, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store(ptr, rows, stride, end, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The opposite of `_load`, always masked: once per program."""
    columns = FIRST + tl.arange(0, WIDTH)
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < end) & (columns[None, :] < D))


@triton.jit
def _attend(
    q1, q2, acc1, acc2, top, total,
    k_ptr, v_ptr, k_stride, v_stride, begin, end, length, softmax_scale: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One walk over keys [begin, end) of a segment of `length`: the running maximum, sum and weighted values."""
    scale = softmax_scale * LOG2E  # exp(x) = 2^(x·log₂e): the hardware's exponential has base 2
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k1 = _load(k_ptr, keys, k_stride, length, 0, D1, D, MASKED)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = _load(k_ptr, keys, k_stride, length, D1, D2, D, MASKED)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
        if MASKED:
            scores = tl.where(keys[None, :] < length, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.math.exp2(scores * scale - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v1 = _load(v_ptr, keys, v_stride, length, 0, D1, D, MASKED)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision="ieee")
        if D2 > 0:
            v2 = _load(v_ptr, keys, v_stride, length, D1, D2, D, MASKED)
            acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc1, acc2, top, total


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, k_extra_ptr, v_extra_ptr, out_ptr, lse_ptr,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, ke_batch, ke_row, ve_batch, ve_row,
    L, S, N, num_heads, softmax_scale: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_EXTRA: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of queries of one image and head. Grid (⌈L / BLOCK_M⌉, B·h)."""
    image = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += image * q_batch + head * D
    k_ptr += image * k_batch + head * D
    v_ptr += image * v_batch + head * D

    q1 = _load(q_ptr, rows, q_row, L, 0, D1, D, True)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        q2 = _load(q_ptr, rows, q_row, L, D1, D2, D, True)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    else:
        q2, acc2 = q1, acc1  # never looked at
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    whole = S // BLOCK_N * BLOCK_N  # blocks without a mask, then what is left
    acc1, acc2, top, total = _attend(
        q1, q2, acc1, acc2, top, total, k_ptr, v_ptr, k_row, v_row, 0, whole, S, softmax_scale,
        D, D1, D2, BLOCK_N, False,
    )  # fmt: skip
    acc1, acc2, top, total = _attend(
        q1, q2, acc1, acc2, top, total, k_ptr, v_ptr, k_row, v_row, whole, S, S, softmax_scale,
        D, D1, D2, BLOCK_N, True,
    )  # fmt: skip
    if HAS_EXTRA:
        acc1, acc2, top, total = _attend(
            q1, q2, acc1, acc2, top, total,
            k_extra_ptr + image * ke_batch + head * D, v_extra_ptr + image * ve_batch + head * D,
            ke_row, ve_row, 0, N, N, softmax_scale,
            D, D1, D2, BLOCK_E, True,
        )  # fmt: skip

    out_ptr += image * L * num_heads * D + head * D
    _store(out_ptr, rows, num_heads * D, L, acc1 / total[:, None], 0, D1, D)
    if D2 > 0:
        _store(out_ptr, rows, num_heads * D, L, acc2 / total[:, None], D1, D2, D)
    lse = (top + tl.math.log2(total)) / LOG2E
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * L + rows, lse, mask=rows < L)


@triton.jit
def _delta_kernel(
    out_ptr, grad_ptr, delta_ptr, grad_batch, grad_row, L, num_heads,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Δ = Σ out · ∂out for each query and head, which the softmax's derivative subtracts. Grid (⌈L / BLOCK_M⌉, B·h)."""
    image = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = _load(out_ptr + image * L * num_heads * D + head * D, rows, num_heads * D, L, 0, WIDTH, D, True)
    grad = _load(grad_ptr + image * grad_batch + head * D, rows, grad_row, L, 0, WIDTH, D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * L + rows, delta, mask=rows < L)


@triton.jit
def _query_grad(
    q1, q2, g1, g2, lse, delta, acc1, acc2,
    k_ptr, v_ptr, k_stride, v_stride, begin, end, length, softmax_scale: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One walk over keys [begin, end): acc += ∂scores · k. g: gradient of the output; lse in units of log 2."""
    scale = softmax_scale * LOG2E
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k1 = _load(k_ptr, keys, k_stride, length, 0, D1, D, MASKED)
        v1 = _load(v_ptr, keys, v_stride, length, 0, D1, D, MASKED)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        dp = tl.dot(g1, tl.trans(v1), input_precision="ieee")
        if D2 > 0:
            k2 = _load(k_ptr, keys, k_stride, length, D1, D2, D, MASKED)
            v2 = _load(v_ptr, keys, v_stride, length, D1, D2, D, MASKED)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
            dp = tl.dot(g2, tl.trans(v2), dp, input_precision="ieee")
        if MASKED:
            scores = tl.where(keys[None, :] < length, scores, float("-inf"))
        p = tl.math.exp2(scores * scale - lse[:, None])
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        acc1 = tl.dot(ds, k1, acc1, input_precision="ieee")
        if D2 > 0:
            acc2 = tl.dot(ds, k2, acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def _query_grad_kernel(
    q_ptr, k_ptr, v_ptr, k_extra_ptr, v_extra_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, ke_batch, ke_row, ve_batch, ve_row,
    grad_batch, grad_row, L, S, N, num_heads, softmax_scale: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_EXTRA: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries. Grid (⌈L / BLOCK_M⌉, B·h)."""
    image = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += image * q_batch + head * D
    k_ptr += image * k_batch + head * D
    v_ptr += image * v_batch + head * D
    grad_ptr += image * grad_batch + head * D
    lse_at = tl.program_id(1).to(tl.int64) * L + rows

    q1 = _load(q_ptr, rows, q_row, L, 0, D1, D, True)
    g1 = _load(grad_ptr, rows, grad_row, L, 0, D1, D, True)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        q2 = _load(q_ptr, rows, q_row, L, D1, D2, D, True)
        g2 = _load(grad_ptr, rows, grad_row, L, D1, D2, D, True)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    else:
        q2, g2, acc2 = q1, g1, acc1  # never looked at
    lse = tl.load(lse_ptr + lse_at, mask=rows < L, other=float("inf")) * LOG2E  # no weight beyond the end
    delta = tl.load(delta_ptr + lse_at, mask=rows < L, other=0.0)

    whole = S // BLOCK_N * BLOCK_N
    acc1, acc2 = _query_grad(
        q1, q2, g1, g2, lse, delta, acc1, acc2, k_ptr, v_ptr, k_row, v_row, 0, whole, S, softmax_scale,
        D, D1, D2, BLOCK_N, False,
    )  # fmt: skip
    acc1, acc2 = _query_grad(
        q1, q2, g1, g2, lse, delta, acc1, acc2, k_ptr, v_ptr, k_row, v_row, whole, S, S, softmax_scale,
        D, D1, D2, BLOCK_N, True,
    )  # fmt: skip
    if HAS_EXTRA:
        acc1, acc2 = _query_grad(
            q1, q2, g1, g2, lse, delta, acc1, acc2,
            k_extra_ptr + image * ke_batch + head * D, v_extra_ptr + image * ve_batch + head * D,
            ke_row, ve_row, 0, N, N, softmax_scale,
            D, D1, D2, BLOCK_E, True,
        )  # fmt: skip

    dq_ptr += image * L * num_heads * D + head * D
    _store(dq_ptr, rows, num_heads * D, L, acc1 * softmax_scale, 0, D1, D)
    if D2 > 0:
        _store(dq_ptr, rows, num_heads * D, L, acc2 * softmax_scale, D1, D2, D)


@triton.jit
def _key_grad(
    k1, k2, v1, v2, dk1, dk2, dv1, dv2,
    q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, grad_stride, begin, end, length, softmax_scale: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One walk over queries [begin, end) of `length`. Scores are held transposed, keys by queries."""
    scale = softmax_scale * LOG2E
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q1 = _load(q_ptr, rows, q_stride, length, 0, D1, D, MASKED)
        g1 = _load(grad_ptr, rows, grad_stride, length, 0, D1, D, MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + rows, mask=rows < length, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + rows, mask=rows < length, other=0.0)
        else:
            lse = tl.load(lse_ptr + rows) * LOG2E
            delta = tl.load(delta_ptr + rows)
        scores = tl.dot(k1, tl.trans(q1), input_precision="ieee")
        dp = tl.dot(v1, tl.trans(g1), input_precision="ieee")
        if D2 > 0:
            q2 = _load(q_ptr, rows, q_stride, length, D1, D2, D, MASKED)
            g2 = _load(grad_ptr, rows, grad_stride, length, D1, D2, D, MASKED)
            scores = tl.dot(k2, tl.trans(q2), scores, input_precision="ieee")
            dp = tl.dot(v2, tl.trans(g2), dp, input_precision="ieee")
        p = tl.math.exp2(scores * scale - lse[None, :])
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        dv1 = tl.dot(p, g1, dv1, input_precision="ieee")
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dv2 = tl.dot(p, g2, dv2, input_precision="ieee")
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv1, dv2


@triton.jit
def _key_grad_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, grad_batch, grad_row,
    L, S, num_heads, share, part_stride, softmax_scale: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of one segment's keys and values, from one share of the queries.

    Grid (⌈S / BLOCK_N⌉, B·h, parts): part i takes queries [i·share, (i+1)·share) and writes to the i-th copy.
    """
    image = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += image * q_batch + head * D
    k_ptr += image * k_batch + head * D
    v_ptr += image * v_batch + head * D
    grad_ptr += image * grad_batch + head * D
    lse_ptr += tl.program_id(1).to(tl.int64) * L
    delta_ptr += tl.program_id(1).to(tl.int64) * L

    k1 = _load(k_ptr, keys, k_row, S, 0, D1, D, True)
    v1 = _load(v_ptr, keys, v_row, S, 0, D1, D, True)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if D2 > 0:
        k2 = _load(k_ptr, keys, k_row, S, D1, D2, D, True)
        v2 = _load(v_ptr, keys, v_row, S, D1, D2, D, True)
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
        dv2 = tl.zeros([BLOCK_N, D2], tl.float32)
    else:
        k2, v2, dk2, dv2 = k1, v1, dk1, dv1  # never looked at

    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, L)
    whole = begin + (end - begin) // BLOCK_M * BLOCK_M
    dk1, dk2, dv1, dv2 = _key_grad(
        k1, k2, v1, v2, dk1, dk2, dv1, dv2, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_row, grad_row,
        begin, whole, end, softmax_scale, D, D1, D2, BLOCK_M, False,
    )  # fmt: skip
    dk1, dk2, dv1, dv2 = _key_grad(
        k1, k2, v1, v2, dk1, dk2, dv1, dv2, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_row, grad_row,
        whole, end, end, softmax_scale, D, D1, D2, BLOCK_M, True,
    )  # fmt: skip

    at = tl.program_id(2).to(tl.int64) * part_stride + image * S * num_heads * D + head * D
    _store(dk_ptr + at, keys, num_heads * D, S, dk1 * softmax_scale, 0, D1, D)
    _store(dv_ptr + at, keys, num_heads * D, S, dv1, 0, D1, D)
    if D2 > 0:
        _store(dk_ptr + at, keys, num_heads * D, S, dk2 * softmax_scale, D1, D2, D)
        _store(dv_ptr + at, keys, num_heads * D, S, dv2, D1, D2, D)


# Rows are (BLOCK_M, BLOCK_N, warps, stages), by the widest head they serve. Tuned on the first call for each
# (L, S, d, dtype) and kept for the process; neither the batch nor the number of grounding tokens tunes anew. What does
# not fit a smaller card's shared memory is passed over by the tuner, so one short list serves Ampere and Hopper. On
# Hopper none spills registers, on Ampere each list has one that does not (tests/kernels/test_kernel_compilation.py).

_SHAPES: dict[str, dict[int, list[tuple[int, int, int, int]]]] = {
    "forward": {
        64: [(128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
        96: [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        160: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)],
    },
    "query grad": {
        64: [(128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3)],
        96: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)],
        160: [(128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    },
    "key grad": {
        64: [(64, 128, 8, 3), (64, 64, 4, 3), (32, 128, 4, 3)],
        96: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3)],
        160: [(32, 64, 8, 2), (32, 16, 4, 2)],
    },
    # few keys make few programs: each takes a share of the queries, and the shares are added up
    "key grad, few keys": {64: [(64, 32, 4, 3)], 96: [(32, 32, 4, 3)], 160: [(32, 16, 4, 2)]},
}
_FLOAT32 = [(64, 32, 4, 2), (32, 32, 4, 2)]  # exact products run outside the tensor cores: for checks, not for speed
_FEW_KEYS = 128
_SHARE = 256  # queries in a share, at least

Launcher = Any  # a kernel with its launch shapes; Triton has no type for it


def is_interpreted() -> bool:
    """Whether Triton runs its kernels as NumPy on the CPU: decided by the environment before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _tuned(kernel: Launcher, table: str, head_dim: int, is_float32: bool) -> Launcher:
    """`kernel` with the launch shapes of its table for this width of head."""
    width, rows = sum(split_head_dim(head_dim)), _SHAPES[table]
    shapes = _FLOAT32 if is_float32 else rows[min(widest for widest in rows if width <= widest)]
    if is_interpreted():
        shapes = [(32, 16, 4, 1)]  # small and unequal, so that tests of a few tokens see whole blocks and remainders
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in shapes
    ]
    return triton.autotune(configs=configs, key=["L", "S", "D"])(kernel)


def _rows(x: Tensor) -> Tensor:
    """x itself if its channels lie side by side, as in a slice of one fused product; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _second(k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The second segment and its length; where there is none, the first stands in and is never read."""
    if k_extra is None or v_extra is None:
        return k, v, 0
    return _rows(k_extra), _rows(v_extra), k_extra.shape[1]


@triton_op("gligen::attention", mutates_args={})
def _attention(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Output (B, L, C) and the log-sum-exp of every query's scores (B, h, L) float32, which has no gradient."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    k2, v2, N = _second(k, v, k_extra, v_extra)
    (B, L, C), S, D = q.shape, k.shape[1], q.shape[2] // num_heads
    D1, D2 = split_head_dim(D)
    out = torch.empty((B, L, C), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, num_heads, L), dtype=torch.float32, device=q.device)
    kernel = _tuned(_forward_kernel, "forward", D, q.dtype == torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(L, meta["BLOCK_M"]), B * num_heads

    wrap_triton(kernel)[grid](
        q, k, v, k2, v2, out, lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k2.stride(0), k2.stride(1), v2.stride(0), v2.stride(1),
        L, S, N, num_heads, 1 / math.sqrt(D),
        D=D, D1=D1, D2=D2, HAS_EXTRA=k_extra is not None, BLOCK_E=32 if N <= 32 else 64,
    )  # fmt: skip
    return out, lse


@triton_op("gligen::attention_delta", mutates_args={})
def _delta(out: Tensor, grad: Tensor, num_heads: int) -> Tensor:
    """Σ out · grad over each head's channels, (B, h, L) float32."""
    out, grad = _rows(out), _rows(grad)
    (B, L, _), D = out.shape, out.shape[2] // num_heads
    delta = torch.empty((B, num_heads, L), dtype=torch.float32, device=out.device)
    width = max(16, triton.next_power_of_2(D))
    wrap_triton(_delta_kernel)[(triton.cdiv(L, 32), B * num_heads)](
        out, grad, delta, grad.stride(0), grad.stride(1), L, num_heads, D=D, WIDTH=width, BLOCK_M=32
    )
    return delta


@triton_op("gligen::attention_query_grad", mutates_args={})
def _query_grads(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None,
    grad: Tensor, lse: Tensor, delta: Tensor, num_heads: int,
) -> Tensor:  # fmt: skip
    """Gradient of the queries (B, L, C)."""
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    k2, v2, N = _second(k, v, k_extra, v_extra)
    (B, L, C), S, D = q.shape, k.shape[1], q.shape[2] // num_heads
    D1, D2 = split_head_dim(D)
    dq = torch.empty((B, L, C), dtype=q.dtype, device=q.device)
    kernel = _tuned(_query_grad_kernel, "query grad", D, q.dtype == torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(L, meta["BLOCK_M"]), B * num_heads

    wrap_triton(kernel)[grid](
        q, k, v, k2, v2, grad, lse, delta, dq,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k2.stride(0), k2.stride(1), v2.stride(0), v2.stride(1), grad.stride(0), grad.stride(1),
        L, S, N, num_heads, 1 / math.sqrt(D),
        D=D, D1=D1, D2=D2, HAS_EXTRA=k_extra is not None, BLOCK_E=32 if N <= 32 else 64,
    )  # fmt: skip
    return dq


@triton_op("gligen::attention_key_grad", mutates_args={})
def _key_grads(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of one segment's keys and values, each (B, S, C). Sums have a fixed order: no atomics."""
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    (B, L, _), (_, S, C), D = q.shape, k.shape, q.shape[2] // num_heads
    D1, D2 = split_head_dim(D)
    is_few = S <= _FEW_KEYS
    share = max(_SHARE, triton.cdiv(triton.cdiv(L, 16), 64) * 64) if is_few else L
    parts = triton.cdiv(L, share)
    dtype = torch.float32 if is_few else k.dtype
    dk = torch.empty((parts, B, S, C), dtype=dtype, device=q.device)
    dv = torch.empty((parts, B, S, C), dtype=dtype, device=q.device)
    kernel = _tuned(_key_grad_kernel, "key grad, few keys" if is_few else "key grad", D, q.dtype == torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(S, meta["BLOCK_N"]), B * num_heads, parts

    wrap_triton(kernel)[grid](
        q, k, v, grad, lse, delta, dk, dv,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        grad.stride(0), grad.stride(1), L, S, num_heads, share, dk.stride(0), 1 / math.sqrt(D),
        D=D, D1=D1, D2=D2,
    )  # fmt: skip
    return dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, k_extra, v_extra, out, lse = ctx.saved_tensors
    needs_q, *needs = ctx.needs_input_grad[:5]
    grad = grad.to(q.dtype)
    delta = _delta(out, grad, ctx.num_heads)
    dq = dk = dv = dk_extra = dv_extra = None
    if needs_q:
        dq = _query_grads(q, k, v, k_extra, v_extra, grad, lse, delta, ctx.num_heads)
    if any(needs[:2]):
        dk, dv = _key_grads(q, k, v, grad, lse, delta, ctx.num_heads)
    if any(needs[2:]):
        dk_extra, dv_extra = _key_grads(q, k_extra, v_extra, grad, lse, delta, ctx.num_heads)
    return dq, dk, dv, dk_extra, dv_extra, None


_attention.register_autograd(_backward, setup_context=_keep)
