"""A run's report written anew, or runs side by side: `facefast report RUN [RUN...]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from facefast.evaluation import report, report_compare
from facefast.recipe.options import parse
from facefast.runtime import exits
from facefast.runtime.terminal import complain, message, say


@dataclass(frozen=True)
class ReportArguments:
    """`python -m facefast.report`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders: of one its report, of several a page that compares them."""
    out: Path | None = None
    """The page; without it report.html in the run folder, or comparison.html here for several."""
    pictures: bool = False
    """Show photographs of the people (wrong ones, hard pairs, a training batch), from where they lie."""


def _note(text: str) -> None:
    complain(message(f"note: {text}"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(ReportArguments, arguments, "report")
        if not given.runs:
            raise ValueError("no run is named; give a run folder, or several to compare")
        if len(given.runs) == 1:
            written = report.write(given.runs[0], given.out, pictures=given.pictures, tell=_note)
        elif given.pictures:
            raise ValueError("--pictures has no effect on a comparison; leave it out, or name one run")
        else:
            written = report_compare.write(given.runs, given.out or Path("comparison.html"), _note)
        say(str(written))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
