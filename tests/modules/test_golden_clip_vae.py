"""Autoencoder, CLIP towers, tokens and LDM's caption encoder against the original's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gligen.config import ImageEncoderConfig, TextEncoderConfig, VAEConfig
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder, tokenize
from gligen.weights.names_clip import image_from_hf, text_from_hf
from gligen.weights.tensors import LazyTensor, hold
from tests.conftest import GOLDEN, SMALL_TEXT, SMALL_VAE, case, error, filled, manifest


def vae_from(weights: str, config: VAEConfig) -> AutoencoderKL:
    with torch.device("meta"):
        vae = AutoencoderKL(config).eval().requires_grad_(False)
    vae.load_state_dict(filled(weights), assign=True)
    return vae


def read_all(tensors: dict[str, LazyTensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in tensors.items()}


def text_encoder_from(weights: str, config: TextEncoderConfig) -> CLIPTextEncoder:
    encoder = CLIPTextEncoder(config).eval().requires_grad_(False)
    prefix = "transformer.text_model."
    bare = hold({name.removeprefix(prefix): tensor for name, tensor in filled(weights).items()})
    encoder.load_state_dict(read_all(text_from_hf(bare)), assign=True)
    return encoder


def test_vae_equals_the_original():
    vae, arrays = vae_from("small_autoencoder", SMALL_VAE), case("cases/vae")
    posterior = vae.posterior(arrays["image"])
    assert error(posterior.mean, arrays["mean"]) < 1e-5
    assert error(posterior.logvar, arrays["logvar"]) < 1e-5
    assert error(vae.decode(arrays["z"]), arrays["decoded"]) < 1e-5


def test_vae_encodes_to_scaled_latents():
    vae, arrays = vae_from("small_autoencoder", SMALL_VAE), case("cases/vae")
    noise = torch.full_like(arrays["mean"], 0.5)
    expected = 0.18215 * (arrays["mean"] + torch.exp(0.5 * arrays["logvar"]) * 0.5)
    assert error(vae.encode(arrays["image"]), 0.18215 * arrays["mean"]) < 1e-5
    assert error(vae.encode(arrays["image"], noise), expected) < 1e-5


@pytest.mark.slow
def test_full_size_vae_equals_the_original():
    vae, arrays = vae_from("autoencoder", VAEConfig()), case("full/vae_full")
    y, x = np.mgrid[0:512, 0:512]
    image = np.stack(
        [0.8 * np.sin(0.05 * (c + 1) * x) * np.cos(0.03 * (c + 1) * y) + 0.2 * np.cos(0.11 * (x + y)) for c in range(3)]
    )
    image = torch.from_numpy(image.astype(np.float32))[None]
    posterior = vae.posterior(image)
    assert error(posterior.mean, arrays["mean"]) < 1e-5
    assert error(posterior.logvar, arrays["logvar"]) < 1e-5
    assert error(vae.decode(arrays["z"]), arrays["decoded_f16"]) < 2e-3  # stored in float16


def test_clip_text_equals_the_original():
    encoder, arrays = text_encoder_from("small_text_encoder", SMALL_TEXT), case("cases/clip_text")
    assert error(encoder(arrays["input_ids"]), arrays["last_hidden_state"]) < 1e-5
    assert error(encoder.phrase_features(arrays["input_ids"]), arrays["pooler_output"]) < 1e-5


@pytest.mark.slow
def test_full_size_clip_text_equals_the_original():
    encoder, arrays = text_encoder_from("text_encoder", TextEncoderConfig()), case("full/clip_text_full")
    assert error(encoder(arrays["input_ids"]), arrays["last_hidden_state"]) < 1e-5
    assert error(encoder.phrase_features(arrays["input_ids"]), arrays["pooler_output"]) < 1e-5


def test_clip_image_features_equal_the_original():
    arrays = case("cases/clip_image")
    config = ImageEncoderConfig(image_size=56, width=64, layers=3, heads=4, embed_dim=48, text_width=48)
    encoder = CLIPImageEncoder(config).eval().requires_grad_(False)
    encoder.load_state_dict(read_all(image_from_hf(hold(filled("small_clip_image")))), assign=True)
    pixels = arrays["pixel_values"]
    assert error(encoder.visual(pixels), arrays["image_embeds_unnormalised"]) < 1e-5
    assert error(encoder(pixels), arrays["image_embeds"]) < 1e-5
    assert error(encoder.image_features(pixels), arrays["after_reproject"]) < 1e-5
    hidden = encoder.visual.transformer(encoder.visual._embeds(pixels))  # before the final norm
    assert error(hidden, arrays["last_hidden_state"]) < 1e-5


def test_tokens_equal_the_originals_tokenizer():
    golden = json.loads((GOLDEN / "cases/tokens.json").read_text())
    ids, _ = tokenize(list(golden))
    wrong = [text for text, row in zip(golden, ids.tolist(), strict=True) if row != golden[text]]
    assert not wrong


def test_what_is_cut_off_a_long_text_is_told():
    ids, cuts = tokenize(["a cat", "word " * 75 + "lost words"])
    assert cuts == ["", "lost words"]
    assert ids[1, -1] == 49407
    assert ids[1, 1:76].unique().numel() == 1


def test_ldm_text_encoder_has_the_published_names_and_shapes():
    config = TextEncoderConfig(kind="bert", width=1280, layers=32, heads=8, vocab_size=30522)
    with torch.device("meta"):
        encoder = BERTTextEncoder(config)
    prefix = "cond_stage_model.transformer."
    published = {k.removeprefix(prefix): v for k, v in manifest("ldm_text2img_large").items() if k.startswith(prefix)}
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == published
