"""`gligen.load` from Python: whatever is given is taken where its meaning is plain, or refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gligen
from gligen.loading import open_model, read_vocabulary
from gligen.weights import save_model
from tests.generated import BASE, generated_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("load") / "base.safetensors"
    config, parts = generated_base()
    save_model(path, parts, config)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter": ["a", "b"]}, r"^adapter is \['a', 'b'\]: give the path of one file or folder$"),
        ({"checkpoint": 3}, "^checkpoint is 3: give the path"),
        ({"checkpoint": b"a.ckpt"}, "^checkpoint is b'a.ckpt': give the path"),
        ({"checkpoint": ""}, "^checkpoint is '': give the path"),
        ({"checkpoint": {}}, "^checkpoint is {}: give the path"),
        ({"clip": ("a",)}, "^clip is "),
        ({"vae": True}, "^vae is True"),
        ({"vocab": 1.5}, "^vocab is 1.5"),
        ({"ema": "yes"}, "^ema is 'yes': give true or false"),
        ({"mode": 3}, "^mode is 3"),
        ({"mode": ["depth"]}, "^mode is "),
        ({"loras": 3}, "^loras is 3: give a list"),
        ({"loras": {"a": 1}}, "^loras is "),
        ({"loras": [3]}, "^lora is 3"),
        ({"loras": [("a", "b")]}, r"^lora is \('a', 'b'\): give 'FILE', 'FILE:weight' or \(path, weight\)"),
        ({"loras": [("a", 1, 2)]}, "^lora is "),
        ({"loras": [None]}, "^lora is None"),
        ({"loras": [("a", 1e30)]}, r"weight 1e\+30: give a number other than 0 between -100 and 100"),
        ({"loras": "a:1e30"}, r"weight 1e\+30"),
        ({"device": None}, "^device is None: give auto"),
        ({"device": 1.5}, "^device is 1.5"),
        ({"device": True}, "^device is True"),
        ({"device": "gpu"}, "^device is 'gpu'"),
        ({"dtype": "half"}, "^dtype is 'half': the known ones are auto, float32"),
        ({"dtype": None}, "^dtype is 'None'"),
        ({"dtype": ["float32"]}, "^dtype is "),
        ({"dtype": torch.int8}, "^dtype is 'torch.int8'"),
        ({"dtype": torch.float8_e5m2}, "^dtype is 'torch.float8_e5m2'"),
        ({"dtype": np.float32}, "^dtype is "),
    ],
)
def test_arguments_of_load_are_refused_in_one_line(base, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        gligen.load(**{"checkpoint": base, "device": "cpu", **arguments})
    assert "\n" not in str(caught.value)


def test_a_device_of_a_number_is_cudas():
    if torch.cuda.device_count() > 3:
        pytest.skip("this machine has a fourth device")
    with pytest.raises(ValueError, match="device is '3', which cannot be used here"):
        gligen.load(device=3)


def test_objects_of_torch_and_paths_are_taken(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    pipe = gligen.load(Path("~") / base.name, adapter=None, loras=None, device=torch.device("cpu"), dtype=torch.float64)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float64)
    assert open_model(f"~/{base.name}").name == base.name


def test_a_pair_of_path_and_weight_is_one_lora(base, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    factors = {f"{layer}.lora_down.weight": torch.ones(1, 64, 1, 1), f"{layer}.lora_up.weight": torch.ones(64, 1, 1, 1)}
    save_file(factors, tmp_path / "a.safetensors")
    name = "middle_block.1.proj_in.weight"
    plain = open_model(base).parts["unet"][name].read()
    for loras in (
        (tmp_path / "a.safetensors", 0.5),
        [(str(tmp_path / "a.safetensors"), np.float32(0.5))],
        [[tmp_path / "a.safetensors", 0.5]],
        f"{tmp_path / 'a.safetensors'}:0.5",
    ):
        assert torch.allclose(open_model(base, loras=loras).parts["unet"][name].read(), plain + 0.5), loras


def test_the_embedded_base_takes_all_that_other_bases_take(tmp_path, caplog, monkeypatch):
    """Also for a mode that no adapter was embedded for."""
    monkeypatch.setattr("gligen.loading.embedded_adapter", lambda mode: None)
    own = open_model(mode="box-text-image")
    clip = {name: t.read() + 1 for part in ("text_encoder", "image_encoder") for name, t in own.parts[part].items()}
    torch.save(clip, tmp_path / "clip.pt")
    model = open_model(mode="box-text-image", clip=tmp_path / "clip.pt")
    assert model.from_clip == ("image_encoder",)
    assert (model.facts.mode, model.files, model.name) == (own.facts.mode, own.files, own.name)
    with pytest.raises(ValueError, match="holds no averaged"):
        open_model(mode="box-text-image", ema=True)
    assert "was not trained for box-text-image" in caplog.text


def test_a_vocabulary_that_is_cut_off_or_not_needed_is_said(tmp_path, base, caplog):
    text = dataclasses.replace(BASE.text_encoder, kind="bert", vocab_size=9, width=64)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "##～"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces), encoding="utf-8-sig")
    assert read_vocabulary(str(path), text).ids["##～"] == 8
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"vocab\.txt: not a WordPiece vocabulary, or cut off"):
        read_vocabulary(str(path), text)
    path.write_text("\n".join(pieces[:7]))
    with pytest.raises(ValueError, match=r"has 7 pieces, but the model's text encoder 9: is it fully downloaded\?"):
        read_vocabulary(str(path), text)
    with pytest.raises(FileNotFoundError, match="--vocab"):
        read_vocabulary(str(tmp_path / "none.txt"), text)
    open_model(base, vocab=path)
    assert "--vocab has no effect" in caplog.text
