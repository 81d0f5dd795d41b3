"""The weights that come with the project: small enough, complete, and able to do what they are for."""

from __future__ import annotations

import logging

import pytest

from gligen.evaluation.run import Settings, evaluate_scenes
from gligen.loading import EMBEDDED, build_pipeline, embedded_adapter, embedded_base, open_model
from gligen.modes import MODES
from gligen.request import read_requests
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


def test_an_untaught_mode_paints_what_the_base_paints(caplog: pytest.LogCaptureFixture) -> None:
    untaught = next((mode for mode in MODES if not embedded_adapter(mode)), None)
    if untaught is None:
        pytest.skip("every mode has an adapter")
    (request,) = read_requests(EXAMPLES / f"{untaught}.json")
    pipe = build_pipeline(open_model(requests=[request]), device="cpu")
    for transformer in pipe.unet.transformers:
        assert not transformer.block.fuser.alpha_attn.any()
        assert not transformer.block.fuser.alpha_dense.any()


def test_boxes_are_followed_and_captions_alone_do_not_place() -> None:
    """A few requests and steps only; docs/results.md has the figures of many."""
    pipe = build_pipeline(open_model(mode="box-text"), device="cpu", dtype="float32")
    few = {"requests": 12, "sampler": "dpmpp", "steps": 12, "guidance": 4.0, "sheet": 0}
    asked = evaluate_scenes(pipe, Settings(**few)).figures["objects"]["all"]
    alone = evaluate_scenes(pipe, Settings(**few, ungrounded=True)).figures["objects"]["all"]
    assert asked["found"]["value"] >= 0.5
    assert alone["found"]["value"] <= 0.25
