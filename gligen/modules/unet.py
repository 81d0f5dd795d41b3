"""LDM's UNet with GLIGEN's layers in it.

`forward(x, t, context, grounding)` is what training calls: everything at once. Sampling calls the two halves:
`condition(...)` once per request (grounding tokens, the keys and values every block makes of them and of the caption,
map features: nothing in it depends on the step) and `denoise(x, t, conditioning, β)` at every step.

Legend: B batch, (h, w) latent size, M caption tokens, N grounding tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.config import UNetConfig
from gligen.modules.downsampler import MapDownsampler
from gligen.modules.embeddings import NUM_TIMESTEPS, timestep_embedding
from gligen.modules.fusers import Fuser, GateScale
from gligen.modules.position_net import GroundingInputs, build_position_net
from gligen.modules.resample import Upsample
from gligen.modules.transformer import BlockConditioning, SpatialTransformer, repeat_to


@dataclass(frozen=True)
class Conditioning:
    """All that a request says to the UNet, made once and used at every step.

    blocks: what each transformer block needs, in order of execution.
    extra: (B, C', h, w) channels that join the latent in front of the first convolution, or None.
    """

    blocks: tuple[BlockConditioning, ...]
    extra: Tensor | None = None


class ResBlock(nn.Module):
    """Two convolutions, the timestep's embedding added between them, as a residual. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        # the Identity stands where LDM has a dropout of 0, so that names agree
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]  # (B, C', H, W) + (B, C', 1, 1)
        return self.skip_connection(x) + self.out_layers(h)  # (B, C', H, W)


