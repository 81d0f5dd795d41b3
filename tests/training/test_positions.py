"""Whether visual tokens know where they are: features of which it is known what can be read from them."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gligen.training.positions import CHANCE, Positions, advise, position_error, record_tokens, summary
from gligen.training.trainable import build_networks
from tests.training.helpers import CPU, quick, write_base


def tokens_of(coordinates: Tensor) -> Tensor:
    """(8, L, C) that hold these coordinates (L, n); LayerNorm only scales them, since the rest outweighs them."""
    about_middle = coordinates - 0.5
    rest = torch.tensor([3.0, -3.0]).expand(len(coordinates), 2)
    return torch.cat([about_middle, -about_middle, rest], dim=1).expand(8, -1, -1)


def grid(side: int) -> Tensor:
    """(side², 2): x and y of each token's middle, row by row."""
    at = [(i + 0.5) / side for i in range(side)]
    return torch.tensor([(x, y) for y in at for x in at])


def test_places_written_into_features_are_read():
    assert position_error(tokens_of(grid(8))) < 0.01


def test_features_without_places_give_chance():
    tokens = torch.randn(32, 64, 8, generator=torch.Generator().manual_seed(0))
    # the middles of 8 x 8 tokens spread a little less than the whole square: variance (1 - 1/64) / 12
    assert position_error(tokens) == pytest.approx(math.sqrt((1 - 1 / 64) / 12), rel=0.02)


@pytest.mark.parametrize("axis", [0, 1])
def test_one_known_direction_halves_the_squared_error(axis: int):
    tokens = tokens_of(grid(16)[:, [axis]])
    assert position_error(tokens) == pytest.approx(CHANCE * math.sqrt((1 - 1 / 256) / 2), rel=0.02)


def test_every_fuser_is_recorded_and_let_go(tmp_path: Path):
    unet = build_networks(quick(write_base(tmp_path)), CPU).unet
    names = [name for name, _ in unet.named_modules() if name.endswith(".fuser")]
    with record_tokens(unet) as tokens:
        for name in names:
            fuser = unet.get_submodule(name)
            h = torch.zeros(2, 3, unet.config.grounding.token_dim)
            fuser(torch.zeros(2, 4, fuser.norm1.weight.numel()), fuser.project(h))
    places = {name.removesuffix(".transformer_blocks.0.fuser") for name in names}
    assert {place: len(calls) for place, calls in tokens.items()} == dict.fromkeys(places, 1)
    assert all(not unet.get_submodule(name)._forward_pre_hooks for name in names)


def test_summary_names_the_best_of_each_grid_and_advice_comes_if_all_are_lost():
    known, lost = Positions(side=16, error=0.05), Positions(side=16, error=0.28)
    coarse = Positions(side=4, error=0.07)
    assert "5 % at 16², 7 % at 4²" in summary({"a": known, "b": lost, "c": coarse})
    assert advise({"b": lost, "c": coarse}) is None
    assert "hardly know where they are" in advise({"b": lost, "d": dataclasses.replace(lost, side=8)})
    assert dataclasses.replace(lost, error=CHANCE).is_lost
