"""Where, in which precision and how fast a model runs, and what to say when it does not fit.

Applied from outside to the plain model; nothing here changes what it computes beyond the rounding of its precision.

    pipe = gligen.load("gligen.bin", device="cuda")
    optimize(pipe)                              # what this device gains from; every step has its own switch
    seconds = warm_up(pipe, request)            # compiles and records, apart from the first picture
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gligen.compiled_layers import write_for_compiler
from gligen.diffusion.guidance import gate_schedule
from gligen.fused_qkv import fuse_qkv as fuse_projections
from gligen.kernels.backends import available_backends, use_backend
from gligen.modules.autoencoder import Decoder
from gligen.modules.unet import Head, Stage
from gligen.quantize import quantize as quantize_layers
from gligen.step_graphs import StepGraphs

if TYPE_CHECKING:
    from gligen.pipeline import Pipeline
    from gligen.request import Request

log = logging.getLogger("gligen")

BLOCKS: tuple[type[nn.Module], ...] = (Stage, Head, Decoder)  # each compiled as a whole, equal ones once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """'auto' is CUDA, else Apple's MPS, else the CPU; CUDA without a number is this process's own under torchrun.

    Raises ValueError for a device this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("pictures cannot be painted on it")
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"device is '{name}', which cannot be used here ({reason}): try auto, cuda, mps or cpu"
        ) from None
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on CUDA (float16 where the device has no bfloat16), float16 on MPS, float32 on the CPU."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is '{name}': the known ones are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_training_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the computation: 'auto' is bfloat16 on CUDA and float32 elsewhere. float16 would need its losses scaled."""
    if name == "auto":
        is_bfloat = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_bfloat else torch.float32
    return DTYPES[name]


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device, or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    except (OSError, ValueError, IndexError):
        return None
    return kib["MemAvailable"] * 1024 if "MemAvailable" in kib else None


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Raises MemoryError, one line, if `needed` bytes are plainly not there."""
    available = available_memory(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} needs {needed / 2**30:.1f} GiB, but {device} has {available / 2**30:.1f} GiB free: "
            "use --dtype bfloat16 or float16, another --device, or close other programs"
        )


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turns a failed allocation on any device into MemoryError with one line of advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of memory on the device: {advice}") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise MemoryError(f"out of memory: {advice}") from error


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
    fuse_qkv = is_cuda and quantize is None if fuse_qkv is None else fuse_qkv
    graphs = is_cuda and pipe.turns is None if graphs is None else graphs
    if graphs and (not is_cuda or pipe.turns is not None):
        raise ValueError("graphs need CUDA, and weights that stay where they are: not with low memory")
    if quantize and (fuse_qkv or pipe.turns is not None):
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
        for compiled in (pipe.unet, pipe.vae.decoder):
            if is_cuda:
                write_for_compiler(compiled, sums=pipe.turns is None)
            compile_blocks(compiled, backend=backend)
    if graphs:
        pipe.recorded = StepGraphs(pipe.unet)
    return {"compile": compile, "channels_last": channels_last, "fuse_qkv": fuse_qkv, "graphs": graphs}


def to_channels_last(network: nn.Module) -> None:
    """Stores convolutions' weights channels last; what they read and write follows."""
    network.to(memory_format=torch.channels_last)


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for this device here; None where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, or does not know this GPU"
    if device.type != "cpu":
        return f"the device is {device.type}"
    compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    return None if any(name and shutil.which(name) for name in compilers) else "there is no C++ compiler"


