"""A head with very many classes: what a training step of it costs in time and memory, beside torch.

    python benchmarks/bench_linear_focal.py [--device cuda --dtype bfloat16] [--shapes 256x128x10177 ...]
    python -m pytest benchmarks/bench_linear_focal.py --benchmark-enable

Embeddings x [N, D] and class directions W [C, D] to the ArcFace focal loss and both gradients. Contenders:
  insightface    cosines, clamp, arccos, + margin, cos, * scale, cross entropy, row operations: as public code has it
  torch.compile  the same, compiled
  facefast       cosines by F.linear, then one focal_loss with the margin in it
  fused          linear_focal_loss: the cosines are never in memory as a whole
  kept           linear_focal_loss that keeps the products for the backward pass
  chosen         linear_focal_loss that chooses between the two by what was measured
and on a GPU, where they are importable and run, fused heads that know no margin, with plain cross entropy of the same
scaled cosines, which is less than the others do:
  liger, plain softmax without margin      Liger's fused linear cross entropy
  quack, plain softmax without margin      quack's chunked linear cross entropy
Memory is the greatest sum of tensors alive beyond x, W and what was there before, on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from record import record
from timing import interleaved, options, ratio, summary
from torch import Tensor

from facefast.ops import Arc, focal_loss, linear_focal_loss

SHAPES = {
    "cpu": ((256, 128, 10177), (256, 128, 100_000)),
    "cuda": ((4096, 512, 10177), (1024, 512, 100_000), (4096, 512, 100_000), (4096, 512, 1_000_000)),
}
THREADS = 2
GAMMA, MARGIN, SCALE = 2.0, 0.3, 32.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def insightface(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """ArcFace by the angle, in float32, then cross entropy and row operations."""
    cosine = F.linear(F.normalize(x), F.normalize(weight)).float().clamp(-1 + 1e-6, 1 - 1e-6)
    rows = torch.arange(len(target), device=target.device)
    angle = cosine.arccos()
    moved = angle.index_put((rows, target), angle[rows, target] + MARGIN)
    cross_entropy = F.cross_entropy(moved.cos() * SCALE, target, reduction="none")
    return ((-torch.expm1(-cross_entropy)) ** GAMMA * cross_entropy).mean()


def separate(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Ours with the cosines in memory."""
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    return focal_loss(cosine, target, gamma=GAMMA, margin=Arc(MARGIN), scale=SCALE)


def fused(x: Tensor, weight: Tensor, target: Tensor, keep: bool | None = False) -> Tensor:
    """Ours without them, or with the products kept."""
    return linear_focal_loss(x, weight, target, normalize=True, gamma=GAMMA, margin=Arc(MARGIN), scale=SCALE, keep=keep)


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's head: no margin, no focal weight."""
    module = library("liger")
    assert module is not None
    loss: Tensor = module.liger_fused_linear_cross_entropy(F.normalize(x) * SCALE, F.normalize(weight), target)
    return loss


