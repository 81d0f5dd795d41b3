"""A base and what GLIGEN trained on it, joined; and what a model still lacks before it can be sampled from."""

from __future__ import annotations

import re
from dataclasses import replace

from gligen.config import ModelConfig
from gligen.modes import MODES
from gligen.weights.files import Tensors, Weights
from gligen.weights.infer import (
    FIRST_CONV,
    FIRST_WEIGHT,
    GROUNDING_PREFIXES,
    has_whole_unet,
    is_grounding_name,
    latent_channels,
)
from gligen.weights.kinds import wider_base
from gligen.weights.tensors import LazyTensor


def combine(base: Weights, adapter: Weights) -> Weights:
    """`base` with `adapter` grafted on.

    adapter: an adapter or pruned file, whose tensors join the base's UNet; a whole GLIGEN file, of which the base
        supplies only what it lacks; or CLIP, which gives its image encoder.
    The base's own first convolution is kept as the part `base_first_conv` (names `weight`, `bias`) for map modes, whose
    sampling ends on it. Raises ValueError, one line, for what does not fit together.
    """
    if adapter.kind == "clip":
        if "image_encoder" not in adapter.parts:
            raise ValueError(f"{adapter.path}: holds no CLIP image encoder")
        with_images = {**base.parts, "image_encoder": adapter.parts["image_encoder"]}
        config = replace(base.config, image_encoder=adapter.config.image_encoder)
        return replace(base, parts=with_images, config=config)
    if "unet" not in adapter.parts:
        raise ValueError(f"{adapter.path}: holds no UNet tensors to graft on {base.path}")
    if not adapter.modes:
        raise ValueError(f"{adapter.path}: holds no grounding: is it the base, and {base.path} the adapter?")
    if not has_whole_unet(base.parts.get("unet", {})):
        raise ValueError(f"{base.path}: holds no whole UNet to graft {adapter.path} on")
    if has_whole_unet(adapter.parts["unet"]):  # the base supplies other parts only
        unet, unet_config = dict(adapter.parts["unet"]), adapter.config.unet
    else:
        check_base(base)
        unet, grounding = _graft(base, adapter), adapter.config.unet.grounding
        latent = base.parts["unet"]["out.2.weight"].shape[0]
        unet_config = replace(base.config.unet, grounding=grounding, in_channels=latent)

    parts: dict[str, Tensors] = {**base.parts, **adapter.parts, "unet": unet}
    parts.pop("base_first_conv", None)
    grounding = unet_config.grounding
    if grounding is not None:
        if unet[FIRST_WEIGHT].shape[1] != unet_config.first_conv_channels:
            raise ValueError(
                f"{adapter.path}: mode {' or '.join(adapter.modes)} needs a first convolution of its own, which "
                f"neither it nor {base.path} holds: {_WHOLE}"
            )
        if grounding.spec.hint_widths and not _has_downsampler(unet):
            raise ValueError(f"{adapter.path}: holds no downsample_net, which mode {grounding.mode} needs: {_WHOLE}")
        if grounding.spec.is_map:
            parts |= _base_first_conv(base, adapter, unet, unet_config.in_channels)
    return Weights(
        path=f"{base.path} + {adapter.path}",
        kind="model",
        parts=parts,
        config=_combined_config(base, adapter, replace(base.config, unet=unet_config)),
        modes=adapter.modes,
        notes=(*base.notes, *adapter.notes),
        warnings=(*base.warnings, *adapter.warnings),
    )


_WHOLE = "give GLIGEN's whole checkpoint instead of the pruned one"


def _has_downsampler(unet: Tensors) -> bool:
    return any(name.startswith("downsample_net.") for name in unet)


def check_base(weights: Weights) -> None:
    """Raises ValueError, one line, for a base that is not a text-to-image model: one whose UNet reads more than a
    latent, though nothing that GLIGEN trained asks for more."""
    unet = weights.parts.get("unet", {})
    if has_whole_unet(unet) and not weights.modes:
        reads, latent = unet[FIRST_WEIGHT].shape[1], latent_channels(unet)
        if reads != latent:
            raise ValueError(f"{weights.path}: {wider_base(reads, latent)}")


def _combined_config(base: Weights, adapter: Weights, config: ModelConfig) -> ModelConfig:
    """Each part's config from the file that supplied it."""
    own = [part for part in ("vae", "text_encoder", "image_encoder") if part in adapter.parts]
    if adapter.kind in ("gligen", "adapter", "model"):  # files that know what they were trained as
        own += ["schedule", "image_size"]
    return replace(config, **{name: getattr(adapter.config, name) for name in own})


def _graft(base: Weights, adapter: Weights) -> dict[str, LazyTensor]:
    """The base's UNet with the adapter's tensors in it; the base's own grounding, if any, gives way."""
    old, new = base.parts["unet"], adapter.parts["unet"]
    groups = (*GROUNDING_PREFIXES, ".fuser.")
    replaced = [group for group in groups if any(group in name for name in new)]
    if "position_net." in replaced:
        replaced.append("downsample_net.")
    unet = {name: t for name, t in old.items() if not any(group in name for group in replaced)}
    misfit = _misfit(base, adapter)
    for name, tensor in new.items():
        if name in unet and tensor.shape != unet[name].shape and not name.startswith(FIRST_CONV):
            raise ValueError(f"{misfit}: {name} is {tensor.shape} in the one and {unet[name].shape} in the other")
        if not is_grounding_name(name) and name not in old:
            raise ValueError(f"{misfit}, which has no {name}")
        if name == FIRST_WEIGHT:
            _check_first_conv(misfit, tensor, old[name])
    _check_fusers(misfit, old, {**unet, **new})
    return {**unet, **new}


