"""One HTML page of an evaluation: metrics, the published ones beside them, and a contact sheet. Opens offline.

Everything is in the file: thumbnails as data, boxes as SVG over them, no script. The whole images lie beside it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gligen.evaluation.coco import AskedImage
from gligen.images import BICUBIC, COCO_LIMBS, COLORS
from gligen.request import Request

THUMBNAIL = 256  # pixels of the longer side at most
SHOWN_SCORE, SHOWN_DETECTIONS = 0.3, 20  # detections drawn: the surest of an image

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .6em 0 1.4em; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; }
th { text-align: left; font-weight: 600; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td { font-weight: 600; background: #f3f7ff; } .why { color: #666; }
.sheet { display: flex; flex-wrap: wrap; gap: 14px; } figure { margin: 0; width: 256px; }
.pair { width: 518px; } .images { display: flex; gap: 6px; align-items: flex-start; }
.frame { position: relative; width: 256px; }
.frame img { width: 100%; display: block; image-rendering: auto; }
svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
svg text { font: 600 11px system-ui, sans-serif; paint-order: stroke; stroke: #000; stroke-width: 3px; fill: #fff; }
figcaption { font-size: 12px; color: #444; overflow-wrap: anywhere; }
#asked:not(:checked) ~ .sheet .asked, #found:not(:checked) ~ .sheet .found { display: none; }
"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image of the contact sheet. beside: what it was asked with or is compared to; detections: COCO results."""

    image: AskedImage
    pixels: NDArray[np.uint8]  # (H, W, 3)
    beside: NDArray[np.uint8] | None = None
    detections: Sequence[Mapping[str, Any]] = ()


