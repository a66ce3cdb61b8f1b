"""What an index of very many pictures takes: ten million rows in less than a gigabyte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, LIMIT = 1_000_000, 100
"""Rows, and bytes of each that no step may exceed: ten million are then below 10^9 bytes."""


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Bytes by row of each step, measured by a process that does nothing else."""
    script = Path(__file__).parents[2] / "benchmarks" / "bench_index_scale.py"
    folder = tmp_path_factory.mktemp("scale")
    command = [sys.executable, str(script), "--rows", str(ROWS), "--folder", str(folder), "--print"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("step", ["build", "save", "load", "fingerprint", "filter", "sampler"])
def test_no_step_takes_more_than_a_hundred_bytes_a_row(taken: dict[str, dict[str, float]], step: str) -> None:
    assert 10 < taken[step]["peak_bytes_per_row"] < LIMIT


def test_what_stays_of_an_index_is_its_names_numbers_and_hashes(taken: dict[str, dict[str, float]]) -> None:
    """13 bytes of a path, 4 of a label, 8 of a size, 16 of a hash, and 7 of a tenth of a person's name."""
    assert taken["load"]["kept_bytes_per_row"] < 60
