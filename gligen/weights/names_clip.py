"""CLIP's names: Hugging Face's on the one side, open_clip's (ours) on the other.

The two differ in three ways: words, q/k/v apart or stacked, and linear projections transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gligen.weights.tensors import LazyTensor, concat, rows, transpose

Tensors = dict[str, LazyTensor]

# Within one layer: HF word -> open_clip word.
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_VISION = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",  # the spelling is Hugging Face's
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_QKV = ("q", "k", "v")
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def text_from_hf(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """HF's CLIPTextModel, names after `text_model.`, as our `text_encoder` part."""
    return _tower_from_hf(tensors, _TEXT)


def text_to_hf(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """The inverse of `text_from_hf`."""
    return _tower_to_hf(tensors, _TEXT)


def image_from_hf(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """HF's CLIP image tower and projections (`vision_model.…`, `visual_projection.weight`,
    `text_projection.weight`) as our `image_encoder` part."""
    tower = {name.removeprefix("vision_model."): t for name, t in tensors.items() if name.startswith("vision_model.")}
    part = {f"visual.{name}": t for name, t in _tower_from_hf(tower, _VISION).items()}
    if "visual_projection.weight" in tensors:
        part["visual.proj"] = transpose(tensors["visual_projection.weight"])
    if "text_projection.weight" in tensors:
        part["text_projection"] = transpose(tensors["text_projection.weight"])
    return part


def image_to_hf(tensors: Mapping[str, LazyTensor]) -> Tensors:
    """The inverse of `image_from_hf`."""
    tower = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    projection = tower.pop("proj", None)
    part = {f"vision_model.{name}": t for name, t in _tower_to_hf(tower, _VISION).items()}
    if projection is not None:
        part["visual_projection.weight"] = transpose(projection)
    if "text_projection" in tensors:
        part["text_projection.weight"] = transpose(tensors["text_projection"])
    return part


def split_open_clip(tensors: Mapping[str, LazyTensor]) -> tuple[Tensors, Tensors]:
    """A whole open_clip (or OpenAI) CLIP as our (`text_encoder`, `image_encoder`) parts.

    Newer open_clip models keep the text tower under `text.`.
    """
    text: Tensors = {}
    image: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text.")
        if name == "text_projection" or name.startswith("visual."):
            image[name] = tensor
        elif name.startswith(("token_embedding.", "positional_embedding", "transformer.", "ln_final.")):
            text[name] = tensor
    return text, image


def _tower_from_hf(tensors: Mapping[str, LazyTensor], table: Mapping[str, str]) -> Tensors:
    part: Tensors = {}
    stacks: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue  # a buffer that counts 0, 1, 2, …
        match = _HF_LAYER.fullmatch(name)
        layer, word, kind = match.groups() if match else ("", "", "")
        prefix = f"transformer.resblocks.{layer}."
        if word in _LAYER:
            part[f"{prefix}{_LAYER[word]}.{kind}"] = tensor
        elif word in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            stacks.setdefault((prefix, kind), {})[word[10]] = tensor
        else:
            part[table.get(name, name)] = tensor  # an unknown one under its own name, so that strict loading reports it
    for (prefix, kind), stack in stacks.items():
        if set(stack) == set(_QKV):
            part[f"{prefix}attn.in_proj_{kind}"] = concat([stack[letter] for letter in _QKV])
        else:  # an incomplete file: again for strict loading to report
            part |= {f"{prefix}attn.{letter}_proj.{kind}": t for letter, t in stack.items()}
    return part


def _tower_to_hf(tensors: Mapping[str, LazyTensor], table: Mapping[str, str]) -> Tensors:
    back = {ours: hf for hf, ours in table.items()}
    layer_back = {ours: hf for hf, ours in _LAYER.items()}
    part: Tensors = {}
    for name, tensor in tensors.items():
        match = _OUR_LAYER.fullmatch(name)
        if not match:
            part[back.get(name, name)] = tensor
            continue
        layer, word, kind = match.groups()
        prefix = f"encoder.layers.{layer}."
        if word == "attn.in_proj":
            width = tensor.shape[0] // 3
            for i, letter in enumerate(_QKV):
                part[f"{prefix}self_attn.{letter}_proj.{kind}"] = rows(tensor, i * width, (i + 1) * width)
        else:
            part[f"{prefix}{layer_back.get(word, word)}.{kind}"] = tensor
    return part
