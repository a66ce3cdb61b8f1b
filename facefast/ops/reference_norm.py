"""Batch normalisation with an activation, readably: the oracle of the kernels, and what runs where they do not.

Formulas: Ioffe & Szegedy 2015, arXiv:1502.03167; PReLU: He et al. 2015, arXiv:1502.01852.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    slope: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What `facefast.ops.batch_norm_act` computes, in at least single precision throughout."""
    wide = x if x.dtype == torch.float64 else x.float()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    if training:
        count = x.numel() // x.shape[1]
        mean = wide.mean(axes)
        var = (wide - _by_channel(mean, x)).square().mean(axes)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(momentum * mean)
                running_var.mul_(1 - momentum).add_(momentum * var * (count / (count - 1)))
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    z = (wide - _by_channel(mean, x)) * _by_channel((var + eps).rsqrt(), x)
    if weight is not None:
        z = z * _by_channel(weight, x)
    if bias is not None:
        z = z + _by_channel(bias, x)
    if residual is not None:
        z = z + residual
    if relu:
        z = z.relu()
    if slope is not None:
        z = torch.where(z > 0, z, _by_channel(slope, x) * z)
    return z.to(x.dtype)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """What `facefast.ops.prelu` computes."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(wide > 0, wide, _by_channel(slope, x) * wide).to(x.dtype)


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] (or [1]) seen as [1, C, 1, ...]."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
