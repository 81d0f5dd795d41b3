"""A model that goes through a layout paints what it painted: config, networks' outputs and mode come back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gligen import cli
from gligen.config import to_dict
from gligen.loading import embedded_adapter, embedded_base
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.weights import Weights, combine, load_part, read_weights, write_weights
from gligen.weights import __main__ as command
from gligen.weights.files import CONFIG_KEY
from gligen.weights.names_ema import ema_name
from tests.weights.helpers import sd_state, write_gligen, write_sd


@pytest.fixture(scope="module")
def base() -> Weights:
    return read_weights(embedded_base())


@pytest.fixture(scope="module")
def grounded(base) -> Weights:
    adapter = embedded_adapter("box-text")
    assert adapter is not None
    return combine(base, read_weights(adapter))


def outputs(weights: Weights) -> list[torch.Tensor]:
    """What the base's three networks make of fixed inputs."""
    config = weights.config
    with torch.device("meta"):
        networks = {
            "unet": UNetModel(config.unet), "vae": AutoencoderKL(config.vae),
            "text_encoder": CLIPTextEncoder(config.text_encoder),
        }  # fmt: skip
    for part, network in networks.items():
        load_part(network, weights.parts[part], device="cpu", dtype=torch.float32, what=part)
        network.eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.inference_mode():
        context = networks["text_encoder"](networks["text_encoder"].tokenize(["a red star and a blue disc"])[0])
        eps = networks["unet"](latents, torch.tensor([300]), context)
        picture = networks["vae"].decode(latents)
    return [context, eps, picture]


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors", "gligen", "diffusers", "model"])
def test_embedded_base_paints_the_same_behind_every_layout(tmp_path, base, name):
    write_weights(base, tmp_path / name, name.partition(".")[0])
    again = read_weights(tmp_path / name)
    assert to_dict(again.config) == to_dict(base.config)
    for one, other in zip(outputs(again), outputs(base), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["sd", "gligen", "diffusers", "model", "pruned", "adapter"])
def test_grounding_comes_back_from_every_layout(tmp_path, base, grounded, layout):
    assert grounded.config.unet.grounding.max_entities != 30  # what shapes would give
    write_weights(grounded, tmp_path / "x", layout)
    again = read_weights(tmp_path / "x")
    whole = combine(base, again) if layout in ("pruned", "adapter") else again
    assert whole.modes == ("box-text",)
    assert to_dict(whole.config) == to_dict(grounded.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]  # nothing beside it that could be lost


@pytest.mark.parametrize("layout", ["sd", "gligen"])
def test_one_of_several_possible_modes_comes_back(tmp_path, base, layout):
    """canny and depth are the same network; canny is the first that shapes allow."""
    adapter = embedded_adapter("depth")
    assert adapter is not None
    for mode in ("canny", "depth"):
        weights = combine(base, read_weights(adapter, mode=mode))
        write_weights(weights, tmp_path / mode, layout)
        again = read_weights(tmp_path / mode)
        assert (again.modes, again.config.unet.grounding.mode) == ((mode,), mode)


@pytest.mark.parametrize("layout", ["sd", "gligen", "adapter", "pruned"])
def test_model_made_in_memory_is_of_its_configs_mode(tmp_path, grounded, layout):
    write_weights(replace(grounded, modes=()), tmp_path / "x", layout)
    assert read_weights(tmp_path / "x").modes == ("box-text",)


def test_layouts_that_need_nothing_more_hold_nothing_more(tmp_path):
    """Stable Diffusion's own sizes stay a file that no other program finds anything odd in."""
    weights = read_weights(write_sd(tmp_path / "a.ckpt"))
    write_weights(weights, tmp_path / "b.ckpt", "sd")
    assert set(torch.load(tmp_path / "b.ckpt", weights_only=True)) == {"global_step", "state_dict"}


def test_what_is_stored_beside_a_state_dict_is_plain_text(tmp_path, base):
    write_weights(base, tmp_path / "a.ckpt", "sd")
    value = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert json.loads(value[CONFIG_KEY])["unet"] == {"num_heads": 2, "norm_groups": 8}


def test_file_that_would_come_back_otherwise_is_not_left_behind(tmp_path, base, monkeypatch):
    monkeypatch.setattr("gligen.weights.write._config_metadata", lambda unsaid: {})
    with pytest.raises(ValueError, match=r"layout 'sd' cannot hold .*num_heads") as caught:
        write_weights(base, tmp_path / "a.ckpt", "sd")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- the schedule that a checkpoint's buffers tell -------------------------------------------------------------------


