"""The console script: `facefast train|index|audit|evaluate|...` finds the command and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys

from facefast.runtime import exits

COMMANDS = ("train", "index", "audit", "label", "evaluate", "predict", "export", "compress")


def main() -> None:
    """The console script `facefast`."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        print(f"usage: facefast {{{','.join(COMMANDS)}}} ...   (--help after a command tells more)")
        sys.exit(exits.EXIT_DONE if command in ("-h", "--help") else exits.EXIT_USAGE)
    sys.exit(importlib.import_module(f"facefast.{command}").main(sys.argv[2:]))
