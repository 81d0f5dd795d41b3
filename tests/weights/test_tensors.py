"""Lazy tensors: the right numbers, wherever they are wanted, for no more memory than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gligen.weights import hold, load_part
from gligen.weights.safetensors_file import read_safetensors, write_safetensors
from gligen.weights.tensors import concat, reshape, rows, transpose
from tests.weights.helpers import REPOSITORY

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)


def test_safetensors_equal_the_formats_own_library_both_ways(tmp_path):
    numbers = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4)
    tensors = {f"t.{i}": numbers.abs().to(dtype) if i > 6 else numbers.to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    found, metadata = read_safetensors(tmp_path / "theirs.safetensors")
    assert metadata == {"a": "b"}
    write_safetensors(tmp_path / "ours.safetensors", found, metadata)
    again = load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].read().dtype == again[name].dtype == tensor.dtype
        for read in (found[name].read(), again[name]):  # bytes, since not every dtype can be compared
            assert read.contiguous().view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()


def test_reading_converts_numbers_but_not_counters(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", hold({"w": torch.randn(5, 7), "ids": torch.arange(9)}), {})
    found, _ = read_safetensors(tmp_path / "a.safetensors")
    assert found["w"].read(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert found["ids"].read(dtype=torch.bfloat16).dtype == torch.int64


def test_edited_tensor_changes_neither_the_file_nor_a_later_reading_of_others(tmp_path):
    path = tmp_path / "a.safetensors"
    original = torch.arange(40000.0)
    write_safetensors(path, hold({"a": original, "b": original}), {})
    before = path.read_bytes()
    found, _ = read_safetensors(path)
    a = found["a"].read()
    a.mul_(2)
    assert torch.equal(found["b"].read(dtype=torch.float64), original.double())
    found["a"].read(dtype=torch.float64)  # gives pages back, but not those that hold the edit
    assert torch.equal(a, original * 2)
    assert path.read_bytes() == before


def test_misaligned_file_is_read_by_copying(tmp_path):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length puts the numbers at an odd offset
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.arange(3.0).numpy().tobytes())
    assert read_safetensors(path)[0]["w"].read().tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", [4, 9, 50, -1])
def test_truncated_safetensors_is_one_line(tmp_path, length):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:length])
    from gligen.weights import read_weights

    with pytest.raises(ValueError, match=r"is it fully downloaded\?") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]},
        {"dtype": "F99", "shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        {"shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
        5,
    ],
)
def test_header_that_does_not_describe_its_bytes_is_refused(tmp_path, entry):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(ValueError, match=r"safetensors header|does not fit its bytes"):
        read_safetensors(path)


def test_computed_tensors_equal_what_torch_computes(tmp_path):
    a, b = torch.randn(4, 6), torch.randn(2, 6)
    write_safetensors(tmp_path / "a.safetensors", hold({"a": a, "b": b}), {})
    lazy, _ = read_safetensors(tmp_path / "a.safetensors")
    expected = {
        concat([lazy["a"], lazy["b"]]): torch.cat([a, b]),
        transpose(lazy["a"]): a.t(),
        rows(lazy["a"], 1, 3): a[1:3],
        reshape(lazy["b"], (2, 6, 1, 1)): b[..., None, None],
        rows(concat([lazy["a"], lazy["b"]]), 4, 6): b,
    }
    for tensor, value in expected.items():
        assert tensor.shape == tuple(value.shape)
        assert torch.equal(tensor.read(), value)
        assert torch.equal(tensor.read(dtype=torch.float16), value.half())
        tensor.read().zero_()  # its own copy
        assert torch.equal(tensor.read(), value)


def test_load_part_is_strict_and_names_what_does_not_fit():
    def network() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))

    good = {"0.weight": torch.randn(2, 3), "0.bias": torch.ones(2), "1.weight": torch.ones(2), "1.bias": torch.ones(2)}
    module = network()
    load_part(module, hold(good), device="cpu", dtype=torch.float64, what="net")
    assert module[0].weight.dtype == torch.float64
    assert torch.equal(module[0].weight, good["0.weight"].double())
    bad = {**good, "0.weight": torch.randn(2, 4), "extra": torch.ones(1)}
    del bad["1.bias"]
    with pytest.raises(ValueError, match="net: its weights do not fit") as caught:
        load_part(network(), hold(bad), what="net")
    for words in ("1 missing (1.bias)", "1 unexpected (extra)", "0.weight is (2, 4) instead of (2, 3)"):
        assert words in str(caught.value)


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from gligen.weights import load_part
from gligen.weights.pickles import read_pickle
from gligen.weights.safetensors_file import read_safetensors
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
with torch.device("meta"):
    module = nn.ModuleDict({str(i): nn.Linear(2048, 2048, bias=False) for i in range(12)})
def status(field):  # MiB; not getrusage, whose peak a process inherits from the one that started it
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
torch.zeros(8).half().sum()
before = status("VmRSS")
tensors = read_safetensors(path)[0] if path.endswith("safetensors") else read_pickle(path)[0]
load_part(module, tensors, device="cpu", dtype=dtype, what="test")
print(status("VmHWM") - before)
print(sum(float(p.max()) for p in module.parameters()))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_loading_needs_the_memory_of_its_target_and_a_tenth(tmp_path, suffix):
    # 12 matrices of 16 MiB: 192 MiB in the file, 96 MiB in half precision, nothing where the file is used as it is
    path = tmp_path / f"a.{suffix}"
    tensors = {f"{i}.weight": torch.full((2048, 2048), float(i)) for i in range(12)}
    if suffix == "pth":
        torch.save(tensors, path)
    else:
        write_safetensors(path, hold(tensors), {})
    for dtype, target in {"float16": 96, "float32": 192}.items():
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), dtype],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        loaded, total, used = (float(line) for line in run.stdout.split())
        assert total == 66
        # before, the weights may still be in the file; once they were used they are in memory
        assert target * 0.9 < used < target * 1.1, f"{dtype}: {used:.0f} MiB"
        assert loaded < target * 1.1, f"{dtype}: {loaded:.0f} MiB"
    assert Path(path).stat().st_size >= 192 * 2**20
