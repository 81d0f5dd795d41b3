"""x W₁ · GELU(x W₂) in one kernel for Hopper's tensor cores, forward.

Apart, the product writes both halves (2·H numbers a token) and a second kernel reads them again to write H. Here weights
stay in shared memory while tokens stream past them, and a product's gates are computed while the next product runs.
That needs panels of weights that fit: layers of 320 and 640 channels, where Stable Diffusion's tokens are many; wider
layers keep the two steps, whose product is then much longer than the gates.

Registered as `torch.ops.gligen.geglu` for inference; training needs both halves anyway.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gligen.kernels.hopper import TYPES, assembly, matrix_product
from gligen.kernels.nvrtc import Kernel, assembled

HIDDEN = {320: 128, 640: 64}  # hidden channels of a panel, by the layer's width: 160 KiB of weights
SLOTS, PIECE_BYTES = 8, 64 * 64 * 2  # as geglu.cu has them
THREADS = 384


def serves(weight: Tensor) -> bool:
    """Whether the kernel takes a layer with this weight (2·H, K): half precision, K of `HIDDEN`, on a Hopper GPU."""
    return (
        weight.device.type == "cuda"
        and torch.cuda.get_device_capability(weight.device)[0] == 9
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.is_contiguous()
        and weight.shape[1] in HIDDEN
        and weight.shape[0] % (2 * HIDDEN[weight.shape[1]]) == 0
    )


def source(width: int, dtype: str) -> str:
    """The CUDA C++ of one kind of kernel."""
    hidden = HIDDEN[width]
    product = matrix_product("panel_step", 2 * hidden, TYPES[dtype], from_registers=False)
    return assembly(dtype, {"K": width, "HIDDEN": hidden}, product, "geglu.cu")


@functools.cache
def kernel(width: int, dtype: torch.dtype, device: int) -> Kernel:
    """Raises OSError or RuntimeError where it cannot be made."""
    from gligen.runtime import compile_cache

    panel = 2 * HIDDEN[width]
    shared_bytes = panel * width * 2 + SLOTS * PIECE_BYTES + 4 * panel + 16 * SLOTS + 16
    with torch.cuda.device(device):
        code = assembled(source(width, str(dtype).removeprefix("torch.")), "sm_90a", compile_cache() / "hopper")
        return Kernel(code, "geglu", shared_bytes)


@torch.library.custom_op("gligen::geglu", mutates_args=(), device_types="cuda")
def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: (..., K) half precision; weight: (2·H, K) and bias (2·H,), values before gates. Returns (..., H).

    Source: Shazeer, 2020, eq. 6, with the exact GELU (erf to 1.5e-7).
    """
    K, H = x.shape[-1], weight.shape[0] // 2
    rows = x.reshape(-1, K)
    if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], H), dtype=x.dtype, device=x.device)
    units = -(-rows.shape[0] // 64) * (H // HIDDEN[K])
    programs = min(torch.cuda.get_device_properties(x.device).multi_processor_count, units)
    arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, weight, bias, out)]
    arguments += [ctypes.c_int(n) for n in (rows.shape[0], H, rows.stride(0))]  # type: ignore[misc]  # ctypes values
    kernel(K, x.dtype, x.device.index).launch((programs, 1), THREADS, arguments)
    return out


@geglu.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
