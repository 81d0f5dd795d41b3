"""Is grounding being learnt? Measured while it runs, on one fixed held-out batch at high noise.

Gates that open prove nothing, and a lower loss with grounding than without proves little: new layers also add
capacity. A lower loss with a sample's own grounding than with *another sample's* proves that it is read, which may yet
be its phrases alone: *what* is learnt first. *Where* shows in the loss with the sample's own grounding moved. On the
drawn world nothing happened to it for 110k samples, and then nearly all within the next 45k. *Which shape* comes last,
and another sample's grounding, mostly of other colours and places, hides it: it shows in the loss with the sample's own
grounding in the same colours and places, but other shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gligen.data.example import Example
from gligen.grounding import moved
from gligen.modules.position_net import null_where
from gligen.modules.unet import UNetModel
from gligen.training.batches import GroundingBatches
from gligen.training.objective import Inputs, Objective
from gligen.training.positions import Positions, read_positions, record_tokens

PATIENCE = 500  # steps before advice is given
SHUT = 1e-3  # |tanh α| below which a gate counts as shut
NOTHING_LEARNT = 0.995  # right over shuffled


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean squared errors of ε on the same images, captions, timesteps and noise."""

    right: float  # with each sample's own grounding
    null: float  # with the null grounding (maps stay on the first convolution, as in sampling's null branch)
    shuffled: float  # with the next sample's grounding
    moved: float  # with its own, turned by half a turn about the image's middle
    reshaped: float | None = None  # with its own in the same colours, but other shapes; None where it asks for people
    tokens: float | None = None  # right over shuffled of a map's tokens alone: its extra channels are 0 for both

    @property
    def ratio(self) -> float:
        """Right over shuffled: 1 while nothing is learnt."""
        return self.right / self.shuffled

    @property
    def where(self) -> float:
        """Right over moved: 1 while places do not count."""
        return self.right / self.moved

    @property
    def shape(self) -> float | None:
        """Right over reshaped: 1 while shapes do not count."""
        return None if self.reshaped is None else self.right / self.reshaped

    def metrics(self) -> dict[str, float]:
        """All of them by name, for the log."""
        ratios = {"shuffled": self.ratio, "moved": self.where, "reshaped": self.shape}
        metrics = dataclasses.asdict(self) | {f"right_over_{name}": ratio for name, ratio in ratios.items()}
        return {name: value for name, value in metrics.items() if value is not None}


class Diagnosis:
    """The fixed samples, encoded once.

    held_out: where they come from. chunk: samples that go through the UNet together.
    """

    def __init__(self, objective: Objective, held_out: GroundingBatches, samples: int, chunk: int) -> None:
        self.objective = objective
        self.chunk = chunk

        def inputs(asked: Callable[[int], Example | None] | None = None) -> Inputs:
            numbers = [range(i, min(i + chunk, samples)) for i in range(0, samples, chunk)]
            return _join([objective.inputs(objective.encode(held_out.batch(each, asked=asked))) for each in numbers])

        self.inputs = inputs()
        reshaped = getattr(held_out.source, "reshaped", None)  # the drawn world's alone
        has_shapes = reshaped is not None and reshaped(0) is not None
        self.reshaped = inputs(reshaped) if has_shapes else None

    @torch.no_grad()
    def losses(self) -> Losses:
        everywhere = torch.ones(len(self.inputs.x_t), dtype=torch.bool, device=self.inputs.x_t.device)
        null = dataclasses.replace(self.inputs, grounding=null_where(self.inputs.grounding, everywhere))
        return Losses(
            right=self._mean(self.inputs),
            null=self._mean(null),
            shuffled=self._mean(shuffle_grounding(self.inputs)),
            moved=self._mean(move_grounding(self.inputs)),
            reshaped=None if self.reshaped is None else self._mean(self.reshaped),
            tokens=None if self.inputs.map is None else self._tokens(everywhere),
        )

    def _tokens(self, everywhere: Tensor) -> float:
        """Without the channels, since they say all that the tokens can, and better."""
        alone = dataclasses.replace(self.inputs, drop_map=everywhere)
        return self._mean(alone) / self._mean(shuffle_grounding(alone))

    @torch.no_grad()
    def positions(self, pictures: int) -> dict[str, Positions]:
        """Measures how well visual tokens of the first samples, whose images differ, know their place, at each fuser.

        Compiled blocks run eagerly meanwhile.
        """
        with torch.compiler.set_stance("force_eager"), record_tokens(self.objective.networks.unet) as tokens:
            self._mean(_rows(self.inputs, 0, pictures))
        return read_positions(tokens)

    def _mean(self, inputs: Inputs) -> float:
        losses = [
            self.objective.losses(_rows(inputs, i, i + self.chunk)) for i in range(0, len(inputs.x_t), self.chunk)
        ]
        return torch.cat(losses).mean().item()


