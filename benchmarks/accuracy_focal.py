"""How many digits of the focal loss survive float32: public formulations beside ours, against 60-digit arithmetic.

    python benchmarks/accuracy_focal.py

Rows of 1000 logits whose label leads the greatest other logit by `gap`; the worst relative error, over the exponents
below, of the loss and of its derivative with respect to the label's logit. Truths below float32's smallest normal
number are left out. The formulations are written here from what the named libraries compute, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import torch
import torch.nn.functional as F
from torch import Tensor

from facefast.ops import focal_loss

mp.mp.dps = 60
CLASSES = 1000
GAPS = (-80, -20, 0, 5, 12, 17, 25, 50, 80)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 2.5)
SMALLEST = 1.2e-38


def truth(x: list[float], label: int, gamma: float) -> tuple[mp.mpf, mp.mpf]:
    """Loss and derivative with respect to x[label]."""
    powers = [mp.exp(mp.mpf(v)) for v in x]
    total = mp.fsum(powers)
    others = mp.fsum(p for j, p in enumerate(powers) if j != label)
    p, u, ce = powers[label] / total, others / total, mp.log1p(others / powers[label])
    return u**gamma * ce, -(u**gamma) * (u + gamma * p * ce)


def by_autograd(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., tuple[float, float]]:
    """Loss and derivative by torch's own differentiation."""

    def run(x: Tensor, label: int, gamma: float) -> tuple[float, float]:
        leaf = x[None].clone().requires_grad_()
        value = loss(leaf, torch.tensor([label]), gamma).sum()
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad[0, label].item()

    return run


def mmcv(x: Tensor, label: int, gamma: float) -> tuple[float, float]:
    """mmcv's softmax_focal_loss kernels: the derivative contains (1 - p)^(gamma - 1)."""
    p = F.softmax(x, 0)[label]
    log_p = p.clamp(min=torch.finfo(torch.float32).tiny).log()
    loss = -((1 - p) ** gamma) * log_p
    grad = (-((1 - p) ** gamma) + gamma * (1 - p) ** (gamma - 1) * p * log_p) * (1 - p)
    return loss.item(), grad.item()


def kornia(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """kornia's focal_loss: pow(1 - softmax, gamma) * log_softmax."""
    log_p = F.log_softmax(x, 1).gather(1, y[:, None])[:, 0]
    return -((1 - F.softmax(x, 1).gather(1, y[:, None])[:, 0]) ** gamma) * log_p


def row_operations(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Row operations on cross entropy, with the stable expm1: the best that a fused one (Liger, apex, quack) allows."""
    cross_entropy = F.cross_entropy(x, y, reduction="none")
    return (-torch.expm1(-cross_entropy)) ** gamma * cross_entropy


def ours(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """`facefast.ops.focal_loss`."""
    return focal_loss(x, y, gamma=gamma, reduction="none")


FORMS = {
    "mmcv": mmcv,
    "kornia": by_autograd(kornia),
    "cross entropy + row operations": by_autograd(row_operations),
    "facefast": by_autograd(ours),
}


def worst(form: Callable[..., tuple[float, float]], gap: float) -> str:
    """The worst relative error over the exponents, and NaN if one occurs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CLASSES, generator=generator)
    x[3] = torch.cat([x[:3], x[4:]]).max() + gap
    errors, undefined = [0.0], False
    for gamma in GAMMAS:
        for value, exact in zip(form(x, 3, gamma), truth(x.tolist(), 3, gamma), strict=True):
            undefined |= value != value
            if abs(exact) > SMALLEST and value == value:
                errors.append(float(abs((value - exact) / exact)))
    return f"{max(errors):.0e}" + (" and NaN" if undefined else "")


def main() -> None:
    print("| gap |", " | ".join(FORMS), "|")
    print("|---|" + "---|" * len(FORMS))
    for gap in GAPS:
        print(f"| {gap} |", " | ".join(worst(form, gap) for form in FORMS.values()), "|", flush=True)


if __name__ == "__main__":
    main()
