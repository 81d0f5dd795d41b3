"""What the command lines share: one-line errors, log lines, flags of a request.

argparse, and no dataclass-to-flags library, because a flag must be able to override a request file: what was not given
has to stay apart from what was given with its default value. Imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import re
import select
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from gligen.modes import MAP_MODES
from gligen.request import SAMPLERS

_HOME = re.compile(r"^(--[\w-]+=)(~/.*)", re.DOTALL)


def _expanded(flag: re.Match[str]) -> str:
    return flag[1] + os.path.expanduser(flag[2])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others. prog: its name, unless it was called as gligen-NAME."""

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        called = os.path.basename(sys.argv[0])
        super().__init__(called if called.startswith("gligen-") else prog, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # argparse overloads it
        """As argparse. In --flag=~/x, which shells leave as it is, ~ is the home folder too."""
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_HOME.sub(_expanded, each, count=1) for each in given], namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: its own or 0, 2 for a user's mistake (printed in one line), 130 for
    Ctrl-C, 141 where nobody reads its output any more and 143 for SIGTERM.

    With --debug among the arguments the traceback is shown instead.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        status = main(argv)
        sys.stdout.flush()  # here, where a reader that is gone is no error
    except KeyboardInterrupt as stop:  # a command that saves first says in its message what
        print(str(stop) or "stopped: what was finished is kept", file=sys.stderr)
        return int(getattr(stop, "status", 130))
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():  # whoever reads the output has enough of it (| head)
            return 128 + 13  # as a process that SIGPIPE ends
        if "--debug" in args:
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return status or 0


def _is_unread() -> bool:
    """Whether the reader of the output is gone, and not that of another pipe, such as a worker's.

    If so, what Python still writes at its end goes nowhere.
    """
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # which tells errors alone
    gone = [place for place, _ in poll.poll(0)]
    for place in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), place)
    return bool(gone)


def world() -> tuple[int, int]:
    """(rank, number of processes) under torchrun; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def add_config_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """A flag for every field of a config, a dataclass: `warmup_steps` is --warmup-steps. Those not given are absent
    from the parsed result; the config's own values are the defaults that --help shows.

    A field's metadata may give `help`, `group` and `metavar`; its type gives the rest: numbers, text, `X | None`,
    closed choices, --name and --no-name for truths, one or more numbers for tuples.
    """
    hints = typing.get_type_hints(type(config))
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = field.metadata.get("group", "options")
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        kind = hints[field.name]
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS}
        if isinstance(kind, types.UnionType):
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        if kind is bool:
            kwargs |= {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            kwargs |= {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            kwargs |= {"type": item, "nargs": "+", "metavar": field.metadata.get("metavar") or "N"}
            if item is str:
                kwargs |= {"action": "extend"}  # repeated, each time with one or more values, they add up
        else:
            kwargs |= {
                "type": kind,
                "metavar": field.metadata.get("metavar") or {int: "N", float: "X"}.get(kind, "TEXT"),
            }
        value = getattr(config, field.name)
        default = " ".join(map(str, value)) if isinstance(value, tuple) else value
        shown = "" if default in (None, "") else f" (default: {default})"
        help = (field.metadata.get("help", "") + shown).replace("%", "%%")
        groups[name].add_argument(f"--{field.name.replace('_', '-')}", help=help, **kwargs)


def config_fields(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The given flags of `add_config_flags` as fields, for `dataclasses.replace`."""
    names = {field.name for field in dataclasses.fields(config)}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items() if name in names
    }


def add_change_flags(group: Any) -> None:
    """--vae and --lora: what is put on a checkpoint, whatever it is then used for."""
    group.add_argument(
        "--vae", metavar="FILE", help="another autoencoder for the checkpoint: a file or diffusers folder"
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA or LoCon to put on the base and its text encoder (default weight: 1); repeatable, they add up",
    )


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """The file names given to `add_change_flags`'s flags, by flag, for what is stored with a result."""
    named = {
        "vae": args.vae and os.path.basename(args.vae.rstrip("/")),
        "lora": [os.path.basename(n) for n in args.lora],
    }
    return {name: value for name, value in named.items() if value}


