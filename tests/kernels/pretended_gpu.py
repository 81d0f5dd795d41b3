"""Inductor's code for a Hopper GPU on a machine without one: fake tensors, and a driver that only tells of the device.

Run as a script, in a process of its own, since it pretends for all of torch and Triton.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._functorch.aot_autograd import aot_function
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

PROPERTIES = SimpleNamespace(
    name="H100",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="",
)


class Driver:
    """What Triton asks its driver when it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def pretended() -> Iterator[FakeTensorMode]:
    """Inside, torch believes in one H100; tensors made under the mode lie there and hold no numbers."""
    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch._dynamo.device_interface.CudaInterface.get_device_properties": staticmethod(lambda *_: PROPERTIES),
        "torch._dynamo.device_interface.CudaInterface.get_compute_capability": staticmethod(lambda *_: 90),
    }
    triton.runtime.driver.set_active(Driver())
    with contextlib.ExitStack() as stack:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        yield mode


def generated_code(run: Callable[..., Any], inputs: Callable[[], list[torch.Tensor]]) -> str:
    """The Python and Triton code that Inductor makes of `run(*inputs())`."""
    codes = []

    def lower(graph: torch.fx.GraphModule, made: list[torch.Tensor]) -> Any:
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            post_grad_passes(graph, is_inference=True)
            lowering = GraphLowering(graph, example_inputs=made, is_inference=True)
            with V.set_graph_handler(lowering):
                lowering.run(*made)
                code = lowering.codegen()[0]
        codes.append(getattr(code, "value", code))
        return graph.forward

    # what comes after the code would run it
    with pretended() as mode, mode, torch.no_grad(), contextlib.suppress(Exception):
        aot_function(run, fw_compiler=lower, decompositions=select_decomp_table())(*inputs())
    (code,) = codes
    return code


def user_kernels(code: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, type of every argument, constants, options) of each launch of a kernel that is not Inductor's own, in the
    first of its shapes; test_kernel_compilation.py has the others.
    """
    for block in re.split(r"async_compile\.triton\(", code)[1:]:
        if "user_autotune" not in block:
            continue
        meta = _value(block, "triton_meta=")
        shape = (_value(block, "configs=") or [{}])[0]
        options = {name: shape.pop(name) for name in ("num_warps", "num_stages") if name in shape}
        yield block.split("'")[1], meta["signature"], meta["constants"] | shape, options


def _value(text: str, after: str) -> Any:
    """The Python value, in brackets, that stands behind `after`."""
    begin, depth = text.index(after) + len(after), 0
    for end in range(begin, len(text)):
        depth += (text[end] in "([{") - (text[end] in ")]}")
        if depth == 0:
            return eval(text[begin : end + 1], {"DeviceProperties": SimpleNamespace})
    raise ValueError(f"no value behind {after}")


def main() -> None:
    """The fused kernels, forward and backward, as Inductor launches them: compiled to Hopper's machine code."""
    from gligen.kernels import two_segments as kernels

    def make() -> list[torch.Tensor]:
        def tokens(n: int) -> torch.Tensor:
            return torch.empty(2, n, 320, device="cuda", dtype=torch.bfloat16)

        return [tokens(4096), tokens(4096), tokens(4096), tokens(30), tokens(30), tokens(4096)]

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k2: torch.Tensor, v2: torch.Tensor, g: torch.Tensor
    ) -> Any:
        out, lse = torch.ops.gligen.attention(q, k, v, k2, v2, 8)
        delta = torch.ops.gligen.attention_delta(out, g, 8)
        dq = torch.ops.gligen.attention_query_grad(q, k, v, k2, v2, g, lse, delta, 8)
        visual = torch.ops.gligen.attention_key_grad(q, k, v, g, lse, delta, 8)
        return out, dq, *visual, *torch.ops.gligen.attention_key_grad(q, k2, v2, g, lse, delta, 8)

    for name, signature, constants, options in user_kernels(generated_code(run, make)):
        kernel = getattr(kernels, name)
        places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
        assert triton.compile(source, target=Driver().get_current_target(), options=options).asm["cubin"]
        print(name)


if __name__ == "__main__":
    main()
