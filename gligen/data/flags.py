"""Flags of `python -m gligen.data` and of other commands that read pictures. Imports nothing heavy, for --help."""

from __future__ import annotations

import argparse
from pathlib import Path

from gligen.modes import MODES

MAX_BAD = 0.01  # of a set's pictures
SHARD_SIZE = 256.0  # MB; large enough to be read well from any disk or store, small enough to be lost
DRAWN_FORMATS = ("coco", "yolo", "voc", "tsv", "tar", "folder")


def add_show_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `gligen.data.show`."""
    parser.add_argument("data", metavar="DIR", help="a folder of pictures, or the file that describes it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG of pictures with what is known about them")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="pictures on it (default: 16)")
    add_source_flags(parser)
    add_geometry_flags(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of which pictures and crops (default: 0)")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `gligen.data.open.open_source`."""
    parser.add_argument("--mode", choices=MODES, default="box-text", help="what to train (default: box-text)")
    parser.add_argument("--captions-file", type=Path, metavar="FILE", help="COCO captions that lie elsewhere")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures that lie elsewhere")
    parser.add_argument("--maps", metavar="FOLDER", help="maps that lie elsewhere; canny or scribble makes them")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="inpainting masks, white where to repaint")
    parser.add_argument(
        "--max-bad", type=float, default=MAX_BAD, metavar="X", help="share of pictures that may be bad (default: 0.01)"
    )


def add_geometry_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `gligen.data.prepare.Prepared`."""
    parser.add_argument(
        "--size", type=int, nargs=2, default=(384, 384), metavar=("W", "H"), help="pixels (default: 384 384)"
    )
    parser.add_argument("--buckets", action="store_true", help="sizes by aspect ratio, with as many pixels as --size")
    parser.add_argument("--crop", choices=("center", "random"), default="center", help="(default: center)")
    parser.add_argument("--flip", type=float, default=0.0, metavar="X", help="share of flipped pictures (default: 0)")
    parser.add_argument(
        "--captions",
        choices=("full", "detection", "null"),
        default="full",
        help="their own, the names of what is in the boxes, or none (default: full)",
    )


def add_draw_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `gligen.data.draw`."""
    parser.add_argument("--format", choices=DRAWN_FORMATS, required=True, help="in which format to write")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="pictures (default: 1000)")
    parser.add_argument("--mode", choices=MODES, default="box-text", help="what they are for (default: box-text)")
    parser.add_argument("--size", type=int, default=64, metavar="N", help="pixels a side (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the series of pictures (default: 0)")
    parser.add_argument(
        "--series",
        choices=("training", "evaluation"),
        default="training",
        help="those that train.py draws, or those that evaluate.py asks for (default: training)",
    )


def add_build_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `gligen.data.build`."""
    parser.add_argument("data", metavar="DIR", help="a folder of pictures, or the file that describes it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the built set")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="make one of N parts, 0/N to N-1/N, in as many processes or machines that share the folder; the last to "
        "end joins them. torchrun's processes do so by themselves",
    )
    parser.add_argument(
        "--shard-size", type=float, default=SHARD_SIZE, metavar="MB", help=f"about, of a tar (default: {SHARD_SIZE:g})"
    )
    parser.add_argument("--count", type=int, metavar="N", help="the first N pictures only (default: all)")
    add_source_flags(parser)
    group = parser.add_argument_group("encodings", "what training would compute again and again, made once")
    group.add_argument("--latents", action="store_true", help="the autoencoder's, of pictures cropped to --size")
    group.add_argument(
        "--features", action="store_true", help="CLIP's, of phrases and, with --mode …-image, of what is in the boxes"
    )
    group.add_argument("--base", metavar="FILE", help="the model they are for (default: the embedded miniature)")
    group.add_argument("--vae", metavar="FILE", help="another autoencoder, or the base's where it holds none")
    group.add_argument("--clip", metavar="FILE", help="CLIP with the towers that the base does not hold")
    group.add_argument(
        "--size", type=int, nargs=2, metavar=("W", "H"), help="pixels, of latents' pictures (default: the base's own)"
    )
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="to compute in, as for training"
    )


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `gligen.data.check`."""
    parser.add_argument("data", metavar="DIR", help="a built set, or any other that `show` understands")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_source_flags(parser)
