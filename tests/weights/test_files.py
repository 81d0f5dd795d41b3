"""Every layout is told by its contents, comes out as the same parts, and goes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gligen.config import GroundingConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, to_dict
from gligen.weights import (
    Weights,
    combine,
    hold,
    load_part,
    missing_for_sampling,
    read_weights,
    save_adapter,
    save_model,
    write_weights,
)
from gligen.weights.names_ema import ema_name
from tests.conftest import SMALL, SMALL_VAE, filled
from tests.weights.helpers import (
    VOCAB,
    genuine,
    gligen_parts,
    ldm_state,
    pruned_state,
    sd_state,
    write_gligen,
    write_sd,
)

SMALL_TEXT = TextEncoderConfig(width=64, layers=3, heads=1, vocab_size=VOCAB)
SMALL_UNET = UNetConfig(**SMALL)
BOX_TEXT = GroundingConfig(token_dim=48, feature_dim=48)


def same(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].read(), tensor.read() if hasattr(tensor, "read") else tensor), name


def same_parts(a: Weights, b: Weights) -> None:
    assert set(a.parts) == set(b.parts)
    for part in a.parts:
        same(a.parts[part], b.parts[part])


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_weights(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pruned_adapter.safetensors", "x.pth"])
def test_stable_diffusion_is_recognised_whatever_its_name(tmp_path, name):
    weights = read_weights(write_sd(tmp_path / name))
    assert (weights.kind, weights.modes) == ("sd", ())
    assert weights.config == ModelConfig(unet=SMALL_UNET, vae=SMALL_VAE, text_encoder=SMALL_TEXT)
    unet = {n: t for n, t in gligen_parts()["model"].items() if ".fuser." not in n and "position_net" not in n}
    same(weights.parts["unet"], unet)
    same(weights.parts["vae"], gligen_parts()["autoencoder"])
    assert "token_embedding.weight" in weights.parts["text_encoder"]


def test_stable_diffusion_in_safetensors_is_recognised(tmp_path):
    path = tmp_path / "model.ckpt"
    extra = {"betas": torch.ones(10), "strange.weight": torch.ones(1)}
    save_file({n: t.clone() for n, t in {**sd_state(), **extra}.items()}, path)
    weights = read_weights(path)
    assert weights.kind == "sd"
    assert weights.notes == ("ignored 1 keys (strange.weight)",)
    same_parts(weights, read_weights(write_sd(tmp_path / "b")))


def test_genuine_lightning_checkpoint_is_read():
    path = genuine("sd_small.ckpt")
    if path is None:
        pytest.skip("the genuine checkpoint is not beside the repository")
    weights = read_weights(path)
    assert (weights.kind, weights.config.unet) == ("sd", SMALL_UNET)
    expected = filled("small_sd")["model.diffusion_model.out.2.weight"].half()
    assert torch.equal(weights.parts["unet"]["out.2.weight"].read(), expected)


def test_gligen_checkpoint_is_recognised_and_its_config_believed(tmp_path):
    weights = read_weights(write_gligen(tmp_path / "sd-v1-4.ckpt"))
    assert (weights.kind, weights.modes) == ("gligen", ("box-text",))
    grounding = GroundingConfig(token_dim=48, feature_dim=48, max_entities=12)
    assert weights.config.unet == UNetConfig(**{**SMALL, "num_heads": 4}, grounding=grounding)
    assert weights.config.vae.scale_factor == 0.25
    assert weights.config.schedule == ScheduleConfig(timesteps=500, beta_start=0.001, beta_end=0.02)
    assert weights.config.image_size == 16 * 4
    same(weights.parts["unet"], gligen_parts()["model"])


def test_genuine_gligen_checkpoint_is_read():
    path = genuine("gligen_small_text.pth")
    if path is None:
        pytest.skip("the genuine checkpoint is not beside the repository")
    weights = read_weights(path)
    assert weights.config.unet == UNetConfig(**SMALL, grounding=BOX_TEXT)
    expected = filled("small_gligen_text")["position_net.linears.0.weight"].half()
    assert torch.equal(weights.parts["unet"]["position_net.linears.0.weight"].read(), expected)


def test_ldm_checkpoint_is_recognised(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": ldm_state()}, path)
    weights = read_weights(path)
    text = TextEncoderConfig(kind="bert", width=48, layers=2, heads=2, head_dim=64, vocab_size=VOCAB)
    assert (weights.kind, weights.config.text_encoder, weights.config.image_size) == ("ldm", text, 256)
    assert weights.parts["text_encoder"]["attn_layers.layers.0.1.to_q.weight"].shape == (128, 48)


def test_pruned_file_is_recognised(tmp_path):
    path = tmp_path / "v1-5.safetensors"
    save_file({n: t.clone() for n, t in pruned_state().items()}, path)
    weights = read_weights(path)
    assert (weights.kind, weights.modes) == ("pruned", ("box-text",))
    assert weights.config.unet.grounding == BOX_TEXT
    same(weights.parts["unet"], pruned_state())


@pytest.mark.parametrize("library", ["huggingface", "open_clip"])
def test_clip_files_give_the_image_encoder(tmp_path, library):
    path = tmp_path / "gligen.pth"
    state = filled("small_clip_image")
    expected = state["vision_model.encoder.layers.2.self_attn.v_proj.bias"]
    torch.save(state, path)
    weights = read_weights(path)
    if library == "open_clip":
        again = tmp_path / "model.ckpt"  # another file: the tensors are still in the first one
        torch.save({name: t.read() for name, t in weights.parts["image_encoder"].items()}, again)
        weights = read_weights(again)
    assert (weights.kind, list(weights.parts)) == ("clip", ["image_encoder"])
    assert torch.equal(
        weights.parts["image_encoder"]["visual.transformer.resblocks.2.attn.in_proj_bias"].read()[128:], expected
    )
    assert weights.config.image_encoder.embed_dim == 48


def test_averaged_weights_are_used_when_asked_for(tmp_path):
    state = sd_state()
    averaged = {
        ema_name(name.removeprefix("model.diffusion_model.")): t + 1
        for name, t in state.items()
        if name.startswith("model.diffusion_model.")
    }
    path = write_sd(tmp_path / "both.ckpt", {**state, **averaged, "model_ema.decay": torch.tensor(0.99)})
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    plain, ema = read_weights(path), read_weights(path, ema=True)
    assert torch.equal(ema.parts["unet"][name].read(), plain.parts["unet"][name].read() + 1)
    assert plain.notes == tuple(note for note in plain.notes if "ignored" not in note)
    only = {n: t for n, t in state.items() if not n.startswith("model.")} | averaged
    alone = read_weights(write_sd(tmp_path / "only.ckpt", only))
    assert alone.config.unet == SMALL_UNET
    assert torch.equal(alone.parts["unet"][name].read(), ema.parts["unet"][name].read())
    assert "no averaged (EMA) weights" in refusal(write_sd(tmp_path / "none.ckpt"), ema=True)


def test_averaged_weights_of_the_trainer_are_used_when_asked_for(tmp_path):
    ema = {name: t + 1 for name, t in gligen_parts()["model"].items()}
    path = write_gligen(tmp_path / "a.pth", ema=ema)
    same(read_weights(path, ema=True).parts["unet"], ema)
    assert "no averaged (EMA) weights" in refusal(write_gligen(tmp_path / "b.pth"), ema=True)


def test_config_beside_a_file_tells_what_shapes_cannot(tmp_path):
    path = write_sd(tmp_path / "model.ckpt")
    beside = {"text_encoder": {"heads": 4}, "unet": {"num_heads": 2}}
    (tmp_path / "model.json").write_text(json.dumps(beside))
    weights = read_weights(path)
    assert weights.config.text_encoder.heads == 4
    assert weights.config.unet == UNetConfig(**SMALL, num_heads=2)
    (tmp_path / "model.json").write_text("{")
    assert "model.json, is no JSON" in refusal(path)
    (tmp_path / "model.json").write_text('{"unet": {"colour": 1}}')
    assert "unknown field 'colour'" in refusal(path)
    (tmp_path / "model.json").write_text('{"unet": {"num_heads": "eight"}}')
    assert "its config cannot be used" in refusal(path)


def test_canny_and_depth_stay_open_until_told(tmp_path):
    unet = {
        name: torch.zeros(t.shape, dtype=torch.float16) for name, t in gligen_parts("small_gligen_hed")["model"].items()
    }
    unet["input_blocks.0.0.weight"] = torch.zeros(32, 12, 3, 3)
    unet |= {"downsample_net.layers.0.weight": torch.zeros(4, 1, 4, 4), "downsample_net.layers.0.bias": torch.zeros(4)}
    unet |= {"downsample_net.layers.2.weight": torch.zeros(8, 4, 4, 4), "downsample_net.layers.2.bias": torch.zeros(8)}
    path = tmp_path / "hed.pth"
    torch.save({"model": unet}, path)
    weights = read_weights(path)
    assert weights.modes == ("canny", "depth")
    assert any("canny or depth" in line for line in missing_for_sampling(weights))
    told = read_weights(path, mode="depth")
    assert (told.modes, told.config.unet.grounding.mode) == (("depth",), "depth")
    assert "not of mode 'normal': its tensors are of canny or depth" in refusal(path, mode="normal")
    (tmp_path / "hed.json").write_text('{"unet": {"grounding": {"mode": "depth"}}}')
    assert read_weights(path).modes == ("depth",)


def test_contradicting_or_unknown_mode_is_refused(tmp_path):
    path = write_gligen(tmp_path / "a.pth")
    assert "its tensors are of box-text" in refusal(path, mode="keypoint")
    assert "it holds no grounding" in refusal(write_sd(tmp_path / "b.ckpt"), mode="box-text")
    with pytest.raises(ValueError, match="unknown mode 'boxes'"):
        read_weights(path, mode="boxes")


def test_missing_file_and_half_a_unet_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    state = {n: t for n, t in sd_state().items() if "first_stage_model.post_quant" not in n}
    assert "its vae has no tensor 'post_quant_conv.weight'" in refusal(write_sd(tmp_path / "a.ckpt", state))


def test_stable_diffusion_2_is_refused_by_its_shapes(tmp_path):
    state = {
        name: t[:, :, 0, 0] if name.endswith(("proj_in.weight", "proj_out.weight")) and t.ndim == 4 else t
        for name, t in sd_state().items()
    }
    assert "not a v1 UNet" in refusal(write_sd(tmp_path / "a.ckpt", state))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def box_text(tmp_path_factory) -> Weights:
    return read_weights(write_gligen(tmp_path_factory.mktemp("gligen") / "gligen.pth"))


@pytest.mark.parametrize(
    ("layout", "name"), [("sd", "a.ckpt"), ("sd", "a.safetensors"), ("gligen", "a"), ("diffusers", "a"), ("model", "a")]
)
def test_whole_model_survives_every_layout(tmp_path, box_text, layout, name):
    write_weights(box_text, tmp_path / name, layout)
    again = read_weights(tmp_path / name)
    assert (again.kind, again.modes) == (layout, ("box-text",))
    same_parts(again, box_text)
    if layout == "model":
        assert again.config == box_text.config
    if layout == "gligen":  # it has no place for the number of slots, and none for the text encoder's heads
        assert again.config.unet.num_heads == 4
        assert again.config.schedule == box_text.config.schedule
        assert again.config.image_size == box_text.config.image_size
    if layout == "diffusers":
        assert again.config.unet.num_heads == 4
        assert again.config.vae == box_text.config.vae
        assert again.config.schedule == box_text.config.schedule
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    with pytest.raises(ValueError, match="exists already"):
        write_weights(box_text, tmp_path / name, layout)


def test_ldm_model_survives_its_layout(tmp_path):
    torch.save({"state_dict": ldm_state()}, tmp_path / "a.ckpt")
    weights = read_weights(tmp_path / "a.ckpt")
    for name in ("b.ckpt", "b.safetensors"):
        write_weights(weights, tmp_path / name, "ldm", ema=True)
        again = read_weights(tmp_path / name, ema=True)
        assert (again.kind, again.config) == ("ldm", weights.config)
        same_parts(again, weights)
    with pytest.raises(ValueError, match="use layout 'ldm'"):
        write_weights(weights, tmp_path / "c.ckpt", "sd")


@pytest.mark.parametrize("layout", ["pruned", "adapter"])
def test_grounding_alone_survives(tmp_path, box_text, layout):
    write_weights(box_text, tmp_path / "a", layout)
    again = read_weights(tmp_path / "a")
    assert (again.kind, again.modes) == (layout, ("box-text",))
    same(again.parts["unet"], pruned_state())
    if layout == "adapter":
        assert again.config == box_text.config


def test_written_files_are_those_other_programs_expect(tmp_path, box_text):
    write_weights(box_text, tmp_path / "sd.ckpt", "sd")
    state = torch.load(tmp_path / "sd.ckpt", weights_only=True)["state_dict"]
    for name, tensor in sd_state("small_gligen_text").items():
        assert name.endswith("position_ids") or torch.equal(state[name], tensor), name
    assert state["betas"].shape == (500,)
    write_weights(box_text, tmp_path / "gligen.pth", "gligen")
    value = torch.load(tmp_path / "gligen.pth", weights_only=True)
    for part, tensors in gligen_parts().items():
        assert all(n.endswith("position_ids") or torch.equal(value[part][n], t) for n, t in tensors.items())
    target = value["config_dict"]["_content"]["model"]["params"]["grounding_tokenizer"]["target"]
    assert target == "ldm.modules.diffusionmodules.text_grounding_net.PositionNet"
    write_weights(box_text, tmp_path / "pruned.safetensors", "pruned", dtype=torch.float16)
    pruned = load_file(tmp_path / "pruned.safetensors")
    assert all(torch.equal(pruned[n], t.half()) for n, t in pruned_state().items())


def test_written_folder_is_a_model_to_diffusers(tmp_path, box_text):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    write_weights(box_text, tmp_path / "a", "diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "a", subfolder="unet")
    assert torch.equal(unet.conv_in.weight, gligen_parts()["model"]["input_blocks.0.0.weight"])
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "a", subfolder="vae")
    expected = gligen_parts()["autoencoder"]["decoder.mid.attn_1.q.weight"][:, :, 0, 0]
    assert torch.equal(vae.decoder.mid_block.attentions[0].to_q.weight, expected)


def test_sharded_and_pickled_folders_are_read(tmp_path, box_text):
    folder = tmp_path / "a"
    write_weights(box_text, folder, "diffusers")
    state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    names = sorted(state)
    index = {}
    for i, some in enumerate((names[:100], names[100:])):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, folder / "unet" / shard)
        index |= dict.fromkeys(some, shard)
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        load_file(folder / "vae/diffusion_pytorch_model.safetensors"), folder / "vae/diffusion_pytorch_model.bin"
    )
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    same_parts(read_weights(folder), box_text)
    (folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "missing, though" in refusal(folder)


def test_image_encoder_travels_with_the_model(tmp_path, box_text):
    torch.save(filled("small_clip_image"), tmp_path / "clip.pt")
    joined = combine(box_text, read_weights(tmp_path / "clip.pt"))
    assert joined.modes == ("box-text",)
    for layout in ("sd", "gligen", "diffusers", "model"):
        write_weights(joined, tmp_path / layout, layout)
        again = read_weights(tmp_path / layout)
        same(again.parts["image_encoder"], joined.parts["image_encoder"])
        assert again.config.image_encoder == joined.config.image_encoder


def test_layout_without_room_says_so(tmp_path, box_text):
    bare = read_weights(write_sd(tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match="holds no grounding to write as 'adapter'"):
        write_weights(bare, tmp_path / "x", "adapter")
    pruned = combine(bare, box_text)
    keypoint = read_weights(write_gligen(tmp_path / "k.pth", "small_gligen_keypoint", config={}))
    with pytest.raises(ValueError, match="diffusers has no model of mode keypoint"):
        write_weights(keypoint, tmp_path / "x", "diffusers")
    inpainting = read_weights(write_gligen(tmp_path / "i.pth", "small_gligen_inpaint_text", config={}))
    with pytest.raises(ValueError, match="no place for the first convolution"):
        write_weights(inpainting, tmp_path / "x", "pruned")
    write_weights(pruned, tmp_path / "p", "pruned")
    with pytest.raises(ValueError, match="holds no whole UNet"):
        write_weights(read_weights(tmp_path / "p"), tmp_path / "x", "model")
    assert not (tmp_path / "x").exists()


def test_interrupted_writing_leaves_nothing(tmp_path, box_text, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", broken)
    for layout in ("sd", "gligen", "diffusers", "model", "adapter"):
        with pytest.raises(OSError, match="no space"):
            write_weights(box_text, tmp_path / layout, layout)
    assert list(tmp_path.iterdir()) == []


# --- joining ---------------------------------------------------------------------------------------------------------


def test_pruned_file_on_a_base_is_the_whole_checkpoint(tmp_path):
    save_file({n: t.clone() for n, t in pruned_state().items()}, tmp_path / "p.safetensors")
    base = read_weights(write_sd(tmp_path / "b.ckpt"))
    joined = combine(base, read_weights(tmp_path / "p.safetensors"))
    same(joined.parts["unet"], gligen_parts()["model"])
    assert joined.config.unet == UNetConfig(**SMALL, grounding=BOX_TEXT)
    assert joined.modes == ("box-text",)
    assert "base_first_conv" not in joined.parts


def test_own_files_carry_their_config(tmp_path):
    base = read_weights(write_sd(tmp_path / "b.ckpt"))
    grounding = GroundingConfig(token_dim=48, feature_dim=48, fuser_type="gatedSA2", max_entities=5)
    config = ModelConfig(unet=UNetConfig(**SMALL, grounding=grounding), image_size=128)
    save_adapter(tmp_path / "a", pruned_state(), config)
    adapter = read_weights(tmp_path / "a")
    assert (adapter.kind, adapter.config) == ("adapter", config)
    joined = combine(base, adapter)
    assert joined.config.unet.grounding == grounding
    assert joined.config.text_encoder == SMALL_TEXT
    assert joined.config.image_size == 128
    save_model(tmp_path / "m", joined.parts, joined.config)
    again = read_weights(tmp_path / "m")
    assert (again.kind, again.config, again.modes) == ("model", joined.config, ("box-text",))
    same_parts(again, joined)


def test_base_of_another_size_is_refused(tmp_path):
    wide = {n: torch.cat([t, t]) if n.endswith("fuser.norm1.weight") else t for n, t in pruned_state().items()}
    save_file({n: t.clone() for n, t in wide.items()}, tmp_path / "wide")
    base = read_weights(write_sd(tmp_path / "b.ckpt"))
    with pytest.raises(ValueError, match="is 64 wide, the transformer around it 32"):
        combine(base, read_weights(tmp_path / "wide"))
    few = {n: t for n, t in pruned_state().items() if not n.startswith("middle_block.")}
    save_file({n: t.clone() for n, t in few.items()}, tmp_path / "few")
    with pytest.raises(ValueError, match="no fuser for middle_block"):
        combine(base, read_weights(tmp_path / "few"))
    with pytest.raises(ValueError, match="holds no grounding: is it the base"):
        combine(read_weights(write_gligen(tmp_path / "g.pth")), base)


def test_map_modes_keep_the_first_convolution_of_the_base(tmp_path):
    base = read_weights(write_sd(tmp_path / "b.ckpt"))
    hed = read_weights(write_gligen(tmp_path / "h.pth", "small_gligen_hed", config={}))
    assert hed.modes == ("hed",)
    assert any("first convolution of the base" in line for line in missing_for_sampling(hed))
    joined = combine(base, hed)
    expected = gligen_parts()["model"]["input_blocks.0.0.weight"]
    assert expected.shape[1] == 4
    assert torch.equal(joined.parts["base_first_conv"]["weight"].read(), expected)
    assert joined.parts["unet"]["input_blocks.0.0.weight"].shape[1] == 5
    assert joined.config.unet.first_conv_channels == 5
    assert not any("first convolution" in line for line in missing_for_sampling(joined))

    write_weights(joined, tmp_path / "m", "model")
    same_parts(read_weights(tmp_path / "m"), joined)
    write_weights(joined, tmp_path / "a", "adapter")
    again = combine(base, read_weights(tmp_path / "a"))
    same_parts(again, joined)
    assert again.config == joined.config


def test_pruned_map_file_is_not_enough(tmp_path):
    save_file({n: t.clone() for n, t in pruned_state("small_gligen_hed").items()}, tmp_path / "p")
    pruned = read_weights(tmp_path / "p")
    assert pruned.modes == ("hed", "canny", "depth", "normal")
    base = read_weights(write_sd(tmp_path / "b.ckpt"))
    for adapter in (pruned, read_weights(tmp_path / "p", mode="canny")):
        with pytest.raises(ValueError, match="give GLIGEN's whole checkpoint instead of the pruned one"):
            combine(base, adapter)
    assert any("widened first convolution" in line for line in missing_for_sampling(pruned))


def test_whole_checkpoint_lacks_nothing_and_loads(tmp_path, box_text):
    from gligen.modules.unet import UNetModel

    config = box_text.config.unet
    with torch.device("meta"):
        unet = UNetModel(config)
    load_part(unet, box_text.parts["unet"], device="cpu", dtype=torch.float32, what="unet")
    name = "input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn"
    assert torch.equal(unet.state_dict()[name], gligen_parts()["model"][name])
    lacks = missing_for_sampling(box_text)
    assert len(lacks) == 1  # the golden text encoder is wider than the golden UNet's context
    assert "a text encoder of width 48" in lacks[0]


def test_trained_module_is_written_from_memory(tmp_path):
    tensors = {"position_net.null_positive_feature": torch.nn.Parameter(torch.randn(48))}
    config = ModelConfig(unet=UNetConfig(**SMALL, grounding=BOX_TEXT))
    save_adapter(tmp_path / "a", tensors, config, dtype=torch.float16)
    stored = load_file(tmp_path / "a")
    value = tensors["position_net.null_positive_feature"].detach()
    assert torch.equal(stored["unet.position_net.null_positive_feature"], value.half())
    with pytest.raises(ValueError, match="unknown part 'clip'"):
        save_model(tmp_path / "b", {"clip": hold({})}, config)
    assert to_dict(read_weights(tmp_path / "a").config) == to_dict(config)
