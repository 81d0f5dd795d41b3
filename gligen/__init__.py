"""GLIGEN: grounded text-to-image generation (Li et al., 2023), in pure PyTorch.

    import gligen

    pipe = gligen.load("sd-v1-4.ckpt", adapter="gligen-box-text.safetensors")
    images = pipe(prompt="a cat on a sofa", entities=[{"phrase": "a cat", "box": [0.2, 0.3, 0.6, 0.9]}])

Shapes are written with one legend throughout: B batch, C channels, H and W image size, h and w latent size, L visual
tokens (h·w), N grounding tokens, M caption tokens, D token width. Images are in [-1, 1], latents already scaled,
boxes xyxy in [0, 1], masks float with 1 for present, timesteps int64 in [0, T).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gligen.loading import load as load
    from gligen.pipeline import Pipeline as Pipeline
    from gligen.pipeline import Progress as Progress
    from gligen.pipeline import Sample as Sample
    from gligen.request import Entity as Entity
    from gligen.request import Inpaint as Inpaint
    from gligen.request import Request as Request

__version__ = "0.1.0"

_HOMES = {
    "load": "gligen.loading",
    "Pipeline": "gligen.pipeline",
    "Progress": "gligen.pipeline",
    "Sample": "gligen.pipeline",
    "Request": "gligen.request",
    "Entity": "gligen.request",
    "Inpaint": "gligen.request",
}
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604  # names are made on first use


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})  # for completion, before a name was used


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: torch takes seconds, and `--help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gligen' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