def _misfit(base: Weights, adapter: Weights) -> str:
    return f"{adapter.path} does not fit {base.path}"


def _check_first_conv(misfit: str, trained: LazyTensor, own: LazyTensor) -> None:
    """Raises ValueError, beginning with `misfit`, where the base's first convolution gives other channels."""
    if trained.shape[0] != own.shape[0]:
        raise ValueError(
            f"{misfit}: {FIRST_WEIGHT} gives {trained.shape[0]} channels in the one and {own.shape[0]} in the other"
        )


def _check_fusers(misfit: str, old: Tensors, unet: Tensors) -> None:
    """Every transformer has a fuser of its own width, and every fuser a transformer."""
    has = {n: t for n, t in unet.items() if n.endswith(".fuser.norm1.weight")}
    for name, tensor in has.items():
        own = old.get(name.replace(".fuser.", "."))
        if own is None:
            raise ValueError(f"{misfit}, which has no transformer at {name}")
        if own.shape != tensor.shape:
            width, around = tensor.shape[0], own.shape[0]
            raise ValueError(f"{misfit}: {name} is {width} wide, the transformer around it {around}")
    for name in old:
        match = re.fullmatch(r"(.+\.transformer_blocks\.0)\.norm1\.weight", name)
        if match and f"{match[1]}.fuser.norm1.weight" not in has:
            raise ValueError(f"{misfit}: it has no fuser for {match[1]}")


def _base_first_conv(base: Weights, adapter: Weights, unet: Tensors, latent: int) -> dict[str, Tensors]:
    for weights in (adapter, base):
        if "base_first_conv" in weights.parts:
            return {"base_first_conv": weights.parts["base_first_conv"]}
    conv = base.parts["unet"].get(FIRST_WEIGHT)
    if conv is None or conv.shape[1] != latent:
        return {}  # a base that was itself widened
    _check_first_conv(_misfit(base, adapter), unet[FIRST_WEIGHT], conv)
    return {"base_first_conv": {leaf: base.parts["unet"][f"{FIRST_CONV}{leaf}"] for leaf in ("weight", "bias")}}


# The parts that a base supplies, as messages call them.
PART_TITLES = {"vae": "autoencoder", "text_encoder": "text encoder"}


def where_to_get(part: str, weights: Weights, *, is_joined: bool = False) -> str:
    """Advice on a part ('vae' or 'text_encoder') that these weights do not hold.

    is_joined: they are a base's and an adapter's already, so that it is the base that lacks it.
    """
    if not has_whole_unet(weights.parts.get("unet", {})):
        return "give a base with --checkpoint and this with --adapter"
    width = weights.config.unet.context_dim
    if part == "vae":
        apart = "give one with --vae FILE"
    elif width == 1280:  # LDM's own, which nobody stores apart
        apart = "give LDM text2img-large's whole checkpoint"
    else:
        apart = (
            f"give {'CLIP ViT-L/14' if width == 768 else f'a CLIP whose text encoder is {width} wide'} with --clip FILE"
        )
    return f"{apart}, or a base with --checkpoint and this with --adapter" if weights.modes and not is_joined else apart


def missing_for_sampling(weights: Weights) -> tuple[str, ...]:
    """The parts that these weights lack for sampling, each with where to get it; empty if none."""
    parts, config, lacks = weights.parts, weights.config, []
    unet = parts.get("unet", {})
    is_whole = has_whole_unet(unet)
    try:
        check_base(weights)
    except ValueError as error:
        lacks.append(str(error).removeprefix(f"{weights.path}: "))
    if not is_whole:
        lacks.append("no base UNet: give Stable Diffusion with --checkpoint and this with --adapter")
    if not weights.modes:
        lacks.append("no grounding: give GLIGEN's weights with --adapter")
    elif len(weights.modes) > 1:
        lacks.append(f"no mode is given: give --mode {' or '.join(weights.modes)}")
    if weights.modes:
        mode = MODES[weights.modes[0]]
        if mode.extra_channels and FIRST_WEIGHT not in unet:
            lacks.append(f"no widened first convolution: {_WHOLE}")
        if mode.hint_widths and not _has_downsampler(unet):
            lacks.append(f"no map downsampler: {_WHOLE}")
        if mode.is_map and is_whole and "base_first_conv" not in parts:
            lacks.append("no first convolution of the base, on which sampling ends: give the base with --checkpoint")
        if mode.takes_images and "image_encoder" not in parts:
            lacks.append("no image encoder: for reference images give CLIP ViT-L/14 with --clip")
    if "image_encoder" in parts and "text_projection" not in parts["image_encoder"]:
        lacks.append("no text projection beside the image encoder: give CLIP with both towers")
    lacks += [f"no {PART_TITLES[part]}: {where_to_get(part, weights)}" for part in PART_TITLES if part not in parts]
    if is_whole and "text_encoder" in parts and config.text_encoder.width != config.unet.context_dim:
        lacks.append(f"a text encoder of width {config.unet.context_dim}, this one's is {config.text_encoder.width}")
    return tuple(lacks)
