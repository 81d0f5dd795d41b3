"""Learning: what trains and what stays, what a batch is, when a run is told that it learns nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gligen.data.requests import scene_request
from gligen.data.scenes import make_scene
from gligen.data.shapes import HELD_OUT, phrase_of
from gligen.data.streams import Series
from gligen.diffusion.loss import x0_weights
from gligen.diffusion.schedule import Schedule
from gligen.grounding.inpainting import boxes_mask
from gligen.images import load_map
from gligen.loading import build_pipeline, open_model, widened
from gligen.modes import MODES
from gligen.modules.position_net import GroundingInputs
from gligen.pipeline import Pipeline, Sample
from gligen.request import parse_request
from gligen.training.batches import GroundingBatches
from gligen.training.data import open_data
from gligen.training.diagnosis import Diagnosis, Losses, advise, gates, move_grounding, shuffle_grounding
from gligen.training.engine.checkpoint import read_checkpoint
from gligen.training.engine.clock import Clock
from gligen.training.engine.loader import StepBatches, iterate
from gligen.training.engine.loop import Loop
from gligen.training.engine.optim import Average, build_optimizer, learning_rate
from gligen.training.grounding_task import GroundingTask, train
from gligen.training.objective import Inputs, Objective, null_where
from gligen.training.presets import PRESETS
from gligen.training.preview import make_previews, preview
from gligen.training.trainable import (
    Networks,
    build_networks,
    frozen_checksum,
    purpose_of,
    trainable_parameters,
)
from gligen.weights import read_weights, save_model
from tests.generated import generated_base
from tests.training.helpers import CPU, batches_of, lines, loop_of, quick, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def box_networks(base: Path) -> Networks:
    return build_networks(quick(base), CPU)


def test_loss_falls_and_gates_move_in_sixty_steps(tmp_path: Path, base: Path) -> None:
    config = quick(
        base,
        steps=60,
        batch_size=8,
        lr=3e-3,
        log_every=10,
        diagnose_every=60,
        diagnosis_samples=16,
        lr_schedule="constant",
    )
    train(config, tmp_path)
    diagnoses = [line for line in lines(tmp_path) if "diagnosis" in line]
    assert [line["step"] for line in diagnoses] == [0, 60]
    assert [line["step"] for line in lines(tmp_path) if "positions" in line] == [0]
    before, after = (line["diagnosis"] for line in diagnoses)
    assert before["right"] == before["null"] == before["shuffled"]  # shut gates: grounding cannot matter
    assert after["right"] < 0.97 * before["right"]
    figures = [line for line in lines(tmp_path) if "loss" in line]
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert all(min(pair) > 1e-4 for pair in diagnoses[-1]["fusers"].values())
    assert figures[-1]["gates"]["max"] > 0.01


@pytest.mark.parametrize("preset", ["scenes-box-text", "scenes-box-text-image"])
def test_a_base_is_completed_by_a_vae_and_a_clip(preset: str, tmp_path: Path, base: Path) -> None:
    """As sample.py completes it: the run is that of the whole base, and another file is another base."""
    config, parts = generated_base()
    bare = tmp_path / "bare.safetensors"
    save_model(bare, {"unet": parts["unet"]}, dataclasses.replace(config, image_size=32))
    clip = tmp_path / "clip.safetensors"  # of our own layout, which says how many heads these small towers have
    save_model(clip, {part: parts[part] for part in ("text_encoder", "image_encoder")}, config)
    vae = {name: t.read() for name, t in parts["vae"].items()}
    torch.save(vae, tmp_path / "vae.pt")
    run = quick(bare, preset, vae=str(tmp_path / "vae.pt"), clip=str(clip))
    made, whole = train(run, tmp_path / "a"), train(quick(base, preset), tmp_path / "b")
    made_tensors, whole_tensors = (read_weights(path).parts["unet"] for path in (made, whole))
    assert made_tensors.keys() == whole_tensors.keys()
    assert all(torch.equal(made_tensors[name].read(), whole_tensors[name].read()) for name in made_tensors)
    train(dataclasses.replace(quick(base, preset), steps=3), tmp_path / "a")  # the same base in one file
    torch.save(vae | {"post_quant_conv.bias": vae["post_quant_conv.bias"] + 1}, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="holds a run with another base model"):
        train(dataclasses.replace(run, steps=4), tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds no autoencoder and no text encoder .* with --vae and --clip"):
        train(quick(bare, preset), tmp_path / "c")
    with pytest.raises(ValueError, match=r"holds no text encoder \("):
        train(quick(bare, preset, vae=str(tmp_path / "vae.pt")), tmp_path / "c")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lr", 1e30, "up to 1"), ("lr", math.nan, "up to 1"), ("lr", math.inf, "up to 1"),
        ("gate_lr_scale", 1e30, "up to 1000"), ("weight_limit", math.inf, "up to 1000"),
        ("weight_decay", math.inf, "finite"), ("clip_norm", math.nan, "finite"), ("minutes", math.inf, "finite"),
    ],
)  # fmt: skip
def test_rates_beyond_sense_are_refused(field: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is .*{words}"):
        dataclasses.replace(PRESETS["scenes-box-text"], **{field: value})


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in MODES])
def test_every_preset_trains_exactly_what_it_lists(preset: str, tmp_path: Path, base: Path) -> None:
    config = quick(base, preset, gate_lr_scale=50.0)
    networks = build_networks(config, CPU)
    before = {f"{part}.{n}": t.clone() for part, m in networks.modules() for n, t in m.state_dict().items()}
    loop_of(config, tmp_path, networks).fit()
    after = {f"{part}.{n}": t for part, m in networks.modules() for n, t in m.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    listed = {f"unet.{name}" for name in trainable_parameters(networks)}
    assert moved <= listed
    # What two steps must have reached: the gates, then, through them, all but features that were absent and blocks
    # behind ConvNeXt's layer scale of 1e-6.
    late = ("null_", "_embeddings", "in_conv", "convnext_tiny_backbone.stages")
    assert all(any(part in name for part in late) for name in listed - moved), listed - moved
    purposes = {purpose_of(name.removeprefix("unet."), config.mode) for name in moved}
    spec = MODES[config.mode]
    assert purposes == {"fusers", "position_net"} | ({"first_conv"} if spec.extra_channels else set()) | (
        {"downsample_net"} if spec.hint_widths else set()
    )
    adapter = open_model_names(tmp_path)
    assert adapter == {name.removeprefix("unet.") for name in listed}


def open_model_names(folder: Path) -> set[str]:
    return set(read_weights(folder / "adapter.safetensors").parts["unet"])


def test_every_weight_is_new_or_the_bases(box_networks: Networks) -> None:
    _, parts = generated_base()
    for name in box_networks.unet.state_dict():
        assert (purpose_of(name, "box-text") is None) == (name in parts["unet"])


def test_first_adapter_gives_what_the_base_gives_bit_for_bit(tmp_path: Path, base: Path) -> None:
    adapter = train(quick(base, steps=0), tmp_path)
    request = {"prompt": "a red star", "steps": 3, "seed": 5}
    box = {"entities": [{"phrase": "a red star", "box": [0.1, 0.1, 0.6, 0.6]}], "schedule": [1, 0, 0]}
    plain = next(build_pipeline(open_model(base), device="cpu").generate([parse_request(request)]))
    taught = build_pipeline(open_model(base, adapter), device="cpu")
    assert taught.mode == "box-text"
    grounded = next(taught.generate([parse_request(request | box)]))
    assert torch.equal(plain.latents, grounded.latents)


@pytest.mark.parametrize("preset", ["scenes-depth", "scenes-hed", "scenes-inpaint-box-text"])
def test_widened_convolution_starts_as_the_bases(preset: str, tmp_path: Path, base: Path) -> None:
    networks = build_networks(quick(base, preset), CPU)
    weight = networks.unet.first_conv.weight
    _, parts = generated_base()
    own = parts["unet"]["input_blocks.0.0.weight"].read()
    assert torch.equal(weight[:, :4], own)
    assert not weight[:, 4:].any()
    assert torch.equal(widened(own, weight.shape[1]), weight)
    if networks.unet.config.grounding.spec.is_map:
        assert torch.equal(networks.unet.base_conv_weight, own)
    train(quick(base, preset), tmp_path)
    model = open_model(base, tmp_path / "adapter.safetensors")
    assert model.config.unet.grounding.mode == quick(base, preset).mode
    build_pipeline(model, device="cpu")


def test_map_adapter_goes_back_to_the_base_in_ungated_steps(tmp_path: Path, base: Path) -> None:
    train(quick(base, "scenes-depth"), tmp_path)
    pipe = build_pipeline(open_model(base, tmp_path / "adapter.safetensors"), device="cpu")
    request = parse_request({"prompt": "a red star", "steps": 2})  # nothing grounded: gates are 0
    plain = next(build_pipeline(open_model(base), device="cpu").generate([request]))
    assert torch.equal(next(pipe.generate([request])).latents, plain.latents)


def test_inpainting_starts_from_a_plain_adapter(tmp_path: Path, base: Path) -> None:
    config = quick(base, gate_lr_scale=50.0)
    adapter = train(config, tmp_path / "plain")
    networks = build_networks(quick(base, "scenes-inpaint-box-text", adapter=str(adapter)), CPU)
    learnt = trainable_parameters(networks)
    name = "middle_block.1.transformer_blocks.0.fuser.alpha_attn"
    stored = read_checkpoint(tmp_path / "plain").tensors[f"weights.{name}"].read()
    assert stored != 0
    assert torch.equal(learnt[name], stored)


def test_other_modes_start_from_an_adapters_fusers(tmp_path: Path, base: Path) -> None:
    adapter = train(quick(base, gate_lr_scale=50.0), tmp_path / "plain")
    stored = {name: tensor.read() for name, tensor in read_weights(adapter).parts["unet"].items()}
    twins = {"linears_text": "linears", "linears_image": "linears"}
    twins |= {"null_text_feature": "null_positive_feature", "null_image_feature": "null_positive_feature"}
    for preset in ("scenes-box-text-image", "scenes-sem"):
        learnt = trainable_parameters(build_networks(quick(base, preset, adapter=str(adapter)), CPU))
        fresh = trainable_parameters(build_networks(quick(base, preset), CPU))
        for name, tensor in learnt.items():
            source = ".".join(twins.get(word, word) for word in name.split("."))
            is_shared = ".fuser." in name or preset == "scenes-box-text-image"
            assert torch.equal(tensor, stored[source] if is_shared else fresh[name]), name
    other = train(quick(base, fuser_type="gatedCA"), tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit this model"):
        build_networks(quick(base, "scenes-sem", adapter=str(other)), CPU)


def test_keypoints_start_as_small_boxes_around_them(tmp_path: Path, base: Path) -> None:
    """The same tokens as the boxes' own tokenizer makes of a person in a box of an eighth of the side."""
    adapter = train(quick(base, gate_lr_scale=50.0), tmp_path)
    boxes = build_networks(quick(base, adapter=str(adapter)), CPU)
    joints = build_networks(quick(base, "scenes-keypoint", adapter=str(adapter)), CPU)
    gates = [[fuser.alpha_attn for fuser in networks.unet.fusers.values()] for networks in (boxes, joints)]
    assert all(map(torch.equal, *gates))
    count = 17 * joints.config.unet.grounding.max_persons
    points = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0))
    person = boxes.text_encoder.phrase_features(boxes.text_encoder.tokenize(["a person"])[0])
    inputs = {
        "boxes": torch.cat([points - 1 / 16, points + 1 / 16], dim=-1),
        "masks": torch.ones(2, count),
        "text_features": person.expand(2, count, -1),
    }
    joints.unet.position_net.person_embeddings.data.zero_()
    tokens = joints.unet.ground({"points": points, "masks": torch.ones(2, count)})
    torch.testing.assert_close(tokens, boxes.unet.ground(inputs), rtol=1e-4, atol=1e-5)


