"""Makes the miniature of the real system: CLIP, autoencoder and base UNet on drawn scenes, one command per stage."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gligen import cli
from gligen.miniature.config import STAGES, Recipe

SUMMARIES = {
    "clip": "train CLIP's two towers",
    "vae": "train the autoencoder and measure the scale of its latents",
    "unet": "train the base UNet on the outcomes of clip and vae",
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m gligen.miniature", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, recipe in STAGES.items():
        stage = commands.add_parser(name, help=SUMMARIES[name], description=SUMMARIES[name])
        stage.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
        stage.add_argument(
            "--resume",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="go on from what is in --out (default); --no-resume begins anew and replaces it",
        )
        _add_options(stage, recipe)
    export = commands.add_parser("export", help="write all stages as one file that loads like Stable Diffusion")
    export.add_argument(
        "--file", type=Path, required=True, metavar="FILE", help="FILE.safetensors to write, and FILE.json beside it"
    )
    unpack = commands.add_parser("unpack", help="the stages' states of an exported file, to train on from it")
    unpack.add_argument("--file", type=Path, required=True, metavar="FILE", help="what export has written")
    widen = commands.add_parser("widen", help="a wider UNet that begins with what a base, or an adapter, has learnt")
    widen.add_argument("--file", type=Path, required=True, metavar="FILE", help="what export or train.py has written")
    widen.add_argument("--to", type=Path, required=True, metavar="FILE", help="FILE.safetensors to write")
    widen.add_argument("--model-channels", type=int, required=True, metavar="N", help="channels of the first level")
    widen.add_argument(
        "--channel-mult", type=int, nargs="+", required=True, metavar="N", help="of each level over the first's"
    )
    cells = commands.add_parser("cells", help="an adapter of a map mode, whose tokens begin as boxes with phrases")
    cells.add_argument("--mode", required=True, help="a mode with a map, such as sem or depth")
    cells.add_argument("--adapter", type=Path, required=True, metavar="FILE", help="for boxes, to begin with")
    cells.add_argument("--file", type=Path, required=True, metavar="FILE", help="FILE.safetensors to write")
    cells.add_argument("--minutes", type=float, default=6.0, metavar="X", help="how long it is taught (default: 6)")
    cells.add_argument(
        "--channels", type=Path, metavar="FILE", help="an adapter of this mode whose channels are taken over"
    )
    cells.add_argument(
        "--base", metavar="FILE", help="what the adapter was taught to (default: the embedded miniature)"
    )
    for name, command in commands.choices.items():
        if name not in ("widen", "cells"):
            command.add_argument(
                "--out", type=Path, default=Path("runs/miniature"), metavar="DIR", help="folder of the stages' states"
            )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error instead of one line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command == "export":
        from gligen.miniature.export import export

        print(export(args.out, args.file))
        return
    if args.command == "unpack":
        from gligen.miniature.export import unpack

        print(*unpack(args.file, args.out), sep="\n")
        return
    if args.command == "widen":
        from gligen.miniature.widen import widen

        print(*widen(args.file, args.to, args.model_channels, tuple(args.channel_mult)), sep="\n")
        return
    if args.command == "cells":
        from gligen.miniature.cells import begin_cells

        print(
            begin_cells(
                args.mode, args.adapter, args.file, minutes=args.minutes, channels=args.channels, base=args.base
            )
        )
        return
    recipe: Any = STAGES[args.command]
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(recipe) if hasattr(args, f.name)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    if not (args.resume and (args.out / f"{args.command}.pt").exists()):  # its sizes are not known yet
        recipe(**given)  # tells of what cannot work before torch is loaded

    from gligen.device import pick_device
    from gligen.miniature.loop import begun_with, train

    config = recipe(**(begun_with(args.out, args.command) if args.resume else {}) | given)
    logging.getLogger("gligen").info("%s", config)
    device = pick_device(args.device)
    print(train(_build(args.command, config, args.out, device), args.out, device, resume=args.resume))


def _build(name: str, config: Any, out: Path, device: Any) -> Any:
    if name == "clip":
        from gligen.miniature.clip import CLIPTraining

        return CLIPTraining(config)
    if name == "vae":
        from gligen.miniature.vae import VAETraining

        return VAETraining(config)
    from gligen.miniature.loop import load_trained
    from gligen.miniature.unet import UNetTraining

    return UNetTraining(config, load_trained(out, "clip"), load_trained(out, "vae"), device)


def _add_options(parser: argparse.ArgumentParser, recipe: type[Recipe]) -> None:
    """A flag for every field; those not given are absent from the parsed result."""
    for field in dataclasses.fields(recipe):
        default: Any = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        kind: dict[str, Any] = {
            "type": type(default[0] if isinstance(default, tuple) else default),
            "metavar": "X" if isinstance(default, float) else "N",
        }
        if isinstance(default, tuple):
            kind["nargs"] = "+"
        elif isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help'].replace('%', '%%')} (default: {shown})",
            **kind,
        )


def entry(argv: Sequence[str] | None = None) -> int:
    """`cli.run`, with the status that shells expect of a command ended by a signal."""
    try:
        return cli.run(main, argv)
    except Exception as error:
        number = getattr(error, "signal_number", None)  # loop.StoppedError, whose module would load torch
        if number is None:
            raise
        print(error, file=sys.stderr)
        return 128 + int(number)


if __name__ == "__main__":
    sys.exit(entry())
