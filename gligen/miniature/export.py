"""The three stages as one file in Stable Diffusion's layout, with the config beside it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from gligen.config import to_dict
from gligen.miniature.loop import load_trained, write_atomically
from gligen.miniature.unet import model_config
from gligen.weights import Weights, hold, write_weights

MAX_BYTES = 16 * 2**20


def export(out: Path, file: Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Writes FILE.safetensors (float16) and FILE.json, and returns the former.

    Raises ValueError, one line, if there is such a file, if it would be larger than max_bytes, or if the UNet was
    trained on other encoders than those in `out`; FileNotFoundError if a stage was not trained.
    """
    file = file.with_suffix(".safetensors")
    beside = file.with_suffix(".json")
    for path in (file, beside):
        if path.exists():
            raise ValueError(f"{path}: exists already; choose another name")
    clip, vae, unet = (load_trained(out, name) for name in ("clip", "vae", "unet"))
    for name, trained in (("clip", clip), ("vae", vae)):
        if unet.facts[name] != trained.fingerprint:
            raise ValueError(f"the UNet in {out} was trained with another {name}: train it again with --no-resume")
    config = model_config(unet.config, clip, vae)
    parts = {
        "unet": unet.networks["unet"],
        "vae": vae.networks["vae"],
        "text_encoder": clip.networks["text_encoder"],
        "image_encoder": clip.networks["image_encoder"],
    }
    weights = Weights(path=str(out), kind="sd", parts={name: hold(part) for name, part in parts.items()}, config=config)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}.") as folder:
        made = Path(folder) / file.name
        write_weights(weights, made, "sd", dtype=torch.float16)
        if (size := made.stat().st_size) > max_bytes:
            raise ValueError(f"{file.name} would be {size} bytes, more than {max_bytes}: choose smaller networks")
        write_atomically(beside, (json.dumps(to_dict(config), indent=2) + "\n").encode())
        os.replace(made, file)
    return file