def _add(group: Any, flag: str, help: str, **kwargs: Any) -> None:
    group.add_argument(flag, help=help, default=argparse.SUPPRESS, **kwargs)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for every field of a request. Those not given are absent from the parsed result."""
    group = parser.add_argument_group("request", "what to generate; flags override what a request file says")
    add = functools.partial(_add, group)
    add("--prompt", "the caption", metavar="TEXT")
    add("--negative-prompt", "what the image should not be (default: nothing)", metavar="TEXT")
    add(
        "--prompt-weights",
        "read brackets in both prompts as web UIs do: (more), (more:1.4), [less], \\( for a letter (default: as text)",
        action=argparse.BooleanOptionalAction,
    )
    add("--clip-skip", "the layer of CLIP's text encoder that prompts are read at, 1 the last", type=int, metavar="N")
    add(
        "--long-prompts",
        "read prompts of more than 77 tokens whole, in several windows (default: cut, with a warning)",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--box",
        "a thing and its box as fractions of width and height, x0 < x1 and y0 < y1; repeatable",
        action="append",
        nargs=5,
        metavar=("PHRASE", "X0", "Y0", "X1", "Y1"),
        dest="entities",
    )
    for name in MAP_MODES:
        what = "label ids 0..150" if name == "sem" else f"{name} map"
        add(f"--{name}", f"image holding the {what} to follow", metavar="FILE")
    add(
        "--inpaint",
        "image to repaint: where --mask says, else where it is transparent, else in the boxes",
        metavar="FILE",
    )
    add("--mask", "what to repaint of the --inpaint image: white, or a transparent hole; any shape", metavar="FILE")
    add("--init-image", "image to begin with, fitted to the size (image-to-image)", metavar="FILE")
    add(
        "--strength",
        "share of the steps that are made of --init-image, above 0 (default: 0.75)",
        type=float,
        metavar="X",
    )
    add_generation_flags(group)


def add_generation_flags(group: argparse._ArgumentGroup) -> None:
    """Flags for the fields of a request that say how, not what (GENERATION_FIELDS)."""
    add = functools.partial(_add, group)
    add(
        "--size",
        "pixels; multiples of 8 for Stable Diffusion, best of 64 (default: the model's own, in the shape of the "
        "image if any)",
        nargs=2,
        type=int,
        metavar=("W", "H"),
    )
    add("--steps", "denoising steps, 1 to 1000 (default: 50)", type=int, metavar="N")
    add(
        "--sampler",
        "default: plms; dpmpp and unipc need about 20 steps, lcm 1 to 8 with an LCM LoRA",
        metavar="{" + ",".join(SAMPLERS) + "}",
    )
    add("--guidance", "classifier-free guidance scale; 1 turns it off (default: 7.5)", type=float, metavar="S")
    add("--eta", "noise of the ddim sampler, 0 to 1 (default: 0)", type=float, metavar="X")
    add(
        "--schedule",
        "scheduled sampling: fractions of the steps with grounding full, decaying, off; sum 1 (default: the mode's)",
        nargs=3,
        type=float,
        metavar=("A", "B", "C"),
    )
    add("--tau", "short for --schedule TAU 0 1-TAU", type=float, metavar="TAU")
    add(
        "--seed",
        "image k of a request has seed + k, whatever the batch; -1 draws one (default: 0)",
        type=int,
        metavar="N",
    )
    add("--num-images", "images of each request (default: 1)", type=int, metavar="N")


CONTENT_FIELDS = ("prompt", "negative_prompt", "entities", *MAP_MODES, "inpaint", "init_image")  # what it is about
READING_FIELDS = ("prompt_weights", "clip_skip", "long_prompts")  # how its texts are read
GENERATION_FIELDS = ("size", "steps", "sampler", "guidance", "eta", "schedule", "tau", "seed", "num_images")
REQUEST_FIELDS = (*CONTENT_FIELDS, *READING_FIELDS, "strength", *GENERATION_FIELDS)


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The given request flags as fields of a request file. Raises ValueError for a box that holds no numbers."""
    fields = {name: value for name, value in vars(args).items() if name in REQUEST_FIELDS}
    if "entities" in fields:
        fields["entities"] = [_entity(*values) for values in fields["entities"]]
    if "inpaint" in fields:
        fields["inpaint"] = {"image": args.inpaint} | ({"mask": args.mask} if hasattr(args, "mask") else {})
    elif hasattr(args, "mask"):
        raise ValueError("--mask says what to repaint of an image: give the image too, with --inpaint")
    return fields


def _entity(phrase: str, *numbers: str) -> dict[str, Any]:
    try:
        return {"phrase": phrase, "box": [float(number) for number in numbers]}
    except ValueError:
        raise ValueError(
            f'--box "{phrase}" {" ".join(numbers)}: after the phrase come four numbers x0 y0 x1 y1 in [0, 1]'
        ) from None
