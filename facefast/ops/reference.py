"""The focal losses in plain PyTorch: the readable definition, the oracle of the kernels' tests, and what runs without
them.

The matrix is read in float32 (float64 if it is float64); the few numbers of each row are float64, because the loss of a
confident row is a power of a tiny probability and would lose its last digits otherwise. `docs/focal.md` derives the
form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from facefast.ops.arguments import (
    check_focal,
    check_labels,
    check_linear,
    check_matrix,
    check_probabilities,
    check_sigmoid,
    row_alpha,
)
from facefast.ops.margins import SIN_FLOOR, Margin


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
    """See `facefast.ops.focal_loss`."""
    check_matrix(logits)
    num_rows, num_classes = logits.shape
    check_focal(logits, num_rows, num_classes, target, gamma, alpha, label_smoothing, margin, scale, reduction)
    check_labels(target, num_classes, ignore_index)
    counts = target != ignore_index
    label = torch.where(counts, target, 0).long()
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Ignored rows may hold anything: 0 keeps NaN out of the gradient, which a mask on the loss alone would not.
    x = x.masked_fill(~counts[:, None], 0.0)

    # The label is left out of the sum, so no probability near 1 is ever taken from 1.
    own = x.gather(1, label[:, None])[:, 0].double()
    others = x.scatter(1, label[:, None], -math.inf)
    peak = others.detach().amax(1, keepdim=True)  # any shift gives the same value: it needs no gradient
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    mass = (scale * (others - peak)).exp().sum(1).double()
    total = x.double().sum(1) - own if label_smoothing > 0 else None
    loss = _row_losses(own, peak[:, 0], mass, total, num_classes, gamma, label_smoothing, margin, scale)
    loss = torch.where(counts, loss * row_alpha(alpha, label, loss), 0.0)
    return _reduce(loss, counts, reduction).to(x.dtype)


def _row_losses(
    own: Tensor,
    peak: Tensor,
    mass: Tensor,
    total: Tensor | None,
    num_classes: int,
    gamma: float,
    label_smoothing: float,
    margin: Margin | None,
    scale: float,
) -> Tensor:
    """Losses [N], float64, from what a row's softmax comes down to.

    Args:
        own: [N] the label's value, before margin and scale, float64.
        peak: [N] the greatest of the others' values, 0 where there is none.
        mass: [N] sum over the others of exp(scale * (value - peak)), float64.
        total: [N] sum of the others' values, float64; read for label smoothing only.
    """
    # d = the label's logit - log of the sum over the others.
    z = scale * own if margin is None else scale * with_margin(own, margin)
    alone = mass == 0  # one class, or all others at -inf: d is infinite, the loss 0
    lse_others = scale * peak.double() + mass.masked_fill(alone, 1.0).log()
    d = torch.where(alone, z + math.inf, z - lse_others)
    d = torch.where(z == math.inf, z - z, d)  # an infinite logit is a fault, not a perfect score

    cross_entropy = -F.logsigmoid(d)
    loss = cross_entropy
    # (1 - p)^gamma as exp(gamma log(1 - p)), where log(1 - p) = logsigmoid(-d). Below d = -50 that is 0 to float64's
    # precision; the clamp keeps an infinite d out of its gradient.
    if gamma > 0:
        loss = (gamma * F.logsigmoid(-d.clamp(min=-50.0))).exp() * cross_entropy
    # The mean of -log p over all classes is the log-sum over all of them, label included, minus the mean logit.
    if label_smoothing > 0:
        assert total is not None
        lse = torch.where(d > 0, z + cross_entropy, lse_others - F.logsigmoid(-d))
        mean = (scale * total + z) / num_classes
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean)
    return loss


def with_margin(cosine: Tensor, margin: Margin) -> Tensor:
    """`cosine` [N], float64, after the margin, with the margin's own gradient."""
    m1, m2, m3, detached = margin.terms()
    m2 = torch.as_tensor(m2, dtype=cosine.dtype, device=cosine.device)
    m3 = torch.as_tensor(m3, dtype=cosine.dtype, device=cosine.device)
    # Value and slope are set apart, since the slope is not always the derivative (a floor under the sine, "detached"):
    # the last line has the one as its value and the other as its gradient.
    with torch.no_grad():
        c = cosine.clamp(-1.0, 1.0)
        angle = c.acos()
        moved = m1 * angle + m2
        beyond = moved > math.pi
        # Past pi the cosine would rise again and reward a wrong angle: a straight line goes on falling. ArcFace's own
        # line for m1 = 1, else the one that meets the curve there.
        drop = m2 * m2.sin() if m1 == 1 else 1 + ((math.pi - m2) / m1).cos()
        value = torch.where(beyond, c - drop, moved.clamp(min=0.0).cos())
        slope = m1 * moved.clamp(min=0.0).sin() / angle.sin().clamp(min=SIN_FLOOR)
        slope = torch.where(beyond, 1.0, slope)
        if m1 == 1:
            # Without an angle the cosine is not touched, not even by the clamp.
            slope = torch.where(m2 == 0, 1.0, slope)
            value = torch.where(m2 == 0, cosine, value)
        if detached:
            slope = torch.ones_like(slope)
        value = value - m3
    return value + slope * (cosine - cosine.detach())


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = 0.25,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See `facefast.ops.sigmoid_focal_loss`."""
    check_sigmoid(logits, target, gamma, alpha, mask, reduction)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    t = target.to(x.dtype)
    check_probabilities(t if mask is None else t.masked_fill(~mask, torch.nan))
    counts = ~t.isnan() if mask is None else mask & ~t.isnan()
    x, t = torch.where(counts, x, 0.0), torch.where(counts, t, 0.0)
    log_p, log_q = F.logsigmoid(x), F.logsigmoid(-x)
    loss = -torch.where(t == 1, log_p, torch.where(t == 0, log_q, t * log_p + (1 - t) * log_q))
    if gamma > 0:  # 1 - p_t is p (1 - t) + (1 - p) t: a sum of two terms that cannot cancel
        loss = (gamma * torch.logaddexp(log_p + (1 - t).log(), log_q + t.log())).exp() * loss
    if alpha is not None:
        weight = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
        loss = loss * (weight * t + (1 - weight) * (1 - t))
    return _reduce(torch.where(counts, loss, 0.0), counts, reduction)


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
) -> Tensor:
    """See `facefast.ops.linear_focal_loss`."""
    check_linear(x, weight)
    if normalize:
        x, weight = F.normalize(x, eps=1e-12), F.normalize(weight, eps=1e-12)
    return focal_loss(
        F.linear(x, weight),
        target,
        gamma=gamma,
        alpha=alpha,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        margin=margin,
        scale=scale,
        reduction=reduction,
    )


class BlockStatistics(NamedTuple):
    """What a block of the classes adds to the softmax of each row."""

    stats: Tensor
    """[N, 3]: the greatest value of the classes but the label's, the sum of exp(scale * (value - the greatest)) over
    them, and the label's own value; each 0 where the block has none."""
    sums: Tensor
    """[N] float64, the sum of the values but the label's; empty without label smoothing."""
    row_scale: Tensor
    """1 / norm of each row of x; empty where nothing is normalised, and in plain PyTorch, which needs none later."""
    col_scale: Tensor
    """The same of each row of weight."""


