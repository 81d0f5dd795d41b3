"""Attention over two key/value segments for Hopper's tensor cores, in CUDA C++, forward.

Stable Diffusion's heads are 40 and 80 channels wide. Libraries (and Triton, whose tiles are powers of two) pad them to 64
and 128; Hopper's matrix instruction takes them nearly as they are: q·k in steps of 16 channels (48 and 80), p·v for exactly
40 and 80. At 4096 tokens and 40 channels that is two thirds of the arithmetic. The grounding segment is read where it
lies. Otherwise the method is FlashAttention-3's (Shah et al., 2024, algorithm 1): one warp copies keys and values into a
ring of buffers, warpgroups of 64 queries each work on them at their own pace, and the product p·v of one block runs while
the exponentials of the next are taken.

Compiled at first use by NVRTC, which comes with torch, and kept in `gligen.runtime.compile_cache`. Registered as
`torch.ops.gligen.hopper_attention`, for inference: training keeps the library's pair of forward and backward.

Legend: B batch, L queries, S keys of the first segment, N of the second, h heads, D channels of a head.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gligen.kernels.nvrtc import Kernel, assembled

SOURCE = Path(__file__).with_name("hopper.cu")
TYPES = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a program is cut. warpgroups: of 64 queries each; keys: of one block; stages: blocks in the ring; programs: at
    once on a multiprocessor; polynomial: of every 8 exponentials, how many are polynomials instead of the hardware's.
    """

    warpgroups: int
    keys: int
    stages: int
    programs: int
    registers: int
    polynomial: int = 0

    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)  # and those that copy

    def shared_bytes(self, head_dim: int) -> int:
        padded = -(-head_dim // 16) * 16
        queries = 64 * self.warpgroups * padded
        return 2 * (queries + self.stages * self.keys * (padded + head_dim)) + 16 * self.stages


def _matrix_product(name: str, n: int, kind: str, *, from_registers: bool) -> str:
    """A wrapper of `wgmma` for 64 × n accumulators: a[64, 16] · b[16, n], a from shared memory or registers.

    In the first case b lies along the sum (keys by channels), in the second across it (values).
    """
    count = n // 2
    outs = ", ".join(f"%{i}" for i in range(count))
    if from_registers:
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        b, flag, tail = f"%{count + 4}", f"%{count + 5}", "1, 1, 1"
        parameters, inputs = "const u32* a, u64 b", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)'
    else:
        a, b, flag, tail = f"%{count}", f"%{count + 1}", f"%{count + 2}", "1, 1, 0, 0"
        parameters, inputs = "u64 a, u64 b", '"l"(a), "l"(b)'
    accumulators = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void {name}(float* c, {parameters}, int adds) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {flag}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{outs}}}, {a}, {b}, p, {tail};\\n}}\\n"
      : {accumulators} : {inputs}, "r"(adds));
}}
"""


def source(head_dim: int, dtype: str, tile: Tile) -> str:
    """The CUDA C++ of one kind of kernel. head_dim: a multiple of 8."""
    kind = TYPES[dtype]
    constants = {
        "D": head_dim,
        "KD": -(-head_dim // 16) * 16,
        "WARPGROUPS": tile.warpgroups,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "PROGRAMS": tile.programs,
        "REGISTERS": tile.registers,
        "POLYNOMIAL": tile.polynomial,
    }
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    lines += [f'#define PACK "cvt.rn.{kind}x2.f32 %0, %1, %2;"', "typedef unsigned int u32;", "typedef unsigned long long u64;"]
    products = _matrix_product("scores_step", tile.keys, kind, from_registers=False)
    products += _matrix_product("values_step", head_dim, kind, from_registers=True)
    return "\n".join(lines) + products + SOURCE.read_text(encoding="utf-8")


TILES = {
    40: Tile(warpgroups=3, keys=128, stages=4, programs=1, registers=160),
    80: Tile(warpgroups=2, keys=128, stages=3, programs=1, registers=240),
}


class _Segment(ctypes.Structure):
    _fields_ = (("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("k_row", ctypes.c_int), ("v_row", ctypes.c_int))


@functools.cache
def _kernel(head_dim: int, dtype: torch.dtype, tile: Tile, device: int) -> Kernel:
    from gligen.runtime import compile_cache

    with torch.cuda.device(device):
        code = assembled(source(head_dim, str(dtype).removeprefix("torch."), tile), "sm_90a", compile_cache() / "hopper")
        return Kernel(code, "attention", tile.shared_bytes(head_dim))


def prepare(device: torch.device) -> tuple[int, ...]:
    """The head dims served on a Hopper GPU, their kernels compiled.

    Raises OSError without NVRTC or the driver's library, RuntimeError if they do not take the code.
    """
    for head_dim, tile in TILES.items():
        for dtype in (torch.bfloat16, torch.float16):
            _kernel(head_dim, dtype, tile, device.index or 0)
    return tuple(TILES)


def _aligned(x: Tensor) -> Tensor:
    """x itself if its rows begin at multiples of 16 bytes, as slices of a fused product do; else a copy."""
    is_aligned = x.stride(2) == 1 and x.stride(1) % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if is_aligned else x.contiguous()


def launch(q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None, num_heads: int, tile: Tile) -> Any:
    """Output (B, L, C) and log-sum-exps (B, h, L) float32."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    N = 0 if k2 is None else k2.shape[1]
    k2, v2 = (k, v) if k2 is None or v2 is None else (_aligned(k2), _aligned(v2))
    (B, L, C), S, D = q.shape, k.shape[1], q.shape[2] // num_heads
    out = torch.empty((B, L, C), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, num_heads, L), dtype=torch.float32, device=q.device)
    integer, long = ctypes.c_int, ctypes.c_longlong
    arguments = [
        ctypes.c_void_p(q.data_ptr()),
        _Segment(k.data_ptr(), v.data_ptr(), k.stride(1), v.stride(1)),
        _Segment(k2.data_ptr(), v2.data_ptr(), k2.stride(1), v2.stride(1)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(lse.data_ptr()),
        *(long(x.stride(0)) for x in (q, k, v, k2, v2)),
        *(integer(n) for n in (q.stride(1), L, S, N, num_heads)),
        ctypes.c_float(math.log2(math.e) / math.sqrt(D)),
    ]
    kernel = _kernel(D, q.dtype, tile, q.device.index)
    kernel.launch((-(-L // (64 * tile.warpgroups)), B * num_heads), tile.threads(), arguments)
    return out, lse


@torch.library.custom_op("gligen::hopper_attention", mutates_args=(), device_types="cuda")
def hopper_attention(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Output (B, L, C) and the log-sum-exp of every query's scores (B, h, L) float32, which has no gradient."""
    return launch(q, k, v, k_extra, v_extra, num_heads, TILES[q.shape[2] // num_heads])


@hopper_attention.register_fake
def _shapes(
    q: Tensor, k: Tensor, v: Tensor, k_extra: Tensor | None, v_extra: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    B, L, C = q.shape
    return q.new_empty((B, L, C)), q.new_empty((B, num_heads, L), dtype=torch.float32)
