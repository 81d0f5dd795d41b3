"""`hf:` paths, with a stand-in for huggingface_hub: nothing is fetched here."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from gligen.weights import read_weights, save_model
from gligen.weights.hub import local
from gligen.weights.lora import parse_lora
from tests.generated import generated_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds whatever lies in a folder; what was asked of it."""
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if not (tmp_path / file).exists():
            raise FileNotFoundError(f"404 Client Error\n{file} is not there")
        return str(tmp_path / file)

    def snapshot(repository, allow_patterns):
        asked.append((repository, None))
        return str(tmp_path)

    module = types.SimpleNamespace(hf_hub_download=download, snapshot_download=snapshot)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_files_and_repositories_are_asked_for_by_name(hub, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    assert local("hf:owner/name/a.safetensors") == str(tmp_path / "a.safetensors")
    assert local("hf:owner/name") == str(tmp_path)
    assert parse_lora("hf:owner/name/a.safetensors:0.5") == (tmp_path / "a.safetensors", 0.5)
    assert parse_lora(("hf:owner/name/a.safetensors", 2)) == (tmp_path / "a.safetensors", 2)
    assert hub == [("owner/name", "a.safetensors"), ("owner/name", None)] + [("owner/name", "a.safetensors")] * 2
    assert local("a.safetensors") == "a.safetensors"


def test_a_model_is_read_from_the_hub(hub, tmp_path):
    model = generated_model()
    save_model(tmp_path / "m.safetensors", model.parts, model.config)
    assert read_weights("hf:owner/name/m.safetensors").config == model.config


def test_what_cannot_be_fetched_is_said_in_one_line(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"^'hf:owner/name/b.bin' cannot be fetched .*: 404 Client Error$"):
        read_weights("hf:owner/name/b.bin")
    with pytest.raises(ValueError, match="names no file"):
        local("hf:name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"^'hf:owner/name/b.bin' needs huggingface_hub.*pip install"):
        local("hf:owner/name/b.bin")
