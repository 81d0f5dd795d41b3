"""A map's grounding tokens, begun as boxes': each object's cell learns to say what its phrase in its box would.

A map widens the first convolution too, which gives sooner all that the map's tokens could, so that these learn nothing
(checkpoints/README.md). But fusers that boxes have taught know what to do with a token of a phrase and a place. So the
tokenizer alone is taught first, without the UNet and hence much faster, to make such tokens of a map:

    E ‖MapNet(map)[c] - BoxTextNet(e, l)‖²   for the cell c in which an object e with the box l has its middle,

and BoxTextNet's empty slot for all other cells. Of what a map does not show, colour, the phrase is the mean. Then
`train.py` teaches all of it together.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gligen.data.maps import MAPS, SHAPE_LABELS
from gligen.data.scenes import Scene, make_scene
from gligen.data.shapes import COLORS, phrase_of
from gligen.grounding import read_map
from gligen.modes import MAP_MODES, get_mode
from gligen.modules.position_net import BoxTextNet, MapNet
from gligen.training.engine.clock import Clock
from gligen.training.objective import PhraseFeatures
from gligen.training.presets import get_preset
from gligen.training.trainable import build_networks, trainable_parameters
from gligen.weights import read_weights, save_adapter

SERIES = 1_500_000_000  # of scenes, apart from those of training and of evaluation
BATCH_SIZE, LR, WARMUP_STEPS = 64, 2e-3, 50
CELL_WEIGHT = 4.0  # of the error of a cell that has an object over that of one that has none

log = logging.getLogger("gligen")


def begin_cells(
    mode: str, adapter: Path, file: Path, *, minutes: float, channels: Path | None = None, base: str | None = None
) -> Path:
    """Writes an adapter of a map mode, FILE.safetensors, whose tokens say what boxes say, and returns where.

    adapter: for boxes; its fusers come along as they are. minutes: how long it is taught; the rate falls to 0.
    channels: an earlier adapter of this mode, whose way of the map to the first convolution is taken over.
    base: what the adapter was taught to; None is the embedded one.
    Raises ValueError, one line, for a mode that has no map, files that do not fit, or where there is one already.
    """
    if mode not in MAP_MODES:
        raise ValueError(f"--mode is {mode!r}: those with a map are {', '.join(MAP_MODES)}")
    if file.exists():
        raise ValueError(f"{file}: exists already; choose another name")
    clock, spec = Clock(minutes), get_mode(mode)
    device = torch.device("cpu")
    boxes = build_networks(dataclasses.replace(get_preset("scenes-box-text"), base=base, adapter=str(adapter)), device)
    config = dataclasses.replace(get_preset(f"scenes-{mode}"), base=base, adapter=str(adapter))
    maps = build_networks(config, device)
    teacher, net = boxes.unet.position_net, maps.unet.position_net
    assert isinstance(teacher, BoxTextNet)
    assert isinstance(net, MapNet)
    phrases = shape_features(PhraseFeatures(boxes.text_encoder, device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    step, errors = 0, []
    while (spent := clock.spent()) < 1:
        scenes = [make_scene(SERIES, step * BATCH_SIZE + i, pairs="seen") for i in range(BATCH_SIZE)]
        with torch.no_grad():
            wanted, weights = cell_tokens(scenes, teacher, phrases, math.isqrt(net.config.num_map_tokens))
            empty = teacher(**teacher.null_inputs(1))[:, :1]
        pictures = torch.stack([read_map(MAPS[mode](scene, None), spec, (0, 0)) for scene in scenes])
        tokens = net(pictures.float(), torch.ones(len(scenes), 1))
        null = net.linears(net.null_feature + net.pos_embedding)
        error = (weights[..., None] * (tokens - wanted).square()).mean() + (null - empty).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * spent))
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item() / wanted.var().item())
        step += 1
        if step % 50 == 0:
            log.info("step %d: error over the tokens' variance %.4f", step, sum(errors[-50:]) / len(errors[-50:]))
    log.info("%d steps of %d maps", step, BATCH_SIZE)
    learnt = {name: parameter.detach() for name, parameter in trainable_parameters(maps).items()}
    if channels is not None:
        learnt |= _channels(channels, mode, learnt)
    save_adapter(file, learnt, maps.config)
    return file


def shape_features(features: PhraseFeatures) -> dict[str, Tensor]:
    """Features (F,) of every shape: the mean of its phrases' over the colours, which maps do not show."""
    return {
        shape: features.encode([phrase_of(color, shape) for color in COLORS]).mean(0).cpu() for shape in SHAPE_LABELS
    }


def cell_tokens(
    scenes: Sequence[Scene], teacher: BoxTextNet, phrases: Mapping[str, Tensor], side: int
) -> tuple[Tensor, Tensor]:
    """Targets of the cells (B, side², D), and how much each counts (B, side²).

    An object's cell is the one that its middle lies in; of two in one cell the smaller has the nearest one left.
    """
    cells = side * side
    inputs = {
        "boxes": torch.zeros(len(scenes), cells, 4),
        "masks": torch.zeros(len(scenes), cells),
        "text_features": torch.zeros(len(scenes), cells, len(next(iter(phrases.values())))),
    }
    middles = [((c % side + 0.5) / side, (c // side + 0.5) / side) for c in range(cells)]
    for b, scene in enumerate(scenes):
        free = set(range(cells))
        for item in sorted(scene.objects, key=lambda item: -item.radius):
            x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
            cell = min(free, key=lambda c: math.dist(middles[c], (x, y)))
            free.remove(cell)
            inputs["boxes"][b, cell] = torch.tensor(item.box)
            inputs["masks"][b, cell] = 1
            inputs["text_features"][b, cell] = phrases[item.shape]
    return teacher(**inputs), 1 + (CELL_WEIGHT - 1) * inputs["masks"]


def _channels(path: Path, mode: str, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The extra channels of the first convolution, and what makes them of a map, as another adapter has them."""
    weights = read_weights(path)
    if mode not in weights.modes:
        raise ValueError(f"--channels '{path}' is no adapter of mode {mode}")
    held = {name: tensor.read(dtype=torch.float32) for name, tensor in weights.parts["unet"].items()}
    taken = {name: held[name] for name in learnt if name.startswith("downsample_net.")}
    conv = next(name for name in learnt if name.endswith("input_blocks.0.0.weight"))
    extra = get_mode(mode).extra_channels
    return taken | {conv: torch.cat([learnt[conv][:, :-extra], held[conv][:, -extra:]], dim=1)}
