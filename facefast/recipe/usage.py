"""The help of `facefast train` on a page: the recipe, the options that people use, the names of the others.

Every word about an option is its field's docstring, every value the recipe's.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from facefast.recipe.named import RECIPES
from facefast.recipe.options import Option, hyphenated, options

WIDTH = 100
COLUMN = 24
"""Greatest width that is kept free for what is typed; what is longer moves its text to the right."""
COMMON = (
    "data.root",
    "data.format",
    "data.corrections",
    "data.test_fraction",
    "model.source",
    "model.source_licence",
    "model.teacher",
    "model.backbone",
    "binary.people",
    "tasks.attributes",
    "image.size",
    "out",
    "resume",
    "seed",
    "precision",
    "threads",
    "ema",
    "pictures",
    "compare_scratch",
)
"""Options on the page, in this order; those in `SPECIAL` only where the recipe needs them."""
SPECIAL = ("model.teacher", "binary.people", "tasks.attributes")
PHASE_COMMON = ("epochs", "lr", "batch_size")
ALIASES = tuple(f"--{hyphenated(name)}" for name in PHASE_COMMON)
"""Options of a phase that need not name it where there is but one."""


def short_help(name: str, arguments: Any) -> str:
    """The page for a recipe.

    Args:
        arguments: an instance of the command line's dataclass, as the recipe has it where nothing is said.
    """
    found = {option.path: option for option in options(type(arguments), arguments)}
    shown = [found[path] for path in COMMON if path not in SPECIAL or found[path].default not in ("none", ())]
    return "\n".join(
        [
            "usage: facefast train [RECIPE] [--OPTION VALUE ...]",
            "",
            *_description(name),
            "",
            f"Options, with {name}'s values (CAPITALS stand for what you give):",
            *_rows((_typed(option.flag, option.default), option) for option in shown),
            "",
            *_phases([phase.name for phase in arguments.recipe.phases], found),
            "",
            "Recipes (without one: finetune with --model.source, scratch with --data.root alone, else drawn):",
            *(f"  {other:{max(map(len, RECIPES))}}  {recipe_help(other)}" for other in RECIPES),
            "",
            f"facefast train RECIPE --help shows another recipe, --help-all all {len(found)} options.",
        ]
    )


def recipe_help(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(RECIPES[name]) or "").partition("\n")[0]


def _description(name: str) -> list[str]:
    """A recipe's docstring: what it does, and below it the command."""
    *told, command = (inspect.getdoc(RECIPES[name]) or "").split("\n\n")
    command = command.removeprefix("Command: ").removesuffix(".").replace("`", "")
    return [*_wrapped(f"{name}: {' '.join(told)}"), *_wrapped(command, "  ")]


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Lines that fit; an option in brackets stays in one piece."""
    words = re.sub(r"\[(--[^]]*)\]", lambda bracket: bracket[0].replace(" ", "\xa0"), " ".join(text.split()))
    lines = textwrap.wrap(words, WIDTH, break_on_hyphens=False, initial_indent=indent, subsequent_indent=indent)
    return [line.replace("\xa0", " ") for line in lines]


def _phases(names: list[str], found: dict[str, Option]) -> list[str]:
    """What the phases are, how their options are named, and those that people use, a value for each phase."""
    last = f"--phases.{names[-1]}.lr"
    example = _typed(last, found[f"phases.{names[-1]}.lr"].default)
    if len(names) > 1:
        title = f"Phases {', '.join(names)}, in this order; an option is one phase's, such as {example}:"
    else:
        title = f"Phase {names[0]}; all its options are named like {last}, these also without the phase:"
    rows = []
    for alias, field in zip(ALIASES, PHASE_COMMON, strict=True):
        parts = [found[f"phases.{name}.{field}"] for name in names]
        flag = alias if len(names) == 1 else f"--phases.NAME.{alias[2:]}"
        rows.append((f"{flag} {', '.join(_value(part.default) for part in parts)}", parts[0]))
    return [*_wrapped(title), *_rows(rows, WIDTH)]


def _rows(rows: Iterable[tuple[str, Option]], widest: int = COLUMN) -> list[str]:
    """A line for each option: what is typed, and what it does as far as there is room."""
    rows = list(rows)
    column = min(widest, max(len(typed) for typed, _ in rows))
    return [
        f"  {typed:{column}}  {_fitted(option.text, WIDTH - 4 - max(column, len(typed)))}" for typed, option in rows
    ]


def _typed(flag: str, value: Any) -> str:
    """An option and its value as they are typed."""
    return flag if value is False else f"{flag} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _fitted(text: str, width: int) -> str:
    """A text that fits: without its brackets where that is enough, else up to the last clause that does."""
    for shorter in (text, re.sub(r" \([^)]*\)", "", text)):
        if len(shorter) <= width + 1:
            return shorter.removesuffix(".")
    ends = [match.start() for match in re.finditer(r"[;:.] ", shorter) if match.start() <= width]
    return shorter[: ends[-1]] if ends else textwrap.shorten(shorter, width, placeholder=" ...")
