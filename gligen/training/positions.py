"""Do the frozen model's visual tokens know where they are? Measured before grounding is taught.

A fuser's query has to ask "am I inside this box", and nothing adds positions to what it reads: they must be in the
features of the base already, where they get from the zero padding at the borders. The grids whose tokens know their
place are those at which a fuser can put things in place; at high noise fine ones are full of noise and know little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gligen.modules.fusers import Fuser
from gligen.modules.unet import UNetModel

FEWEST = 16  # images, half of which are fitted to
CHANCE = math.sqrt(1 / 12)  # error of one who always says "in the middle", in sides of the image
LOST = 0.9  # share of CHANCE from which on tokens do not know where they are
RIDGE = 1e-3  # of the features' own spread: keeps the solution apart from noise


@dataclass(frozen=True, kw_only=True)
class Positions:
    """How well a linear map reads a token's place from its features."""

    side: int  # tokens a side
    error: float  # root mean squared error of x and y, in sides of the image; CHANCE if nothing is known

    @property
    def is_lost(self) -> bool:
        return self.error > LOST * CHANCE


@contextmanager
def record_tokens(unet: UNetModel) -> Iterator[dict[str, list[Tensor]]]:
    """While inside, fills what it gives: the visual tokens (B, L, C) of every call of a fuser, by its place."""
    tokens: dict[str, list[Tensor]] = {place: [] for place in unet.fusers}

    def listen(place: str, fuser: Fuser) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens[place].append(args[0].detach().float())

        return fuser.register_forward_pre_hook(keep)

    handles = [listen(place, fuser) for place, fuser in unet.fusers.items()]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def read_positions(tokens: dict[str, list[Tensor]]) -> dict[str, Positions]:
    """Positions at each place whose tokens lie on a square grid."""
    found = {}
    for place, calls in tokens.items():
        joined = torch.cat(calls)
        side = math.isqrt(joined.shape[1])
        if side**2 == joined.shape[1]:
            found[place] = Positions(side=side, error=position_error(joined))
    return found


def position_error(tokens: Tensor) -> float:
    """Error, in sides of the image, of ridge regression from normalised tokens (B, side², C) to their (x, y).

    Fitted on the first half of the images, measured on the other.
    """
    side = math.isqrt(tokens.shape[1])
    features = F.layer_norm(tokens, tokens.shape[-1:])  # as a fuser's first LayerNorm leaves them
    features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1).double()
    at = (torch.arange(side, device=tokens.device, dtype=torch.float64) + 0.5) / side
    places = torch.stack([at.expand(side, side), at[:, None].expand(side, side)], dim=-1).reshape(side**2, 2)
    half = len(tokens) // 2
    known, asked = features[:half].flatten(0, 1), features[half:]
    gram = known.T @ known
    ridge = RIDGE * len(known) * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    weights = torch.linalg.solve(gram + ridge, known.T @ places.repeat(half, 1))
    return (asked @ weights - places).square().mean().sqrt().item()


def summary(positions: dict[str, Positions]) -> str:
    """One line: for each grid size the place that knows best."""
    best: dict[int, Positions] = {}
    for each in positions.values():
        if each.side not in best or each.error < best[each.side].error:
            best[each.side] = each
    grids = ", ".join(f"{100 * best[side].error:.0f} % at {side}²" for side in sorted(best, reverse=True))
    return f"visual tokens know where they are to within {grids} of the image's side ({100 * CHANCE:.0f} % is chance)"


def advise(positions: dict[str, Positions]) -> str | None:
    """One line if tokens are lost everywhere."""
    if all(each.is_lost for each in positions.values()):
        return (
            "the base's visual tokens hardly know where they are, at no grid: places will not be learnt; it takes a "
            "base that was trained for longer, or on images that do not look alike everywhere"
        )
    return None
