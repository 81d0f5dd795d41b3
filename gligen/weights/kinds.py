"""Files of another kind, named for what they are by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BASE = "give a Stable Diffusion v1 base, which GLIGEN's layers belong to"
_LORA = "give one made for Stable Diffusion v1"
_OWN_IMAGES = "GLIGEN's own way to show a thing is a reference image (mode box-text-image)"
_OWN_MAPS = "GLIGEN's own maps are --canny, --depth and their kin, with weights trained for them"
_AUTOENCODER = "give Stable Diffusion v1's with --vae"
_TEXT_ENCODER = "captions are read by CLIP ViT-L/14, which is given with --clip where a checkpoint holds none"
VAE_ALONE = "an autoencoder (VAE) alone: give it with --vae FILE beside --checkpoint"
HYPERNETWORK = f"a hypernetwork, which changes a base's attention by layers of its own: {_LORA} as a LoRA"
_TRANSFORMERS = (  # image and video models without a UNet, each by layers that only it has
    ("HunyuanVideo or HunyuanImage",
     r"\bindividual_token_refiner\.|\btoken_refiner\.refiner_blocks\.|\bimg_attn_qkv\."),
    ("HunyuanDiT", r"\btext_embedding_padding$|\bmlp_t5\.|\btime_extra_emb\."),
    ("Chroma", r"\bdistilled_guidance_layer\."),
    ("Qwen-Image", r"\btransformer_blocks\.\d+\.(img_mod|txt_mod|img_mlp|txt_mlp)\."),
    ("Z-Image", r"(^|\.)(cap|x)_pad_token$|\ball_x_embedder\."),
    ("Lumina-Image", r"\bcap_embedder\.|\bcontext_refiner\.|\btime_caption_embed\."),
    ("Kandinsky 5", r"\b(visual|text)_transformer_blocks\."),
    ("Wan", r"\bhead\.modulation$|\bblocks\.\d+\.cross_attn\.(norm_)?[qkvo]\.|\bcondition_embedder\.time_proj\."),
    ("LTX-Video", r"\bpatchify_proj\."),
    ("CogVideoX", r"\bpatch_embed\.text_proj\."),
    ("Mochi", r"\bt5_yproj\.|\battn\.qkv_x\."),
    ("HiDream", r"\b(double|single)_stream_blocks\."),
    ("AuraFlow", r"\bcond_seq_linear\.|\bdouble_layers\.|\bjoint_transformer_blocks\."),
    ("Cosmos", r"\bblocks\.block\d+\.blocks\.|\badaln_modulation_cross_attn\."),
    ("Sana", r"\battention_y_norm\.|\bcaption_norm\.|\bconv_inverted\.|\binverted_conv\."),
    ("PixArt",
     r"\badaln_single\.|\bcross_attn\.(q|kv)_linear\.|\bcsize_embedder\.|\by_embedder\.y_(embedding$|proj\.)"),
    ("Stable Diffusion 3", r"\bjoint_blocks\.|^transformer_blocks\.\d+\.ff_context\."),
    ("FLUX", r"\bdouble_blocks\.|^single_transformer_blocks\."),
)  # fmt: skip
# Looked for in every file, since these hold some layers of ours too. Each: what it is, a pattern of one tensor's name.
_RELATIVES = (
    ("InteractDiffusion: a relative of GLIGEN whose grounding tokenizer is another: give GLIGEN's own weights",
     r"position_net\.(interaction_embedding|linear_action|null_action_feature)\b|\binteraction_embedding\.emb\."),
    ("InstanceDiffusion: a relative of GLIGEN whose grounding tokenizer is another: give GLIGEN's own weights",
     r"\bscaleu_[bs](_\d+)?$|position_net\.(linears_list|null_(point|scribble|polygon|seg)_feature)\b"),
    (f"a LoRA for the motion module of AnimateDiff, which makes videos: {_LORA}",
     r"\bmotion_modules\..*(\blora[._]|_lora\.)"),
    (f"a LoRA for Stable Diffusion XL: {_LORA}",
     r"^lora_te2_|^text_encoder_2\..*lora|^lora_unet_\w+_transformer_blocks_[1-9]"),
    (f"a LoRA for FLUX: {_LORA}",
     r"^(lora_unet_|lora_transformer_|transformer\.|diffusion_model\.|base_model\.model\.)"
     r"(double_blocks|single_blocks|single_transformer_blocks)[._].*lora"),
    (f"a LoRA for a diffusion transformer, not for a UNet: {_LORA}",
     r"^(transformer|diffusion_model|base_model\.model)\.(transformer_blocks|joint_blocks|blocks|layers)\..*lora"
     r"|^lora_(unet_(blocks|layers|joint_blocks|transformer_blocks)|transformer)_"),
    ("a PhotoMaker adapter: " + _OWN_IMAGES, r"^(id_encoder|lora_weights)\."),
    (f"a ControlNet's low-rank half, which steers another kind of layer than GLIGEN's: {_OWN_MAPS}",
     r"^lora_controlnet$"),
    ("a LoRA: what changes a base, not a base: give it with --lora FILE beside --checkpoint",
     r"\blora[._](up|down|A|B|mid|linear_layer|magnitude_vector)\b|^lora_(unet|te\d?)_|_lora\.(up|down)\."
     r"|\.(hada_w[12]|lokr_w[12]|oft_blocks|oft_diag|diff(_b)?$|dora_scale|b1\.weight_lycoris)"),
    (f"a ControlNet, which steers another kind of layer than GLIGEN's: {_OWN_MAPS}",
     r"^control_model\.|(^|\.)(input_hint_block|zero_convs)\.|^controlnet_(cond_embedding|down_blocks|mid_block|blocks)"
     r"|^controlnet_x_embedder\.|^lllite_"),
    ("the state of a training run: give the adapter.safetensors beside it, which is what was learnt",
     r"^exp_avg(_sq)?\."),
    ("a safety checker, which looks at finished images: it is not used here",
     r"^(concept|special_care)_embeds(_weights)?$"),
    ("SigLIP, whose towers are not CLIP's: give CLIP ViT-L/14", r"\bvision_model\.head\."),
    (f"an AnimateDiff motion module, which makes videos: {_BASE}", r"\bmotion_modules\."),
    (f"Stable Video Diffusion, which makes videos: {_BASE}",
     r"\btime_(stack|mixer)\b|\btemporal_transformer_blocks\."),
    ("a latent consistency model that reads the guidance scale: give its base, and an LCM LoRA with --lora",
     r"\btime_embed(ding)?\.cond_proj\."),
    *((f"{name}, a diffusion transformer, not a UNet: {_BASE}", pattern) for name, pattern in _TRANSFORMERS),
    (f"a diffusion transformer, not a UNet: {_BASE}",
     r"\badaLN_modulation\b|\bscale_shift_table$|^(model\.)?x_embedder\."),
    (f"Stable Cascade or Würstchen, whose latents are another's: {_BASE}",
     r"\b(clip_txt_mapper|clip_txt_pooled_mapper|clip_img_mapper|clip_mapper|effnet_mappers?|cond_mapper)\."),
    (f"Kandinsky 2, whose UNet reads image embeddings: {_BASE}",
     r"\badd_embedding\.image_|\bencoder_hid_proj\.image_|(^|\.)(clip_to_seq|ln_model_n|to_model_dim_n|prd_embedding)\b"),
    (f"DeepFloyd IF, which denoises pixels, not latents: {_BASE}",
     r"\badd_embedding\.(norm1|pool|proj)\b|^encoder_(pooling|proj)\."),
    (f"Kolors, a relative of Stable Diffusion XL: {_BASE}", r"^encoder_hid_proj\.(weight|bias)$"),
    (f"Stable Diffusion XL, not a v1 base: {_BASE}", r"^conditioner\.embedders\.|^add_embedding\."),
    (f"Stable Diffusion with class or size labels (XL, unCLIP or an upscaler), not a v1 base: {_BASE}",
     r"^(model\.diffusion_model\.)?label_emb\.|^class_embedding\."),
    (f"Stable Diffusion 2, not a v1 base: {_BASE}", r"^cond_stage_model\.model\."),
    (f"AltDiffusion, whose text encoder is not CLIP's: {_BASE}", r"^cond_stage_model\.roberta\."),
    ("quantised by another program: give the weights it was made from",
     r"\.(scale_weight|scale_input|weight_scale|absmax|quant_map|quant_state\..+|qweight|SCB)$|(^|\.)scaled_fp8$"),
)  # fmt: skip
# Looked for in files of no layout we read.
_OTHERS = (
    (f"an IP-Adapter, which reads images by layers of its own: {_OWN_IMAGES}",
     r"^(image_proj|ip_adapter|image_proj_model)\.|\bto_k_ip\."),
    (f"a T2I-Adapter, which steers another kind of layer than GLIGEN's: {_OWN_MAPS}",
     r"^(adapter\.)?body\.\d+\.(block[12]|in_conv|resnets)\b|^transformer_layes\."),
    ("an image upscaler or restorer, which works on finished images: it is not used here",
     r"^(params(_ema)?\.)?(conv_first|conv_up1|upconv1|RRDB_trunk|body\.\d+\.rdb1|stylegan_decoder|model\.\d+\.sub)\b"
     r"|\bresidual_group\b"),
    (f"an autoencoder of videos, whose latents are another's: {_AUTOENCODER}",
     r"\b(en|de)coder\.(downsamples|upsamples|middle)\.|\b(en|de)coder\.conv_in\.conv\."),
    (f"an autoencoder with a codebook (VQ), not Stable Diffusion's: {_AUTOENCODER}",
     r"\bquantize\.embedding\.weight$|\bvquantizer\."),
    (VAE_ALONE,
     r"^(first_stage_model\.|autoencoder\.|vae\.)?((en|de)coder\.(conv_in|mid\.|mid_block|(up|down)(_blocks)?\.)"
     r"|(post_)?quant_conv\.)"),
    (f"a tiny autoencoder (TAESD), which makes previews: {_AUTOENCODER}",
     r"^((taesd_)?(en|de)coder\.)?(layers\.)?\d+\.conv\.\d\.weight$"),
    (f"a T5 text encoder: {_TEXT_ENCODER}", r"\bblock\.\d+\.layer\.\d+\.SelfAttention\."),
    (f"a language model: {_TEXT_ENCODER}",
     r"^(model\.|language_model\.)*(layers\.\d+\.self_attn\.q_proj|embed_tokens)\."),
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