def buffers(betas: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"betas": betas.to(dtype), "alphas_cumprod": torch.cumprod(1 - betas, 0).to(dtype)}


def scaled_linear(start: float, end: float, steps: int) -> torch.Tensor:
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def test_schedule_buffers_are_believed(tmp_path):
    state = sd_state()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # Stable Diffusion's own, however it was rounded
        path = write_sd(tmp_path / "a.ckpt", state | buffers(scaled_linear(0.00085, 0.012, 1000), dtype))
        assert read_weights(path).config.schedule == read_weights(write_sd(tmp_path / "plain.ckpt")).config.schedule
    path = write_sd(tmp_path / "b.ckpt", state | buffers(scaled_linear(0.001, 0.02, 500)))
    schedule = read_weights(path).config.schedule
    assert (schedule.timesteps, schedule.beta_start, schedule.beta_end) == (500, 0.001, 0.02)


def test_other_schedules_are_refused_by_name(tmp_path):
    betas = scaled_linear(0.00085, 0.012, 1000)
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # rescaled to a signal of 0 at the end
    bar = root**2
    rescaled = {"alphas_cumprod": bar.float(), "betas": (1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])).float()}
    for odd in (rescaled, buffers(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))):
        path = write_sd(tmp_path / "a.ckpt", sd_state() | odd)
        with pytest.raises(ValueError, match=r"a\.ckpt: its noise schedule is not of betas whose roots"):
            read_weights(path)
    path = write_sd(tmp_path / "v.ckpt", sd_state() | {"v_pred": torch.zeros(0)})
    with pytest.raises(ValueError, match=r"v\.ckpt: predicts v; only models that predict epsilon"):
        read_weights(path)
    save_file({n: t.clone() for n, t in sd_state().items()}, tmp_path / "v.safetensors",
              metadata={"modelspec.prediction_type": "v"})  # fmt: skip
    with pytest.raises(ValueError, match="predicts v"):
        read_weights(tmp_path / "v.safetensors")


# --- diffusers' configs ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    weights = read_weights(write_gligen(tmp_path / "gligen.pth"))
    write_weights(weights, tmp_path / "folder", "diffusers")
    return tmp_path / "folder"


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stated | values))


REFUSED = [
    ("unet/config.json", {"norm_eps": 1e-6}),
    ("unet/config.json", {"act_fn": "gelu"}),
    ("unet/config.json", {"flip_sin_to_cos": False}),
    ("unet/config.json", {"freq_shift": 1}),
    ("unet/config.json", {"downsample_padding": 0}),
    ("unet/config.json", {"use_linear_projection": True}),
    ("unet/config.json", {"time_cond_proj_dim": 256}),
    ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}),
    ("unet/config.json", {"class_embed_type": "timestep"}),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2]}),
    ("unet/config.json", {"only_cross_attention": [False, True]}),
    ("unet/config.json", {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}),
    ("unet/config.json", {"quantization_config": {"load_in_8bit": True}}),
    ("vae/config.json", {"shift_factor": 0.1}),
    ("vae/config.json", {"latents_mean": [0.1, 0, 0, 0]}),
    ("vae/config.json", {"latents_std": [1, 2, 3, 4]}),
    ("vae/config.json", {"use_quant_conv": False}),
    ("vae/config.json", {"act_fn": "relu"}),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
    ("text_encoder/config.json", {"hidden_act": "gelu"}),
    ("text_encoder/config.json", {"layer_norm_eps": 1e-6}),
    ("text_encoder/config.json", {"model_type": "xlm-roberta"}),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}),
    ("tokenizer/tokenizer_config.json", {"pad_token": "!"}),
    ("tokenizer/special_tokens_map.json", {"pad_token": {"content": "!"}}),
]


@pytest.mark.parametrize(
    ("file", "values"), REFUSED, ids=lambda value: "" if isinstance(value, str) else next(iter(value))
)
def test_config_keys_that_are_not_computed_here_are_refused_by_name(folder, file, values):
    change(folder, file, **values)
    with pytest.raises(ValueError, match=r".") as caught:
        read_weights(folder)
    message = str(caught.value)
    key = next(iter(values))
    assert message.startswith(f"{folder}: {file} ")
    assert (key in message) or (key == "model_type" and "xlm-roberta" in message) or key == "pad_token"
    assert "\n" not in message