def test_map_cells_start_as_boxes_of_an_object_there(tmp_path: Path, base: Path) -> None:
    """Where the trunk says nothing; what it says is added to the phrase and not to the place, and fusers come along."""
    adapter = train(quick(base, gate_lr_scale=50.0), tmp_path)
    boxes = build_networks(quick(base, adapter=str(adapter)), CPU)
    wide = {"map_dims": (8, 8, 16, 128), "map_size": 64, "adapter": str(adapter)}
    maps = build_networks(quick(base, "scenes-depth", **wide), CPU)
    gates = [[fuser.alpha_attn for fuser in networks.unet.fusers.values()] for networks in (boxes, maps)]
    assert all(map(torch.equal, *gates))
    thing = boxes.text_encoder.phrase_features(boxes.text_encoder.tokenize(["an object"])[0])
    cells = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]])
    asked = {"boxes": cells, "masks": torch.ones(1, 4), "text_features": thing.expand(1, 4, -1)}
    net = maps.unet.position_net
    torch.testing.assert_close(net.linears(net.pos_embedding), boxes.unet.ground(asked), rtol=1e-4, atol=1e-5)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = net.convnext_tiny_backbone(picture)
    width = thing.shape[1]
    assert features[:, :width].std() > 0.1
    assert features[:, width : width + 64].abs().max() < 1e-4  # ConvNeXt's blocks begin at a millionth


