"""Linear layers of the UNet's transformers in 8 bits, by torchao: smaller, and on some devices faster, but not exact.

Convolutions, half of a UNet's arithmetic, stay as they are, and so do the layers that run once a step or once a
request. Nothing is calibrated: weights are rounded row by row, activations token by token as they come.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import nn

from gligen.modules.transformer import BasicTransformerBlock

QUANTIZATIONS = {
    "int8-weights": "Int8WeightOnlyConfig",
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "fp8-weights": "Float8WeightOnlyConfig",
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
}
"""Kinds, and torchao's names for them. int8-weights, fp8-weights: weights in 8 bits, the product in the model's own
precision, for memory. int8, fp8: both of a product's sides in 8 bits, for speed."""

FP8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with products of 8-bit floats


def check_quantization(kind: str, device: torch.device) -> None:
    """Raises ValueError, one line, for a kind that is unknown or cannot run here."""
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantize is '{kind}': the known ones are {', '.join(QUANTIZATIONS)}")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("quantize needs torchao, which is not installed: pip install torchao")
    if kind == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise ValueError(
            f"quantize is 'fp8', and {device} has no products of 8-bit floats (Ada, Hopper or newer have): use int8"
        )


@torch.no_grad()
def quantize(unet: nn.Module, kind: str) -> int:
    """Rounds the linear layers of every transformer block in place; returns how many.

    Such a network can be compiled, but not trained, saved under published names or moved between devices. Raises
    ValueError as `check_quantization` does.
    """
    check_quantization(kind, next(unet.parameters()).device)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao about itself
        from torchao import quantization

        for block in blocks:
            quantization.quantize_(block, getattr(quantization, QUANTIZATIONS[kind])())  # of its linear layers
    return sum(isinstance(layer, nn.Linear) for block in blocks for layer in block.modules())
