"""How many cores a process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process is bound to, and no more than its container's CPU limit, which the binding does not show.

    Args:
        groups: where the kernel keeps control groups.
        own: which of them this process is in.
    """
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(groups, own)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control groups of this process allow, the strictest counts; None for no limit."""
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in [groups] if not controllers else [groups / "cpu", groups / controllers]:
            # In a container the path may be the machine's, which it cannot see: then the top is its own group.
            place = base / path.lstrip("/")
            for folder in [place, *place.parents]:
                if folder.is_relative_to(base):
                    found += _limits(folder)
    return min(found, default=None)


def _limits(folder: Path) -> list[float]:
    with contextlib.suppress(ValueError):
        quota, period = (*_read(folder / "cpu.max").split(), "", "")[:2]  # version 2
        if quota not in ("", "max"):
            return [int(quota) / int(period)]
    with contextlib.suppress(ValueError):
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))  # version 1
        if int(quota) > 0:
            return [int(quota) / int(period)]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
