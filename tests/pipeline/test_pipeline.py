"""Requests to pictures, end to end, on generated small weights: what must hold for any weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gligen
import gligen.pipeline
from gligen.config import TextEncoderConfig
from gligen.diffusion.noise import NoiseStream, start_latents
from gligen.loading import build_pipeline
from gligen.modes import MAP_MODES, MODES
from gligen.modules.bert import BERTTextEncoder
from gligen.modules.fusers import Fuser
from gligen.modules.unet import UNetModel
from gligen.modules.wordpiece import WordPiece
from gligen.pipeline import Pipeline, Sample
from gligen.request import SAMPLERS, Entity, Inpaint, Request, read_requests
from gligen.weights import hold
from tests.conftest import case, error, grounding_of
from tests.generated import generated_model

EXAMPLES = Path(__file__).parents[2] / "examples"
BOXES = (
    Entity(phrase="a red ball", box=(0.1, 0.2, 0.5, 0.7)),
    Entity(phrase="a tree", box=(0.55, 0.1, 0.95, 0.9)),
)
REQUEST = Request(prompt="a ball and a tree", entities=BOXES, steps=4, schedule=(1.0, 0.0, 0.0))


@pytest.fixture(scope="session")
def pipeline():
    """`pipeline(mode)`: generated small weights of that mode, made once."""
    made: dict[str, Pipeline] = {}

    def make(mode: str = "box-text") -> Pipeline:
        if mode not in made:
            made[mode] = build_pipeline(generated_model(mode), device="cpu", dtype="float32")
        return made[mode]

    return make


def paint(pipe: Pipeline, *requests: Request, **options) -> list[Sample]:
    return sorted(pipe.generate(list(requests), **options), key=lambda sample: sample.index)


def difference(a: Sample, b: Sample) -> float:
    """Largest difference of the latents over their largest value."""
    return error(a.latents, b.latents)


@pytest.mark.parametrize("mode", MODES)
def test_every_modes_example_paints(pipeline, mode):
    requests = [
        dataclasses.replace(r, steps=3, size=None, schedule=(0.5, 0.2, 0.3))
        for r in read_requests(EXAMPLES / f"{mode}.json")
    ]
    samples = paint(pipeline(mode), *requests)
    assert samples
    for sample in samples:
        assert sample.image.size == (64, 64)
        assert np.asarray(sample.image).std() > 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(pipeline, sampler):
    eta = 0.7 if sampler == "ddim" else 0.0
    request = dataclasses.replace(REQUEST, sampler=sampler, eta=eta, seed=3, num_images=4)
    together = paint(pipeline(), request, batch_size=4)
    apart = paint(pipeline(), request, batch_size=1)
    for a, b in zip(together, apart, strict=True):
        assert difference(a, b) < 1e-4
    alone = paint(pipeline(), dataclasses.replace(request, seed=5, num_images=1))[0]
    assert difference(alone, together[2]) < 1e-4
    assert difference(together[0], together[1]) > 0.1


def test_each_image_carries_the_request_that_paints_it_again(pipeline):
    for sample in paint(pipeline(), dataclasses.replace(REQUEST, seed=8, num_images=2)):
        assert difference(paint(pipeline(), sample.request)[0], sample) < 1e-5


def test_twenty_mixed_requests_paint_in_order_and_as_they_do_alone(pipeline):
    requests = [
        dataclasses.replace(r, steps=2, schedule=(0.5, 0.0, 0.5)) for r in read_requests(EXAMPLES / "mixed.json")
    ]
    assert len(requests) == 20
    samples = paint(pipeline(), *requests, batch_size=5)
    assert [s.index for s in samples] == [(i, k) for i, r in enumerate(requests) for k in range(r.num_images)]
    for i in (0, 7, 19):
        together = next(s for s in samples if s.index == (i, 0))
        assert difference(paint(pipeline(), requests[i])[0], together) < 1e-4


def test_processes_that_share_a_file_paint_each_image_once(pipeline):
    requests = [dataclasses.replace(r, steps=1) for r in read_requests(EXAMPLES / "mixed.json")]
    shares = [{s.index for s in paint(pipeline(), *requests, only=lambda n, r=rank: n % 3 == r)} for rank in range(3)]
    assert set.union(*shares) == {(i, k) for i, r in enumerate(requests) for k in range(r.num_images)}
    assert sum(map(len, shares)) == len(set.union(*shares))


def test_what_does_not_change_between_steps_is_computed_once(pipeline):
    pipe, calls = pipeline(), {"tokens": 0, "caption keys": 0, "grounding projections": 0}
    block = pipe.unet.transformers[0].block

    def count(name):
        def hook(*args):
            calls[name] += 1

        return hook

    hooks = [
        pipe.unet.position_net.register_forward_hook(count("tokens")),
        block.attn2.to_k.register_forward_hook(count("caption keys")),
        block.fuser.linear.register_forward_hook(count("grounding projections")),
    ]
    paint(pipe, REQUEST)
    for hook in hooks:
        hook.remove()
    assert calls == {"tokens": 1, "caption keys": 1, "grounding projections": 1}


def test_fusers_cost_nothing_once_the_gates_are_shut(pipeline):
    pipe, calls = pipeline(), []
    fusers = [m for m in pipe.unet.modules() if isinstance(m, Fuser)]
    hooks = [fuser.register_forward_hook(lambda *args: calls.append(1)) for fuser in fusers]
    for stages, evaluations in (((0.3, 0.0, 0.7), 4), ((0.0, 0.5, 0.5), 5), ((0.0, 0.0, 1.0), 0)):
        calls.clear()
        paint(pipe, dataclasses.replace(REQUEST, steps=10, schedule=stages))
        assert len(calls) == evaluations * len(fusers), stages  # PLMS evaluates its first step twice
    for hook in hooks:
        hook.remove()


def test_without_grounding_the_base_model_paints(pipeline):
    """No entities: every box model is its base, whatever its fusers hold."""
    plain = Request(prompt="a ball", steps=3)
    pipe = pipeline()
    before = paint(pipe, plain)[0]
    gates = [p for n, p in pipe.unet.named_parameters() if n.endswith("alpha_attn")]
    for gate in gates:
        gate.fill_(0.1)
    after = paint(pipe, plain)[0]
    for gate in gates:
        gate.fill_(0.5)
    assert torch.equal(before.latents, after.latents)


def test_boxes_phrases_and_prompts_all_matter(pipeline):
    base = paint(pipeline(), REQUEST)[0]
    moved = (dataclasses.replace(BOXES[0], box=(0.5, 0.2, 0.9, 0.7)), BOXES[1])
    renamed = (dataclasses.replace(BOXES[0], phrase="a blue cube"), BOXES[1])
    for change in ({"entities": moved}, {"entities": renamed}, {"prompt": "a cow"}, {"negative_prompt": "fog"}):
        assert difference(paint(pipeline(), dataclasses.replace(REQUEST, **change))[0], base) > 1e-4, change
    swapped = dataclasses.replace(REQUEST, entities=BOXES[::-1])
    assert difference(paint(pipeline(), swapped)[0], base) < 1e-4


def test_guidance_of_one_asks_for_one_branch_only(pipeline):
    pipe, batches = pipeline(), []
    pipe.unet.out.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    unguided = paint(pipe, dataclasses.replace(REQUEST, guidance=1.0, negative_prompt="fog"))[0]
    assert set(batches) == {1}
    batches.clear()
    nearly = paint(pipe, dataclasses.replace(REQUEST, guidance=1.0 + 1e-6))[0]
    assert set(batches) == {2}
    assert difference(unguided, nearly) < 1e-3


@pytest.fixture
def evaluations(monkeypatch):
    """Every UNet evaluation of the pipelines painting in this test: (x, t, conditioning, gate scale)."""
    seen = []
    denoise = UNetModel.denoise

    def spy(self, x, timesteps, cond, gate_scale=1.0):
        seen.append((x.clone(), int(timesteps[0]), cond, gate_scale))
        return denoise(self, x, timesteps, cond, gate_scale)

    monkeypatch.setattr(UNetModel, "denoise", spy)
    return seen


@pytest.mark.parametrize("has_mask", [True, False])
def test_inpainting_sees_keeps_and_returns_the_known_part(pipeline, evaluations, tmp_path, has_mask):
    """Against masks and latents made here: a picture in two halves, of which the left is repainted."""
    pipe, seed = pipeline("inpaint-box-text"), 4
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :, 0], picture[20:40] = np.arange(64) * 4, 200
    Image.fromarray(picture).save(tmp_path / "picture.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    where = {"mask": str(tmp_path / "mask.png")} if has_mask else {}
    request = Request(
        prompt="a ball",
        entities=(Entity(phrase="a ball", box=(0.0, 0.0, 0.5, 1.0)),),
        inpaint=Inpaint(image=str(tmp_path / "picture.png"), **where),
        steps=4,
        sampler="ddim",
        seed=seed,
    )
    sample = paint(pipe, request)[0]

    keep = torch.ones(1, 1, 16, 16)
    keep[..., :8] = 0
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    like = torch.empty(1, 4, 16, 16)
    x0 = pipe.vae.encode(pixels, NoiseStream([seed], "autoencoder")(like))
    noise = NoiseStream([seed], "inpainting")
    assert len(evaluations) == 4
    for x, t, cond, _ in evaluations:
        known = keep * pipe.schedule.q_sample(x0, t, noise(like))
        expected = torch.cat([x0 * keep, keep], dim=1)
        assert [len(block.caption[0]) for block in cond.blocks] == [2] * len(cond.blocks)  # null and conditional
        assert error(x * keep, known) < 1e-4  # which both see
        assert error(cond.extra, expected) < 1e-4
    assert error(sample.latents[None] * keep, x0 * keep) < 1e-5
    assert ((sample.latents - x0[0]) * (1 - keep[0])).abs().max() > 0.1
    painted = np.asarray(sample.image)
    assert np.array_equal(painted[:, 32:], picture[:, 32:])
    assert np.abs(painted[:, :32].astype(int) - picture[:, :32]).mean() > 10


@pytest.mark.parametrize("mode", MAP_MODES)
def test_both_branches_of_guidance_see_the_map_but_only_one_its_tokens(pipeline, evaluations, mode):
    request = read_requests(EXAMPLES / f"{mode}.json")[0]
    pipe = pipeline(mode)
    paint(pipe, dataclasses.replace(request, steps=2, size=None, schedule=(1.0, 0.0, 0.0)))
    x, _, cond, _ = evaluations[0]
    assert cond.extra.abs().max() > 0
    assert len(cond.extra) == len(x) == 1
    assert [len(block.caption[0]) for block in cond.blocks] == [2] * len(cond.blocks)
    null = pipe.unet.condition(torch.zeros(1, 77, 64), pipe.unet.position_net.null_inputs(1))
    for block, null_block in zip(cond.blocks, null.blocks, strict=True):
        for value, null_value in zip(block.grounding, null_block.grounding, strict=True):
            assert error(value[:1], null_value) < 1e-5
            assert not torch.allclose(value[1:], null_value, atol=1e-4)


def test_the_pipelines_model_is_the_golden_samplers(small_unet):
    """PLMS through the pipeline's own guidance, gates and null branch gives the original's latents."""
    arrays = case("cases/sampler_plms")
    inputs = grounding_of(arrays)
    pipe = build_pipeline(generated_model("box-text"), device="cpu", dtype="float32")
    pipe.unet = small_unet()
    pipe.config = dataclasses.replace(pipe.config, unet=pipe.unet.config)
    pipe.encode_text = lambda texts: {text: arrays[text.split()[0]][int(text.split()[1])] for text in texts}
    pipe._grounding = lambda requests, width, height: inputs
    requests = [
        dataclasses.replace(
            REQUEST, prompt=f"context {i}", negative_prompt=f"uc {i}", steps=10, schedule=(0.3, 0.2, 0.5)
        )
        for i in range(2)
    ]
    samples = paint(pipe, *requests, init_latents=arrays["x"])
    golden = arrays["final.S10.alpha[0.3,0.2,0.5]"]
    assert error(torch.stack([sample.latents for sample in samples]), golden) < 5e-5


def test_grounding_that_is_never_on_is_said(pipeline, caplog):
    with caplog.at_level(logging.WARNING, logger="gligen"):
        paint(pipeline(), dataclasses.replace(REQUEST, steps=2, schedule=None))
    assert "grounding is never on" in caplog.text


def test_a_model_says_what_it_lacks_before_it_paints(pipeline):
    pipe = build_pipeline(generated_model("depth"), device="cpu", dtype="float32")
    pipe.unet.register_buffer("base_conv_weight", None, persistent=False)
    request = dataclasses.replace(read_requests(EXAMPLES / "depth.json")[0], size=None, schedule=None)
    with pytest.raises(ValueError, match="--schedule 1 0 0"):
        pipe.complete(request)
    pipe.complete(dataclasses.replace(request, schedule=(1.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="shape"):
        paint(pipeline(), REQUEST, init_latents=torch.zeros(1, 1, 16, 16))


def test_sizes_need_not_be_square(pipeline):
    wide = dataclasses.replace(REQUEST, size=(128, 64), steps=2)
    sample = paint(pipeline(), wide)[0]
    assert sample.image.size == (128, 64)
    assert sample.latents.shape == (4, 16, 32)
    maps = read_requests(EXAMPLES / "sem.json")[0]
    tall = dataclasses.replace(maps, size=(64, 96), steps=2)
    assert paint(pipeline("sem"), tall)[0].image.size == (64, 96)


def test_initial_latents_replace_the_seeds_own(pipeline):
    start = start_latents([11], (4, 16, 16))
    seeded = paint(pipeline(), dataclasses.replace(REQUEST, seed=11))[0]
    given = paint(pipeline(), dataclasses.replace(REQUEST, seed=99), init_latents=start)[0]
    assert torch.equal(seeded.latents, given.latents)
    with pytest.raises(ValueError, match="for 1 images, but 2"):
        paint(pipeline(), dataclasses.replace(REQUEST, num_images=2), init_latents=start)


def test_noise_streams_do_not_move_each_other():
    """The original draws noise it does not use, so that a picture depends on draws that change nothing."""
    like = torch.empty(2, 4, 8, 8)
    alone = NoiseStream([1, 2], "sampler")(like)
    other = NoiseStream([1, 2], "inpainting")
    other(like)
    again = NoiseStream([2, 1], "sampler")(like)
    assert torch.equal(alone, again.flip(0))
    assert not torch.equal(alone, NoiseStream([1, 2], "inpainting")(like))


def test_bfloat16_paints_nearly_the_same_picture():
    """Ten steps of rounding to 8 bits move the latents by less than 5 % on average."""
    rough = build_pipeline(generated_model("box-text"), device="cpu", dtype="bfloat16")
    exact = build_pipeline(generated_model("box-text"), device="cpu", dtype="float32")
    request = dataclasses.replace(REQUEST, steps=10)
    a, b = paint(rough, request)[0].latents, paint(exact, request)[0].latents
    assert (a - b).abs().mean() < 0.05 * b.abs().mean()


def test_python_call_takes_a_requests_fields(pipeline):
    fields = {
        "prompt": "a ball",
        "entities": [{"phrase": "a red ball", "box": [0.1, 0.2, 0.5, 0.7]}],
        "steps": 2,
        "num_images": 2,
    }
    images = pipeline()(**fields)
    assert [image.size for image in images] == [(64, 64)] * 2
    with pytest.raises(ValueError, match="x0 must be below x1"):
        pipeline()(prompt="a", entities=[{"phrase": "b", "box": [0.6, 0.1, 0.4, 0.9]}])


def test_python_call_gives_images_arrays_tensors_or_latents(pipeline, monkeypatch):
    fields = {"prompt": "a ball", "entities": list(BOXES), "steps": 2, "num_images": 2, "batch_size": 1}
    pipe = pipeline()
    images, arrays, tensors = (pipe(output_type=kind, **fields) for kind in ("pil", "np", "pt"))
    assert [image.size for image in images] == [(64, 64)] * 2
    assert (arrays.shape, arrays.dtype) == ((2, 64, 64, 3), np.uint8)
    assert np.array_equal(arrays, np.stack([np.asarray(image) for image in images]))
    assert (tensors.shape, tensors.dtype) == ((2, 3, 64, 64), torch.float32)
    levels = ((tensors * 0.5 + 0.5) * 255).permute(0, 2, 3, 1)
    assert (levels - torch.from_numpy(arrays)).abs().max() <= 1  # images are truncated to whole levels
    assert -1 <= tensors.min() < tensors.max() <= 1
    monkeypatch.setattr(pipe.vae, "decode", None)  # would fail if it were called
    latents = pipe(output_type="latent", **fields)
    monkeypatch.undo()
    expected = [
        sample.latents for sample in paint(pipe, Request(prompt="a ball", entities=BOXES, steps=2, num_images=2))
    ]
    assert error(latents, torch.stack(expected)) < 1e-5
    for wrong, words in (({"output_type": "jpeg"}, "output_type is 'jpeg'"), ({"batch_size": 0}, "batch_size is 0")):
        with pytest.raises(ValueError, match=words):
            pipe(**{**fields, **wrong})
    with pytest.raises(ValueError, match=r"batch_size is 2\.5: give a whole number of at least 1"):
        paint(pipe, REQUEST, batch_size=2.5)


def test_images_in_memory_paint_as_their_files_do(pipeline, tmp_path):
    for mode in ("depth", "sem", "box-text-image", "inpaint-box-text"):
        (request,) = read_requests(EXAMPLES / f"{mode}.json")
        request = dataclasses.replace(request, steps=2, size=None, schedule=(1.0, 0.0, 0.0))
        held = request.with_images(lambda name, path: Image.open(path))
        assert torch.equal(*(paint(pipeline(mode), each)[0].latents for each in (request, held))), mode


def test_a_callback_sees_every_step_and_a_preview_when_it_asks(pipeline, monkeypatch):
    """The preview is the decoded x₀ that the last prediction implies: (x - √(1-ā) ε) / √ā (DDIM eq. 9)."""
    pipe, seen, previews, expected = pipeline(), [], [], []
    denoise = UNetModel.denoise

    def spy(self, x, timesteps, cond, gate_scale=1.0):
        eps = denoise(self, x, timesteps, cond, gate_scale)
        bar = float(pipe.schedule.alphas_cumprod[int(timesteps[0])])
        expected.append((x - (1 - bar) ** 0.5 * eps) / bar**0.5)
        return eps

    monkeypatch.setattr(UNetModel, "denoise", spy)

    def look(progress):
        seen.append((progress.indices, progress.step, progress.steps, tuple(progress.latents.shape)))
        if progress.step in (1, 4):
            previews.append((len(expected) - 1, progress.preview()))

    request = dataclasses.replace(REQUEST, sampler="ddim", guidance=1.0, num_images=2)
    samples = paint(pipe, request, on_step=look)
    assert seen == [(((0, 0), (0, 1)), step, 4, (2, 4, 16, 16)) for step in (1, 2, 3, 4)]
    for number, images in previews:
        assert len(images) == 2
        for image, latents in zip(images, expected[number], strict=True):
            decoded = pipe.vae.decode(latents[None])[0].clamp(-1, 1) * 127.5 + 127.5
            assert (decoded.permute(1, 2, 0) - torch.from_numpy(np.array(image))).abs().max() <= 1.01
    last = np.asarray(previews[1][1][0]).astype(int)
    assert np.abs(last - np.asarray(samples[0].image)).mean() < 6 < np.abs(last - np.asarray(samples[1].image)).mean()


def test_a_callback_can_stop_the_run(pipeline):
    steps = []

    def stop_in_the_second(progress):
        steps.append((progress.indices[0][1], progress.step))
        if progress.indices[0] == (0, 1) and progress.step == 2:
            progress.stop()

    samples = paint(pipeline(), dataclasses.replace(REQUEST, num_images=3), batch_size=1, on_step=stop_in_the_second)
    assert [sample.index for sample in samples] == [(0, 0)]
    assert steps == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    for kind in ("pil", "np", "latent"):
        assert pipeline()(prompt="a", steps=2, on_step=lambda progress: progress.stop(), output_type=kind) == []


def test_prompt_embeddings_stand_for_text(pipeline):
    pipe = pipeline()
    encoded = pipe.encode_text(["a ball and a tree", "fog"])
    plain = dataclasses.replace(REQUEST, prompt="", steps=2)
    text = paint(pipe, dataclasses.replace(plain, prompt="a ball and a tree", negative_prompt="fog"), plain)
    given = {"prompt_embeds": [encoded["a ball and a tree"], None], "negative_prompt_embeds": [encoded["fog"], None]}
    for a, b in zip(text, paint(pipe, plain, plain, **given), strict=True):
        assert difference(a, b) < 1e-5
    called = pipe(prompt_embeds=encoded["fog"], steps=2, output_type="latent")
    assert error(called[0], paint(pipe, Request(prompt="fog", steps=2))[0].latents) < 1e-5
    long = torch.cat([encoded["fog"]] * 2)  # any number of tokens, as long as both branches have as many
    twice = paint(pipe, plain, prompt_embeds=[long], negative_prompt_embeds=[long])[0]
    assert twice.latents.isfinite().all()
    for options, words in (
        ({"prompt_embeds": [long]}, "154 tokens, the negative prompt 77"),
        ({"prompt_embeds": [long[:, :3]]}, r"shape \(154, 3\): give \(tokens, 64\)"),
        ({"prompt_embeds": [long, long]}, "2 entries: give one for each of 1 requests"),
    ):
        with pytest.raises(ValueError, match=words):
            paint(pipe, plain, **options)
    with pytest.raises(ValueError, match="request 0: prompt and prompt_embeds are both given"):
        paint(pipe, REQUEST, prompt_embeds=[encoded["fog"]])


def test_a_hole_in_the_picture_is_repainted_and_nothing_else(pipeline):
    picture = Image.effect_noise((64, 64), 40).convert("RGBA")
    picture.paste((9, 9, 9, 0), (0, 0, 32, 64))
    request = Request(prompt="a ball", inpaint=Inpaint(image=picture), steps=2, seed=4)
    image = np.asarray(paint(pipeline("inpaint-box-text"), request)[0].image)
    assert np.array_equal(image[:, 32:], np.asarray(picture)[:, 32:, :3])
    assert np.abs(image[:, :32].astype(int) - 255).mean() > 10


def test_what_is_cut_off_a_long_phrase_is_said(pipeline, caplog):
    long = Entity(phrase="very " * 80 + "long phrase", box=(0.1, 0.1, 0.9, 0.9))
    with caplog.at_level(logging.WARNING, logger="gligen"):
        paint(pipeline(), dataclasses.replace(REQUEST, entities=(long,), steps=1))
    assert "cut off" in caplog.text
    assert "long phrase" in caplog.text


def test_a_failed_allocation_is_told_in_one_line(pipeline, monkeypatch):
    def fail(*args):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"
        )

    monkeypatch.setattr(pipeline().vae, "decode", fail)
    with pytest.raises(MemoryError, match="lower --batch-size or --size"):
        paint(pipeline(), REQUEST)


def test_reference_images_need_an_image_encoder(pipeline):
    pipe = pipeline("box-text-image")
    encoder, pipe.image_encoder = pipe.image_encoder, None
    request = read_requests(EXAMPLES / "box-text-image.json")[0]
    with pytest.raises(ValueError, match="--clip"):
        paint(pipe, dataclasses.replace(request, steps=1, size=None))
    pipe.image_encoder = encoder


def test_public_names_are_there():
    for name in gligen.__all__:
        assert getattr(gligen, name) is not None
    assert json.dumps(gligen.__version__)


def test_ldm_text2img_paints_with_its_own_caption_encoder(tmp_path):
    """The paper's COCO setting: a BERT-like encoder over WordPiece ids instead of CLIP."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "ball", "red", "tree", "and"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = generated_model("box-text")
    bert = TextEncoderConfig(kind="bert", width=64, layers=2, heads=2, head_dim=16, vocab_size=len(words))
    torch.manual_seed(0)
    model = dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, text_encoder=bert),
        parts={**model.parts, "text_encoder": hold(BERTTextEncoder(bert).state_dict())},
        vocabulary=WordPiece(tmp_path / "vocab.txt"),
    )
    pipe = build_pipeline(model, device="cpu", dtype="float32")
    one = paint(pipe, dataclasses.replace(REQUEST, prompt="a red ball and a tree"))[0]
    other = paint(pipe, dataclasses.replace(REQUEST, prompt="a tree"))[0]
    assert difference(one, other) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": [[["x"]]]}, r"prompt_embeds\[0\] is \[\['x'\]\]: give a tensor"),
        ({"prompt_embeds": [torch.full((77, 64), math.nan)]}, r"prompt_embeds\[0\] holds .* finite"),
        ({"prompt_embeds": [torch.ones(77, 64, dtype=torch.int64)]}, r"prompt_embeds\[0\] holds torch.int64"),
        ({"init_latents": np.full((1, 4, 8, 8), np.inf, np.float32)}, "init_latents holds .* finite"),
        ({"init_latents": "noise.npy"}, "init_latents is 'noise.npy': give a tensor"),
    ],
)
def test_arguments_of_other_types_are_refused_in_one_line(pipeline, arguments, message):
    request = dataclasses.replace(REQUEST, prompt="")
    with pytest.raises(ValueError, match=message):
        next(pipeline().generate([request], **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_step": 3}, "on_step is 3: give a function"),
        ({"only": [0]}, r"only is \[0\]: give a function"),
        ({"prompt_embeds": 3}, "prompt_embeds is 3: give a list with a tensor or None for each request"),
        ({"batch_size": "4"}, "batch_size is '4'"),
        ({"output_type": ["pil"]}, r"output_type is \['pil'\]"),
    ],
)
def test_what_is_no_function_or_list_is_refused_before_sampling(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(pipeline().generate([REQUEST], **arguments))


def test_a_prompt_may_stand_first(pipeline):
    pipe = pipeline()
    options = {"steps": 1, "output_type": "latent"}
    assert torch.equal(pipe("a ball", **options), pipe(prompt="a ball", **options))
    with pytest.raises(ValueError, match="prompt is 3: give text"):
        pipe(3, **options)
    with pytest.raises(ValueError, match="prompt is missing"):
        pipe(**options)
    for args, fields in ((("a", "b"), {}), (("a",), {"prompt": "b"})):
        with pytest.raises(ValueError, match="give one prompt, first or by name"):
            pipe(*args, **fields, **options)


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({"prompt_weights": True, "long_prompts": True}, "both", {"prompt_weights", "long_prompts"}),
        ({"clip_skip": 2}, "both", {"clip_skip"}),
        ({"clip_skip": 2}, "prompt", set()),  # of the empty negative prompt it has
        ({"clip_skip": 2, "guidance": 1}, "prompt", {"clip_skip"}),
        ({"prompt_weights": True}, "prompt", {"prompt_weights"}),
        ({"prompt_weights": True, "negative_prompt": "(fog)"}, "prompt", set()),
        ({"long_prompts": True, "negative_prompt": "fog", "guidance": 1}, "prompt", {"long_prompts"}),
        ({"prompt": "a ball", "prompt_weights": True, "clip_skip": 2}, "negative_prompt", set()),
        ({"guidance": 1}, "both", {"negative_prompt_embeds"}),
        ({}, "both", set()),
    ],
)
def test_fields_without_effect_beside_embeddings_are_said(pipeline, fields, given, said, caplog):
    pipe = pipeline()
    tokens = pipe.encode_text(["fog"])["fog"]
    names = ("prompt", "negative_prompt") if given == "both" else (given,)
    pipe(**{"prompt": ""} | fields, steps=1, output_type="latent", **{f"{name}_embeds": tokens for name in names})
    lines = [line for line in caplog.messages if "beside the given embeddings" in line]
    assert {line.split(": ")[1].split(" ")[0] for line in lines} == said


