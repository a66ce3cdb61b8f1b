"""How much memory and time an index of ten million pictures of a million people takes, step by step.

    python benchmarks/bench_index_scale.py [--rows N] [--folder DIR] [--print]

Each step begins with an index as a run has it. Its peak is what the process held at most beyond what it held before
there was an index (imports alone take half a gigabyte). --print writes JSON instead of a row of results.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facefast.data import FaceIndex, make_sampler

EACH = 10
"""Pictures of a person."""
BATCH = 512


def status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def give_back() -> None:
    """Leaves no memory with the process that nothing uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def synthetic(rows: int) -> FaceIndex:
    """A scanned index of paths like 0001234/5.jpg."""
    people = rows // EACH
    folders = np.char.mod(b"%07d/", np.arange(people)).astype(np.bytes_)
    files = np.char.mod(b"%d.jpg", np.arange(EACH)).astype(np.bytes_)
    paths: NDArray[np.bytes_] = np.char.add(np.repeat(folders, EACH), np.tile(files, people))  # type: ignore[assignment]
    names = [f"{number:07d}" for number in range(people)]
    index = FaceIndex.build("/photographs", paths, np.repeat(np.arange(people, dtype=np.int32), EACH), names)
    numbers = np.random.default_rng(0)
    return dataclasses.replace(
        index,
        widths=numbers.integers(100, 300, rows, np.int32),
        heights=numbers.integers(100, 300, rows, np.int32),
        hashes=numbers.integers(1, 1 << 63, (rows, 2), np.uint64),
    )


def measure(rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds, and bytes by row at most and afterwards, of each step."""
    found: dict[str, dict[str, float]] = {}
    synthetic(EACH).facts()  # what is imported late
    give_back()
    base = status("VmRSS")

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        give_back()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from now
        began = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - began, status("VmHWM")
        give_back()
        found[name] = {
            "seconds": round(seconds, 3),
            "peak_bytes_per_row": round((peak - base) / rows, 1),
            "kept_bytes_per_row": round((status("VmRSS") - base) / rows, 1),
        }

    path = folder / "index.npz"
    with step("build"):
        index = synthetic(rows)
    with step("save"):
        index.save(path)
    del index
    with step("load"):
        index = FaceIndex.load(path)
    with step("fingerprint"):
        index.facts()
    with step("filter"):
        part = index.select(np.arange(rows) % EACH != 0)
    del part
    with step("sampler"):
        sampler = make_sampler("epoch", index.labels, BATCH)
        for number in range(sampler.steps_per_epoch):
            sampler.batch(0, number)
    path.unlink()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--print", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.rows, given.folder or Path(folder))
    if given.print:
        print(json.dumps(found))
        return
    from record import record  # beside this file

    print(json.dumps(record("index_scale", rows=given.rows, people=given.rows // EACH, steps=found), indent=1))


if __name__ == "__main__":
    main()
