"""How prompts are read: weights, the layer they are read at, and more windows than one."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from gligen.loading import build_pipeline
from gligen.modules.clip import encode_text
from gligen.prompts import Reading, parse_prompt
from gligen.request import Request
from tests.generated import generated_model

WEIGHTS = Reading(weights=True)
LONG = "a red ball on a green table, " * 12  # 8 tokens each


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(generated_model(), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("((x))", [("x", 1.21)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x : .5 ) y", [("x ", 0.5), (" y", 1)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("[a (b) c]", [("a ", 1 / 1.1), ("b", 1), (" c", 1 / 1.1)]),
        (r"a \(real\) \[cat\] \\", [(r"a (real) [cat] \ "[:-1], 1)]),
        ("at 3:15 (noon:1.2)", [("at 3:15 ", 1), ("noon", 1.2)]),
        ("(the BREAKER)", [("the BREAKER", 1.1)]),
    ],
)
def test_brackets_weigh_what_they_hold(text, pieces):
    (found,) = parse_prompt(text, WEIGHTS)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])
    assert parse_prompt(text, Reading()) == [[(text, 1.0)]]


def test_break_begins_another_window():
    reading = Reading(weights=True, long=True)
    assert parse_prompt("(a BREAK b) c", reading) == [[("a ", 1.1)], [(" b", 1.1), (" c", 1.0)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (cat", r"prompt has a '\(' that is not closed: write \\\("),
        ("a cat)", r"prompt has a '\)' that closes nothing"),
        ("(a cat]", r"prompt has a '\]' that closes nothing"),
        ("a <lora:toy:.8> cat", r"prompt holds '<lora:toy:.8>': give a LoRA with --lora"),
        ("a [cat:dog:0.5]", r"holds '\[cat:dog:0.5\]': prompts that change between steps"),
        ("a [cat|dog]", "alternate between steps"),
        ("a BREAK b", "holds BREAK.*long_prompts"),
        ("a embedding:bad b", "'embedding:bad': textual inversions are not read"),
        ("a {red|blue} star", "'{red.blue}': prompts that are drawn at random"),
        ("a __colour__ star", "'__colour__': prompts that are drawn at random"),
        ("a star AND a ring", "'AND': several prompts at once"),
    ],
)
def test_what_is_not_read_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        Request(prompt=text, prompt_weights=True)
    Request(prompt=text)  # plain text


def test_weights_scale_tokens_and_keep_the_mean(pipe):
    """By hand: the states of the plain text, each token times its weight, then the window's mean as it was."""
    plain = pipe.encode_prompts(["a red cat"], Reading())["a red cat"]
    found = pipe.encode_prompts(["a (red:1.5) cat"], WEIGHTS)["a (red:1.5) cat"]
    assert len(encode_text("a red cat")) == 3
    scaled = plain.clone()
    scaled[2] *= 1.5  # after start-of-text and 'a'
    assert torch.allclose(found, scaled * (plain.mean() / scaled.mean()), atol=1e-5)
    assert (found - plain).abs().max() > 0.1
    assert torch.allclose(pipe.encode_text(["a red cat"])["a red cat"], plain, atol=1e-5)


def test_clip_skip_is_what_a_text_encoder_of_fewer_layers_gives(pipe):
    """With the last layer taken away, the final LayerNorm stays."""
    ids, _ = pipe.text_encoder.tokenize(["a red cat"])
    model = generated_model()
    layers = model.config.text_encoder.layers
    text = dataclasses.replace(model.config.text_encoder, layers=layers - 1)
    last = f"transformer.resblocks.{layers - 1}."
    parts = {n: t for n, t in model.parts["text_encoder"].items() if not n.startswith(last)}
    config = dataclasses.replace(model.config, text_encoder=text)
    shorter = build_pipeline(
        dataclasses.replace(model, config=config, parts={**model.parts, "text_encoder": parts}),
        device="cpu",
        dtype="float32",
    )
    found = pipe.encode_prompts(["a red cat"], Reading(clip_skip=2))["a red cat"]
    assert torch.allclose(found, shorter.text_encoder(ids)[0], atol=1e-5)
    assert (found - pipe.text_encoder(ids)[0]).abs().max() > 0.1
    with pytest.raises(ValueError, match=f"clip_skip is {layers + 1}.*{layers} layers"):
        next(iter(pipe.generate([Request(prompt="a", clip_skip=layers + 1, steps=1)])))


def test_long_prompts_are_windows_each_read_by_itself(pipe):
    ids = encode_text(LONG)
    assert 75 < len(ids) <= 150
    encoder = pipe.text_encoder
    found = pipe.encode_prompts([LONG, "a cat"], Reading(long=True))
    end = encoder.config.vocab_size - 1
    rows = [[end - 1, *part, *[end] * (76 - len(part))] for part in (ids[:75], ids[75:])]
    by_hand = encoder(torch.tensor(rows))
    assert torch.allclose(found[LONG], by_hand.flatten(0, 1), atol=1e-5)
    cat, nothing = (encoder(encoder.tokenize([text])[0])[0] for text in ("a cat", ""))
    assert torch.allclose(found["a cat"], torch.cat([cat, nothing]), atol=1e-5)


def test_an_image_does_not_depend_on_how_long_its_neighbours_prompts_are(pipe):
    short = Request(prompt="a cat", long_prompts=True, steps=2)
    long = Request(prompt=LONG, long_prompts=True, steps=2)
    alone = [next(iter(pipe.generate([request]))).latents for request in (short, long)]
    together = sorted(pipe.generate([short, long]), key=lambda sample: sample.index)
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a, b.latents, atol=1e-5)
    cut = next(iter(pipe.generate([Request(prompt=LONG, steps=2)]))).latents
    assert (cut - alone[1]).abs().max() > 1e-3
    assert torch.allclose(next(iter(pipe.generate([Request(prompt="a cat", steps=2)]))).latents, alone[0], atol=1e-5)


def test_a_cut_prompt_is_said_with_its_remedy(pipe, caplog):
    caplog.set_level(logging.WARNING)
    for reading in (Reading(), WEIGHTS):
        pipe.encode_prompts([LONG], reading)
        pipe.encode_text([LONG])
    assert all("--long-prompts" in line and "cut off" in line for line in caplog.messages)
    assert len(caplog.messages) == 4
    caplog.clear()
    pipe.encode_prompts([LONG], Reading(long=True))
    assert not caplog.messages
