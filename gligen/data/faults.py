"""Bad examples in a long run: another stands in for each, and they are counted until there are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gligen.data.example import BadExample, Example, Fault, Wrapped
from gligen.data.flags import MAX_BAD

log = logging.getLogger(__name__)


def too_many(lost: int, size: int, max_bad: float) -> bool:
    """True if more than that share of `size` examples is lost."""
    return lost > max_bad * size


@dataclass(frozen=True)
class Tolerant(Wrapped):
    """A finite source in which the next good example stands in for a bad one.

    Pure: which one stands in depends on the source alone. The example carries a `Fault` for each that it stands in for,
    so that whoever reads them, in whatever process, can count (`FaultLog`).
    """

    max_bad: float = MAX_BAD

    def example(self, n: int) -> Example:
        """Raises ValueError if more than max_bad of all examples, one after the other, are bad."""
        size = self.source.size
        assert size is not None  # of finite sources
        lost: list[Fault] = []
        for number in (*range(n, size), *range(n)):
            try:
                example = self.source.example(number)
                return replace(example, faults=(*lost, *example.faults)) if lost else example
            except BadExample as error:
                lost.append(Fault(reason=error.reason, message=str(error), number=number, is_lost=True))
                if too_many(len(lost) - 1, size, self.max_bad):  # the first alone is the log's to judge
                    break
        reasons = Counter(fault.reason for fault in lost)
        first = {fault.reason: fault.message for fault in reversed(lost)}
        raise ValueError(_summary(reasons, first, size, self.max_bad))


class FaultLog:
    """Counts the faults of examples that were read, in the process that logs; each example's once.

    size: of all examples there are, in every source together; None where there is no end, and no limit. start: those
    lost before, when the sources were opened, as they count towards the limit.
    """

    def __init__(self, size: int | None, max_bad: float = MAX_BAD, start: int = 0) -> None:
        self.size, self.max_bad, self.start = size, max_bad, start
        self.counts: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self._seen: set[int] = set()

    def add(self, faults: Iterable[Fault]) -> None:
        """Logs the first of each reason. Raises ValueError, with the reasons, when too many examples are lost."""
        for fault in faults:
            name = hash((fault.reason, fault.message))
            if name in self._seen:
                continue
            self._seen.add(name)
            self.counts[fault.reason] += 1
            self.lost[fault.reason] += fault.is_lost
            if fault.reason not in self.first:
                self.first[fault.reason] = fault.message
                what = "another example stands in for" if fault.is_lost else "left out"
                log.warning("%s %s (%s: more of these are counted, not told)", what, fault.message, fault.reason)
        if self.size is not None and too_many(self.lost.total() + self.start, self.size, self.max_bad):
            raise ValueError(_summary(self.lost, self.first, self.size, self.max_bad, self.start))

    def lines(self) -> list[str]:
        """Lines on what was counted, for the end of a run."""
        return [f"{count} × {reason}" for reason, count in self.counts.most_common()]


def _summary(lost: Counter[str], first: dict[str, str], size: int, max_bad: float, start: int = 0) -> str:
    told = "; ".join(f"{count} × {reason}, the first: {first[reason]}" for reason, count in lost.most_common() if count)
    before = f" and {start} when the set was opened" if start else ""
    return (
        f"{lost.total()} bad examples{before}, more than {max_bad:.2%} of {size}: {told}. Mend or remove them, "
        "or allow more with --max-bad"
    )
