"""Linear layer and focal loss in one, for heads with so many classes that their logits do not fit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from facefast.ops import native, reference
from facefast.ops.arguments import check_focal, check_linear
from facefast.ops.focal import kernel_options
from facefast.ops.margins import Margin


class Measured(NamedTuple):
    """What a step of a head cost, forward and backward: milliseconds, and MiB beyond its operands."""

    rows: int
    classes: int
    fused: float
    """`linear_focal_loss`, logits a chunk at a time."""
    separate: float
    """Normalised operands, cosines in memory, `focal_loss`."""
    fused_memory: float
    separate_memory: float


MEASURED = (
    Measured(4096, 10_177, 0.928, 1.681, 58.6, 173.6),
    Measured(1024, 100_000, 1.852, 2.483, 134.1, 491.1),
    Measured(4096, 100_000, 6.174, 5.371, 146.2, 1666.1),
    Measured(4096, 1_000_000, 61.635, 51.235, 1028.7, 16609.6),
)
"""One H100 80 GB (SXM), bfloat16, D = 512, torch 2.11, by benchmarks/bench_linear_focal.py at commit 38a4e01 on 26
November 2026, before the kernels read and wrote 16 bytes at a time. torch.compile of the same: 1.050, 2.552 and 9.100
ms, not run on the last."""


def keeps_logits(x: Tensor, classes: int, measured: tuple[Measured, ...] = MEASURED) -> bool:
    """Whether `linear_focal_loss` of x [N, D] is expected to gain by keeping its logits, going by the measured shape
    that is nearest in the logarithms of rows and classes.

    Only 16-bit numbers on a GPU have been measured; all others keep nothing.
    """
    if x.device.type != "cuda" or x.element_size() != 2 or len(x) == 0:
        return False

    def distance(known: Measured) -> float:
        return math.hypot(math.log(len(x) / known.rows), math.log(classes / known.classes))

    nearest = min(measured, key=distance)
    return nearest.separate < nearest.fused


def linear_focal_loss(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    target: Tensor,  # [N]
    *,
    normalize: bool = False,
    margin: Margin | None = None,
    scale: float = 1.0,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int = 0,
    keep: bool | None = False,
) -> Tensor:
    """`focal_loss` of x @ weight.T, whose logits [N, C] are never in memory as a whole.

    They are computed a chunk of classes at a time, twice: once for the loss and once for the gradients. That is a
    third more arithmetic than keeping them, and saves N * C numbers and their gradient; it pays where those are
    larger than the weights, or do not fit at all.

    Args:
        x: [N, D] embeddings; under autocast they and the weights take its dtype, as `torch.nn.functional.linear`
            does.
        weight: [C, D] of the same dtype and device.
        target: [N], int64 or int32 class numbers.
        normalize: divide every row of x and of weight by its norm, so that the logits are cosines; the backward
            pass takes the norms into account.
        margin: as for `focal_loss`; needs cosines.
        scale: factor of the logits, above 0.
        gamma: focal exponent, at least 0; 0 is cross entropy.
        alpha: weight of a row: a number, [C] by its class, or [N, 1] by row.
        label_smoothing: as for `focal_loss`.
        ignore_index: rows with this label count for nothing.
        reduction: "mean" over the rows that count, "sum", or "none".
        chunk: classes in a chunk; 0 chooses by the size of the cache.
        keep: True keeps the logits [N, C] for the backward pass, which does not compute them again then: a quarter
            less arithmetic for N * C numbers of memory. None chooses by what was measured (`keeps_logits`).

    Returns:
        float32 (float64 for float64 x): a scalar, or [N] without reduction.

    Raises:
        ValueError: an argument has a wrong type, shape, device or range.
        IndexError: a label is no class (on the CPU; on a GPU it is a device-side assertion).
        RuntimeError: the loss is differentiated twice.
    """
    check_linear(x, weight, chunk)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
    rows, classes = x.shape[0], weight.shape[0]
    check_focal(x, rows, classes, target, gamma, alpha, label_smoothing, margin, scale, reduction)
    if not native.covers(x):
        return reference.linear_focal_loss(
            x,
            weight,
            target,
            normalize=normalize,
            margin=margin,
            scale=scale,
            gamma=gamma,
            alpha=alpha,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    options = kernel_options(x, gamma, alpha, label_smoothing, ignore_index, margin, scale, reduction)
    x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
    if keep is None:
        keep = keeps_logits(x, classes)
    # For nothing but a backward pass.
    keep = keep and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return native.forward("linear_focal", x, weight, target, *options, normalize, chunk, keep)
