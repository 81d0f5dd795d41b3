"""From files to a pipeline: what a checkpoint holds is read from its header; weights are read only when it is built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gligen.config import GroundingConfig, ModelConfig
from gligen.device import check_memory, memory_errors, pick_device, pick_dtype
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
)
from gligen.weights.graft import PART_TITLES
from gligen.weights.infer import FIRST_CONV, FIRST_WEIGHT, has_whole_unet
from gligen.weights.lora import Adapted

log = logging.getLogger("gligen")

Parts = Mapping[str, Mapping[str, LazyTensor]]

EMBEDDED = Path(__file__).parent.parent / "checkpoints"  # the miniature: a base, and an adapter for some modes


@dataclass(frozen=True)
class OpenModel:
    """A model whose files were recognised and found to fit together, before any weight is read.

    name: what messages call it. files: what it was opened from, by role.
    """

    config: ModelConfig
    parts: Parts
    name: str
    vocabulary: WordPiece | None = None
    files: Mapping[str, str | Path] = field(default_factory=dict)

    @property
    def facts(self) -> ModelFacts:
        """The facts about the model that decide which requests it can serve."""
        return ModelFacts(
            config=self.config,
            has_image_encoder="image_encoder" in self.parts,
            has_base_conv="base_first_conv" in self.parts,
        )


def load(
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    mode: str | None = None,
    clip: str | Path | None = None,
    vocab: str | Path | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    loras: Sequence[Adapted] = (),
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> Pipeline:
    """The pipeline of a checkpoint: a GLIGEN file, or a Stable Diffusion base with a GLIGEN adapter.

    checkpoint: any layout of gligen/weights (recognised by content, not by name). None is the embedded miniature,
        which knows drawn scenes (checkpoints/README.md).
    adapter: what GLIGEN's training added, or a whole GLIGEN file, of which the base supplies what it lacks.
    mode: what the model is grounded in, for files whose tensors cannot tell (canny and depth are alike).
    clip: CLIP ViT-L/14: its image tower is needed for reference images, its text tower where the checkpoint lacks one.
    vocab: WordPiece vocabulary, needed for LDM text2img-large only.
    ema: use averaged weights, where a file has both.
    vae: another autoencoder of the same latents, in place of the checkpoint's or where it holds none.
    loras: 'FILE', 'FILE:weight' or (path, weight): low-rank changes of the base's layers, which add up.
    Raises ValueError, FileNotFoundError or MemoryError, one line, for what is wrong with the files.
    """
    return build_pipeline(
        open_model(checkpoint, adapter, mode=mode, clip=clip, vocab=vocab, ema=ema, vae=vae, loras=loras),
        device=device,
        dtype=dtype,
    )


def open_model(
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    mode: str | None = None,
    clip: str | Path | None = None,
    vocab: str | Path | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    loras: Sequence[Adapted] = (),
    requests: Sequence[Request] = (),
) -> OpenModel:
    """Recognises the files and checks that they make a whole model; see `load`.

    requests: what it is to generate, which chooses the adapter of the embedded miniature.
    """
    if checkpoint is None:
        checkpoint = embedded_base()
        if adapter is None:
            mode = mode or _shared_mode(requests)
            adapter = embedded_adapter(get_mode(mode).name)
            if adapter is None:
                return _changed(_untrained(checkpoint, mode), loras, vae)
    weights = read_weights(checkpoint, mode=None if adapter else mode, ema=ema)
    if adapter is not None:
        weights = combine(weights, read_weights(adapter, mode=mode))
    check_base(weights)
    for warning in weights.warnings:
        log.warning("'%s': %s", weights.path, warning)
    if len(weights.modes) > 1:
        raise ValueError(f"'{adapter or checkpoint}' could be {' or '.join(weights.modes)}: say which with --mode")
    parts, config = dict(weights.parts), weights.config
    if vae is not None:
        parts["vae"], config = replace_vae(config, vae)
    if clip is not None:
        parts, config = _with_clip(parts, config, clip)
    if "image_encoder" not in parts:
        config = dataclasses.replace(config, image_encoder=None)
    _check_whole(parts, config, weights, checkpoint, is_joined=adapter is not None)
    vocabulary = WordPiece(vocab) if vocab is not None else None
    if config.text_encoder.kind == "bert" and vocabulary is None:
        raise ValueError("this model reads WordPiece ids: give bert-base-uncased's vocab.txt with --vocab FILE")
    if vocabulary is not None and len(vocabulary.ids) != config.text_encoder.vocab_size:
        raise ValueError(
            f"--vocab '{vocab}' has {len(vocabulary.ids)} pieces, but the model's text encoder "
            f"{config.text_encoder.vocab_size}: give bert-base-uncased's vocab.txt"
        )
    files = {role: path for role, path in (("checkpoint", checkpoint), ("adapter", adapter)) if path is not None}
    name = " + ".join(Path(path).name for path in files.values())
    return _changed(OpenModel(config, parts, name, vocabulary, files), loras)


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


def build_pipeline(
    model: OpenModel, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Pipeline:
    """Reads the weights, straight to their device and precision, into networks ready to generate."""
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    config = model.config
    text_class = CLIPTextEncoder if config.text_encoder.kind == "clip" else BERTTextEncoder
    with torch.device("meta"):
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


def _changed(model: OpenModel, loras: Sequence[Adapted], vae: str | Path | None = None) -> OpenModel:
    """The model with another autoencoder, and with LoRAs on its layers."""
    if vae is not None:
        part, config = replace_vae(model.config, vae)
        model = dataclasses.replace(model, config=config, parts={**model.parts, "vae": part})
    return dataclasses.replace(model, parts=add_loras(model.parts, loras)) if loras else model


def _with_clip(parts: Parts, config: ModelConfig, path: str | Path) -> tuple[dict[str, Any], ModelConfig]:
    """The parts and config with CLIP's image encoder, and with its text encoder where there is none."""
    found, parts = read_weights(path), dict(parts)
    had_text_encoder = "text_encoder" in parts
    if not had_text_encoder and "text_encoder" in found.parts:
        parts["text_encoder"] = found.parts["text_encoder"]
        config = dataclasses.replace(config, text_encoder=found.config.text_encoder)
    if "image_encoder" in found.parts or had_text_encoder:
        parts["image_encoder"], config = _image_encoder(found, config, path)
    return parts, config


