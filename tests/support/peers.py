"""What the tests after the peers' suites share: drawn operands, the textbook's loss, and rules of comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.derive import derive

HALVES = (torch.float16, torch.bfloat16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ("none", "mean", "sum"))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    """Normal numbers of their own generator."""
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels(rows: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, truth: Tensor, rtol: float, atol: float) -> None:
    """Within the tolerance, or within one rounding to the type of `found` where that is coarser."""
    info = torch.finfo(found.dtype)
    rtol, atol = max(rtol, 0.51 * info.eps), max(atol, info.smallest_normal * info.eps)
    torch.testing.assert_close(found.double(), truth.double(), rtol=rtol, atol=atol)


def textbook(
    logits: Tensor, target: Tensor, *, gamma: float = 0.0, ignore_index: int = -100, alpha: Any = 1.0, reduction: str
) -> Tensor:
    """alpha_y (1 - p_y)^gamma log p_y in float64, by autograd, of the rows that count."""
    kept = (target != ignore_index).nonzero()[:, 0]
    entropy = F.cross_entropy(logits[kept].double(), target[kept], reduction="none")
    weight = alpha[target[kept]] if isinstance(alpha, Tensor) else alpha
    loss = weight * (-torch.expm1(-entropy)) ** gamma * entropy
    if reduction == "none":
        return loss.new_zeros(len(target)).index_put((kept,), loss)
    return loss.sum() / (len(kept) if reduction == "mean" else 1)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The logits in the operands' type, their cross entropy in float32 at least: what the fused losses replace."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)


def head(rows: int, classes: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings and class weights whose logits spread by about 1; some weights are embeddings, as after training."""
    x, weight = drawn(rows, width, seed=1) / math.sqrt(width), drawn(classes, width, seed=2)
    trained = min(rows, classes) // 2
    weight[:trained] = x[:trained] * math.sqrt(width)
    return x.to(dtype), weight.to(dtype)


def triple(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *leaves: Tensor, upstream: Tensor | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For the loss and every gradient: ours, theirs in the same type, and the truth, which is theirs in float64."""
    wide = tuple(leaf.double() for leaf in leaves)
    sides = (derive(ours, *leaves, upstream=upstream), derive(theirs, *leaves, upstream=upstream))
    return list(zip(*sides, derive(theirs, *wide, upstream=upstream), strict=True))


def as_exact_as_theirs(triples: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """quack's rule: the greatest error is at most 3 (loss) and 2 (gradients) times that of plain torch, and a bit.

    The bit is quack's (1e-5 and 1e-4), or half a unit in the last place of the greatest number where that is less.
    """
    for (ours, theirs, truth), factor, slack in zip(triples, (3, 2, 2), (1e-5, 1e-4, 1e-4), strict=True):
        found, allowed = ((side.double() - truth).abs().max() for side in (ours, theirs))
        assert found <= factor * allowed + min(slack, 0.5 * torch.finfo(ours.dtype).eps * truth.abs().max().item())
