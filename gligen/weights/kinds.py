"""Files of another kind, named for what they are by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Looked for in every file, since these hold some layers of ours too. Each: what it is, a pattern of one tensor's name.
_RELATIVES = (
    ("InteractDiffusion: a relative of GLIGEN whose grounding tokenizer is another",
     r"position_net\.(interaction_embedding|linear_action|null_action_feature)\b|\binteraction_embedding\.emb\."),
    ("InstanceDiffusion: a relative of GLIGEN whose grounding tokenizer is another",
     r"\bscaleu_[bs](_\d+)?$|position_net\.(linears_list|null_(point|scribble|polygon|seg)_feature)\b"),
    ("a LoRA: what changes a base, not a base: give it with --lora FILE beside --checkpoint",
     r"\blora[._](up|down|A|B|mid|linear_layer|magnitude_vector)\b|^lora_(unet|te\d?)_|_lora\.(up|down)\."
     r"|\.(hada_w[12]|lokr_w[12]|oft_blocks|oft_diag|diff(_b)?$|dora_scale|b1\.weight_lycoris)"),
    ("a ControlNet, which steers another kind of layer than GLIGEN's",
     r"^control_model\.|(^|\.)(input_hint_block|zero_convs)\.|^controlnet_(cond_embedding|down_blocks|mid_block)"
     r"|^lllite_"),
    ("the state of a training run: give the adapter.safetensors beside it, which is what was learnt",
     r"^exp_avg(_sq)?\."),
    ("an AnimateDiff motion module", r"\bmotion_modules\."),
    ("Stable Video Diffusion", r"\btime_(stack|mixer)\b|\btemporal_transformer_blocks\."),
    ("Stable Diffusion 3", r"\bjoint_blocks\.|^transformer_blocks\.\d+\.ff_context\."),
    ("FLUX", r"\bdouble_blocks\.|^single_transformer_blocks\."),
    ("a diffusion transformer, not a UNet", r"\badaLN_modulation\b|\bscale_shift_table$|^(model\.)?x_embedder\."),
    ("Stable Diffusion XL, not a v1 base", r"^conditioner\.embedders\.|^add_embedding\."),
    ("Stable Diffusion with class or size labels (XL, unCLIP or an upscaler), not a v1 base",
     r"^(model\.diffusion_model\.)?label_emb\.|^class_embedding\."),
    ("Stable Diffusion 2, not a v1 base", r"^cond_stage_model\.model\."),
    ("quantised by another program: give the weights it was made from",
     r"\.(scale_weight|scale_input|weight_scale|absmax|quant_map|quant_state\..+|qweight|SCB)$|(^|\.)scaled_fp8$"),
)  # fmt: skip
# Looked for in files of no layout we read.
_OTHERS = (
    ("an IP-Adapter", r"^(image_proj|ip_adapter|image_proj_model)\."),
    ("a T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block[12]|in_conv|resnets)\b"),
    ("an image upscaler or restorer",
     r"^(params(_ema)?\.)?(conv_first|conv_up1|upconv1|RRDB_trunk|body\.\d+\.rdb1|stylegan_decoder|model\.\d+\.sub)\b"
     r"|\bresidual_group\b"),
    ("an autoencoder (VAE) alone: give it with --vae FILE beside --checkpoint",
     r"^(first_stage_model\.|autoencoder\.|vae\.)?((en|de)coder\.(conv_in|mid\.|mid_block|(up|down)(_blocks)?\.)"
     r"|(post_)?quant_conv\.)"),
    ("a tiny autoencoder (TAESD)", r"^((taesd_)?(en|de)coder\.)?(layers\.)?\d+\.conv\.\d\.weight$"),
    ("a T5 text encoder", r"\bblock\.\d+\.layer\.\d+\.SelfAttention\."),
    ("the training state of an optimizer", r"^(state\.\d+\.)?exp_avg(_sq)?$"),
    ("a textual inversion: words for a prompt, not a model", r"^(string_to_param\..+|emb_params|clip_[lg]|<[^>]+>)$"),
)  # fmt: skip


def relative(names: Iterable[str]) -> str | None:
    """The kind of a file that holds layers of ours and is another model all the same; None if nothing speaks for it."""
    return _first(_RELATIVES, names)


def foreign(names: Iterable[str]) -> str | None:
    """The kind of a file of no layout we read, as the rest of a sentence 'FILE: …'; None where it is not known."""
    names = list(names)
    return _first(_RELATIVES, names) or _first(_OTHERS, names)


def _first(kinds: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    # A network repeats itself: without the numbers of its blocks a tenth of the names is left to search.
    text = "\n".join({_NUMBER.sub("0", name) for name in names})
    return next((kind for kind, pattern in kinds if re.search(pattern, text, re.MULTILINE)), None)


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


# What a UNet is whose first convolution reads more than a latent, by how many channels it reads.
_WIDER = {
    5: "a depth-to-image base",
    7: "an upscaling base",
    8: "a base that edits images by instruction (InstructPix2Pix)",
    9: "an inpainting base",
}


def wider_base(reads: int, latent: int) -> str:
    """The kind of an ungrounded base whose UNet reads `reads` channels where a latent has `latent`."""
    kind = _WIDER.get(reads, "a base of another kind") if latent == 4 else "a base of another kind"
    return (
        f"{kind}: its UNet reads {reads} channels, a latent has {latent}: give a text-to-image base "
        "(Stable Diffusion v1), which GLIGEN's layers belong to"
    )
