"""The fused kernels through NVIDIA's compilers, which need no GPU: do they compile, fit, and keep to registers?"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")
ptxas = Path(getattr(triton.knobs.nvidia.ptxas, "path", ""))

from gligen.kernels import hopper, nvrtc  # noqa: E402
from gligen.kernels import two_segments as kernels  # noqa: E402  # needs triton

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
    constants = {"D": head_dim, "D1": first, "D2": second, "HAS_EXTRA": True}
    constants |= {"BLOCK_E": 32, "BLOCK_M": block_m, "BLOCK_N": block_n, "softmax_scale": head_dim**-0.5}
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    divisible = [
        (i,)
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in ("N", "num_heads")
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


def test_kernels_compile_as_inductor_launches_them():
    """Inductor decides the type of every argument: a number handed over as float64 once made products of float64."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.pretended_gpu"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = {"_forward_kernel": 1, "_delta_kernel": 0, "_query_grad_kernel": 1, "_key_grad_kernel": 2}
    compiled = done.stdout.split()
    for name, at_least in kinds.items():
        assert compiled.count(name) >= at_least, compiled


def test_hoppers_kernel_compiles_and_lets_its_products_overlap(tmp_path):
    """The compiler waits after every product where it cannot prove that registers are left alone until they are read.

    Then twenty products have twenty waits, and attention took 1.5 ms where it takes 1.1 (docs/performance.md).
    """
    try:
        code = nvrtc.assemble(hopper.source(), hopper.ARCH)
    except OSError:
        pytest.skip("this torch comes without NVRTC")
    (tmp_path / "kernel.cubin").write_bytes(code)
    told = subprocess.run(
        [ptxas.with_name("nvdisasm"), "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    products, waits = told.count("HGMMA."), told.count("WARPGROUP.DEPBAR")
    assert products == 3 + 8 + 3 + 8  # of the first block, a step of the loop, and the last values
    assert waits <= 5
    assert not re.search(r"\b(STL|LDL)\b", told)  # nothing is spilled, in the warpgroup that copies either
    assert SHARED[90] >= hopper.SHARED_BYTES
