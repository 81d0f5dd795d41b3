"""Files of another kind are named for what they are; bases of another kind are refused wherever one is opened."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gligen import cli
from gligen.loading import open_model
from gligen.training.presets import TrainConfig
from gligen.training.trainable import open_base
from gligen.weights import __main__ as command
from gligen.weights import combine, missing_for_sampling, read_weights, save_model
from gligen.weights.kinds import relative
from tests.conftest import filled, manifest
from tests.generated import generated_base, generated_model
from tests.weights.helpers import VOCAB, gligen_parts, pruned_state, sd_state, write_gligen, write_sd


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def vectors(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name in names}


UNET = "model.diffusion_model."
OTHERS = {
    "kohya LoRA": ("a LoRA", vectors(
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_x.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha")),
    "peft LoRA": ("a LoRA", vectors("base_model.model.down_blocks.0.attn1.to_q.lora_A.weight")),
    "diffusers LoRA": ("a LoRA", vectors("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight")),
    "LoHa": ("a LoRA", vectors("lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b")),
    "LoKr": ("a LoRA", vectors("lycoris_x.lokr_w1", "lycoris_x.alpha")),
    "ControlNet": ("a ControlNet", vectors(
        "control_model.input_blocks.0.0.weight", "control_model.out.2.bias", "control_model.zero_convs.0.0.bias"
    )),
    "diffusers ControlNet": ("a ControlNet", vectors(
        "controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")),
    "A1111 ControlNet": ("a ControlNet", vectors("input_hint_block.0.weight", "zero_convs.0.0.weight")),
    "T2I-Adapter": ("a T2I-Adapter", vectors("body.0.block1.weight", "body.0.block2.weight", "conv_in.weight")),
    "IP-Adapter": ("an IP-Adapter", vectors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    "AnimateDiff": ("an AnimateDiff motion module", vectors(
        "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight")),
    "SDXL": ("Stable Diffusion XL", vectors(
        "conditioner.embedders.0.transformer.text_model.x", UNET + "input_blocks.0.0.weight")),
    "SDXL UNet": ("class or size labels (XL", vectors(UNET + "label_emb.0.0.weight", UNET + "time_embed.0.weight")),
    "SD 2": ("Stable Diffusion 2", vectors("cond_stage_model.model.positional_embedding", UNET + "out.2.weight")),
    "SD 3": ("Stable Diffusion 3", vectors(UNET + "joint_blocks.0.x_block.attn.qkv.weight")),
    "FLUX": ("FLUX", vectors("double_blocks.0.img_attn.qkv.weight", "img_in.weight")),
    "SVD": ("Stable Video Diffusion", vectors(UNET + "input_blocks.1.0.time_stack.in_layers.0.weight")),
    "Wan": ("Wan, a diffusion transformer", vectors(UNET + "blocks.0.cross_attn.q.weight")),
    "none known": ("its UNet has no time_embed.0.weight", vectors(UNET + "blocks.0.mixer.q.weight")),
    "FLUX for ComfyUI": ("FLUX", vectors(UNET + "double_blocks.0.img_attn.qkv.weight")),
    "PixArt": ("a diffusion transformer", vectors("blocks.0.scale_shift_table", "x_embedder.proj.weight")),
    "PixArt's own names": ("PixArt", vectors("blocks.0.cross_attn.kv_linear.weight", "csize_embedder.mlp.0.weight")),
    "PixArt of diffusers": ("PixArt", vectors(
        "adaln_single.linear.weight", "transformer_blocks.0.scale_shift_table", "caption_projection.linear_1.weight")),
    "HunyuanVideo": ("HunyuanVideo", vectors(
        "double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight")),
    "HunyuanDiT": ("HunyuanDiT", vectors("text_embedding_padding", "blocks.0.attn1.Wqkv.weight")),
    "Chroma": ("Chroma", vectors("distilled_guidance_layer.layers.0.in_layer.weight", "double_blocks.0.x.weight")),
    "Qwen-Image": ("Qwen-Image", vectors("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    "Z-Image": ("Z-Image", vectors("cap_pad_token", "cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight")),
    "Z-Image for ComfyUI": ("Z-Image", vectors(UNET + "x_pad_token", UNET + "cap_embedder.1.weight")),
    "Lumina": ("Lumina-Image", vectors("cap_embedder.0.weight", "layers.0.attention.qkv.weight")),
    "Wan of diffusers": ("Wan", vectors("condition_embedder.time_proj.weight", "blocks.0.attn2.to_q.weight")),
    "Kandinsky 5": ("Kandinsky 5", vectors("visual_transformer_blocks.0.cross_attention.key_norm.weight")),
    "Kandinsky 2.2": ("Kandinsky 2", vectors(
        "down_blocks.0.attentions.0.add_k_proj.weight", "add_embedding.image_norm.weight")),
    "LTX": ("LTX-Video", vectors("patchify_proj.weight", "adaln_single.linear.weight")),
    "CogVideoX": ("CogVideoX", vectors("patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight")),
    "Mochi": ("Mochi", vectors("t5_yproj.weight", "blocks.0.attn.qkv_x.weight")),
    "HiDream": ("HiDream", vectors("double_stream_blocks.0.block.adaLN_modulation.1.bias")),
    "AuraFlow": ("AuraFlow", vectors("double_layers.0.attn.w2q.weight", "cond_seq_linear.weight")),
    "Cosmos": ("Cosmos", vectors(
        "net.blocks.block1.blocks.0.block.attn.to_q.0.weight", "net.x_embedder.proj.1.weight")),
    "Sana": ("Sana", vectors("attention_y_norm.weight", "blocks.0.cross_attn.q_linear.weight")),
    "Stable Cascade, stage C": ("Stable Cascade", vectors(
        "clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight")),
    "Stable Cascade, stage B": ("Stable Cascade", vectors(
        UNET + "clip_mapper.weight", UNET + "effnet_mapper.0.weight")),
    "DeepFloyd IF": ("DeepFloyd IF", vectors("add_embedding.norm1.weight", "encoder_hid_proj.weight")),
    "Kolors": ("Kolors", vectors("encoder_hid_proj.weight", "add_embedding.linear_1.weight")),
    "LCM": ("a latent consistency model", vectors("time_embedding.cond_proj.weight", "conv_in.weight")),
    "AltDiffusion": ("AltDiffusion", sd_state() | vectors(
        "cond_stage_model.roberta.embeddings.word_embeddings.weight")),
    "safety checker": ("a safety checker", vectors(
        "concept_embeds", "vision_model.vision_model.post_layernorm.weight", "visual_projection.weight")),
    "SigLIP": ("SigLIP", vectors("vision_model.head.probe", "text_model.head.weight", "vision_model.x.weight")),
    "XL LoRA": ("a LoRA for Stable Diffusion XL", vectors("lora_te2_text_model_x.lora_down.weight")),
    "FLUX LoRA": ("a LoRA for FLUX", vectors("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight")),
    "FLUX LoRA of kohya": ("a LoRA for FLUX", vectors("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight")),
    "Wan LoRA": ("a LoRA for a diffusion transformer", vectors("diffusion_model.blocks.0.cross_attn.q.lora_A.weight")),
    "motion LoRA": ("a LoRA for the motion module of AnimateDiff", vectors(
        "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor"
        ".to_q_lora.down.weight")),
    "PhotoMaker": ("a PhotoMaker", vectors("id_encoder.fuse_module.mlp1.fc1.weight", "lora_weights.unet.x.weight")),
    "control LoRA": ("a ControlNet", vectors("lora_controlnet", "input_blocks.1.0.in_layers.2.down")),
    "FLUX ControlNet": ("a ControlNet", vectors(
        "controlnet_blocks.0.weight", "transformer_blocks.0.ff_context.x.weight")),
    "IP-Adapter in a UNet": ("an IP-Adapter", vectors("1.to_k_ip.weight", "1.to_v_ip.weight")),
    "T2I style": ("a T2I-Adapter", vectors("transformer_layes.0.attn.in_proj_weight", "ln_post.weight")),
    "Wan VAE": ("an autoencoder of videos", vectors("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight")),
    "VQ": ("an autoencoder with a codebook", filled("small_autoencoder") | vectors("quantize.embedding.weight")),
    "language model": ("a language model", vectors(
        "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")),
    "LDM VAE": ("an autoencoder (VAE) alone: give it with --vae", filled("small_autoencoder")),
    "VAE of a checkpoint": ("an autoencoder (VAE) alone", {
        f"first_stage_model.{name}": t for name, t in filled("small_autoencoder").items()}),
    "diffusers VAE": ("an autoencoder (VAE) alone", vectors(
        "decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")),
    "TAESD": ("a tiny autoencoder", vectors("decoder.layers.3.conv.0.weight", "encoder.layers.1.conv.2.weight")),
    "ESRGAN": ("an image upscaler", vectors("conv_first.weight", "body.0.rdb1.conv1.weight")),
    "old ESRGAN": ("an image upscaler", vectors("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight")),
    "embedding": ("a textual inversion", vectors("emb_params", shape=(2, 768))),
    "SDXL embedding": ("a textual inversion", vectors("clip_l", "clip_g", shape=(2, 768))),
    "learned_embeds": ("a textual inversion", vectors("<cat-toy>", shape=(768,))),
    "unbracketed": ("textual inversion", vectors("sks", shape=(768,))),
    "T5": ("a T5 text encoder", vectors("encoder.block.0.layer.0.SelfAttention.q.weight")),
    "bitsandbytes": ("quantised by another program", sd_state() | vectors(UNET + "out.2.weight.absmax")),
    "scaled fp8": ("quantised by another program", sd_state() | vectors("scaled_fp8")),
    "InteractDiffusion": ("InteractDiffusion", pruned_state() | vectors(
        "position_net.interaction_embedding.emb.weight", "position_net.linear_action.0.weight")),
    "InstanceDiffusion": ("InstanceDiffusion", pruned_state() | vectors(
        "position_net.linears_list.0.0.weight", "scaleu_b_0", "position_net.null_point_feature")),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", ["safetensors", "pickle", "nested"])
def test_files_of_another_kind_are_named(tmp_path, name, form):
    kind, tensors = OTHERS[name]
    path = tmp_path / "model"
    if form == "safetensors":
        save_file({key: t.clone().contiguous() for key, t in tensors.items()}, path)
    else:
        torch.save(tensors if form == "pickle" else {"state_dict": tensors, "epoch": 3}, path)
    assert kind in refusal(path)


@pytest.mark.parametrize("name", OTHERS)
def test_advice_says_what_to_give_instead(tmp_path, name):
    if name in ("none known", "unbracketed") or "textual inversion" in OTHERS[name][0]:
        return
    save_file({key: t.clone().contiguous() for key, t in OTHERS[name][1].items()}, tmp_path / "model")
    said = refusal(tmp_path / "model")
    assert any(words in said for words in (": give ", ": captions are read", "is not used here", ": GLIGEN's own")), (
        said
    )


@pytest.mark.parametrize("name", ["TAESD", "Wan VAE", "VQ", "FLUX", "ESRGAN", "T5", "IP-Adapter", "PixArt"])
def test_other_kinds_are_named_where_a_vae_or_a_lora_belongs(tmp_path, name):
    kind, tensors = OTHERS[name]
    save_file({key: t.clone().contiguous() for key, t in tensors.items()}, tmp_path / "model")
    with pytest.raises(
        ValueError, match=rf"--vae .* holds no autoencoder of Stable Diffusion's kind: it is {re.escape(kind)}"
    ):
        open_model(vae=tmp_path / "model")
    with pytest.raises(ValueError, match=rf"--lora '.*' is {re.escape(kind)}"):
        open_model(loras=tmp_path / "model")


def test_old_forms_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "a.pt"
    inversion = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "x", "step": 9}
    torch.save(inversion, path, _use_new_zipfile_serialization=False)
    assert "a textual inversion" in refusal(path)
    torch.save({768: [vectors("linear1.weight"), vectors("linear1.weight")], 320: [], "name": "x"}, path)
    assert "a hypernetwork" in refusal(path)
    torch.save({768: [vectors("linear.0.weight")] * 2, "name": "x", "step": 9, "layer_structure": [1, 2, 1]}, path)
    assert "a hypernetwork" in refusal(path)
    torch.save({"params_ema": vectors("conv_first.weight", "conv_body.weight")}, path)
    assert "an image upscaler" in refusal(path)
    torch.save({"image_proj": vectors("proj.weight"), "ip_adapter": vectors("1.to_k_ip.weight")}, path)
    assert "an IP-Adapter" in refusal(path)
    torch.save({"model": gligen_parts()["model"] | vectors("scaleu_b_0", "scaleu_s_0")}, path)
    assert "InstanceDiffusion" in refusal(path)


def test_what_we_read_is_not_taken_for_another_kind():
    published = ("gligen_text", "gligen_text_image", "gligen_keypoint", "gligen_depth", "gligen_sem", "sd_v1")
    for name in (*published, "ldm_text2img_large", "small_clip_image"):
        assert relative(manifest(name)) is None, name


def test_state_of_a_training_run_is_not_a_pruned_file(tmp_path):
    state = {
        f"{kind}.{n}": t.clone() for kind in ("weights", "exp_avg", "exp_avg_sq") for n, t in pruned_state().items()
    }
    save_file(state, tmp_path / "checkpoint.safetensors", metadata={"format": "gligen-training"})
    assert "the state of a training run: give the adapter.safetensors beside it" in refusal(
        tmp_path / "checkpoint.safetensors"
    )


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
        (b"\x93NUMPY\x01\0" + bytes(50), "a NumPy array"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a packed archive"),
        (b"\x1f\x8b\x08\0" + bytes(50), "a packed archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "an image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "an image"),
    ],
)
def test_files_that_hold_no_tensors_of_torch_are_named(tmp_path, start, said):
    (tmp_path / "a.ckpt").write_bytes(start)
    assert said in refusal(tmp_path / "a.ckpt")


# --- bases of another kind -------------------------------------------------------------------------------------------


def widened_base(path: Path, channels: int) -> Path:
    """A generated base whose UNet reads this many channels."""
    config, parts = generated_base()
    unet = dict(parts["unet"])
    weight = unet["input_blocks.0.0.weight"].read()
    unet["input_blocks.0.0.weight"] = torch.cat([weight, weight.new_zeros(len(weight), channels - 4, 3, 3)], dim=1)
    save_model(path, {**parts, "unet": unet}, config)
    return path


@pytest.mark.parametrize(
    ("channels", "kind"),
    [(9, "an inpainting base"), (8, "InstructPix2Pix"), (5, "a depth-to-image base"), (7, "an upscaling base"),
     (6, "a base of another kind")],
)  # fmt: skip
def test_bases_of_another_kind_are_refused_at_every_opening(tmp_path, channels, kind, capsys):
    base = widened_base(tmp_path / "base", channels)
    model = generated_model()
    adapter = tmp_path / "adapter"
    grounding = {n: t for n, t in model.parts["unet"].items() if ".fuser." in n or n.startswith("position_net.")}
    from gligen.weights import save_adapter

    save_adapter(adapter, grounding, model.config)
    for open_it in (
        lambda: open_model(base),
        lambda: open_model(base, adapter),
        lambda: combine(read_weights(base), read_weights(adapter)),
        lambda: open_base(TrainConfig(base=str(base))),
    ):
        with pytest.raises(ValueError, match=rf"base: .*{kind}.*: its UNet reads {channels} channels, a latent has 4"):
            open_it()
    assert cli.run(command.main, ["inspect", str(base)]) == 0
    assert kind in capsys.readouterr().out


def test_base_of_another_kind_may_still_lend_its_other_parts(tmp_path):
    """A whole GLIGEN file needs no UNet of the base."""
    base = widened_base(tmp_path / "base", 9)
    model = generated_model()
    save_model(tmp_path / "whole", {"unet": model.parts["unet"]}, model.config)
    assert open_model(base, tmp_path / "whole").config.unet == model.config.unet


# --- parts that are missing ------------------------------------------------------------------------------------------


def without(path: Path, *gone: str, grounded: bool) -> Path:
    if grounded:
        model = generated_model()
        config, parts = model.config, model.parts
    else:
        config, parts = generated_base()
    save_model(path, {name: tensors for name, tensors in parts.items() if name not in gone}, config)
    return path


def advice(path: Path, **options: object) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_model(path, **options)
    return str(caught.value)


def test_advice_follows_what_the_file_holds(tmp_path):
    base = without(tmp_path / "base", "vae", grounded=False)
    assert advice(base).endswith("holds no autoencoder: give one with --vae FILE")
    base = without(tmp_path / "base2", "text_encoder", grounded=False)
    assert "holds no text encoder: give a CLIP whose text encoder is 64 wide with --clip FILE" in advice(base)
    whole = without(tmp_path / "whole", "vae", grounded=True)
    end = "give one with --vae FILE, or a base with --checkpoint and this with --adapter"
    assert advice(whole).endswith(end)
    assert f"no autoencoder: {end}" in missing_for_sampling(read_weights(whole))
    complete = tmp_path / "complete"
    save_model(complete, generated_base()[1], generated_base()[0])
    assert open_model(complete, whole).config.vae == generated_base()[0].vae  # the advice, followed
    joined = advice(without(tmp_path / "bare", "vae", grounded=False), adapter=whole)
    assert joined.endswith("holds no autoencoder: give one with --vae FILE")  # it is the base that lacks it
    torch.save(pruned_state(), tmp_path / "pruned")
    assert advice(tmp_path / "pruned").endswith("give Stable Diffusion with --checkpoint and this with --adapter")
    torch.save(filled("small_clip_image"), tmp_path / "clip")
    assert "this, if it is CLIP, with --clip" in advice(tmp_path / "clip")


def test_text_encoder_comes_from_clip_where_the_checkpoint_has_none(tmp_path):
    whole = without(tmp_path / "whole", "text_encoder", grounded=True)
    config, parts = generated_base()
    text = {name: t.read() for name, t in parts["text_encoder"].items()}
    image = {name: t.read() for name, t in parts["image_encoder"].items()}
    torch.save(text | image, tmp_path / "clip.pt")
    model = open_model(whole, clip=tmp_path / "clip.pt")
    assert model.config.text_encoder.width == config.text_encoder.width
    for name, tensor in text.items():
        assert torch.equal(model.parts["text_encoder"][name].read(), tensor)


def clip_file(path: Path, *towers: str) -> Path:
    parts = generated_base()[1]
    torch.save({name: t.read() for tower in towers for name, t in parts[tower].items()}, path)
    return path


def test_a_models_text_encoder_from_clip_is_not_without_effect(tmp_path, caplog):
    """It is the only one there is; and the file is part of what the image is recorded with."""
    from gligen.commands import sample
    from gligen.image_files import read_record

    whole = without(tmp_path / "whole", "text_encoder", grounded=True)
    clip = clip_file(tmp_path / "clip.pt", "text_encoder", "image_encoder")
    assert set(open_model(whole, clip=clip).from_clip) == {"text_encoder", "image_encoder"}
    complete = without(tmp_path / "complete", grounded=True)
    assert open_model(complete, clip=clip).from_clip == ("image_encoder",)
    for checkpoint, is_said in ((whole, False), (complete, True)):
        caplog.clear()
        args = ["--prompt", "a ball", "--steps", "1", "--sampler", "ddim", "--device", "cpu", "--clip", str(clip)]
        out = tmp_path / f"{checkpoint.name}-out"
        assert cli.run(sample.main, [*args, "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
        assert ("--clip has no effect" in caplog.text) is is_said
    assert read_record(tmp_path / "whole-out/0000-0.png")["model"]["clip"]["file"] == "clip.pt"


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "pytorch_model-00002-of-00003.bin"])
def test_one_shard_of_several_is_said_to_be_one(tmp_path, name):
    write_sd(tmp_path / name, {n: t for n, t in sd_state().items() if "input_blocks.1" not in n})
    assert "one of 3 files that hold the model together: give their folder" in refusal(tmp_path / name)
    with pytest.raises(ValueError, match="one of 3 files"):
        open_model(vae=tmp_path / name)


# --- tensors that nothing takes --------------------------------------------------------------------------------------

LEFT_OVER = (
    *("model_ema.decay", "model_ema.num_updates", "first_stage_model.loss.discriminator.main.0.weight"),
    *("cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale", "logvar"),
    *("betas", "optimizer.state.0.exp_avg", "ema.out.2.weight", "safety_checker.visual_projection.weight"),
    "safety_checker.concept_embeds",  # not one alone
)


def test_tensors_that_no_part_takes_are_said_where_the_model_is_used(tmp_path, caplog, capsys):
    strange = {"embedding_manager.w": torch.ones(2), "cond_stage_model.extra": torch.ones(1), "hyper.a": torch.ones(1)}
    path = write_sd(tmp_path / "a.ckpt", sd_state() | {name: torch.ones(3) for name in LEFT_OVER} | strange)
    (tmp_path / "a.json").write_text(json.dumps({"text_encoder": {"heads": 4}}))
    with pytest.raises(ValueError, match="its text encoder is 64 wide"):  # the small manifests': not to be sampled
        open_model(path)
    line = "ignored 3 keys (embedding_manager.w, cond_stage_model.extra, hyper.a)"
    assert [record.message for record in caplog.records] == [f"'{path}': {line}"]
    assert cli.run(command.main, ["inspect", str(path)]) == 0
    assert line in capsys.readouterr().out
    caplog.clear()
    plain = write_sd(tmp_path / "b.ckpt", sd_state() | {name: torch.ones(3) for name in LEFT_OVER})
    (tmp_path / "b.json").write_text(json.dumps({"text_encoder": {"heads": 4}}))
    with pytest.raises(ValueError, match="its text encoder is 64 wide"):
        open_model(plain)
    assert not caplog.records


def test_a_clips_and_a_vaes_strange_tensors_are_said(tmp_path, caplog):
    base = without(tmp_path / "base", grounded=True)
    clip = torch.load(clip_file(tmp_path / "clip.pt", "text_encoder", "image_encoder"))
    torch.save(clip | {"logit_scale": torch.ones(()), "prompt_learner.ctx": torch.ones(2)}, tmp_path / "clip.pt")
    assert read_weights(tmp_path / "clip.pt").unused == ("ignored 1 keys (prompt_learner.ctx)",)
    open_model(base, clip=tmp_path / "clip.pt")
    assert "ignored 1 keys (prompt_learner.ctx)" in caplog.text
    caplog.clear()
    vae = {f"vae.{name}": t.read() for name, t in generated_base()[1]["vae"].items()}
    torch.save(vae | {"vae.film.weight": torch.ones(2), "vae.loss.logvar": torch.ones(())}, tmp_path / "vae.pt")
    model = open_model(base, vae=tmp_path / "vae.pt")
    assert torch.equal(model.parts["vae"]["decoder.conv_in.bias"].read(), vae["vae.decoder.conv_in.bias"])
    assert caplog.messages == [f"--vae '{tmp_path / 'vae.pt'}': ignored 1 keys (film.weight)"]


def test_a_measured_scale_of_latents_is_honoured(tmp_path):
    """LDM's trainer measures one with `scale_by_std` and stores it as a buffer."""
    path = write_sd(tmp_path / "a.ckpt", sd_state() | {"scale_factor": torch.tensor(0.2285)})
    assert read_weights(path).config.vae.scale_factor == 0.2285
    path = write_sd(tmp_path / "a.ckpt", sd_state() | {"scale_factor": torch.tensor(0.18215)})
    assert read_weights(path).config == read_weights(write_sd(tmp_path / "b.ckpt")).config