def shuffle_grounding(inputs: Inputs) -> Inputs:
    """Each sample with the grounding of the one before it, all else its own."""
    return dataclasses.replace(
        inputs,
        grounding={name: value.roll(1, 0) for name, value in inputs.grounding.items()},
        map=None if inputs.map is None else inputs.map.roll(1, 0),
    )


def move_grounding(inputs: Inputs) -> Inputs:
    """Each sample with its own grounding turned by half a turn, all else its own."""

    return dataclasses.replace(
        inputs,
        grounding=moved(inputs.grounding),
        map=None if inputs.map is None else inputs.map.flip(-1, -2),
    )


@torch.no_grad()
def gates(unet: UNetModel) -> dict[str, tuple[float, float]]:
    """|tanh α| of every fuser, (attention, dense), by the place of its transformer."""
    fusers = unet.fusers
    alphas = torch.stack([torch.stack([fuser.alpha_attn, fuser.alpha_dense]) for fuser in fusers.values()])
    return {place: (attn, dense) for place, (attn, dense) in zip(fusers, alphas.tanh().abs().tolist(), strict=True)}


def summary(opened: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Mean and largest of all gates."""
    values = [value for pair in opened.values() for value in pair]
    return sum(values) / len(values), max(values)


def advise(losses: Losses, largest_gate: float, step: int, reach: float = math.inf) -> str | None:
    """One line on what to try if grounding is not being learnt, or None.

    reach: how far AdamW, which moves a weight by the learning rate a step, can have moved a gate so far. Until it is
    well beyond what counts as shut, as early in a long warm-up, nothing can be said.
    """
    if step < PATIENCE or reach < 10 * SHUT:
        return None
    if largest_gate < SHUT:
        return (
            f"the gates are shut after {step} steps (largest |tanh α| {largest_gate:.1e}): raise --gate-lr-scale or "
            "--lr, or shorten --warmup-steps"
        )
    if losses.ratio >= NOTHING_LEARNT:
        return (
            f"another sample's grounding does as well after {step} steps (right/another's {losses.ratio:.4f}): the new "
            "layers add capacity but read no grounding yet; more samples (--batch-size, --steps) or --weighting x0 help"
        )
    if losses.where >= NOTHING_LEARNT:
        return (
            f"grounding does as well moved elsewhere after {step} steps (right/moved {losses.where:.4f}): what there "
            "is is being learnt, but not where yet; that comes late and then fast, so train on"
        )
    return None


def _rows(inputs: Inputs, first: int, last: int) -> Inputs:
    def cut(value: Tensor | dict[str, Tensor] | None) -> Tensor | dict[str, Tensor] | None:
        if isinstance(value, dict):
            return {name: tensor[first:last] for name, tensor in value.items()}
        return None if value is None else value[first:last]

    return Inputs(**{f.name: cut(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)})  # type: ignore[arg-type]


def _join(parts: list[Inputs]) -> Inputs:
    def joined(name: str) -> Tensor | dict[str, Tensor] | None:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], dict):
            return {key: torch.cat([value[key] for value in values]) for key in values[0]}
        return None if values[0] is None else torch.cat(values)

    return Inputs(**{f.name: joined(f.name) for f in dataclasses.fields(Inputs)})  # type: ignore[arg-type]
