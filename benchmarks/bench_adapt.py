"""How long a million embeddings take to adapt, and how much memory: scatter of people, choice of the shrinkage by
people left out, the map, and the mapped embeddings in place of the given ones.

    python benchmarks/bench_adapt.py [--rows 1000000] [--people 100000] [--width 512] [--runs 3]

Each run is a process of its own, whose greatest memory (VmHWM) less what it took before the embeddings were there is
compared with that of the embeddings. Seconds are of the clock, beside them those of processors, which other work on
the machine does not lengthen as much.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record

from facefast.recipe import AdaptConfig
from facefast.runtime.process import Runtime, World
from facefast.training.adapt import adapt_embeddings

BLOCK = 8192


def main() -> None:
    """Measures each run in its own process and records them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--people", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(once(given.rows, given.people, given.width)))
        return
    found: list[dict[str, Any]] = []
    for _ in range(given.runs):
        command = [
            sys.executable,
            __file__,
            "--once",
            *(f"--{n}={getattr(given, n)}" for n in ("rows", "people", "width")),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(found[-1], flush=True)
    seconds = [one["seconds"] for one in found]
    line = record(
        "adapt",
        rows=given.rows,
        people=given.people,
        width=given.width,
        seconds=statistics.median(seconds),
        lowest=min(seconds),
        highest=max(seconds),
        cpu_seconds=statistics.median(one["cpu_seconds"] for one in found),
        memory_to_embeddings=max(one["memory_to_embeddings"] for one in found),
        threads=found[0]["threads"],
        shrinkage=found[0]["shrinkage"],
    )
    print(json.dumps({name: value for name, value in line.items() if name not in ("versions", "machine")}))


def once(num_rows: int, num_people: int, width: int) -> dict[str, Any]:
    """One run, in this process."""
    before = _peak()
    generator = torch.Generator().manual_seed(0)
    labels = (np.arange(num_rows) * num_people // num_rows).astype(np.int64)
    centres = torch.randn(num_people, width, generator=generator)
    spread = torch.linspace(2.0, 0.2, width)  # unlike in the directions: there is something to whiten
    embeddings = torch.empty(num_rows, width)
    for start in range(0, num_rows, BLOCK):
        block = embeddings[start : start + BLOCK]
        torch.randn(block.shape, generator=generator, out=block)
        block.mul_(spread).add_(centres[torch.from_numpy(labels[start : start + BLOCK])])
    del centres
    # People in no order, as an index may have them.
    order = np.random.default_rng(0).permutation(num_people)
    labels = order[labels]
    run = Runtime(World(0, 1, 0, 1), torch.device("cpu"))
    began, used = time.perf_counter(), time.process_time()
    found = adapt_embeddings(embeddings, torch.ones(num_rows, dtype=torch.bool), labels, AdaptConfig("auto"), run, 0)
    seconds, work = time.perf_counter() - began, time.process_time() - used
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(work, 2),
        "memory_to_embeddings": round((_peak() - before) / (embeddings.numel() * 4), 3),
        "threads": torch.get_num_threads(),
        "shrinkage": found.shrinkage,
    }


def _peak() -> int:
    """Greatest memory of this process so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
