"""The console script: `facefast train|index|audit|evaluate|...` finds the command and hands it the rest of the line.

What needs no command (help, version, misspelt words, all of train's flags) is answered before a command, and with it
torch, is imported.
"""

from __future__ import annotations

import importlib
import sys

from facefast import __version__
from facefast.runtime import exits
from facefast.runtime.terminal import say

COMMANDS = {
    "train": "Train a model on photographs, as a recipe says",
    "index": "Look through photographs before a run: what is there, broken, or there twice",
    "align": "Find the faces in photographs, and write where they are or what they show",
    "audit": "Find wrong labels, copies, and people under two names",
    "label": "Give names to photographs that have none",
    "evaluate": "Measure how well a model recognises and verifies people",
    "predict": "Name the people in photographs, or embed them",
    "gallery": "Enroll people, find them in photographs, and forget them",
    "export": "Write a model as ONNX, torch.export or safetensors",
    "compress": "Write an int8 copy of a model, refused where it recognises worse",
    "report": "Write a run's report anew, or compare runs",
    "submit": "Hand a run to a cluster's scheduler, or print what would be handed in",
    "doctor": "Look for what a cluster gets wrong: versions, network, disks, clocks",
    "bench": "Measure how fast this machine trains, and what holds it back",
}
"""What each command does, in a line."""


def main() -> None:
    """The console script `facefast`."""
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Answers a command line; returns the exit code."""
    first = words[0] if words else ""
    if first == "train" and (code := answer_without_torch(words[1:])) is not None:
        return code
    with exits.exit_codes() as outcome:  # a command's import takes seconds, in which it may be interrupted
        if first in COMMANDS:
            command = importlib.import_module(f"facefast.{first}")
        elif first == "--version":
            say(f"facefast {__version__}")
        elif first in ("", "-h", "--help"):
            say(help_text())
            outcome.code = exits.EXIT_DONE if first else exits.EXIT_USAGE
        else:
            from facefast.recipe.options import did_you_mean, nearest

            near = did_you_mean(nearest(first, [*COMMANDS, "--help", "--version"]))
            near = near or f"; the commands are {', '.join(COMMANDS)}"
            raise ValueError(f"there is no command {first!r}{near} (facefast --help says what each does)")
    return int(command.main(words[1:])) if first in COMMANDS and outcome.code == exits.EXIT_DONE else outcome.code


def help_text() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: facefast COMMAND ...",
            "",
            *(f"  {command:{width}}  {what}" for command, what in COMMANDS.items()),
            "",
            "facefast COMMAND --help tells more, facefast --version which one this is.",
        ]
    )


def answer_without_torch(words: list[str]) -> int | None:
    """The exit code of a train command line that asks for help or is wrong; None for one to train by."""
    sound = False
    with exits.exit_codes() as outcome:
        from facefast.recipe import flags

        flags.train_arguments(words)
        sound = True
    return None if sound else outcome.code
