"""A mode that nobody published, from its drawn world to a measured adapter, and what it must not do to old files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gligen
from gligen.commands import evaluate, train
from gligen.modes import MODES, get_mode
from gligen.weights import combine, possible_modes, read_weights
from gligen.weights.infer import fitting_modes
from gligen.weights.safetensors_file import write_safetensors
from gligen.weights.write import write_weights
from tests.training.helpers import QUICK, write_base
from tests.weights.test_infer import MODES as PUBLISHED
from tests.weights.test_infer import meta

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.py scenes-scribble` for a few steps: base.safetensors, and a run beside it."""
    folder = tmp_path_factory.mktemp("scribble")
    base = write_base(folder)
    flags = ["scenes-scribble", "--out", str(folder / "run"), "--base", str(base)]
    for name, value in {**QUICK, "steps": 4}.items():
        words = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        flags += [f"--{name.replace('_', '-')}", *words]
    train.main(flags)
    return folder


def test_a_few_steps_train_an_adapter_that_says_what_it_is(run: Path) -> None:
    learnt = read_weights(run / "run" / "adapter.safetensors")
    assert learnt.modes == ("scribble",)
    assert learnt.config.unet.grounding is not None
    assert learnt.config.unet.grounding.mode == "scribble"
    assert any(name.startswith("downsample_net.") for name in learnt.parts["unet"])


def test_the_taught_model_paints_by_strokes_and_null_strokes_differ(run: Path) -> None:
    pipe = gligen.load(run / "base.safetensors", run / "run" / "adapter.safetensors", device="cpu", dtype="float32")
    assert pipe.mode == "scribble"
    asked = {"prompt": "a star", "steps": 2, "schedule": (1, 0, 0), "seed": 3}
    (drawn,) = pipe.generate([gligen.Request(**asked, scribble=EXAMPLES / "inputs/scribble.png")])
    (free,) = pipe.generate([gligen.Request(**asked)])
    assert torch.isfinite(drawn.latents).all()
    assert not torch.equal(drawn.latents, free.latents)


def test_the_taught_model_is_measured(run: Path) -> None:
    out = run / "measured"
    model = ["--checkpoint", str(run / "base.safetensors"), "--adapter", str(run / "run" / "adapter.safetensors")]
    evaluate.main(["scenes", *model, "--out", str(out), "--requests", "2", "--steps", "2", "--device", "cpu"])
    report = json.loads(next(out.glob("*.json")).read_text())
    assert "silhouettes" in json.dumps(report)


@pytest.mark.parametrize(("name", "modes"), PUBLISHED.items())
def test_files_of_published_modes_are_told_apart_as_if_there_were_no_other(name: str, modes: tuple[str, ...]) -> None:
    """Scribble has canny's and depth's network; a file that says nothing is not scribble."""
    unet = meta(f"gligen_{name}")
    assert possible_modes(unet) == modes
    assert all(MODES[mode].original for mode in possible_modes(unet))
    assert ("scribble" in fitting_modes(unet)) == (name in ("canny", "depth"))


def test_a_file_without_a_word_can_be_said_to_be_scribble(run: Path, tmp_path: Path) -> None:
    whole = combine(read_weights(run / "base.safetensors"), read_weights(run / "run" / "adapter.safetensors"))
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, whole.parts["unet"], {"format": "pt"})
    assert read_weights(bare).modes == ("canny", "depth")
    assert read_weights(bare, mode="scribble").modes == ("scribble",)
    with pytest.raises(ValueError, match="not of mode 'sem'"):
        read_weights(bare, mode="sem")


@pytest.mark.parametrize("layout", ["model", "adapter", "sd"])
def test_scribble_comes_back_from_layouts_of_ours(run: Path, tmp_path: Path, layout: str) -> None:
    whole = combine(read_weights(run / "base.safetensors"), read_weights(run / "run" / "adapter.safetensors"))
    write_weights(whole, tmp_path / "x", layout)
    assert read_weights(tmp_path / "x").modes == ("scribble",)


def test_gligens_own_layout_has_no_word_for_it(run: Path, tmp_path: Path) -> None:
    whole = combine(read_weights(run / "base.safetensors"), read_weights(run / "run" / "adapter.safetensors"))
    with pytest.raises(ValueError, match="scribble was never published"):
        write_weights(whole, tmp_path / "x.pth", "gligen")
    assert list(tmp_path.iterdir()) == []
    assert get_mode("scribble").original is None
