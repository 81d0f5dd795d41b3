"""Every way to compute attention against the formula written out in float64."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gligen.kernels import backends as module
from gligen.kernels.backends import (
    BACKENDS,
    KeysValues,
    attention,
    available_backends,
    current_backend,
    set_backend,
    use_backend,
)
from tests.conftest import case, error
from tests.modules.test_golden_unet import CASES, run

ON_CPU = available_backends("cpu")

# rounding of one number: 2^-24, 2^-11, 2^-8; a sum of products keeps within a few of them, a gradient within a few more
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def formula(q: Tensor, k: Tensor, v: Tensor, num_heads: int, extra: KeysValues | None = None) -> Tensor:
    """Each head's softmax(q kᵀ / √d) v in float64, over the second segment too."""
    if extra is not None:
        k, v = torch.cat([k, extra[0]], dim=1), torch.cat([v, extra[1]], dim=1)
    heads = []
    for qh, kh, vh in zip(*(x.double().chunk(num_heads, dim=2) for x in (q, k, v)), strict=True):
        weights = torch.exp(qh @ kh.mT / qh.shape[2] ** 0.5)
        heads.append(weights / weights.sum(-1, keepdim=True) @ vh)
    return torch.cat(heads, dim=2)


def draw(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """q, k, v and, for N > 0, a second segment's k, v; shape is (B, h, d, L, S, N)."""
    B, h, d, L, S, N = shape
    generator = torch.Generator().manual_seed(sum(shape))
    lengths = (L, S, S, N, N) if N else (L, S, S)
    return [torch.randn(B, n, h * d, generator=generator).to(device, dtype).requires_grad_() for n in lengths]


def check(inputs: list[Tensor], num_heads: int, attend=attention) -> None:
    """`attend` against the formula, output and gradients, within the bound of the inputs' dtype."""
    extra = tuple(inputs[3:]) or None
    expected = formula(*inputs[:3], num_heads, extra)
    bound = BOUNDS[inputs[0].dtype]
    out = attend(*inputs[:3], num_heads, extra)
    assert out.dtype == inputs[0].dtype
    assert error(out, expected) < bound
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    found = torch.autograd.grad(out, inputs, towards)
    wanted = torch.autograd.grad(expected, inputs, towards.double())
    for name, ours, theirs in zip(("q", "k", "v", "k_extra", "v_extra"), found, wanted, strict=False):
        assert ours.dtype == inputs[0].dtype
        assert error(ours, theirs) < 2 * bound, name


SHAPES = [  # B, h, d, L, S, N: lengths that no block divides
    (4, 2, 40, 21, 13, 0),
    (2, 2, 40, 21, 21, 5),
    (1, 2, 80, 6, 9, 7),
    (3, 1, 160, 5, 11, 3),
    (2, 4, 4, 10, 10, 4),
    (2, 3, 16, 1, 3, 1),
]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_written_out_formula(backend, shape):
    with use_backend(backend):
        check(draw(shape), shape[1])


@pytest.mark.parametrize("keys", [48, 100, 200], ids=str)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_training_in_bfloat16_on_a_cpu_equals_the_formula_with_few_keys_and_with_many(keys, is_autocast):
    inputs = draw((2, 2, 16, 40, keys, 30), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        check(inputs, 2)


def test_backend_is_chosen_for_a_stretch_of_code_and_given_back():
    assert current_backend() == "auto"
    with use_backend("math"):
        assert current_backend() == "math"
    assert current_backend() == "auto"
    try:
        set_backend("math")
        assert current_backend() == "math"
    finally:
        set_backend("auto")


def test_backends_that_are_not_there_are_named_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"'fast'.*auto, sdpa, math") as told:
        set_backend("fast")
    assert "\n" not in str(told.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton' needs .*CUDA.*try auto, sdpa, math"), use_backend("triton"):
        pass
    assert current_backend() == "auto"
    monkeypatch.setattr(module, "_backend", "triton")
    q, k, v = draw((1, 2, 8, 3, 4, 0))
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        attention(q, k, v, 2)


def test_available_backends_keep_their_order():
    assert available_backends("cpu")[:3] == ("auto", "sdpa", "math")
    assert [name for name in BACKENDS if name in ON_CPU] == list(ON_CPU)
    assert set(available_backends("meta")) == {"auto", "sdpa", "math"}


def test_a_compiled_region_is_one_graph_for_each_backend():
    """Dynamo alone, without code generation: no break, and nothing compiled again when a backend comes back."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    attend = torch.compile(lambda *tensors: attention(*tensors[:3], 2, tensors[3:]), fullgraph=True, backend=count)
    inputs = [x.detach() for x in draw((2, 2, 8, 7, 9, 4))]
    expected = formula(*inputs[:3], 2, (inputs[3], inputs[4]))
    for backend in ("sdpa", "math", "sdpa", "math", "math"):
        with use_backend(backend):
            assert error(attend(*inputs), expected) < 1e-5
    assert len(graphs) == 2


# auto, which on a CPU is sdpa, is test_golden_unet's; edge maps take the formula half a minute each and prove no more
GOLDEN = [
    pytest.param(
        "math", *row, marks=pytest.mark.exhaustive if row[0].startswith("unet_hed") else (), id=f"math-{row[0]}"
    )
    for row in CASES
]


@pytest.mark.parametrize(("backend", "name", "mode", "fuser_type", "weights"), GOLDEN)
def test_golden_unet_on_every_backend(small_unet, backend, name, mode, fuser_type, weights):
    arrays = case(f"cases/{name}")
    with use_backend(backend), torch.no_grad():
        objs, eps = run(small_unet(mode, fuser_type, weights), arrays, torch.float32)
    assert error(objs, arrays["objs"]) < 1e-5
    assert error(eps, arrays["eps"]) < 1e-5


INTERPRETED = [  # blocks of 32 queries and 16 keys there: whole ones, remainders, and both at once
    ((1, 1, 40, 35, 18, 0), torch.float32),
    ((2, 1, 40, 34, 16, 3), torch.float32),
    ((1, 1, 80, 32, 17, 3), torch.float16),
    ((1, 1, 160, 5, 7, 33), torch.float32),
    ((1, 2, 4, 70, 6, 2), torch.float32),
]


def check_interpreted_kernels() -> None:
    """Run by the test below in a process of its own, for Triton decides at its import."""
    from gligen.kernels import two_segments as kernels

    # so that these few tokens take every path: several shares of queries, few keys and many
    kernels._SHARE, kernels._FEW_KEYS = 32, 4
    with use_backend("triton"):
        for shape, dtype in INTERPRETED:
            check(draw(shape, dtype), shape[1])
        fused = draw((1, 3, 16, 5, 1, 0))[0].detach()  # one product's slices: rows lie further apart than they are wide
        q, k, v = fused.chunk(3, dim=2)
        assert error(attention(q, k, v, 1), formula(q, k, v, 1)) < 1e-6
        wide, double = draw((1, 1, 168, 3, 4, 0)), [x.double() for x in draw((1, 2, 8, 3, 4, 0))]
        assert error(attention(*wide, 1), formula(*wide, 1)) < 1e-6  # what the kernel does not take goes to SDPA
        assert error(attention(*double, 2), formula(*double, 2)) < 1e-14


def test_triton_kernels_equal_the_formula_when_interpreted():
    """Forward and backward. bfloat16 is left to CUDA: Triton's interpreter multiplies its bits as integers."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.kernels.test_attention import check_interpreted_kernels as c; c(); print('checked')",
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr[-2000:]


def test_triton_kernels_are_traced_whole_graph_with_gradients(monkeypatch):
    """Up to code generation, which needs the device: forward, Δ, queries' gradient, and one for each segment's keys."""
    pytest.importorskip("triton", reason="triton is not installed")
    from torch._dynamo.backends.common import aot_autograd

    import gligen.kernels.two_segments  # noqa: F401  # registers the operators

    graphs = []

    def stop(joint, *args, **kwargs):
        graphs.append(joint)
        raise InterruptedError

    monkeypatch.setattr(module, "_backend", "triton")
    monkeypatch.setattr(module, "_is_served", lambda q, num_heads: True)
    logging.disable(logging.WARNING)  # without a device the tracer warns that it cannot look into the kernels
    try:
        backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, partition_fn=stop)
        attend = torch.compile(lambda *x: attention(*x[:3], 2, x[3:]), fullgraph=True, backend=backend)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
            attend(*draw((2, 2, 40, 7, 9, 4)))
    finally:
        logging.disable(logging.NOTSET)
    kernels = [node for node in graphs[0].graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(kernels) == 5


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_CUDA = available_backends("cuda") if torch.cuda.is_available() else ("auto", "sdpa", "math", "triton")
FUSED = [name for name in ON_CUDA if name == "triton"]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
UNET = [(4096, 40), (1024, 80), (256, 160), (64, 160)]  # tokens and head dim of every level at 512²
SEGMENTS = {"self": (None, 0), "gated": (None, 30), "caption": (77, 0), "maps": (None, 64), "keypoints": (None, 136)}


@pytest.fixture
def full_float32():
    """float32 as it is written: TensorFloat-32 would round products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def unet_shape(tokens: int, head_dim: int, segment: str, batch: int = 2) -> tuple[int, int, int, int, int, int]:
    keys, extra = SEGMENTS[segment]
    return batch, 2, head_dim, tokens, keys or tokens, extra


@cuda
@pytest.mark.cuda
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize(("tokens", "head_dim"), UNET)
@pytest.mark.parametrize("backend", ON_CUDA)
def test_every_unet_shape_on_cuda(backend, tokens, head_dim, segment, dtype):
    shape = unet_shape(tokens, head_dim, segment, batch=1 if tokens == 4096 else 2)  # float64 scores fill memory
    with use_backend(backend):
        check(draw(shape, dtype, "cuda"), shape[1])


@cuda
@pytest.mark.cuda
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("backend", ON_CUDA)
def test_odd_lengths_and_odd_heads_on_cuda(backend, dtype):
    with use_backend(backend):
        for shape in SHAPES:
            check(draw(shape, dtype, "cuda"), shape[1])
        for head_dim in (8, 24, 64, 72, 104, 128, 144):
            check(draw((2, 2, head_dim, 130, 97, 17), dtype, "cuda"), 2)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("segment", ["self", "gated"])
@pytest.mark.parametrize(("tokens", "head_dim"), UNET)
@pytest.mark.parametrize("backend", FUSED)
def test_compiled_whole_graph_with_gradients_on_cuda(backend, tokens, head_dim, segment):
    shape = unet_shape(tokens, head_dim, segment, batch=1)
    torch._dynamo.reset()
    attend = torch.compile(attention, fullgraph=True)
    with use_backend(backend):
        check(draw(shape, torch.bfloat16, "cuda"), shape[1], attend)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("backend", FUSED)
def test_slices_of_one_product_are_read_where_they_lie_on_cuda(backend):
    fused = torch.randn(2, 100, 3 * 80, device="cuda", dtype=torch.bfloat16)

    def attend(fused: Tensor) -> Tensor:
        q, k, v = (2 * fused).chunk(3, dim=2)
        return attention(q, k, v, 2)

    expected = formula(*(2 * fused).chunk(3, dim=2), 2)
    torch._dynamo.reset()
    with use_backend(backend):
        assert error(attend(fused), expected) < BOUNDS[torch.bfloat16]
        assert error(torch.compile(attend, fullgraph=True)(fused), expected) < BOUNDS[torch.bfloat16]


@cuda
@pytest.mark.cuda
@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("name", "mode", "fuser_type", "weights"), CASES, ids=[c[0] for c in CASES])
def test_golden_unet_on_cuda(small_unet, backend, name, mode, fuser_type, weights):
    arrays = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in case(f"cases/{name}").items()}
    unet = copy.deepcopy(small_unet(mode, fuser_type, weights)).cuda()
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with use_backend(backend), torch.no_grad():
            objs, eps = run(unet, arrays, torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert error(objs, arrays["objs"]) < 1e-5
    assert error(eps, arrays["eps"]) < 1e-5


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "extra"),
    [(2, 4096, 4096, 30), (1, 4096, 4096, 0), (1, 3072, 3072, 8), (3, 700, 700, 136), (2, 1, 256, 1), (1, 193, 300, 0)],
)
def test_hoppers_kernel_equals_the_formula(batch, queries, keys, extra, is_compiled):
    """Whole blocks, remainders, a segment that ends within a block, and slices of one product as input."""
    torch.manual_seed(0)
    fused = torch.randn(batch, max(queries, keys), 3 * 320, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused[:, :, :320][:, :queries], fused[:, :keys, 320:640], fused[:, :keys, 640:]
    second = tuple(torch.randn(2, batch, extra, 320, device="cuda", dtype=torch.bfloat16)) if extra else None
    torch._dynamo.reset()
    attend = torch.compile(attention, fullgraph=True) if is_compiled else attention
    with torch.no_grad():
        assert module._has_hopper_kernel(q, k, v, 8, second)
        assert error(attend(q, k, v, 8, second), formula(q, k, v, 8, second)) < BOUNDS[torch.bfloat16]
