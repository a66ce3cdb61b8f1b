"""How far a run is, for people and for programs: a bar on a terminal, lines in a file, JSON where it is asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from facefast.runtime.terminal import GREEN, YELLOW, coloured, empty_broken, heard, is_terminal, manner, plain, tell

SECONDS = 5.0
"""Least time between two lines about updates where there is no terminal: a log of a day stays readable."""
URGENT = ("warning:", "note:")
"""How texts begin that are said in a quiet run, too."""


class Progress:
    """What rank 0 says while it trains. The time that is left is the whole run's: updates to come at the pace of those
    done, with what lay between them.

    Args:
        total: updates of the whole run.
        done: those that were made before this process began.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._first: int | None = None
        self._manner = manner()
        self._began = time.perf_counter()
        self._next_line = self._began
        self._bar = tqdm(disable=True)
        if self._manner == "words" and is_terminal(sys.stderr):
            with heard():
                self._bar = tqdm(
                    total=total, initial=done, dynamic_ncols=True, mininterval=1, leave=False, bar_format="{desc}{bar}"
                )

    def update(self, step: int, where: str, numbers: str) -> None:
        """After an update whose numbers are known.

        Args:
            step: updates done in the whole run.
            where: the phase, and how far it is.
            numbers: loss and the like.
        """
        if self._first is None:  # what came before belongs to the start, and will not come again
            self._first, self._began = step, time.perf_counter()
        self._done = step
        if self._manner != "words":
            return
        text = f"{where}  step {step}/{self._total}  eta {self.left()}  {numbers}"
        if not self._bar.disable:
            with heard():
                self._bar.n = step
                self._bar.set_description_str(f"{text} ")  # where it is too long, the bar is what is cut
        elif time.perf_counter() >= self._next_line:
            self._next_line = time.perf_counter() + SECONDS
            tell(text)

    def left(self) -> str:
        """The time until the run's last update, as [H:]MM:SS; ? before there is a pace."""
        made = 0 if self._first is None else self._done - self._first
        if not made:
            return "?"
        pace = (time.perf_counter() - self._began) / made
        return str(tqdm.format_interval(pace * max(0, self._total - self._done)))

    def say(self, text: str, *, good: bool = False) -> None:
        """A text of its own, which does not break the bar; `good` news are green where there are colours."""
        urgent = text.startswith(URGENT)
        if self._manner == "quiet" and not urgent:
            return
        text = plain(text)
        if self._bar.disable:
            tell(coloured(text, YELLOW if urgent else GREEN if good else "", sys.stdout), escaped=True)
            return
        try:
            self._bar.write(coloured(text, YELLOW if urgent else GREEN if good else "", sys.stdout))
        except (OSError, ValueError):  # of the bar or of the text: they go to two places
            empty_broken()
            tell(text, escaped=True)

    def record(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, where a program reads along."""
        if self._manner == "json":
            print_line(record)

    def close(self) -> None:
        """Leaves the bar where it is."""
        with heard():
            self._bar.close()


def print_line(record: Mapping[str, Any]) -> None:
    """A JSON object as a line of standard output; lost where nobody listens."""
    with heard():
        print(json.dumps(record, allow_nan=False), flush=True)
