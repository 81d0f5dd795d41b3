"""Training a frozen text-to-image model to place things: presets and flags in, an adapter out.

    python train.py box-text --data ~/mypictures --base sd-v1-4.ckpt --out runs/mine
    python train.py scenes-box-text --out runs/a

Writes OUT/adapter.safetensors for `sample.py --adapter FILE`, OUT/checkpoint.safetensors from which
the same command goes on, OUT/log.jsonl, OUT/previews. Several processes (torchrun) share a step's samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from gligen import cli
from gligen.modes import MODES
from gligen.training.presets import PRESETS, TrainConfig, get_preset


def build_parser(config: TrainConfig) -> argparse.ArgumentParser:
    """The parser of train.py's flags. config: whose values are the defaults in --help."""
    description, epilog = (__doc__ or "").split("\n\n", 1)
    parser = cli.Parser(
        "train.py",
        description=description,
        epilog=f"{epilog}\npresets: {', '.join(PRESETS)}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "preset", metavar="PRESET", help="what to start from, see below; with it, --help shows its defaults"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from OUT's checkpoint if there is one; --no-resume starts over (default: --resume)",
    )
    cli.add_config_flags(parser, config)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. argv: its arguments, by default the process's own. Raises as `gligen.cli.run` reports it."""
    given = sys.argv[1:] if argv is None else argv
    named = next((PRESETS[word] for word in given if word in PRESETS), TrainConfig())  # for --help alone
    args = build_parser(named).parse_args(given)
    preset = get_preset(args.preset)
    config = dataclasses.replace(preset, **cli.config_fields(args, preset))
    if args.preset in MODES and not config.data:
        raise ValueError(
            f"{args.preset} is the recipe for your own images: name them with --data DIR (scenes-{args.preset} "
            "trains on the drawn world and needs none)"
        )

    from gligen.training.grounding_task import train  # from here on torch is needed

    adapter = train(config, args.out, resume=args.resume)
    if cli.world()[0] == 0:
        print(adapter)


def entry() -> int:
    """The command `gligen-train`, and train.py of a checkout."""
    return cli.run(main)
