"""Shared by all tests: golden arrays, synthetic weights by the fill rule, and small configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gligen.config import GroundingConfig, TextEncoderConfig, UNetConfig, VAEConfig
from gligen.modules.unet import UNetModel
from tests.golden.fill import fill

GOLDEN = Path(__file__).parent / "golden"

# the golden README's small models: 32 channels, mult [1, 2], one residual block, 8 heads, context 48
SMALL = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_downsamples": (1, 2),
    "context_dim": 48,
}
SMALL_VAE = VAEConfig(base_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1)
SMALL_TEXT = TextEncoderConfig(width=64, layers=3, heads=4)


def small_unet_config(mode: str = "box-text", fuser_type: str = "gatedSA") -> UNetConfig:
    grounding = GroundingConfig(mode=mode, fuser_type=fuser_type, token_dim=48, feature_dim=48)
    return UNetConfig(**SMALL, grounding=grounding)


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"manifests/{name}.json").read_text()).items()}


def filled(name: str) -> dict[str, torch.Tensor]:
    """The synthetic weights of a manifest."""
    return {key: torch.tensor(fill(key, shape)) for key, shape in manifest(name).items()}


def case(name: str) -> dict[str, torch.Tensor | dict]:
    """Arrays of a golden case as tensors; 'config' as a dict."""
    data = np.load(GOLDEN / f"{name}.npz")
    return {
        key: json.loads(str(data[key])) if key == "config" else torch.from_numpy(data[key])
        for key in data.files
        if data[key].dtype.kind != "U" or key == "config"
    }


def error(value: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest difference over largest value, the golden README's measure."""
    assert value.shape == golden.shape
    return ((value.double() - golden.double()).abs().max() / golden.double().abs().max()).item()


def grounding_of(arrays: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A case's `grounding.*` arrays under this project's names."""
    ours = {
        "positive_embeddings": "text_features",
        "text_embeddings": "text_features",
        "image_embeddings": "image_features",
    }
    inputs = {}
    for key, value in arrays.items():
        name = key.removeprefix("grounding.")
        if name == key:
            continue
        if name == "hed_edge_u8":
            inputs["map"] = ((value.float() / 255 - 0.5) / 0.5).to(dtype)
        elif name == "sem_labels_u8":
            inputs["map"] = value[:, None].to(dtype)
        else:
            inputs[ours.get(name, name)] = value.to(dtype)
    return inputs


@pytest.fixture(scope="session")
def small_unet() -> Callable[..., UNetModel]:
    """`small_unet(mode, fuser_type, manifest)`: a small UNet with the golden weights, made once."""
    made: dict[tuple[str, str, str], UNetModel] = {}

    def make(mode: str = "box-text", fuser_type: str = "gatedSA", weights: str = "small_gligen_text") -> UNetModel:
        key = (mode, fuser_type, weights)
        if key not in made:
            unet = UNetModel(small_unet_config(mode, fuser_type)).eval().requires_grad_(False)
            unet.load_state_dict(filled(weights))
            made[key] = unet
        return made[key]

    return make
