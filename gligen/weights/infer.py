"""What a file was built as, read off its tensors' shapes.

Shapes tell almost everything. They cannot tell the number of attention heads (8 in every UNet, width/64 in CLIP),
gatedSA2 from gatedSA, canny from depth, or the noise schedule: a config stored with the file adds those (original.py).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gligen.config import (
    GroundingConfig,
    ImageEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from gligen.diffusion.schedule import Schedule
from gligen.grounding import KINDS, kind_of
from gligen.modes import MODES
from gligen.weights.tensors import LazyTensor

Tensors = Mapping[str, LazyTensor]
FIRST_CONV = "input_blocks.0.0."  # what all names of the convolution that reads the latent begin with
FIRST_WEIGHT = f"{FIRST_CONV}weight"
GROUNDING_PREFIXES = ("position_net.", "downsample_net.")


def is_grounding_name(name: str) -> bool:
    """True for what GLIGEN adds beside the first convolution: tokenizer, downsampler, fusers."""
    return name.startswith(GROUNDING_PREFIXES) or ".fuser." in name


def has_whole_unet(unet: Tensors) -> bool:
    """Whether these tensors are a whole UNet's, not a pruned one's or an adapter's."""
    return "time_embed.0.weight" in unet


def fitting_modes(unet: Tensors) -> tuple[str, ...]:
    """All rows of gligen.modes that these tensors can be of; empty if there is no grounding in them.

    Without a first convolution (pruned files) inpainting cannot be meant: its convolution is a trained part.
    """
    if not any(is_grounding_name(name) for name in unet):
        return ()
    kind = next((name for name, kind in KINDS.items() if kind.marker in unet), None)
    modes = [mode for mode in MODES.values() if mode.kind == kind and KINDS[mode.kind].matches(mode, unet)]
    if FIRST_WEIGHT in unet:
        extra = unet[FIRST_WEIGHT].shape[1] - latent_channels(unet)
        modes = [mode for mode in modes if mode.extra_channels == extra]
    else:
        modes = [mode for mode in modes if not mode.is_inpainting]
    return tuple(mode.name for mode in modes)


def possible_modes(unet: Tensors) -> tuple[str, ...]:
    """The modes a file with these tensors can be of that does not say: the published ones that fit, if any do.

    canny and depth are the same network, so both come back; a pruned map file could be any of four.
    """
    fitting = fitting_modes(unet)
    return tuple(name for name in fitting if MODES[name].original) or fitting


def latent_channels(unet: Tensors) -> int:
    """Channels of a latent: what the UNet gives is what it takes, before a mode's extra ones (SD: 4)."""
    return unet["out.2.weight"].shape[0] if "out.2.weight" in unet else 4


def infer_grounding(unet: Tensors, mode: str) -> GroundingConfig:
    """The grounding tokenizer's sizes, given the mode."""
    fields: dict[str, Any] = {"mode": mode}
    if any(".fuser." in name for name in unet) and not any(".fuser.linear." in name for name in unet):
        fields["fuser_type"] = "gatedCA"
    kind = kind_of(MODES[mode])
    if (last := unet.get(f"position_net.{kind.mlp}.4.weight")) is not None:
        fields["token_dim"], fields["hidden_dim"] = last.shape
    if kind.marker in unet:
        fields |= kind.sizes(unet)
    return GroundingConfig(**fields)


