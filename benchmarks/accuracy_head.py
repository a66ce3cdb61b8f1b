"""What 16 bits cost a head: the loss and the gradient of its weights, beside those of cosines in float32.

    python benchmarks/accuracy_head.py

256 embeddings of 512 numbers, 10 177 classes, ArcFace at scale 64, on the CPU; embeddings are random, or lean to their
class's direction as those of a network near the end of its training do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facefast.models.heads import CosineHead
from facefast.ops import Arc, focal_loss

ROWS, CLASSES, WIDTH = 256, 10_177, 512
OPTIONS: dict[str, Any] = {
    "gamma": 0.0,
    "alpha": None,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "margin": Arc(0.5),
    "scale": 64.0,
    "reduction": "sum",
}
Loss = Callable[[Tensor], Tensor]


def contenders(head: CosineHead, labels: Tensor) -> dict[str, Loss]:
    """Losses of embeddings, the first of which is what the others are compared with."""

    def product(x: Tensor, dtype: torch.dtype) -> Tensor:
        """As InsightFace's head under autocast: unit vectors in float32, their product in 16 bits."""
        return F.linear(F.normalize(x).to(dtype), F.normalize(head.weight).to(dtype))

    found: dict[str, Loss] = {
        "float32": lambda x: focal_loss(head(x), labels, **OPTIONS),
        "float32, embeddings bfloat16": lambda x: focal_loss(head(x.bfloat16()), labels, **OPTIONS),
        "float32, fused": lambda x: head.fused_loss(x, labels, torch.float32, **OPTIONS).loss,
    }
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        found[f"{name}, fused"] = lambda x, dtype=dtype: head.fused_loss(x, labels, dtype, **OPTIONS).loss  # type: ignore[misc]
        found[f"{name}, product"] = lambda x, dtype=dtype: focal_loss(product(x, dtype), labels, **OPTIONS)  # type: ignore[misc]
    return found


def main() -> None:
    torch.manual_seed(0)
    for lean in (0.0, 1.0):
        head, labels = CosineHead(WIDTH, CLASSES), torch.randint(CLASSES, (ROWS,))
        x = 20 * (F.normalize(torch.randn(ROWS, WIDTH)) + lean * F.normalize(head.weight.detach())[labels])
        exact: Tensor | None = None
        for name, loss in contenders(head, labels).items():
            head.zero_grad()
            value = loss(x) / ROWS
            value.backward()
            assert head.weight.grad is not None
            gradient = head.weight.grad.clone()
            exact = gradient if exact is None else exact
            error = float((gradient - exact).norm() / exact.norm())
            print(f"lean {lean:.0f}  {name:30s} loss {value.item():8.4f}  gradient off by {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