def quack(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """quack's head: no margin, no focal weight."""
    module = library("quack linear")
    assert module is not None
    loss: Tensor = module.chunked_linear_cross_entropy(F.normalize(x) * SCALE, F.normalize(weight), target)
    return loss


PLAIN: dict[str, tuple[str, Loss]] = {
    "liger, plain softmax without margin": ("liger", liger),
    "quack, plain softmax without margin": ("quack linear", quack),
}
"""Heads of other libraries: contender -> name in `libraries.MODULES`, and how it is called."""


def contenders(matrix_bytes: int, device: str = "cpu") -> dict[str, Loss]:
    """Those whose memory the machine has: torch's keep some ten matrices [N, C] in float32."""
    found: dict[str, Loss] = {"facefast": separate, "fused": fused}
    found |= {"kept": functools.partial(fused, keep=True), "chosen": functools.partial(fused, keep=None)}
    if matrix_bytes < 2 << 30:
        found |= {"insightface": insightface, "torch.compile": torch.compile(insightface)}
    if device == "cuda":
        found |= {name: loss for name, (module, loss) in PLAIN.items() if library(module)}
    return found


def running(runs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Without the heads of other libraries that do not run here, of which it says why."""
    found = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:
            if name not in PLAIN:
                raise
            print(f"{name}: not run: {type(error).__name__}: {error}")
        else:
            found[name] = run
    return found


def measure(
    rows: int, dim: int, classes: int, rounds: int, device: str, dtype: torch.dtype
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per forward and backward, one number per round; and on a GPU the peak memory in MiB."""
    torch._dynamo.reset()
    x, weight = (torch.randn(n, dim, device=device).to(dtype).requires_grad_() for n in (rows, classes))
    target = torch.randint(0, classes, (rows,), device=device)

    def step(loss: Loss) -> None:
        x.grad = weight.grad = None
        loss(x, weight, target).backward()

    wanted = contenders(rows * classes * dtype.itemsize, device)
    runs = running({name: functools.partial(step, loss) for name, loss in wanted.items()})
    peaks = {}
    if device == "cuda":
        for name, run in runs.items():
            run()
            x.grad = weight.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return interleaved(runs, rounds, device), peaks


def report(
    shape: tuple[int, int, int],
    device: str,
    dtype: torch.dtype,
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
) -> None:
    """Prints a table and records a row for each contender."""
    rows, dim, classes = shape
    kind = str(dtype).removeprefix("torch.")
    print(f"\nhead {rows} x {dim} to {classes} classes, {kind} on {device}, {len(seconds['facefast'])} rounds")
    print(f"{'':36}{'ms':>10}{'lowest':>10}{'highest':>10}{'MiB':>9}{'facefast is':>13}")
    for name, times in seconds.items():
        shown, times_ours = summary(times), ratio(times, seconds["facefast"])
        print(
            f"{name:36}{shown['milliseconds']:10.3f}{shown['lowest']:10.3f}{shown['highest']:10.3f}"
            f"{format(peaks[name], '.0f') if name in peaks else '-':>9}{times_ours:12.2f}x"
        )
        record(
            "linear_focal",
            contender=name,
            rows=rows,
            dim=dim,
            classes=classes,
            dtype=kind,
            device=device,
            threads=THREADS if device == "cpu" else None,
            **shown,
            peak_mebibytes=round(peaks[name], 1) if name in peaks else None,
            facefast_ratio=round(times_ours, 3),
        )

    for name, (module, _) in PLAIN.items():
        if device != "cuda" or library(module) is None:
            print(f"{name:36}not run: {'needs a GPU' if device != 'cuda' else 'not importable here'}")


def table_line(shape: tuple[int, int, int], seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    """The shape's line of `MEASURED` in facefast/ops/linear_focal.py: logits a chunk at a time beside logits kept."""
    rows, _, classes = shape
    times = ", ".join(f"{summary(seconds[name])['milliseconds']:.3f}" for name in ("fused", "kept"))
    return f"Measured({rows}, {classes:_}, {times}, {peaks['fused']:.1f}, {peaks['kept']:.1f}),"


@pytest.mark.parametrize("shape", SHAPES["cpu"])
def test_heads_beside_torch(shape: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the command, for `make bench`."""
    torch.set_num_threads(THREADS)
    measured = measure(*shape, 7, "cpu", torch.float32)
    with capsys.disabled():
        report(shape, "cpu", torch.float32, *measured)


def main() -> None:
    shapes, rounds, device, dtype = options(__doc__, SHAPES, "ROWSxDIMxCLASSES", 9)
    torch.set_num_threads(THREADS)
    lines = []
    for rows, dim, classes in shapes:
        shape = (rows, dim, classes)
        measured = measure(*shape, rounds, device, dtype)
        report(shape, device, dtype, *measured)
        if device == "cuda":
            lines.append(table_line(shape, *measured))
    if lines:
        print("\nMEASURED of facefast/ops/linear_focal.py, kept logits as the separate ones:", *lines, sep="\n    ")


if __name__ == "__main__":
    main()