def infer_unet(unet: Tensors, mode: str | None = None) -> UNetConfig:
    """The UNet's sizes from a whole UNet; of a pruned one only what is visible, the rest is SD v1's.

    mode: of the grounding, one of `possible_modes(unet)`; None for a base model.
    """
    grounding = infer_grounding(unet, mode) if mode else None
    if not has_whole_unet(unet):
        return UNetConfig(grounding=grounding)
    model_channels, first_channels = unet[FIRST_WEIGHT].shape[:2]
    downs = {int(match[1]) for name in unet if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))}
    blocks = 1 + max(int(name.split(".")[1]) for name in unet if name.startswith("input_blocks."))
    levels = len(downs) + 1
    # The input convolution, then per level its residual blocks and, except behind the last, a downsampler.
    num_res_blocks = (blocks - 1 - len(downs)) // levels
    mult, attention = [], []
    for level in range(levels):
        block = f"input_blocks.{1 + level * (num_res_blocks + 1)}"
        mult.append(unet[f"{block}.0.out_layers.3.weight"].shape[0] // model_channels)
        if f"{block}.1.norm.weight" in unet:
            attention.append(2**level)
            if len(unet[f"{block}.1.proj_in.weight"].shape) != 4:
                raise ValueError("its transformers project linearly: Stable Diffusion 2 or XL, not a v1 UNet")
    context = next((t for name, t in unet.items() if name.endswith(".attn2.to_k.weight")), None)
    return UNetConfig(
        in_channels=latent_channels(unet) if grounding else first_channels,
        out_channels=unet["out.2.weight"].shape[0],
        model_channels=model_channels,
        channel_mult=tuple(mult),
        num_res_blocks=num_res_blocks,
        attention_downsamples=tuple(attention),
        norm_groups=norm_groups(model_channels),
        context_dim=context.shape[1] if context else UNetConfig.context_dim,
        grounding=grounding,
    )


def infer_vae(vae: Tensors) -> VAEConfig:
    """The autoencoder's sizes, but for its scale factor, which no shape shows."""
    base_channels, in_channels = vae["encoder.conv_in.weight"].shape[:2]
    blocks = _count(vae, r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    return VAEConfig(
        in_channels=in_channels,
        base_channels=base_channels,
        channel_mult=tuple(
            vae[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] // base_channels for level in range(len(blocks))
        ),
        num_res_blocks=blocks[0],
        latent_channels=vae["post_quant_conv.weight"].shape[1],
        norm_groups=norm_groups(base_channels),
    )


def norm_groups(channels: int) -> int:
    """The number of groups as published, or as many as can be: shapes do not show it, a smaller model's config does."""
    return math.gcd(UNetConfig.norm_groups, channels)


def infer_text_encoder(text: Tensors) -> TextEncoderConfig:
    """The text encoder's kind and sizes; heads are as wide as in the published ones, 64."""
    if "token_emb.weight" in text:
        vocab_size, width = text["token_emb.weight"].shape
        inner = text["attn_layers.layers.0.1.to_q.weight"].shape[0]
        head_dim = min(64, inner)
        norms = [n for n in text if re.fullmatch(r"attn_layers\.layers\.\d+\.0\.weight", n)]
        return TextEncoderConfig(
            kind="bert",
            width=width,
            layers=len(norms) // 2,  # attention and feed-forward are numbered apart
            heads=inner // head_dim,
            head_dim=head_dim,
            vocab_size=vocab_size,
            context_length=text["pos_emb.emb.weight"].shape[0],
        )
    vocab_size, width = text["token_embedding.weight"].shape
    return TextEncoderConfig(
        width=width,
        layers=sum(name.endswith(".ln_1.weight") for name in text),
        heads=max(1, width // 64),
        vocab_size=vocab_size,
        context_length=text["positional_embedding"].shape[0],
    )


def infer_image_encoder(image: Tensors) -> ImageEncoderConfig:
    """The sizes of CLIP's image tower; heads are as wide as in the published one, 64."""
    width, _, patch_size, _ = image["visual.conv1.weight"].shape
    tokens = image["visual.positional_embedding"].shape[0] - 1  # one is the class token
    fields: dict[str, int] = {}
    if "visual.proj" in image:
        fields["embed_dim"] = image["visual.proj"].shape[1]
    if "text_projection" in image:
        fields["text_width"] = image["text_projection"].shape[0]
    return ImageEncoderConfig(
        image_size=math.isqrt(tokens) * patch_size,
        patch_size=patch_size,
        width=width,
        layers=sum(re.fullmatch(r"visual\..*\.ln_1\.weight", name) is not None for name in image),
        heads=max(1, width // 64),
        **fields,
    )


def infer_schedule(buffers: Tensors) -> dict[str, Any]:
    """Fields of a ScheduleConfig from the buffers that a checkpoint holds of its forward process (the only numbers
    that are read to tell what a file is); empty for Stable Diffusion's own, or where there are none.

    Raises ValueError for a schedule of another shape than `ScheduleConfig`'s.
    """
    if "alphas_cumprod" not in buffers:
        return {}
    stored = buffers["alphas_cumprod"]
    bar = stored.read(dtype=torch.float64).numpy()
    # what storing them has rounded off; half precision is used for whole files
    tolerance = 4 * torch.finfo(stored.dtype).eps if stored.dtype.is_floating_point else 0.0

    def fits(config: ScheduleConfig) -> bool:
        schedule = Schedule(**dataclasses.asdict(config))
        return bar.shape == (config.timesteps,) and np.allclose(bar, schedule.alphas_cumprod, rtol=tolerance, atol=1e-7)

    if fits(ScheduleConfig()):
        return {}
    betas = buffers.get("betas")
    if betas is not None and betas.shape == bar.shape and 1 <= len(bar) <= 1000:
        ends = betas.read(dtype=torch.float64)[[0, -1]].tolist()
        start, end = (float(f"{beta:.6g}") for beta in ends)  # float32 has 7 digits
        found: dict[str, Any] = {"timesteps": len(bar), "beta_start": start, "beta_end": end}
        if 0 < start <= end < 1 and fits(ScheduleConfig(**found)):
            return found
    last = f", the last alphas_cumprod is {bar[-1]:.3g}" if bar.size else ""
    raise ValueError(
        f"its noise schedule is not of betas whose roots are evenly spaced (scaled_linear), the only one known{last}"
    )


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """The 12 buffers that Stable Diffusion files hold of the forward process, computed in float64, as float32.

    Names as in LDM; the posterior's are those of q(x_{t-1} | x_t, x_0), DDPM eqs. 6 and 7.
    """
    schedule = Schedule(**dataclasses.asdict(config))
    betas, bar = schedule.betas, schedule.alphas_cumprod
    before = np.append(1.0, bar[:-1])
    variance = betas * (1.0 - before) / (1.0 - bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - bar),
        "log_one_minus_alphas_cumprod": np.log(1.0 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / bar - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # the first is 0
        "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - bar),
        "posterior_mean_coef2": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - bar),
    }
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in buffers.items()}


def infer_config(parts: Mapping[str, Tensors], mode: str | None) -> ModelConfig:
    """Every part's config; a part that is not there (or whose file is incomplete) has Stable Diffusion v1's.

    Raises ValueError naming the part whose names do not fit together.
    """
    fields: dict[str, Any] = {}
    for name, infer in {
        "unet": lambda unet: infer_unet(unet, mode),
        "vae": infer_vae,
        "text_encoder": infer_text_encoder,
        "image_encoder": infer_image_encoder,
    }.items():
        if not parts.get(name) or (name == "image_encoder" and "visual.conv1.weight" not in parts[name]):
            continue
        try:
            fields[name] = infer(parts[name])
        except KeyError as error:
            raise ValueError(f"its {name} has no tensor {error}: is the file whole?") from error
        except (IndexError, ArithmeticError) as error:
            raise ValueError(f"its {name} has a tensor of an unexpected shape") from error
    config = ModelConfig(**fields)
    # SD works on 64×64 latents, LDM text2img-large (context of 1280) on 32×32.
    if "text_encoder" in fields and config.text_encoder.kind == "bert":
        config = dataclasses.replace(config, image_size=256)
    return config


def _count(tensors: Tensors, pattern: str) -> list[int]:
    """The number of second indices each first index has, for names like `stages.<first>.<second>.gamma`."""
    seconds: dict[int, int] = {}
    for name in tensors:
        if match := re.fullmatch(pattern, name):
            seconds[int(match[1])] = max(seconds.get(int(match[1]), 0), int(match[2]) + 1)
    return [seconds[i] for i in range(len(seconds))]
