"""The common part of all figures: logs read line by line, matplotlib when it is needed, one look, panels of any run.

matplotlib is an extra, imported by `new_figure` and nowhere else. Figures use Agg and no global state, and their files
hold no date and no version, so that the same data gives the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]  # steps and values

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#333333"
FLAT = 0.01  # of a value: a smaller range of losses is not drawn as large as the panel
STYLE: Any = {  # matplotlib's rc parameters
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines log in the order of their steps; those cut off by a kill are left out.

    Raises ValueError if no line can be read.
    """
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    if not lines:
        raise ValueError(f'\'{path}\' holds no metrics yet: lines like {{"step": 50, "loss": …}} are expected')
    return sorted(lines, key=lambda line: line["step"])


def series(lines: Sequence[Mapping[str, Any]], *names: str) -> Series:
    """Steps and values of the lines that have metric `names[0]`, or `names[1]` within it, and so on.

    Of a step that comes twice the last line counts.
    """
    found: dict[int, float] = {}
    for line in lines:
        value: Any = line
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            found[line["step"]] = float(value)
    return list(found), list(found.values())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches. Raises ValueError, one line, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ValueError("drawing figures needs matplotlib: pip install gligen[results]") from None
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # logs its font list otherwise
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.03, hspace=0.03))


def save_figure(path: Path, width: float, height: float, draw: Callable[[Figure], None], dpi: int = 110) -> Path:
    """Draws in the common look and writes a PNG; returns its path."""
    figure = new_figure(width, height)
    from matplotlib import rc_context

    with rc_context(STYLE):
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
    return path


def draw_losses(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Losses on held-out samples at high noise, with four groundings."""
    axes.set(title="Held-out loss at high noise", xlabel="step", ylabel="mean squared error of ε")
    draw_lines(
        axes,
        [
            ("another sample's", ORANGE, series(lines, "diagnosis", "shuffled")),
            ("its own, moved", GREEN, series(lines, "diagnosis", "moved")),
            ("none", GREY, series(lines, "diagnosis", "null")),
            ("the right one", BLUE, series(lines, "diagnosis", "right")),
        ],
        "no diagnoses in the log",
        legend="grounding",
    )
    low, high = axes.get_ylim()
    if high - low < FLAT * high:  # losses that differ by rounding alone are no curve
        axes.set_ylim((1 - FLAT) * low, (1 + FLAT) * high)


def draw_ratio(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Right over wrong grounding: another's shows whether it is read at all, moved whether places count."""
    axes.set(title="Right over wrong grounding (1: nothing learnt)", xlabel="step", ylabel="ratio of the losses")
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    draw_lines(
        axes,
        [
            ("another sample's", ORANGE, series(lines, "diagnosis", "right_over_shuffled")),
            ("its own, moved", GREEN, series(lines, "diagnosis", "right_over_moved")),
        ],
        "no diagnoses in the log",
        legend="wrong grounding",
    )


def draw_lines(
    axes: Axes, curves: Sequence[tuple[str, str, Series]], missing: str = "no data", *, legend: str | None = None
) -> None:
    """Curves of (label, colour, series); `missing` is written where there are none. Few points are marked.

    legend: what the labels are, above them.
    """
    drawn = [curve for curve in curves if curve[2][0]]
    for label, color, (steps, values) in drawn:
        axes.plot(steps, values, color=color, label=label or None, marker="o" if len(steps) <= 12 else None)
    if not drawn:
        axes.text(0.5, 0.5, missing, transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)  # steps
    if any(label for label, _, _ in drawn):
        axes.legend(loc="best", fontsize=8, title=legend, title_fontsize=8, alignment="left")
