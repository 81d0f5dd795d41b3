"""Files in, files out: every published layout read under one set of names, and written back.

Names are imported when first used, so that a command's --help answers without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gligen.weights.files import Weights, read_weights
    from gligen.weights.graft import check_base, combine, missing_for_sampling, where_to_get
    from gligen.weights.infer import is_grounding_name, possible_modes, schedule_buffers
    from gligen.weights.load import load_part, without_weights
    from gligen.weights.lora import add_loras
    from gligen.weights.tensors import LazyTensor, hold
    from gligen.weights.vae import replace_vae
    from gligen.weights.write import save_adapter, save_model, write_weights

# What `write_weights` can write: the published layouts, and the project's own two.
LAYOUTS = ("sd", "ldm", "gligen", "pruned", "diffusers", "model", "adapter")

_HOMES = {
    "files": ("Weights", "read_weights"),
    "graft": ("check_base", "combine", "missing_for_sampling", "where_to_get"),
    "infer": ("is_grounding_name", "possible_modes", "schedule_buffers"),
    "load": ("load_part", "without_weights"),
    "lora": ("add_loras",),
    "tensors": ("LazyTensor", "hold"),
    "vae": ("replace_vae",),
    "write": ("save_adapter", "save_model", "write_weights"),
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
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