class Downsample(nn.Module):
    """Half the size by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (B, C, ⌈H/2⌉, ⌈W/2⌉)


class Stage(nn.ModuleList):
    """One entry of LDM's block lists: a skip connection joined on, then its layers in order.

    The unit that `gligen.runtime.compile_blocks` compiles: entries of one make share their code, and nothing between
    their layers runs by itself.
    """

    def forward(
        self,
        h: Tensor,
        emb: Tensor,
        cond: BlockConditioning | None,
        gate_scale: GateScale = 1.0,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """h: (B, C, H, W); emb: (B, E) of the timestep; cond: of the stage's transformer, if it has one; skip: (B, C',
        H, W), what the encoder's entry of the same size gave; size: (height, width) after the stage, where it is not
        twice the one before (sizes that do not halve evenly are rounded up on the way down). cond may be of n·B samples
        (`UNetModel.denoise`): so is then what follows, while emb, and a skip from before, have B.
        """
        if skip is not None:
            h = torch.cat([h, repeat_to(skip, like=h)], dim=1)  # (B, C + C', H, W)
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, repeat_to(emb, like=h))
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, cond, gate_scale)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            else:
                h = layer(h)
        return h

    @property
    def has_upsample(self) -> bool:
        return any(isinstance(layer, Upsample) for layer in self)

    @property
    def has_transformer(self) -> bool:
        return any(isinstance(layer, SpatialTransformer) for layer in self)


class Head(nn.Sequential):
    """GroupNorm, SiLU and the last convolution: features to ε."""


class UNetModel(nn.Module):
    """ε_θ(x_t, t, caption, grounding) (latent diffusion §3.3). Names and shapes are those of published files."""

    base_conv_weight: Tensor | None
    base_conv_bias: Tensor | None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.timestep_features: Tensor | None = None  # (T, model_channels) float32, made at the first step
        channels = config.model_channels
        emb_channels = 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )

        grounding = config.grounding

        def res_block(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, emb_channels, out_channels, config.norm_groups)

        def transformer(channels: int) -> SpatialTransformer:
            fuser_type, token_dim = (grounding.fuser_type, grounding.token_dim) if grounding else (None, 0)
            return SpatialTransformer(
                channels, config.num_heads, config.context_dim, config.norm_groups, fuser_type, token_dim
            )

        def layers(in_channels: int, out_channels: int, downsample: int) -> list[nn.Module]:
            """A residual block and, where this level has one, a transformer."""
            made: list[nn.Module] = [res_block(in_channels, out_channels)]
            if downsample in config.attention_downsamples:
                made.append(transformer(out_channels))
            return made

        first = nn.Conv2d(config.first_conv_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage([first])])
        skips = [channels]  # channels of every input block's output, which the output blocks take back
        current, downsample = channels, 1
        last = len(config.channel_mult) - 1
        for level, mult in enumerate(config.channel_mult):
            width = mult * channels
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(layers(current, width, downsample)))
                current = width
                skips.append(current)
            if level < last:
                self.input_blocks.append(Stage([Downsample(current)]))
                skips.append(current)
                downsample *= 2

        self.middle_block = Stage([res_block(current, current), transformer(current), res_block(current, current)])

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            width = mult * channels
            for i in range(config.num_res_blocks + 1):
                made = layers(current + skips.pop(), width, downsample)
                current = width
                if level > 0 and i == config.num_res_blocks:
                    made.append(Upsample(current))
                    downsample //= 2
                self.output_blocks.append(Stage(made))

        self.out = Head(
            nn.GroupNorm(config.norm_groups, current),
            nn.SiLU(),
            nn.Conv2d(current, config.out_channels, 3, padding=1),
        )
        if grounding:
            self.position_net = build_position_net(grounding)
            if grounding.spec.is_map:
                self.downsample_net = MapDownsampler(grounding)

        # The base model's own first convolution, for the ungated steps of map modes, whose own was trained. It is not
        # part of the published state dict, so it is held beside it.
        self.register_buffer("base_conv_weight", None, persistent=False)
        self.register_buffer("base_conv_bias", None, persistent=False)

    @property
    def first_conv(self) -> nn.Conv2d:
        """`input_blocks.0.0`: the only layer of the base model whose shape a mode may change."""
        return cast(nn.Conv2d, cast(Stage, self.input_blocks[0])[0])

    @property
    def transformers(self) -> list[SpatialTransformer]:
        """Every transformer, in order of execution."""
        return [layer for layer in self.modules() if isinstance(layer, SpatialTransformer)]

    @property
    def fusers(self) -> dict[str, Fuser]:
        """Every fuser, by the name of its transformer, in order of execution; none where the UNet is ungrounded."""
        layers = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, SpatialTransformer)]
        return {name: layer.block.fuser for name, layer in layers if hasattr(layer.block, "fuser")}

    def set_base_conv(self, weight: Tensor, bias: Tensor) -> None:
        """Give the base model's `input_blocks.0.0`: weight (C, in_channels, 3, 3), bias (C,)."""
        like = self.first_conv.weight
        self.register_buffer("base_conv_weight", weight.to(like), persistent=False)
        self.register_buffer("base_conv_bias", bias.to(like), persistent=False)

    def ground(self, grounding: GroundingInputs) -> Tensor:
        """Grounding tokens (B, N, D) of grounding inputs (gligen/modules/position_net.py)."""
        return self.position_net(**grounding)

    def map_channels(self, map: Tensor, height: int, width: int) -> Tensor:
        """The map's extra channels (B, C', h, w) for a latent of (height, width)."""
        return self.downsample_net(map, height, width)

    def condition(
        self, context: Tensor, grounding: GroundingInputs | None = None, extra: Tensor | None = None
    ) -> Conditioning:
        """Everything that does not change between steps.

        context: (B, M, context_dim) caption tokens.
        grounding: inputs of the tokenizer; None leaves the fusers out, as if β were 0.
        extra: (B, C', h, w) for the B samples of `denoise`, of `map_channels` or the masked latent with its mask
            (B, 5, h, w).
        """
        tokens = None if grounding is None else self.ground(grounding)
        return Conditioning(tuple(t.block.condition(context, tokens) for t in self.transformers), extra)

    def denoise(self, x: Tensor, timesteps: Tensor, cond: Conditioning, gate_scale: GateScale = 1.0) -> Tensor:
        """ε of one step.

        x: (B, in_channels, h, w); timesteps: (B,) int64 in [0, T); gate_scale: β of scheduled sampling. Where β is the
        number 0 the fusers are not computed at all, and a map mode goes back to the base model's first convolution.
        cond: of the B samples, or of n·B of which sample i reads x[i mod B], as the branches of guidance do: what
        comes before the first look at a caption or a grounding token is then computed for B samples alone.
        Returns ε of cond's samples, (n·B, out_channels, h, w). Raises ValueError where that convolution is needed but
        was not given, where the mode's extra channels are missing, or for a cond of more samples that are not n·B.
        """
        if (samples := len(cond.blocks[0].caption[0])) > len(x) and samples % len(x):
            raise ValueError(f"conditioning is of {samples} samples, the latents are {len(x)}: give a multiple of them")
        emb = self.embed_time(timesteps, x.dtype)  # (B, 4·model_channels)
        is_open = not isinstance(gate_scale, (int, float)) or gate_scale != 0
        blocks = iter(cond.blocks if is_open else [b._replace(grounding=None) for b in cond.blocks])

        def run(stage: Stage, h: Tensor, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
            return stage(h, emb, next(blocks) if stage.has_transformer else None, gate_scale, skip, size)

        h = self._first_conv(x, cond.extra, is_open)  # (B, model_channels, h, w)
        skips = [h]
        for stage in cast(list[Stage], self.input_blocks[1:]):
            h = run(stage, h)  # wider, and half as large, from level to level
            skips.append(h)
        h = run(self.middle_block, h)  # (B, channel_mult[-1]·model_channels, …) at the lowest resolution
        for stage in cast(list[Stage], self.output_blocks):
            skip = skips.pop()
            size = None
            if stage.has_upsample:
                height, width = skips[-1].shape[2:]  # of what joins next
                is_twice = (height, width) == (2 * h.shape[2], 2 * h.shape[3])
                size = None if is_twice else (height, width)
            h = run(stage, h, skip, size)  # narrower and larger from level to level
        return self.out(h)  # (B, out_channels, h, w)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) timesteps -> (B, 4·model_channels), what every residual block receives of the step.

        The sinusoidal features of all timesteps are made once, on the CPU: sine and cosine differ between devices in
        their last place, and a step that is recorded can copy nothing from the host.
        """
        if self.timestep_features is None or self.timestep_features.device != timesteps.device:
            with torch.inference_mode(False):  # training may come after sampling
                every = timestep_embedding(torch.arange(NUM_TIMESTEPS), self.config.model_channels)  # (T, C)
                self.timestep_features = every.to(timesteps.device)
        return self.time_embed(self.timestep_features[timesteps.long()].to(dtype))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        grounding: GroundingInputs | None = None,
        extra: Tensor | None = None,
        gate_scale: GateScale = 1.0,
    ) -> Tensor:
        """`condition` and `denoise` in one call, so that a training step sees every parameter."""
        return self.denoise(x, timesteps, self.condition(context, grounding, extra), gate_scale)

    def _first_conv(self, x: Tensor, extra: Tensor | None, is_open: bool) -> Tensor:
        grounding = self.config.grounding
        if grounding and grounding.spec.is_map and not is_open:
            if self.base_conv_weight is None:
                raise ValueError(
                    f"ungated steps of mode {grounding.mode} need the base model's first convolution: give the base "
                    "checkpoint too, or keep grounding on throughout (schedule 1 0 0)"
                )
            return F.conv2d(x, self.base_conv_weight, self.base_conv_bias, padding=1)
        if grounding and grounding.spec.extra_channels:
            if extra is None:
                raise ValueError(f"mode {grounding.mode} needs {grounding.spec.extra_channels} extra channels")
            x = torch.cat([x, extra], dim=1)  # (B, in_channels + C', h, w)
        return self.first_conv(x)
