"""How fast a model runs: compiling, graphs, memory format.

Applied from outside to the plain model; nothing here changes what it computes beyond the rounding of its precision.

    pipe = gligen.load("gligen.bin", device="cuda")
    optimize(pipe)                              # what this device gains from; every step has its own switch
    seconds = warm_up(pipe, request)            # compiles and records, apart from the first image
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from gligen.compiled_layers import write_for_compiler
from gligen.files import compile_cache
from gligen.fused_qkv import fuse_qkv as fuse_projections
from gligen.job import Job
from gligen.kernels.backends import available_backends, use_backend
from gligen.modules.autoencoder import Decoder
from gligen.modules.transformer import repeat_to
from gligen.modules.unet import Head, Stage
from gligen.quantize import quantize as quantize_layers
from gligen.step_graphs import StepGraphs

if TYPE_CHECKING:
    from gligen.pipeline import Pipeline
    from gligen.request import Request

log = logging.getLogger("gligen")

BLOCKS: tuple[type[nn.Module], ...] = (Stage, Head, Decoder)  # each compiled as a whole, equal ones once


def optimize(
    pipe: Pipeline,
    *,
    compile: bool | None = None,
    channels_last: bool = True,
    fuse_qkv: bool | None = None,
    graphs: bool | None = None,
    quantize: str | None = None,
    backend: str = "inductor",
) -> dict[str, bool]:
    """Makes a pipeline faster in place; returns which steps were taken. None is what the device gains from.

    compile: the blocks of UNet and decoder by torch.compile (default: on CUDA; a CPU gains little from it).
    channels_last: the memory format in which convolutions are fastest.
    fuse_qkv: queries, keys and values in one product (default: on CUDA, unless quantised). Files keep their names.
    graphs: record each kind of step as a CUDA graph. One graph of the whole step and not torch.compile's
        reduce-overhead, which would record one a block: so a step is a single launch, also of what is not compiled, and
        the conditioning is copied into the graph once a request.
    quantize: one of gligen/quantize.py's kinds, 8 bits for the transformers' linear layers; the one step that is not
        exact, and off unless asked for.
    backend: of torch.compile; another than inductor is for tests.

    Raises ValueError for steps that do not go together or that the device does not have.
    """
    is_cuda, networks = pipe.device.type == "cuda", (pipe.unet, pipe.vae)
    compile = is_cuda if compile is None else compile
    fuse_qkv = is_cuda and quantize is None and pipe.offload is None if fuse_qkv is None else fuse_qkv
    graphs = is_cuda and pipe.offload is None if graphs is None else graphs
    if graphs and (not is_cuda or pipe.offload is not None):
        raise ValueError("graphs need CUDA, and weights that stay where they are: not with low memory")
    if fuse_qkv and pipe.offload is not None:
        raise ValueError("fused QKV goes not with low memory, whose weights come and go: leave one of them out")
    if quantize and (fuse_qkv or pipe.offload is not None):
        raise ValueError("quantize goes neither with fused QKV nor with low memory: leave one of them out")
    if quantize:
        quantize_layers(pipe.unet, quantize)
    if channels_last:
        for network in networks:
            to_channels_last(network)
    if fuse_qkv:
        fuse_projections(pipe.unet)
    if compile and (reason := no_compiler(pipe.device)):
        log.warning("not compiled: %s; the same networks run eagerly instead", reason)
        compile = False
    if compile:
        parts: list[nn.Module] = [pipe.unet] if pipe.offload else [pipe.unet, pipe.vae.decoder]  # tiles vary in size
        for part in parts:
            if is_cuda:
                write_for_compiler(part, sums=pipe.offload is None)
            compile_blocks(part, backend=backend)
    if graphs:
        pipe.recorded = StepGraphs(pipe.unet)
    return {"compile": compile, "channels_last": channels_last, "fuse_qkv": fuse_qkv, "graphs": graphs}


def to_channels_last(network: nn.Module) -> None:
    """Stores convolutions' weights channels last; what they read and write follows."""
    network.to(memory_format=torch.channels_last)


def no_compiler(device: torch.device) -> str | None:
    """The reason why torch.compile cannot make code for this device here; None where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, or does not know this GPU"
    if device.type != "cpu":
        return f"the device is {device.type}"
    compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    return None if any(name and shutil.which(name) for name in compilers) else "there is no C++ compiler"


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> int:
    """Compiles every block of the network in place, whole or not at all; returns how many there are.

    A block is an entry of the UNet's lists, with the change of size and the joining of skips that belong to it, or the
    decoder: what runs between them by itself is next to nothing. Blocks of one make and size share their code. It is
    made once for each size of latent and for grounding on and off, and not again for other batches (of more than one),
    prompts, β, timesteps or numbers of entities: only the batch varies (the other sizes stay constants, so that kernels
    are made for them), and what a number would be is a tensor. Branches of guidance count as the batch, as long as the
    UNet's first level has a transformer, as all published ones have.
    Parameter names do not change. A compiled network is not to be deep-copied: the copy's blocks would be the first's.
    """
    from torch._dynamo import config  # takes seconds

    compile_cache()
    config.recompile_limit = max(config.recompile_limit, 256)  # of all blocks of one kind together; 8 is for one
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 1024)
    compiled: dict[type[nn.Module], Callable[..., Tensor]] = {}
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, fullgraph=True, backend=backend)
        block.forward = functools.partial(_call_with_any_batch, compiled[kind], block)
    return len(blocks)


def _call_with_any_batch(compiled: Callable[..., Tensor], block: nn.Module, *args: Any) -> Tensor:
    """Calls compiled code with its tensors' batches made equal, and varying.

    Latents that the branches of guidance share are repeated here: else the entries that read them would be compiled
    once more for one latent, which is a size of its own to the compiler, than for several.
    """
    largest = max((tensor for tensor in _tensors(args) if tensor.ndim), key=len)
    if any(tensor.ndim and len(tensor) < len(largest) for tensor in _tensors(args)):  # mapping takes the host's time
        args = tree_map_only(Tensor, lambda tensor: repeat_to(tensor, largest) if tensor.ndim else tensor, args)
    for tensor in _tensors(args):
        if tensor.ndim:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for dim in range(1, tensor.ndim):
                torch._dynamo.mark_static(tensor, dim)
    return compiled(block, *args)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def compilations() -> int:
    """The number of pieces of code that torch.compile has made in this process: it stands still once all is warm."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def warm_up(pipe: Pipeline, request: Request | Job, batch_size: int = 1) -> float:
    """Generates a batch like the request's in a few steps and forgets it; returns the seconds that took.

    Compiling and recording happen here; the compiled code is found again in `compile_cache` by the next run.
    """
    start = time.perf_counter()
    job = request if isinstance(request, Job) else pipe.complete(request)
    for _ in pipe.generate([job.shortened(steps=4, count=batch_size)], batch_size=batch_size):
        pass
    return time.perf_counter() - start


def checkpoint_blocks(network: nn.Module) -> int:
    """Saves only what enters each block for the backward pass, which then computes the rest again.

    In place; returns how many blocks there are. After `compile_blocks`, so that what is computed again is compiled too.
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.forward = functools.partial(_checkpointed, block.forward)
    return len(blocks)


def _checkpointed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)  # blocks draw nothing


def attention_backend(name: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Computes attention by this backend of gligen/kernels/backends.py while inside; None leaves it to the model.

    Raises ValueError for one that the device cannot run.
    """
    if name is None:
        return contextlib.nullcontext()
    available = available_backends(device)
    if name not in available:
        raise ValueError(f"attention is '{name}': on {device} there is {', '.join(available)}")
    return use_backend(name)
