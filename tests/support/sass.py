"""The machine code of the CUDA kernels, read without a GPU by the `cuobjdump` that Triton's wheel carries."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
GUARD = re.compile(r"^@!?U?P\w+\s+")
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
MEMORY = re.compile(r"^(LDG|STG|LD|ST)\.E\b")


def cuobjdump() -> Path | None:
    """The disassembler, of Triton's wheel or on PATH."""
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.exists():
            return carried
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


class Accesses(NamedTuple):
    """Loads and stores of global memory, of 16 bytes and of less, or of memory that the compiler left open."""

    wide_loads: int
    loads: int
    wide_stores: int
    stores: int


class Kernel(NamedTuple):
    """One kernel on one architecture."""

    name: str
    arch: str
    code: tuple[tuple[int, str], ...]  # address and instruction, without its guard

    def accesses(self, first: int = 0, last: int = 1 << 62) -> Accesses:
        """Of the code, or of the part between two addresses."""
        found = [text.split()[0] for at, text in self.code if first <= at <= last and MEMORY.match(text)]
        wide = [text for text in found if ".128" in text]
        kinds = ((wide, "LD"), (found, "LD"), (wide, "ST"), (found, "ST"))
        counts = [sum(text.startswith(kind) for text in some) for some, kind in kinds]
        return Accesses(counts[0], counts[1] - counts[0], counts[2], counts[3] - counts[2])

    def loops(self) -> list[tuple[int, int]]:
        """First and last address of each loop that has no loop inside."""
        found = []
        for at, text in self.code:
            branch = BRANCH.search(text)
            if branch and int(branch[1], 16) < at:
                found.append((int(branch[1], 16), at))
        return [(a, b) for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]

    def streaming(self, instruction: str) -> list[Accesses]:
        """Of each loop that has this instruction."""
        return [
            self.accesses(first, last)
            for first, last in self.loops()
            if any(first <= at <= last and text.startswith(instruction) for at, text in self.code)
        ]


def parse(text: str) -> list[Kernel]:
    """What `cuobjdump -sass` printed."""
    kernels, arch = [], ""
    for part in re.split(r"^\s*(?=Function : |code for sm_)", text, flags=re.M):
        if part.startswith("code for "):
            arch = part.split()[2]
        elif part.startswith("Function : "):
            code = tuple((int(at, 16), GUARD.sub("", line)) for at, line in INSTRUCTION.findall(part))
            kernels.append(Kernel(part.split()[2], arch, code))
    return kernels


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel in an object file or a library, on every architecture."""
    tool = cuobjdump()
    assert tool is not None, "there is no cuobjdump; Triton's wheel has one, as has the CUDA toolkit"
    done = subprocess.run([str(tool), "-sass", str(binary)], capture_output=True, text=True, check=True)
    return parse(done.stdout)
