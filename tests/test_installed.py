"""What works in a clone works where the package was installed without one, from any folder."""

from __future__ import annotations

import configparser
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gligen import files
from gligen.commands import sample
from gligen.loading import EMBEDDED

ROOT = Path(__file__).parents[1]


def installed() -> dict[str, Path]:
    """Where setup.cfg has files of the project copied to, and their own places."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {}
    for folder, patterns in setup["options.data_files"].items():
        for pattern in patterns.split():
            found |= {f"{folder}/{path.name}": path for path in ROOT.glob(pattern) if path.is_file()}
    return found


def test_all_that_is_embedded_is_installed():
    copied = set(installed().values())
    assert copied >= set(EMBEDDED.glob("scenes-*"))
    assert copied >= {path for path in sample.EXAMPLE.parent.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["default", "user"])
def test_installed_files_are_found_where_there_is_no_clone(tmp_path, monkeypatch, scheme):
    for name, path in installed().items():
        (tmp_path / scheme / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / scheme / name).symlink_to(path)
    roots = {sysconfig.get_default_scheme(): "default", sysconfig.get_preferred_scheme("user"): "user"}
    monkeypatch.setattr(files.sysconfig, "get_path", lambda name, scheme: str(tmp_path / roots[scheme]))
    assert files.shipped("examples/box-text.json") == sample.EXAMPLE  # the clone goes first
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages/gligen/files.py"))
    for name in ("checkpoints/scenes-base.safetensors", "examples/box-text.json", "examples/inputs/depth.png"):
        assert files.shipped(name) == tmp_path / scheme / "share/gligen" / name
    assert files.shipped("checkpoints/none") == tmp_path / "site-packages/checkpoints/none"


def test_output_that_nobody_reads_any_more_ends_without_a_word():
    command = f"{sys.executable} -m gligen.weights inspect {EMBEDDED / 'scenes-base.safetensors'} | true"
    made = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert made.stderr == ""
