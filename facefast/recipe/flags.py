"""A run from its command line: which recipe, what it is given, and where the run lives."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from facefast.recipe.named import RECIPES, Given, with_scratch_baseline
from facefast.recipe.whole import Recipe

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
