"""The weights that come with the project: small enough, complete, and able to do what they are for."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from gligen.config import to_dict
from gligen.diffusion.schedule import Schedule
from gligen.loading import EMBEDDED, build_pipeline, embedded_adapter, embedded_base, open_model
from gligen.modes import MODES
from gligen.request import read_requests
from gligen.training.data import SceneSource
from gligen.training.diagnosis import Diagnosis
from gligen.training.objective import Objective, encode_world
from gligen.training.presets import PRESETS, get_preset
from gligen.training.trainable import build_networks
from gligen.weights import missing_for_sampling, read_weights

MIB = 2**20
EXAMPLES = EMBEDDED.parent / "examples"


def test_files_are_small() -> None:
    sizes = [path.stat().st_size for path in EMBEDDED.glob("scenes-*")]
    assert max(sizes) <= 16 * MIB
    assert sum(sizes) <= 48 * MIB


def test_base_lacks_nothing_but_grounding() -> None:
    weights = read_weights(embedded_base())
    assert weights.kind == "sd"
    assert [lack.split(":")[0] for lack in missing_for_sampling(weights)] == ["no grounding"]


@pytest.mark.parametrize("mode", MODES)
def test_every_example_finds_a_model_that_takes_it(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    requests = read_requests(EXAMPLES / f"{mode}.json")
    with caplog.at_level(logging.WARNING, logger="gligen"):
        model = open_model(requests=requests)
    assert model.config.unet.grounding is not None
    for request in requests:
        model.check(request)
    chosen = model.config.unet.grounding.mode
    if embedded_adapter(chosen):
        assert chosen in model.name
        assert not caplog.records
    else:
        assert f"was not taught {chosen}" in caplog.text
        assert f"scenes-{chosen}" in PRESETS  # which the advice names


def test_an_untaught_mode_paints_what_the_base_paints(caplog: pytest.LogCaptureFixture) -> None:
    untaught = next((mode for mode in MODES if not embedded_adapter(mode)), None)
    if untaught is None:
        pytest.skip("every mode has an adapter")
    (request,) = read_requests(EXAMPLES / f"{untaught}.json")
    pipe = build_pipeline(open_model(requests=[request]), device="cpu")
    for transformer in pipe.unet.transformers:
        assert not transformer.block.fuser.alpha_attn.any()
        assert not transformer.block.fuser.alpha_dense.any()


def test_the_box_adapter_has_learnt_grounding() -> None:
    """On held-out scenes at high noise, the right boxes and phrases serve clearly better than another scene's; with
    captions, which name the same objects but not their places. docs/results.md has what comes of it in pictures."""
    config = dataclasses.replace(get_preset("scenes-box-text"), adapter=str(embedded_adapter("box-text")))
    networks = build_networks(config, torch.device("cpu"))
    source = SceneSource.build(config, networks.config, encode_world(networks))
    objective = Objective(networks, Schedule(**to_dict(networks.config.schedule)))
    losses = Diagnosis(objective, source, samples=96, chunk=48, seed=1).losses()
    assert losses.right < losses.null
    assert losses.ratio < 0.95
