"""What is built, as plain frozen data: one dataclass per network, nested for a whole model.

Defaults are Stable Diffusion v1 with GLIGEN's published sizes. A config is saved as JSON with every file this
project writes, and inferred from tensor shapes for files that carry none (gligen/weights/infer.py).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from gligen.modes import Mode, get_mode

FuserType = Literal["gatedSA", "gatedCA", "gatedSA2"]
FUSER_TYPES: tuple[str, ...] = typing.get_args(FuserType)


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError, one line, if one of these fields, a number or several, is below 1."""
    for name in names:
        value = getattr(config, name)
        if not value or min(value if isinstance(value, (tuple, list)) else (value,)) < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """GLIGEN's additions to a UNet: the grounding tokenizer and the kind of fuser."""

    mode: str = "box-text"  # a row of gligen.modes.MODES
    fuser_type: FuserType = "gatedSA"
    token_dim: int = 768  # width of a grounding token; equals context_dim in every published model
    feature_dim: int = 768  # width of the phrase (or image) feature it is made from
    hidden_dim: int = 512  # width of the tokenizer's MLP
    num_freqs: int = 8  # Fourier frequencies per coordinate
    max_entities: int = 30  # token slots for boxes; empty slots hold the null features
    max_persons: int = 8  # token slots for keypoints: 17 a person
    map_size: int = 256  # maps are resized to this many pixels a side before the trunk
    map_depths: tuple[int, ...] = (3, 3, 9, 3)  # ConvNeXt-Tiny
    map_dims: tuple[int, ...] = (96, 192, 384, 768)

    def __post_init__(self) -> None:
        get_mode(self.mode)
        if self.fuser_type not in FUSER_TYPES:
            raise ValueError(f"fuser_type is {self.fuser_type!r}: the known ones are {', '.join(FUSER_TYPES)}")
        if self.map_size % 2 ** (len(self.map_dims) + 1):
            raise ValueError(
                f"map_size is {self.map_size}: the trunk needs a multiple of {2 ** (len(self.map_dims) + 1)}"
            )

    @property
    def spec(self) -> Mode:
        return get_mode(self.mode)

    @property
    def num_map_tokens(self) -> int:
        """Tokens of a map: the trunk's grid, row by row (8·8 for 256 pixels)."""
        return (self.map_size // 2 ** (len(self.map_dims) + 1)) ** 2


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """LDM's UNet; `grounding` None is the base model itself, without fusers."""

    in_channels: int = 4  # of the latent, before what a mode adds
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_downsamples: tuple[int, ...] = (1, 2, 4)  # latent/size ratios at which transformers stand
    num_heads: int = 8  # everywhere; head width = channels / num_heads
    norm_groups: int = 32  # of every GroupNorm; fewer where channels are few, or each would lose its level
    context_dim: int = 768  # width of a caption token
    grounding: GroundingConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "model_channels", "channel_mult", "num_res_blocks", "num_heads", "norm_groups")
        for mult in self.channel_mult:
            channels = mult * self.model_channels
            if channels % self.norm_groups:
                raise ValueError(
                    f"model_channels × channel_mult gives {channels} channels: GroupNorm needs a multiple of "
                    f"{self.norm_groups}"
                )
            if channels % self.num_heads:
                raise ValueError(f"num_heads is {self.num_heads}: {channels} channels do not divide by it")

    @property
    def first_conv_channels(self) -> int:
        return self.in_channels + (self.grounding.spec.extra_channels if self.grounding else 0)

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """LDM's KL autoencoder (f = 2^(levels-1))."""

    in_channels: int = 3
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32  # as UNetConfig
    scale_factor: float = 0.18215  # latents are multiplied by it, so that their spread is about 1

    def __post_init__(self) -> None:
        require_positive(self, "base_channels", "channel_mult", "num_res_blocks", "latent_channels", "norm_groups")
        for mult in self.channel_mult:
            if (channels := mult * self.base_channels) % self.norm_groups:
                raise ValueError(f"norm_groups is {self.norm_groups}: {channels} channels do not divide by it")
        if not 0 < self.scale_factor < math.inf:
            raise ValueError(f"scale_factor is {self.scale_factor}: give a number above 0")

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The caption encoder: CLIP's text tower (Stable Diffusion) or LDM text2img-large's transformer."""

    kind: Literal["clip", "bert"] = "clip"
    width: int = 768
    layers: int = 12
    heads: int = 12
    head_dim: int = 64  # 'bert' only: heads × head_dim need not equal width
    vocab_size: int = 49408
    context_length: int = 77


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """CLIP's image tower and the two projections into the shared space (reference images only)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    embed_dim: int = 768  # the shared space
    text_width: int = 768  # the space before CLIP's text projection, where phrase features live


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The forward process: betas = linspace(√beta_start, √beta_end, timesteps)²."""

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        if not 1 <= self.timesteps <= 1000:
            raise ValueError(f"timesteps is {self.timesteps}: give 1 to 1000, what the UNet has features of")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}: give numbers between 0 and 1, "
                "the end's no smaller"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything a pipeline is built from."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 512  # pixels a side the model was trained at; the default of a request

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels, a latent cell: 8 for Stable Diffusion.

        The UNet rounds halves up where they are not even.
        """
        return self.vae.downsample_factor

    @property
    def even_multiple(self) -> int:
        """Sides that the UNet halves evenly at every level, as in its training, are multiples of this: 64."""
        return self.size_multiple * self.unet.downsample_factor


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON data."""
    return dataclasses.asdict(config)


def from_dict(cls: type, data: dict[str, Any]) -> Any:
    """A config of type `cls` from plain data, e.g. `from_dict(ModelConfig, json.loads(text))`.

    Lists become tuples; missing fields take their defaults. Raises ValueError naming an unknown field, or one whose
    value is not a number where one belongs.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown field {sorted(unknown)[0]!r}: the known ones are {', '.join(hints)}")
    values = {}
    for name, value in data.items():
        kind = hints[name]
        if isinstance(kind, types.UnionType):  # "SomeConfig | None"
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        if dataclasses.is_dataclass(kind) and value is not None:
            value = from_dict(typing.cast(type, kind), value)
        elif isinstance(value, list):
            value = tuple(value)
        if kind in (int, float) and value is not None:
            value = _number(f"{cls.__name__}: {name}", value, kind)
        values[name] = value
    return cls(**values)


def _number(what: str, value: Any, kind: type) -> int | float:
    """`value` as a whole number or any, however JSON wrote it (1000.0). Raises ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
        raise ValueError(f"{what} is {value!r}: give a {'whole ' if kind is int else ''}number")
    return kind(value)