@pytest.mark.parametrize("field", ["guidance", "strength", "eta", "tau"])
@pytest.mark.parametrize("value", [1e30, -1e30, math.nan, math.inf])
def test_numbers_beyond_sense_are_refused_with_a_range(pipeline, field, value):
    with pytest.raises(
        ValueError,
        match=rf"{field} is {re.escape(str(value))}: give a number (that is finite, )?from (0|-1000) to (1|1000)$",
    ):
        pipeline()(prompt="a", **{field: value})


def test_weights_of_a_prompt_beyond_sense_are_refused():
    with pytest.raises(ValueError, match=r"prompt holds a weight of 1e\+30: give one between -100 and 100"):
        Request(prompt=f"a (ball:1{'0' * 30})", prompt_weights=True)


@pytest.mark.parametrize("sampler", ["plms", "dpmpp", "euler-ancestral"])
def test_latents_that_overflow_end_the_run_where_they_do_and_keep_what_was_made(pipeline, sampler, monkeypatch):
    """A run of 4 steps whose third step is too large for its precision."""
    pipe = pipeline()
    good = Request(prompt="a ball", steps=2, sampler="ddim")
    bad = Request(prompt="a tree", steps=4, sampler=sampler, guidance=900)
    plain, seen = pipe.unet.denoise, []

    def denoise(x, timesteps, cond, scale):
        seen.append(len(seen))
        calls_before = 2 + (1 if sampler == "plms" else 0) + 2  # of the good one, and of two steps
        return plain(x, timesteps, cond, scale) * (math.inf if len(seen) > calls_before else 1)

    monkeypatch.setattr(pipe.unet, "denoise", denoise)
    made = pipe.generate([good, bad])
    assert next(made).request == dataclasses.replace(good, size=(64, 64))
    steps = []
    made = pipe.generate([bad], on_step=lambda progress: steps.append(progress.step))
    seen[:] = [0, 0]  # as if the good one had been made
    words = (
        "'a tree': the latents are not finite after step 3 of 4: lower guidance, which is 900; else lower the weight"
    )
    with pytest.raises(ValueError, match=words):
        next(made)
    assert steps == [1, 2]


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_a_device_that_does_not_wait_finds_the_step_at_the_end(pipeline, output_type, monkeypatch):
    pipe, plain, calls = pipeline(), pipeline().unet.denoise, []
    monkeypatch.setattr(
        gligen.pipeline._Overflow, "watch", lambda self, x: self.steps.append(x.isfinite().flatten(1).all(1))
    )
    monkeypatch.setattr(
        pipe.unet, "denoise", lambda *given: calls.append(1) or plain(*given) * (math.nan if len(calls) == 2 else 1)
    )
    with pytest.raises(ValueError, match="the latents are not finite after step 2 of 3: lower the weight"):
        pipe("a", steps=3, sampler="ddim", output_type=output_type)
    assert len(calls) == 3


