"""The Triton kernels through NVIDIA's assembler, which needs no GPU: do they compile, fit, and keep to registers?"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")
ptxas = Path(getattr(triton.knobs.nvidia.ptxas, "path", ""))

from gligen.kernels import attention as kernels  # noqa: E402  # needs triton

pytestmark = [
    pytest.mark.skipif(kernels.is_interpreted(), reason="kernels are interpreted"),
    pytest.mark.skipif(not ptxas.is_file(), reason="this Triton comes without NVIDIA's assembler"),
]

KERNELS = {
    "forward": kernels._forward_kernel,
    "query grad": kernels._query_grad_kernel,
    "key grad": kernels._key_grad_kernel,
    "key grad, few keys": kernels._key_grad_kernel,
}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may have (CUDA C Programming Guide)


def compile_kernel(kernel, head_dim: int, shape: tuple[int, int, int, int], capability: int):
    """In bfloat16 with a second segment, pointers and strides divisible by 16 as the UNet's are."""
    block_m, block_n, warps, stages = shape
    first, second = kernels.split_head_dim(head_dim)
    constants = {"D": head_dim, "D1": first, "D2": second, "HAS_EXTRA": True, "HAS_BIAS": False}
    constants |= {"BLOCK_E": 32, "BLOCK_M": block_m, "BLOCK_N": block_n}
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "softmax_scale": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    divisible = [
        (i,)
        for i, (name, kind) in enumerate(signature.items())
        if kind not in ("constexpr", "fp32") and name not in ("N", "num_heads")
    ]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): constants[name] for i, name in enumerate(signature) if name in constants},
        attrs={at: [["tt.divisibility", 16]] for at in divisible},
    )
    target = compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


@pytest.mark.parametrize(
    ("table", "head_dim", "capability"),
    [  # the widest heads on Hopper are the tightest; the others take minutes: pytest -m exhaustive
        pytest.param(*row, marks=() if row[1:] == (160, 90) else pytest.mark.exhaustive)
        for row in itertools.product(KERNELS, (40, 80, 160), SHARED)
    ],
)
def test_launch_shapes_compile_and_fit_and_hopper_spills_none(table, head_dim, capability, tmp_path):
    rows, width = kernels._SHAPES[table], sum(kernels.split_head_dim(head_dim))
    spilled = {}  # bytes of registers, by shape
    for shape in rows[min(widest for widest in rows if width <= widest)]:
        made = compile_kernel(KERNELS[table], head_dim, shape, capability)
        assert made.metadata.shared <= SHARED[capability], shape
        (tmp_path / "kernel.ptx").write_text(made.asm["ptx"])
        arch = f"sm_{capability}{'a' if capability == 90 else ''}"
        told = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        spilled[shape] = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
        assert "bytes spill" in told
    assert min(spilled.values()) == 0, spilled  # the tuner has one to choose
    if capability == 90:
        assert not any(spilled.values()), spilled
