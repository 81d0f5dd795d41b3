"""Training a frozen text-to-image model to place things: presets and flags in, an adapter out.

See gligen/commands/train.py.
"""

import sys

from gligen.commands.train import entry

if __name__ == "__main__":
    sys.exit(entry())
