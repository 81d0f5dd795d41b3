"""Makes the miniature of the real system: CLIP, autoencoder and base UNet on drawn scenes, one command per stage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gligen import cli
from gligen.miniature.config import STAGES

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
        stage.add_argument(
            "--resume",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="go on from what is in --out (default); --no-resume begins anew and replaces it",
        )
        cli.add_config_flags(stage, recipe())
    export = commands.add_parser("export", help="write all stages as one file that loads like Stable Diffusion")
    export.add_argument(
        "--file", type=Path, required=True, metavar="FILE", help="FILE.safetensors to write, and FILE.json beside it"
    )
    unpack = commands.add_parser("unpack", help="the stages of an exported file, to train on from it")
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
                "--out", type=Path, default=Path("runs/miniature"), metavar="DIR", help="folder of the stages"
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
    given = cli.config_fields(args, recipe())
    folder = args.out / args.command
    if not (args.resume and folder.exists()):  # its sizes are not known yet
        recipe(**given)  # refuses what cannot work before torch is loaded

    from gligen.miniature.stage import begun_with
    from gligen.training.engine.loop import run

    config = recipe(**(begun_with(args.out, args.command) if args.resume else {}) | given)
    run(partial(build_task, args.command, config, args.out), config, folder, resume=args.resume)
    if cli.world()[0] == 0:
        print(folder)


def build_task(name: str, config: Any, out: Path, device: Any, dtype: Any) -> Any:
    """The task of a stage whose run, and those of the stages before it, lie in `out`."""
    if name == "clip":
        from gligen.miniature.clip import CLIPTask

        return CLIPTask(config, device, dtype)
    if name == "vae":
        from gligen.miniature.vae import VAETask

        return VAETask(config, device, dtype)
    from gligen.miniature.stage import load_trained
    from gligen.miniature.unet import UNetTask

    return UNetTask(config, load_trained(out, "clip"), load_trained(out, "vae"), out / name, device, dtype)


if __name__ == "__main__":
    sys.exit(cli.run(main))
