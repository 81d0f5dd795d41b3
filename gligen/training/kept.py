"""Examples that come again: which sample shows which of them, and their encodings, kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gligen.device import check_memory

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, lie evenly whatever their number


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Samples n = 0, 1, … of `size` examples, a pure function of n.

    reuse: while examples are new, so many samples of earlier ones stand between two of new ones, for a device that is
        faster than examples are made. Then, and without it from the start, examples come in rounds.
    """

    size: int
    reuse: int = 0

    def example(self, n: int) -> int:
        new, turn = divmod(n, 1 + self.reuse)
        if new >= self.size:
            return n % self.size
        return new if turn == 0 else int(n * GOLDEN % 1 * (new + 1))

    def is_new(self, n: int, begin: int) -> bool:
        """True if sample n shows an example for the first time to one who began with sample `begin`; of one who did not
        begin with 0, not always."""
        new, turn = divmod(n, 1 + self.reuse)
        return turn == 0 if self.reuse and new < self.size else n - begin < self.size


class KeptEncodings:
    """Encodings of examples, each made once: a batch of them is one index_select of stacked tensors on the device.

    encode: images (B, 3, H, W) uint8 and captions' ids (B, M), on the CPU -> encodings (B, ...) on the device.
    make: numbers of examples -> their images and ids, for those that nobody has brought (after a resumption).
    dtype: in which they are kept. float16 takes half and rounds to 11 bits, more finely than bfloat16 computes with.
    Memory is taken for all of them at once, with the first. Raises MemoryError, one line, if it is plainly not there.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        encode: Callable[[Tensor, Tensor], Sequence[Tensor]],
        make: Callable[[list[int]], tuple[Tensor, Tensor]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.encode, self.make = encode, make
        self.is_there = torch.zeros(size, dtype=torch.bool)  # on the CPU: asking waits for nothing
        self.kinds: list[Tensor] = []

    def take(
        self, examples: Tensor, new: Tensor | None = None, images: Tensor | None = None, ids: Tensor | None = None
    ) -> list[Tensor]:
        """Each kind of encoding, (B, ...) float32, of examples (B,).

        new: (A,) positions in `examples` of those whose images and ids are given. All on the CPU.
        """
        if new is not None and images is not None and ids is not None and not self.is_there[examples[new]].all():
            self._put(examples[new], images, ids)
        lacking = examples[~self.is_there[examples]].unique()
        if len(lacking):
            self._put(lacking, *self.make(lacking.tolist()))
        at = examples.to(self.device, non_blocking=True)
        return [kind.index_select(0, at).float() for kind in self.kinds]

    def _put(self, examples: Tensor, images: Tensor, ids: Tensor) -> None:
        made = self.encode(images, ids)
        if not self.kinds:
            if self.device.type == "cuda":  # a CPU's memory is taken page by page, as examples come
                needed = self.size * sum(each[0].numel() for each in made) * self.dtype.itemsize
                check_memory(needed, self.device, f"--cache {self.size}", "keep fewer")
            self.kinds = [torch.empty(self.size, *e.shape[1:], device=self.device, dtype=self.dtype) for e in made]
        at = examples.to(self.device, non_blocking=True)
        for kind, each in zip(self.kinds, made, strict=True):
            kind.index_copy_(0, at, each.to(self.dtype))
        self.is_there[examples] = True


def kept_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which encodings are kept for a computation in `dtype`."""
    return torch.float16 if device.type == "cuda" and dtype != torch.float32 else torch.float32
