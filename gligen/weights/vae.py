"""An autoencoder by itself, as people exchange them: LDM's names or diffusers', a file or a folder."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from gligen.config import ModelConfig
from gligen.weights.files import VAE_PREFIXES, mappings, named_tensors, read_tensors, read_weights, vae_part
from gligen.weights.folders import check_no_shard, choose_weights, read_json
from gligen.weights.hub import elsewhere, local
from gligen.weights.infer import infer_vae
from gligen.weights.kinds import VAE_ALONE, foreign
from gligen.weights.names_diffusers import vae_to_ldm
from gligen.weights.tensors import LazyTensor

log = logging.getLogger("gligen")

_PREFIXES = ("", "first_stage_model.", "autoencoder.", "vae.")  # of a whole checkpoint, and of a trainer's attribute


def replace_vae(config: ModelConfig, path: str | Path) -> tuple[dict[str, LazyTensor], ModelConfig]:
    """The autoencoder of `path` in place of a model's own: its tensors, and the config with it.

    path: an autoencoder's file (LDM's names or diffusers'), its diffusers folder, or a whole model, whose autoencoder
        is taken. Files by themselves do not say how latents are scaled: the model's own factor stays.
    Raises FileNotFoundError, or ValueError in one line for what is none, or of other latents than the model's.
    """
    given, path = path, Path(local(path)).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--vae '{given}': there is no such file or folder{elsewhere(given)}")
    tensors, scale = _read(path)
    try:
        vae = infer_vae(tensors)
    except (KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(f"--vae '{path}' is no whole autoencoder ({error})") from error
    if vae.latent_channels != config.unet.out_channels:
        raise ValueError(
            f"--vae '{path}' makes latents of {vae.latent_channels} channels, but the model's have "
            f"{config.unet.out_channels}: it belongs to another kind of model"
        )
    if vae.downsample_factor != config.vae.downsample_factor:
        raise ValueError(
            f"--vae '{path}' makes latents of 1/{vae.downsample_factor} of the size, the model's are of "
            f"1/{config.vae.downsample_factor}"
        )
    own = config.vae.scale_factor
    if scale is not None and abs(scale / own - 1) > 1e-3:
        raise ValueError(
            f"--vae '{path}' scales its latents by {scale}, the model's are scaled by {own}: it belongs to another "
            "kind of model (0.13025 is Stable Diffusion XL's)"
        )
    return tensors, dataclasses.replace(config, vae=dataclasses.replace(vae, scale_factor=own))


def _read(path: Path) -> tuple[dict[str, LazyTensor], float | None]:
    """The tensors under our names, and how they are scaled where that is said."""
    scale = None
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        stated = read_json(folder / "config.json")
        scale = stated.get("scaling_factor")
        if stated.get("shift_factor") or stated.get("latents_mean"):
            raise ValueError(f"--vae '{path}' shifts its latents: it belongs to another kind of model")
        files, _ = choose_weights(folder)
    else:
        check_no_shard(path)
        files = [path]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        value, metadata, _ = read_tensors(file)
        if metadata.get("format") == "gligen":
            weights = read_weights(file)
            if "vae" not in weights.parts:
                raise ValueError(
                    f"--vae '{path}' holds no autoencoder: it holds {', '.join(weights.parts) or 'nothing'}"
                )
            return dict(weights.parts["vae"]), weights.config.vae.scale_factor
        tensors |= _autoencoder(value)
    kind = foreign(tensors)
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        tensors = vae_to_ldm(tensors)
    missing = next((n for n in ("encoder.conv_in.weight", "post_quant_conv.weight") if n not in tensors), None)
    if missing or kind not in (None, VAE_ALONE):
        it = f"it is {kind}" if kind not in (None, VAE_ALONE) else f"it has no {missing}"
        raise ValueError(f"--vae '{path}' holds no autoencoder of Stable Diffusion's kind: {it}")
    part, notes = vae_part(tensors)
    for note in notes:
        log.log(logging.WARNING if note.startswith("ignored") else logging.DEBUG, "--vae '%s': %s", path, note)
    return part, scale


def _autoencoder(value: Any) -> dict[str, LazyTensor]:
    """The tensors of the nearest state dict with an autoencoder in it, under that one's own names; else all."""
    found: dict[str, LazyTensor] = {}
    for _, mapping in mappings(value):
        tensors = named_tensors(mapping)
        for prefix in _PREFIXES:
            inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if any(name.startswith(VAE_PREFIXES) for name in inner):
                return inner
        found = found or tensors
    return found
