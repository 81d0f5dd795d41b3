"""Grounded text-to-image generation: requests in, pictures out. See gligen/commands/sample.py."""

import sys

from gligen.commands.sample import entry

if __name__ == "__main__":
    sys.exit(entry())
