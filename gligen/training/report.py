"""What a training run learnt, as one picture: losses, grounding accuracy, gates, and previews before and after.

    python -m gligen.training.report runs/a

Reads log.jsonl, config.json and previews/ of the run's folder, also while it still runs, and writes RUN/report.png.
Needs matplotlib: pip install gligen[results].
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gligen import cli
from gligen.plots import BLUE, GREEN, INK, draw_lines, draw_losses, draw_ratio, read_log, save_figure, series
from gligen.training.presets import PRESETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, PANELS = 16.0, 3.75  # inches, of the picture and of its upper row
LOG, CONFIG, PREVIEWS = "log.jsonl", "config.json", "previews"  # as engine/checkpoint.py, which imports torch


def build_parser() -> cli.Parser:
    parser = cli.Parser("python -m gligen.training.report", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run: train.py's --out")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="picture to write (default: RUN/report.png)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    print(write_report(args.run, args.out or args.run / "report.png"))


def write_report(run: Path, out: Path) -> Path:
    """Draws the run in folder `run` as a PNG, and returns its path.

    Raises FileNotFoundError for a folder without a log, ValueError for a log without a line that can be read, or
    where matplotlib is missing.
    """
    if not (run / LOG).exists():
        raise FileNotFoundError(f"'{run}' has no {LOG}: give the folder that train.py was given as --out")
    lines = read_log(run / LOG)
    title = describe(run, lines)
    sheets = before_and_after(run / PREVIEWS, lines)
    below = max((_height(path) for _, path in sheets), default=0.0)
    has_found = bool(series(lines, "preview", "found")[0])  # which only the drawn world's previews tell

    def draw(figure: Figure) -> None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
        grid = figure.add_gridspec(2 if sheets else 1, 1, height_ratios=(PANELS, below) if sheets else (1,))
        panels = grid[0].subgridspec(1, 4)
        for i, panel in enumerate((draw_losses, draw_ratio, draw_found if has_found else draw_training, draw_gates)):
            panel(figure.add_subplot(panels[i]), lines)
        if sheets:
            places = grid[1].subgridspec(1, 2)
            for i, (heading, path) in enumerate(sheets):
                _show(figure.add_subplot(places[i]), heading, path)

    return save_figure(out, WIDTH, PANELS + below if sheets else 4.2, draw)


def describe(run: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    """The title: preset, steps done, samples a step; what can be known where config.json is absent or broken."""
    last = lines[-1]["step"]
    try:
        config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        name, batch, wanted = preset_name(config), config["samples_per_step"], config["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{run.name}: {last:,} steps"
    steps = f"{last:,} steps" if last >= wanted else f"{last:,} of {wanted:,} steps"
    return f"{name} – {steps}, batch of {batch}"


def preset_name(config: Mapping[str, Any]) -> str:
    """The preset with these values, where a run begins and what a resumed one may change aside; else mode and fuser."""
    for name, preset in PRESETS.items():
        fields = dataclasses.fields(preset)
        fixed = {field.name for field in fields if not field.metadata["is_free"]} - {
            "adapter", "dtype", "seed", "batch_size",
        }  # fmt: skip
        plain = json.loads(json.dumps(dataclasses.asdict(preset)))
        if all(config.get(field) == plain[field] for field in fixed):
            return name
    return f"{config['mode']}, {config['fuser_type']}"


def before_and_after(folder: Path, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Path]]:
    """Headings and paths of the first and the last preview sheet, or of the only one.

    Sheets that the log names, where it names any: others lie there from an earlier run.
    """
    named = {line["step"] for line in lines if "preview" in line}
    sheets = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
    steps = sorted(step for step in sheets if step in named or not named)
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    before = (f"Before: step {first:,}" if first == 0 else f"First preview: step {first:,}", sheets[first])
    after = (f"After: step {last:,}", sheets[last])
    return [before] if first == last else [before, after]


def draw_found(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Shares of the previews' asked objects."""
    axes.set(title="Asked objects in place (previews)", xlabel="step", ylabel="share of asked objects, IoU ≥ 0.5")
    draw_lines(
        axes,
        [
            ("right colour", BLUE, series(lines, "preview", "found")),
            ("right colour and shape", GREEN, series(lines, "preview", "found_with_shape")),
        ],
        "no previews in the log",
    )
    axes.set_ylim(-0.02, 1.02)


def draw_training(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """The loss that is minimised, the mean over the steps since the line before."""
    axes.set(title="Training loss", xlabel="step", ylabel="mean squared error of ε, all timesteps")
    draw_lines(
        axes, [("", BLUE, series(lines, "loss"))], "no losses in the log yet:\none comes every --log-every steps"
    )


def draw_gates(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draws how far the fusers' gates are open."""
    axes.set(title="Gates", xlabel="step", ylabel="|tanh α|")
    if not any("gates" in line for line in lines):  # a run shorter than --log-every: what its diagnoses saw
        seen = [
            (line["step"], [gate for pair in line["fusers"].values() for gate in pair])
            for line in lines
            if "fusers" in line
        ]
        lines = [{"step": step, "gates": {"max": max(all_), "mean": sum(all_) / len(all_)}} for step, all_ in seen]
    draw_lines(
        axes,
        [("largest", BLUE, series(lines, "gates", "max")), ("mean", GREEN, series(lines, "gates", "mean"))],
        "no gates in the log",
    )
    axes.set_ylim(bottom=0)


def _height(path: Path) -> float:
    """Inches that a sheet takes with its heading, half as wide as the picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return 0.25 + WIDTH / 2 * image.height / image.width
    except OSError:  # being written
        return 0.25 + WIDTH / 2


def _show(axes: Axes, heading: str, path: Path) -> None:
    import numpy as np
    from PIL import Image

    axes.set_title(heading)
    axes.axis("off")
    try:
        with Image.open(path) as image:
            axes.imshow(np.asarray(image.convert("RGB")), interpolation="lanczos")
    except OSError:  # being written
        axes.text(0.5, 0.5, f"{path.name} cannot be read", ha="center", transform=axes.transAxes)


if __name__ == "__main__":
    sys.exit(cli.run(main))
