"""Habits that people bring from elsewhere: settings of torch, names of other programs, addresses for paths."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import gligen
from gligen import cli
from gligen.commands import evaluate, sample
from gligen.config import ScheduleConfig
from gligen.job import complete
from gligen.loading import build_pipeline, open_model
from gligen.request import Request, parse_request
from gligen.weights import hold, read_weights, save_adapter, save_model
from gligen.weights.safetensors_file import read_safetensors
from tests.generated import generated_base, generated_model

ENTITY = {"phrase": "a red ball", "box": [0.1, 0.2, 0.6, 0.9]}


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(generated_model(), device="cpu", dtype="float32")


@pytest.fixture
def adapter(tmp_path) -> Path:
    """The folder of a training run: an adapter of few token slots, and the state beside it."""
    model = generated_model()
    grounding = {n: t for n, t in model.parts["unet"].items() if ".fuser." in n or n.startswith("position_net.")}
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run/adapter.safetensors", grounding, model.config)
    save_adapter(tmp_path / "run/checkpoint.safetensors", grounding, model.config)
    save_model(tmp_path / "base", generated_base()[1], generated_base()[0])
    return tmp_path / "run"


@pytest.fixture
def defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
@pytest.mark.parametrize("setting", ["float64", "bfloat16", "device"])
def test_torchs_defaults_change_no_image(pipe, setting, sampler, defaults, adapter):
    fields = {"entities": [ENTITY], "steps": 3, "tau": 1, "sampler": sampler, "output_type": "latent"}
    files = {"checkpoint": adapter.parent / "base", "adapter": adapter, "device": "cpu", "dtype": "float32"}
    loaded = gligen.load(**files)("a ball", **fields)
    expected, tokens = pipe("a ball", **fields), pipe.encode_text(["a ball"])["a ball"]
    if setting == "device":
        torch.set_default_device("meta")  # where numbers that come to it are lost
    else:
        torch.set_default_dtype(getattr(torch, setting))
    assert torch.equal(pipe("a ball", **fields), expected)
    assert torch.equal(pipe.encode_text(["a ball"])["a ball"], tokens)
    assert torch.equal(gligen.load(**files)("a ball", **fields), loaded)
    assert torch.get_default_dtype() == (torch.float32 if setting == "device" else getattr(torch, setting))


def test_no_state_of_torch_is_moved(pipe, adapter):
    before = torch.get_rng_state()
    gligen.load(adapter.parent / "base", adapter, device="cpu")("a ball", steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_tensors_that_are_given_can_be_built_on(pipe):
    (sample,) = pipe.generate([Request(prompt="a ball", steps=1)], output_type="pt")
    tokens = [*pipe.encode_text(["a"]).values(), *pipe.encode_phrases(["a"]).values()]
    scale = torch.ones(1, requires_grad=True)
    for tensor in (sample.latents, sample.image, *tokens):
        tensor.add_(1)  # inference mode's may not be changed
        (tensor * scale).sum().backward()  # nor be saved for gradients
    assert scale.grad is not None


def test_an_adapter_whose_gates_are_shut_is_said_to_have_no_effect(adapter, caplog):
    base = adapter.parent / "base"
    open_model(base, adapter)
    assert "gate" not in caplog.text
    state = read_weights(adapter / "adapter.safetensors")
    shut = {n: torch.zeros(()) if "alpha_" in n else t.read() for n, t in state.parts["unet"].items()}
    save_adapter(adapter.parent / "shut", hold(shut), state.config)
    open_model(base, adapter.parent / "shut")
    assert "every gate of its fusers is 0, so grounding has no effect" in caplog.text


def test_the_folder_of_a_training_run_stands_for_its_adapter(adapter):
    alone = read_weights(adapter / "adapter.safetensors")
    found = read_weights(adapter)
    assert (found.kind, found.config, found.modes) == ("adapter", alone.config, alone.modes)


def test_a_folder_with_one_file_is_read_as_that_file(tmp_path):
    """With what it says about itself: heads, token slots, mode."""
    config, parts = generated_base()
    (tmp_path / "folder").mkdir()
    save_model(tmp_path / "folder/any name.safetensors", parts, config)
    assert read_weights(tmp_path / "folder").config == config


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("https://huggingface.co/a/b-1/resolve/main/x/v1.ckpt?download=true", "give hf:a/b-1/x/v1.ckpt"),
        ("https://huggingface.co/a/b/blob/main/v1.safetensors", "give hf:a/b/v1.safetensors"),
        ("https://huggingface.co/a/b", "give hf:a/b"),
        ("https://example.org/v1.ckpt", "it is an address; download the file"),
        ("owner/stable-diffusion-v1-5", "if it is a repository of the Hugging Face Hub, give hf:owner/stable-dif"),
        ("models/v1.ckpt", "no such file or folder"),
        ("checkpoints/none", "no such file or folder"),
    ],
)
def test_addresses_and_repositories_are_told_how_to_be_given(path, advice, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(FileNotFoundError) as caught:
        gligen.load(path)
    assert str(caught.value).startswith(f"{path}: no such file or folder")
    assert advice in str(caught.value)
    assert ("hf:" in str(caught.value)) is ("hf:" in advice)
    with pytest.raises(FileNotFoundError, match="--vae"):
        gligen.load(vae=path)


@pytest.mark.parametrize("source", ["https://example.org/a.png", "data:image/png;base64," + "A" * 9000])
def test_pictures_from_elsewhere_are_refused_for_that(source):
    with pytest.raises(ValueError, match="give a file on this machine, or a PIL image") as caught:
        Request(prompt="a", init_image=source)
    assert len(str(caught.value)) < 200


def test_none_is_what_is_not_given(pipe):
    names = ("negative_prompt", "seed", "entities", "guidance", "steps", "size", "num_images", "tau", "sampler")
    assert parse_request({"prompt": "a", **dict.fromkeys(names)}) == Request(prompt="a")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DDIM", "ddim"), ("Euler a", "euler-ancestral"), ("k_euler", "euler"), ("DPM++ 2M Karras", "dpmpp"),
        ("dpmpp_2m", "dpmpp"), ("uni_pc", "unipc"), ("euler_ancestral", "euler-ancestral"), ("PNDM", "plms"),
    ],
)  # fmt: skip
def test_samplers_of_other_programs_are_told_by_ours(theirs, ours):
    with pytest.raises(ValueError, match=rf"did you mean '{ours}'\? give one of ddpm"):
        Request(prompt="a", sampler=theirs)
    with pytest.raises(ValueError, match="sampler is 'magic': give one of"):
        Request(prompt="a", sampler="magic")


def test_weights_that_are_no_fractions_are_refused_by_name(tmp_path):
    config, parts = generated_base()
    unet = {n: t.read() for n, t in parts["unet"].items()}
    unet["out.2.weight"] = unet["out.2.weight"].to(torch.int8)
    save_model(tmp_path / "int8", {**parts, "unet": hold(unet)}, config)
    with pytest.raises(ValueError, match=r"stored as other than floating-point numbers.*\(out\.2\.weight is int8\)"):
        gligen.load(tmp_path / "int8", device="cpu")


def test_public_names_are_listed_before_they_are_used():
    code = "import gligen, sys; print(set(gligen.__all__) <= set(dir(gligen)), 'torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["True", "False"]


def test_a_tilde_behind_a_flags_equals_sign_is_the_home_folder(monkeypatch):
    """Shells expand it only where a word begins with it."""
    monkeypatch.setenv("HOME", "/home/somebody")
    args = sample.build_parser().parse_args(["--out=~/o", "--lora=~/a:0.5", "--prompt=~ 3 = x", "--request", "~/r"])
    assert (args.out, args.lora, args.prompt) == ("/home/somebody/o", ["/home/somebody/a:0.5"], "~ 3 = x")
    args = evaluate.build_parser().parse_args(["scenes", "--out=~/o", "--adapter=~/a"])
    assert (args.out, args.adapter) == ("/home/somebody/o", "/home/somebody/a")


@pytest.mark.parametrize("suffix", [".aria2", ".st"])
def test_a_file_that_is_still_downloaded_is_refused(tmp_path, suffix):
    """It has its full size, and zeros where nothing has come yet."""
    config, parts = generated_base()
    path = tmp_path / "base.safetensors"
    save_model(path, parts, config)
    (tmp_path / f"base.safetensors{suffix}").touch()
    for open_it in (lambda: read_weights(path), lambda: gligen.load(vae=path), lambda: gligen.load(loras=path)):
        with pytest.raises(ValueError, match=rf"its download is not finished: base\.safetensors\{suffix} is beside it"):
            open_it()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model_index.json", "config.json"])
def test_json_in_place_of_weights_is_told_what_to_give(tmp_path, name):
    (tmp_path / name).write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"a JSON file, .*: give the weights, or their folder"):
        read_weights(tmp_path / name)


def test_a_packed_model_is_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model/unet/diffusion_pytorch_model.safetensors", b"")
    with pytest.raises(ValueError, match=r"holds model/unet/diffusion_pytorch_model\.safetensors: unpack it first"):
        read_weights(tmp_path / "model.zip")


def test_metadata_of_null_is_none(tmp_path):
    header = b'{"__metadata__":null,"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    tensors, metadata = read_safetensors(tmp_path / "a")
    assert (tensors["w"].read().tolist(), metadata) == ([1.0], {})


def test_an_adapter_given_for_another_file_is_told_where_it_belongs(adapter):
    path = adapter / "adapter.safetensors"
    with pytest.raises(ValueError, match=r"--lora .* holds GLIGEN's own layers: give it with --adapter FILE"):
        gligen.load(loras=path)
    with pytest.raises(ValueError, match=r"--vae .* holds no autoencoder: it holds unet"):
        gligen.load(vae=path)


def test_more_steps_than_a_model_has_are_refused_before_anything_is_built():
    model = generated_model()
    config = dataclasses.replace(model.config, schedule=ScheduleConfig(timesteps=50))
    facts = dataclasses.replace(model, config=config).facts
    complete(Request(prompt="a", steps=50), facts)
    with pytest.raises(ValueError, match="steps is 51: this model has 50 timesteps, give at most as many"):
        complete(Request(prompt="a", steps=51), facts)


def test_a_reader_that_has_enough_ends_a_command_and_any_other_broken_pipe_is_told(capfd):
    script = (
        "import sys; from gligen import cli; sys.exit(cli.run(lambda argv: [print(i) for i in range(10**5)] and None))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout.readline() == b"0\n"
        command.stdout.close()
        assert (command.wait(), command.stderr.read()) == (141, b"")

    def lose_a_worker(argv):
        raise BrokenPipeError("a worker is gone")

    assert cli.run(lose_a_worker, []) == 2
    assert capfd.readouterr().err == "error: a worker is gone\n"
