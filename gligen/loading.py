"""From files to a pipeline: what a checkpoint holds is read from its header; weights are read only when it is built."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gligen.config import GroundingConfig, ModelConfig, TextEncoderConfig
from gligen.device import check_memory, memory_errors, own_defaults, pick_device, pick_dtype
from gligen.fields import read_path, read_text, read_truth
from gligen.files import shipped
from gligen.job import ModelFacts
from gligen.modes import get_mode
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.modules.wordpiece import WordPiece
from gligen.pipeline import Pipeline
from gligen.request import Request, serving_modes
from gligen.weights import (
    LazyTensor,
    Weights,
    add_loras,
    check_base,
    combine,
    hold,
    is_grounding_name,
    load_part,
    read_weights,
    replace_vae,
    where_to_get,
    without_weights,
)
from gligen.weights.graft import PART_TITLES
from gligen.weights.infer import FIRST_CONV, FIRST_WEIGHT, has_whole_unet
from gligen.weights.lora import Loras

log = logging.getLogger("gligen")

Parts = Mapping[str, Mapping[str, LazyTensor]]
FilePath = str | os.PathLike[str]

EMBEDDED = shipped("checkpoints/scenes-base.safetensors").parent  # the miniature: a base, adapters for some modes


@dataclass(frozen=True)
class OpenModel:
    """A model whose files were recognised and found to fit together, before any weight is read.

    name: what messages call it. files: what it was opened from, by role. from_clip: the parts that CLIP's file gave.
    """

    config: ModelConfig
    parts: Parts
    name: str
    vocabulary: WordPiece | None = None
    files: Mapping[str, str | Path] = field(default_factory=dict)
    from_clip: tuple[str, ...] = ()

    @property
    def facts(self) -> ModelFacts:
        """The facts about the model that decide which requests it can serve."""
        return ModelFacts(
            config=self.config,
            has_image_encoder="image_encoder" in self.parts,
            has_base_conv="base_first_conv" in self.parts,
        )


def load(
    checkpoint: FilePath | None = None,
    adapter: FilePath | None = None,
    *,
    mode: str | None = None,
    clip: FilePath | None = None,
    vocab: FilePath | None = None,
    ema: bool = False,
    vae: FilePath | None = None,
    loras: Loras = (),
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> Pipeline:
    """The pipeline of a checkpoint: a GLIGEN file, or a Stable Diffusion base with a GLIGEN adapter.

    checkpoint: any layout of gligen/weights (recognised by content, not by name). None is the embedded miniature,
        which knows drawn scenes (checkpoints/README.md).
    adapter: what GLIGEN's training added, or a whole GLIGEN file, of which the base supplies what it lacks. One: a
        model is grounded in one mode.
    mode: what the model is grounded in, for files whose tensors cannot tell (canny and depth are alike).
    clip: CLIP ViT-L/14: its image tower is needed for reference images, its text tower where the checkpoint lacks one.
    vocab: WordPiece vocabulary, needed for LDM text2img-large only.
    ema: use averaged weights, where a file has both.
    vae: another autoencoder of the same latents, in place of the checkpoint's or where it holds none.
    loras: one or more of 'FILE', 'FILE:weight' or (path, weight): low-rank changes of the base's layers, which add up.
    Raises ValueError, FileNotFoundError or MemoryError, one line, for what is wrong with arguments or files.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    return build_pipeline(
        open_model(checkpoint, adapter, mode=mode, clip=clip, vocab=vocab, ema=ema, vae=vae, loras=loras),
        device=device,
        dtype=dtype,
    )


@own_defaults()
def open_model(
    checkpoint: FilePath | None = None,
    adapter: FilePath | None = None,
    *,
    mode: str | None = None,
    clip: FilePath | None = None,
    vocab: FilePath | None = None,
    ema: bool = False,
    vae: FilePath | None = None,
    loras: Loras = (),
    requests: Sequence[Request] = (),
) -> OpenModel:
    """Recognises the files and checks that they make a whole model; see `load`.

    requests: what it is to generate, which chooses the adapter of the embedded miniature.
    """
    given = {"checkpoint": checkpoint, "adapter": adapter, "clip": clip, "vocab": vocab, "vae": vae}
    paths = {name: None if value is None else read_path(value, name) for name, value in given.items()}
    ema = read_truth(ema, "ema")
    mode = None if mode is None else get_mode(read_text(mode, "mode")).name
    if paths["checkpoint"] is None and paths["adapter"] is None:
        mode = mode or _shared_mode(requests)
        embedded = embedded_adapter(mode)
        paths["adapter"] = None if embedded is None else str(embedded)
    base = paths["checkpoint"] or str(embedded_base())
    is_joined = paths["adapter"] is not None
    is_untrained = paths["checkpoint"] is None and not is_joined
    weights = read_weights(base, mode=None if is_joined or is_untrained else mode, ema=ema)
    if paths["adapter"] is not None:
        weights = combine(weights, read_weights(paths["adapter"], mode=mode))
    elif is_untrained:
        assert mode is not None  # chosen above
        weights = _untrained(weights, mode)
    check_base(weights)
    for line in (*weights.warnings, *weights.unused):
        log.warning("'%s': %s", weights.path, line)
    if len(weights.modes) > 1:
        could_be = " or ".join(weights.modes)
        raise ValueError(f"'{paths['adapter'] or base}' could be {could_be}: say which with --mode")
    if not is_untrained and _are_gates_shut(weights):
        log.warning("'%s': every gate of its fusers is 0, so grounding has no effect: it was not trained", weights.path)
    parts, config = dict(weights.parts), weights.config
    if paths["vae"] is not None:
        parts["vae"], config = replace_vae(config, paths["vae"])
    own = dict(parts)
    if paths["clip"] is not None:
        parts, config = with_clip(parts, config, paths["clip"])
    if "image_encoder" not in parts:
        config = dataclasses.replace(config, image_encoder=None)
    _check_whole(parts, config, weights, base, is_joined=is_joined)
    files = {"checkpoint": base} | ({"adapter": paths["adapter"]} if paths["adapter"] is not None else {})
    model = OpenModel(
        config=config,
        parts=parts,
        name=" + ".join(Path(path).name for path in files.values()),
        vocabulary=read_vocabulary(paths["vocab"], config.text_encoder),
        files=files,
        from_clip=tuple(part for part in parts if parts[part] is not own.get(part)),
    )
    changed = add_loras(parts, loras)
    return model if changed is parts else dataclasses.replace(model, parts=changed)


