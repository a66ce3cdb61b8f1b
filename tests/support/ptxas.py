"""What the compiler said of the CUDA kernels when they were built (setup.py leaves it in build/ptxas)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

REPORTS = Path(__file__).parents[2] / "build" / "ptxas"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


class Kernel(NamedTuple):
    """Registers of a thread; bytes of stack and of spills."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def kernels(source: str) -> list[Kernel]:
    """Every kernel of one `.cu` file, on every architecture."""
    text = (REPORTS / f"{Path(source).stem}.txt").read_text()
    found = [
        Kernel(e["name"], e["arch"], int(e["registers"]), int(e["stack"]), int(e["stores"]) + int(e["loads"]))
        for e in ENTRY.finditer(text)
    ]
    assert len(found) == text.count("Compiling entry function") > 0
    return found
