"""The command line: `facefast train|index|audit|evaluate|...`, recipes from flags, errors as exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from facefast.recipe import Recipe
from facefast.recipe.named import RECIPES, Given, with_scratch_baseline
from facefast.runtime import process

COMMANDS = ("train", "index", "audit", "label", "evaluate", "predict", "export", "compress")
EXAMPLE = Given(source="FILE", teacher="RUN", people=("NAME",), attributes=("NAME",))
"""Stands for what a recipe needs where only its help is wanted."""


@dataclass(frozen=True)
class TrainArguments:
    """Flags of `facefast.train` that say where a run lives rather than what it is."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    """The run folder."""
    resume: str = "auto"
    """auto goes on from the run folder's newest sound checkpoint, never starts anew, a path names a checkpoint."""


def train_arguments(arguments: list[str]) -> tuple[Recipe, Path, str]:
    """The recipe, the run folder and the resume policy that a command line asks for.

    A first word without a dash names a recipe; without one the data and the source model decide.

    Raises:
        ValueError: an unknown recipe, or values that contradict each other.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0][:1] != "-" else ("", arguments)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data.root", dest="root", default="")
    early.add_argument("--data.format", dest="format", default="auto")
    early.add_argument("--model.source", dest="source", default="none")
    early.add_argument("--model.teacher", dest="teacher", default="none")
    early.add_argument("--binary.people", dest="people", nargs="*", default=[])
    early.add_argument("--binary.negatives", dest="negatives", default="")
    early.add_argument("--tasks.attributes", dest="attributes", nargs="*", default=[])
    early.add_argument("--compare-scratch", action="store_true")
    known, _ = early.parse_known_args(rest)
    if not name:
        drawn = not known.root and known.format in ("auto", "synthetic") and known.source == "none"
        name = "drawn" if drawn else "finetune" if known.source != "none" else "scratch"
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    given = Given(known.source, known.teacher, tuple(known.people), known.negatives, tuple(known.attributes))
    if {"-h", "--help"} & set(rest):
        given = EXAMPLE
    recipe = RECIPES[name](given)
    if known.compare_scratch:
        recipe = with_scratch_baseline(recipe)
        rest = [word for word in rest if word != "--compare-scratch"]
    numbers = {phase.name: str(number) for number, phase in enumerate(recipe.phases)}
    rest = [_by_number(word, numbers) for word in rest]
    default = TrainArguments(recipe=recipe, out=Path("runs") / name)
    chosen = tyro.cli(
        TrainArguments,
        args=rest,
        default=default,
        prog="facefast.train [RECIPE] [--compare-scratch]",
        description="\n".join(
            ["Recipes:", *(f"  {recipe_help(other)}" for other in RECIPES), "", f"Options of {name}:"]
        ),
    )
    if chosen.recipe.data.root == "" and chosen.recipe.data.format not in ("auto", "synthetic"):
        raise ValueError(f"data.format {chosen.recipe.data.format} needs --data.root")
    return chosen.recipe, chosen.out, chosen.resume


def recipe_help(name: str) -> str:
    """The first paragraph of a recipe's docstring in one line."""
    first = (RECIPES[name].__doc__ or "").partition("\n\n")[0]
    return f"{name}: {' '.join(first.split())}"


def _by_number(word: str, numbers: dict[str, str]) -> str:
    """--phases.finetune.lr as --phases.1.lr."""
    parts = word.split(".")
    if parts[0] == "--phases" and len(parts) > 2 and parts[1] in numbers:
        parts[1] = numbers[parts[1]]
    return ".".join(parts)


@dataclass
class Outcome:
    """What a command came to."""

    code: int = process.EXIT_DONE


@contextlib.contextmanager
def exit_codes(on_failure: Callable[[int, str], None] = lambda code, text: None) -> Iterator[Outcome]:
    """Runs a command so that it ends with DESIGN's exit codes: users see one message, our own faults their
    traceback."""
    outcome = Outcome()
    try:
        yield outcome
    except SystemExit as error:
        outcome.code = process.EXIT_USAGE if error.code == 2 else int(error.code or 0)
    except Exception as error:
        code = process.exit_code(error)
        if code is None:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        outcome.code = 1 if code is None else code
        on_failure(outcome.code, str(error))


def main() -> None:
    """The console script `facefast`."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        print(f"usage: facefast {{{','.join(COMMANDS)}}} ...   (--help after a command tells more)")
        sys.exit(process.EXIT_DONE if command in ("-h", "--help") else process.EXIT_USAGE)
    sys.exit(importlib.import_module(f"facefast.{command}").main(sys.argv[2:]))