def test_kept_scenes_come_again_with_other_noise(tmp_path: Path, base: Path) -> None:
    networks = build_networks(quick(base), CPU)
    first, again = (batches_of(quick(base, cache=4), networks).batch(numbers) for numbers in (range(4), range(8, 12)))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.grounding["boxes"], again.grounding["boxes"])
    assert not torch.equal(first.noise, again.noise)
    assert not torch.equal(first.timesteps, again.timesteps)
    paths = [train(quick(base, steps=2, cache=cache), tmp_path / str(cache)) for cache in (0, 4)]  # 4 samples in all
    anew, kept = ({n: t.read() for n, t in read_weights(path).parts["unet"].items()} for path in paths)
    assert all(torch.equal(anew[name], kept[name]) for name in anew)


def test_a_sample_is_a_function_of_its_number_alone(base: Path) -> None:
    config = quick(base, "scenes-inpaint-box-text")
    source = batches_of(config)
    together, alone = source.batch(range(3, 7)), source.batch([5])
    for field in dataclasses.fields(together):
        one, many = getattr(alone, field.name), getattr(together, field.name)
        if isinstance(one, dict):
            assert all(torch.equal(one[k][0], many[k][2]) for k in one)
        elif field.name == "phrases":
            named = [{together.phrases[p] for b, _, p in together.phrase_slots.tolist() if b == 2}, set(alone.phrases)]
            assert named[0] == named[1]
        elif one is not None and field.name not in ("phrase_slots", "reference_slots", "faults"):
            assert torch.equal(one[0], many[2]), field.name


