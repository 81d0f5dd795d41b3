"""What the config.json files of diffusers and transformers say: each key honoured, harmless, or refused by name.

Whatever changes what a network computes and is not built here is refused. Keys that nobody knew when this was written
are pointed out unless they are off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class FoundConfig:
    """A partial ModelConfig as plain data, and notes on what it leaves open."""

    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: FoundConfig) -> None:
        self.config |= other.config
        self.warnings += other.warnings


# Each key with the only values that are computed here; all others are refused. None is a key's usual "off".
_UNET = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "use_linear_projection": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default", "gated", "gated-text-image"),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "quantization_config": (None,),
}
# Shown by the tensors, honoured below, or without effect on what is computed.
_UNET_OTHER = {
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
    "attention_head_dim", "num_attention_heads", "norm_num_groups", "upcast_attention", "dropout",
    "addition_embed_type_num_heads", "torch_dtype",
}  # fmt: skip
_VAE = {
    "_class_name": ("AutoencoderKL",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "quantization_config": (None,),
}
_VAE_OTHER = {
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
    "sample_size", "scaling_factor", "force_upcast", "torch_dtype",
}  # fmt: skip
_SCHEDULER = {
    "beta_schedule": ("scaled_linear",),
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": (False,),
    "trained_betas": (None,),
    "use_flow_sigmas": (None, False),
    "snr_shift_scale": (None, 1),
}
# transformers writes a hundred keys that belong to other kinds of model, so unknown ones mean nothing there.
_CLIP = {
    "hidden_act": ("quick_gelu",),
    "layer_norm_eps": (1e-5,),
    "quantization_config": (None,),
}


def _check(where: str, stated: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for the first key whose value, or one of whose values, is none of those computed here."""
    for key, accepted in known.items():
        value = stated.get(key, accepted[0])
        values = value if isinstance(value, list) else [value]
        if (isinstance(value, list) and None in accepted) or any(one not in accepted for one in values):
            only = " or ".join(repr(one) for one in accepted)
            raise ValueError(f"{where} says {key} is {_short(value)}: only {only} is computed here")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _unknown(where: str, stated: Mapping[str, Any], *known: Any) -> list[str]:
    """A line for every key that is not known and not off."""
    names = [
        key for key, value in stated.items()
        if not key.startswith("_") and not any(key in one for one in known) and value not in (None, False)
    ]  # fmt: skip
    return [f"{where} says {name} is {_short(stated[name])}, which is not known here and was ignored" for name in names]


def unet_config(stated: Mapping[str, Any], where: str) -> FoundConfig:
    """A UNet2DConditionModel's heads and groups. where: the file's name, for messages."""
    # diffusers calls the number of heads `attention_head_dim` in Stable Diffusion 1's configs.
    heads = stated.get("num_attention_heads") or stated.get("attention_head_dim")
    if isinstance(heads, list):
        if len(set(heads)) != 1:
            raise ValueError("its heads differ per level: Stable Diffusion 2 or XL, not a v1 UNet")
        heads = heads[0]
    _check(where, stated, _UNET)
    unet = {"num_heads": heads} if heads else {}
    unet |= _groups(where, stated)
    return FoundConfig(config={"unet": unet} if unet else {}, warnings=_unknown(where, stated, _UNET, _UNET_OTHER))


def vae_config(stated: Mapping[str, Any], where: str) -> FoundConfig:
    """An AutoencoderKL's scale and groups."""
    _check(where, stated, _VAE)
    vae = {"scale_factor": stated["scaling_factor"]} if stated.get("scaling_factor") is not None else {}
    vae |= _groups(where, stated)
    return FoundConfig(config={"vae": vae} if vae else {}, warnings=_unknown(where, stated, _VAE, _VAE_OTHER))


def _groups(where: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    if "norm_num_groups" not in stated:
        return {}
    groups = stated["norm_num_groups"]
    if not isinstance(groups, int):
        raise ValueError(f"{where} says norm_num_groups is {groups}: give a number of groups")
    return {"norm_groups": groups}


def schedule_config(stated: Mapping[str, Any], where: str) -> FoundConfig:
    """The noise schedule; how to sample from it is the request's to say."""
    if not stated:
        return FoundConfig()
    if str(stated.get("_class_name", "")).startswith("FlowMatch"):
        raise ValueError(f"{where} is of a {stated['_class_name']}: only models that predict epsilon are known")
    # left out, they are the defaults of whatever class it is: mostly 'linear' from 0.0001 to 0.02
    if lost := [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in stated]:
        raise ValueError(
            f"{where} says no {lost[0]}, so its noise schedule is not known (Stable Diffusion's is written)"
        )
    _check(where, stated, _SCHEDULER)
    names = {"num_train_timesteps": "timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
    found = {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    cut = [
        f"{where} says {key}: the samplers here do not cut off what they predict"
        for key in ("clip_sample", "thresholding") if stated.get(key)
    ]  # fmt: skip
    return FoundConfig(config={"schedule": found} if found else {}, warnings=cut)


def tower_config(part: str, stated: Mapping[str, Any], where: str) -> FoundConfig:
    """A CLIP tower's heads. part: 'text_encoder' or 'image_encoder'."""
    kind = stated.get("model_type", "clip")
    if not str(kind).startswith("clip"):
        raise ValueError(f"{where} is of a {kind} model: only CLIP's towers are known")
    _check(where, stated, _CLIP)
    heads = stated.get("num_attention_heads")
    return FoundConfig(config={part: {"heads": heads}} if heads else {})


def clip_config(stated: Mapping[str, Any]) -> FoundConfig:
    """Both towers' heads from the config.json of a CLIP folder, or the one's of a tower's."""
    vision = stated.get("vision_config") if stated.get("model_type") == "clip" else stated
    if stated.get("model_type") == "clip_text_model":
        vision, text = {}, stated
    else:
        text = stated.get("text_config") or {}
    found = tower_config("image_encoder", vision or {}, "config.json")
    found.add(tower_config("text_encoder", text, "config.json"))
    return found


PAD = "<|endoftext|>"


def check_tokenizer(stated: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a tokenizer that fills captions up with another token than CLIP's end-of-text."""
    pad = stated.get("pad_token", PAD)
    pad = pad.get("content", PAD) if isinstance(pad, dict) else pad
    if pad not in (PAD, None):
        raise ValueError(f"{where} pads captions with {pad!r}: only {PAD!r}, Stable Diffusion 1's, is known")


def check_preprocessor(stated: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for reference images that are normalised otherwise than CLIP's."""
    # Mean and spread of CLIP's training images; modules/clip.py has them to all digits.
    for key, usual in (("image_mean", (0.4815, 0.4578, 0.4082)), ("image_std", (0.2686, 0.2613, 0.2758))):
        value = stated.get(key, usual)
        if len(value) != 3 or any(abs(one - other) > 1e-3 for one, other in zip(value, usual, strict=True)):
            raise ValueError(f"{where} says {key} is {value}: only CLIP's {list(usual)} is known")
