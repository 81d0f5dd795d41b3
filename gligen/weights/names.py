"""Foreign names to ours for tensors in memory; files go through the lazy tables in names_*.py."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gligen.weights.names_clip import image_from_hf, text_from_hf
from gligen.weights.tensors import LazyTensor, hold


def clip_text_from_hf(state: Mapping[str, Tensor | LazyTensor]) -> dict[str, Tensor]:
    """A Hugging Face CLIP text state dict, with or without `transformer.text_model.` in front, under our names."""
    bare = {name.removeprefix("transformer.").removeprefix("text_model."): t for name, t in state.items()}
    return {name: t.read() for name, t in text_from_hf(hold(bare)).items()}


def clip_image_from_hf(state: Mapping[str, Tensor | LazyTensor]) -> dict[str, Tensor]:
    """A Hugging Face CLIP state dict's image tower and projections under our names."""
    return {name: t.read() for name, t in image_from_hf(hold(state)).items()}
