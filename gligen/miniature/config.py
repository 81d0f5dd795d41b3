"""Sizes and recipes of the miniature's networks. Imports no torch.

Sizes follow from two limits: a file of 16 MiB, which is 8.3 million numbers in float16, and two cores of a CPU to train
on. CLIP's whole vocabulary would take 4.7 million at a width of 96, so it ends after its 8192 most frequent tokens
(gligen/modules/clip.py). The UNet is thin where pixels are many, as Stable Diffusion's is: half of its work would go
into the first level otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gligen.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig, require_positive
from gligen.fields import MAX_SEED

IMAGE_SIZE = 64  # pixels a side of a scene


def option(default: Any, help: str, *, is_free: bool = True) -> Any:
    """A field with its default and what --help says. is_free: a run that goes on may have another value."""
    return field(default=default, metadata={"help": help, "is_free": is_free})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stage is trained. `__post_init__` raises ValueError, one line, for what cannot work."""

    steps: int = option(1000, "steps in all, those of earlier calls included; the learning rate falls to 0 at the last")
    minutes: float = option(
        0.0,
        "minutes from the call's start after which training ends, however few the steps; 0: no limit",
    )
    batch_size: int = option(32, "samples a step, of each process")
    lr: float = option(1e-3, "learning rate after warm-up, AdamW")
    warmup_steps: int = option(200, "steps over which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's decay")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm; 0 never")
    ema_decay: float = option(0.999, "what is kept is a running average of the weights; 0 is off")
    people: float = option(0.15, "share of scenes with drawn people instead of shapes", is_free=False)
    seed: int = option(0, "of the first weights, the scenes and the noise", is_free=False)
    dtype: str = option("auto", "of the computation: auto (bfloat16 on CUDA, else float32), float32 or bfloat16")
    attention: str = option("sdpa", "how attention is computed; on a CPU in bfloat16, math is faster")
    workers: int = option(-1, "processes that draw scenes ahead; 0 draws in between; -1 is 0 on a CPU, else up to 14")
    compile: bool = option(False, "torch.compile the repeated blocks, which takes a minute at first")
    graphs: bool = option(
        True, "on CUDA, one process: record a step as one graph, a single launch instead of thousands"
    )
    save_every: int = option(250, "steps between checkpoints")
    log_every: int = option(25, "steps between lines of the log")
    eval_every: int = option(1000, "steps between evaluations on scenes kept aside; 0 only at the end")
    eval_scenes: int = option(256, "scenes of an evaluation, rounded to whole batches")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every", "eval_scenes"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("minutes", "warmup_steps", "weight_decay", "clip_norm", "eval_every"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("seed", 0 <= self.seed < MAX_SEED, f"0 to {MAX_SEED - 1}")
        self._require("lr", 0 < self.lr < math.inf, "a number above 0")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0, or a decay below 1 such as 0.999")
        self._require("people", 0 <= self.people <= 1, "a share from 0 to 1")
        self._require("dtype", self.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        self._require("workers", self.workers >= -1, "-1 or more")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}: give {wanted}")


@dataclass(frozen=True, kw_only=True)
class CLIPStage(Recipe):
    """Both towers, contrastively. One width for text and shared space, see gligen/miniature/clip.py."""

    text_width: int = option(96, "width of a caption token, and of the shared space", is_free=False)
    text_layers: int = option(3, "layers of the text tower", is_free=False)
    vocab_size: int = option(8192, "tokens kept of CLIP's 49408, most frequent first", is_free=False)
    context_length: int = option(48, "tokens of a caption; the longest that is drawn has 42", is_free=False)
    image_width: int = option(96, "width of the picture tower", is_free=False)
    image_layers: int = option(3, "layers of the picture tower", is_free=False)
    patch_size: int = option(8, "pixels a side of the picture tower's patches", is_free=False)
    head_dim: int = option(32, "width of an attention head in both towers", is_free=False)
    places: float = option(0.3, "share of captions that say coarsely where things are", is_free=False)

    steps: int = option(6000, "steps in all, those of earlier calls included; the learning rate falls to 0 at the last")
    batch_size: int = option(128, "pairs a step, half of them pictures of one object with its phrase")
    weight_decay: float = option(0.01, "AdamW's decay")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "text_width", "text_layers", "vocab_size", "context_length", "head_dim")
        require_positive(self, "image_width", "image_layers", "patch_size")
        self._require("batch_size", self.batch_size >= 4, "4 or more: pairs are told from each other")
        self._require("patch_size", IMAGE_SIZE % self.patch_size == 0, f"a divisor of {IMAGE_SIZE}")
        for name in ("text_width", "image_width"):
            self._require(name, getattr(self, name) % self.head_dim == 0, f"a multiple of head_dim, {self.head_dim}")

    @property
    def text_encoder(self) -> TextEncoderConfig:
        return TextEncoderConfig(
            width=self.text_width,
            layers=self.text_layers,
            heads=self.text_width // self.head_dim,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
        )

    @property
    def image_encoder(self) -> ImageEncoderConfig:
        return ImageEncoderConfig(
            image_size=IMAGE_SIZE,
            patch_size=self.patch_size,
            width=self.image_width,
            layers=self.image_layers,
            heads=self.image_width // self.head_dim,
            embed_dim=self.text_width,
            text_width=self.text_width,
        )


