"""The page of measurements, docs/performance.md, from the committed rows; a chart too where matplotlib is installed.

python -m benchmarks.render [--rows benchmarks/rows] [--out docs]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.profile import CLASSES, by_class

ROWS = Path(__file__).parent / "rows"
NOTES = Path(__file__).parent / "notes"

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(rows: Iterable[Row], *same: str) -> list[list[Row]]:
    """The rows of the last run for each device, model, batch … (`same`), in order of first appearance."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        group = runs.setdefault(json.dumps([row.get(name) for name in ("device", "model", "batch", *same)]), [])
        if group and group[0]["run"] != row["run"]:
            group.clear()
        group.append(row)
    return list(runs.values())


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in made)


def number(value: float | None, form: str = "{:.3g}") -> str:
    return "–" if value is None else form.format(value)


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, "{:.0f} %")


def title(row: Row) -> str:
    top = row["ceiling"]
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row["threads"] else ""
    steps = f", {row['steps']} steps, schedule {' '.join(map(str, row['schedule']))}" if "steps" in row else ""
    return (
        f"**{row['device']}**{threads}, torch {row['torch']}: model `{row['model']}`, batch {row['batch']}{steps}. "
        f"Measured ceilings: {number(top['tflops'])} TFLOP/s, {number(top['gb_per_second'])} GB/s. ({row['run']})\n"
    )


def sample_part(rows: list[Row]) -> str:
    head = ["rung", "s/image", "faster", "share of floor", "peak GiB", "difference", "warm-up s"]
    lines = [
        [
            row["rung"],
            number(row["seconds_per_image"]),
            number(rows[0]["seconds_per_image"] / row["seconds_per_image"], "{:.2f}×"),
            percent(row["floor_share"]),
            number(row.get("peak_gib"), "{:.2f}"),
            number(row.get("difference"), "{:.0e}"),
            number(row.get("warm_up_seconds")),
        ]
        for row in rows
    ]
    return title(rows[0]) + "\n" + table(head, lines)


def train_part(rows: list[Row]) -> str:
    head = ["rung", "images/s", "CPU s/step", "share of floor", "peak GiB"]
    lines = [
        [
            row["rung"],
            number(row["images_per_second"]),
            number(row.get("cpu_seconds_per_step")),
            percent(row.get("floor_share")),
            number(row.get("peak_gib"), "{:.2f}"),
        ]
        for row in rows
    ]
    return title(rows[0]) + "\n" + table(head, lines)


def attention_part(rows: list[Row]) -> str:
    head = ["attention", "backend", "forward ms", "share", "backward ms", "share", "error"]
    lines = [
        [
            f"{row['kind']}, {row['queries']} × {row['keys']}, head dim {row['channels'] // row['heads']}",
            row["backend"],
            number(row["forward_ms"]),
            percent(row["forward_share"]),
            number(row.get("backward_ms")),
            percent(row.get("backward_share")),
            number(row["error"], "{:.0e}"),
        ]
        for row in rows
    ]
    return title(rows[0]) + "\n" + table(head, lines)


def data_part(rows: list[Row]) -> str:
    what = {row["what"]: row for row in rows}
    first = rows[0]
    lines = []
    if row := what.get("decoded from shards"):
        values = f"{number(row['per_second'])} / s a core, {percent(row['per_second'] / row['against'])} of PIL"
        lines.append([f"512² JPEGs of {number(row['kib'])} KiB, decoded, against PIL on the same files", values])
    if row := what.get("with stored latents"):
        lines.append(["words and latents of 512² pictures, stored", f"{row['per_second']:,.0f} / s a core"])
    if row := what.get("large index"):
        values = f"{number(row['start_seconds'])} s to the first example, {row['mib']:.0f} MiB more than before"
        lines.append([f"opening a set of {row['records'] / 1e6:.3g} million records", values])
    return f"**{first['device']}** ({first['run']})\n\n" + table(["what", "figures"], lines)


