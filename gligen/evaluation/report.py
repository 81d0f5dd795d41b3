"""What an evaluation leaves: DIR/report.json, DIR/sheet.png and a table to read at once."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gligen.data.maps import MAPS, SHAPE_LABELS
from gligen.data.scenes import reference_image
from gligen.evaluation.page import flat_metrics, shown_metric
from gligen.evaluation.run import Evaluation, GeneratedImage
from gligen.files import write_atomically
from gligen.grounding import draw_request
from gligen.image_files import image_bytes
from gligen.images import NEAREST, grid
from gligen.modes import Mode, get_mode

log = logging.getLogger("gligen")

REPORT, SHEET = "report.json", "sheet.png"
LARGE = 256  # pixels a side on the sheet, at least, so that labels can be read
GROUPS = {"all": "all", "seen": "seen pairs", "held_out": "held-out pairs"}
COLUMNS = {"found": "found", "found_with_shape": "and shape", "mean_iou": "mean IoU", "ap50": "AP50"}


def check_folder(out: str | Path, origin: Mapping[str, Any]) -> None:
    """Makes the folder of a report. A report of the same origin (settings, model) may be there, and will be replaced.

    origin: plain data; a report holds it. Raises ValueError, one line, for another report, for a sheet without one, or
    where nothing can be written.
    """
    out = make_writable(out)
    path = out / REPORT
    if not path.exists():
        if (out / SHEET).exists():
            raise ValueError(f"'{out / SHEET}' exists without a report: choose another --out, nothing is overwritten")
        return
    check_origin(path, origin)
    log.info("'%s' has the same settings: it is measured anew and replaced", path)


def make_writable(out: str | Path) -> Path:
    """Makes a folder and sees whether files can be written there. Raises ValueError, one line, if not."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out '{out}' cannot be written: {error.strerror}") from None
    return out


def check_origin(path: Path, origin: Mapping[str, Any]) -> None:
    """Raises ValueError, one line, unless the report or run that the file holds has this origin."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [_named(name, before[name], value) for name, value in _plain(origin).items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"'{path}' exists and is no report: choose another --out, nothing is overwritten") from None
    if others := [text for texts in differing for text in texts]:
        raise ValueError(f"'{path}' exists, with {', '.join(others[:3])}: choose another --out, nothing is overwritten")


def write_report(out: str | Path, evaluation: Evaluation, about: Mapping[str, Any], sheet: int) -> list[Path]:
    """Writes report.json (`about`, then the metrics) and, of the first `sheet` images, sheet.png. Returns paths."""
    out = Path(out)
    written = []
    if sheet:
        image = make_sheet(evaluation.images[:sheet], get_mode(evaluation.mode))
        written.append(write_atomically(out / SHEET, image_bytes(image, ".png")))
    report = {**about, "figures": evaluation.metrics}
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return [write_atomically(out / REPORT, text.encode()), *written]


def make_sheet(images: Sequence[GeneratedImage], mode: Mode) -> Image.Image:
    """The images with what was asked drawn on them; modes that ask with images show those to the left."""
    cells = []
    for image in images:
        generated = draw_request(_large(image.pixels), image.request)
        asked_with = _asked_with(image, mode)
        cells.append(grid([asked_with, generated], columns=2) if asked_with else generated)
    return grid(cells)


def table(evaluation: Evaluation) -> str:
    """The metrics for people: a row per group of objects, a line for each other metric."""
    lines = []
    metrics = evaluation.metrics
    reports = [name for name in ("objects", "by_phrase", "by_picture") if name in metrics]
    if reports:
        lines.append(" " * 28 + "".join(f"{title:>16}" for title in ("objects", *COLUMNS.values())))
    for name in reports:
        for group, title in GROUPS.items():
            if (row := metrics[name][group]) is not None:
                label = title if name == "objects" else f"{name.replace('_', ' ')}, {title}"
                cells = [str(row["objects"]), *(shown_metric(row[column]) for column in COLUMNS)]
                lines.append(f"{label:<28}" + "".join(f"{cell:>16}" for cell in cells))
    if reports:
        lines.append(f"{'spare objects an image':<28}{shown_metric(metrics['objects']['spare'])}")
    rest = {name: value for name, value in metrics.items() if name not in reports}
    lines += [f"{name:<28}{shown_metric(value)}" for name, value in flat_metrics(rest)]
    return "\n".join(lines)


def _large(pixels: NDArray[np.uint8]) -> Image.Image:
    """An image (H, W, 3) or map (H, W), at least LARGE pixels a side and its pixels still to be seen."""
    image = Image.fromarray(pixels).convert("RGB")
    return image.resize((LARGE, LARGE), NEAREST) if image.width < LARGE else image


def _asked_with(generated: GeneratedImage, mode: Mode) -> Image.Image | None:
    """The map, the scene to be inpainted, and reference images in their boxes; None where words were enough."""
    scene, request = generated.scene, generated.request
    if draw_map := MAPS.get(mode.name):
        levels = draw_map(scene, None)
        return _large(levels * np.uint8(255 // len(SHAPE_LABELS)) if mode.has_labels else levels)
    if not (mode.is_inpainting or mode.takes_images):
        return None
    image = _large(scene.image) if mode.is_inpainting else Image.new("RGB", (max(LARGE, scene.size),) * 2, "white")
    for item, entity in zip(generated.asked, request.entities, strict=True):
        corners = [round(edge * image.width) for edge in entity.box]
        size = (corners[2] - corners[0], corners[3] - corners[1])
        if entity.image is not None:
            reference = Image.fromarray(reference_image(scene, scene.objects.index(item)))
            image.paste(reference.resize(size), (corners[0], corners[1]))
        elif mode.is_inpainting:
            image.paste("white", (corners[0], corners[1], corners[2], corners[3]))
    return draw_request(image, request)


def _named(name: str, before: Any, now: Any) -> list[str]:
    """What differs, by name, as it was before."""
    if isinstance(now, Mapping) and "fingerprint" in now and isinstance(before, Mapping) and before != now:
        return [f"{name} {before.get('file')}" + " of other content" * (before.get("file") == now["file"])]
    if isinstance(now, Mapping):
        return [text for key, value in now.items() for text in _named(key, before.get(key), value)]
    return [f"{name} {before}"] if before != now else []


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))
