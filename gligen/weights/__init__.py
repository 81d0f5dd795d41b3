"""Files in, files out: every published layout read under one set of names, and written back.

Names are imported when first used, so that a command's --help answers without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gligen.weights.files import Weights, read_weights
    from gligen.weights.graft import check_base, combine, missing_for_sampling, where_to_get
    from gligen.weights.infer import is_grounding_name, possible_modes
    from gligen.weights.load import load_part, without_weights
    from gligen.weights.lora import add_loras
    from gligen.weights.tensors import LazyTensor, hold
    from gligen.weights.vae import replace_vae
    from gligen.weights.write import save_adapter, save_model, schedule_buffers, write_weights

# What `write_weights` can write: the published layouts, and the project's own two.
LAYOUTS = ("sd", "ldm", "gligen", "pruned", "diffusers", "model", "adapter")

_HOMES = {
    "LazyTensor": "tensors",
    "Weights": "files",
    "add_loras": "lora",
    "check_base": "graft",
    "combine": "graft",
    "hold": "tensors",
    "is_grounding_name": "infer",
    "load_part": "load",
    "without_weights": "load",
    "missing_for_sampling": "graft",
    "possible_modes": "infer",
    "read_weights": "files",
    "replace_vae": "vae",
    "save_adapter": "write",
    "save_model": "write",
    "schedule_buffers": "write",
    "where_to_get": "graft",
    "write_weights": "write",
}
__all__ = [
    "LAYOUTS",
    "LazyTensor",
    "Weights",
    "add_loras",
    "check_base",
    "combine",
    "hold",
    "is_grounding_name",
    "load_part",
    "missing_for_sampling",
    "possible_modes",
    "read_weights",
    "replace_vae",
    "save_adapter",
    "save_model",
    "schedule_buffers",
    "where_to_get",
    "without_weights",
    "write_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