def _image_encoder(
    weights: Weights, config: ModelConfig, path: str | Path
) -> tuple[Mapping[str, LazyTensor], ModelConfig]:
    if "image_encoder" not in weights.parts or weights.config.image_encoder is None:
        raise ValueError(f"--clip '{path}' holds no CLIP image encoder: give CLIP ViT-L/14 with both towers")
    found = weights.config.image_encoder
    if config.unet.grounding and found.text_width != config.unet.grounding.feature_dim:
        raise ValueError(
            f"--clip '{path}' makes features of width {found.text_width}, but the model's grounding reads "
            f"{config.unet.grounding.feature_dim}: give the CLIP it was trained with (ViT-L/14)"
        )
    return weights.parts["image_encoder"], dataclasses.replace(config, image_encoder=found)


def embedded_base() -> Path:
    """The base that comes with the project. Raises FileNotFoundError where it was left behind."""
    path = EMBEDDED / "scenes-base.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' is not there: run from a clone of the project, which holds it, or give --checkpoint"
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


def _untrained(path: Path, mode: str) -> OpenModel:
    """The embedded base for a mode that no adapter was embedded for: it takes the mode's requests, and follows
    their captions alone."""
    log.warning(
        "the embedded miniature was not trained for %s: generating from the caption alone; train it with `python "
        "train.py scenes-%s --out runs/%s` and give --adapter%s",
        mode, mode, mode,
        ", or give GLIGEN's own weights with --checkpoint" if get_mode(mode).original else "",
    )  # fmt: skip
    weights = read_weights(path)
    width = weights.config.text_encoder.width
    grounding = GroundingConfig(mode=mode, token_dim=weights.config.unet.context_dim, feature_dim=width)
    config, unet = with_new_layers(weights.config, weights.parts["unet"], grounding, seed=0)
    conv = {leaf: weights.parts["unet"][f"{FIRST_CONV}{leaf}"] for leaf in ("weight", "bias")}
    parts = {**weights.parts, "unet": unet, "base_first_conv": conv}
    return OpenModel(config, parts, path.name, files={"checkpoint": path})


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