# --- a JSON file of somebody else's ----------------------------------------------------------------------------------

THEIRS = [
    {"description": "", "sd version": "SD1", "activation text": "a cat", "preferred weight": 0},
    {"image_size": 224, "hidden_size": 1024},
    {"image_size": 512},
    {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], "_class_name": "X"},
    {"vae": "vae-ft-mse.safetensors", "model": "x"},
    {"vae": {"path": "x.pt"}, "name": "x"},
    {},
    [],
    None,
    "text",
    7,
]


@pytest.mark.parametrize("data", THEIRS, ids=str)
def test_other_programs_json_beside_a_checkpoint_is_left_alone(tmp_path, data, capsys):
    path = write_sd(tmp_path / "model.safetensors")
    before = read_weights(path)
    (tmp_path / "model.json").write_text(json.dumps(data))
    again = read_weights(path)
    assert again.config == before.config
    assert again.notes == (*before.notes, "model.json beside it is another program's and was not read")
    assert cli.run(command.main, ["inspect", str(path)]) == 0
    assert "model.json beside it is another program's" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"  \n", b'{"notes": "caf\xe9"}', b"\xff\xfe{\x00}\x00"])
def test_json_in_another_encoding_or_empty_is_left_alone(tmp_path, content):
    path = write_sd(tmp_path / "model.ckpt")
    (tmp_path / "model.json").write_bytes(content)
    assert any("another program's" in note for note in read_weights(path).notes)