def _are_gates_shut(weights: Weights) -> bool:
    """Whether GLIGEN's layers leave the base's images as they are: tanh(0) is in front of each."""
    gates = [t for n, t in weights.parts.get("unet", {}).items() if n.endswith((".alpha_attn", ".alpha_dense"))]
    return bool(gates) and not any(gate.read().any() for gate in gates)


def read_vocabulary(path: str | None, encoder: TextEncoderConfig) -> WordPiece | None:
    """The vocabulary of a text encoder that reads WordPiece ids; None for CLIP's, which needs none.

    Raises FileNotFoundError, or ValueError in one line for a file that is not its vocabulary, or where there is none.
    """
    if encoder.kind == "clip":
        if path is not None:
            log.warning("the model's text encoder is CLIP's, which has a vocabulary of its own: --vocab has no effect")
        return None
    if path is None:
        raise ValueError("this model reads WordPiece ids: give bert-base-uncased's vocab.txt with --vocab FILE")
    if not Path(path).exists():
        raise FileNotFoundError(f"--vocab '{path}': there is no such file")
    vocabulary = WordPiece(path)
    if (pieces := len(vocabulary.ids)) != encoder.vocab_size:
        cut = "is it fully downloaded? Otherwise " if pieces < encoder.vocab_size else ""
        raise ValueError(
            f"--vocab '{path}' has {pieces} pieces, but the model's text encoder {encoder.vocab_size}: {cut}give "
            "bert-base-uncased's vocab.txt"
        )
    return vocabulary


def _check_whole(
    parts: Parts, config: ModelConfig, weights: Weights, checkpoint: str | Path, *, is_joined: bool
) -> None:
    """Raises ValueError, with what to do about it, for parts that do not make a whole model.

    parts, config: of the model; weights: the checkpoint's, and the adapter's if is_joined.
    """
    if not has_whole_unet(parts.get("unet", {})):
        kind = "this with --adapter" if weights.modes else "this, if it is CLIP, with --clip"
        raise ValueError(f"'{checkpoint}' holds no whole UNet: give Stable Diffusion with --checkpoint and {kind}")
    for part, name in PART_TITLES.items():
        if part not in parts:
            raise ValueError(f"'{checkpoint}' holds no {name}: {where_to_get(part, weights, is_joined=is_joined)}")
    if config.text_encoder.width != config.unet.context_dim:
        raise ValueError(
            f"'{checkpoint}': its text encoder is {config.text_encoder.width} wide, but its UNet reads "
            f"{config.unet.context_dim}"
        )


