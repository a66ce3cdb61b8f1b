"""BatchNorm with the activation and the residual behind it in one pass, where training gains by it.

The layers stay modules with their names, parameters and buffers; a network calls `norm_act` where it would call one
after the other. Evaluation and every kind of export go through the modules themselves, and so does a layer that is no
plain BatchNorm, that has a hook, or whose tensors the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from facefast.models.batchnorm import is_plain
from facefast.ops.batch_norm_act import batch_norm_act, takes

RELU = nn.ReLU()
"""For networks that call `torch.nn.functional.relu`."""
_allowed = True


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Within it every layer is called by itself."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def norm_act(
    norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None, *, training: bool
) -> Tensor:
    """act(norm(x) + residual).

    Args:
        norm: a BatchNorm, or whatever stands in its place.
        act: the layer behind it; None or `nn.Identity` for none.
        x: [B, C, H, W].
        residual: like x; None for none.
        training: mode of the network, which a frozen BatchNorm does not share.
    """
    if training and _fuses(norm, act, x, residual):
        assert isinstance(norm, nn.BatchNorm2d) and norm.momentum is not None
        return batch_norm_act(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            slope=act.weight if isinstance(act, nn.PReLU) else None,
            relu=isinstance(act, nn.ReLU),
            residual=residual,
            batches=norm.num_batches_tracked,
            training=norm.training,
            momentum=norm.momentum,
            eps=norm.eps,
        )
    out: Tensor = norm(x)
    if residual is not None:
        out = out + residual
    return out if act is None else act(out)


class Layers(nn.Sequential):
    """`nn.Sequential`, which takes a BatchNorm together with the activation behind it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W] to what the last layer gives; that is a BatchNorm or takes a residual itself where there is
        one."""
        layers, number = list(self), 0
        while number < len(layers):
            layer, act = layers[number], layers[number + 1] if number + 1 < len(layers) else None
            number += 1
            last = residual if number == len(layers) else None
            if isinstance(layer, nn.BatchNorm2d):
                paired = isinstance(act, nn.ReLU | nn.PReLU)
                x = norm_act(layer, act if paired else None, x, last, training=self.training)
                number += paired
            else:
                # A BatchNorm that was folded away leaves an Identity, which takes no residual itself.
                x = layer(x) if last is None else layer(x) + last if type(layer) is nn.Identity else layer(x, last)
        return x


def adds_nothing(drop: nn.Module) -> bool:
    """Whether stochastic depth leaves a branch as it is, so that the sum can be part of the pass before it."""
    return type(drop) is nn.Identity and not _hooked(drop)


def _fuses(norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None) -> bool:
    if not _allowed or not torch.is_grad_enabled() or not isinstance(norm, nn.BatchNorm2d) or not is_plain(norm):
        return False
    if act is not None and type(act) not in (nn.ReLU, nn.PReLU, nn.Identity):
        return False
    if _hooked(norm) or (act is not None and _hooked(act)) or norm.momentum is None:
        return False
    slope = act.weight if isinstance(act, nn.PReLU) else None
    if slope is not None and residual is not None:
        return False
    if x.device.type == "cuda":
        if x.dtype not in (torch.bfloat16, torch.float16):
            return False
    elif (slope is None and residual is None and not isinstance(act, nn.ReLU)) or x.dtype == torch.float16:
        return False  # on a CPU torch's own is as fast there (benchmarks/LOG.md)
    return takes(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, slope, residual=residual)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody waits for the module to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
