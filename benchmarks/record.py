"""Writes a measurement to benchmarks/results/NAME.jsonl ($OUT/NAME.jsonl where OUT is set) with what it takes to
judge it: machine, versions, commit."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from facefast.runtime.machine import machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def record(name: str, **fields: Any) -> dict[str, Any]:
    """Appends `fields`, JSON values such as medians, spreads and ratios, as one line; returns the whole line."""
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        **fields,
        "machine": machine(),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def commit() -> str:
    """Short hash of HEAD, with a + where files in the tree differ from it."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