def block_statistics(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [K, D]
    target: Tensor,  # [N]
    label_smoothing: float,
    scale: float,
    ignore_index: int,
    num_classes: int,
    normalize: bool,
) -> BlockStatistics:
    """The first part of `facefast.ops.sharded_focal_loss`, on one rank: all rows, its block of the classes.

    Args:
        target: labels counted from the block's first class; one of K or more is of another block.
        num_classes: C of all blocks.
    """
    logits = _block_logits(x, weight, normalize)
    counts = target != ignore_index
    own, others = _own_and_others(logits, target, counts)
    peak = others.amax(1) if len(weight) else own.new_full(own.shape, -math.inf)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    mass = (scale * (others - peak[:, None])).exp().sum(1)
    found = torch.stack((peak, mass, own), dim=1).masked_fill(~counts[:, None], 0.0)
    sums = others.masked_fill(others == -math.inf, 0.0).double().sum(1) if label_smoothing > 0 else found.new_empty(0)
    none = found.new_empty(0)
    return BlockStatistics(found, sums.double(), none, none)


def block_losses(
    stats: Tensor,
    sums: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    gamma: float,
    alpha: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    margin: Margin | None,
    scale: float,
) -> Tensor:
    """The second part, on every rank alike: losses [N] from the statistics of all blocks together."""
    peak, mass, own = stats.unbind(1)
    loss = _row_losses(own.double(), peak, mass.double(), sums, num_classes, gamma, label_smoothing, margin, scale)
    return torch.where(target != ignore_index, loss * row_alpha(alpha, target, loss), 0.0).to(stats.dtype)


@torch.enable_grad()
def block_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    stats: Tensor,
    num_classes: int,
    *,
    gamma: float,
    alpha: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    margin: Margin | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The last part, on one rank: its part of the gradient of x [N, D], and that of its weights [K, D].

    Args:
        grad: [N] with respect to the losses.
        stats: of all blocks together.
    """
    counts = target != ignore_index
    peak = stats[:, 0]
    own, mass = (stats[:, k].double().detach().requires_grad_() for k in (2, 1))
    total = torch.zeros_like(own).requires_grad_()  # the loss is linear in it: any value gives its gradient
    loss = _row_losses(own, peak, mass, total, num_classes, gamma, label_smoothing, margin, scale)
    loss = torch.where(counts, loss * row_alpha(alpha, target, loss), 0.0)
    by_own, by_mass, by_total = torch.autograd.grad(loss, (own, mass, total), grad.double(), materialize_grads=True)
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    logits = _block_logits(x, weight, normalize)
    with torch.no_grad():
        _, others = _own_and_others(logits, target, counts)
        by_logit = by_mass[:, None] * scale * (scale * (others - peak[:, None])).exp() + by_total[:, None]
        here = counts & (target < len(weight))
        by_logit[here, target[here]] = by_own[here]
        by_logit[~counts] = 0.0
    x_grad, weight_grad = torch.autograd.grad(logits, (x, weight), by_logit.to(logits.dtype))
    return x_grad, weight_grad


def _block_logits(x: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    if normalize:
        x, weight = F.normalize(x, eps=1e-12), F.normalize(weight, eps=1e-12)
    logits = F.linear(x, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _own_and_others(logits: Tensor, target: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The label's value [N], 0 where the block does not hold it; and the logits [N, K] with -inf in its place."""
    here = counts & (target < logits.shape[1])
    rows, places = here.nonzero()[:, 0], target[here]
    own, others = logits.new_zeros(len(logits)), logits.clone()
    own[rows] = logits[rows, places]
    others[rows, places] = -math.inf
    return own, others


def _reduce(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / counts.sum().clamp(min=1)