def test_processes_and_accumulation_share_out_one_large_batch(box_networks: Networks, base: Path) -> None:
    source = batches_of(quick(base), box_networks)
    whole = StepBatches(batches=source, batch_size=4)[3]
    halves = [StepBatches(batches=source, batch_size=2, rank=r, processes=2)[3] for r in (0, 1)]
    accumulated = [StepBatches(batches=source, batch_size=2)[k] for k in (6, 7)]
    for parts in (halves, accumulated):
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_background_workers_give_the_same_batches(box_networks: Networks, base: Path) -> None:
    batches = StepBatches(batches=batches_of(quick(base), box_networks), batch_size=2)
    ahead = list(iterate(batches, 5, workers=2, pin=False))
    for k, batch in zip(range(5), ahead, strict=True):
        assert torch.equal(batch.noise, batches[k].noise)
        assert torch.equal(batch.ids, batches[k].ids)


def test_grounding_is_the_scenes_own(box_networks: Networks, base: Path) -> None:
    source = batches_of(quick(base), box_networks)
    batch = source.batch([7])
    scene = source.source.scene(7)
    n = len(scene.objects)
    assert batch.grounding["masks"][0].tolist() == [1.0] * n + [0.0] * (source.grounding.max_entities - n)
    assert torch.allclose(batch.grounding["boxes"][0, :n], torch.tensor([item.box for item in scene.objects]))
    features = box_networks.text_encoder.phrase_features(
        box_networks.text_encoder.tokenize([scene.objects[0].phrase])[0]
    )
    objective = Objective(box_networks, Schedule())
    inputs = objective.inputs(objective.encode(batch))
    assert torch.allclose(inputs.grounding["text_features"][0, 0], features[0], atol=1e-5)


def test_captions_are_spelt_in_the_bases_own_vocabulary(box_networks: Networks, base: Path) -> None:
    model = box_networks.config
    source = batches_of(quick(base), box_networks)
    captions = [source.source.scene(i).caption for i in range(4)]
    assert torch.equal(source.batch(range(4)).ids, box_networks.text_encoder.tokenize(captions)[0])
    small = dataclasses.replace(model, text_encoder=dataclasses.replace(model.text_encoder, vocab_size=1000))
    assert GroundingBatches.build(quick(base), small, source.source, 0).batch(range(4)).ids.max() == 999


def test_held_out_pairs_never_teach_grounding(box_networks: Networks, base: Path) -> None:
    source = batches_of(quick(base), box_networks)
    phrases = {item.phrase for i in range(200) for item in source.source.scene(i).objects}
    assert not phrases & {phrase_of(*pair) for pair in HELD_OUT}
    assert len(phrases) > 40


def test_drop_rates_per_sample_follow_the_config(box_networks: Networks, base: Path) -> None:
    source = batches_of(quick(base, caption_drop=0.3, grounding_drop=0.1, timestep_low=0), box_networks)
    batch = source.batch(range(1000))
    # three standard deviations of a share among 1000
    assert batch.drop_caption.float().mean().item() == pytest.approx(0.3, abs=0.044)
    assert batch.drop_grounding.float().mean().item() == pytest.approx(0.1, abs=0.029)
    both = (batch.drop_caption & batch.drop_grounding).float().mean().item()
    assert both == pytest.approx(0.03, abs=0.017)  # independent of each other
    assert batch.timesteps.min() < 20
    assert batch.timesteps.max() > 980
    assert batch.timesteps.float().mean().item() == pytest.approx(499.5, abs=28)


def test_dropped_maps_keep_their_tokens_and_lose_their_channels(base: Path) -> None:
    config = quick(base, "scenes-depth", map_drop=0.3, map_size=32)
    networks = build_networks(config, CPU)
    batch = batches_of(config, networks).batch(range(400))
    assert batch.drop_map.float().mean().item() == pytest.approx(0.3, abs=0.07)  # three standard deviations
    assert not open_data(config, networks.config).held_out.batch(range(400)).drop_map.any()
    with torch.no_grad():
        networks.unet.first_conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    hook = networks.unet.first_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 4:]))
    objective = Objective(networks, Schedule())
    two = objective.encode(batches_of(config, networks).batch([0, 1]))
    with torch.no_grad():
        losses = [
            objective.losses(objective.inputs(dataclasses.replace(two, drop_map=torch.tensor(dropped))))
            for dropped in ([False, False], [True, False])
        ]
    hook.remove()
    assert seen[0].any()
    assert not seen[1][0].any()
    assert torch.equal(seen[0][1], seen[1][1])
    assert losses[0][0] != losses[1][0]