def processes_part(rows: list[Row]) -> str:
    base = rows[0]["seconds_per_step"]
    lines = [
        [row["how"], number(row["seconds_per_step"]), number(base / row["seconds_per_step"], "{:.2f}×")] for row in rows
    ]
    first = rows[0]
    about = (
        f"{first['processes']} processes with {first['threads']} thread each, {first['parameters']:,} trained numbers"
    )
    return f"**{first['device']}**, model `{first['model']}`, {about} ({first['run']})\n\n" + table(
        ["gradients", "s/step", "faster"], lines
    )


def note(name: str) -> str:
    """Returns what numbers do not say: prose of benchmarks/notes."""
    return (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()


def profile_part(folder: Path) -> str:
    """Milliseconds of every class of kernels, a column for each profile in the folder."""
    found = {path.stem: by_class(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.txt"))}
    lines = [[kind, *(number(times[kind], "{:.1f}") for times in found.values())] for kind in ("total", *CLASSES)]
    return table(["kernels, ms", *(f"`{name}`" for name in found)], lines) if found else ""


def page(folder: Path, chart: str | None) -> str:
    sample, train, attention = (read(folder / f"{name}.jsonl") for name in ("sample", "train", "attention"))
    data = read(folder / "data.jsonl")
    parts = [
        "# Performance",
        "Written by `make bench` and `make gpu` (`python -m benchmarks.render`) from the rows in `benchmarks/rows` and "
        "the prose in `benchmarks/notes`; do not edit.",
        note("gpu"),
        "The floor is the arithmetic of the networks (2 for a multiplication and addition, no padding) at the speed of "
        "a large matrix product measured in the same run; `gligen/runtime.py` has every switch. On a CPU with one "
        "thread the figures are processor seconds of the process, which other programs on the machine change less than "
        "the clock on the wall; a few percent still mean nothing.",
        "## Sampling",
        *([f"![Seconds an image after each speed-up]({chart})"] if chart else []),
        *map(sample_part, latest(sample, "steps", "schedule")),
        "## Training",
        "Left out of the floor is the encoding of images and captions, which can be cached (`--cache`).",
        *map(train_part, latest(train)),
        *map(processes_part, latest(read(folder / "processes.jsonl"))),
        "## Attention",
        *map(attention_part, latest(attention, "dtype")),
        "## Data",
        "Built sets (`python -m gligen.data build`) read by one core, rates in its processor seconds "
        "(`python -m benchmarks.data`). Machines may have been shared: the share of PIL, in the same run, means more "
        "than the rates.",
        *map(data_part, latest(data)),
        "## Where a GPU's time goes",
        "One run of 6 PLMS steps (7 guided evaluations) and the decoding, or one training step, on the H200; "
        "`-b8` is the batch. `blocks`: residual blocks and transformers compiled one by one; `stages`: whole "
        "entries of the UNet's lists and the whole decoder, with normalisation summed channel by channel (and, in "
        "this profile only, a GEGLU kernel in Triton, see below; GEGLU then holds its product too).",
        profile_part(folder / "profiles"),
        note("tried"),
        "## Decided without figures",
        note("decided"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(rows: list[Row], path: Path) -> bool:
    """Seconds an image of each rung of the last group, as bars; False without matplotlib or rows."""
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "gligen"  # the same picture from the same rows
    import matplotlib.pyplot as plt

    group = latest(rows, "steps", "schedule")[-1][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(group) + 1), layout="constrained")
    bars = axes.barh([row["rung"] for row in group], [row["seconds_per_image"] for row in group], color="#4477aa")
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_xlabel(f"seconds an image ({group[0]['device']}, model '{group[0]['model']}', batch {group[0]['batch']})")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs", metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chart = "performance.svg" if draw(read(args.rows / "sample.jsonl"), args.out / "performance.svg") else None
    (args.out / "performance.md").write_text(page(args.rows, chart), encoding="utf-8")
    print(args.out / "performance.md")


if __name__ == "__main__":
    main()
