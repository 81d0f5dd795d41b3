"""A denoising step as one CUDA graph: a single launch instead of about a thousand kernels', which bind batch 1.

Made for a pipeline by `gligen.runtime.optimize`; used as `unet.denoise` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gligen.modules.fusers import GateScale
from gligen.modules.unet import Conditioning, UNetModel

MOST = 6  # graphs kept: each holds its activations' memory


@dataclass
class _Recorded:
    """A graph and the tensors that it reads and writes. source: whose conditioning was copied in last."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    timesteps: Tensor
    gate_scale: Tensor
    cond: Conditioning
    eps: Tensor
    source: Conditioning


class StepGraphs:
    """`unet.denoise`, recorded once for each shape of batch and conditioning and for fusers on and off.

    Weights are read from where they were when recorded: they must not move. Results are the caller's own.
    """

    def __init__(self, unet: UNetModel) -> None:
        self.unet = unet
        self.graphs: dict[tuple[object, ...], _Recorded] = {}
        self.pool: Any = None  # memory that all graphs share: only one runs at a time, and results are copied out

    def __call__(self, x: Tensor, timesteps: Tensor, cond: Conditioning, gate_scale: GateScale = 1.0) -> Tensor:
        is_open = isinstance(gate_scale, Tensor) or gate_scale != 0
        if not is_open:
            cond = _without_grounding(cond)
        key = (is_open, x.dtype, x.shape, *(tensor.shape for tensor in _tensors(cond)))
        found = self.graphs.pop(key, None)
        if found is None:
            if len(self.graphs) >= MOST:
                self.graphs.pop(next(iter(self.graphs)))  # the one that was not used for longest
            with torch.cuda.device(x.device):  # graphs are recorded on the current one
                found = self._record(x, timesteps, cond, is_open)
        self.graphs[key] = found
        if found.source is not cond and not _is_same(found.source, cond):
            for own, new in zip(_tensors(found.cond), _tensors(cond), strict=True):
                own.copy_(new)
            found.source = cond
        found.x.copy_(x)
        found.timesteps.copy_(timesteps)
        if is_open:
            found.gate_scale.copy_(torch.as_tensor(gate_scale))
        found.graph.replay()
        return found.eps.clone()

    def _record(self, x: Tensor, timesteps: Tensor, cond: Conditioning, is_open: bool) -> _Recorded:
        own = Conditioning(*tree_map_only(Tensor, Tensor.clone, (cond.blocks, cond.extra)))
        x, timesteps, gate_scale = x.clone(), timesteps.clone(), torch.ones((), device=x.device)

        def run() -> Tensor:
            return self.unet.denoise(x, timesteps, own, gate_scale if is_open else 0.0)

        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries choose their kernels, outside of the recording
                run()
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            eps = run()
        return _Recorded(graph, x, timesteps, gate_scale, own, eps, cond)


def _tensors(cond: Conditioning) -> Iterator[Tensor]:
    for block in cond.blocks:
        yield from block.caption
        yield from block.grounding or ()
    if cond.extra is not None:
        yield cond.extra


def _without_grounding(cond: Conditioning) -> Conditioning:
    return Conditioning(tuple(block._replace(grounding=None) for block in cond.blocks), cond.extra)


def _is_same(a: Conditioning, b: Conditioning) -> bool:
    """Whether both hold the very same tensors."""
    return all(x is y for x, y in zip(_tensors(a), _tensors(b), strict=True))
