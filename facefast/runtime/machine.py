"""What a measurement of speed is a measurement of: processor, cores, memory, GPU, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VECTORS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Widest first: processors that share a name, as a cloud's do, differ in these by several times their speed."""
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "pillow", "timm")


def machine() -> dict[str, Any]:
    """Processor, its widest instructions, usable cores, memory in GiB, load and, where torch is loaded and finds one,
    the GPU."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    models = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    facts: dict[str, Any] = {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),
    }
    flags = next((set(line.split()) for line in described if line.startswith("flags")), set())
    if widest := next((name for flag, name in VECTORS.items() if flag in flags), None):
        facts["vectors"] = widest
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def key(facts: Mapping[str, Any]) -> str:
    """Eight hex digits, the same for every machine of one kind: what was busy on it does not count.

    Args:
        facts: as `machine` gives them.
    """
    told = [f"{name} {facts.get(name)}" for name in ("cpu", "cores", "memory", "gpu")]
    told += [facts["vectors"]] if "vectors" in facts else []  # the oldest rows do not say it
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


def versions() -> dict[str, str]:
    """Python and the packages that a measurement may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
