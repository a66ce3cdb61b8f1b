"""A loss and its gradients in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def derive(function: Callable[..., Tensor], *leaves: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """function(*leaves) and its gradient with respect to each of them, for `upstream` or ones."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    loss = function(*leaves)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    gradients = tuple(leaf.grad for leaf in leaves)
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), *(gradient for gradient in gradients if gradient is not None)