@own_defaults()
def build_pipeline(
    model: OpenModel, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Pipeline:
    """Reads the weights, straight to their device and precision, into networks ready to generate."""
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    config = model.config
    text_class = CLIPTextEncoder if config.text_encoder.kind == "clip" else BERTTextEncoder
    with without_weights():
        unet, vae = UNetModel(config.unet), AutoencoderKL(config.vae)
        text_encoder = text_class(config.text_encoder)
        image_encoder = CLIPImageEncoder(config.image_encoder) if config.image_encoder else None
    networks: dict[str, nn.Module] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    if image_encoder is not None:
        networks["image_encoder"] = image_encoder
    with memory_errors("the model does not fit: use --dtype bfloat16 or float16, or another --device"):
        numbers = sum(t.numel() for part in networks for t in model.parts[part].values())
        check_memory(numbers * dtype.itemsize, device, f"loading '{model.name}'")
        for part, network in networks.items():
            load_part(network, model.parts[part], device=device, dtype=dtype, what=f"{model.name}: {part}")
            network.to(device, dtype).eval().requires_grad_(False)
        if "base_first_conv" in model.parts:
            conv = {name: tensor.read() for name, tensor in model.parts["base_first_conv"].items()}
            unet.set_base_conv(conv["weight"], conv["bias"])
    if isinstance(text_encoder, BERTTextEncoder):
        text_encoder.vocabulary = model.vocabulary
    return Pipeline(config, unet, vae, text_encoder, image_encoder)


def with_clip(parts: Parts, config: ModelConfig, path: str | Path) -> tuple[dict[str, Any], ModelConfig]:
    """The parts and config with CLIP's image encoder, and with its text encoder where there is none."""
    found, parts = read_weights(path), dict(parts)
    for line in (*found.warnings, *found.unused):
        log.warning("--clip '%s': %s", path, line)
    had_text_encoder = "text_encoder" in parts
    if not had_text_encoder and "text_encoder" in found.parts:
        parts["text_encoder"] = found.parts["text_encoder"]
        config = dataclasses.replace(config, text_encoder=found.config.text_encoder)
    image_encoder, grounding = found.config.image_encoder, config.unet.grounding
    if "image_encoder" not in found.parts or image_encoder is None:
        if had_text_encoder:
            raise ValueError(f"--clip '{path}' holds no CLIP image encoder: give CLIP ViT-L/14 with both towers")
        return parts, config
    if grounding and image_encoder.text_width != grounding.feature_dim:
        raise ValueError(
            f"--clip '{path}' makes features of width {image_encoder.text_width}, but the model's grounding reads "
            f"{grounding.feature_dim}: give the CLIP it was trained with (ViT-L/14)"
        )
    parts["image_encoder"] = found.parts["image_encoder"]
    return parts, dataclasses.replace(config, image_encoder=image_encoder)


def embedded_base() -> Path:
    """The base that comes with the project. Raises FileNotFoundError where it was left behind."""
    path = EMBEDDED / "scenes-base.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' is not there, which a clone of the project holds and installing it copies: install it again, or "
            "give a model with --checkpoint (training: --base)"
        )
    return path


def embedded_adapter(mode: str) -> Path | None:
    """The embedded adapter of this mode, None where the base was not trained for it yet."""
    path = EMBEDDED / f"scenes-{mode}.safetensors"
    return path if path.exists() else None


def with_new_layers(
    base: ModelConfig, unet: Mapping[str, LazyTensor], grounding: GroundingConfig, seed: int
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """A base's config and UNet with GLIGEN's layers put in, whose gates are shut: it generates what the base does.

    Their first weights depend on the seed alone; a first convolution that reads more channels starts out ignoring them.
    """
    model = dataclasses.replace(base, unet=dataclasses.replace(base.unet, grounding=grounding))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = UNetModel(model.unet).state_dict()
    state = dict(unet) | hold({name: tensor for name, tensor in fresh.items() if is_grounding_name(name)})
    if grounding.spec.extra_channels:
        own = unet[FIRST_WEIGHT].read(dtype=torch.float32)
        state[FIRST_WEIGHT] = hold({"": widened(own, model.unet.first_conv_channels)})[""]
    return model, state


def widened(weight: Tensor, channels: int) -> Tensor:
    """A first convolution (C', C, 3, 3) for more input channels (GLIGEN §5, inpainting), which it starts out
    ignoring: the model begins as the base."""
    extra = weight.new_zeros(weight.shape[0], channels - weight.shape[1], *weight.shape[2:])
    return torch.cat([weight, extra], dim=1)


def _untrained(base: Weights, mode: str) -> Weights:
    """The embedded base for a mode that no adapter was embedded for: it takes the mode's requests, and follows
    their captions alone."""
    log.warning(
        "the embedded miniature was not trained for %s: generating from the caption alone; train it with `python "
        "train.py scenes-%s --out runs/%s` and give --adapter%s",
        mode, mode, mode,
        ", or give GLIGEN's own weights with --checkpoint" if get_mode(mode).original else "",
    )  # fmt: skip
    width = base.config.text_encoder.width
    grounding = GroundingConfig(mode=mode, token_dim=base.config.unet.context_dim, feature_dim=width)
    config, unet = with_new_layers(base.config, base.parts["unet"], grounding, seed=0)
    conv = {leaf: base.parts["unet"][f"{FIRST_CONV}{leaf}"] for leaf in ("weight", "bias")}
    parts = {**base.parts, "unet": unet, "base_first_conv": conv}
    return dataclasses.replace(base, config=config, parts=parts, modes=(mode,))


def _shared_mode(requests: Sequence[Request]) -> str:
    """The first mode that can serve every request, an embedded one before others. Raises ValueError if they need
    different ones."""
    modes = list(serving_modes(requests[0])) if requests else ["box-text"]
    for i, request in enumerate(requests):
        left = [mode for mode in modes if mode in serving_modes(request)]
        if not left:
            needed = " or ".join(serving_modes(request))
            raise ValueError(
                f"request {i} needs a {needed} model, the ones before it {' or '.join(modes)}: run them apart"
            )
        modes = left
    return next((mode for mode in modes if embedded_adapter(mode)), modes[0])
