"""How fast batch normalisation with its activation and residual is, forward and backward, beside torch's own layers
(eager, and torch.compile of them), and PReLU alone beside torch's.

    python benchmarks/bench_norm.py [--device cuda --dtype bfloat16] [--shapes 32x64x56x56 ...] [--rounds 15]
    python -m pytest benchmarks/bench_norm.py --benchmark-enable

A shape is pictures x channels x height x width, channels last; of PReLU also contiguous on a CPU. Contenders take
turns; compared are the medians over the rounds. On a GPU every run starts from a cold cache. Every time is also
told in plain copies of the tensor in the same rounds. BatchNorm with an activation has to move eight tensors: x for the
statistics, x and y; x and the gradient of y for their sums, both again, and the gradient of x. That is four copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from record import record
from timing import interleaved, options, ratio, summary
from torch import Tensor

from facefast.ops import batch_norm_act, prelu

SHAPES = {
    # Layers of MobileFaceNet at batch 32, and of IResNet-50 at batch 512.
    "cpu": ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7)),
    "cuda": ((512, 64, 112, 112), (512, 64, 56, 56), (512, 128, 28, 28), (512, 256, 14, 14), (512, 512, 7, 7)),
}
THREADS = 1
KINDS = ("prelu", "relu", "residual", "residual relu", "plain", "frozen prelu", "prelu alone", "prelu alone contiguous")
Layers = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def torchs(kind: str, x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor) -> Tensor:
    """What torch's own layers do."""
    if kind.startswith("prelu alone"):
        return F.prelu(x, slope.to(x.dtype))
    mean, var = torch.zeros_like(bias), torch.ones_like(bias)
    out = F.batch_norm(x, mean, var, weight, bias, not kind.startswith("frozen"))
    if "residual" in kind:
        out = out + residual
    return F.prelu(out, slope.to(x.dtype)) if "prelu" in kind else F.relu(out) if "relu" in kind else out


def ours(kind: str, x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor) -> Tensor:
    """The same in one pass."""
    if kind.startswith("prelu alone"):
        return prelu(x, slope)
    mean, var = torch.zeros_like(bias), torch.ones_like(bias)
    return batch_norm_act(
        x,
        weight,
        bias,
        mean,
        var,
        slope=slope if "prelu" in kind else None,
        relu="relu" in kind and "prelu" not in kind,
        residual=residual if "residual" in kind else None,
        training=not kind.startswith("frozen"),
    )


def both_ways(layers: Layers, tensors: tuple[Tensor, ...], upstream: Tensor) -> None:
    """Forward and backward."""
    for tensor in tensors:
        tensor.grad = None
    layers(*tensors).backward(upstream)


def measure(shape: tuple[int, ...], kind: str, rounds: int, device: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds per forward and backward of each contender, one number per round."""
    torch._dynamo.reset()
    form = torch.contiguous_format if kind.endswith("contiguous") else torch.channels_last
    x, residual, upstream = torch.randn(3, *shape, device=device).to(dtype).unbind()
    x, residual, upstream = (t.contiguous(memory_format=form) for t in (x, residual, upstream))
    weight, bias, slope = torch.rand(3, shape[1], device=device).unbind()
    tensors = tuple(t.detach().requires_grad_() for t in (x, weight, bias, slope, residual))
    eager: Layers = functools.partial(torchs, kind)
    contenders: dict[str, Layers] = {
        "facefast": functools.partial(ours, kind),
        "torch": eager,
        "torch.compile": torch.compile(eager),
    }
    runs: dict[str, Callable[[], object]] = {
        name: functools.partial(both_ways, layers, tensors, upstream) for name, layers in contenders.items()
    }
    runs["copy"] = functools.partial(torch.empty_like(upstream).copy_, upstream)
    return interleaved(runs, rounds, device)


def report(shape: tuple[int, ...], kind: str, device: str, dtype: torch.dtype, seconds: dict[str, list[float]]) -> None:
    """Prints a line and records a row for each contender."""
    name = "x".join(map(str, shape))
    for contender, times in seconds.items():
        shown, times_ours = summary(times), ratio(times, seconds["facefast"])
        copies = ratio(times, seconds["copy"])
        print(
            f"{name:18}{kind:24}{contender:15}{shown['milliseconds']:9.3f} ms{copies:8.2f} copies"
            + ("" if contender == "copy" else f"{times_ours:9.2f}x")
        )
        record(
            "norm",
            contender=contender,
            shape=name,
            kind=kind,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            threads=THREADS if device == "cpu" else None,
            **shown,
            copies=round(copies, 2),
            facefast_ratio=None if contender == "copy" else round(times_ours, 3),
        )


@pytest.mark.parametrize("shape", SHAPES["cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_beside_torch(shape: tuple[int, ...], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the command, for `make bench`."""
    torch.set_num_threads(THREADS)
    seconds = measure(shape, kind, 9, "cpu", torch.float32)
    with capsys.disabled():
        report(shape, kind, "cpu", torch.float32, seconds)


def main() -> None:
    shapes, rounds, device, dtype = options(__doc__, SHAPES, "PICTURESxCHANNELSxHEIGHTxWIDTH", 15)
    torch.set_num_threads(THREADS)
    for shape in shapes:
        for kind in KINDS:
            if device == "cpu" or not kind.endswith("contiguous"):
                report(shape, kind, device, dtype, measure(shape, kind, rounds, device, dtype))


if __name__ == "__main__":
    main()
