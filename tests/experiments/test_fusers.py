"""Kinds of fuser that are experiments alone, against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.fusers import KINDS, main
from gligen.loading import EMBEDDED
from gligen.modules.fusers import FUSERS, GatedSelfAttention


@pytest.mark.parametrize(("kind", "heads", "weight"), [("one-head", 1, 1), ("8-heads", 8, 1), ("repeated", 2, 8)])
def test_a_kind_is_gated_self_attention_with_one_thing_changed(kind: str, heads: int, weight: int) -> None:
    torch.manual_seed(0)
    fuser = KINDS[kind](16, 12, 2).double()
    assert isinstance(fuser, GatedSelfAttention)
    visual, tokens = torch.randn(2, 9, 16).double(), torch.randn(2, 3, 12).double()

    both = fuser.norm1(torch.cat([visual, fuser.linear(tokens)], dim=1))
    bias = torch.cat([torch.zeros(9), torch.full((3,), math.log(weight))]).double()
    size = 16 // heads
    outs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (layer(both)[..., part] for layer in (fuser.attn.to_q, fuser.attn.to_k, fuser.attn.to_v))
        outs.append((q[:, :9] @ k.mT / math.sqrt(size) + bias).softmax(-1) @ v)
    expected = fuser.attn.to_out(torch.cat(outs, dim=-1))

    torch.testing.assert_close(fuser.attend(visual, fuser.project(tokens)), expected)


@pytest.mark.parametrize("tokenizer", ["scenes-box-text", "scenes-early-box-text"])
def test_training_begins_with_new_layers_behind_a_taught_tokenizer(tmp_path, monkeypatch, tokenizer) -> None:
    from gligen.weights import read_weights

    monkeypatch.setitem(FUSERS, "gatedCA", FUSERS["gatedCA"])
    begun = {}
    monkeypatch.setattr("experiments.fusers.train.main", lambda flags: begun.update(flags=flags))
    file = EMBEDDED / f"{tokenizer}.safetensors"
    given = [] if tokenizer == "scenes-box-text" else ["--tokenizer", str(file)]
    main([*given, "gatedCA", "train", "scenes-first", "--out", str(tmp_path / "runs" / "a"), "--seed", "3"])

    assert begun["flags"][-4:-1] == ["--fuser-type", "gatedCA", "--adapter"]
    tensors = read_weights(begun["flags"][-1]).parts["unet"]
    taught = read_weights(file).parts["unet"]
    cpu = torch.device("cpu")
    for name, tensor in tensors.items():
        if name.startswith("position_net."):
            assert torch.equal(tensor.read(cpu, torch.float32), taught[name].read(cpu, torch.float32))
        if name.endswith("alpha_attn"):
            assert tensor.read(cpu, torch.float32) == 0


def test_an_adapter_of_the_users_own_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(FUSERS, "gatedSA", FUSERS["gatedSA"])
    with pytest.raises(ValueError, match="leave out --adapter"):
        main(["gatedSA", "train", "scenes-first", "--out", str(tmp_path / "run"), "--adapter", "mine.safetensors"])


@pytest.mark.parametrize(
    ("command", "tokenizer", "message"),
    [
        (["train", "scenes-first", "--out", "run"], "scenes-keypoint", "give an adapter for boxes"),
        (["evaluate", "scenes"], "scenes-box-text", "leave it out of evaluate"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path, monkeypatch, command, tokenizer, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FUSERS, "gatedSA", FUSERS["gatedSA"])
    with pytest.raises(ValueError, match=message):
        main(["--tokenizer", str(EMBEDDED / f"{tokenizer}.safetensors"), "gatedSA", *command])
