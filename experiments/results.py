"""The page of results, docs/results.md and its figures, made of the data in docs/results/data.

    python -m experiments.results
    python -m experiments.results --add grounded "not grounded" runs/a/ungrounded/report.json

The second files a report of evaluate.py as a row of a table (experiments/claims.py has their names) first, or several,
alike but for their seed or the weights' training, as one row of their means. Reads
*.json (an evaluation each: table, row, settings, figures), *.jsonl (logs: base-clip, base-vae, base-unet, and an
adapter's each under its own name) and the sheets in docs/results/sheets. The same data give the same page.
Needs matplotlib: pip install gligen[results].
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import CLAIMS, Claim, Row
from gligen import cli
from gligen.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    draw_lines,
    draw_losses,
    draw_ratio,
    new_figure,
    read_log,
    save_figure,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = list[dict[str, Any]]
UNET_METRICS = (("eval_loss", "all timesteps"), ("eval_high", "timesteps 400 and above"))
STAGES = {  # of the base: what it is, and its metrics on held-out scenes
    "base-clip": ("CLIP", (("object_top1", "right phrase of 64"), ("swap", "right of two captions"))),
    "base-vae": ("Autoencoder", (("psnr", "PSNR, dB"),)),
    "base-unet": ("UNet", UNET_METRICS),
    "base-unet-wide": ("UNet, widened", UNET_METRICS),
    "base-unet-upright": ("UNet, upright world", UNET_METRICS),
}
INTRODUCTION = """\
# Results of the miniature

<!-- made by `python -m experiments.results` from docs/results/data: edit the data or that file, not this one -->

The paper's experiments, in miniature. The base is a small latent diffusion model of our own in Stable Diffusion's
layout ([`gligen/miniature`](../gligen/miniature)): CLIP, autoencoder and UNet, taught on drawn scenes of 64 × 64 pixels
with one to four coloured shapes, or people. It is then frozen and taught grounding by [`train.py`](../train.py), as the
paper does with Stable Diffusion. Nothing here says how the published models fare on photographs.

## How it is measured

Requests are scenes drawn for testing only. A detector that knows the drawn world's colours and shapes
([`gligen/evaluation/detector.py`](../gligen/evaluation/detector.py)) looks for every asked object in the image:

- **found**: share of asked objects in their colour at IoU ≥ 0.5 with their box; **with shape**: and in their shape
- **mean IoU**: with the object's partner in its colour, 0 where there is none; **AP50**: COCO's, a class being a pair
  of colour and shape
- **FID**: Fréchet distance to drawn scenes in the embeddings of the miniature's own CLIP, lower is better; its floor is
  what drawn scenes themselves get

Rows of the *turned world* are of the miniature before the one that is here: its objects were turned by any angle, those
of this one by 20° at most. The requests are drawn from the same seeds, but are not the same images.

± is the standard deviation over resampled sets of the images (500; fewer for keypoints, maps and FID); where there is
one seed it does not cover training again with another. Rows of several seeds, of the requests and the noise or of the
training, as the row says, are means, and ± is the mean's standard error: s / √n, where s is the standard deviation over
the seeds, but never less than over resampled images, as three seeds may agree by chance. All metrics depend on sampler,
steps and guidance, so rows are to be compared within a table. The verdicts below are made from the numbers: a
difference counts if it is larger than twice its spread, √(a² + b²).
"""


COPIED = (
    "by_phrase",
    "by_picture",
    "kept",
    "silhouettes",
    "max_difference",
    "binding",
)  # of a report into a row as they are


@dataclass(frozen=True)
class Column:
    """A column of the tables: its heading, and a row's cell or None."""

    heading: str
    cell: Callable[[Row], str | None]


