"""Heads: from embeddings [B, D] to one number per identity. `face.FaceModel` ends in one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Logits per unit of cosine in a linear head that starts from class means. Measured on held-out pictures of 239
# CelebA identities with a MobileFaceNet: cross entropy 0.94 at 8, 0.14 at 24, 0.22 at 64; random weights start at
# log(239) = 5.48.
START_SCALE = 24.0
# Embeddings shorter than this are not stretched to length 1: their gradient would be.
SHORTEST = 1e-6


def unit(vectors: Tensor) -> Tensor:
    """Rows [N, D] scaled to length 1 in float32 or wider, whatever autocast says."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return F.normalize(vectors.to(wide), dim=1, eps=SHORTEST)


class LinearHead(nn.Linear):
    """Logits of a softmax classifier, [B, D] to [B, C]."""

    def __init__(self, embedding: int, num_classes: int) -> None:
        super().__init__(embedding, num_classes)

    def reset_parameters(self) -> None:
        """Random weights small enough that every class starts equally likely."""
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start_from(self, means: Tensor, norm: float) -> None:
        """Makes the logits `START_SCALE` times the cosine to each class mean.

        Args:
            means: [C, D] class means of length 1.
            norm: usual length of an embedding.
        """
        self.weight.copy_(means * (START_SCALE / norm))
        self.bias.zero_()


class CosineHead(nn.Module):
    """cos(angle) to each class's direction, [B, D] to [B, C]; the loss applies scale and margin.

    Runs in float32 under autocast: a loss scaled by 64 turns bfloat16's rounding of a cosine into an eighth of a logit.
    """

    def __init__(self, embedding: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embedding))
        nn.init.normal_(self.weight, std=embedding**-0.5)  # length about 1, as after `start_from`

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of any length to cosines [B, C], float32 or wider."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(unit(embeddings), unit(self.weight))

    @torch.no_grad()
    def start_from(self, means: Tensor, norm: float) -> None:
        """Points each class's direction at its mean.

        Args:
            means: [C, D] class means of length 1.
            norm: usual length of an embedding; without effect on cosines, taken so that heads are interchangeable.
        """
        self.weight.copy_(means)


HEADS: dict[str, type[LinearHead] | type[CosineHead]] = {"linear": LinearHead, "cosine": CosineHead}