def test_dropped_samples_have_empty_prompt_and_null_grounding(box_networks: Networks, base: Path) -> None:
    objective = Objective(box_networks, Schedule())
    source = batches_of(quick(base), box_networks)
    batch = dataclasses.replace(
        source.batch([0, 1]), drop_caption=torch.tensor([True, False]), drop_grounding=torch.tensor([True, False])
    )
    inputs = objective.inputs(objective.encode(batch))
    empty = box_networks.text_encoder(box_networks.text_encoder.tokenize([""])[0])
    assert torch.allclose(inputs.context[:1], empty, atol=1e-5)
    assert not torch.allclose(inputs.context[1:], empty, atol=1e-2)
    assert not inputs.grounding["masks"][0].any()
    assert torch.equal(inputs.grounding["masks"][1], batch.grounding["masks"][1])
    net = box_networks.unet.position_net
    null: GroundingInputs = net.null_inputs(1)
    dropped = {name: value[:1] for name, value in inputs.grounding.items()}
    assert torch.equal(net(**dropped), net(**null))


def test_one_of_an_entitys_features_is_dropped_and_never_both(base: Path) -> None:
    config = quick(base, "scenes-box-text-image", feature_drop=0.5)
    networks = build_networks(config, CPU)
    batch = batches_of(config, networks).batch(range(150))
    present = batch.grounding["masks"] == 1
    text, image = batch.grounding["text_masks"][present], batch.grounding["image_masks"][present]
    assert ((text + image) >= 1).all()
    assert ((text + image) == 1).float().mean().item() == pytest.approx(0.5, abs=0.09)
    objective = Objective(networks, Schedule())
    inputs = objective.inputs(objective.encode(batch))
    norms = inputs.grounding["image_features"].norm(dim=-1)
    held = batch.grounding["image_masks"] == 1
    assert torch.allclose(norms[held], torch.tensor(28.7), atol=1e-3)
    assert not norms[~held].any()


def test_loss_is_the_noise_prediction_error(box_networks: Networks, base: Path) -> None:
    objective = Objective(box_networks, Schedule())
    batch = batches_of(quick(base), box_networks).batch(range(3))
    inputs = objective.inputs(objective.encode(batch))
    eps = box_networks.unet(inputs.x_t, inputs.timesteps, inputs.context, inputs.grounding)
    by_hand = (eps - batch.noise).double().pow(2).flatten(1).mean(1)
    assert torch.allclose(objective.losses(inputs).double(), by_hand, rtol=1e-5)
    loss, plain = objective.loss(objective.encode(batch))
    assert loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert plain.item() == loss.item()


def test_x0_weights_are_clamped_and_average_to_one() -> None:
    schedule = Schedule()
    weights = x0_weights(schedule, 0, 999, 10.0)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert (weights.diff() >= 0).all()
    assert (weights[-1] / weights[0]).item() == pytest.approx(10 * schedule.alphas_cumprod[0], rel=1e-4)


def test_diagnosis_compares_on_identical_noise(box_networks: Networks, base: Path) -> None:
    objective = Objective(box_networks, Schedule())
    source = batches_of(quick(base), box_networks)
    held_out = open_data(quick(base), box_networks.config).held_out
    diagnosis = Diagnosis(objective, held_out, samples=5, chunk=2)
    right = diagnosis.inputs
    assert source.series == source.source.series == Series.TRAINING
    assert held_out.series == held_out.source.series == Series.DIAGNOSIS
    assert right.timesteps.min() >= 600
    assert right.timesteps.max() <= 900
    shuffled = shuffle_grounding(right)
    assert shuffled.x_t is right.x_t
    assert shuffled.noise is right.noise
    assert shuffled.context is right.context
    assert torch.equal(shuffled.grounding["boxes"][1:], right.grounding["boxes"][:-1])
    assert torch.equal(shuffled.grounding["boxes"][0], right.grounding["boxes"][-1])
    null = null_where(right.grounding, torch.ones(5, dtype=torch.bool))
    assert not null["masks"].any()
    assert torch.equal(null["boxes"], right.grounding["boxes"])
    moved = move_grounding(right)
    assert moved.noise is right.noise
    assert moved.grounding["text_features"] is right.grounding["text_features"]
    is_asked = right.grounding["masks"] > 0
    x0, y0, x1, y1 = right.grounding["boxes"][is_asked].unbind(-1)
    assert torch.equal(moved.grounding["boxes"][is_asked], torch.stack([1 - x1, 1 - y1, 1 - x0, 1 - y0], dim=-1))
    assert not moved.grounding["boxes"][~is_asked].any()
    losses = diagnosis.losses()
    assert losses.right == losses.null == losses.shuffled == losses.moved  # gates are shut
    assert losses == diagnosis.losses()
    with torch.no_grad():
        for fuser in box_networks.unet.fusers.values():
            fuser.alpha_attn.fill_(1.0)
    try:
        opened = diagnosis.losses()
        assert len({opened.right, opened.null, opened.shuffled, opened.moved}) == 4
        assert all(pair == (pytest.approx(0.76159, abs=1e-4), 0.0) for pair in gates(box_networks.unet).values())
    finally:
        with torch.no_grad():
            for fuser in box_networks.unet.fusers.values():
                fuser.alpha_attn.zero_()


