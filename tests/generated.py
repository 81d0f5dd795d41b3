"""A model with every part of the real one and generated weights, small enough to run anywhere in seconds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gligen.config import (
    GroundingConfig,
    ImageEncoderConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from gligen.loading import OpenModel, Parts
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.weights import hold


def generated_model(mode: str = "box-text") -> OpenModel:
    """Weights are noise, the same at every call. Gates stand open, so that grounding takes part."""
    grounding = GroundingConfig(
        mode=mode,
        token_dim=64,
        feature_dim=64,
        hidden_dim=64,
        map_depths=(1, 1, 1, 1),
        map_dims=(16, 32, 64, 128),
    )
    config = dataclasses.replace(BASE, unet=dataclasses.replace(BASE.unet, grounding=grounding))
    parts = _noise(config)
    unet = parts["unet"]
    for name, tensor in unet.items():
        if name.endswith(("alpha_attn", "alpha_dense")):
            tensor.fill_(0.5)
    weight = unet["input_blocks.0.0.weight"][:, : config.unet.in_channels].clone()
    parts["base_first_conv"] = {"weight": weight, "bias": torch.zeros(len(weight))}
    return OpenModel(config, {part: hold(tensors) for part, tensors in parts.items()}, "generated small weights")


def generated_base() -> tuple[ModelConfig, Parts]:
    """Config and parts of a base without grounding."""
    return BASE, {part: hold(tensors) for part, tensors in _noise(BASE).items()}


BASE = ModelConfig(
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_downsamples=(1, 2),
        num_heads=4,
        context_dim=64,
    ),
    vae=VAEConfig(base_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1),
    text_encoder=TextEncoderConfig(width=64, layers=2, heads=4),
    image_encoder=ImageEncoderConfig(image_size=56, width=64, layers=2, heads=4, embed_dim=64, text_width=64),
    image_size=64,
)


def _noise(config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    assert config.image_encoder is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            "unet": UNetModel(config.unet),
            "vae": AutoencoderKL(config.vae),
            "text_encoder": CLIPTextEncoder(config.text_encoder),
            "image_encoder": CLIPImageEncoder(config.image_encoder),
        }
    return {part: module.state_dict() for part, module in made.items()}