def compile_cache() -> Path:
    """The folder that keeps compiled code between runs; TORCHINDUCTOR_CACHE_DIR names another."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(home) / "gligen" / "inductor")))


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> int:
    """Compiles every block of the network in place, whole or not at all; returns how many there are.

    A block is an entry of the UNet's lists, with the change of size and the joining of skips that belong to it, or the
    decoder: what runs between them by itself is next to nothing. Blocks of one make and size share their code. It is
    made once for each size of latent and for grounding on and off, and not again for other batches (of more than one),
    prompts, β, timesteps or numbers of entities: only the batch varies (the other sizes stay constants, so that kernels
    are made for them), and what a number would be is a tensor.
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
    """How many pieces of code torch.compile has made in this process: it stands still once all is warm."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def warm_up(pipe: Pipeline, request: Request, batch_size: int = 1) -> float:
    """Paints a batch like the request's in a few steps and forgets it; returns the seconds that took.

    Compiling and recording happen here; the compiled code is found again in `compile_cache` by the next run.
    """
    start = time.perf_counter()
    request = pipe.check(request)
    gates = gate_schedule(request.schedule or (0.0, 0.0, 1.0), request.steps)
    schedule = (0.5, 0.0, 0.5) if any(gates) and not all(gates) else request.schedule
    count = min(batch_size, request.num_images)
    short = dataclasses.replace(request, steps=4, schedule=schedule, num_images=count)
    for _ in pipe.generate([short], batch_size=batch_size):
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
    """Attention by this backend of gligen/kernels/backends.py while inside; None leaves the choice to the model.

    Raises ValueError for one that the device cannot run.
    """
    if name is None:
        return contextlib.nullcontext()
    available = available_backends(device)
    if name not in available:
        raise ValueError(f"attention is '{name}': on {device} there is {', '.join(available)}")
    return use_backend(name)


class Turns:
    """Networks of which one at a time is on the device; the others' weights wait in the host's memory."""

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        """networks: as loaded on the CPU. Their waiting weights are pinned where that makes copies faster."""
        self.device = device
        self.homes: list[tuple[nn.Module, list[tuple[Tensor, Tensor]]]] = []
        for network in networks:
            tensors = [*network.parameters(), *network.buffers()]
            kept = [tensor.detach() for tensor in tensors]
            if device.type == "cuda":
                kept = [tensor.pin_memory() for tensor in kept]
            self.homes.append((network, list(zip(tensors, kept, strict=True))))
        self.on_device: nn.Module | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def bring(self, network: nn.Module) -> None:
        """This network to the device, after the one that was there has left it."""
        if network is self.on_device:
            return
        for other, tensors in self.homes:
            if other is self.on_device:
                for tensor, home in tensors:
                    tensor.data = home  # frozen: what is on the device is a copy
        for other, tensors in self.homes:
            if other is network:
                for tensor, home in tensors:
                    tensor.data = home.to(self.device, non_blocking=True)
        self.on_device = network


def take_turns(pipe: Pipeline, device: torch.device) -> None:
    """Low memory: the text encoder, UNet and autoencoder of a pipeline loaded on the CPU take turns on the device.

    The most that is there at once is the UNet and a step's activations. Costs a copy of the weights a batch.
    """
    networks = [pipe.text_encoder, pipe.unet, pipe.vae, *([pipe.image_encoder] if pipe.image_encoder else [])]
    pipe.turns = Turns(networks, device)


@functools.cache
def keep_freed_memory() -> bool:
    """Keeps freed memory in the process instead of giving it back to the system; True where that can be told.

    For a CPU: glibc unmaps every large tensor that is freed, and the next one of the same size is then mapped and
    filled with zeros by the kernel again. benchmarks/train.py measures what it saves.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h's M_ numbers
    mallopt = ctypes.CDLL(None).mallopt
    kept = [mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20)]  # old versions: 32 MiB at most
    kept += [mallopt(trim_threshold, (1 << 31) - 1), mallopt(top_pad, 64 << 20)]
    return all(kept)


def start_latents(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal latents (B, *shape) float32 on the CPU, each from its own seed and none from its neighbours."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class NoiseStream:
    """Standard normal noise for a batch, each image from its own seed, so that batches do not matter.

    purpose: names the stream. Draws for one purpose never move those of another, so a deterministic sampler gives the
    same picture whether or not noise is also drawn for inpainting.
    """

    def __init__(self, seeds: list[int], purpose: str) -> None:
        words = [np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1)[0] for seed in seeds]
        self.generators = [torch.Generator().manual_seed(int(word)) for word in words]

    def __call__(self, like: Tensor) -> Tensor:
        """Noise like `like` (B, ...). Drawn on the CPU in float32, so that it is the same on every device."""
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(like)