def test_our_json_is_told_by_its_content(tmp_path):
    path = write_sd(tmp_path / "model.ckpt")
    (tmp_path / "model.json").write_text(json.dumps({"unet": {"num_heads": 4}, "trained by": "me"}))
    with pytest.raises(ValueError, match=r"\(model\.json beside it: ModelConfig: unknown field 'trained by'"):
        read_weights(path)
    (tmp_path / "model.json").write_text(json.dumps({"image_size": 256, "unet": {"num_heads": 4}}))
    config = read_weights(path).config
    assert (config.image_size, config.unet.num_heads) == (256, 4)
    config, parts = generated_base()
    save_model(tmp_path / "own.safetensors", parts, config)
    (tmp_path / "own.json").write_text(json.dumps({"vae": {"scale_factor": 0.5}}))
    warnings = read_weights(tmp_path / "own.safetensors").warnings
    assert warnings == ("own.json beside it says otherwise than the file itself: not used",)


# --- state dicts that trainers wrapped -------------------------------------------------------------------------------

WRAPPED = {
    "DDP": lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
    "compile": lambda state: {n.replace(UNET, f"{UNET}_orig_mod."): t for n, t in state.items()},
    "compiled whole": lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
    "FSDP": lambda state: {n.replace("out.2", "_fsdp_wrapped_module.out.2"): t for n, t in state.items()},
    "twice": lambda state: {"state_dict": {"state_dict": state}, "epoch": 1},
    "model_state_dict": lambda state: {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "DeepSpeed": lambda state: {"module": state, "ds_version": "0.1"},
    "model": lambda state: {"model": state},
    "attribute": lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}},
    "attribute of an attribute": lambda state: {f"pipe.model.{n}": t for n, t in state.items()},
    "list": lambda state: [state, 3],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_state_dicts_are_read(tmp_path, name):
    torch.save(WRAPPED[name](sd_state()), tmp_path / "a.ckpt")
    weights, plain = read_weights(tmp_path / "a.ckpt"), read_weights(write_sd(tmp_path / "b.ckpt"))
    assert (weights.kind, weights.config) == ("sd", plain.config)
    for part, tensors in plain.parts.items():
        assert set(weights.parts[part]) == set(tensors)


