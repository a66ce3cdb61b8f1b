"""How long a search in a large gallery takes, and how much memory: 100 queries among a million pictures by default.

    python benchmarks/bench_gallery.py [--rows 1000000] [--people 100000] [--width 512] [--numbers float32]

Each contender searches in a process of its own, whose greatest memory (VmHWM, mapped pages of the file included) is
compared with that of the embeddings. The first search of each process finds the file in the page cache; faiss is a
contender where it is installed. Seconds are of five searches: median, least, most; beside them those of processors,
which other work on the machine does not lengthen as much.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import record

from facefast.deploy import gallery_file
from facefast.deploy.gallery import Gallery

QUERIES = 100
SEARCHES = 5
BEST = 5


def main() -> None:
    """Makes the gallery, lets the contenders search, and records what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--people", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--numbers", choices=("float32", "float16"), default="float32")
    parser.add_argument("--folder", type=Path, help="for the file of a few GB; the system's for temporary files")
    parser.add_argument("--search", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.search:
        print(json.dumps(search(*given.search)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "million.gallery"
        make(path, given.rows, given.people, given.width, given.numbers == "float16")
        size = given.rows * given.width * (2 if given.numbers == "float16" else 4)
        answers = set()
        for engine, join in (("torch", "max"), ("torch", "mean"), ("faiss", "max")):
            command = [sys.executable, __file__, "--search", str(path), engine, join]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{engine} {join}: {done.stderr.strip().splitlines()[-1]}")
                continue
            found: dict[str, Any] = json.loads(done.stdout)
            if join == "max":
                answers.add(found.pop("answer"))
            found.pop("answer", None)
            line = record(
                "gallery",
                contender=f"{engine}, {join}",
                rows=given.rows,
                people=given.people,
                width=given.width,
                numbers=given.numbers,
                queries=QUERIES,
                **found,
                memory_to_embeddings=round(found["peak_bytes"] / size, 3),
            )
            print(json.dumps({name: value for name, value in line.items() if name not in ("versions", "machine")}))
        assert len(answers) <= 1, "torch and faiss answer differently"


def make(path: Path, num_rows: int, num_people: int, width: int, half: bool) -> None:
    """A gallery of random directions, written a block at a time."""

    def rows(begin: int, end: int) -> NDArray[np.float32]:
        values = np.random.default_rng(begin).standard_normal((min(end, num_rows) - begin, width), np.float32)
        return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float32)

    people = (np.arange(num_rows) * num_people // num_rows).astype(np.int32)
    names = [f"person {k:07d}" for k in range(num_people)]
    document = {"names": names, "model": "none", "thresholds": {}}
    gallery_file.write(path, people, np.zeros((num_rows, 16), np.uint8), document, width, half, rows)


def search(path: str, engine: str, join: str) -> dict[str, Any]:
    """One contender, in this process."""
    gallery = Gallery(path)
    width = gallery.embeddings.shape[1]
    queries = torch.randn(QUERIES, width, generator=torch.Generator().manual_seed(0))
    queries += 0.5 * gallery.block(0, QUERIES) * width**0.5  # some of them are nearly enrolled
    seconds, work = [], []
    for _ in range(SEARCHES + 1):
        start, used = time.perf_counter(), time.process_time()
        found = gallery.search(queries, BEST, join, engine)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
        work.append(time.process_time() - used)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    return {
        "seconds_first": round(seconds[0], 3),
        "seconds": round(statistics.median(seconds[1:]), 3),
        "lowest": round(min(seconds[1:]), 3),
        "highest": round(max(seconds[1:]), 3),
        "cpu_seconds": round(statistics.median(work[1:]), 3),
        "threads": torch.get_num_threads(),
        "peak_bytes": 1024 * int(peak[1]),
        "answer": json.dumps([found.people.tolist(), np.round(found.scores, 9).tolist()]),
    }


if __name__ == "__main__":
    main()
