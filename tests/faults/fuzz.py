"""Damaged files by the thousand, each read in a worker that may crash, hang, or take too much memory.

    python -m tests.faults.fuzz [--number 2000] [--seed 0] [FORMAT ...]

Mutation k of a format depends on the seed, k and the format's name alone: `--begin K --number 1` does it again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.ranks import ROOT

HANG_SECONDS = 10.0
PEAK_BYTES = 2 << 30
START_SECONDS = 300.0


@dataclass
class Outcome:
    """What became of the mutations of one format."""

    read: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    """Others than the named ones."""
    too_large: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Of refusals, without their numbers."""
    peak_bytes: int = 0
    slowest: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Everything that must not be."""
        return self.crashes + self.hangs + self.exceptions + self.too_large


@dataclass(frozen=True)
class Order:
    """What is to be read: mutations `begin` to `begin + number` of each format, one format after the other."""

    names: Sequence[str]
    number: int
    seed: int = 0
    begin: int = 0

    def __len__(self) -> int:
        return len(self.names) * self.number

    def at(self, place: int) -> tuple[str, int]:
        """Format and mutation."""
        return self.names[place // self.number], self.begin + place % self.number


def fuzz(order: Order, hang_seconds: float = HANG_SECONDS, peak: int = PEAK_BYTES) -> dict[str, Outcome]:
    """What becomes of each format's mutations."""
    outcomes, place = {name: Outcome() for name in order.names}, 0
    with tempfile.TemporaryDirectory() as folder:
        while place < len(order):
            place = _one_worker(order, place, Path(folder), outcomes, hang_seconds, peak)
    return outcomes


def _one_worker(
    order: Order, place: int, folder: Path, outcomes: dict[str, Outcome], hang_seconds: float, peak: int
) -> int:
    """Lets a worker go on until it ends or has to be ended; the first place that is left."""
    given = json.dumps([list(order.names), order.number, order.seed, order.begin])
    command = [sys.executable, "-m", "tests.faults.fuzz", "--worker", given, str(place), str(folder)]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    heard = open(folder / "stderr", "w+b")  # noqa: SIM115 -- closed below
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=heard, env=variables, cwd=ROOT)
    assert worker.stdout is not None
    lines, rest, seconds = select.poll(), b"", START_SECONDS
    lines.register(worker.stdout, select.POLLIN)
    try:
        while True:
            if not lines.poll(seconds * 1000):
                name, number = order.at(place)
                outcomes[name].hangs.append(f"mutation {number}: no end after {seconds:g} s")
                return place + 1
            part = os.read(worker.stdout.fileno(), 1 << 16)
            if not part:
                break
            rest += part
            *whole, rest = rest.split(b"\n")
            for line in whole:
                # Sound files come first, and with them all that is imported for a format.
                seconds = START_SECONDS if line == b"next" else hang_seconds
                if line not in (b"next", b"ready"):
                    _note(json.loads(line), outcomes[order.at(place)[0]], hang_seconds, peak)
                    place += 1
            if place == len(order):
                return place
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
        heard.seek(0)
        said = heard.read().decode(errors="replace")
        heard.close()
    name, number = order.at(place)
    if seconds == START_SECONDS:
        raise RuntimeError(f"sound files of {name} are not read: {said[-2000:]}")
    last = said.strip().splitlines()[-1:] or [""]
    outcomes[name].crashes.append(f"mutation {number}: ended with {worker.returncode} ({last[0]:.200})")
    return place + 1


def _note(line: dict[str, Any], outcome: Outcome, hang_seconds: float, peak: int) -> None:
    number = int(line["number"])
    if line["error"] is None:
        outcome.read += 1
    elif line["named"]:
        outcome.refused += 1
        outcome.reasons[re.sub(r"/\S+|[0-9]+", "_", line["error"])[:90]] += 1
    else:
        outcome.exceptions.append(f"mutation {number}: {line['error']}")
    if line["seconds"] > hang_seconds:
        outcome.hangs.append(f"mutation {number}: {line['seconds']:.1f} s")
    if line["peak"] > peak:
        outcome.too_large.append(f"mutation {number}: {line['peak'] >> 20} MB")
    outcome.peak_bytes = max(outcome.peak_bytes, line["peak"])
    outcome.slowest = max(outcome.slowest, line["seconds"])


# The worker.


def _work(order: Order, first: int, folder: Path) -> None:
    from facefast.runtime.exits import StorageError
    from tests.faults.formats import FORMATS

    warnings.simplefilter("ignore")
    output = os.dup(1)
    os.dup2(2, 1)  # what a reader prints is no line of ours
    last, base = "", Path(tempfile.mkdtemp(dir=folder))
    for place in range(first, len(order)):
        name, number = order.at(place)
        form = FORMATS[name]
        if name != last:
            os.write(output, b"next\n")
            last, home = name, Path(tempfile.mkdtemp(dir=base))
            seeds = form.seeds(home)
            for data in seeds:  # what is not damaged must be read
                form.write(home, data)
                form.read(home)
            if place == first:
                _limit()
            os.write(output, b"ready\n")
        rng = np.random.default_rng([order.seed, number, zlib.crc32(name.encode())])
        form.write(home, form.mutated(seeds, rng))
        reset_peak()
        began = time.monotonic()
        error, named = None, False
        try:
            form.read(home)
        except (ValueError, StorageError) as refused:
            error, named = f"{type(refused).__name__}: {refused}", not isinstance(refused, UnicodeError)
        except Exception as other:
            error = f"{type(other).__name__}: {other}"
        line = {
            "number": number,
            "error": error and error[:300],
            "named": named,
            "seconds": time.monotonic() - began,
            "peak": max(peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10),
        }
        os.write(output, json.dumps(line).encode() + b"\n")


def _limit() -> None:
    """Turns what runs away into a MemoryError, before it takes the machine along."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * PEAK_BYTES,) * 2)


def reset_peak() -> None:
    """Lets `peak_bytes` count from now on."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_bytes() -> int:
    """The most memory that this process had at a time."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def main(arguments: Sequence[str]) -> int:
    """The command; 1 where anything was found."""
    if arguments[:1] == ["--worker"]:
        order, first, folder = arguments[1:]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        _work(Order(*json.loads(order)), int(first), Path(folder))
        return 0
    from tests.faults.formats import FORMATS, PLANTED

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=[name for name in FORMATS if name != PLANTED])
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--reasons", action="store_true", help="count what refusals say")
    given = parser.parse_args(arguments)
    found = 0
    for name in given.formats:
        began = time.monotonic()
        outcome = fuzz(Order([name], given.number, given.seed, given.begin))[name]
        found += len(outcome.faults)
        print(
            f"{name}: {outcome.read} read, {outcome.refused} refused, {len(outcome.crashes)} crashes, "
            f"{len(outcome.hangs)} hangs, {len(outcome.exceptions)} other exceptions, {len(outcome.too_large)} too "
            f"large; peak {outcome.peak_bytes >> 20} MB, slowest {outcome.slowest:.2f} s, all in "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        for fault in outcome.faults[:20]:
            print(f"  {fault}", flush=True)
        for reason, count in outcome.reasons.most_common() if given.reasons else ():
            print(f"  {count} {reason}", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
