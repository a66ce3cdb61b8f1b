"""The compiled kernels, `facefast._C`: loading them, and their fake tensors and autograd.

What they do not serve (see `covers`) is left to `facefast.ops.reference`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KERNEL_VERSION = 6
"""The same number as in csrc/loss/tensors.h; raised with every change of a schema."""

_REBUILD = "rebuild with: python setup.py build_ext --inplace"


class FallbackWarning(RuntimeWarning):
    """The losses run as plain PyTorch because the compiled kernels are absent, stale or lack CUDA."""


def _load() -> frozenset[str]:
    """Types of device that the kernels serve; empty after a warning when there are none."""
    # A kernel of another version takes its arguments in another order: better slow than wrong.
    try:
        import facefast._C as _C
    except ImportError as error:
        return _fall_back(f"facefast._C cannot be loaded ({error})")
    if _C.version != KERNEL_VERSION:
        return _fall_back(f"facefast._C is of version {_C.version}, not {KERNEL_VERSION}")
    return frozenset({"cpu", "cuda"} if _C.cuda else {"cpu"})


def _fall_back(reason: str) -> frozenset[str]:
    message = f"{reason}; the losses run as plain PyTorch, slower: {_REBUILD}"
    if os.environ.get("FACEFAST_REQUIRE_NATIVE") == "1":
        raise ImportError(f"{reason}, and FACEFAST_REQUIRE_NATIVE is 1: {_REBUILD}")
    warnings.warn(message, FallbackWarning, stacklevel=2)
    return frozenset()


DEVICES = _load()
_warned: set[str] = set()


def covers(tensor: Tensor) -> bool:
    """Whether the kernels serve this tensor's device; a GPU left to plain PyTorch warns once."""
    kind = tensor.device.type
    if kind in DEVICES:
        return True
    if DEVICES and kind not in _warned:
        _warned.add(kind)
        _fall_back(f"facefast._C has no kernels for {kind}")
    return False


def backend(device: torch.device | str = "cpu") -> str:
    """What computes the losses on `device`: "native" or "reference"."""
    return "native" if torch.device(device).type in DEVICES else "reference"


# ---------------------------------------------------------------------------------------------
# Every loss is a pair of operators:
#   NAME_forward(*tensors, *numbers) -> (loss, *state)
#   NAME_backward(grad, *tensors, *state, *numbers) -> gradient of the first tensor,
# or, for more than one gradient, NAME_backward(..., *wanted) -> (gradients).


_EAGER: dict[str, Callable[..., Any]] = {}


def forward(name: str, *args: Any) -> Tensor:
    """The loss that NAME_forward computes, differentiable.

    Outside a compiled graph it skips the dispatcher's way to the same function, a tenth of what a small loss costs.
    """
    if torch.compiler.is_compiling():
        loss: Tensor = getattr(torch.ops.facefast, f"{name}_forward").default(*args)[0]
        return loss
    loss = _EAGER[name](*args)[0]
    return loss


def outputs(name: str, *args: Any) -> tuple[Tensor, ...]:
    """All that NAME_forward gives: the loss, differentiable as that of `forward`, and its state, which is not."""
    if torch.compiler.is_compiling():
        found: tuple[Tensor, ...] = getattr(torch.ops.facefast, f"{name}_forward").default(*args)
        return found
    found = _EAGER[name](*args)
    return found


