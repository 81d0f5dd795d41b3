"""The page of figures, docs/performance.md, from the committed rows; a chart too where matplotlib is installed.

python -m benchmarks.render [--rows benchmarks/rows] [--out docs]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "rows"

Row = dict[str, Any]
COMMANDS = """```sh
python -m benchmarks.attention --device cuda --batch-size 16
python -m benchmarks.sample --device cuda --batch-size 8 --steps 50 --schedule 1 0 0
python -m benchmarks.sample --device cuda --batch-size 8 --steps 50
python -m benchmarks.sample --device cuda --batch-size 1 --steps 50
python -m benchmarks.train --device cuda --batch-size 16
python -m benchmarks.render
```"""


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
            number(row["peak_gib"], "{:.2f}"),
            number(row.get("difference"), "{:.0e}"),
            number(row["warm_up_seconds"]),
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


def page(folder: Path, chart: str | None) -> str:
    sample, train, attention = (read(folder / f"{name}.jsonl") for name in ("sample", "train", "attention"))
    has_gpu = any(not row["device"].startswith("CPU") for row in (*sample, *train, *attention))
    no_gpu = (
        "**No GPU figure exists yet**: no GPU was at hand. The CUDA path (bfloat16, graphs, compiled blocks, memory "
        "limits) is written and its tests wait behind `pytest -m cuda`, but it has not been run."
    )
    parts = [
        "# Performance",
        "Written by `make bench` (`python -m benchmarks.render`) from the rows in `benchmarks/rows`; do not edit.",
        "" if has_gpu else no_gpu,
        f"On a machine with a GPU these commands make the rows, to be committed:\n\n{COMMANDS}",
        "The floor is the arithmetic of the networks (2 for a multiplication and addition, no padding) at the speed of "
        "a large matrix product measured in the same run; `gligen/runtime.py` has every switch. On a CPU with one "
        "thread the figures are processor seconds of the process, which other programs on the machine change less than "
        "the clock on the wall; a few percent still mean nothing.",
        "## Painting",
        *([f"![Seconds an image after each speed-up]({chart})"] if chart else []),
        *map(sample_part, latest(sample, "steps", "schedule")),
        "## Training",
        "Left out of the floor is the encoding of pictures and captions, which can be cached (`--cache`).",
        *map(train_part, latest(train)),
        "## Attention",
        *map(attention_part, latest(attention, "dtype")),
        "## Decided without figures",
        "- CUDA graphs are recorded for the whole step (`gligen/step_graphs.py`), not block by block by "
        "torch.compile's `reduce-overhead`: one launch a step, and what is not compiled is in it too.\n"
        "- Compiled blocks are the UNet's residual blocks and transformers and the decoder's residual blocks, whole; "
        "only the batch is dynamic. A test counts that nothing is compiled again for other prompts, β, steps, numbers "
        "of entities and batches.\n"
        "- Tiled decoding is for low memory and large pictures only, since GroupNorm then sees tiles.\n"
        "- Padding in the grounding is not collapsed into one token, though `attention` can weigh a key as n equal "
        "ones (`extra_bias`): for 4 of 30 boxes at SD's size it would save 0.10 % of a UNet evaluation's arithmetic, "
        "and shapes would then depend on the number of entities, at the price of compiling and recording for each.\n"
        "- Gate and residual are not in the attention kernel's epilogue: the output projection lies between, and "
        "Inductor puts them into one kernel behind it. What is left to gain is their memory traffic, 0.14 GB an "
        "evaluation at SD's size, 2 % of the time at an H200's ceilings; of LayerNorm before the QKV product a third "
        "of that.\n"
        "- 8 bits (`--quantize`, torchao) are for the transformers' linear layers alone and off by default: they are "
        "the one step that is not exact, and on a CPU a slower one. Their rungs stand in the table above where torchao "
        "is installed, with their error.\n"
        "- flash-attn-4 is no backend: torch can put it under SDPA, which `benchmarks/attention.py` measures where it "
        "is installed, but no GPU was at hand to see whether it gains anything.",
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
