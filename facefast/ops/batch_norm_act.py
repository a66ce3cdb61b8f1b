"""Batch normalisation with the activation and the residual behind it in one pass, for training.

torch reads and writes every value anew for the normalisation, the activation and the sum. Here the forward pass reads x
twice, for the statistics and for the result, and the backward pass twice, for the sums and for the gradient; the sign
that the activation's derivative depends on is computed from x again. The kernels take channels-last tensors (on a CPU
contiguous ones too) of float32, bfloat16 and float16 as they are, and compute in float32; parameters and running
statistics are float32. Autocast does not change that. What they do not take is computed by
`facefast.ops.reference_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from facefast.ops import native, reference_norm

NONE, RELU, PRELU = 0, 1, 2
"""Activations, in the order of csrc/norm/norm.h."""
CHUNK = 16
"""Bytes that a GPU's thread reads at once: the channels of a pixel are a multiple of it."""


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
    batches: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """activation(batch_norm(x) + residual), differentiable once in x, residual, weight, bias and slope.

    Args:
        x: [B, C, ...].
        weight: [C] or None for 1.
        bias: [C] or None for 0.
        running_mean: [C], moved in training as torch does; None where none is kept.
        running_var: [C], as `running_mean`; unbiased.
        slope: [C] or [1] of a PReLU behind the normalisation; None for none.
        relu: a ReLU instead.
        residual: like x, added in front of the activation.
        batches: int64, counts the batches in training; None for no count.
        training: normalise by the statistics of this batch, else by the running ones.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        Like x, in its dtype and memory format.

    Raises:
        ValueError: two activations, no statistics to normalise by, or one value a channel in training.
    """
    if relu and slope is not None:
        raise ValueError("relu and slope are both given; there is one activation: leave one of them out")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("training is False, and there are no running statistics to normalise by; give both")
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: one value a channel has no variance; give more pictures")
    own = (weight, bias, running_mean, running_var, slope)
    if not takes(x, *own, residual=residual) or (slope is not None and residual is not None):
        if training and batches is not None:
            batches.add_(1)
        return reference_norm.batch_norm_act(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            slope=slope,
            relu=relu,
            residual=residual,
            training=training,
            momentum=momentum,
            eps=eps,
        )
    if training:
        mean, var = torch.ops.facefast.batch_statistics.default(
            x.detach(), running_mean, running_var, batches, momentum
        )
    else:
        mean, var = running_mean, running_var
    activation = RELU if relu else NONE if slope is None else PRELU
    return _normalise(x, weight, bias, _whole(slope, x), residual, mean, var, eps, activation, training)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x where it is above 0, else slope * x, differentiable once; `slope` is [C] or [1], x [B, C, ...]."""
    if not takes(x, slope):
        return reference_norm.prelu(x, slope)
    return _normalise(x, None, None, _whole(slope, x), None, None, None, 0.0, PRELU, False)


def takes(x: Tensor, *by_channel: Tensor | None, residual: Tensor | None = None) -> bool:
    """Whether the kernels take these tensors."""
    kind = x.device.type
    if kind not in native.DEVICES or x.ndim < 2 or x.numel() == 0 or not x.is_floating_point():
        return False
    on_gpu = kind == "cuda"
    if on_gpu and (x.dtype == torch.float64 or x.shape[1] * x.element_size() % CHUNK):
        return False
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if any(t is not None and (t.dtype != wide or t.device != x.device or t.ndim != 1) for t in by_channel):
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return False
    return _channels_last(x) or (not on_gpu and x.is_contiguous())


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of a place lie together, and places one after the other."""
    return x.movedim(1, -1).is_contiguous()


def _whole(slope: Tensor | None, x: Tensor) -> Tensor | None:
    """One slope for all channels as one for each."""
    return slope if slope is None or slope.shape[0] == x.shape[1] else slope.expand(x.shape[1]).contiguous()


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
    batch: bool,
) -> Tensor:
    out: Tensor = torch.ops.facefast.normalise_forward.default(
        x, mean, var, weight, bias, slope, residual, eps, activation, batch
    )
    return out


def _register(library: torch.library.Library) -> None:
    """Fake tensors and autograd. The gradient of `normalise_forward` with `batch` is that through the statistics too,
    which its caller has taken of the same x: mean and var are no inputs to it."""
    forward_op = torch.ops.facefast.normalise_forward.default
    backward_op = torch.ops.facefast.normalise_backward.default
    below = torch._C._AutoDispatchBelowAutograd

    @torch.library.register_fake("facefast::batch_statistics", lib=library)
    def _(x: Tensor, *rest: Any) -> Any:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty((x.shape[1],), dtype=kind), x.new_empty((x.shape[1],), dtype=kind)

    @torch.library.register_fake("facefast::normalise_forward", lib=library)
    def _(x: Tensor, *rest: Any) -> Any:
        return torch.empty_like(x)

    @torch.library.register_fake("facefast::normalise_backward", lib=library)
    def _(grad: Tensor, x: Tensor, *rest: Any) -> Any:
        batch, need_x, need_residual, need_parameters = rest[-4:]
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        size = x.shape[1] if need_parameters or batch else 0
        return (
            torch.empty_like(x) if need_x else x.new_empty((0,)),
            torch.empty_like(x) if need_residual else x.new_empty((0,)),
            *(x.new_empty((size,), dtype=kind) for _ in range(3)),
        )

    class Normalise(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            mean: Tensor | None,
            var: Tensor | None,
            weight: Tensor | None,
            bias: Tensor | None,
            slope: Tensor | None,
            residual: Tensor | None,
            eps: float,
            activation: int,
            batch: bool,
        ) -> Tensor:
            with below():
                out: Tensor = forward_op(x, mean, var, weight, bias, slope, residual, eps, activation, batch)
            # A ReLU's own output tells its sign where x alone does not; the layer behind it keeps that output anyway.
            known = out if residual is not None and activation == RELU else None
            ctx.save_for_backward(x, mean, var, weight, bias, slope, known)
            ctx.numbers = (eps, activation, batch)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, mean, var, weight, bias, slope, known = ctx.saved_tensors
            wants = ctx.needs_input_grad
            activation = ctx.numbers[1]
            parameters = any(wants[3:6])
            masked = wants[6] and activation != NONE
            found = run_backward(
                grad, x, mean, var, weight, bias, slope, known, *ctx.numbers, wants[0], masked, parameters
            )
            by_x, by_residual, by_weight, by_bias, by_slope = found
            return (
                by_x if wants[0] else None,
                None,
                None,
                by_weight if wants[3] else None,
                by_bias if wants[4] else None,
                by_slope if wants[5] else None,
                by_residual if masked else grad if wants[6] else None,
                None,
                None,
                None,
            )

    class Backward(torch.autograd.Function):  # only for `create_graph=True`
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with below():
                return backward_op(*args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(
                "facefast: batch_norm_act has no second derivative; use torch's batch_norm, or detach its gradient"
            )

    def run_forward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args[:7]):
            return Normalise.apply(*args)  # type: ignore[no-untyped-call]
        with below():
            return forward_op(*args)

    def run_backward(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return Backward.apply(*args)  # type: ignore[no-untyped-call]
        with below():
            return backward_op(*args)

    library.impl("normalise_forward", run_forward, "Autograd")
    library.impl("normalise_backward", run_backward, "Autograd")


if native.DEVICES:
    LIBRARY = torch.library.Library("facefast", "IMPL")
    _register(LIBRARY)
