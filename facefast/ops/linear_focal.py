"""Linear layer and focal loss in one, for heads with so many classes that their logits do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from facefast.ops import native, reference
from facefast.ops.arguments import check_focal, check_linear
from facefast.ops.focal import kernel_options
from facefast.ops.margins import Margin


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
    return native.forward("linear_focal", x, weight, target, *options, normalize, chunk)
