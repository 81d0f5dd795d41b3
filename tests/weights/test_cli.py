"""`python -m gligen.weights`: says what a file is, converts it, and fails in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gligen import cli
from gligen.weights import __main__ as command
from gligen.weights import read_weights
from tests.weights.helpers import REPOSITORY, genuine, gligen_parts, pruned_state, write_gligen, write_sd


def main(arguments: list[str]) -> int:
    return cli.run(command.main, arguments)


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "gligen.weights", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.returncode == code, result.stderr
    return result


def test_help_answers_without_importing_torch():
    script = "import sys\nfrom gligen.weights.__main__ import build_parser\nbuild_parser().format_help()\n"
    script += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)
    assert "convert" in run("--help").stdout
    assert "diffusers" in run("convert", "--help").stdout


def test_inspect_says_what_a_file_is(tmp_path):
    out = run("inspect", write_gligen(tmp_path / "sd-v1-4.ckpt")).stdout
    numbers = sum(t.numel() for t in gligen_parts()["model"].values())
    for words in ("gligen (checkpoint of the original trainer)", "mode      box-text\n", "gatedSA", "4 heads"):
        assert words in out
    assert f"unet: 413 tensors, {numbers / 1e6:.2f} million numbers" in out
    assert "float32" in out
    assert "omegaconf.dictconfig.DictConfig" in out


def test_inspect_says_what_is_missing(tmp_path, capsys):
    torch.save(pruned_state(), tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "missing   no base UNet: give Stable Diffusion with --checkpoint and this with --adapter" in out
    assert "missing   no text encoder: give a base with --checkpoint" in out


def test_inspect_reads_the_genuine_checkpoint(capsys):
    path = genuine("gligen_small_text.pth")
    if path is None:
        pytest.skip("the genuine checkpoint is not beside the repository")
    assert main(["inspect", str(path)]) == 0
    assert "float16" in capsys.readouterr().out


def test_convert_joins_and_changes_precision(tmp_path):
    base, adapter = write_sd(tmp_path / "b.ckpt"), write_gligen(tmp_path / "g.pth")
    out = tmp_path / "new" / "m.safetensors"
    result = run("convert", base, out, "--to", "model", "--adapter", adapter, "--dtype", "bfloat16")
    assert result.stdout.strip() == str(out)
    stored = load_file(out)["unet.position_net.linears.0.weight"]
    assert torch.equal(stored, gligen_parts()["model"]["position_net.linears.0.weight"].bfloat16())
    assert read_weights(out).modes == ("box-text",)


def test_errors_are_one_line_and_code_2(tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(write_gligen(tmp_path / "g.pth").read_bytes()[:5000])
    result = run("inspect", cut, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {cut}: ")
    with pytest.raises(ValueError, match="fully downloaded"):
        main(["inspect", str(cut), "--debug"])
    assert main(["inspect", str(tmp_path / "none")]) == 2


def test_convert_never_overwrites(tmp_path, capsys):
    path = write_gligen(tmp_path / "g.pth")
    before = path.read_bytes()
    assert main(["convert", str(path), str(path), "--to", "gligen"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_convert_takes_the_mode_and_averaged_weights(tmp_path, capsys):
    ema = {name: t + 1 for name, t in gligen_parts()["model"].items()}
    path = write_gligen(tmp_path / "g.pth", ema=ema)
    arguments = ["convert", str(path), str(tmp_path / "a"), "--to", "adapter", "--ema", "--mode"]
    assert main([*arguments, "keypoint"]) == 2
    assert "its tensors are of box-text" in capsys.readouterr().err
    assert main([*arguments, "box-text"]) == 0
    stored = load_file(tmp_path / "a")["unet.position_net.linears.4.bias"]
    assert torch.equal(stored, ema["position_net.linears.4.bias"])
