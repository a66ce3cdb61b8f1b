"""The sigmoid focal loss, for attributes and for heads with one output."""

from __future__ import annotations

import torch
from torch import Tensor

from facefast.ops import native, reference
from facefast.ops.arguments import check_sigmoid
from facefast.ops.focal import REDUCTION


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = 0.25,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """alpha_t (1 - p_t)^gamma * binary cross entropy, elementwise (Lin et al. 2017, as torchvision computes it).

    Args:
        logits: any shape; float32, float64, float16 or bfloat16, read as they are.
        target: the same shape, 0 to 1 of any real type; soft targets take p_t = p t + (1 - p)(1 - t), and NaN marks
            an element that is unknown and counts for nothing.
        gamma: focal exponent, at least 0; 0 is binary cross entropy.
        alpha: weight of target 1, in [0, 1], or one for each of the last dimension's columns; target 0 gets
            1 - alpha. None weighs nothing (torchvision's -1).
        mask: the same shape, bool; False counts for nothing.
        reduction: "mean" over the elements that count (0 when none does), "sum", or "none".

    Returns:
        float32 (float64 for float64 logits): a scalar, or the shape of `logits` without reduction.

    Raises:
        ValueError: an argument has a wrong type, shape, device or range.
        IndexError: a target lies outside [0, 1] (on the CPU; on a GPU it is a device-side assertion).
        RuntimeError: the loss is differentiated twice.
    """
    check_sigmoid(logits, target, gamma, alpha, mask, reduction)
    if not native.covers(logits):
        return reference.sigmoid_focal_loss(logits, target, gamma=gamma, alpha=alpha, mask=mask, reduction=reduction)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target = target.to(acc).contiguous()
    if mask is not None:  # the kernels know one mark of what counts for nothing: a target that is NaN
        target = torch.where(mask, target, torch.nan).contiguous()
    alphas, weight = None, -1.0
    if isinstance(alpha, Tensor):
        alphas = alpha.to(acc).contiguous()
    elif alpha is not None:
        weight = float(alpha)
    numbers = (float(gamma), weight, REDUCTION[reduction])
    return native.forward("sigmoid_focal", logits.contiguous(), target, alphas, *numbers)
