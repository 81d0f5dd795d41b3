"""What wraps the UNet at every step: classifier-free guidance, and the gates of scheduled sampling."""

from __future__ import annotations

import math

from torch import Tensor

Stages = tuple[float, float, float]


def guide(eps: Tensor, guidance_scale: float) -> Tensor:
    """ε_null + s·(ε - ε_null) (Ho & Salimans eq. 6, 2022, with s = 1 + w).

    eps: (2·B, ...), of one batch that holds the null branch first, then the conditional one. Returns (B, ...).
    """
    null, conditional = eps.chunk(2)  # (B, ...) each
    return null + guidance_scale * (conditional - null)


def check_stages(stages: Stages) -> None:
    """Raises ValueError unless the three fractions lie in [0, 1] and sum to 1 (within 1e-6)."""
    if any(not 0 <= s <= 1 for s in stages) or abs(sum(stages) - 1) > 1e-6:
        raise ValueError(f"schedule is {stages}: give three fractions of the steps, each in [0, 1], that sum to 1")


def gate_schedule(stages: Stages, num_steps: int) -> list[float]:
    """β of each step: full, then a linear decay, then off (GLIGEN eq. 10, and its three-stage form).

    stages: fractions (full, decay, off) of the steps, summing to 1. The number of steps of the first two stages is
    rounded down; the decay runs 1 - 1/n, …, 0, so that its last step is already off; the rest is 0.
    Raises ValueError for fractions that do not sum to 1.
    """
    check_stages(stages)
    # the tiny term undoes float products such as 0.29 · 100 = 28.999…, which would lose a step
    full, decay = (math.floor(fraction * num_steps + 1e-6) for fraction in stages[:2])
    betas = [1.0] * full + [1.0 - (i + 1) / decay for i in range(decay)]
    return betas + [0.0] * (num_steps - len(betas))
