"""Linear layer and focal loss in one, for heads with so many classes that their logits do not fit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from facefast.ops import native, reference
from facefast.ops.arguments import check_focal, check_linear
from facefast.ops.focal import kernel_options
from facefast.ops.margins import Margin


class LinearLoss(NamedTuple):
    """A loss and what is known of its rows."""

    loss: Tensor
    """As `reduction` says."""
    leads: Tensor
    """[N] bool: the row counts, and its own class has a greater logit than any other, before the margin."""


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


KEPT = 1 / 8
"""The part of a GPU's memory that logits kept without being asked for may take."""


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory, in use or free."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def keeps_logits(x: Tensor, classes: int, measured: tuple[Measured, ...] = MEASURED) -> bool:
    """Whether `linear_focal_loss` of x [N, D] is expected to gain by keeping its logits [N, classes], going by the
    measured shape that is nearest in the logarithms of rows and classes: where a layer and a loss of its own were
    faster, which keep theirs.

    Only 16-bit numbers on a GPU have been measured; all others keep nothing, nor do logits of more than an eighth of
    the GPU's memory.
    """
    if x.device.type != "cuda" or x.element_size() != 2 or len(x) == 0:
        return False
    if x.element_size() * len(x) * classes > KEPT * memory_of(x.device):
        return False

    def distance(known: Measured) -> float:
        return math.hypot(math.log(len(x) / known.rows), math.log(classes / known.classes))

    nearest = min(measured, key=distance)
    return nearest.separate < nearest.fused


def fused_type(x: Tensor, classes: int, measured: tuple[Measured, ...] = MEASURED) -> torch.dtype | None:
    """The type in which a head over x [N, D] is to take `linear_focal_loss` instead of logits and `focal_loss`; None
    where it is to make logits.

    Logits are made wherever nothing like it has been measured: on a CPU, in 32 bits, without kernels for the GPU, and
    with less than half as many classes as the fewest measured.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind != "cuda" or dtype.itemsize != 2 or x.dtype == torch.float64 or native.backend(x.device) != "native":
        return None
    return dtype if 2 * classes >= min(known.classes for known in measured) else None


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
    loss, _ = _with_statistics(
        x,
        weight,
        target,
        False,
        normalize=normalize,
        margin=margin,
        scale=scale,
        gamma=gamma,
        alpha=alpha,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        chunk=chunk,
        keep=keep,
    )
    return loss


def linear_focal_leads(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> LinearLoss:
    """`linear_focal_loss`, and which rows are named rightly; the forward pass knows it of every row anyway.

    Args:
        options: all of that loss's, none of which has a default here.
    """
    loss, stats = _with_statistics(x, weight, target, True, **options)
    peak, mass, own = stats.unbind(1)
    return LinearLoss(loss, ((own > peak) | (mass == 0)) & (mass >= 0) & (target != options["ignore_index"]))


def _with_statistics(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    wanted: bool,
    *,
    normalize: bool,
    margin: Margin | None,
    scale: float,
    gamma: float,
    alpha: float | Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    chunk: int,
    keep: bool | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and of each row the statistics [N, 3] of `reference.BlockStatistics`, which plain PyTorch computes only
    where they are wanted."""
    check_linear(x, weight, chunk)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
    rows, classes = x.shape[0], weight.shape[0]
    check_focal(x, rows, classes, target, gamma, alpha, label_smoothing, margin, scale, reduction)
    if not native.covers(x):
        loss = reference.linear_focal_loss(
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
        if not wanted:
            return loss, loss.new_empty(0, 3)
        with torch.no_grad():
            found = reference.block_statistics(x, weight, target, 0.0, scale, ignore_index, classes, normalize)
        return loss, found.stats
    options = kernel_options(x, gamma, alpha, label_smoothing, ignore_index, margin, scale, reduction)
    x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
    if keep is None:
        keep = keeps_logits(x, classes)
    # For nothing but a backward pass.
    keep = keep and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, stats, *_ = native.outputs("linear_focal", x, weight, target, *options, normalize, chunk, keep)
    return loss, stats
