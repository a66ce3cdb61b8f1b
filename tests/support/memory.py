"""What torch's allocator gave out while something ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any], trace: Path) -> int:
    """The most that torch's allocator had out at a time during function(), above what it had before."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        function()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals: list[int] = [event["args"]["Total Allocated"] for event in events]
    first: int = events[0]["args"]["Bytes"]
    assert first > 0
    return max(totals) - (totals[0] - first)
