"""Encodings of scenes that come again, stacked on the device: a batch of them is one index_select."""

from __future__ import annotations

import torch
from torch import Tensor

from gligen.runtime import check_memory


class KeptScenes:
    """Posteriors of latents and captions' states of `size` scenes, each put in once and then taken as often as wanted.

    dtype: in which they are kept. float16 takes half and rounds to 11 bits, more finely than bfloat16 computes with.
    Memory is taken for all of them at once, with the first. Raises MemoryError, one line, if it is plainly not there.
    """

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.is_there = torch.zeros(size, dtype=torch.bool)  # on the CPU: asking waits for nothing
        self.kinds: tuple[Tensor, ...] = ()

    def lacking(self, rows: Tensor) -> Tensor:
        """Which (positions in `rows`) are not there yet. rows: (B,) int64 on the CPU."""
        return (~self.is_there[rows]).nonzero()[:, 0]

    def put(self, rows: Tensor, *encodings: Tensor) -> None:
        """encodings: (B, ...) on the device, of the same kinds in the same order every time."""
        if not self.kinds:
            if self.device.type == "cuda":  # a CPU's memory is taken page by page, as scenes come
                needed = self.size * sum(each[0].numel() for each in encodings) * self.dtype.itemsize
                check_memory(needed, self.device, f"--cache {self.size}, of which fewer would do,")
            self.kinds = tuple(
                torch.empty(self.size, *each.shape[1:], device=self.device, dtype=self.dtype) for each in encodings
            )
        at = rows.to(self.device, non_blocking=True)
        for kind, each in zip(self.kinds, encodings, strict=True):
            kind.index_copy_(0, at, each.to(self.dtype))
        self.is_there[rows] = True

    def take(self, rows: Tensor) -> list[Tensor]:
        """Each kind's (B, ...) float32."""
        at = rows.to(self.device, non_blocking=True)
        return [kind.index_select(0, at).float() for kind in self.kinds]


def kept_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which precision scenes are kept for a computation in `dtype`."""
    return torch.float16 if device.type == "cuda" and dtype != torch.float32 else torch.float32
