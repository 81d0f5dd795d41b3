"""Lazy tensors into a network that was built without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
        *(Tensor.normal_, Tensor.uniform_, Tensor.triu_, Tensor.mul, Tensor.__rmul__),
        *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_),
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.SKIPPED:
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
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [
        _some("missing", [name for name in wanted if name not in tensors]),
        _some("unexpected", [name for name in tensors if name not in wanted]),
        _some(
            "of another shape",
            (
                f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
                for name, shape in wanted.items()
                if name in tensors and tuple(tensors[name].shape) != shape
            ),
        ),
        _some(
            "stored as other than floating-point numbers, by a program that quantises",
            (
                f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}"
                for name, tensor in module.state_dict().items()
                if name in tensors and tensor.is_floating_point() and not tensors[name].dtype.is_floating_point
            ),
        ),
    ]
    if any(problems):
        raise ValueError(f"{what}: its weights do not fit: {'; '.join(filter(None, problems))}")
    state = {name: tensors[name].read(device, dtype) for name in wanted}
    module.load_state_dict(state, strict=True, assign=True)


def _some(problem: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    return f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
