"""How fast the focal loss is, forward and backward, beside torch (eager row operations, torch.compile of them) and,
on a GPU, beside Liger, quack and apex where they are importable.

    python benchmarks/bench_focal.py [--device cuda --dtype bfloat16] [--shapes 256x1000 ...] [--rounds 15]
    python -m pytest benchmarks/bench_focal.py --benchmark-enable

Every contender gives the loss of each row, then the gradient for a random upstream gradient. They take turns; compared
are the medians over the rounds. GB/s counts the bytes that have to move (logits read twice, gradient written once),
beside the bandwidth of a plain copy measured in the same rounds. On a GPU every run starts from a cold cache, and two
more columns say what its milliseconds, between two events, are made of: microseconds that the host is kept, without
waiting for the device, and microseconds of kernels, by the profiler.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from libraries import library, missing
from record import record
from timing import host_microseconds, interleaved, kernel_microseconds, options, ratio, summary
from torch import Tensor

from facefast.ops import focal_loss

SHAPES = {
    "cpu": ((4096, 2), (4096, 40), (256, 1000), (256, 10177), (128, 100_000)),
    "cuda": ((4096, 2), (4096, 40), (32768, 1000), (32768, 1001), (8192, 10177), (1024, 100_000), (128, 1_000_000)),
}
THREADS = 2
GAMMA = 2.0
# Of N * C numbers of the matrix: what a contender has to move.
MOVED = {"copy": 2, "facefast forward": 1, "facefast backward": 2}
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy and row operations: what a user of torch writes."""
    return _focal(F.cross_entropy(logits, target, reduction="none").float())


def native(logits: Tensor, target: Tensor) -> Tensor:
    """Ours."""
    return focal_loss(logits, target, gamma=GAMMA, reduction="none")


def _focal(cross_entropy: Tensor) -> Tensor:
    return (-torch.expm1(-cross_entropy)) ** GAMMA * cross_entropy


def peers(device: str) -> dict[str, Loss]:
    """torch's two ways, and the cross entropies of other libraries that are here, each with the same row operations."""
    found: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager)}
    if device == "cuda":
        if liger := library("liger"):
            # Liger writes the gradient over its input: it gets a copy, or the next run would read gradients.
            cross = liger.liger_cross_entropy
            found["liger"] = lambda x, y: _focal(cross(x.clone(), y, reduction="none").float())
        if quack := library("quack"):
            found["quack"] = lambda x, y: _focal(quack.cross_entropy(x, y, reduction="none").float())
        if apex := library("apex"):
            fused = apex.SoftmaxCrossEntropyLoss.apply
            found["apex"] = lambda x, y: _focal(fused(x, y, 0.0, -100, x.dtype == torch.float16).float())
    return found


def both_ways(loss: Loss, logits: Tensor, target: Tensor, upstream: Tensor) -> None:
    """Forward and backward; the gradient is fresh memory each time, as in training."""
    logits.grad = None
    loss(logits, target).backward(upstream)


class Measured(NamedTuple):
    """What a shape's contenders took."""

    seconds: dict[str, list[float]]
    """Per forward and backward, one number per round."""
    host: dict[str, float]
    """Microseconds of the host's, on a GPU."""
    kernels: dict[str, float | None]
    """Microseconds of kernels, on a GPU."""


def measure(rows: int, classes: int, rounds: int, device: str, dtype: torch.dtype) -> Measured:
    """What each contender takes."""
    torch._dynamo.reset()
    logits = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
    target, upstream = torch.randint(0, classes, (rows,), device=device), torch.rand(rows, device=device)
    source, copied = torch.randn(rows, classes, device=device).to(dtype), torch.empty_like(logits, requires_grad=False)
    runs: dict[str, Callable[[], object]] = {
        name: functools.partial(both_ways, f, logits, target, upstream)
        for name, f in {"facefast": native, **peers(device)}.items()
    }
    numbers = (GAMMA, 0.0, 1.0, 1.0, -100, 1.0, 0.0, 0.0, False, 0)
    ops, plain = torch.ops.facefast, logits.detach()
    _, stats, count = ops.focal_forward(plain, target, None, None, *numbers)
    runs["facefast forward"] = lambda: ops.focal_forward(plain, target, None, None, *numbers)
    runs["facefast backward"] = lambda: ops.focal_backward(upstream, plain, target, None, None, stats, count, *numbers)
    runs["copy"] = lambda: copied.copy_(source)
    seconds = interleaved(runs, rounds, device)
    if device != "cuda":
        return Measured(seconds, {}, {})
    host = {name: host_microseconds(run) for name, run in runs.items()}
    return Measured(seconds, host, {name: kernel_microseconds(run) for name, run in runs.items()})


def report(rows: int, classes: int, device: str, dtype: torch.dtype, measured: Measured) -> None:
    """Prints a table and records a row for each contender."""
    seconds = measured.seconds
    size = rows * classes * dtype.itemsize
    kind = str(dtype).removeprefix("torch.")
    print(f"\n{rows} x {classes} {kind} on {device}, {len(seconds['copy'])} rounds")
    print(f"{'':18}{'ms':>9}{'lowest':>9}{'highest':>9}{'GB/s':>8}{'host us':>9}{'kernels us':>12}{'facefast is':>13}")
    for name, times in seconds.items():
        shown = summary(times)
        bandwidth = MOVED.get(name, 3) * size / statistics.median(times) / 1e9
        times_ours = ratio(times, seconds["facefast"])
        host, kernels = measured.host.get(name), measured.kernels.get(name)
        print(
            f"{name:18}{shown['milliseconds']:9.3f}{shown['lowest']:9.3f}{shown['highest']:9.3f}{bandwidth:8.1f}"
            f"{_micro(host):>9}{_micro(kernels):>12}" + ("" if name in MOVED else f"{times_ours:12.2f}x")
        )
        record(
            "focal",
            contender=name,
            rows=rows,
            classes=classes,
            dtype=kind,
            device=device,
            threads=THREADS if device == "cpu" else None,
            **shown,
            gigabytes_per_second=round(bandwidth, 1),
            host_microseconds=None if host is None else round(host, 1),
            kernel_microseconds=None if kernels is None else round(kernels, 1),
            facefast_ratio=None if name in MOVED else round(times_ours, 3),
        )
    for name in missing("liger", "quack", "apex"):
        print(f"{name:18}{'not run: not importable here':>35}")


def _micro(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@pytest.mark.parametrize(("rows", "classes"), SHAPES["cpu"])
def test_focal_beside_torch(rows: int, classes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the command, for `make bench`."""
    torch.set_num_threads(THREADS)
    measured = measure(rows, classes, 15, "cpu", torch.float32)
    with capsys.disabled():
        report(rows, classes, "cpu", torch.float32, measured)


def main() -> None:
    shapes, rounds, device, dtype = options(__doc__, SHAPES, "ROWSxCLASSES", 15)
    torch.set_num_threads(THREADS)
    for rows, classes in shapes:
        report(rows, classes, device, dtype, measure(rows, classes, rounds, device, dtype))


if __name__ == "__main__":
    main()
