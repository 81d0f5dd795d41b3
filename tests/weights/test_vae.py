"""An autoencoder given by itself, in every layout people exchange, is the one that is used."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from gligen.loading import open_model
from gligen.weights import hold, replace_vae, save_model
from gligen.weights.names_diffusers import vae_to_diffusers
from tests.generated import generated_model


@pytest.fixture(scope="module")
def model():
    return generated_model()


@pytest.fixture(scope="module")
def other(model):
    """Another autoencoder of the model's shapes, under LDM's names."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.parts["vae"].items()}


def diffusers(other) -> dict[str, torch.Tensor]:
    return {name: t.read() for name, t in vae_to_diffusers(hold(other)).items()}


def write(kind: str, other, folder):
    path = folder / "vae.safetensors"
    if kind == "ldm":
        save_file(other | {"loss.logvar": torch.zeros(())}, path)
    elif kind == "checkpoint":
        path = folder / "vae.pt"
        torch.save({"state_dict": other | {"loss.logvar": torch.zeros(())}, "epoch": 3}, path)
    elif kind == "whole":
        save_file({f"first_stage_model.{name}": t for name, t in other.items()} | {"model.x": torch.ones(1)}, path)
    elif kind == "diffusers file":
        save_file(diffusers(other), path)
    else:
        path = folder / "made"
        inner = path / "vae" if kind == "pipeline" else path
        inner.mkdir(parents=True)
        save_file(diffusers(other), inner / "diffusion_pytorch_model.safetensors")
        (inner / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 0.18215}))
    return path


@pytest.mark.parametrize("kind", ["ldm", "checkpoint", "whole", "diffusers file", "folder", "pipeline"])
def test_every_layout_gives_its_tensors_and_keeps_the_models_scale(model, other, tmp_path, kind):
    tensors, config = replace_vae(model.config, write(kind, other, tmp_path))
    assert tensors.keys() == other.keys()
    assert all(torch.equal(tensors[name].read(), t) for name, t in other.items())
    assert config == model.config


def test_a_model_without_one_opens_with_one(model, other, tmp_path):
    parts = {name: part for name, part in model.parts.items() if name not in ("vae", "image_encoder")}
    save_model(tmp_path / "m.safetensors", parts, model.config)
    with pytest.raises(ValueError, match="no autoencoder"):
        open_model(tmp_path / "m.safetensors")
    opened = open_model(tmp_path / "m.safetensors", vae=write("ldm", other, tmp_path))
    assert torch.equal(opened.parts["vae"]["decoder.conv_in.weight"].read(), other["decoder.conv_in.weight"])


def test_another_kind_of_autoencoder_is_refused(model, other, tmp_path):
    path = write("folder", other, tmp_path)
    (path / "config.json").write_text(json.dumps({"scaling_factor": 0.13025}))
    with pytest.raises(ValueError, match=r"0\.13025.*0\.18215.*XL"):
        replace_vae(model.config, path)
    (path / "config.json").write_text(json.dumps({"shift_factor": 0.1159, "scaling_factor": 0.3611}))
    with pytest.raises(ValueError, match="shifts its latents"):
        replace_vae(model.config, path)
    unet = dataclasses.replace(model.config.unet, in_channels=16, out_channels=16)
    with pytest.raises(ValueError, match="of 4 channels, but the model's have 16"):
        replace_vae(dataclasses.replace(model.config, unet=unet), write("ldm", other, tmp_path))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"holds no autoencoder.*no encoder\.conv_in\.weight"):
        replace_vae(model.config, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        replace_vae(model.config, tmp_path / "none.safetensors")