def test_config_keys_that_are_computed_are_honoured(folder):
    change(folder, "unet/config.json", norm_num_groups=16, attention_head_dim=2)
    change(folder, "vae/config.json", norm_num_groups=8, scaling_factor=0.5)
    change(folder, "text_encoder/config.json", num_attention_heads=4)
    change(folder, "scheduler/scheduler_config.json", beta_start=0.001, beta_end=0.02, num_train_timesteps=400)
    config = read_weights(folder).config
    assert (config.unet.norm_groups, config.unet.num_heads) == (16, 2)
    assert (config.vae.norm_groups, config.vae.scale_factor) == (8, 0.5)
    assert config.text_encoder.heads == 4
    assert (config.schedule.timesteps, config.schedule.beta_start, config.schedule.beta_end) == (400, 0.001, 0.02)


def test_unknown_keys_are_pointed_out_unless_they_are_off(folder):
    assert read_weights(folder).warnings == ()
    change(folder, "unet/config.json", attention_window=7, new_switch=False, other=None, _diffusers_version="9")
    assert read_weights(folder).warnings == (
        "unet/config.json says attention_window is 7, which is not known here and was ignored",
    )


def test_schedule_left_to_defaults_is_refused(folder):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text('{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085}')
    with pytest.raises(ValueError, match=r"scheduler_config\.json says no beta_end"):
        read_weights(folder)


def test_every_key_of_diffusers_is_known():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    import inspect

    from gligen.weights import diffusers_configs as ours

    for cls, known in (
        (diffusers.UNet2DConditionModel, ours._UNET.keys() | ours._UNET_OTHER),
        (diffusers.AutoencoderKL, ours._VAE.keys() | ours._VAE_OTHER),
    ):
        assert set(inspect.signature(cls.__init__).parameters) - {"self"} <= known


# --- which files of a folder -----------------------------------------------------------------------------------------


def into_shards(folder: Path, shard: str, index: str) -> None:
    """unet/'s file as two shards and an index under these names."""
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    names = sorted(state)
    places = {}
    for i, some in enumerate((names[::2], names[1::2]), start=1):
        file = shard.format(f"{i:05}-of-00002")
        save_file({name: state[name] for name in some}, folder / "unet" / file)
        places |= dict.fromkeys(some, file)
    (folder / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole.unlink()


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("diffusion_pytorch_model.fp16-{}.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model-{}.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors.index.json"),
        ("diffusion_pytorch_model-{}.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ],
)
def test_shards_of_every_naming_are_read(folder, shard, index):
    before = read_weights(folder)
    into_shards(folder, shard, index)
    again = read_weights(folder)
    assert set(again.parts["unet"]) == set(before.parts["unet"])
    (folder / "unet" / index).unlink()  # shards alone say that they are two of two
    assert len(read_weights(folder).parts["unet"]) == len(before.parts["unet"])
    (folder / "unet" / shard.format("00002-of-00002")).unlink()
    with pytest.raises(ValueError, match=r"holds 1 of 2 shards: is it fully downloaded\?"):
        read_weights(folder)


def test_stale_index_beside_a_whole_file_is_passed_over(folder):
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))
    weights = read_weights(folder)
    assert "out.2.weight" in weights.parts["unet"]
    assert any("index.json was not read: its shards are not all there" in note for note in weights.notes)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing, though"):
        read_weights(folder)


def test_whole_precision_is_read_before_half(folder):
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    half = {name: t.half() for name, t in load_file(whole).items()}
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert read_weights(folder).parts["unet"]["out.2.weight"].dtype == torch.float32
    whole.unlink()
    assert read_weights(folder).parts["unet"]["out.2.weight"].dtype == torch.float16


