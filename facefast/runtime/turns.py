"""Processes that are timed in turns: one works while all others stand still.

A process that waits for its turn in the ordinary way goes on filling its queues, and is paid in its turn for what it
did out of it. Here it is stopped by SIGSTOP, with all of its threads and children, so that programs of any kind, a
whole training among them, are compared as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

PATIENCE = 900.0
"""Seconds without a line after which a contender counts as stuck: a first compilation takes minutes."""
GRACE = 30.0
"""Seconds that a contender has to end when asked to."""
TURN = 3.0
"""Seconds of a turn, where a unit of work does not take longer."""


class ContenderError(RuntimeError):
    """A contender ended, or said nothing for too long."""


@dataclass(frozen=True)
class Entry:
    """How a contender is started and read."""

    command: Sequence[str]
    """It prints a JSON object on a line whenever it has done a unit of work, and never ends by itself."""
    warm: int
    """Lines before its first turn: compilation, first touches, queues."""
    lead: int
    """Lines at the start of each turn that are not timed: its caches are another's. At least 1, where timing begins."""
    lines: int
    """Timed lines that belong together, such as those of an epoch: a turn has one or several times as many."""
    pictures: int
    """Pictures of one line."""
    environment: Mapping[str, str] | None = None
    """Variables that it finds beside, or instead of, our own."""
    counts: Callable[[Mapping[str, Any]], bool] = lambda line: True
    """Which lines say that a unit is done."""


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    set_parent_death_signal = 1
    _LIBC.prctl(set_parent_death_signal, signal.SIGKILL)


class Contender:
    """A started process that stands still but in its turn.

    Raises:
        ContenderError: it ends before it is warm.
    """

    def __init__(self, name: str, entry: Entry) -> None:
        if min(entry.lead, entry.lines) < 1:
            raise ValueError(f"{name}: lead {entry.lead} and lines {entry.lines} must be at least 1")
        self.name, self.entry = name, entry
        self._rest = b""
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by `close`
        self._process = subprocess.Popen(
            list(entry.command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=None if entry.environment is None else {**os.environ, **entry.environment},
            start_new_session=True,  # its workers stop and go with it
            preexec_fn=_end_with_parent,  # or a stopped process would stay for ever where this one is killed
        )
        try:
            for _ in range(entry.warm):
                self._line()
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def turn(self, seconds: float) -> float:
        """Pictures a second in one turn of at least so many seconds."""
        self._drain()
        self._signal(signal.SIGCONT)
        try:
            for _ in range(self.entry.lead):
                self._line()
            began, done, passed = time.perf_counter(), 0, 0.0
            while not done or passed < seconds:
                for _ in range(self.entry.lines):
                    self._line()
                done += self.entry.lines
                passed = time.perf_counter() - began
            return done * self.entry.pictures / passed
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends it, by SIGKILL where it does not end when asked to."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=GRACE)
        self._signal(signal.SIGKILL)  # a worker that outlives its parent, too
        self._process.wait()
        self._complaints.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _line(self) -> None:
        """Waits for the next line that counts."""
        until = time.monotonic() + PATIENCE
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                if self._counts(line):
                    return
                continue
            self._read(max(0.0, until - time.monotonic()))

    def _counts(self, line: bytes) -> bool:
        try:
            found = json.loads(line)
        except ValueError:
            return False  # a library's words
        return isinstance(found, dict) and self.entry.counts(found)

    def _read(self, seconds: float) -> None:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        if not select.select([pipe], [], [], seconds)[0]:
            raise ContenderError(f"{self.name} said nothing for {PATIENCE:.0f} s{self._said()}")
        piece = os.read(pipe, 1 << 16)
        if not piece:
            code = self._process.wait()
            raise ContenderError(f"{self.name} ended with exit code {code} instead of going on{self._said()}")
        self._rest += piece

    def _drain(self) -> None:
        """Forgets what it printed between the end of its last turn and its standing still."""
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], 0)[0]:
            self._read(0)
        self._rest = self._rest.rpartition(b"\n")[2]

    def _said(self) -> str:
        self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, self._complaints.tell() - 2000))
        text = self._complaints.read().decode(errors="replace").strip()
        lines = [f"\n  {line}" for line in text.splitlines()]  # two blanks in: lines of ours, not of a name
        return "; its last words:" + "".join(lines) if text else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_turns(
    entries: Mapping[str, Entry],
    rounds: int,
    told: Callable[[str], None] = lambda text: None,
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Pictures a second of each contender, one number a round; the order turns round from one round to the next.

    Args:
        entries: contenders by name.
        rounds: turns of each.
        told: is told what goes on.
        seconds: of a turn at least; by default `TURN`.

    Raises:
        ContenderError: one of them cannot be measured.
    """
    rates: dict[str, list[float]] = {name: [] for name in entries}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, entry in entries.items():
            told(f"starting {name}")
            running[name] = stack.enter_context(Contender(name, entry))
        for number in range(rounds):
            for name in list(running) if number % 2 == 0 else reversed(list(running)):
                rates[name].append(running[name].turn(TURN if seconds is None else seconds))
            told(f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {r[-1]:.0f}" for n, r in rates.items()))
    return rates


class Rate(NamedTuple):
    """Pictures a second over the rounds."""

    median: float
    lowest: float
    highest: float
    rounds: int

    @classmethod
    def of(cls, rates: Sequence[float]) -> Rate:
        """The summary of one contender's rounds."""
        return cls(statistics.median(rates), min(rates), max(rates), len(rates))


def ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """How many times as fast as the other: the median over the rounds, so that what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))
