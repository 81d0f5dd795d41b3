"""Which weights train and which stay: a frozen base with GLIGEN's new layers in it.

Every weight of the UNet is either listed as new, by purpose, or known from the base; anything else is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gligen.config import ModelConfig
from gligen.grounding import kind_of
from gligen.grounding.kind import TextEncoder
from gligen.loading import Parts, embedded_base, read_vocabulary, with_clip, with_new_layers
from gligen.modes import get_mode
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.modules.wordpiece import WordPiece
from gligen.runtime import to_channels_last
from gligen.training.presets import TrainConfig
from gligen.weights import LazyTensor, Weights, check_base, hold, load_part, read_weights, replace_vae, without_weights
from gligen.weights.infer import FIRST_CONV, has_whole_unet

log = logging.getLogger("gligen")

# what trains, by purpose: a name belongs to the first purpose whose pattern it holds
PURPOSES = {"fusers": ".fuser.", "position_net": "position_net.", "downsample_net": "downsample_net."}
GATES = ("alpha_attn", "alpha_dense")


@dataclass(frozen=True)
class Networks:
    """A frozen base with new layers; only what `trainable_parameters` lists requires gradients."""

    config: ModelConfig
    unet: UNetModel
    vae: AutoencoderKL
    text_encoder: TextEncoder
    image_encoder: CLIPImageEncoder | None = None

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from (("unet", self.unet), ("vae", self.vae), ("text_encoder", self.text_encoder))
        if self.image_encoder is not None:
            yield "image_encoder", self.image_encoder


def purpose_of(name: str, mode: str) -> str | None:
    """The purpose for which a UNet weight trains in this mode; None where it stays as the base has it."""
    for purpose, pattern in PURPOSES.items():
        if pattern in name:
            return purpose
    return "first_conv" if get_mode(mode).extra_channels and name.startswith(FIRST_CONV) else None


def trainable_parameters(networks: Networks) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    grounding = networks.config.unet.grounding
    assert grounding is not None  # build_networks adds it
    return {name: p for name, p in networks.unet.named_parameters() if purpose_of(name, grounding.mode)}


def frozen_checksum(networks: Networks) -> str:
    """SHA-256 over every weight and buffer that must not change, of all networks."""
    trained = trainable_parameters(networks)
    digest = hashlib.sha256()
    for part, module in networks.modules():
        for name, tensor in module.state_dict().items():
            if part != "unet" or name not in trained:
                digest.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def store_frozen(networks: Networks, dtype: torch.dtype) -> None:
    """Keeps what does not train in this precision, so that nothing has to be rounded at every product."""
    trained = {id(parameter) for parameter in trainable_parameters(networks).values()}
    for _, module in networks.modules():
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in trained and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def open_base(config: TrainConfig) -> tuple[ModelConfig, Parts]:
    """Config and weights, still in their file, of the frozen model.

    Raises FileNotFoundError, or ValueError in one line for a file that is no base for this mode.
    """
    weights = read_weights(config.base or embedded_base())
    unet = weights.parts.get("unet", {})
    if weights.modes and has_whole_unet(unet):
        raise ValueError(
            f"--base '{config.base}' is grounded already ({' or '.join(weights.modes)}): give the model it was taught "
            "to, and what was learnt with --adapter"
        )
    for line in (*weights.warnings, *weights.unused):
        log.warning("'%s': %s", weights.path, line)
    check_base(weights)
    parts, found = dict(weights.parts), weights.config
    takes_images = get_mode(config.mode).takes_images
    if has_whole_unet(unet):  # else nothing can be put beside it
        if config.vae is not None:
            parts["vae"], found = replace_vae(found, config.vae)
        if config.clip is not None and ("text_encoder" not in parts or takes_images):
            parts, found = with_clip(parts, found, config.clip)
        elif config.clip is not None:
            log.warning("the base has a text encoder, and mode %s reads no images: --clip has no effect", config.mode)
    lacks = {
        "whole UNet": not has_whole_unet(unet),
        "autoencoder": "vae" not in parts,
        "text encoder": "text_encoder" not in parts,
    }
    if any(lacks.values()):
        missing = [name for name, is_missing in lacks.items() if is_missing]
        apart = "" if lacks["whole UNet"] else ", or what it lacks with --vae and --clip"
        raise ValueError(
            f"--base '{config.base}' holds no {' and no '.join(missing)} (it is {_kind(weights)}): "
            f"give a whole Stable Diffusion checkpoint{apart}"
        )
    _check_text_encoder(found, config)
    if takes_images and "image_encoder" not in parts:
        raise ValueError(f"mode {config.mode} needs CLIP's image encoder, which the base lacks: give it with --clip")
    if "image_encoder" not in parts:
        found = dataclasses.replace(found, image_encoder=None)
    elif found.image_encoder is not None and found.image_encoder.text_width != found.text_encoder.width:
        raise ValueError(
            f"the image encoder makes features of width {found.image_encoder.text_width}, the text encoder of "
            f"{found.text_encoder.width}: give the CLIP that the base was trained with"
        )
    return found, parts


def _check_text_encoder(model: ModelConfig, config: TrainConfig) -> None:
    """Raises ValueError where captions cannot be read."""
    if model.text_encoder.kind == "bert" and get_mode(config.mode).takes_images:
        raise ValueError(f"mode {config.mode} needs CLIP, and --base '{config.base}' has LDM's own text encoder")
    read_vocabulary(config.vocab, model.text_encoder)
    if model.text_encoder.width != model.unet.context_dim:
        raise ValueError(
            f"--base '{config.base}': its text encoder is {model.text_encoder.width} wide, but its UNet reads "
            f"{model.unet.context_dim}"
        )


def build_networks(config: TrainConfig, device: torch.device) -> Networks:
    """The frozen base on `device` in float32, with new layers in it whose gates are shut.

    New weights depend on config.seed alone. Raises as `open_base`, and ValueError for an adapter that does not fit.
    """
    base, parts = open_base(config)
    spec = get_mode(config.mode)
    feature_dim = base.text_encoder.width
    grounding = config.grounding_config(token_dim=base.unet.context_dim, feature_dim=feature_dim)
    model, state = with_new_layers(base, parts["unet"], grounding, config.seed)
    if not spec.takes_images:
        model = dataclasses.replace(model, image_encoder=None)
    with without_weights():
        unet, vae = UNetModel(model.unet), AutoencoderKL(model.vae)
        is_bert = model.text_encoder.kind == "bert"
        text_encoder = (BERTTextEncoder if is_bert else CLIPTextEncoder)(model.text_encoder)
        image_encoder = CLIPImageEncoder(model.image_encoder) if model.image_encoder else None
    if isinstance(text_encoder, BERTTextEncoder) and config.vocab is not None:
        text_encoder.vocabulary = WordPiece(config.vocab)
    networks = Networks(model, unet, vae, text_encoder, image_encoder)
    name = config.base or "embedded base"
    for part, module in reversed(list(networks.modules())):  # the text encoder before the UNet
        if part == "unet" and config.adapter is not None:
            state |= _learnt(config.adapter, state, config.mode, text_encoder)
        tensors = state if part == "unet" else parts[part]
        load_part(module, tensors, device=device, dtype=torch.float32, what=f"{name}: {part}")
        module.eval().requires_grad_(False)
        to_channels_last(module)
    if spec.is_map:
        conv = {leaf: parts["unet"][f"{FIRST_CONV}{leaf}"].read(device, torch.float32) for leaf in ("weight", "bias")}
        unet.set_base_conv(conv["weight"], conv["bias"])
    for parameter in trainable_parameters(networks).values():
        parameter.requires_grad_(True)
    return networks


def _learnt(path: str, state: Mapping[str, LazyTensor], mode: str, text_encoder: TextEncoder) -> dict[str, LazyTensor]:
    """An adapter's tensors for this model: all that is trained, or of another mode what the two share.

    The fusers are shared by all modes, and a phrase's tokenizer starts that of phrases and images, and of keypoints.
    The first convolution may be missing (a plain mode's adapter, taken up by inpainting) and is then the base's.
    """
    spec, weights = get_mode(mode), read_weights(path)
    if not weights.modes:
        raise ValueError(f"--adapter '{path}' is {_kind(weights)}: it holds nothing that was taught to a base")
    learnt = [get_mode(name) for name in weights.modes]
    is_same = any(row.kind == spec.kind and (not spec.is_map or row.name == mode) for row in learnt)
    tensors = weights.parts.get("unet", {})
    sources = {name: name for name in state if purpose_of(name, mode)}
    if not any(row.name == mode for row in learnt):  # its first convolution reads other channels
        sources = {name: source for name, source in sources.items() if not name.startswith(FIRST_CONV)}
    if not is_same:
        sources = {name: source for name, source in sources.items() if PURPOSES["fusers"] in name}
    if not is_same and learnt[0].kind == "box-text":
        try:
            begun = kind_of(spec).start_from_boxes(tensors, state, text_encoder)
        except KeyError as error:
            raise ValueError(f"--adapter '{path}' does not fit this model: it has no {error}") from None
        tensors, sources = dict(tensors) | hold(begun), sources | {name: name for name in begun}
    for name, source in sources.items():
        if source not in tensors:
            raise ValueError(f"--adapter '{path}' does not fit this model: it has no {source}")
        if tensors[source].shape != state[name].shape:
            width, *reads = tensors[source].shape
            is_narrow = source == "position_net.linears.0.weight" and reads == list(state[name].shape[1:])
            mend = f": give --hidden-dim {width}" if is_narrow else ""
            raise ValueError(
                f"--adapter '{path}' does not fit this model: {source} is {tensors[source].shape} in it, "
                f"{state[name].shape} here{mend}"
            )
    return {name: tensors[source] for name, source in sources.items()}


def _kind(weights: Weights) -> str:
    if weights.kind == "clip":
        return "CLIP alone"
    grounded = f" of mode {' or '.join(weights.modes)}" if weights.modes else ""
    return f"of kind '{weights.kind}'{grounded}"
