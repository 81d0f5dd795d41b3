"""What every kind of grounding promises, mode by mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.data.drawn import SceneSource
from gligen.data.requests import example_request
from gligen.grounding import KINDS, Readers, draw_request, image_key, kind_of, moved
from gligen.modes import MODES, get_mode
from gligen.modules.position_net import build_position_net, null_where
from gligen.request import serving_modes

SMALL = {"token_dim": 16, "feature_dim": 12, "hidden_dim": 8, "max_entities": 5, "max_persons": 2}
SMALL_MAP = {"map_size": 64, "map_depths": (1, 1, 1, 1), "map_dims": (8, 8, 16, 16)}


def config_of(mode: str) -> GroundingConfig:
    return GroundingConfig(mode=mode, **SMALL, **SMALL_MAP)


def inputs_of(mode: str, asked: Sequence) -> dict[str, Tensor]:
    def features(keys: Sequence) -> dict:
        return {key: torch.full((12,), float(i + 1)) for i, key in enumerate(keys)}

    readers = Readers(
        phrases=lambda texts: {text: torch.full((12,), float(len(text))) for text in texts},
        images=lambda images: features([image_key(image) for image in images]),
        size=(64, 64),
    )
    return kind_of(get_mode(mode)).inputs(asked, config_of(mode), readers)


def example_of(mode: str, n: int = 1):
    return SceneSource(mode=mode, series=5, image_size=64).example(n)


@pytest.mark.parametrize("mode", [name for name, row in MODES.items() if not row.is_inpainting])
def test_a_request_for_an_example_gives_what_the_example_gives(mode: str) -> None:
    example = example_of(mode)
    request = example_request(example, mode)
    assert mode in serving_modes(request)
    if get_mode(mode).takes_images:  # as preparing a batch has it: a reference is the entity's image
        example = dataclasses.replace(example, entities=request.entities)
    from_example, from_request = inputs_of(mode, [example]), inputs_of(mode, [request])
    assert from_example.keys() == from_request.keys() == build_position_net(config_of(mode)).input_shapes().keys()
    for name, value in from_example.items():
        assert torch.equal(value, from_request[name]), name
        assert value.dtype == torch.float32
    assert any(value.any() for name, value in from_example.items() if "mask" in name)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_turned_twice_is_back(mode: str) -> None:
    inputs = inputs_of(mode, [example_of(mode, n) for n in range(3)])
    once = moved(inputs)
    assert any(not torch.equal(once[name], inputs[name]) for name in inputs)
    for name, value in moved(once).items():
        assert torch.allclose(value, inputs[name], atol=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_the_null_grounding_forgets_everything(mode: str) -> None:
    """Its tokens are those of the tokenizer's own null inputs, whatever was asked for; others' stay."""
    torch.manual_seed(0)
    net = build_position_net(config_of(mode)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = inputs_of(mode, [example_of(mode, n) for n in range(2)])
    with torch.no_grad():
        dropped = net(**null_where(inputs, torch.tensor([True, False])))
        assert torch.allclose(dropped[0], net(**net.null_inputs(1))[0], atol=1e-5)
        assert torch.allclose(dropped[1], net(**inputs)[1], atol=1e-5)
        assert not torch.allclose(dropped[1], net(**net.null_inputs(1))[0], atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_tokenizer_bears_the_mark_of_its_kind_alone_and_shows_its_sizes(mode: str) -> None:
    from gligen.weights import hold

    net = build_position_net(config_of(mode))
    held = hold({f"position_net.{name}": value for name, value in net.state_dict().items()})
    kind = kind_of(get_mode(mode))
    assert [other for other in KINDS.values() if other.marker in held] == [kind]
    for name, value in kind.sizes(held).items():
        expected = getattr(config_of(mode), name)
        if mode == "keypoint" and name == "feature_dim":  # which it has not: its null person has the tokens' width
            expected = SMALL["token_dim"]
        assert value == expected, name


@pytest.mark.parametrize("mode", ["box-text", "box-text-image", "keypoint"])
def test_what_has_a_place_is_drawn_there(mode: str) -> None:
    blank = Image.new("RGB", (200, 200), "white")
    drawn = draw_request(blank, example_request(example_of(mode), mode))
    assert drawn.getcolors(100_000) != blank.getcolors()
    assert blank.getcolors() == [(40_000, (255, 255, 255))]
