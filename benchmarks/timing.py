"""Contenders timed in turns, one burst each per round, on the CPU or on a GPU."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

BURST = 0.03  # seconds of work in a turn
FLUSH = 256 << 20  # bytes written between runs on a GPU: more than its cache
FLUSHING = "bitwise_not"
"""In the name of the kernel that empties the cache while others are profiled: no contender has one of that name."""
CALLS = 50  # whose time on the host, and whose kernels' time, is taken


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", burst: float = BURST
) -> dict[str, list[float]]:
    """Seconds per run of each contender, one number per round; on a GPU by its own clock, from a cold cache."""
    clock = _on_gpu if device == "cuda" else _on_cpu
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        repeats[name] = max(1, min(200, round(burst / clock(run, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 else reversed(list(runs)):
            seconds[name].append(clock(runs[name], repeats[name]))
    return seconds


def _on_cpu(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _on_gpu(run: Callable[[], object], repeats: int) -> float:
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in events]
    return statistics.median(milliseconds) / 1000


def host_microseconds(run: Callable[[], object], calls: int = CALLS, wait: Callable[[], object] | None = None) -> float:
    """How long a call keeps the host, which launches and does not wait: the median.

    Args:
        run: a contender, warm.
        calls: how many are timed.
        wait: called in between, untimed, so that no call waits for room in the device's queue; None synchronises.
    """
    wait = wait or torch.cuda.synchronize
    seconds = []
    for _ in range(calls):
        wait()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    wait()
    return 1e6 * statistics.median(seconds)


def kernel_microseconds(run: Callable[[], object], calls: int = CALLS) -> float | None:
    """The time of a call's kernels on the GPU, added up, by CUPTI's clocks: a mean over the calls, each from a cold
    cache; None where the profiler sees none, for it has no rights to the counters or another one is at work."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    flush.bitwise_not_()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            flush.bitwise_not_()
            run()
        torch.cuda.synchronize()
    return device_microseconds(profile.events() or (), calls)


def device_microseconds(events: Iterable[Any], calls: int) -> float | None:
    """What the events of a profile took on the device, per call, without those that emptied the cache.

    Args:
        events: as `torch.profiler.profile.events` gives them; spans that a user named count for nothing, for they
            cover kernels that are there as well.
    """
    found = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type != torch._C._autograd.DeviceType.CPU
        and not getattr(event, "is_user_annotation", False)
        and FLUSHING not in event.name
    ]
    return sum(found) / calls if found else None


def summary(times: list[float]) -> dict[str, float]:
    """Median, lowest and highest in milliseconds, for `record`."""
    return {
        "milliseconds": round(1e3 * statistics.median(times), 4),
        "lowest": round(1e3 * min(times), 4),
        "highest": round(1e3 * max(times), 4),
        "rounds": len(times),
    }


def ratio(times: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over the rounds."""
    return statistics.median(t / o for t, o in zip(times, ours, strict=True))


def options(
    description: str | None, shapes: Mapping[str, tuple[tuple[int, ...], ...]], form: str, rounds: int
) -> tuple[list[tuple[int, ...]], int, str, torch.dtype]:
    """The command line of a loss benchmark: shapes, rounds, device and dtype; by default the device's own shapes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--shapes", nargs="+", help=form)
    parser.add_argument("--rounds", type=int, default=rounds)
    given = parser.parse_args()
    wished = [tuple(map(int, shape.split("x"))) for shape in given.shapes or ()]
    return wished or list(shapes[given.device]), given.rounds, given.device, getattr(torch, given.dtype)
