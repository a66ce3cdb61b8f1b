"""Writes a measurement to benchmarks/results/NAME.jsonl ($OUT/NAME.jsonl where OUT is set) with what it takes to
judge it: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "pillow", "timm")


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


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB and, where torch is loaded and finds one, the GPU."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    models = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    facts: dict[str, Any] = {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Python and the packages that a measurement may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
