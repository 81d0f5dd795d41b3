"""The three stages as one file in Stable Diffusion's layout, with the config beside it; and such a file as stages."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from gligen.config import ModelConfig, to_dict
from gligen.files import write_atomically
from gligen.miniature.clip import MAX_LOGIT_SCALE
from gligen.miniature.config import CLIPStage, UNetStage, VAEStage
from gligen.miniature.stage import load_trained, save_begun
from gligen.miniature.unet import model_config
from gligen.training.engine.checkpoint import CHECKPOINT
from gligen.weights import Weights, hold, read_weights, write_weights

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
    config = model_config(unet.config, clip.config, vae.config, vae.measured["scale_factor"])
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


def unpack(file: Path, out: Path) -> list[Path]:
    """Writes the stages of an exported file, as checkpoints, into `out`, so that training can go on from it.

    CLIP and the autoencoder count as trained to their end; the UNet begins a new run with the file's weights, under
    whatever --steps and learning rate it is given. What the optimiser knew is not in the file.
    Raises ValueError, one line, for a file that `export` did not write, or where there is a state already.
    """
    weights = read_weights(file)
    config = weights.config
    clip, vae, unet = _stages(config)
    held = {
        name: {key: tensor.read(dtype=torch.float32) for key, tensor in part.items()}
        for name, part in weights.parts.items()
    }
    names = ("clip", "vae", "unet")
    if there := next((out / name for name in names if (out / name / CHECKPOINT).exists()), None):
        raise ValueError(f"{there} exists already; choose another --out")
    try:
        same = model_config(unet, clip, vae, config.vae.scale_factor) == config
    except ValueError:
        same = False
    if not same or set(held) < {"unet", "vae", "text_encoder", "image_encoder"}:
        raise ValueError(f"{file} is no base that `python -m gligen.miniature export` has written")
    temperature = {"log_scale": torch.tensor(math.log(MAX_LOGIT_SCALE))}
    towers = {"text_encoder": held["text_encoder"], "image_encoder": held["image_encoder"], "temperature": temperature}
    fixed = ("image_encoder.text_projection",)
    paths = [save_begun(out, "clip", clip, towers, is_done=True, fixed=fixed)]
    measured = {"scale_factor": config.vae.scale_factor}
    paths.append(save_begun(out, "vae", vae, {"vae": held["vae"]}, is_done=True, measured=measured))
    facts = {name: load_trained(out, name).fingerprint for name in ("clip", "vae")}
    paths.append(save_begun(out, "unet", unet, {"unet": held["unet"]}, is_done=False, facts=facts))
    return paths


def _stages(config: ModelConfig) -> tuple[CLIPStage, VAEStage, UNetStage]:
    """The recipes whose networks have these sizes; all else in them is as by default."""
    text, image, unet, vae = config.text_encoder, config.image_encoder, config.unet, config.vae
    picture: dict[str, Any] = {}
    if image is not None:
        picture = {"image_width": image.width, "image_layers": image.layers, "patch_size": image.patch_size}
    clip = CLIPStage(
        text_width=text.width,
        text_layers=text.layers,
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        head_dim=text.width // text.heads,
        **picture,
    )
    return (
        clip,
        VAEStage(
            base_channels=vae.base_channels,
            channel_mult=vae.channel_mult,
            norm_groups=vae.norm_groups,
            num_res_blocks=vae.num_res_blocks,
            latent_channels=vae.latent_channels,
        ),
        UNetStage(
            model_channels=unet.model_channels,
            channel_mult=unet.channel_mult,
            norm_groups=unet.norm_groups,
            num_res_blocks=unet.num_res_blocks,
            attention_downsamples=unet.attention_downsamples,
            num_heads=unet.num_heads,
        ),
    )
