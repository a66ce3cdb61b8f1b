"""A run from its command line: which recipe, what it is given, and where the run lives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from facefast.recipe.config import BinaryConfig, ModelConfig, TaskConfig
from facefast.recipe.named import RECIPES, Given, with_scratch_baseline
from facefast.recipe.options import (
    did_you_mean,
    group_of,
    hyphenated,
    in_full,
    nearest,
    one_of,
    options,
    quoting_errors,
)
from facefast.recipe.usage import ALIASES, short_help
from facefast.recipe.whole import Recipe

EXAMPLE = Given(
    model=ModelConfig(source="FILE", teacher="RUN"),
    binary=BinaryConfig(people=("NAME",)),
    tasks=TaskConfig(attributes=("NAME",)),
)
"""Stands for what a recipe needs where only the names of its options are wanted."""
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What changes a recipe without being a part of it."""

    compare_scratch: bool = False
    """First a baseline from random weights, on the same pictures for as long."""


@dataclass(frozen=True, kw_only=True)
class EarlyArguments(Baseline):
    """The part of a command line that chooses and builds the recipe."""

    given: Annotated[Given, tyro.conf.arg(name="")] = field(default_factory=Given)


@dataclass(frozen=True, kw_only=True)
class TrainArguments(Baseline):
    """The options of `facefast train`: the recipe's, and those that say where a run lives rather than what it is."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    """The run folder."""
    resume: str = "auto"
    """Go on from the newest sound checkpoint (auto), from PATH, or never."""
    doctor: bool = False
    """Before anything else look for what the machines get wrong, as facefast doctor does, and end at a fault."""
    quiet: bool = False
    """Say warnings and the results alone."""
    json: bool = False
    """On standard output the lines of metrics.jsonl as they come and status.json at the end; words on standard
    error."""


def train_arguments(arguments: list[str]) -> tuple[Recipe, Path, str]:
    """The recipe, the run folder and the resume policy of `command_line`."""
    chosen = command_line(arguments)
    return chosen.recipe, chosen.out, chosen.resume


def command_line(arguments: list[str]) -> TrainArguments:
    """What a command line asks for.

    A first word without a dash names a recipe; without one the data and the source model decide.

    Raises:
        ValueError: an unknown recipe or option, or values that contradict each other.
        SystemExit: help was wanted and printed, or a value that is not of its option's type.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0][:1] != "-" else ("", arguments)
    if name and name not in RECIPES:
        near = did_you_mean(nearest(name, RECIPES)) or f"; the recipes are {', '.join(RECIPES)}"
        raise ValueError(f"there is no recipe {name!r}{near} (facefast train --help says what each does)")
    early = EarlyArguments()
    if said := [word for word in rest if word not in (*HELP, HELP_ALL) and not word.startswith("--tyro-")]:
        with quoting_errors():
            early, _ = tyro.cli(EarlyArguments, args=said, prog=_program(name), return_unknown_args=True)
    name = name or _recipe_for(early.given)
    shape = _arguments(name, EXAMPLE, early.compare_scratch)
    if HELP_ALL in rest:
        _print_all_help(name, shape)
    if set(HELP) & set(rest):
        print(short_help(name, shape))
        raise SystemExit(0)
    names = _Names(shape)
    # Names before values: a misspelt --tasks.attributes is no recipe that lacks its attributes.
    words = [names.in_full(word) if word.startswith("--") and not word.startswith("--tyro-") else word for word in rest]
    default = _arguments(name, early.given, early.compare_scratch)
    with quoting_errors():
        chosen, unused = tyro.cli(
            TrainArguments, args=words, default=default, prog=_program(name), return_unknown_args=True
        )
    if unused:
        raise ValueError(names.unknown(unused[0]) if unused[0].startswith("-") else _stray(unused[0]))
    if chosen.quiet and chosen.json:
        raise ValueError("--quiet and --json say two things about what is printed; give one of them")
    recipe = chosen.recipe
    if recipe.data.root == "" and recipe.data.format not in ("auto", "synthetic"):
        raise ValueError(f"data.format {recipe.data.format} needs --data.root")
    return chosen


