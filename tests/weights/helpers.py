"""Small model files of every published layout, made from the golden manifests, and files that mean harm."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.conftest import filled, manifest
from tests.golden.fill import fill

REPOSITORY = Path(__file__).parents[2]
VOCAB = 96  # instead of CLIP's 49408: the same names, files of a megabyte


def genuine(name: str) -> Path | None:
    """A file of the golden folder that is too large for the repository; None where it is not at hand."""
    roots = [os.environ.get("GLIGEN_GOLDEN"), REPOSITORY.parent / "shared/golden"]
    found = [path for root in roots if root and (path := Path(root) / "cases" / name).is_file()]
    return found[0] if found else None


@cache
def _text_encoder() -> dict[str, torch.Tensor]:
    shapes = manifest("small_text_encoder")
    shapes["transformer.text_model.embeddings.token_embedding.weight"] = (VOCAB, 64)
    return {name: torch.tensor(fill(name, shape)) for name, shape in shapes.items()}


@cache
def _unet(name: str) -> dict[str, torch.Tensor]:
    """A UNet of a small manifest; of a map trunk's stages only the first block, narrowed to a few channels."""
    tensors = {}
    for key, shape in manifest(name).items():
        if (match := re.search(r"stages\.\d+\.(\d+)\.", key)) and match[1] != "0":
            continue
        tensors[key] = torch.tensor(fill(key, shape)).half() if "convnext" in key else torch.tensor(fill(key, shape))
    return tensors


def gligen_parts(name: str = "small_gligen_text") -> dict[str, dict[str, torch.Tensor]]:
    """`model`, `autoencoder` and `text_encoder` as GLIGEN's checkpoints have them."""
    return {
        "model": dict(_unet(name)),
        "autoencoder": filled("small_autoencoder"),
        "text_encoder": dict(_text_encoder()),
    }


def sd_state(grounding: str | None = None) -> dict[str, torch.Tensor]:
    """A Stable Diffusion `state_dict`, without schedule buffers; `grounding`: with that manifest's UNet instead."""
    unet = "small_gligen_text" if grounding is None else grounding
    parts = gligen_parts(unet)
    state = {
        f"model.diffusion_model.{name}": t
        for name, t in parts["model"].items()
        if grounding is not None or not (".fuser." in name or name.startswith("position_net."))
    }
    state |= {f"first_stage_model.{name}": t for name, t in parts["autoencoder"].items()}
    return state | {f"cond_stage_model.{name}": t for name, t in parts["text_encoder"].items()}


def ldm_state() -> dict[str, torch.Tensor]:
    """LDM text2img-large in small: 2 of its BERT-like layers, context 48."""
    shapes = {
        "token_emb.weight": (VOCAB, 48),
        "pos_emb.emb.weight": (77, 48),
        "norm.weight": (48,),
        "norm.bias": (48,),
        "to_logits.weight": (VOCAB, 48),
        "to_logits.bias": (VOCAB,),
    }
    for layer in range(4):
        prefix = f"attn_layers.layers.{layer}"
        shapes |= {f"{prefix}.0.weight": (48,), f"{prefix}.0.bias": (48,)}
        if layer % 2:
            shapes |= {f"{prefix}.1.net.0.0.weight": (192, 48), f"{prefix}.1.net.0.0.bias": (192,)}
            shapes |= {f"{prefix}.1.net.2.weight": (48, 192), f"{prefix}.1.net.2.bias": (48,)}
        else:
            shapes |= {f"{prefix}.1.{word}.weight": (128, 48) for word in ("to_q", "to_k", "to_v")}
            shapes |= {f"{prefix}.1.to_out.weight": (48, 128), f"{prefix}.1.to_out.bias": (48,)}
    state = {name: t for name, t in sd_state().items() if not name.startswith("cond_stage_model.")}
    text = {name: torch.tensor(fill(name, shape)) for name, shape in shapes.items()}
    return state | {f"cond_stage_model.transformer.{name}": t for name, t in text.items()}


def pruned_state(name: str = "small_gligen_text") -> dict[str, torch.Tensor]:
    return {key: t for key, t in _unet(name).items() if ".fuser." in key or key.startswith("position_net.")}


ORIGINAL_CONFIG = {
    "model": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 16,
            "num_heads": 4,
            "channel_mult": [1, 2],
            "fuser_type": "gatedSA",
            "grounding_tokenizer": {
                "target": "ldm.modules.diffusionmodules.text_grounding_net.PositionNet",
                "params": {"in_dim": 48, "out_dim": 48},
            },
        },
    },
    "autoencoder": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"scale_factor": 0.25}},
    "diffusion": {"params": {"linear_start": 0.001, "linear_end": 0.02, "timesteps": 500}},
    "train_dataset_names": {"A": {"max_boxes_per_data": 12}},
}


@contextmanager
def fake_modules() -> Iterator[dict[str, type]]:
    """Classes named like OmegaConf's and Lightning's, importable only while a file is being pickled."""
    homes = {
        "DictConfig": "omegaconf.dictconfig",
        "ListConfig": "omegaconf.listconfig",
        "AnyNode": "omegaconf.nodes",
        "ContainerMetadata": "omegaconf.base",
        "ModelCheckpoint": "pytorch_lightning.callbacks.model_checkpoint",
    }
    classes = {name: type(name, (), {"__module__": home}) for name, home in homes.items()}
    before = {name: sys.modules.get(name) for name in _with_parents(homes.values())}
    try:
        for name in before:
            sys.modules[name] = types.ModuleType(name)
        for name, cls in classes.items():
            setattr(sys.modules[homes[name]], name, cls)
        yield classes
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _with_parents(names: Any) -> set[str]:
    return {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)}


def as_omegaconf(data: Any, classes: dict[str, type]) -> Any:
    """Plain data in OmegaConf's own shape: nodes with `_metadata`, `_parent` and `_content` or `_val`."""
    kind = {dict: "DictConfig", list: "ListConfig"}.get(type(data), "AnyNode")
    node = classes[kind]()
    node._metadata = classes["ContainerMetadata"]()
    node._metadata.ref_type = Any
    node._parent = None
    if isinstance(data, dict):
        node._content = {key: as_omegaconf(value, classes) for key, value in data.items()}
        for child in node._content.values():
            child._parent = node
    elif isinstance(data, list):
        node._content = [as_omegaconf(value, classes) for value in data]
    else:
        node._val = data
    return node


def write_gligen(path: Path, name: str = "small_gligen_text", config: dict | None = None, **extra: Any) -> Path:
    """The original trainer's checkpoint with OmegaConf objects in it."""
    with fake_modules() as classes:
        stated = vars(as_omegaconf(ORIGINAL_CONFIG if config is None else config, classes))
        torch.save({**gligen_parts(name), "diffusion": {}, "config_dict": stated, "iters": 7, "opt": {}, **extra}, path)
    return path


def write_sd(path: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A Lightning checkpoint whose callbacks are keyed by a class that is not installed."""
    with fake_modules() as classes:
        value = {
            "state_dict": sd_state() if state is None else state,
            "callbacks": {classes["ModelCheckpoint"]: {"k": 1}},
        }
        torch.save(value, path)
    return path
