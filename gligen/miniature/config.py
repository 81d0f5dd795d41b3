"""Sizes and recipes of the miniature's networks. Imports no torch.

Sizes follow from two limits: a file of 16 MiB, which is 8.3 million numbers in float16, and two cores of a CPU to train
on. CLIP's whole vocabulary would take 4.7 million at a width of 96, so it ends after its 8192 most frequent tokens
(gligen/modules/clip.py). The UNet is thin where pixels are many, as Stable Diffusion's is: half of its work would go
into the first level otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from gligen.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig, require_positive
from gligen.training.engine.options import DATA, MODEL, OBJECTIVE, OPTIMISER, RUN, RunConfig, option

IMAGE_SIZE = 64  # pixels a side of a scene


@dataclass(frozen=True, kw_only=True)
class Recipe(RunConfig):
    """The training of one stage. `__post_init__` raises ValueError, one line, for what cannot work."""

    people: float = option(0.15, "share of scenes with drawn people instead of shapes", DATA)
    save_every: int = option(250, "steps between checkpoints; 0 only at the end", RUN, is_free=True)
    log_every: int = option(25, "steps between lines of log.jsonl", RUN, is_free=True)
    eval_every: int = option(1000, "steps between evaluations on held-out scenes; 0 only at the end", RUN, is_free=True)
    eval_scenes: int = option(256, "scenes of an evaluation, rounded to whole batches", RUN, is_free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "eval_scenes"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        self._require("eval_every", self.eval_every >= 0, "0 or more")
        self._require_shares("people")


@dataclass(frozen=True, kw_only=True)
class CLIPStage(Recipe):
    """Both towers, contrastively. One width for text and shared space, see gligen/miniature/clip.py."""

    text_width: int = option(96, "width of a caption token, and of the shared space", MODEL)
    text_layers: int = option(3, "layers of the text tower", MODEL)
    vocab_size: int = option(8192, "tokens kept of CLIP's 49408, most frequent first", MODEL)
    context_length: int = option(48, "tokens of a caption; the longest that is drawn has 42", MODEL)
    image_width: int = option(96, "width of the image tower", MODEL)
    image_layers: int = option(3, "layers of the image tower", MODEL)
    patch_size: int = option(8, "pixels a side of the image tower's patches", MODEL)
    head_dim: int = option(32, "width of an attention head in both towers", MODEL)
    places: float = option(0.3, "share of captions that say coarsely where things are", DATA)

    steps: int = option(
        6000,
        "steps in all, those of earlier calls included; the learning rate falls to 0 at the last",
        RUN,
        is_free=True,
    )
    batch_size: int = option(128, "pairs a step, half of them images of one object with its phrase", RUN, is_free=True)
    weight_decay: float = option(0.01, "AdamW's decay", OPTIMISER)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "text_width", "text_layers", "vocab_size", "context_length", "head_dim")
        require_positive(self, "image_width", "image_layers", "patch_size")
        self._require("batch_size", self.batch_size >= 4, "4 or more: pairs are told apart")
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

    GroupNorm has 8 groups: with LDM's 32 each channel of each image would be normalised by itself, and the level of
    a flat colour would be lost (seen with 32 channels: 18.6 dB after 4,800 scenes, and no better with more).
    """

    base_channels: int = option(16, "channels of the first level", MODEL)
    channel_mult: tuple[int, ...] = option((1, 2, 4), "channels of each level over the first's", MODEL)
    norm_groups: int = option(8, "groups of every GroupNorm", MODEL)
    num_res_blocks: int = option(1, "residual blocks a level", MODEL)
    latent_channels: int = option(4, "channels of a latent", MODEL)
    kl_weight: float = option(
        5e-4, "weight of the posterior's KL divergence, in nats per latent number", OBJECTIVE, is_free=True
    )

    steps: int = option(
        4000,
        "steps in all, those of earlier calls included; the learning rate falls to 0 at the last",
        RUN,
        is_free=True,
    )
    batch_size: int = option(16, "scenes a step", RUN, is_free=True)
    lr: float = option(1.5e-3, "learning rate after warm-up, AdamW", OPTIMISER)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.vae  # for its own checks

    @property
    def vae(self) -> VAEConfig:
        """The autoencoder as built; the scale factor is measured when training ends."""
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

    model_channels: int = option(32, "channels of the first level", MODEL)
    channel_mult: tuple[int, ...] = option((1, 2, 4), "channels of each level over the first's", MODEL)
    norm_groups: int = option(8, "groups of every GroupNorm", MODEL)
    num_res_blocks: int = option(1, "residual blocks a level", MODEL)
    attention_downsamples: tuple[int, ...] = option((1, 2, 4), "latent/size ratios with attention", MODEL)
    num_heads: int = option(2, "attention heads everywhere", MODEL)
    caption_drop: float = option(0.1, "share of samples with the empty caption, for guidance", OBJECTIVE, is_free=True)
    focus: float = option(
        0.6,
        "share of samples whose timestep comes from focus_low to focus_high, that of others from all; LDM: 0",
        OBJECTIVE,
        is_free=True,
    )
    focus_low: int = option(450, "below it hardly a shape is mistaken any more", OBJECTIVE, is_free=True)
    focus_high: int = option(949, "above it hardly anything is seen of a shape yet", OBJECTIVE, is_free=True)
    finish: float = option(
        0.15, "share of the run, at its end, without focus: all timesteps come alike", OBJECTIVE, is_free=True
    )
    min_snr: float = option(
        0.0,
        "weigh a timestep's loss by min(SNR, this)/SNR (Hang et al. 2023, who take 5); 0: all alike, as LDM does",
        OBJECTIVE,
        is_free=True,
    )
    places: float = option(0.4, "share of captions that say coarsely where things are", DATA)
    cache: int = option(
        0,
        "scenes drawn and encoded once and then used again, with other noise; 0 draws new ones all the time. Kept on "
        "the device: 13 KB each on CUDA (float16), so a million take 13 GB; 26 KB elsewhere",
        DATA,
        is_free=True,
    )
    reuse: int = option(
        0,
        "with --cache: until all scenes have come, samples of earlier ones between two of new ones, for a device that "
        "is faster than scenes are drawn",
        DATA,
        is_free=True,
    )
    preview_every: int = option(2000, "steps between sheets of images; 0 only at the end", RUN, is_free=True)

    steps: int = option(
        12_000,
        "steps in all, those of earlier calls included; the learning rate falls to 0 at the last",
        RUN,
        is_free=True,
    )
    batch_size: int = option(64, "scenes a step", RUN, is_free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_shares("caption_drop", "focus", "finish", "places")
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