def test_diagnosis_of_shapes_changes_nothing_but_shapes(base: Path, box_networks: Networks) -> None:
    objective = Objective(box_networks, Schedule())
    diagnosis = Diagnosis(objective, open_data(quick(base), box_networks.config).held_out, samples=6, chunk=3)
    right, wrong = diagnosis.inputs, diagnosis.reshaped
    for name in ("x_t", "noise", "context", "timesteps"):
        assert torch.equal(getattr(right, name), getattr(wrong, name))
    assert torch.equal(right.grounding["boxes"], wrong.grounding["boxes"])
    phrases = {tuple(feature.tolist()): phrase for phrase, feature in objective.phrases.features.items()}
    for asked, other, mask in zip(
        right.grounding["text_features"].flatten(0, 1),
        wrong.grounding["text_features"].flatten(0, 1),
        right.grounding["masks"].flatten(),
        strict=True,
    ):
        if mask:
            (_, color, shape), (_, same, changed) = (phrases[tuple(f.tolist())].split() for f in (asked, other))
            assert color == same
            assert shape != changed
    figures = diagnosis.losses().metrics()
    assert figures["right_over_reshaped"] == 1  # gates are shut
    assert "tokens" not in figures


def test_diagnosis_of_a_maps_tokens_leaves_its_channels_out(base: Path) -> None:
    config = quick(base, "scenes-sem", map_size=32)
    networks = build_networks(config, CPU)
    with torch.no_grad():
        networks.unet.first_conv.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    diagnosis = Diagnosis(
        Objective(networks, Schedule()), open_data(config, networks.config).held_out, samples=4, chunk=4
    )
    shut = diagnosis.losses()
    assert shut.tokens == 1  # although another's channels matter
    assert shut.ratio != 1
    with torch.no_grad():
        for fuser in networks.unet.fusers.values():
            fuser.alpha_attn.fill_(1.0)
    assert diagnosis.losses().tokens != 1


def test_people_have_no_other_shapes(base: Path) -> None:
    config = quick(base, "scenes-keypoint")
    networks = build_networks(config, CPU)
    held_out = open_data(config, networks.config).held_out
    losses = Diagnosis(Objective(networks, Schedule()), held_out, samples=2, chunk=2).losses()
    assert losses.shape is None
    assert "reshaped" not in losses.metrics()


def test_advice_is_given_for_shut_gates_and_for_capacity_alone() -> None:
    useless = Losses(right=0.1, null=0.2, shuffled=0.1, moved=0.1)
    anywhere = Losses(right=0.1, null=0.2, shuffled=0.15, moved=0.1)
    useful = Losses(right=0.1, null=0.2, shuffled=0.15, moved=0.12)
    assert advise(useless, 0.0, 10) is None
    assert "gates are shut" in (advise(useless, 1e-4, 1000) or "")
    assert advise(useless, 1e-4, 1000, reach=2.5e-3) is None  # the published recipe, a tenth into its warm-up
    assert "another sample's grounding" in (advise(useless, 0.3, 1000) or "")
    assert "not where yet" in (advise(anywhere, 0.3, 1000) or "")
    assert advise(useful, 0.3, 1000) is None
    assert (useful.ratio, useful.where) == (pytest.approx(2 / 3), pytest.approx(5 / 6))


