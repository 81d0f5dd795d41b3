"""Where and in which precision a model runs, and what to say when it does not fit. Imported by all, imports nobody."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | int | torch.device = "auto") -> torch.device:
    """'auto' is CUDA, else Apple's MPS, else the CPU; CUDA without a number is this process's own under torchrun.

    A number alone is CUDA's, as torch has it.
    Raises ValueError for a device this machine does not have.
    """
    if isinstance(name, bool) or not isinstance(name, (str, int, torch.device)):
        raise ValueError(f"device is {name!r}: give auto, cuda, cuda:N, mps or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("no images are generated on it")
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
        if name in (*DTYPES.values(), torch.float64):
            return name
        name = str(name)
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype is '{name}': the known ones are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to train in: 'auto' is bfloat16 on CUDA, float32 elsewhere. float16 would need its losses scaled."""
    if name == "auto":
        is_bfloat = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_bfloat else torch.float32
    return DTYPES[name]


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Makes tensors of no stated kind float32 on the CPU, as all here are meant, whatever torch.set_default_dtype and
    torch.set_default_device say outside; also a decorator."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # only where it differs: every call of torch goes through such a context
        with torch.device("cpu") if torch.get_default_device().type != "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device, those included that this process holds unused; None where that
    is unknown."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    except (OSError, ValueError, IndexError):
        return None
    return kib["MemAvailable"] * 1024 if "MemAvailable" in kib else None


def check_memory(
    needed: int,
    device: torch.device,
    what: str,
    advice: str = "use --dtype bfloat16 or float16, another --device, or close other programs",
) -> None:
    """Raises MemoryError, one line that ends with the advice, if `needed` bytes are plainly not there."""
    available = available_memory(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} needs {needed / 2**30:.1f} GiB, but {device} has {available / 2**30:.1f} GiB free: {advice}"
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


@functools.cache
def keep_freed_memory() -> bool:
    """Keeps freed memory in the process instead of giving it back to the system; True where that can be set.

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