def test_grounded_unets_under_an_attribute_are_read(tmp_path):
    for state in (gligen_parts()["model"], pruned_state()):
        torch.save({f"unet.{n}": t for n, t in state.items()}, tmp_path / "a.pth")
        weights = read_weights(tmp_path / "a.pth")
        assert (weights.modes, set(weights.parts["unet"])) == (("box-text",), set(state))


def test_wrapped_gligen_files_are_read(tmp_path):
    parts = {part: {f"module.{n}": t for n, t in tensors.items()} for part, tensors in gligen_parts().items()}
    torch.save(parts, tmp_path / "a.pth")
    assert set(read_weights(tmp_path / "a.pth").parts["unet"]) == set(gligen_parts()["model"])
    torch.save({"state_dict": gligen_parts()}, tmp_path / "b.pth")
    assert read_weights(tmp_path / "b.pth").kind == "gligen"


def test_pruned_files_under_a_checkpoints_names_are_read(tmp_path):
    torch.save({f"{UNET}{name}": t for name, t in pruned_state().items()}, tmp_path / "a")
    weights = read_weights(tmp_path / "a")
    assert (weights.kind, weights.modes) == ("pruned", ("box-text",))
    assert set(weights.parts["unet"]) == set(pruned_state())


# --- text encoders with more than captions need ----------------------------------------------------------------------


