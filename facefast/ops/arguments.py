"""Checks of the losses' arguments, shared by the kernels' front ends and the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from facefast.ops.margins import Margin

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "mean", "sum")


def check_focal(
    like: Tensor,
    rows: int,
    classes: int,
    target: Tensor,
    gamma: float,
    alpha: float | Tensor | None,
    label_smoothing: float,
    margin: Margin | None,
    scale: float,
    reduction: str,
) -> None:
    """Arguments of the softmax losses but the labels' values; `like` has the dtype and device of the logits.

    Raises:
        ValueError: a dtype, shape, device or number is wrong; the message names it, its value and what is allowed.
    """
    if classes < 1:
        raise ValueError(f"there are {classes} classes; at least 1 is needed")
    check_rows(target, rows, like.device)
    check_numbers(gamma, scale, label_smoothing, reduction)
    if isinstance(alpha, Tensor) and alpha.shape != (classes,) and alpha.shape != (rows, 1):
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)}; it must be a number, [C] = [{classes}] (one weight per class) or "
            f"[N, 1] = [{rows}, 1] (one per row)"
        )
    check_alpha(alpha, like)
    if margin is not None:
        for name, m in zip(("angular", "additive"), margin.terms()[1:3], strict=True):
            if isinstance(m, Tensor) and m.dim() == 1 and m.shape[0] != rows:
                raise ValueError(f"the {name} margin has {m.shape[0]} rows and the logits {rows}; they must agree")


def check_matrix(logits: Tensor) -> None:
    """Logits [N, C] of a dtype that the kernels know.

    Raises:
        ValueError: another shape or dtype.
    """
    check_logits(logits)
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be [N, C]")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """A floating-point dtype that the kernels know.

    Raises:
        ValueError: another dtype.
    """
    if logits.dtype not in FLOATS:
        raise ValueError(f"{name} is {logits.dtype}; it must be float32, float64, float16 or bfloat16")


def check_rows(target: Tensor, rows: int, device: torch.device) -> None:
    """`target` is one integer label per row, on the device of the logits.

    Raises:
        ValueError: it is not.
    """
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target is {target.dtype}; it must be int64 or int32 class numbers")
    if target.dim() != 1 or target.shape[0] != rows:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be [N] = [{rows}], one label per row")
    if target.device != device:
        raise ValueError(f"target is on {target.device} and logits on {device}; move one of them")


def check_numbers(gamma: float, scale: float, label_smoothing: float, reduction: str) -> None:
    """The scalar options.

    Raises:
        ValueError: one is out of its range.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; it must be a finite number of at least 0 (0 is cross entropy)")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be a finite number above 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be 'none', 'mean' or 'sum'")


def check_alpha(alpha: float | Tensor | None, logits: Tensor) -> None:
    """`alpha` as a number or as weights without gradient on the device of the logits.

    Raises:
        ValueError: it is negative, not finite, not floating point, elsewhere, or requires grad.
    """
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ValueError(f"alpha is {alpha.dtype}; it must be floating point")
        if alpha.device != logits.device:
            raise ValueError(f"alpha is on {alpha.device} and logits on {logits.device}; move one of them")
        if alpha.requires_grad:
            raise ValueError("alpha requires grad; it gets no gradient, pass alpha.detach()")
    elif alpha is not None and not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it must be a finite number of at least 0, or None for no weight")


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """On the CPU, outside a compiled graph: every label that counts is a class.

    Raises:
        IndexError: one is not; the message holds the label, its row and the number of classes.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise IndexError(label_message(int(target[row]), row, num_classes, ignore_index))


def check_probabilities(target: Tensor) -> None:
    """On the CPU, outside a compiled graph: every target of a sigmoid loss lies in [0, 1] or is NaN.

    Raises:
        IndexError: one does not; the message holds the target and its place among all elements.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((target < 0) | (target > 1)).flatten()
    if bool(bad.any()):
        place = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"target {float(target.flatten()[place])} of element {place} is outside [0, 1]; NaN marks an unknown target"
        )


def label_message(label: int, row: int, num_classes: int, ignore_index: int) -> str:
    """What is said of a label that is no class."""
    return (
        f"label {label} of row {row} is outside [0, {num_classes}) and is not ignore_index {ignore_index}; "
        "correct the label or the number of classes"
    )


def check_sigmoid(
    logits: Tensor,
    target: Tensor,
    gamma: float,
    alpha: float | Tensor | None,
    mask: Tensor | None,
    reduction: str,
) -> None:
    """Arguments of `sigmoid_focal_loss`.

    Raises:
        ValueError: as `check_focal`.
    """
    check_logits(logits)
    if target.shape != logits.shape:
        raise ValueError(f"target has shape {tuple(target.shape)} and logits {tuple(logits.shape)}; they must agree")
    if target.is_complex() or target.device != logits.device:
        raise ValueError(
            f"target is {target.dtype} on {target.device}; it must be real, 0 to 1 or NaN, on {logits.device}"
        )
    check_numbers(gamma, 1.0, 0.0, reduction)
    check_alpha(alpha, logits)
    if isinstance(alpha, Tensor):
        if logits.dim() == 0 or alpha.shape != logits.shape[-1:]:
            raise ValueError(
                f"alpha has shape {tuple(alpha.shape)}; it must be a number or one weight per column of logits "
                f"{tuple(logits.shape)}"
            )
    elif alpha is not None and alpha > 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1] (weight of target 1; target 0 gets 1 - alpha)")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != logits.shape):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool of shape {tuple(logits.shape)}"
        )


def check_linear(x: Tensor, weight: Tensor, chunk: int = 0) -> None:
    """Operands of `linear_focal_loss`.

    Raises:
        ValueError: their shapes, dtypes or devices do not fit.
    """
    check_logits(x, "x")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be [N, D] and [C, D]"
        )
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}; it must be at least 0 classes (0 chooses)")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"x is {x.dtype} on {x.device} and weight {weight.dtype} on {weight.device}; they must agree")


def row_alpha(alpha: float | Tensor | None, label: Tensor, like: Tensor) -> Tensor | float:
    """The weight of each row [N], or one number for all: `alpha` by class [C] or by row [N, 1]."""
    if alpha is None:
        return 1.0
    if not isinstance(alpha, Tensor):
        return alpha
    alpha = alpha.to(like.dtype)
    return alpha[:, 0] if alpha.dim() == 2 else alpha[label]