def _program(name: str) -> str:
    return f"facefast train {name or '[RECIPE]'}"


def _recipe_for(given: Given) -> str:
    """The recipe where none is named."""
    if given.model.source != "none":
        return "finetune"
    return "drawn" if not given.data.root and given.data.format in ("auto", "synthetic") else "scratch"


def _arguments(name: str, given: Given, compare_scratch: bool) -> TrainArguments:
    """A recipe's command line where nothing but `given` is said."""
    recipe = RECIPES[name](given)
    if compare_scratch:
        recipe = with_scratch_baseline(recipe)
    return TrainArguments(recipe=recipe, out=run_folder(name), compare_scratch=compare_scratch)


def run_folder(name: str) -> Path:
    """Where a recipe's run lives unless --out says so."""
    return Path("runs") / name


def _print_all_help(name: str, shape: TrainArguments) -> None:
    """tyro's own help, which ends the process."""
    numbers = ", ".join(f"phases.{number} is {phase.name}" for number, phase in enumerate(shape.recipe.phases))
    tyro.cli(
        TrainArguments,
        args=["--help"],
        default=shape,
        prog=_program(name),
        description=f"All options of {name}; {numbers}: --phases.NUMBER.OPTION or --phases.NAME.OPTION.",
    )


def _stray(word: str) -> str:
    if word in RECIPES:
        return f"the recipe comes first: facefast train {word} ..."
    return f"{word!r} is no value of the option before it, and an option's name begins with --"


class _Names:
    """What the options of one recipe's command line are called."""

    def __init__(self, shape: TrainArguments) -> None:
        names = [phase.name for phase in shape.recipe.phases]
        self.phases = [hyphenated(name) for name in names]
        self.known: list[str] = []
        self.full: dict[str, str] = {}
        """tyro's name of an option under each of its names: it counts phases, people name them."""
        for option in options(TrainArguments, shape):
            numbered = option
            if option.path.startswith("phases."):
                _, phase, rest = option.path.split(".", 2)
                numbered = dataclasses.replace(option, path=f"phases.{names.index(phase)}.{rest}")
            self.known.append(option.flag)
            self.full |= dict.fromkeys((option.flag, numbered.flag), numbered.flag)
            self.full |= dict.fromkeys((option.negated, numbered.negated), numbered.negated)

    def in_full(self, word: str) -> str:
        """--phases.finetune.lr=3 as --phases.1.lr=3, and --lr=3 too where there is one phase.

        Raises:
            ValueError: an option that there is not, or an alias where there are several phases.
        """
        flag, equals, value = word.partition("=")
        flag = in_full(hyphenated(flag))
        if flag in ALIASES and len(self.phases) > 1:
            meant = one_of(f"--phases.{phase}.{flag[2:]}" for phase in self.phases)
            raise ValueError(f"{flag} could mean {meant}; say which")
        if flag in ALIASES:
            flag = f"--phases.0.{flag[2:]}"
        if flag not in self.full:
            raise ValueError(self.unknown(flag))
        return self.full[flag] + equals + value

    def unknown(self, flag: str) -> str:
        """What is wrong with an option that there is not, and which one was meant."""
        if flag == "--":
            return "train takes no words beside its recipe and its options; leave -- out"
        start, phase, rest = (*flag.split(".", 2), "", "")[:3]
        if phase.isdecimal() and int(phase) < len(self.phases):
            phase = self.phases[int(phase)]
        if text := group_of(".".join(filter(None, (start, phase, rest))), self.known):
            return f"{text} (facefast train --help-all lists all of them)"
        if start == "--phases" and phase not in self.phases:
            meant = [f"--phases.{name}.{rest}" for name in nearest(phase, self.phases)]
            where = f"the phases are {', '.join(self.phases)}"
        else:
            meant = nearest(flag, [*self.known, *ALIASES, "--help", HELP_ALL])
            if len(self.phases) > 1 and meant and meant[0] in ALIASES:
                meant = [f"--phases.{name}.{meant[0][2:]}" for name in self.phases]
            where = "facefast train --help-all lists all of them"
        return f"there is no option {flag}{did_you_mean(meant)} ({where})"
