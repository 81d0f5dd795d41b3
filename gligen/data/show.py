"""`python -m gligen.data show`: what a set of pictures was understood to be, in words and as a contact sheet."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gligen.data.example import Example, Map
from gligen.data.faults import FaultLog, Tolerant
from gligen.data.geometry import Buckets
from gligen.data.open import open_given
from gligen.data.order import Shuffled
from gligen.data.prepare import Prepared
from gligen.data.streams import Series
from gligen.files import write_atomically
from gligen.grounding import draw_request
from gligen.image_files import image_bytes
from gligen.images import fit, grid
from gligen.modes import get_mode
from gligen.request import Request


def main(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ValueError(f"--count is {args.count}: show at least one picture")
    source, findings = open_given(args)
    print("\n".join(findings.lines()))
    if args.out is None:
        return
    size: tuple[int, int] | Buckets = tuple(args.size)
    if args.buckets:
        size = Buckets(round((args.size[0] * args.size[1]) ** 0.5 / 64) * 64)
    series = Series.PREVIEW + args.seed
    prepared = Prepared(
        source=Shuffled(Tolerant(source, args.max_bad), series),
        mode=get_mode(args.mode),
        image_size=size,
        series=series,
        crop=args.crop,
        flip=args.flip,
        captions=args.captions,
        maps=findings.made_maps,
    )
    count = args.count if source.size is None else min(args.count, source.size)
    faults = FaultLog(source.size, args.max_bad, findings.lost)
    cells = []
    for n in range(count):
        example = prepared.example(n)
        faults.add(example.faults)
        cells.append(draw_example(example, args.mode))
    write_png(grid(cells), args.out)
    print(args.out)


def write_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image_bytes(image, ".png"))


def draw_example(example: Example, mode: str) -> Image.Image:
    """An example's picture with its boxes and phrases or skeletons, beside its map or mask, above its references and
    caption."""
    picture = Image.fromarray(np.ascontiguousarray(example.image))
    request = Request(prompt=example.caption, entities=example.entities, keypoints=example.keypoints)
    parts = [draw_request(picture, request)]
    for beside in (example.map, example.mask):
        if beside is not None:
            parts.append(_visible(beside, mode if beside is example.map else "mask"))
    W, H = picture.size
    row = Image.new("RGB", (len(parts) * W, H), "white")
    for i, part in enumerate(parts):
        row.paste(part, (i * W, 0))
    return _with_caption(_with_references(row, example, W), f"{example.caption or '(no caption)'}", example.key)


def _with_references(row: Image.Image, example: Example, width: int) -> Image.Image:
    shown = [Image.fromarray(picture) for picture in example.references if picture is not None]
    if not shown:
        return row
    side = width // 6
    tall = Image.new("RGB", (row.width, row.height + side), "white")
    tall.paste(row)
    for i, picture in enumerate(shown[:6]):
        tall.paste(fit(picture, side, side), (i * side, row.height))
    return tall


def _with_caption(row: Image.Image, caption: str, key: str) -> Image.Image:
    font = ImageFont.load_default(max(10, row.width // 32))
    line = font.getbbox("Ag")[3] + 3
    letters = max(8, int(row.width / font.getlength("n")))
    lines = [*textwrap.wrap(caption, letters, max_lines=2, placeholder=" …"), *textwrap.wrap(key, letters)[:1]]
    tall = Image.new("RGB", (row.width, row.height + int(line * 3)), "white")
    tall.paste(row)
    draw = ImageDraw.Draw(tall)
    for i, text in enumerate(lines):
        draw.text((2, row.height + i * line), text, "black" if i < len(lines) - 1 else "#777777", font)
    return tall


def _visible(pixels: Map, mode: str) -> Image.Image:
    if mode == "sem":  # a colour for every label; 0 stays black
        labels = pixels.astype(np.int64)
        pixels = np.stack([labels * step % 256 for step in (67, 131, 197)], -1).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
