"""The weights that come with the project: small enough, complete, and able to do what they are for."""

from __future__ import annotations

import dataclasses
import functools
import logging

import pytest
import torch

from gligen.config import to_dict
from gligen.diffusion.schedule import Schedule
from gligen.evaluation.run import evaluate_scenes
from gligen.evaluation.settings import Settings
from gligen.job import complete
from gligen.loading import EMBEDDED, build_pipeline, embedded_adapter, embedded_base, open_model
from gligen.modes import MODES
from gligen.request import read_requests
from gligen.training.data import open_data
from gligen.training.diagnosis import Diagnosis, Losses
from gligen.training.objective import Objective
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
        complete(request, model.facts)
    chosen = model.config.unet.grounding.mode
    if embedded_adapter(chosen):
        assert chosen in model.name
        assert not caplog.records
    else:
        assert f"was not trained for {chosen}" in caplog.text
        assert f"scenes-{chosen}" in PRESETS  # which the advice names


def test_an_untaught_mode_paints_what_the_base_paints(caplog: pytest.LogCaptureFixture) -> None:
    untaught = next((mode for mode in MODES if not embedded_adapter(mode)), None)
    if untaught is None:
        pytest.skip("every mode has an adapter")
    (request,) = read_requests(EXAMPLES / f"{untaught}.json")
    pipe = build_pipeline(open_model(requests=[request]), device="cpu")
    for fuser in pipe.unet.fusers.values():
        assert not fuser.alpha_attn.any()
        assert not fuser.alpha_dense.any()


TAUGHT = [mode for mode in MODES if embedded_adapter(mode)]


@functools.cache
def losses_of(mode: str) -> Losses:
    """On held-out scenes at high noise, with captions, which name the same objects but not their places."""
    config = dataclasses.replace(get_preset(f"scenes-{mode}"), adapter=str(embedded_adapter(mode)), seed=1)
    networks = build_networks(config, torch.device("cpu"))
    objective = Objective(networks, Schedule(**to_dict(networks.config.schedule)))
    return Diagnosis(objective, open_data(config, networks.config).held_out, samples=48, chunk=24).losses()


@pytest.mark.parametrize("mode", TAUGHT)
def test_adapters_have_learnt_what_and_where(mode: str) -> None:
    """The right grounding serves clearly better than another scene's, and than its own moved elsewhere."""
    assert losses_of(mode).ratio < 0.8
    assert losses_of(mode).where < 0.8


@pytest.mark.parametrize("mode", TAUGHT)
def test_grounding_tokens_help(mode: str) -> None:
    """The right grounding serves better than none. Of maps the tokens alone have to tell one from another: a map's
    channels stay where grounding is null, as in sampling, and say all that its tokens can."""
    losses = losses_of(mode)
    if losses.tokens is None:
        assert losses.right < losses.null
    else:
        assert losses.tokens < 0.9


def test_things_lie_where_they_are_asked_for() -> None:
    """Found by the detector in their colour, at IoU of 0.5 or more with their boxes; without grounding they are not."""
    settings = Settings(requests=12, sampler="dpmpp", steps=12, guidance=4, batch_size=12, sheet=0)
    pipe = build_pipeline(open_model(requests=read_requests(EXAMPLES / "box-text.json")), device="cpu")
    grounded, plain = (
        evaluate_scenes(pipe, dataclasses.replace(settings, ungrounded=is_plain)).metrics["objects"]["all"]["found"]
        for is_plain in (False, True)
    )
    assert grounded["value"] > 0.85
    assert plain["value"] < 0.25