# --- odd folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("unet/config.json", {"attention_head_dim": "8"}, "num_heads is '8': give a whole number"),
        ("unet/config.json", {"attention_head_dim": 5}, "num_heads is 5"),
        ("unet/config.json", {"norm_num_groups": None}, "norm_num_groups is None"),
        ("unet/config.json", {"norm_num_groups": 7}, "GroupNorm needs a multiple of 7"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scale_factor is nan"),
        ("vae/config.json", {"scaling_factor": 0}, "scale_factor is 0"),
        ("vae/config.json", {"scaling_factor": "0.18"}, "scale_factor is '0.18': give a number"),
        ("scheduler/scheduler_config.json", {"beta_end": "0.012"}, "beta_end is '0.012': give a number"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "beta_end 2.0: give numbers between 0 and 1"),
        ("scheduler/scheduler_config.json", {"beta_start": 0.1, "beta_end": 0.01}, "beta_start is 0.1 and"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 4000}, "timesteps is 4000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 99.5}, "timesteps is 99.5: give a whole number"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        ("gligen.json", {"colour": 1}, "unknown field 'colour'"),
    ],
)  # fmt: skip
def test_config_values_that_cannot_be_are_one_line(folder, file, values, said):
    change(folder, file, **values)
    with pytest.raises(ValueError, match=r".") as caught:
        read_weights(folder)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


def test_size_may_be_a_pair_and_a_count_a_float(folder):
    change(folder, "unet/config.json", sample_size=[24, 24])
    change(folder, "scheduler/scheduler_config.json", num_train_timesteps=1000.0)
    config = read_weights(folder).config
    assert (config.image_size, config.schedule.timesteps) == (24 * 4, 1000)


def test_folders_of_a_pipeline_that_are_not_used_are_pointed_out(folder):
    for name in ("controlnet", "safety_checker"):
        change(folder, f"{name}/config.json", a=1)
    assert read_weights(folder).warnings == ("has controlnet/, which is not used here",)
    (folder / "unet").rename(folder / "transformer")
    change(folder, "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="a FluxPipeline of diffusers without unet/"):
        read_weights(folder)


def test_folder_of_another_kind_is_named(folder):
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    save_file(state | {"add_embedding.linear_1.weight": torch.zeros(2, 2)}, whole)
    with pytest.raises(ValueError, match="Stable Diffusion XL"):
        read_weights(folder)
    text = folder / "text_encoder/model.safetensors"
    save_file(state, whole)
    save_file(load_file(text) | {"text_projection.weight": torch.zeros(48, 64)}, text)
    assert "text_projection.weight" not in read_weights(folder).parts["text_encoder"]


# --- what writing must not change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_numbers_beyond_a_precision_are_not_made_infinite(tmp_path, name):
    state = sd_state()
    key = "model.diffusion_model.out.2.bias"
    state[key] = torch.tensor([0.0, 1.0, -70000.0, 2.0])
    weights = read_weights(write_sd(tmp_path / "b.ckpt", state))
    with pytest.raises(ValueError, match=r"holds 7e\+04, and float16 ends at 6.55e\+04: use bfloat16") as caught:
        write_weights(weights, tmp_path / name, "sd", dtype=torch.float16)
    assert key in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["b.ckpt"]
    write_weights(weights, tmp_path / name, "sd", dtype=torch.bfloat16)
    assert read_weights(tmp_path / name).parts["unet"]["out.2.bias"].read()[2] == torch.tensor(-70000.0).bfloat16()
    state[key] = torch.tensor([0.0, float("nan"), float("inf"), 2.0])  # as the file has it
    write_weights(read_weights(write_sd(tmp_path / "c.ckpt", state)), tmp_path / f"c{name}", "sd", dtype=torch.float16)


def test_what_a_conversion_leaves_out_is_said(tmp_path, caplog):
    state = sd_state() | {"strange.weight": torch.ones(1)}
    averaged = {
        ema_name(n.removeprefix("model.diffusion_model.")): t for n, t in state.items() if n.startswith("model.d")
    }
    source = write_sd(tmp_path / "a.ckpt", state | averaged)
    assert cli.run(command.main, ["convert", str(source), str(tmp_path / "b.ckpt"), "--to", "sd"]) == 0
    assert "ignored 1 keys (strange.weight)" in caplog.text
    assert "holds averaged (EMA) weights too: --ema takes them" in caplog.text


def test_advice_for_a_layout_that_needs_more_leads_somewhere(tmp_path):
    bare = {n: t for n, t in sd_state().items() if not n.startswith("first_stage_model.")}
    weights = read_weights(write_sd(tmp_path / "a.ckpt", bare))
    with pytest.raises(
        ValueError, match="holds no autoencoder, which this layout needs: layout 'model' holds whatever"
    ):
        write_weights(weights, tmp_path / "b", "gligen")
    write_weights(weights, tmp_path / "b", "model")  # the advice, followed
    with pytest.raises(ValueError, match=r"a\.ckpt is a file, not a folder"):
        write_weights(weights, tmp_path / "a.ckpt" / "b", "model")
