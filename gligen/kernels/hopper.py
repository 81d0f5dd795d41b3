"""Attention over two key/value segments for Hopper's tensor cores, in CUDA C++: forward, bfloat16, heads of 40.

Heads of 40 channels hold most of Stable Diffusion's attention: 4096 tokens at 512 × 512 pixels. Libraries (and Triton,
whose tiles are powers of two) pad them to 64; Hopper's matrix instruction takes them nearly as they are: q·k in steps
of 16 channels (48), p·v for exactly 40 and a column of ones, which gives the softmax's sum without an addition. The
grounding segment is read where it lies. Otherwise the method is FlashAttention-3's (Shah et al., 2024, algorithm 1): a
warpgroup copies keys and values into a ring of buffers, others of 64 queries each work on them at their own pace, and
the product p·v of one block runs while the exponentials of the next are taken. What was measured, also of what is not
here (heads of 80 channels, exponentials by polynomial, warpgroups in turn), is in docs/performance.md.

Compiled at first use by NVRTC, which comes with torch, and kept in `gligen.files.compile_cache`. Registered as
`torch.ops.gligen.hopper_attention`, for what needs no gradient: where one flows, training keeps the library's pair of
forward and backward.

Legend: B batch, L queries, S keys of the first segment, N of the second, h heads, C = 40·h channels.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gligen.files import compile_cache
from gligen.kernels.nvrtc import Kernel, assembled

HEAD_DIM = 40
ARCH = "sm_90a"
QUERIES, THREADS = 3 * 64, 4 * 128  # of a program: three warpgroups, and the one that copies
SHARED_BYTES = 2 * (QUERIES * 48 + 4 * 128 * (48 + 48)) + 4 * 16  # queries; keys, values and ones; barriers


def _matrix_product(name: str, n: int, *, from_registers: bool) -> str:
    """A wrapper of `wgmma` for 64 × n accumulators: c += a[64, 16] · b[16, n], a from shared memory or registers.

    In the first case b lies along the sum (keys by channels), in the second across it (values).
    """
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    if from_registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b, flag, tail = f"%{count + 4}", f"%{count + 5}", "1, 1, 1"
        parameters, inputs = "const u32* a, u64 b", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)'
    else:
        a, b, flag, tail = f"%{count}", f"%{count + 1}", f"%{count + 2}", "1, 1, 0, 0"
        parameters, inputs = "u64 a, u64 b", '"l"(a), "l"(b)'
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void {name}(float* c, {parameters}, int adds) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {flag}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{accumulators}}}, {a}, {b}, p, {tail};\\n}}\\n"
      : {outputs} : {inputs}, "r"(adds));
}}
"""


def source() -> str:
    """The kernel's CUDA C++: what Hopper's kernels share, the matrix products of its sizes, and itself."""
    shared, own = (Path(__file__).with_name("cuda") / name for name in ("hopper.cuh", "attention.cu"))
    scores = _matrix_product("scores_step", 128, from_registers=False)
    values = _matrix_product("values_step", HEAD_DIM + 8, from_registers=True)
    return "".join((shared.read_text(encoding="utf-8"), scores, values, own.read_text(encoding="utf-8")))


@functools.cache
def kernel(device: int) -> Kernel:
    """The compiled kernel on a Hopper GPU.

    Raises OSError without NVRTC or the driver's library, RuntimeError if they do not take the code.
    """
    with torch.cuda.device(device):
        return Kernel(assembled(source(), ARCH, compile_cache() / "hopper"), "attention", SHARED_BYTES)


def check(device: int) -> None:
    """Raises RuntimeError unless the kernel gives what the formula gives.

    On more blocks than the ring holds, a remainder and a second segment.

    Machine code meets drivers and cards that nobody has tried; a wrong image would not show it.
    """
    place = torch.device("cuda", device)
    generator = torch.Generator(place).manual_seed(0)

    def draw(tokens: int) -> Tensor:
        return torch.randn(2, tokens, 2 * HEAD_DIM, generator=generator, device=place, dtype=torch.bfloat16)

    fused = torch.cat([draw(1300), draw(1300), draw(1300)], dim=2)
    q, k, v = fused.chunk(3, dim=2)  # as they come from one product
    k2, v2 = draw(7), draw(7)
    with torch.no_grad():
        out = hopper_attention(q, k, v, k2, v2, 2)
        heads = [
            x.float().unflatten(2, (2, -1)).transpose(1, 2) for x in (q, torch.cat([k, k2], 1), torch.cat([v, v2], 1))
        ]
        expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        error = float((out.float() - expected).norm() / expected.norm())
    if not error < 2e-2:  # bfloat16 has 2.3e-3; NaN is no number below it
        raise RuntimeError(f"its results are {error:.0e} from the formula's")


class _Segment(ctypes.Structure):
    _fields_ = (("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("k_row", ctypes.c_int), ("v_row", ctypes.c_int))


def _aligned(x: Tensor) -> Tensor:
    """x itself if its rows begin at multiples of 16 bytes, as slices of a fused product do; else a copy."""
    is_aligned = x.stride(2) == 1 and x.stride(1) % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("gligen::hopper_attention", mutates_args=(), device_types="cuda")
def hopper_attention(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None, num_heads: int
) -> Tensor:
    """Attention as `gligen.kernels.backends.attention` takes and gives it; bfloat16, C = 40 · num_heads."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    N = 0 if k_extra is None else k_extra.shape[1]
    k2, v2 = (k, v) if k_extra is None or v_extra is None else (_aligned(k_extra), _aligned(v_extra))
    (B, L, C), S = q.shape, k.shape[1]
    out = torch.empty((B, L, C), dtype=q.dtype, device=q.device)
    arguments = [
        ctypes.c_void_p(q.data_ptr()),
        _Segment(k.data_ptr(), v.data_ptr(), k.stride(1), v.stride(1)),
        _Segment(k2.data_ptr(), v2.data_ptr(), k2.stride(1), v2.stride(1)),
        ctypes.c_void_p(out.data_ptr()),
        *(ctypes.c_longlong(x.stride(0)) for x in (q, k, v, k2, v2)),
        *(ctypes.c_int(n) for n in (q.stride(1), L, S, N, num_heads)),
        ctypes.c_float(math.log2(math.e) / math.sqrt(HEAD_DIM)),
    ]
    with torch.cuda.device(q.device):
        kernel(q.device.index).launch((-(-L // QUERIES), B * num_heads), THREADS, arguments)
    return out


@hopper_attention.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None, num_heads: int) -> Tensor:
    return q.new_empty(q.shape)
