"""The softmax focal loss, with margins and label smoothing, in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from facefast.ops import native, reference
from facefast.ops.arguments import check_focal, check_matrix
from facefast.ops.margins import Margin

REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def focal_loss(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    margin: Margin | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """-alpha_y (1 - p_y)^gamma log p_y of each row, where p is the softmax of scale * logits (Lin et al. 2017).

    Args:
        logits: [N, C], float32, float64, float16 or bfloat16, read as they are; cosines when there is a margin.
        target: [N], int64 or int32 class numbers.
        gamma: focal exponent, at least 0; 0 is cross entropy.
        alpha: weight of a row: a number, [C] by its class, or [N, 1] by row; it gets no gradient.
        label_smoothing: e in (1 - e) * focal + e * (mean over the classes of -log p), in [0, 1).
        ignore_index: rows with this label count for nothing and get no gradient.
        margin: `Cos`, `Arc`, `Combined` or what `AdaFace` returns, put on the target's cosine before the scale.
        scale: factor of the logits, above 0.
        reduction: "mean" over the rows that count (0 when none does), "sum", or "none".

    Returns:
        float32 (float64 for float64 logits): a scalar, or [N] without reduction.

    Raises:
        ValueError: an argument has a wrong type, shape, device or range.
        IndexError: a label is no class (on the CPU; on a GPU it is a device-side assertion).
        RuntimeError: the loss is differentiated twice.
    """
    check_matrix(logits)
    rows, classes = logits.shape
    check_focal(logits, rows, classes, target, gamma, alpha, label_smoothing, margin, scale, reduction)
    if not native.covers(logits):
        return reference.focal_loss(
            logits,
            target,
            gamma=gamma,
            alpha=alpha,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            margin=margin,
            scale=scale,
            reduction=reduction,
        )
    if logits.stride(1) != 1:  # rows may lie apart, the classes of a row may not
        logits = logits.contiguous()
    options = kernel_options(logits, gamma, alpha, label_smoothing, ignore_index, margin, scale, reduction)
    return native.forward("focal", logits, target.contiguous(), *options)


def kernel_options(
    logits: Tensor,
    gamma: float,
    alpha: float | Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    margin: Margin | None,
    scale: float,
    reduction: str,
) -> tuple[Any, ...]:
    """The options in the order of the operators' schemas (csrc/loss/ops.cpp)."""
    weights, weight = None, 1.0
    if isinstance(alpha, Tensor):
        acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = alpha.to(acc).contiguous()
    elif alpha is not None:
        weight = float(alpha)
    rows, m1, m2, m3, detached = None, 1.0, 0.0, 0.0, False
    if margin is not None:
        m1, angle, shift, detached = margin.terms()
        if isinstance(angle, Tensor) or isinstance(shift, Tensor):
            # Sines and cosines of the angles are taken once here; both passes of the kernels read them.
            like = torch.empty((), dtype=torch.float64, device=logits.device)
            m2_rows, m3_rows = (torch.as_tensor(m).to(like).expand(logits.shape[0]) for m in (angle, shift))
            rows = torch.stack((m2_rows, m2_rows.cos(), m2_rows.sin(), m3_rows), dim=1)
        else:
            m2, m3 = float(angle), float(shift)
    numbers = (float(gamma), float(label_smoothing), float(scale), weight, ignore_index)
    return weights, rows, *numbers, m1, m2, m3, detached, REDUCTION[reduction]