def build_page(report: Mapping[str, Any], cells: Iterable[Cell], names: Mapping[Any, str], total: int) -> str:
    """The page. report: as report.json holds it; names: category_id -> class; total: images there are."""
    sheet = [_cell(cell, names) for cell in cells]
    shown = f"{len(sheet)} of {total} images" if len(sheet) < total else f"{total} images"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{html.escape(report["title"])}</title><style>{STYLE}</style>',
        f"<h1>{html.escape(report['title'])}</h1>",
        _about(report),
        "<h2>Metrics</h2>",
        _metrics(report["figures"]),
        _not_measured(report["not_measured"]),
        _protocol(report.get("protocol"), report["summary"]),
        f"<h2>{shown}</h2>",
        '<input type="checkbox" id="asked" checked><label for="asked">asked</label> ',
        '<input type="checkbox" id="found" checked><label for="found">detected (dashed)</label>',
        f'<div class="sheet">{"".join(sheet)}</div></html>',
    ]
    return "\n".join(part for part in parts if part) + "\n"


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flattens nested metrics into (name, metric); a metric with a spread stays together."""
    flat: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        path = f"{prefix} {name}".strip()
        is_group = isinstance(value, Mapping) and "spread" not in value
        flat += flat_metrics(value, path) if is_group else [(path, value)]
    return flat


def shown_metric(metric: Any) -> str:
    """A metric for people: three decimals, its spread, '–' for none."""
    if isinstance(metric, Mapping):
        value, spread = metric["value"], metric["spread"]
        return shown_metric(value) if value is None or spread is None else f"{value:.3f} ± {spread:.3f}"
    if metric is None:
        return "–"
    return f"{metric:.3f}" if isinstance(metric, float) else str(metric)


def _about(report: Mapping[str, Any]) -> str:
    rows = [("model", report["run"]["model"]["name"]), ("asked", report["asked"]), ("device", report["device"])]
    settings = {name: value for name, value in report["run"]["settings"].items() if name != "content"}
    rows += [(name, value) for name, value in settings.items() if value not in (None, {}, False)]
    rows += [("left out", f"{count} × {reason}") for reason, count in report["left_out"].items()]
    return _table([[name, str(value)] for name, value in rows])


def _metrics(metrics: Mapping[str, Any]) -> str:
    return _table([[name, shown_metric(value)] for name, value in flat_metrics(metrics)], is_number=True)


def _not_measured(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="why">{html.escape(reason)}</td></tr>'
        for name, reason in reasons.items()
    )
    return f"<h2>Not measured</h2><table>{rows}</table>"


def _protocol(protocol: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> str:
    if protocol is None:
        return ""
    columns = list(dict.fromkeys(name for row in protocol["published"].values() for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    rows = [("this run", summary, "ours"), *((name, row, "") for name, row in protocol["published"].items())]
    body = "".join(
        f'<tr class="{kind}"><td>{html.escape(name)}</td>'
        + "".join(f'<td class="n">{shown_metric(row.get(column))}</td>' for column in columns)
        + "</tr>"
        for name, row, kind in rows
    )
    text = html.escape(f"{protocol['about']}. Measured there with: {protocol['needs']}.")
    return f"<h2>Published beside it</h2><p>{text}</p><table><tr>{head}</tr>{body}</table>"


def _table(rows: Sequence[Sequence[str]], is_number: bool = False) -> str:
    kind = ' class="n"' if is_number else ""
    lines = "".join(f"<tr><th>{html.escape(a)}</th><td{kind}>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{lines}</table>"


def _cell(cell: Cell, names: Mapping[Any, str]) -> str:
    image = cell.image
    W, H = image.size
    lines = [_asked_shapes(image.request, image.size)]
    surest = sorted((d for d in cell.detections if d["score"] >= SHOWN_SCORE), key=lambda d: -d["score"])
    for result in surest[:SHOWN_DETECTIONS]:
        if "bbox" in result:
            x, y, w, h = result["bbox"]
            label = f"{names.get(result['category_id'], '?')} {result['score']:.2f}"
            lines.append(
                f'<g class="found"><rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" '
                f'stroke="#fff" stroke-width="1.5" stroke-dasharray="5 3" vector-effect="non-scaling-stroke">'
                f"<title>{html.escape(label)}</title></rect></g>"
            )
    overlay = f'<svg viewBox="0 0 {W} {H}" preserveAspectRatio="none">{"".join(lines)}</svg>'
    href = html.escape(image.file_name)
    frames = f'<a class="frame" href="{href}"><img src="{_data(cell.pixels)}" alt="image {image.number}">{overlay}</a>'
    if cell.beside is not None:
        frames = f'<div class="frame"><img src="{_data(cell.beside)}" alt="asked with"></div>{frames}'
    wide = ' class="pair"' if cell.beside is not None else ""
    caption = html.escape(" · ".join(filter(None, (f"{image.number:06d}", image.key, image.request.prompt))))
    return f'<figure{wide}><div class="images">{frames}</div><figcaption>{caption}</figcaption></figure>\n'


def _asked_shapes(request: Request, size: tuple[int, int]) -> str:
    W, H = size
    shapes = []
    thick = 'stroke-width="2" vector-effect="non-scaling-stroke"'
    for i, entity in enumerate(request.entities):
        x0, y0, x1, y1 = entity.box
        if x0 < x1:  # else a style reference, which has no place
            color = COLORS[i % len(COLORS)]
            text = html.escape(entity.phrase or "(image)")
            scale = max(W, H) / THUMBNAIL
            shapes.append(
                f'<rect x="{x0 * W:.1f}" y="{y0 * H:.1f}" width="{(x1 - x0) * W:.1f}" height="{(y1 - y0) * H:.1f}" '
                f'fill="none" stroke="{color}" {thick}/>'
                f'<text transform="translate({x0 * W:.1f} {y0 * H:.1f}) scale({scale:.3f})" x="3" y="12">{text}</text>'
            )
    for i, person in enumerate(request.keypoints):
        color = COLORS[i % len(COLORS)]
        for a, b in COCO_LIMBS:
            if (start := person[a]) and (end := person[b]):
                shapes.append(
                    f'<line x1="{start[0] * W:.1f}" y1="{start[1] * H:.1f}" x2="{end[0] * W:.1f}" '
                    f'y2="{end[1] * H:.1f}" stroke="{color}" {thick}/>'
                )
    return f'<g class="asked">{"".join(shapes)}</g>'


def _data(pixels: NDArray[np.uint8]) -> str:
    """A thumbnail as a data URI: JPEG, or PNG where it is small enough to be kept exact."""
    image = Image.fromarray(pixels).convert("RGB")
    scale = THUMBNAIL / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), BICUBIC)
    content = io.BytesIO()
    kind = "JPEG" if scale < 1 else "PNG"
    image.save(content, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
