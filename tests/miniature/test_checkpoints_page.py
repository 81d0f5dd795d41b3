"""checkpoints/README.md: every command by which the files were made is understood as it stands."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from experiments import base, fusers
from gligen import cli
from gligen.commands import train
from gligen.miniature import __main__ as miniature
from gligen.miniature.config import STAGES
from gligen.training.presets import get_preset
from gligen.weights import __main__ as weights

PAGE = (Path(__file__).parents[2] / "checkpoints" / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of each command, the page's shell variables filled in; of torchrun's the command that it runs."""
    found, variables = [], {}
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$(\w)", lambda match: variables[match[1]], re.sub(r"(^|\s)#.*", "", line)).strip()
            if made := re.fullmatch(r'(\w)="(.*)"', line):
                variables[made[1]] = made[2]
            elif line:
                words = shlex.split(line)
                found.append(words[3:] if words[0] == "torchrun" else words[1:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_page_is_understood(words: list[str]) -> None:
    if words[:2] == ["-m", "experiments.fusers"]:
        args = fusers.build_parser().parse_args(words[2:])
        words = [f"{args.command}.py", *args.flags]
    if words[0] == "train.py":
        preset = get_preset(words[1])
        args = train.build_parser(preset).parse_args(words[1:])
        dataclasses.replace(preset, **cli.config_fields(args, preset))
        return
    if words[:2] == ["-m", "experiments.base"]:
        args, flags = base.build_parser().parse_known_args(words[2:])
        assert args.command == "train" or not flags
        words = ["-m", "gligen.miniature", "unet", *flags]
    _, module, *rest = words
    parser = {"gligen.miniature": miniature, "gligen.weights": weights}[module].build_parser()
    args = parser.parse_args(rest)
    if args.command in STAGES:
        recipe = STAGES[args.command]()
        dataclasses.replace(recipe, **cli.config_fields(args, recipe))
