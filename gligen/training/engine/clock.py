"""A budget of time for a training run: a learning rate that falls reaches 0 when it is used up, whatever
the machine's speed."""

from __future__ import annotations

import time


class Clock:
    """Runs from now on. minutes: the budget; 0 is none.

    Made before anything is loaded, drawn or compiled, so that these count; `spent` then shares out what they leave.
    """

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes if minutes else None
        self.first: float | None = None

    def spent(self) -> float:
        """The share, from 0 to 1, of the time between this method's first call and the deadline that has gone by; 0
        without a budget."""
        if self.deadline is None:
            return 0.0
        now = time.monotonic()
        if self.first is None:
            self.first = now
        left = self.deadline - self.first
        return min(1.0, (now - self.first) / left) if left > 0 else 1.0