def test_of_a_batch_the_request_that_overflows_is_named(pipeline, monkeypatch):
    pipe, plain = pipeline(), pipeline().unet.denoise

    def denoise(x, *given):
        eps = plain(x, *given)
        return eps.index_fill(0, torch.arange(1, len(x), 2), math.nan)  # the second of each pair

    monkeypatch.setattr(pipe.unet, "denoise", denoise)
    requests = [gligen.Request(prompt=name, steps=2, guidance=1, size=(64, 64)) for name in ("first", "second")]
    with pytest.raises(ValueError, match="'second': the latents are not finite after step 1 of 2"):
        list(pipe.generate(requests, batch_size=2))


def test_a_decoded_image_that_overflows_is_no_black_image(pipeline, monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(pipe, "_decode", lambda latents: torch.full((1, 3, 64, 64), math.nan))
    with pytest.raises(ValueError, match="the decoded image is not finite: lower the weight of a LoRA"):
        pipe(prompt="a", steps=1)


@pytest.mark.parametrize("wrong", [REQUEST, [{"prompt": "x"}], "x"])
def test_requests_are_a_list_of_requests(pipeline, wrong):
    with pytest.raises(ValueError, match=r"give a list of gligen\.Request"):
        list(pipeline().generate(wrong))


def test_arrays_and_lists_serve_as_tensors(pipeline):
    pipe = pipeline()
    tokens = pipe.encode_text(["a ball"])["a ball"]
    ways = [tokens, tokens.numpy(), tokens.tolist()]
    made = [pipe(prompt_embeds=way, steps=1, output_type="latent") for way in ways]
    assert all(torch.equal(other, made[0]) for other in made[1:])
