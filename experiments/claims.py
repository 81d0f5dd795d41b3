"""The paper's claims in miniature: which metrics speak to each, and what they say, in sentences made of the numbers.

A difference counts if it is larger than twice its spread, √(a² + b²) of the two metrics' spreads. What is compared is
generated from the same requests and seeds, so this errs towards 'no difference'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

CLEAR = 2.0  # times its spread a difference must be to count


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation. settings: requests, seeds (both shown), tau, training_steps, and what else repeats it.

    metrics: those of gligen.evaluation.scenes.Report.to_dict(), `fid`, or others of its kind.
    """

    table: str
    label: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def measure(self, *names: str) -> Measure | None:
        """The metric at that path; None if it is absent or undefined."""
        found: Any = self.metrics
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        value, spread = (found.get("value"), found.get("spread")) if isinstance(found, Mapping) else (found, None)
        return Measure(float(value), spread if _is_number(spread) else None) if _is_number(value) else None

    def setting(self, name: str) -> float | None:
        """A setting that is a number; None if it is absent."""
        value = self.settings.get(name)
        return float(value) if _is_number(value) else None


@dataclass(frozen=True)
class Measure:
    """A metric and the standard deviation of it over resampled images, where it is known."""

    value: float
    spread: float | None = None

    def __str__(self) -> str:
        """As a share in per cent."""
        return f"{100 * self.value:.1f}" + (f" ± {100 * self.spread:.1f}" if self.spread is not None else "") + " %"

    def __format__(self, form: str) -> str:
        """As it is, value and spread in this form; as a share in per cent without one."""
        if not form:
            return str(self)
        return format(self.value, form) + (f" ± {self.spread:{form}}" if self.spread is not None else "")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A table of the page.

    text: what is compared, and what the paper says of it. order: the setting that sorts the rows.
    """

    name: str
    title: str
    text: str
    verdict: Callable[[Sequence[Row]], str]
    order: str | None = None


def compare(a: Measure, b: Measure) -> int | None:
    """1 if a is clearly above b, -1 if clearly below, 0 if neither; None if a spread is not known."""
    if a.spread is None or b.spread is None:
        return None
    difference, spread = a.value - b.value, math.hypot(a.spread, b.spread)
    return 0 if abs(difference) <= CLEAR * spread else int(math.copysign(1, difference))


def find(rows: Sequence[Row], label: str) -> Row | None:
    """The row with that label, in any case; else the first whose label begins with it and then a comma or bracket."""
    wanted = label.lower()
    labels = {row.label.lower(): row for row in reversed(rows)}
    starts = [row for text, row in reversed(labels.items()) if text.startswith((f"{wanted},", f"{wanted} ("))]
    return labels.get(wanted) or (starts[0] if starts else None)


def _two_rows(better: str, worse: str, *, is_tie_enough: bool = False) -> Callable[[Sequence[Row]], str]:
    """The verdict of two rows by the share of objects found. is_tie_enough: the paper says 'at least as well'."""

    def verdict(rows: Sequence[Row]) -> str:
        first, second = find(rows, better), find(rows, worse)
        if first is None or second is None:
            return f"No verdict: it takes the rows '{better}' and '{worse}'."
        steps = [row.setting("training_steps") for row in (first, second)]
        if None not in steps and steps[0] != steps[1]:
            return f"No verdict: {better} had {steps[0]:,.0f} training steps, {worse} {steps[1]:,.0f}."
        images = [row.measure("images") for row in (first, second)]
        if images[0] != images[1]:
            return f"No verdict: {better} and {worse} were not measured on as many images."
        a, b = first.measure("all", "found"), second.measure("all", "found")
        if a is None or b is None:
            return "No verdict: the share of objects found is not given for both."
        numbers = f"{better} finds {a} of the asked objects, {worse} {b} ({_points(a, b)})"
        tie = "No difference shows here beyond the spread"
        said = {
            1: "The paper's ordering shows here",
            0: "As the paper has it, no loss shows here beyond the spread" if is_tie_enough else tie,
            -1: "The paper's ordering does not show here, it is the other way round",
            None: "No verdict, as a spread is missing",
        }
        return f"{said[compare(a, b)]}: {numbers}."

    return verdict


def _pairs(rows: Sequence[Row]) -> str:
    grounded, plain = find(rows, "grounded"), find(rows, "not grounded")
    grounded = grounded or next((row for row in rows if row is not plain), None)
    seen, held_out = (grounded.measure(name, "found") if grounded else None for name in ("seen", "held_out"))
    if seen is None or held_out is None:
        return "No verdict: it takes a grounded row with seen and held-out pairs."
    less = {1: "less often than", 0: "as often, within the spread, as", -1: "more often than", None: "beside"}
    own = f"held-out pairs are found {less[compare(seen, held_out)]} seen ones ({held_out} and {seen})"
    base = plain.measure("held_out", "found") if plain else None
    if base is None:
        return f"No verdict without the held-out pairs of 'not grounded': {own}."
    numbers = f"of held-out pairs grounding finds {held_out}, the caption alone {base} ({_points(held_out, base)})"
    order = compare(held_out, base)
    if order is None:
        return f"No verdict, as a spread is missing: {numbers}; {own}."
    if order > 0:
        return f"Grounding carries over to pairs it was never taught, as in the paper: {numbers}; {own}."
    return f"That grounding carries over to pairs it was never taught does not show here: {numbers}; {own}."


def _tau(rows: Sequence[Row]) -> str:
    by_tau = {row.setting("tau"): row for row in rows}
    full = by_tau.get(1.0)
    whole, fid = (full.measure("all", "found"), full.measure("fid")) if full else (None, None)
    partial = [
        (tau, found, measured)
        for tau, row in by_tau.items()
        if tau is not None and 0 < tau < 1
        if (found := row.measure("all", "found")) and (measured := row.measure("fid"))
    ]
    if whole is None or fid is None or not partial:
        return "No verdict: it takes found objects and FID at τ = 1 and at some τ between 0 and 1."
    costs = {tau: compare(found, whole) for tau, found, _ in partial}
    gains = {tau: compare(measured, fid) for tau, _, measured in partial}
    if None in costs.values() or None in gains.values():
        return "No verdict, as a spread is missing."
    lower = [point for point in partial if gains[point[0]] == -1]
    free = [point for point in lower if costs[point[0]] != -1]
    tau, found, best = min(free or lower or partial, key=lambda point: (point[2].value, -point[0]))
    numbers = f"FID is {best:.3g} at τ = {tau:g} with {found} of the objects found, {fid:.3g} at τ = 1 with {whole}"
    if free:
        return f"The paper's trade shows here, a lower FID at no clear cost in grounding: {numbers}."
    if lower:
        return f"A lower FID shows here, but wherever it does grounding is clearly worse: {numbers}."
    return f"The paper's gain in quality does not show here, FID is nowhere clearly lower than at τ = 1: {numbers}."


def _steps(rows: Sequence[Row]) -> str:
    known = [(row.setting("training_steps"), row.measure("all", "found")) for row in rows]
    points = [(steps, found) for steps, found in known if steps is not None and found is not None]
    if len(points) < 2:
        return "No verdict: it takes two numbers of training steps."
    (first_steps, first), (last_steps, last) = points[0], points[-1]
    numbers = f"{first} of the objects are found after {first_steps:,.0f} steps, {last} after {last_steps:,.0f}"
    best_steps, best = max(points, key=lambda point: point[1].value)
    if best is not first and compare(best, last) == 1:
        numbers += f"; most, {best}, after {best_steps:,.0f}"
    order = compare(last, first)
    if order is None:
        return f"No verdict, as a spread is missing: {numbers}."
    said = {1: "Accuracy rises with training", 0: "No rise shows beyond the spread", -1: "Accuracy falls with training"}
    return f"{said[order]}: {numbers}."


def _binding(rows: Sequence[Row]) -> str:
    grounded, plain = find(rows, "grounded"), find(rows, "not grounded")
    a, b = (row.measure("binding", "all", "success") if row else None for row in (grounded, plain))
    exchanged = grounded.measure("binding", "all", "exchanged") if grounded else None
    if a is None or b is None or exchanged is None:
        return "No verdict: it takes the rows 'grounded' and 'not grounded'."
    said = {1: "Grounding binds", 0: "That grounding binds does not show", -1: "Grounding loses", None: "No verdict"}
    return (
        f"{said[compare(a, b)]}: {a} of the instances are as asked, by the caption alone {b}; in the place of "
        f"{exchanged} lies another one's colour."
    )


SCORES = (("all", "found"), ("near",), ("score",))  # what other modes are judged by, the first that is there


def _other_modes(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        plain = find(rows, f"{row.label}, not grounded")
        path = next((p for p in SCORES if plain and row.measure(*p) and plain.measure(*p)), None)
        if plain is None or path is None:
            continue
        a, b = Measure(_value(row, *path), _spread(row, *path)), Measure(_value(plain, *path), _spread(plain, *path))
        said = {1: "clearly better", 0: "no clear difference", -1: "clearly worse", None: "no spread given"}
        parts.append(f"{row.label} {a}, without grounding {b} ({said[compare(a, b)]})")
    if not parts:
        return "No verdict: it takes rows 'MODE' and 'MODE, not grounded' with a metric in common."
    return f"With grounding and without: {'; '.join(parts)}."


def _forgetting(rows: Sequence[Row]) -> str:
    differences = [row.measure("max_difference") for row in rows]
    known = [difference.value for difference in differences if difference is not None]
    if len(known) < len(rows):
        return "No verdict: max_difference is not given for every row."
    if not any(known):
        return "Nothing is forgotten: with the gates closed every image compared is bit-equal to the base model's."
    return f"Images with closed gates differ from the base model's, by up to {max(known):.3g}: a bug."


# In the order of the page. The rows that a verdict compares are named in it.
CLAIMS = (
    Claim(
        name="grounded",
        title="Grounded or not",
        text="The same captions with their boxes, and without (the frozen base alone). The paper's main claim: boxes "
        "put things where they are asked for.",
        verdict=_two_rows("grounded", "not grounded"),
    ),
    Claim(
        name="fuser",
        title="Gated self-attention or gated cross-attention",
        text="Two kinds of new layer, trained alike for as many steps: in the turned world from nothing and sampled "
        "with grounding throughout, else from nothing behind a taught tokenizer (`experiments/fusers.py`), with three "
        "seeds of the training, and grounding on for the share of the sampling steps whose noise was taught "
        "(τ = 0.3; at τ = 1, in checkpoints/README.md, the difference is within noise). That tokenizer had been taught "
        "together with gatedSA, which may favour it; the rows behind *gatedCA's tokenizer* begin with the one that the "
        "first run of gatedCA ended with. In the paper gated self-attention (`gatedSA`) keeps to boxes better than "
        "gated cross-attention (`gatedCA`).",
        verdict=_two_rows("gatedSA", "gatedCA"),
    ),
    Claim(
        name="pairs",
        title="Seen and held-out pairs",
        text="Eight pairs of colour and shape are left out of the scenes that teach grounding; only the base model has "
        "seen them. The paper: grounding carries over to things it was never taught.",
        verdict=_pairs,
    ),
    Claim(
        name="caption",
        title="Null caption",
        text="Boxes with their phrases, with the caption and with the empty one: the boxes alone have to be enough.",
        verdict=_two_rows("null caption", "caption", is_tie_enough=True),
    ),
    Claim(
        name="tau",
        title="Scheduled sampling",
        text="Grounding is on for the first share τ of the sampling steps and off for the rest. The paper: better "
        "images at little cost in grounding.",
        verdict=_tau,
        order="tau",
    ),
    Claim(
        name="captions-kind",
        title="Captions of detection data",
        text="Trained with full sentences (`full`) and with class names strung together (`detection`). In the paper "
        "detection data alone, under the null caption, does better than with captions beside it (FID 5.61 against "
        "5.82, AP 24.0 against 21.7). The rows of three seeds are of three runs each of 8,000 scenes, all from one "
        "adapter, and asked under the null caption too.",
        verdict=_two_rows("detection", "full"),
    ),
    Claim(
        name="binding",
        title="Attribute binding",
        text="Sets of requests alike but for the colours, which two or three objects of different shapes exchange, "
        "measured as COCO-MIG does: an instance is right at IoU ≥ 0.5 in its colour and shape. Not in the paper.",
        verdict=_binding,
    ),
    Claim(
        name="steps",
        title="Over training",
        text="The same requests after more and more training steps.",
        verdict=_steps,
        order="training_steps",
    ),
    Claim(
        name="other-modes",
        title="Other modes",
        text="Adapters for grounding other than boxes with phrases. What inpainting keeps is put back after decoding, "
        "so that it has to be 0 levels off.",
        verdict=_other_modes,
    ),
    Claim(
        name="forgetting",
        title="Nothing is forgotten",
        text="With the gates closed (β = 0) the taught model has to be the base model, to the bit. The latents of one "
        "batch are compared.",
        verdict=_forgetting,
    ),
)


def _points(a: Measure, b: Measure) -> str:
    return f"{100 * (a.value - b.value):+.1f} points"


def _value(row: Row, *path: str) -> float:
    found = row.measure(*path)
    assert found is not None
    return found.value


def _spread(row: Row, *path: str) -> float | None:
    found = row.measure(*path)
    return None if found is None else found.spread


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
