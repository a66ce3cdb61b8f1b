"""Every option of every command and its default, a line each: `python -m tests.support.options`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from facefast import cli, submit
from facefast.recipe.flags import TrainArguments, run_folder
from facefast.recipe.options import NEEDED, Option, options
from facefast.recipe.phase import Phase
from facefast.recipe.usage import ALIASES

OPTION = r"^[│ ] ?(--\w[\w.-]+)"
"""An option where tyro's help begins to describe it."""


def arguments_of(command: str) -> type:
    """The dataclass that a command's line is parsed into."""
    if command == "train":
        return TrainArguments
    module = importlib.import_module(f"facefast.{command}")
    kind: type = getattr(module, f"{command.capitalize()}Arguments")
    return kind


def named(option: Option) -> str:
    """As it is typed; K stands for the name of a phase."""
    if option.positional:
        return option.path.upper()
    return option.flag.replace(f"--phases.{Phase.name}.", "--phases.K.")


def written(value: object) -> str:
    """A default as it is typed."""
    if value is NEEDED:
        return "(must be given)"
    return " ".join(map(str, value)) if value and isinstance(value, tuple) else str(value) or "''"


def lines() -> Iterator[str]:
    """One for each option, in the order of the commands and of their fields."""
    for command in cli.COMMANDS:
        for option in options(arguments_of(command)):
            default = run_folder("RECIPE") if option.flag == "--out" and command == "train" else option.default
            yield f"{command} {named(option)} = {written(default)}"
        for scheduler, (kind, _) in submit.SCHEDULERS.items() if command == "submit" else ():
            yield from (f"submit {scheduler} {named(o)} = {written(o.default)}" for o in options(kind))
        if command == "train":
            yield from (f"train {alias} is --phases.K.{alias[2:]} of the only phase" for alias in ALIASES)


if __name__ == "__main__":
    print(*lines(), sep="\n")
