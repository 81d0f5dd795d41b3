"""How well a model keeps to what it is asked: images generated and measured. See gligen/commands/evaluate.py."""

import sys

from gligen.commands.evaluate import entry

if __name__ == "__main__":
    sys.exit(entry())