def test_text_projection_beside_a_text_encoder_is_no_trouble(tmp_path):
    from gligen.modules.clip import CLIPTextEncoder
    from gligen.weights import load_part

    text = "cond_stage_model.transformer.text_model."
    state = sd_state() | {"cond_stage_model.transformer.text_projection.weight": torch.randn(48, 64)}
    for extra in ({}, {f"{text}logit_scale": torch.tensor(4.6)}):
        weights = read_weights(write_sd(tmp_path / "a.ckpt", state | extra))
        with torch.device("meta"):
            encoder = CLIPTextEncoder(weights.config.text_encoder)
        load_part(encoder, weights.parts["text_encoder"], device="cpu", what="text encoder")
    gligen = gligen_parts()
    gligen["text_encoder"] = gligen["text_encoder"] | {"transformer.text_projection.weight": torch.randn(48, 64)}
    torch.save(gligen, tmp_path / "g.pth")
    assert not any("projection" in name for name in read_weights(tmp_path / "g.pth").parts["text_encoder"])


def test_text_encoder_of_a_checkpoint_alone_is_read_as_clip(tmp_path):
    text = {name: t for name, t in sd_state().items() if name.startswith("cond_stage_model.")}
    weights = read_weights(write_sd(tmp_path / "a.ckpt", text))
    assert (weights.kind, list(weights.parts)) == ("clip", ["text_encoder"])


def test_text_encoder_that_lost_its_prefix_is_read(tmp_path):
    state = {name.removeprefix("cond_stage_model.transformer."): t for name, t in sd_state().items()}
    weights = read_weights(write_sd(tmp_path / "a.ckpt", state))
    assert set(weights.parts["text_encoder"]) == set(read_weights(write_sd(tmp_path / "b.ckpt")).parts["text_encoder"])
    assert weights.notes == read_weights(tmp_path / "b.ckpt").notes


def test_added_tokens_are_left_out_and_said(tmp_path, monkeypatch):
    own = read_weights(write_gligen(tmp_path / "a.pth"))
    monkeypatch.setattr("gligen.weights.files.TextEncoderConfig.vocab_size", VOCAB - 3)
    weights = read_weights(tmp_path / "a.pth")
    assert weights.config.text_encoder.vocab_size == VOCAB - 3
    embedding = weights.parts["text_encoder"]["token_embedding.weight"].read()
    assert torch.equal(embedding, own.parts["text_encoder"]["token_embedding.weight"].read()[: VOCAB - 3])
    assert weights.warnings == (
        f"its vocabulary has 3 more tokens than CLIP's {VOCAB - 3} (textual inversion): a caption cannot name them "
        "here",
    )
