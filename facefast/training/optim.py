"""Optimisers and learning-rate schedules, as a phase names them."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from facefast.recipe import Phase


def build_optimizer(phase: Phase, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The phase's optimiser over parameter groups that carry their own `lr` and `weight_decay`.

    apex's fused optimisers are used on a GPU where apex is importable, torch's fused ones otherwise.
    """
    # Fused: one kernel for many tensors, which obeys a GradScaler's `found_inf` without the host reading it.
    betas = (phase.momentum, 0.999)
    if device.type == "cuda" and (apex := _apex()):
        return _fused_by_apex(apex, phase, groups)
    if phase.optimizer == "sgd":
        momentum = phase.momentum
        return with_momentum(Sgd(groups, lr=phase.lr, momentum=momentum, nesterov=momentum > 0, fused=True))
    if phase.optimizer == "adam":
        return Adam(groups, lr=phase.lr, betas=betas, fused=True)
    if phase.optimizer == "adamw":
        return AdamW(groups, lr=phase.lr, betas=betas, fused=True)
    return Lamb(groups, lr=phase.lr, betas=betas)


class _Uncompiled(torch.optim.Optimizer):
    """Methods without what keeps compiled code out of them: their first call would load torch's compiler, which takes
    a second, and facefast compiles no optimiser."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class Sgd(_Uncompiled, torch.optim.SGD):
    """torch's own."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class Adam(_Uncompiled, torch.optim.Adam):
    """torch's own."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(_Uncompiled, torch.optim.AdamW):
    """torch's own."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The optimiser with its momentum at 0 from the start.

    torch's fused SGD makes the buffers of its first step from memory as it finds it and leaves them so where a
    GradScaler has that step skipped: the next one then adds whatever was there. From zeros the first step is the same,
    0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["momentum"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _fused_by_apex(apex: Any, phase: Phase, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    betas = (phase.momentum, 0.999)
    optimizer: torch.optim.Optimizer
    if phase.optimizer == "sgd":
        optimizer = apex.FusedSGD(groups, lr=phase.lr, momentum=phase.momentum, nesterov=phase.momentum > 0)
    elif phase.optimizer == "lamb":
        optimizer = apex.FusedLAMB(groups, lr=phase.lr, betas=betas)
    else:
        optimizer = apex.FusedAdam(groups, lr=phase.lr, betas=betas, adam_w_mode=phase.optimizer == "adamw")
    return optimizer


def _apex() -> Any:
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError:
        return None


class Lamb(_Uncompiled):
    """LAMB (You et al. 2019, arXiv 1904.00962), decoupled weight decay, in multi-tensor operations.

    Takes `found_inf` from a GradScaler on the device, as torch's fused optimisers do: a step with a non-finite gradient
    changes nothing and needs no synchronisation.
    """

    # GradScaler.step then sets these two and calls `step` without reading `found_inf` on the host.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        # `keep` is 0 for a step to be skipped. The host does not know it, so every operation below runs, with a weight
        # that makes it change nothing.
        keep = torch.ones((), device=params[0].device)
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        if self.grad_scale is not None:
            grads = list(torch._foreach_div(grads, self.grad_scale))
        if self.found_inf is not None:
            keep = 1 - self.found_inf.reshape(())
            # A weight of 0 would not do for the gradients themselves: 0 * inf is NaN.
            grads = [torch.where(keep > 0, grad, 0) for grad in grads]
        beta1, beta2 = group["betas"]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, [keep] * len(steps))
        torch._foreach_lerp_(first, grads, [keep * (1 - beta1)] * len(first))
        squares = torch._foreach_mul(grads, grads)
        torch._foreach_lerp_(second, list(squares), [keep * (1 - beta2)] * len(second))
        # 0 where the very first step is skipped: the updates are then NaN, and the last line leaves them out.
        bias1 = [1 - beta1**step for step in steps]
        bias2 = [1 - beta2**step for step in steps]
        updates = []
        for p, m, v, b1, b2 in zip(params, first, second, bias1, bias2, strict=True):
            update = (m / b1) / ((v / b2).sqrt() + group["eps"])
            updates.append(update.add(p, alpha=group["weight_decay"]))
        # LAMB's trust ratio: the length of the update follows that of the weights. Where either is 0 (a new bias) a
        # ratio means nothing.
        trust = [
            torch.where((weight > 0) & (size > 0), weight / size, 1.0)
            for weight, size in zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True)
        ]
        lr = group["lr"].to(keep) if isinstance(group["lr"], Tensor) else group["lr"]
        rate = [torch.where(keep > 0, lr * ratio, 0.0) for ratio in trust]
        for p, update, r in zip(params, updates, rate, strict=True):
            p.sub_(torch.where(keep > 0, update, 0.0) * r)


def rate_factor(phase: Phase, step: int, steps: int, steps_per_epoch: int) -> float:
    """What the peak rates are multiplied by at `step` of a phase's `steps`; a pure function, so a resume needs no
    state."""
    warmup = round(phase.warmup * steps)
    if phase.schedule == "onecycle":
        # Smith's one-cycle policy has a warm-up by itself; 0.3 and 1/25 are torch.optim's OneCycleLR's own defaults.
        warmup = warmup or round(0.3 * steps)
        start, end = 1 / 25, 1e-4
        if step < warmup:
            return start + (1 - start) * (1 - math.cos(math.pi * step / warmup)) / 2
        progress = (step - warmup) / max(1, steps - warmup)
        return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
    if step < warmup:  # neither 0 at the first step, which would waste it, nor the peak before the warm-up is over
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if phase.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if phase.schedule == "poly":
        return (1 - progress) ** 2
    if phase.schedule == "step":
        return float(phase.step_gamma ** (step // (phase.step_epochs * steps_per_epoch)))
    return 1.0
