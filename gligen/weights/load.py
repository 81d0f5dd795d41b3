"""Lazy tensors into a network that was built without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gligen.weights.tensors import LazyTensor


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside have tensors of a shape and no numbers, on the meta device, for `load_part` to give."""
    with torch.device("meta"), _NoNumbers():
        yield


class _NoNumbers(TorchFunctionMode):
    """What changes numbers alone does nothing: on the meta device torch imports its compiler for that, 1.5 seconds."""

    SKIPPED = (
        *(Tensor.normal_, Tensor.uniform_, Tensor.triu_),
        *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_),
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_scaled = func in (Tensor.mul, Tensor.__rmul__) and isinstance(args[1], (int, float))  # keeps the shape
        if func in self.SKIPPED or is_scaled:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **kwargs)


def load_part(
    module: nn.Module,
    tensors: Mapping[str, LazyTensor],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    what: str,
) -> None:
    """Gives `module`, built on the meta device, its weights: straight on `device` and in `dtype`, one at a time.

    Strict: every name must be there, none may be left over, and shapes must agree; otherwise ValueError, in one line
    that begins with `what`. Names may be missing on purpose only by not being in the module's state dict.
    """
    own = module.state_dict()
    both = [(name, tensors[name], tensor) for name, tensor in own.items() if name in tensors]
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} is {tuple(found.shape)} instead of {tuple(wanted.shape)}"
            for name, found, wanted in both
            if tuple(found.shape) != tuple(wanted.shape)
        ],
        "stored as other than floating-point numbers, by a program that quantises": [
            f"{name} is {str(found.dtype).removeprefix('torch.')}"
            for name, found, wanted in both
            if wanted.is_floating_point() and not found.dtype.is_floating_point
        ],
    }
    told = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(f"{what}: its weights do not fit: {'; '.join(told)}")
    module.load_state_dict({name: tensors[name].read(device, dtype) for name in own}, strict=True, assign=True)