@dataclass(frozen=True, kw_only=True)
class VAEStage(Recipe):
    """LDM's KL autoencoder: f = 4 from three levels, 4 latent channels.

    GroupNorm has 8 groups: with LDM's 32 each channel of each picture would be normalised by itself, and the level of
    a flat colour would be lost (seen with 32 channels: 18.6 dB after 4,800 scenes, and no better with more).
    """

    base_channels: int = option(16, "channels of the first level", is_free=False)
    channel_mult: tuple[int, ...] = option((1, 2, 4), "channels of each level over the first's", is_free=False)
    norm_groups: int = option(8, "groups of every GroupNorm", is_free=False)
    num_res_blocks: int = option(1, "residual blocks a level", is_free=False)
    latent_channels: int = option(4, "channels of a latent", is_free=False)
    kl_weight: float = option(5e-4, "weight of the posterior's KL divergence, in nats per latent number")

    steps: int = option(4000, "steps in all, those of earlier calls included; the learning rate falls to 0 at the last")
    batch_size: int = option(16, "scenes a step")
    lr: float = option(1.5e-3, "learning rate after warm-up, AdamW")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.vae  # for its own checks

    @property
    def vae(self) -> VAEConfig:
        """As built; the scale factor is measured when training ends."""
        return VAEConfig(
            base_channels=self.base_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            latent_channels=self.latent_channels,
            norm_groups=self.norm_groups,
            scale_factor=1.0,
        )


@dataclass(frozen=True, kw_only=True)
class UNetStage(Recipe):
    """LDM's UNet without grounding, on the latents and caption tokens of the two other stages."""

    model_channels: int = option(32, "channels of the first level", is_free=False)
    channel_mult: tuple[int, ...] = option((1, 2, 4), "channels of each level over the first's", is_free=False)
    norm_groups: int = option(8, "groups of every GroupNorm", is_free=False)
    num_res_blocks: int = option(1, "residual blocks a level", is_free=False)
    attention_downsamples: tuple[int, ...] = option((1, 2, 4), "latent/size ratios with attention", is_free=False)
    num_heads: int = option(2, "attention heads everywhere", is_free=False)
    caption_drop: float = option(0.1, "share of samples with the empty caption, for guidance")
    focus: float = option(
        0.6, "share of samples whose timestep comes from focus_low to focus_high, that of others from all; LDM: 0"
    )
    focus_low: int = option(450, "below it hardly a shape is mistaken any more")
    focus_high: int = option(949, "above it hardly anything is seen of a shape yet")
    finish: float = option(0.15, "share of the run, at its end, without focus: all timesteps come alike")
    min_snr: float = option(
        0.0, "weigh a timestep's loss by min(SNR, this)/SNR (Hang et al. 2023, who take 5); 0: all alike, as LDM does"
    )
    places: float = option(0.4, "share of captions that say coarsely where things are", is_free=False)
    cache: int = option(
        0,
        "scenes drawn and encoded once and then used again, with other noise; 0 draws new ones all the time. Kept on "
        "the device: 13 KB each on CUDA (float16), so a million take 13 GB; 26 KB elsewhere",
    )
    reuse: int = option(
        0,
        "with --cache: until all scenes have come, samples of earlier ones between two of new ones, for a device that "
        "is faster than scenes are drawn",
    )
    preview_every: int = option(2000, "steps between sheets of pictures; 0 only at the end")

    steps: int = option(
        12_000, "steps in all, those of earlier calls included; the learning rate falls to 0 at the last"
    )
    batch_size: int = option(64, "scenes a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("caption_drop", "focus", "finish", "places"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        if not 0 <= self.focus_low <= self.focus_high:
            raise ValueError(f"focus_low is {self.focus_low} and focus_high {self.focus_high}: give 0 <= low <= high")
        self._require("min_snr", self.min_snr >= 0, "0 or more")
        self._require("preview_every", self.preview_every >= 0, "0 or more")
        self._require("reuse", self.reuse >= 0, "0 or more")
        self._require("cache", self.cache % self.batch_size == 0 <= self.cache, "0 or a multiple of batch_size")
        self.unet(context_dim=1)  # for its own checks

    def unet(self, *, context_dim: int) -> UNetConfig:
        return UNetConfig(
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            attention_downsamples=self.attention_downsamples,
            num_heads=self.num_heads,
            norm_groups=self.norm_groups,
            context_dim=context_dim,
        )


STAGES: dict[str, type[Recipe]] = {"clip": CLIPStage, "vae": VAEStage, "unet": UNetStage}
