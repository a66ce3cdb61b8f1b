"""BatchNorm whose statistics are those of all ranks' pictures: several processes then train as one with their batch.

torch's SyncBatchNorm is for GPUs alone and replaces layers by others. Here a layer stays what it is, its parameters,
names and kind included, and only its forward pass in training asks the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(model: nn.Module) -> None:
    """Lets every BatchNorm of a model take its statistics over all ranks, in training.

    Raises:
        ValueError: it has none, or one of a kind that computes something else too.
    """
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise ValueError("model.batchnorm sync has no effect: the model has no BatchNorm; leave it out")
    for module in found:
        if not isinstance(module, _Synchronised):
            module.__class__ = _synchronised(type(module))


def takes_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm of the model normalises by the batch, in the modes that its layers have."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def is_plain(norm: _BatchNorm) -> bool:
    """Whether a layer computes what torch's BatchNorm of this process's pictures does, and nothing else."""
    if isinstance(norm, _Synchronised):
        alone = not norm.training or not dist.is_initialized() or dist.get_world_size() == 1
        return alone and type(norm).__mro__[2] is nn.BatchNorm2d
    return type(norm) is nn.BatchNorm2d


class _Synchronised(_BatchNorm):
    """What `synchronise` puts before a layer's own class."""

    uncompiled: Callable[[Tensor], Tensor]
    """`normalised`, at which a compiled graph ends."""

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        out: Tensor = self.uncompiled(x)
        return out

    def normalised(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same, by the statistics of all ranks."""
        self._check_input_dim(x)
        mean, var, count = _statistics(x.detach())
        self._remember(mean, var * (count / (count - 1)))
        out: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, mean, var, count, self.eps
        )
        if _is_timms(type(self)):
            out = cast(Any, self).act(cast(Any, self).drop(out))
        return out

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics, as torch does."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        part = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if part is None:  # the mean of all batches
                part = 1.0 / float(self.num_batches_tracked)
        assert part is not None
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.mul_(1 - part).add_(part * new)


def _synchronised(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    if kind.forward is not _BatchNorm.forward and not _is_timms(kind):
        raise ValueError(
            f"model.batchnorm sync: the backbone's {kind.__name__} is no plain BatchNorm and cannot be synchronised; "
            "choose another backbone, or leave the option out"
        )
    # A compiled graph cannot hold what waits for other processes. Said here and not where the class is written: it
    # loads the compiler, a second of every command's start.
    uncompiled = torch.compiler.disable(_Synchronised.normalised)
    return type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {"uncompiled": uncompiled})


def _is_timms(kind: type) -> bool:
    """Whether it is timm's BatchNorm with a dropout and an activation behind it."""
    return any((base.__module__, base.__name__) == ("timm.layers.norm_act", "BatchNormAct2d") for base in kind.__mro__)


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _at_least_single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[C] mean and biased variance of all ranks' [B, C, ...], and of how many values; never waits for the device."""
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(_at_least_single(x), _axes(x), correction=0)
    # One message. In double precision, where the difference of the two squares below loses nothing that counts.
    mean, var = mean.double(), var.double()
    sums = torch.stack([torch.ones_like(mean), mean, var + mean.square()]) * count
    dist.all_reduce(sums)
    total, mean, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    kind = _at_least_single(x).dtype
    return mean.to(kind), (square - mean.square()).clamp(min=0).to(kind), total.to(kind)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the gradient by way of mean and variance (Ioffe & Szegedy
    2015, arXiv:1502.03167)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        axes, shape = _axes(x), [1, -1] + [1] * (x.ndim - 2)
        grad, direction = _at_least_single(grad), (_at_least_single(x) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([grad.sum(axes), (grad * direction).sum(axes)])
        # Parameters get this rank's part: DDP takes the mean over the ranks, as of every other gradient.
        for_bias, for_weight = sums.clone()
        for_x = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums)
            part = sums / count
            factor = scale if weight is None else scale * weight
            for_x = grad - part[0].view(shape) - direction * part[1].view(shape)
            for_x = (for_x * factor.view(shape)).to(x.dtype)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return for_x, for_weight if needs_weight else None, for_bias if needs_bias else None, None, None, None, None
