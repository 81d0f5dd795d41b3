"""Networks built without weights have the tensors that ordinary ones have, and `load_part` gives them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gligen.kernels import backends
from gligen.modes import MODES
from gligen.modules.autoencoder import AutoencoderKL
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.modules.unet import UNetModel
from gligen.weights import hold, load_part, without_weights
from tests.conftest import small_unet_config
from tests.generated import generated_base


def build(name: str) -> nn.Module:
    config, _ = generated_base()
    if name == "vae":
        return AutoencoderKL(config.vae)
    if name == "text_encoder":
        return CLIPTextEncoder(config.text_encoder)
    if name == "image_encoder":
        assert config.image_encoder is not None
        return CLIPImageEncoder(config.image_encoder)
    return UNetModel(small_unet_config(name))


@pytest.mark.parametrize("name", ["vae", "text_encoder", "image_encoder", *MODES])
def test_a_network_without_weights_takes_those_of_an_ordinary_one(name: str) -> None:
    usual = build(name)
    with without_weights():
        network = build(name)
    tensors = dict([*network.named_parameters(), *network.named_buffers()])  # those that files do not hold too
    usual_tensors = dict([*usual.named_parameters(), *usual.named_buffers()])

    def facts(found: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}

    assert facts(tensors) == facts(usual_tensors)
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    load_part(network, hold(usual.state_dict()), what=name)
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in usual.state_dict().items())


def test_building_an_ordinary_network_afterwards_draws_its_weights() -> None:
    with without_weights():
        nn.Linear(3, 3)
    assert nn.Linear(3, 3).weight.std() > 0


def test_the_choice_of_hoppers_kernel_is_marked_as_torch_marks_constants() -> None:
    @torch.compiler.assume_constant_result
    def constant() -> bool:
        return True

    assert vars(backends._is_hopper) == vars(constant)
