"""CUDA C++ to machine code by NVRTC, which torch brings along, and its launch through the driver.

Made code is kept in a folder, by a hash of all it depends on, so that it is made once a machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gligen.files import write_atomically


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Raises OSError where torch came without it."""
    major = (torch.version.cuda or "0").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for builtins in folder.glob(f"*/lib/libnvrtc-builtins.so.{major}*"):
            ctypes.CDLL(str(builtins))  # the compiler looks for it by name, which finds what is loaded
    names = [str(path) for folder in folders for path in folder.glob(f"*/lib/libnvrtc.so.{major}")]
    return ctypes.CDLL([*names, f"libnvrtc.so.{major}"][0])


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def assemble(source: str, arch: str) -> bytes:
    """Machine code (a cubin) of CUDA C++ for an architecture such as sm_90a; needs no GPU.

    Raises RuntimeError with the compiler's words if the source does not compile, OSError without NVRTC.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def check(result: int) -> None:
        if result:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: error {result}\n{log.value.decode()}")

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
        check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """One function of assembled code, on the current device."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        """Raises RuntimeError if the driver does not take the code, or not that much shared memory."""
        self.shared_bytes = shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.current_stream().synchronize()  # makes the context current
        self._check(_driver().cuModuleLoadData(ctypes.byref(self._module), code))
        self._check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        largest = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(_driver().cuFuncSetAttribute(self._function, largest, shared_bytes))

    def launch(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        """On the current stream. arguments: ctypes values in the order of the kernel's parameters."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        size = self.shared_bytes
        self._check(_driver().cuLaunchKernel(self._function, *grid, 1, threads, 1, 1, size, stream, pointers, None))

    @staticmethod
    def _check(result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            _driver().cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")


def assembled(source: str, arch: str, folder: Path) -> bytes:
    """`assemble`, but from `folder` where the same was made before."""
    words = "\n".join((source, arch, str(torch.version.cuda)))
    path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.cubin"
    if not path.exists():
        code = assemble(source, arch)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, code)
    return path.read_bytes()
