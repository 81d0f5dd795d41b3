"""From files to a pipeline: what a checkpoint holds is told from its header; weights are read only when it is built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gligen.config import GroundingConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.modules.wordpiece import WordPiece
from gligen.pipeline import Pipeline, check_request
from gligen.request import Request, serving_modes
from gligen.runtime import check_memory, memory_errors, pick_device, pick_dtype
from gligen.weights import LazyTensor, Weights, combine, load_part, read_weights

log = logging.getLogger("gligen")

Parts = Mapping[str, Mapping[str, LazyTensor]]


@dataclass(frozen=True)
class OpenModel:
    """A model whose files were recognised and found to fit together, before any weight is read.

    parts: None where weights are to be generated. name: what a picture's metadata calls it.
    """

    config: ModelConfig
    parts: Parts | None
    name: str
    vocabulary: WordPiece | None = None

    def check(self, request: Request, where: str = "") -> Request:
        """The request completed for this model. Raises ValueError if it cannot be served."""
        return check_request(
            request,
            self.config,
            has_image_encoder=self.parts is None or "image_encoder" in self.parts,
            has_base_conv=self.parts is None or "base_first_conv" in self.parts,
            where=where,
        )


def load(
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    mode: str | None = None,
    clip: str | Path | None = None,
    vocab: str | Path | None = None,
    ema: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> Pipeline:
    """The pipeline of a checkpoint: a GLIGEN file, or a Stable Diffusion base with a GLIGEN adapter.

    checkpoint: any layout of gligen/weights (told by content, not by name). None generates small weights, which paint
        nothing sensible but run.
    adapter: what GLIGEN's training added, or a whole GLIGEN file, of which the base supplies what it lacks.
    mode: what the model is grounded in, for files whose tensors cannot tell (canny and depth are alike).
    clip: CLIP ViT-L/14 with its image tower, needed for reference images only.
    vocab: WordPiece vocabulary, needed for LDM text2img-large only.
    ema: use averaged weights, where a file has both.
    Raises ValueError, FileNotFoundError or MemoryError, one line, for what is wrong with the files.
    """
    return build_pipeline(
        open_model(checkpoint, adapter, mode=mode, clip=clip, vocab=vocab, ema=ema), device=device, dtype=dtype
    )


def open_model(
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    mode: str | None = None,
    clip: str | Path | None = None,
    vocab: str | Path | None = None,
    ema: bool = False,
    requests: Sequence[Request] = (),
) -> OpenModel:
    """Recognises the files and checks that they make a whole model; see `load`.

    requests: what it is to paint, which chooses the mode of generated weights.
    """
    if checkpoint is None:
        if adapter is not None:
            raise ValueError(f"'{adapter}' is an adapter: give the model it goes on with --checkpoint")
        return _generated(mode or _shared_mode(requests))
    weights = read_weights(checkpoint, mode=None if adapter else mode, ema=ema)
    if adapter is not None:
        weights = combine(weights, read_weights(adapter, mode=mode))
    if len(weights.modes) > 1:
        raise ValueError(f"'{adapter or checkpoint}' could be {' or '.join(weights.modes)}: say which with --mode")
    parts, config = dict(weights.parts), weights.config
    if clip is not None:
        parts["image_encoder"], config = _image_encoder(read_weights(clip), config, clip)
    elif "image_encoder" not in parts:
        config = dataclasses.replace(config, image_encoder=None)
    for part, name in (("unet", "UNet"), ("vae", "autoencoder"), ("text_encoder", "text encoder")):
        if part not in parts:
            raise ValueError(
                f"'{checkpoint}' holds no {name}: give a whole model with --checkpoint, this with --adapter"
            )
    if config.text_encoder.width != config.unet.context_dim:
        raise ValueError(
            f"'{checkpoint}': its text encoder is {config.text_encoder.width} wide, but its UNet reads "
            f"{config.unet.context_dim}"
        )
    vocabulary = WordPiece(vocab) if vocab is not None else None
    if config.text_encoder.kind == "bert" and vocabulary is None:
        raise ValueError("this model reads WordPiece ids: give bert-base-uncased's vocab.txt with --vocab FILE")
    if vocabulary is not None and len(vocabulary.ids) != config.text_encoder.vocab_size:
        raise ValueError(
            f"--vocab '{vocab}' has {len(vocabulary.ids)} pieces, but the model's text encoder "
            f"{config.text_encoder.vocab_size}: give bert-base-uncased's vocab.txt"
        )
    name = " + ".join(Path(path).name for path in (checkpoint, adapter) if path is not None)
    return OpenModel(config, parts, name, vocabulary)


def build_pipeline(
    model: OpenModel, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Pipeline:
    """Reads the weights, straight to their device and precision, into networks ready to paint."""
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    config = model.config
    text_class = CLIPTextEncoder if config.text_encoder.kind == "clip" else BERTTextEncoder
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if model.parts is None else "meta"):
        torch.manual_seed(0)  # for generated weights
        unet, vae = UNetModel(config.unet), AutoencoderKL(config.vae)
        text_encoder = text_class(config.text_encoder)
        image_encoder = CLIPImageEncoder(config.image_encoder) if config.image_encoder else None
    networks: dict[str, nn.Module] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    if image_encoder is not None:
        networks["image_encoder"] = image_encoder
    with memory_errors("the model does not fit: use --dtype bfloat16 or float16, or another --device"):
        if model.parts is None:
            log.warning(
                "no checkpoint given: painting with small generated weights, which know nothing; "
                "give Stable Diffusion or GLIGEN weights with --checkpoint for real pictures"
            )
            _open_gates(unet)
        else:
            numbers = sum(t.numel() for part in networks for t in model.parts[part].values())
            check_memory(numbers * dtype.itemsize, device, f"loading '{model.name}'")
            for part, network in networks.items():
                load_part(network, model.parts[part], device=device, dtype=dtype, what=f"{model.name}: {part}")
        for network in networks.values():
            network.to(device, dtype).eval().requires_grad_(False)
        if model.parts is not None and "base_first_conv" in model.parts:
            conv = {name: tensor.read() for name, tensor in model.parts["base_first_conv"].items()}
            unet.set_base_conv(conv["weight"], conv["bias"])
    if isinstance(text_encoder, BERTTextEncoder):
        text_encoder.vocabulary = model.vocabulary
    return Pipeline(config, unet, vae, text_encoder, image_encoder)


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


def _shared_mode(requests: Sequence[Request]) -> str:
    """The first mode that can serve every request. Raises ValueError if they need different ones."""
    modes = list(serving_modes(requests[0])) if requests else ["box-text"]
    for i, request in enumerate(requests):
        left = [mode for mode in modes if mode in serving_modes(request)]
        if not left:
            needed = " or ".join(serving_modes(request))
            raise ValueError(
                f"request {i} needs a {needed} model, the ones before it {' or '.join(modes)}: run them apart"
            )
        modes = left
    return modes[0]


def _generated(mode: str) -> OpenModel:
    """A model with every part of the real one, small enough to run anywhere in seconds."""
    config = ModelConfig(
        unet=UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_downsamples=(1, 2),
            num_heads=4,
            context_dim=64,
            grounding=GroundingConfig(
                mode=mode,
                token_dim=64,
                feature_dim=64,
                hidden_dim=64,
                map_depths=(1, 1, 1, 1),
                map_dims=(16, 32, 64, 128),
            ),
        ),
        vae=VAEConfig(base_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1),
        text_encoder=TextEncoderConfig(width=64, layers=2, heads=4),
        image_encoder=ImageEncoderConfig(image_size=56, width=64, layers=2, heads=4, embed_dim=64, text_width=64),
        image_size=64,
    )
    return OpenModel(config, None, "generated small weights")


def _open_gates(unet: UNetModel) -> None:
    """Gates of generated weights stand open, so that grounding takes part; the base's convolution is made up."""
    with torch.no_grad():
        for transformer in unet.transformers:
            transformer.block.fuser.alpha_attn.fill_(0.5)
            transformer.block.fuser.alpha_dense.fill_(0.5)
        weight = unet.first_conv.weight[:, : unet.config.in_channels].clone()
        unet.set_base_conv(weight, torch.zeros(len(weight)))