def build_parser() -> cli.Parser:
    parser = cli.Parser("python -m experiments.results", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), metavar="DIR", help="holds results/data; gets results.md (docs)"
    )
    parser.add_argument(
        "--add",
        nargs="+",
        metavar="TABLE ROW REPORT",
        help="file a report of evaluate.py as a row of a table first; several become one, of their means",
    )
    parser.add_argument("--training-steps", type=int, metavar="N", help="of the adapter that --add's report is of")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.add is not None:
        if len(args.add) < 3:
            raise ValueError("--add takes a table, a row, and a report or more")
        table, row, *reports = args.add
        print(add_row(args.docs, table, row, *map(Path, reports), training_steps=args.training_steps))
    print(write_results(args.docs))


def add_row(docs: Path, table: str, row: str, *reports: Path, training_steps: int | None = None) -> Path:
    """Files evaluate.py's reports as a row of a table, in place of one of that name, and returns where.

    Raises ValueError, one line, for a report that is none, that the table cannot take, or that is no repetition of the
    first with another seed.
    """
    claim = next((claim for claim in CLAIMS if claim.name == table), None)
    if claim is None:
        raise ValueError(f"table is {table!r}: the known ones are {', '.join(claim.name for claim in CLAIMS)}")
    settings, kept = _read_report(reports[0], table)
    if len(reports) > 1:
        others = [_read_report(report, table) for report in reports[1:]]
        for report, (other, _) in zip(reports[1:], others, strict=True):
            free = ("seed", "model")
            if differing := sorted(n for n in {*settings, *other} - {*free} if settings.get(n) != other.get(n)):
                raise ValueError(f"'{report}' differs from '{reports[0]}' in {differing[0]}, not in its seed alone")
        settings["seeds"] = [settings.pop("seed"), *(other["seed"] for other, _ in others)]
        settings["model"] = sorted({settings["model"], *(other["model"] for other, _ in others)})
        kept = mean_metrics([kept, *(metrics for _, metrics in others)])
    if training_steps is not None:
        settings["training_steps"] = training_steps
    if claim.order is not None and claim.order not in settings:
        raise ValueError(
            f"table {table} is sorted by {claim.order}, which '{reports[0]}' lacks: give --training-steps, or τ"
        )
    made = {"table": table, "row": row, "settings": settings, "figures": kept}
    name = "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in (table, row))
    path = docs / "results" / "data" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _read_report(report: Path, table: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and metrics of a report of evaluate.py, as a row keeps them."""
    try:
        data = json.loads(report.read_text(encoding="utf-8"))
        settings, metrics = dict(data["settings"]), data["figures"]
        full, decay, _ = settings["schedule"]
        fid = None if "binding" in metrics else metrics["fid"]
        kept = dict(metrics.get("objects") or metrics.get("joints") or {})
        model = data["model"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{report}' is no report of evaluate.py ({error})") from None
    if (table == "binding") != ("binding" in metrics):
        raise ValueError(
            f"table binding, and no other, takes what `evaluate.py binding` reports: not '{report}' for {table}"
        )
    settings |= {"seeds": 1, "model": model} | ({"tau": full} if not decay else {})
    if fid is not None:
        kept["fid"] = {**fid["pictures"], "floor": fid["floor"]["value"]}
    kept |= {name: metrics[name] for name in COPIED if name in metrics}
    if "labels" in metrics:
        kept["score"] = metrics["labels"]
    return settings, kept


def mean_metrics(runs: Sequence[Any]) -> Any:
    """Metrics of the same structure, one of each run, as their means; a spread becomes the mean's standard error.

    That is s / √n, s being the standard deviation over the runs or, if larger, the root mean square of their own
    spreads over resampled images. What a run lacks is absent.
    """
    first = runs[0]
    if isinstance(first, Mapping) and "spread" in first:
        values, spreads = [run["value"] for run in runs], [run["spread"] for run in runs]
        found = {"value": mean_metrics(values)}
        if any(value is None for value in (*values, *spreads)):
            return found
        own = math.sqrt(sum(spread**2 for spread in spreads) / len(runs))
        return {**found, "spread": max(own, statistics.stdev(values)) / math.sqrt(len(runs))} | {
            name: mean_metrics([run[name] for run in runs]) for name in first if name not in ("value", "spread")
        }
    if isinstance(first, Mapping):
        shared = [name for name in first if all(name in run for run in runs)]
        return {name: mean_metrics([run[name] for run in runs]) for name in shared}
    if any(run is None for run in runs):
        return None
    return sum(runs) / len(runs) if isinstance(first, (int, float)) else first


def write_results(docs: Path) -> Path:
    """Writes the page and its figures, and returns the page's path.

    Raises FileNotFoundError without a folder of data, ValueError, one line, for data that is not of its form.
    """
    folder = docs / "results"
    if not (folder / "data").is_dir():
        raise FileNotFoundError(
            f"'{folder / 'data'}' is not there: it holds the logs and evaluations to make a page of"
        )
    new_figure(1, 1)  # tells of a missing matplotlib before anything is written
    rows = read_rows(folder / "data")
    logs = {path.stem: read_log(path) for path in sorted((folder / "data").glob("*.jsonl"))}
    sheets = {path.stem: path for path in sorted((folder / "sheets").glob("*.png"))}
    sections, missing = [INTRODUCTION], []
    for claim in CLAIMS:
        own = rows_of(claim, rows)
        if own:
            sections.append(claim_section(claim, own, folder, sheets.pop(claim.name, None)))
        else:
            missing.append(claim.title)
    curves = curves_section(logs, folder)
    sections += [curves] if curves else []
    missing += [] if any(name in STAGES for name in logs) else ["Curves of the base's stages"]
    missing += [] if any(name not in STAGES for name in logs) else ["Curves of the adapters"]
    if sheets:
        sections.append("## Pictures\n\n" + "\n\n".join(_picture(_words(name), path) for name, path in sheets.items()))
    if missing:
        sections.append("## Not measured yet\n\n" + "".join(f"- {title}\n" for title in missing))
    page = docs / "results.md"
    page.write_text("\n".join(section.rstrip("\n") + "\n" for section in sections), encoding="utf-8")
    return page


def read_rows(folder: Path) -> list[Row]:
    """All evaluations, by file name. Raises ValueError naming the file and what is wrong with it."""
    known = [claim.name for claim in CLAIMS]
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{path}' is no JSON: {error}") from None
        for name, kind in {"table": str, "row": str, "settings": dict, "figures": dict}.items():
            if not isinstance(data, dict) or not isinstance(data.get(name), kind):
                raise ValueError(f"'{path}' has no {name}: give table, row (text), settings and figures (objects)")
        if data["table"] not in known:
            raise ValueError(f"'{path}': table is {data['table']!r}: the known ones are {', '.join(known)}")
        rows.append(Row(table=data["table"], label=data["row"], settings=data["settings"], metrics=data["figures"]))
    return rows


def rows_of(claim: Claim, rows: Sequence[Row]) -> list[Row]:
    """The claim's rows in their order. Pairs take those of 'grounded' too that have them under another label."""
    own = [row for row in rows if row.table == claim.name]
    if claim.name == "pairs":
        labels = {row.label for row in own}
        others = [row for row in rows if row.table == "grounded" and row.measure("held_out", "found")]
        own += [row for row in others if row.label not in labels]
    if claim.order is not None:
        name = claim.order
        if absent := [row.label for row in own if row.setting(name) is None]:
            raise ValueError(f"table {claim.name}, row {absent[0]!r}: settings has no {name}, give a number")
        own.sort(key=lambda row: row.setting(name) or 0.0)
    return own


def claim_section(claim: Claim, rows: Sequence[Row], folder: Path, sheet: Path | None) -> str:
    """Title, text, table, verdict, and the pictures that belong to it."""
    said = textwrap.fill(f"**{claim.verdict(rows)}**", 120)
    parts = [f"## {claim.title}", textwrap.fill(claim.text, 120), table(rows, columns_of(claim)), said]
    if claim.order is not None and len(rows) > 1:
        drawn = list({row.setting(claim.order): row for row in rows}.values())  # one a point: of two worlds the later
        width = 9 if any(row.measure("fid") for row in rows) else 4.5
        path = save_figure(folder / f"{claim.name}.png", width, 3.2, lambda figure: draw_sweep(figure, claim, drawn))
        parts.append(_picture(f"{claim.title}: metrics over {_words(claim.order)}", path))
    if sheet is not None:
        parts.append(_picture(f"{claim.title}: pictures", sheet))
    return "\n\n".join(parts) + "\n"


def columns_of(claim: Claim) -> list[Column]:
    if claim.name == "pairs":
        groups = {"seen": "seen", "held_out": "held out"}
        return [
            Column(f"{heading}, {what}", _share(group, name))
            for group, heading in groups.items()
            for name, what in {"found": "found", "found_with_shape": "with shape"}.items()
        ]
    if claim.name == "forgetting":
        return [Column("largest difference", lambda row: _format(row.measure("max_difference"), "{:.3g}"))]
    if claim.name == "binding":
        names = {"success": "as asked", "exchanged": "another one's colour there", "pictures": "all of an image right"}
        shares = [Column(heading, _share("binding", "all", name)) for name, heading in names.items()]
        return [*shares, Column("mean IoU", lambda row: _decimals(row, "binding", "all", "mean_iou"))]
    shared = [
        Column("found", _share("all", "found")),
        Column("with shape", _share("all", "found_with_shape")),
        Column("mean IoU", lambda row: _decimals(row, "all", "mean_iou")),
        Column("AP50", lambda row: _decimals(row, "all", "ap50")),
        Column("FID", _fid),
    ]
    if claim.name == "other-modes":
        shared += [
            Column("by reference image alone, found", _share("by_picture", "all", "found")),
            Column("limb ends near", _share("near")),
            Column("keypoints off, sides", lambda row: _decimals(row, "distance")),
            Column("mIoU of labels", lambda row: _decimals(row, "score")),
            Column("of silhouettes", lambda row: _decimals(row, "silhouettes")),
            Column("kept pixels off, of 255", lambda row: _format(row.measure("kept", "original", "max"), "{:.0f}")),
        ]
    return shared


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Markdown. Columns in which no row has anything are left out."""
    counts = [Column("sampler and steps, guidance", _sampling), Column("requests", _requests), Column("seeds", _seeds)]
    kept = [column for column in (*columns, *counts) if any(column.cell(row) for row in rows)]
    lines = [["", *(column.heading for column in kept)], ["---", *("---:" for _ in kept)]]
    lines += [[row.label.replace("|", "\\|"), *(column.cell(row) or "–" for column in kept)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def curves_section(logs: Mapping[str, Log], folder: Path) -> str | None:
    """A figure of the base's stages and one of each adapter; None without logs."""
    parts = ["## Curves"]
    stages = {name: logs[name] for name in STAGES if name in logs}
    if stages:
        path = save_figure(folder / "base.png", 4 * len(stages), 5.2, lambda figure: draw_stages(figure, stages))
        parts += ["The base's stages: loss, and metrics on held-out scenes.", _picture("Curves of the base", path)]
    for name, lines in sorted(logs.items()):
        if name not in STAGES:
            path = save_figure(folder / f"log-{name}.png", 9, 3.2, _adapter_drawing(lines))
            parts += [f"`{name}`, {lines[-1]['step']:,} steps:", _picture(f"Curves of {_words(name)}", path)]
    return "\n\n".join(parts) + "\n" if len(parts) > 1 else None


def draw_sweep(figure: Figure, claim: Claim, rows: Sequence[Row]) -> None:
    """Objects found, and FID where it was measured, over the setting that sorts the rows."""
    assert claim.order is not None
    label = {"tau": "τ, share of sampling steps with grounding", "training_steps": "training steps"}[claim.order]
    has_fid = any(row.measure("fid") for row in rows)
    panels = figure.subplots(1, 2 if has_fid else 1, squeeze=False)[0]
    _draw_measure(panels[0], claim.order, rows, ("all", "found"), BLUE, "right colour")
    _draw_measure(panels[0], claim.order, rows, ("all", "found_with_shape"), GREEN, "right colour and shape")
    panels[0].set(xlabel=label, ylabel="share of asked objects found", ylim=(-0.02, 1.02))
    panels[0].legend(loc="best", fontsize=8)
    if has_fid:
        _draw_measure(panels[1], claim.order, rows, ("fid",), ORANGE, "")
        floors = [floor.value for row in rows if (floor := row.measure("fid", "floor"))]
        if floors:
            panels[1].axhline(min(floors), color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            panels[1].text(
                1, min(floors), "floor", transform=panels[1].get_yaxis_transform(), color=GREY, ha="right", va="bottom"
            )
        panels[1].set(xlabel=label, ylabel="FID (lower is better)")
        panels[1].set_ylim(bottom=0)


def draw_stages(figure: Figure, stages: Mapping[str, Log]) -> None:
    """Above each stage's training loss, below its metrics on held-out scenes."""
    panels = figure.subplots(2, len(stages), squeeze=False)
    for i, (name, lines) in enumerate(stages.items()):
        title, metrics = STAGES[name]
        panels[0][i].set(title=title, ylabel="training loss" if i == 0 else "")
        draw_lines(panels[0][i], [("", GREY, series(lines, "loss"))])
        panels[1][i].set(xlabel="step", ylabel="held out" if i == 0 else "")
        curves = [
            (label, color, series(lines, key)) for (key, label), color in zip(metrics, (BLUE, GREEN), strict=False)
        ]
        draw_lines(panels[1][i], curves)


def _adapter_drawing(lines: Log) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        draw_losses(left, lines)
        draw_ratio(right, lines)

    return draw


def _draw_measure(axes: Axes, order: str, rows: Sequence[Row], path: Sequence[str], color: str, label: str) -> None:
    points = [(row.setting(order) or 0.0, found) for row in rows if (found := row.measure(*path))]
    if points:
        axes.errorbar(
            [x for x, _ in points],
            [found.value for _, found in points],
            yerr=[found.spread or 0.0 for _, found in points],
            color=color,
            ecolor=INK,
            elinewidth=0.8,
            capsize=2,
            marker="o",
            label=label or None,
        )


def _share(*path: str) -> Callable[[Row], str | None]:
    return lambda row: str(found) if (found := row.measure(*path)) else None


def _decimals(row: Row, *path: str) -> str | None:
    found = row.measure(*path)
    if found is None:
        return None
    return f"{found.value:.3f}" + (f" ± {found.spread:.3f}" if found.spread is not None else "")


def _format(found: Any, form: str) -> str | None:
    return None if found is None else form.format(found.value)


def _fid(row: Row) -> str | None:
    found, floor = row.measure("fid"), row.measure("fid", "floor")
    if found is None:
        return None
    return f"{found:.3g}" + (f" (floor {floor.value:.3g})" if floor else "")


def _sampling(row: Row) -> str | None:
    """Sampler, its steps and guidance."""
    names = "sampler", "steps", "guidance"
    if any(name not in row.settings for name in names):
        return None
    sampler, steps, guidance = (row.settings[name] for name in names)
    return f"{sampler} {steps}, {guidance:g}"


def _requests(row: Row) -> str | None:
    found = row.setting("requests")
    if found is None and (images := row.measure("images")):
        found = images.value
    return None if found is None else f"{found:,.0f}"


def _seeds(row: Row) -> str | None:
    seeds = row.settings.get("seeds")
    return str(len(seeds)) if isinstance(seeds, list) else None if seeds is None else str(seeds)


def _picture(text: str, path: Path) -> str:
    """A figure, whose folder results/ (or one in it) lies beside the page."""
    inner = path.parts[len(path.parts) - 1 - path.parts[::-1].index("results") :]
    return f"![{text}]({'/'.join(inner)})"


def _words(name: str) -> str:
    return name.replace("-", " ").replace("_", " ")


if __name__ == "__main__":
    sys.exit(cli.run(main))
