"""Checkpoints are looked at, not run; what is damaged or foreign is said in one line."""

from __future__ import annotations

import builtins
import collections
import functools
import importlib
import os
import subprocess
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gligen.weights import read_weights
from gligen.weights.files import read_tensors
from gligen.weights.pickles import plain, read_pickle
from tests.conftest import GOLDEN
from tests.weights.helpers import ORIGINAL_CONFIG, as_omegaconf, fake_modules, genuine, sd_state, write_gligen, write_sd


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def one_line(path: Path, read: Any = read_weights) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Call(builtins.eval, f"open({str(marker)!r}, 'w')"), "builtins.eval"),
        (lambda marker: Call(builtins.exec, f"open({str(marker)!r}, 'w')"), "builtins.exec"),
        (lambda marker: Call(subprocess.Popen, ["touch", str(marker)]), "subprocess.Popen"),
        (lambda marker: Call(importlib.import_module, "antigravity"), "importlib.import_module"),
        (lambda marker: Call(builtins.open, str(marker), "w"), "io.open"),
        (lambda marker: Call(builtins.getattr, os, "system"), "builtins.getattr"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_pickle_is_refused_and_does_not_run(tmp_path, make, asked, nested):
    marker = tmp_path / "ran"
    path = tmp_path / "model.ckpt"
    hostile = make(marker)
    if asked == "builtins.getattr":  # a module does not pickle; the name alone must do
        hostile = Call(builtins.getattr, "os", "system")
    value = {"state_dict": {**sd_state(), "betas": hostile}} if nested else hostile
    torch.save(value, path)
    message = one_line(path)
    assert f"asks to run {asked}; refused, nothing was run" in message
    assert not marker.exists()


def test_functions_without_a_bad_name_do_not_run_either(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "model.ckpt"
    torch.save(
        {"x": Call(functools.partial, print, marker), "y": Call(Path, marker), "z": Call(collections.Counter, "a")},
        path,
    )
    value, inert = read_pickle(path)
    assert not marker.exists()
    assert "functools.partial" in inert
    assert repr(value["x"]) == "<inert functools.partial>"


def test_state_of_a_placeholder_reaches_nothing(tmp_path):
    class Poison:
        def __reduce__(self) -> tuple[Any, ...]:
            return (collections.Counter, (), {"__class__": int, "__setstate__": 3})

    torch.save({"a": Poison(), "w": torch.ones(2)}, tmp_path / "a.pt")
    value, _ = read_pickle(tmp_path / "a.pt")
    assert value["w"].read().tolist() == [1, 1]
    assert type(value["a"]).__name__ == "Counter"


def test_state_of_a_tensor_or_dict_reaches_nothing(tmp_path):
    class State:
        def __init__(self, *call: Any) -> None:
            self.call = call

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call

    rebuild = torch.ones(2).__reduce_ex__(2)
    torch.save({"w": State(rebuild[0], rebuild[1], {"read": list, "region": 0})}, tmp_path / "a.pt")
    assert "a tensor with a state of its own" in one_line(tmp_path / "a.pt")
    torch.save(State(collections.OrderedDict, ([("w", torch.ones(2))],), {"items": list}), tmp_path / "b.pt")
    assert [name for name, _ in read_pickle(tmp_path / "b.pt")[0].items()] == ["w"]


def test_pickle_that_asks_for_a_huge_memo_takes_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")  # an empty dict, memo index 2**31 - 1
    assert read_pickle(tmp_path / "a.pt") == ({}, ())


def test_valid_checkpoint_with_unknown_classes_gives_its_tensors(tmp_path):
    path = write_sd(tmp_path / "model.ckpt")
    weights = read_weights(path)
    assert any("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in note for note in weights.notes)
    expected = sd_state()["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    assert torch.equal(weights.parts["unet"]["input_blocks.1.0.in_layers.2.weight"].read(), expected)


def test_omegaconf_placeholders_become_plain_data(tmp_path):
    with fake_modules() as classes:
        torch.save({"config": as_omegaconf(ORIGINAL_CONFIG, classes)}, tmp_path / "a.pt")
    value, _ = read_pickle(tmp_path / "a.pt")
    assert plain(value["config"]) == ORIGINAL_CONFIG


def test_genuine_omegaconf_2_3_config_is_read_without_omegaconf():
    path = GOLDEN / "cases/config_dict_omegaconf_2_3.pth"
    config = plain(read_pickle(path)[0]["config_dict"])
    assert config["model"]["params"]["channel_mult"] == [1, 2]
    assert config["model"]["params"]["num_heads"] == 8
    assert config["autoencoder"]["params"]["scale_factor"] == 0.18215


def test_genuine_gligen_checkpoint_is_read_without_omegaconf():
    path = genuine("gligen_small_text.pth")
    if path is None:
        pytest.skip("the genuine checkpoint is not beside the repository")
    value, inert = read_pickle(path)
    assert "omegaconf.dictconfig.DictConfig" in inert
    target = plain(value["config_dict"])["model"]["params"]["grounding_tokenizer"]["target"]
    assert target == "ldm.modules.diffusionmodules.text_grounding_net.PositionNet"
    assert len(value["model"]) == 413


def test_config_that_contains_itself_is_refused():
    config: dict[str, Any] = {"a": 1}
    config["b"] = config
    with pytest.raises(ValueError, match="contains itself"):
        plain(config)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.3, 0.9, 0.9999])
def test_truncated_checkpoint_is_said_to_be_cut_off(tmp_path, keep):
    whole = write_gligen(tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "is it fully downloaded?" in one_line(path)


def test_checkpoint_without_one_record_is_said_to_be_cut_off(tmp_path):
    whole, path = write_sd(tmp_path / "whole.ckpt"), tmp_path / "part.ckpt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            if not name.endswith("data/7"):
                target.writestr(name, source.read(name))
    assert "record 'data/7' is missing: is it fully downloaded?" in one_line(path)


def test_tensor_larger_than_its_record_is_refused(tmp_path):
    whole, path = write_sd(tmp_path / "whole.ckpt"), tmp_path / "part.ckpt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:4] if name.endswith("data/0") else data)
    assert "4 bytes instead of" in one_line(path)


def test_recompressed_checkpoint_is_read_all_the_same(tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "whole.pt")
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "whole.pt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert torch.equal(read_pickle(path)[0]["w"].read(), torch.arange(1000.0))


def test_views_and_parameters_keep_their_numbers(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    value = {"t": base.t(), "slice": base[1:3, 2:], "p": torch.nn.Parameter(base), "scalar": torch.tensor(3.5)}
    torch.save(value, tmp_path / "a.pt")
    found = read_pickle(tmp_path / "a.pt")[0]
    for name, tensor in value.items():
        assert torch.equal(found[name].read(), tensor.detach()), name
        assert torch.equal(found[name].read(dtype=torch.float64), tensor.detach().double()), name


def test_files_of_the_time_before_zip_are_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    value = {
        "whole": base, "slice": base[1:3, 2:], "t": base.t(), "half": torch.tensor([1.5, -2.0]).half(),
        "ids": torch.arange(5), "p": torch.nn.Parameter(base + 1), "scalar": torch.tensor(3.5), "empty": torch.zeros(0),
        "odd": torch.tensor([7], dtype=torch.uint8), "behind": torch.tensor([2.5]).double(),
    }  # fmt: skip
    path = tmp_path / "old.pt"
    torch.save(value, path, _use_new_zipfile_serialization=False)
    found = read_pickle_of_old(path)
    assert set(found) == set(value)
    for name, tensor in value.items():
        assert found[name].read().dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor.detach()), name
    new = read_weights(write_sd(tmp_path / "new.ckpt"))
    for protocol in (2, 4):
        torch.save({"state_dict": sd_state()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        old = read_weights(path)
        assert (old.kind, old.config) == ("sd", new.config)
        assert torch.equal(old.parts["unet"]["out.2.weight"].read(), new.parts["unet"]["out.2.weight"].read())


def read_pickle_of_old(path: Path) -> dict[str, Any]:
    value, _, _ = read_tensors(path)
    return value


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.999])
def test_truncated_file_of_the_time_before_zip_is_said_to_be_cut_off(tmp_path, keep):
    path = tmp_path / "old.pt"
    torch.save({f"w{i}": torch.ones(10) for i in range(50)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "is it fully downloaded?" in one_line(path)


def test_hostile_file_of_the_time_before_zip_does_not_run(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "old.pt"
    torch.save({"w": Call(os.system, f"touch {marker}")}, path, _use_new_zipfile_serialization=False)
    assert "asks to run posix.system; refused, nothing was run" in one_line(path)
    assert not marker.exists()


def test_tar_of_the_time_before_that_is_named(tmp_path):
    path = tmp_path / "older.pth"
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")
    assert "load it with torch.load and re-save it" in one_line(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_parameters_and_tensors_with_attributes_keep_their_numbers(tmp_path, is_zip):
    """torch stores these by other functions than plain ones."""
    numbers = torch.arange(6.0).reshape(2, 3)
    parameter, tensor, buffer = torch.nn.Parameter(numbers), numbers + 1, torch.nn.Buffer(numbers + 2)
    parameter.scaling, tensor.tag, buffer.of = "x", {"a": 1}, collections.OrderedDict(a=1)
    path = tmp_path / "a.pt"
    torch.save({"p": parameter, "t": tensor, "b": buffer}, path, _use_new_zipfile_serialization=is_zip)
    found = read_tensors(path)[0]
    for i, name in enumerate("ptb"):
        assert torch.equal(found[name].read(), numbers + i)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.complex64, torch.bfloat16, torch.bool],
)
def test_young_and_rare_dtypes_are_read(tmp_path, dtype):
    numbers = torch.arange(12).reshape(3, 4).to(dtype)
    torch.save({"whole": numbers, "part": numbers[1:]}, tmp_path / "a.pt")
    found = read_pickle(tmp_path / "a.pt")[0]
    assert found["part"].read().dtype == dtype
    for name, expected in {"whole": numbers, "part": numbers[1:]}.items():
        assert found[name].read().view(torch.uint8).tolist() == expected.contiguous().view(torch.uint8).tolist()


def test_no_tensors_is_said_only_where_there_are_none(tmp_path):
    path = tmp_path / "a.pt"
    for empty in ([1, 2], {}, {"state_dict": {}}, {"epoch": 3, "model": {"config": {"a": 1}}}):
        torch.save(empty, path)
        assert "holds no tensors" in one_line(path)
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3)), path)
    assert "inside an object of class torch.nn.modules.container.Sequential" in one_line(path)
    torch.save({"model": torch.nn.Linear(2, 3)}, path)
    assert "inside an object of class torch.nn.modules.linear.Linear, which is not loaded: store that" in one_line(path)
    for unnamed in ([torch.ones(2)], {("a", 1): torch.ones(2)}, torch.ones(2)):
        torch.save(unnamed, path)
        assert "holds tensors, but not under names" in one_line(path)
    torch.save({"state_dict": {"a": np.ones(2)}}, path)
    assert "holds NumPy arrays, which are not read" in one_line(path)


def test_quantised_tensors_are_not_left_out_silently(tmp_path):
    path = tmp_path / "a.pt"
    state = sd_state()
    name = "model.diffusion_model.time_embed.2.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop them
        state[name] = torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8)
    torch.save({"state_dict": state}, path)
    assert f"tensor '{name}' is stored by torch._utils._rebuild_qtensor" in one_line(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"just some words\n" * 100, "a text file"),
        (bytes(range(256)) * 4, "neither a safetensors file nor a PyTorch checkpoint"),
        (b"\x80\x04N.", "a bare pickle"),
    ],
)
def test_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert said in one_line(path)


def test_other_zip_and_other_checkpoint_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a PyTorch checkpoint" in one_line(path)
    torch.save({"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, path)
    assert "of no known layout (its first names are conv1.weight, fc.bias)" in one_line(path)
    torch.save([1, 2], path)
    assert "holds no tensors" in one_line(path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_a_file_cut_within_its_first_bytes_is_said_to_be_cut_off(tmp_path, is_zip, count):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[:count])
    assert "is it fully downloaded?" in one_line(path)
