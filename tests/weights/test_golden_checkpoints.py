"""Checkpoint files to ε: the whole way from a file of the original trainer's layout to the original's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gligen.config import ModelConfig
from gligen.modules.unet import UNetModel
from gligen.weights import Weights, hold, load_part, read_weights, write_weights
from tests.conftest import GOLDEN, case, error, filled, grounding_of, small_unet_config
from tests.weights.helpers import genuine


def eps_of(weights: Weights) -> torch.Tensor:
    """ε of the golden unet_text inputs with a file's UNet, in float32."""
    with torch.device("meta"):
        unet = UNetModel(weights.config.unet).eval()
    load_part(unet, weights.parts["unet"], device="cpu", dtype=torch.float32, what="unet")
    arrays = case("cases/unet_text")
    with torch.no_grad():
        return unet(arrays["x"], arrays["timesteps"], arrays["context"], grounding_of(arrays))


def test_the_originals_own_checkpoint_gives_its_eps():
    path = genuine("gligen_small_text.pth")
    if path is None:
        pytest.skip("the original's 15 MB checkpoint is not here; the next test has one of the same layout")
    expected = torch.from_numpy(np.load(GOLDEN / "cases/gligen_small_text_expected.npz")["eps"])
    assert error(eps_of(read_weights(path)), expected) < 1e-5


def test_a_checkpoint_written_here_gives_the_originals_eps(tmp_path):
    """The golden weights rounded to float16 in a file give the ε that the original got from its own such file."""
    rounded = {name: tensor.half() for name, tensor in filled("small_gligen_text").items()}
    weights = Weights(
        path="memory",
        kind="model",
        parts={"unet": hold(rounded)},
        config=ModelConfig(unet=small_unet_config()),
        modes=("box-text",),
    )
    path = tmp_path / "misleading.ckpt"
    write_weights(weights, path, "model")
    expected = torch.from_numpy(np.load(GOLDEN / "cases/gligen_small_text_expected.npz")["eps"])
    assert error(eps_of(read_weights(path)), expected) < 1e-5


def test_gates_stored_as_vectors_are_read_as_numbers(tmp_path):
    """The original's own small checkpoint holds them so; the published ones hold 0-dimensional tensors."""
    state = {name: t.reshape(1) if "alpha" in name else t for name, t in filled("small_gligen_text").items()}
    torch.save({"model": state}, tmp_path / "g.pth")
    part = read_weights(tmp_path / "g.pth").parts["unet"]
    gates = {name: tensor for name, tensor in part.items() if "alpha" in name}
    assert gates
    for name, tensor in gates.items():
        assert tensor.shape == ()
        assert tensor.read().item() == state[name].item()