def test_moved_keypoints_and_maps_are_turned_by_half_a_turn() -> None:
    points = torch.tensor([[[0.2, 0.3], [0.0, 0.0]]])
    people = Inputs(
        x_t=torch.zeros(1, 4, 4, 4),
        timesteps=torch.zeros(1),
        noise=torch.zeros(1, 4, 4, 4),
        context=torch.zeros(1, 2, 3),
        grounding={"points": points, "masks": torch.tensor([[1.0, 0.0]])},
    )
    assert torch.allclose(move_grounding(people).grounding["points"], torch.tensor([[[0.8, 0.7], [0.0, 0.0]]]))
    picture = torch.arange(6.0).reshape(1, 1, 2, 3)
    maps = dataclasses.replace(people, grounding={"map": picture, "masks": torch.ones(1)}, map=picture)
    turned = torch.tensor([[[[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]]])
    assert torch.equal(move_grounding(maps).grounding["map"], turned)
    assert torch.equal(move_grounding(maps).map, turned)


def test_gates_have_their_own_learning_rate(box_networks: Networks, base: Path, tmp_path: Path) -> None:
    config = quick(base, gate_lr_scale=5.0, weight_decay=0.1)
    task = GroundingTask(config, box_networks, tmp_path)
    others, gate_group = build_optimizer(task.parameters(), task.groups(), config.lr).param_groups
    assert (others["scale"], gate_group["scale"]) == (1.0, 5.0)
    assert (others["weight_decay"], gate_group["weight_decay"]) == (0.1, 0.0)
    assert len(gate_group["params"]) == 2 * len(box_networks.unet.transformers)


def test_learning_rate_warms_up_then_stays_or_falls(base: Path) -> None:
    constant = quick(base, lr=1.0, warmup_steps=10, steps=110, lr_schedule="constant")
    assert [learning_rate(constant, step) for step in (0, 4, 9, 10, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(constant, lr_schedule="cosine")
    assert learning_rate(cosine, 60) == pytest.approx(0.5)
    assert learning_rate(cosine, 110) == pytest.approx(0)
    assert learning_rate(cosine, 10, spent=0.5) == pytest.approx(0.5)
    assert learning_rate(cosine, 60, spent=0.1) == pytest.approx(0.5)  # the steps are further on
    assert learning_rate(cosine, 20, spent=1.0) == pytest.approx(0)


def test_a_clock_shares_out_what_loading_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock, endless = Clock(2.0), Clock(0.0)
    shares = []
    for now[0] in (140.0, 160.0, 200.0, 220.0, 300.0):  # the deadline is 220, and 40 seconds were spent on loading
        shares.append(clock.spent())
        assert endless.spent() == 0
    assert shares == [0.0, 0.25, 0.75, 1.0, 1.0]
    late = Clock(1.0)
    now[0] = 400.0
    assert late.spent() == 1


def test_a_run_ends_with_its_time_and_counts_as_done(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # one goes by whenever the clock is looked at, on whatever machine
    monkeypatch.setattr("gligen.training.engine.clock.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    config = quick(base, steps=100_000, minutes=0.5, warmup_steps=0, log_every=1, lr_schedule="cosine", lr=1.0)
    adapter = train(config, tmp_path)
    assert adapter.exists()
    figures = [line for line in lines(tmp_path) if "loss" in line]
    assert 5 < len(figures) < 30
    rates = [line["lr"] for line in figures]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5


def test_average_follows_the_weights_and_is_what_the_adapter_holds(tmp_path: Path, base: Path) -> None:
    parameter = torch.nn.Parameter(torch.tensor(0.0))
    average = Average({"w": parameter}, 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update({"w": parameter}, step=1000)
    assert average.tensors["w"].item() == pytest.approx(0.1)
    with average.swapped_in({"w": parameter}):
        assert parameter.item() == pytest.approx(0.1)
    assert parameter.item() == 1

    adapter = train(quick(base, ema_decay=0.9, steps=3), tmp_path)
    name = "middle_block.1.transformer_blocks.0.fuser.alpha_attn"
    stored = read_checkpoint(tmp_path).tensors
    published = read_weights(adapter).parts["unet"][name].read()
    assert torch.equal(published, stored[f"average.{name}"].read())
    assert not torch.equal(published, stored[f"weights.{name}"].read())


def test_changed_frozen_weights_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    networks = build_networks(quick(base), CPU)
    before = frozen_checksum(networks)
    loop = loop_of(quick(base), tmp_path, networks)
    with torch.no_grad():
        networks.unet.time_embed[0].weight[0, 0] += 1e-3
    assert frozen_checksum(networks) != before
    with pytest.raises(RuntimeError, match="frozen weights have changed"):
        loop.fit()


def test_previews_draw_what_was_asked_and_change_nothing(tmp_path: Path, base: Path) -> None:
    plain = train(quick(base, steps=2), tmp_path / "plain")
    shown = train(
        quick(base, steps=2, preview_every=1, preview_images=1, diagnose_every=1, diagnosis_samples=2),
        tmp_path / "shown",
    )
    sheets = sorted((tmp_path / "shown/previews").glob("*.png"))
    assert [path.name for path in sheets] == ["0000000.png", "0000001.png", "0000002.png"]
    assert Image.open(sheets[1]).size == (256, 256)
    found = [line["preview"] for line in lines(tmp_path / "shown") if "preview" in line]
    assert [set(figures) for figures in found] == [{"found", "found_with_shape"}] * 3
    assert plain.read_bytes() == shown.read_bytes()


def test_a_resumed_run_says_what_comes_first_first(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that has its steps says nothing of what will not happen, and leaves the folder as it was."""

    def said(**fields: object) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "gligen"):
            train(quick(base, lr_schedule="cosine", **fields), tmp_path)
        return [record.getMessage() for record in caplog.records]

    said(steps=2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert said(steps=1) == ["nothing to do: the run has its 2 steps; --steps is 1: raise it to go on"]
    assert said(steps=2) == ["nothing to do: the run has its 2 steps; raise --steps to go on"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files
    lines = said(steps=3)
    assert lines[0].startswith("going on from step 2 of")
    assert lines[1] == "the learning rate now falls to 0 at step 3, not 2"
    assert "begins anew" in lines[2]


def test_a_stopped_run_that_is_asked_for_fewer_steps_only_ends(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(quick(base, lr_schedule="cosine", steps=3, save_every=2), tmp_path)
    with caplog.at_level("INFO", "gligen"):
        train(quick(base, lr_schedule="cosine", steps=1), tmp_path)
    assert "going on from step 2 of" in caplog.text
    assert "no step is left, only the run's end" in caplog.text
    assert "learning rate" not in caplog.text  # it falls no more
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.progress.step, checkpoint.progress.is_done) == (2, True)


def test_previews_are_painted_before_the_first_step_and_after_the_last(tmp_path: Path, base: Path) -> None:
    config = quick(base, steps=3, preview_every=2, preview_images=1)

    def steps() -> list[int]:
        return [line["step"] for line in lines(tmp_path) if "preview" in line]

    train(config, tmp_path)
    assert steps() == [0, 2, 3]
    train(config, tmp_path)  # has nothing to do
    assert steps() == [0, 2, 3]


def test_preview_accuracy_counts_objects_that_are_where_they_were_asked(
    box_networks: Networks, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(box_networks.config, image_size=64)
    networks = dataclasses.replace(box_networks, config=config)
    previews = make_previews(open_data(quick(base), config).preview, 3, "box-text")
    drawn = [Image.fromarray(make_scene(Series.PREVIEW, i).image) for i in range(3)]

    def paint(shift: int) -> dict[str, float]:
        def generate(self: object, requests: list, batch_size: int) -> list[Sample]:
            return [Sample((i, 0), r, drawn[(i + shift) % 3], torch.zeros(1)) for i, r in enumerate(requests)]

        monkeypatch.setattr("gligen.training.preview.Pipeline.generate", generate)
        return preview(networks, previews, tmp_path / "sheet.png", 2)

    assert paint(0) == {"found": 1.0, "found_with_shape": 1.0}
    assert paint(1)["found"] < 0.3
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("mode", ["hed", "canny", "depth", "normal", "sem", "scribble"])
def test_training_reads_maps_as_sampling_does(mode: str, base: Path, tmp_path: Path) -> None:
    source = batches_of(quick(base, f"scenes-{mode}"))
    scene = source.source.scene(3)
    asked = scene_request(scene, mode, tmp_path)
    read = load_map(getattr(asked, mode), mode, source.source.image_size, source.source.image_size)
    assert torch.equal(source.batch([3]).grounding["map"][0], read.float())


def test_training_reads_reference_pictures_as_sampling_does(base: Path, tmp_path: Path) -> None:
    config = quick(base, "scenes-box-text-image", feature_drop=0.0)
    networks = build_networks(config, CPU)
    source = batches_of(config, networks)
    grounding = Objective(networks, Schedule()).encode(source.batch([3])).grounding
    path = scene_request(source.source.scene(3), "box-text-image", tmp_path).entities[0].image
    pipe = Pipeline(networks.config, networks.unet, networks.vae, networks.text_encoder, networks.image_encoder)
    assert torch.allclose(pipe.encode_images([path])[path], grounding["image_features"][0, 0], atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_inpainting_repaints_what_is_asked_and_nothing_else(share: float, base: Path) -> None:
    source = batches_of(quick(base, "scenes-inpaint-box-text", stroke_masks=share))
    batch = source.batch(range(40))
    asked, present = (
        batch.grounding["masks"].sum(1),
        torch.tensor([len(source.source.scene(i).objects) for i in range(40)]),
    )
    assert (asked >= 1).all()
    assert (asked < present).any()
    boxes = boxes_mask(batch.grounding["boxes"], *batch.keep.shape[2:])
    if share == 0:
        assert torch.equal(batch.keep, boxes)
    else:  # strokes lie in their boxes, but for half their width and a cell at the rim
        grown = 1 - torch.nn.functional.max_pool2d(1 - boxes, 5, 1, 2)
        assert (batch.keep >= grown).all()
        assert not torch.equal(batch.keep, boxes)


def test_bfloat16_computes_nearly_the_same_loss(box_networks: Networks, base: Path) -> None:
    batch = batches_of(quick(base), box_networks).batch(range(4))
    objectives = Objective(box_networks, Schedule()), Objective(box_networks, Schedule(), dtype=torch.bfloat16)
    full, half = (objective.loss(objective.encode(batch))[0] for objective in objectives)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.02)  # bfloat16 has 8 bits
    assert half.item() != full.item()