def _differentiable(library: torch.library.Library, name: str, tensors: int, gradients: int) -> None:
    """Autograd for a pair of operators, as one `autograd.Function` on the dispatcher's Autograd key.

    `torch.library.register_autograd` comes to the same and costs twice as much a call, which a head with two classes
    would feel (benchmarks/LOG.md).
    """
    forward_op = getattr(torch.ops.facefast, f"{name}_forward").default
    backward_op = getattr(torch.ops.facefast, f"{name}_backward").default
    below = torch._C._AutoDispatchBelowAutograd  # or the operators below would come back to this very function

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, numbers: tuple[Any, ...], *args: Any) -> Any:
            with below():
                outputs = forward_op(*args, *numbers)
            # Inputs are kept as they are, and the state is a few numbers a row: nothing of the logits' size is added.
            ctx.save_for_backward(*args, *outputs[1:])
            ctx.numbers = numbers
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)  # no zeros for the state, whose gradients are not read
            return outputs

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
            none = (None,) * (tensors - gradients)
            if grad is None:
                return (None,) * (1 + tensors)
            # One gradient is wanted whenever backward runs; of several each may be left out, as for frozen weights.
            wanted = ctx.needs_input_grad[1 : 1 + gradients] if gradients > 1 else ()
            result = run_backward(grad, *ctx.saved_tensors, *ctx.numbers, *wanted)
            if gradients == 1:
                return (None, result, *none)
            return (None, *(g if want else None for g, want in zip(result, wanted, strict=True)), *none)

    # Only for `create_graph=True`: a second derivative is refused instead of silently being 0.
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with below():
                return backward_op(*args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"facefast: {name}_loss has no second derivative; detach its gradient")

    def run_forward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(arg.requires_grad for arg in args[:gradients]):
            return Forward.apply(args[tensors:], *args[:tensors])  # type: ignore[no-untyped-call]
        with below():
            return forward_op(*args)

    def run_backward(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return Backward.apply(*args)  # type: ignore[no-untyped-call]
        with below():
            return backward_op(*args)

    _EAGER[name] = run_forward
    library.impl(f"{name}_forward", run_forward, "Autograd")
    library.impl(f"{name}_backward", run_backward, "Autograd")


def _register(library: torch.library.Library) -> None:
    """Fake tensors (shapes and types without data) and autograd of every operator."""

    def acc(tensor: Tensor) -> torch.dtype:
        return torch.float64 if tensor.dtype == torch.float64 else torch.float32

    def reduced(like: Tensor, shape: Any, reduction: int) -> Tensor:
        return like.new_empty(shape if reduction == 0 else (), dtype=acc(like))

    @torch.library.register_fake("facefast::focal_forward", lib=library)
    def _(logits: Tensor, target: Tensor, *rest: Any) -> Any:
        rows = logits.shape[0]
        return (
            reduced(logits, (rows,), rest[-1]),
            logits.new_empty((rows, 3), dtype=acc(logits)),
            logits.new_empty((), dtype=acc(logits)),
        )

    @torch.library.register_fake("facefast::focal_backward", lib=library)
    def _(grad: Tensor, logits: Tensor, *rest: Any) -> Any:
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("facefast::sigmoid_focal_forward", lib=library)
    def _(logits: Tensor, target: Tensor, *rest: Any) -> Any:
        return reduced(logits, logits.shape, rest[-1]), logits.new_empty((), dtype=acc(logits))

    @torch.library.register_fake("facefast::sigmoid_focal_backward", lib=library)
    def _(grad: Tensor, logits: Tensor, *rest: Any) -> Any:
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("facefast::linear_focal_forward", lib=library)
    def _(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        rows, classes = x.shape[0], weight.shape[0]
        reduction, normalize, _, keep = rest[-4:]
        step = 16 // x.element_size() if x.is_cuda else 1
        return (
            reduced(x, (rows,), reduction),
            x.new_empty((rows, 3), dtype=acc(x)),
            x.new_empty((), dtype=acc(x)),
            x.new_empty((rows if normalize else 0,), dtype=acc(x)),
            x.new_empty((classes if normalize else 0,), dtype=acc(x)),
            x.new_empty((rows if keep else 0, (classes + step - 1) // step * step)),
        )

    @torch.library.register_fake("facefast::linear_focal_backward", lib=library)
    def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        need_x, need_weight = rest[-2:]
        return (
            x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
            x.new_empty((weight.shape[0] if need_weight else 0, x.shape[1])),
        )

    # The three parts of `sharded_focal_loss`, which is their autograd.
    @torch.library.register_fake("facefast::block_statistics", lib=library)
    def _(x: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> Any:
        smoothing, normalize = rest[0], rest[-2]
        return (
            x.new_empty((x.shape[0], 3), dtype=acc(x)),
            x.new_empty((x.shape[0] if smoothing > 0 else 0,), dtype=torch.float64),
            x.new_empty((x.shape[0] if normalize else 0,), dtype=acc(x)),
            x.new_empty((weight.shape[0] if normalize else 0,), dtype=acc(x)),
        )

    @torch.library.register_fake("facefast::block_losses", lib=library)
    def _(stats: Tensor, sums: Tensor, target: Tensor, *rest: Any) -> Any:
        return reduced(stats, (stats.shape[0],), rest[-2]), stats.new_empty(())

    @torch.library.register_fake("facefast::block_backward", lib=library)
    def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        need_x, need_weight = rest[-2:]
        return (
            x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
            x.new_empty((weight.shape[0] if need_weight else 0, x.shape[1])),
        )

    _differentiable(library, "focal", tensors=4, gradients=1)
    _differentiable(library, "linear_focal", tensors=5, gradients=2)
    _differentiable(library, "sigmoid_focal", tensors=3, gradients=1)


if DEVICES:
    LIBRARY = torch.library.Library("facefast", "IMPL")
    _register(LIBRARY)
