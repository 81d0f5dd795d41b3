"""Lazy tensors: named byte regions of one mapped file, read when and where they are wanted.

A safetensors file and a PyTorch zip are both a list of (name, dtype, shape, byte region), so one class serves
both. On the CPU in the file's own dtype a tensor *is* the mapped region: nothing is copied, and the mapping is
private, so writing to such a tensor changes memory and never the file. Anything else is converted piece by
piece, and the pages it was read from are given back, so that loading a model needs the memory of its weights in
the wanted precision and little more.

A mapped file may be replaced (as this project's writers do, by renaming) but not overwritten in place while its
tensors are in use: the system ends a process whose mapping has lost its bytes.
"""

from __future__ import annotations

import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # what is converted at a time
Device = torch.device | str | None


class LazyTensor(ABC):
    """A tensor of known shape and dtype whose numbers are fetched by `read`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    @abstractmethod
    def borrow(self) -> Tensor:
        """The numbers on the CPU in the file's dtype, to look at now and not to keep; then call `release`."""

    def release(self) -> None:  # noqa: B027 (nothing to give back is the usual case)
        """Gives back the memory that `borrow` touched."""

    def read(self, device: Device = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, the caller's own, on `device` (CPU) and in `dtype` (integers keep theirs)."""
        borrowed = self.borrow()
        out = borrowed.to(device=device or "cpu", dtype=_wanted(self.dtype, dtype))
        if out is borrowed:
            out = borrowed.clone(memory_format=torch.contiguous_format)
        self.release()
        return out.contiguous()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


def _wanted(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Only floating-point numbers change precision; labels and counters stay exact."""
    return asked if asked is not None and own.is_floating_point else own


class MappedFile:
    """One file mapped privately into memory; lives as long as a tensor reads from it.

    data: bytes of it that had to be unpacked into memory, in place of the file itself.
    """

    def __init__(self, path: str | Path, data: bytes | None = None) -> None:
        self.path = str(path)
        self.map: mmap.mmap | bytearray | None = None
        if data is not None:
            self.map = bytearray(data)
        elif os.path.getsize(path):
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.size = 0 if self.map is None else len(self.map)
        self.kept: set[int] = set()  # offsets of regions handed out uncopied: their pages may hold edits

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` numbers from byte `offset` on, uncopied where they are aligned."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        assert self.map is not None
        if offset % dtype.itemsize:
            end = offset + count * dtype.itemsize
            return torch.frombuffer(bytearray(self.map[offset:end]), dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)

    def release(self, region: int, start: int, end: int) -> None:
        """Drops the whole pages between `start` and `end`, bytes of the region that begins at `region`."""
        if region in self.kept or not isinstance(self.map, mmap.mmap) or not hasattr(self.map, "madvise"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)


class FileTensor(LazyTensor):
    """A byte region of a mapped file, optionally strided (`stride` counts numbers, as torch does).

    region: where the storage begins, in bytes; start: the tensor's first number within it.
    """

    def __init__(
        self,
        file: MappedFile,
        region: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        *,
        start: int = 0,
        stride: Sequence[int] | None = None,
    ) -> None:
        self.file = file
        self.region = region
        self.dtype = dtype
        self.shape = tuple(shape)
        self.start = start
        self.stride = tuple(stride) if stride is not None else _row_major(self.shape)

    def __setstate__(self, state: object) -> None:
        """Refuses: a hostile pickle could otherwise put its own values over what was checked."""
        raise ValueError("a tensor with a state of its own")

    @property
    def is_contiguous(self) -> bool:
        return all(
            s == want or size == 1
            for s, want, size in zip(self.stride, _row_major(self.shape), self.shape, strict=True)
        )

    @property
    def offset(self) -> int:
        return self.region + self.start * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """The count of numbers between the first and the last, both included."""
        if not self.numel():
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def borrow(self) -> Tensor:
        flat = self.file.view(self.offset, self.extent, self.dtype)
        return flat.view(self.shape) if self.is_contiguous else flat.as_strided(self.shape, self.stride)

    def release(self) -> None:
        self._release(0, self.extent)

    def _release(self, first: int, last: int) -> None:
        size = self.dtype.itemsize
        self.file.release(self.region, self.offset + first * size, self.offset + last * size)

    def read(self, device: Device = None, dtype: torch.dtype | None = None) -> Tensor:
        wanted = _wanted(self.dtype, dtype)
        where = torch.device(device or "cpu")
        if not self.is_contiguous:
            return super().read(where, dtype)
        flat = self.file.view(self.offset, self.extent, self.dtype)
        if wanted == self.dtype and where.type == "cpu":
            if self.numel():
                self.file.kept.add(self.region)
            return flat.view(self.shape)
        out = torch.empty(self.extent, dtype=wanted, device=where)
        step = CHUNK_BYTES // self.dtype.itemsize
        for first in range(0, self.extent, step):
            last = min(first + step, self.extent)
            out[first:last].copy_(flat[first:last])
            self._release(first, last)
        return out.view(self.shape)


class HeldTensor(LazyTensor):
    """A tensor that is in memory already, for writing what was trained."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def borrow(self) -> Tensor:
        return self.tensor.cpu()


class ComputedTensor(LazyTensor):
    """A tensor made from others when it is read: stacked, transposed, sliced, reshaped."""

    def __init__(self, sources: Sequence[LazyTensor], shape: Sequence[int], compute: Callable[..., Tensor]) -> None:
        self.sources = tuple(sources)
        self.shape = tuple(shape)
        self.dtype = self.sources[0].dtype
        self.compute = compute

    def borrow(self) -> Tensor:
        return self.compute(*(source.borrow() for source in self.sources))

    def release(self) -> None:
        for source in self.sources:
            source.release()


def hold(tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, LazyTensor]:
    """A state dict as lazy tensors, e.g. to hand a trained module's weights to a writer."""
    return {name: t if isinstance(t, LazyTensor) else HeldTensor(t) for name, t in tensors.items()}


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in a precision to be stored in. Raises ValueError where that would make numbers infinite.

    bfloat16 has float32's range; float16 ends at 65504, 8-bit floats earlier.
    """
    out = tensor.to(dtype)
    if dtype.itemsize < tensor.dtype.itemsize and dtype.is_floating_point:
        largest = tensor.double().abs().max().item() if tensor.numel() else 0.0
        if torch.finfo(dtype).max < largest < math.inf:
            raise ValueError(
                f"tensor {name!r} holds {largest:.4g}, and {str(dtype).removeprefix('torch.')} ends at "
                f"{torch.finfo(dtype).max:.4g}: use bfloat16 or float32"
            )
    return out


def concat(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Stacked along the first dimension."""
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    return ComputedTensor(tensors, shape, lambda *parts: torch.cat(parts))


def rows(tensor: LazyTensor, first: int, last: int) -> LazyTensor:
    """`tensor[first:last]`."""
    return ComputedTensor([tensor], (last - first, *tensor.shape[1:]), lambda t: t[first:last])


def transpose(tensor: LazyTensor) -> LazyTensor:
    """A matrix with its sides exchanged."""
    return ComputedTensor([tensor], tensor.shape[::-1], lambda t: t.t())


def reshape(tensor: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    """The same numbers, in the same order, in another shape."""
    return ComputedTensor([tensor], shape, lambda t: t.reshape(tuple(shape)))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
