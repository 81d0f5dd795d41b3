"""`python -m gligen.data COMMAND`: looks at, draws and prepares sets of pictures to train on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from gligen.cli import Parser, run
from gligen.data.flags import add_build_flags, add_check_flags, add_draw_flags, add_show_flags

# command -> its flags, and what it does; `main(args)` of the module so called runs it (imported then: most need torch)
COMMANDS = {
    "show": (add_show_flags, "what a set was understood to be, in words and as a contact sheet"),
    "draw": (add_draw_flags, "writes the drawn world in one of the formats that are read"),
    "build": (add_build_flags, "packs a set as tar shards with an index, to read it fast anywhere"),
    "check": (add_check_flags, "reads every record, and counts what is wrong; exit status 1 if any"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs one command; returns its exit status, None for 0. Raises what the command raises for a user's mistakes."""
    parser = Parser(prog="python -m gligen.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_flags, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        add_flags(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return import_module(f"gligen.data.{args.command}").main(args)


if __name__ == "__main__":
    sys.exit(run(main))
