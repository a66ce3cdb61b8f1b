"""How fast the pre-flight reads and checks photographs, beside Pillow, which reads their headers and checks nothing.

    python -m pytest benchmarks/bench_scan.py --benchmark-enable

The files are 12 KB JPEGs in the page cache: ../shared/data/celeba-mini, or drawn ones where that is not here.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from record import record

from facefast import _scan
from facefast.recipe import Reading

SHARED = Path(__file__).parents[2] / "shared/data/celeba-mini/img_align_celeba"
ROUNDS = 15
BATCH = 128
MAX_PIXELS = Reading.max_pixels


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of JPEG files of about 12 KB, read once so that they are in the page cache."""
    folder = SHARED
    if not folder.is_dir():
        folder = tmp_path_factory.mktemp("photographs")
        rng = np.random.default_rng(0)
        for k in range(2000):
            noise = Image.fromarray(rng.integers(0, 256, (55, 45, 3), np.uint8)).resize((178, 218))
            noise.save(folder / f"{k:06d}.jpg", quality=92)
    paths = sorted(str(path) for path in folder.iterdir())
    for path in paths:
        Path(path).read_bytes()
    return paths


def scan(paths: list[str], threads: int) -> None:
    """The whole check: structure, end marker, size, orientation and content hash."""
    names = np.array([os.fsencode(os.path.basename(path)) for path in paths])
    whole = np.full(len(paths), -1, np.int64)
    root = os.fsencode(os.path.dirname(paths[0]))
    found = _scan.scan(root, names, whole, whole, threads, MAX_PIXELS)
    assert not found["fault"].any()
    assert found["hash"].any(axis=1).all()


def read_headers(paths: list[str]) -> int:
    """What Pillow does at least: format and size."""
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size
    return len(paths)


def read_batches(paths: list[str], threads: int) -> None:
    """What the loader does with every batch."""
    names = np.array([os.fsencode(path) for path in paths])
    whole = np.full(BATCH, -1, np.int64)
    for begin in range(0, len(names) - BATCH + 1, BATCH):
        _, fault, *_ = _scan.read(names[begin : begin + BATCH], whole, whole, threads, MAX_PIXELS)
        assert not fault.any()


@pytest.mark.parametrize("threads", [1, 2])
def test_scan(benchmark: Any, photographs: list[str], threads: int) -> None:
    benchmark(scan, photographs, threads)
    benchmark.extra_info["files"] = len(photographs)


@pytest.mark.parametrize("threads", [1, 2])
def test_read_batches(benchmark: Any, photographs: list[str], threads: int) -> None:
    benchmark(read_batches, photographs, threads)
    benchmark.extra_info["files"] = len(photographs)


@pytest.fixture
def contenders(photographs: list[str]) -> Iterator[dict[str, Callable[[], object]]]:
    """Name -> one pass over all photographs."""
    halves = [photographs[0::2], photographs[1::2]]
    with ProcessPoolExecutor(2) as pool:
        assert sum(pool.map(read_headers, halves)) == len(photographs)
        yield {
            "scan, 2 threads": lambda: scan(photographs, 2),
            "scan, 1 thread": lambda: scan(photographs, 1),
            "read batches, 2 threads": lambda: read_batches(photographs, 2),
            "read batches, 1 thread": lambda: read_batches(photographs, 1),
            "Pillow headers, 2 processes": lambda: list(pool.map(read_headers, halves)),
            "Pillow headers, 1 process": lambda: read_headers(photographs),
        }


def test_scan_beside_pillow(
    contenders: dict[str, Callable[[], object]], photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Contenders take turns, one pass each a round, so that whatever else the machine does hits all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            rates[name].append(len(photographs) / (time.perf_counter() - start))
    with capsys.disabled():
        print(f"\n{len(photographs)} files, median (least, most) of {ROUNDS} rounds; ratio within a round")
        for name, found in rates.items():
            peer = rates[f"Pillow headers, {'2 processes' if '2' in name else '1 process'}"]
            ratio = statistics.median(a / b for a, b in zip(found, peer, strict=True))
            line = record(
                "scan",
                contender=name,
                files=len(photographs),
                mean_bytes=round(statistics.mean(os.path.getsize(path) for path in photographs)),
                files_per_second=round(statistics.median(found)),
                lowest=round(min(found)),
                highest=round(max(found)),
                rounds=ROUNDS,
                ratio_to_pillow=round(ratio, 2),
            )
            print(f"{name:28}{line['files_per_second']:9d} files/s ({line['lowest']}, {line['highest']}) {ratio:6.2f}x")
