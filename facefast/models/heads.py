"""Heads: from embeddings [B, D] to one number per identity, and to attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facefast.recipe import AttributeSpec

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


class AttributeHeads(nn.Module):
    """A direction per attribute on the embedding, [B, D] to logits [B, K], see `AttributeSpec.outputs`.

    The steps of an ordinal attribute share its direction and differ in their bias, so that their order cannot
    contradict itself (CORAL, Cao et al. 2020, arXiv:1901.07884).
    """

    biases: nn.Parameter
    attribute_of: Tensor
    thresholds: Tensor

    def __init__(self, embedding: int, specs: Sequence[AttributeSpec]) -> None:
        super().__init__()
        self.specs = tuple(specs)
        owners = [k for k, spec in enumerate(specs) for _ in range(spec.outputs)]
        steps = [level for spec in specs for level in (spec.levels[:-1] or (0.0,))]
        self.weight = nn.Parameter(torch.empty(len(self.specs), embedding))
        nn.init.normal_(self.weight, std=0.01)
        self.biases = nn.Parameter(torch.zeros(len(owners)))
        self.register_buffer("attribute_of", torch.tensor(owners), persistent=False)
        self.register_buffer("thresholds", torch.tensor(steps), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes in order."""
        return tuple(spec.name for spec in self.specs)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of any length to logits [B, K], float32 or wider."""
        with torch.autocast(embeddings.device.type, enabled=False):
            spread = unit(embeddings) * math.sqrt(embeddings.shape[1])  # coordinates of about 1, whatever the length
            return F.linear(spread, self.weight)[:, self.attribute_of] + self.biases

    def targets(self, values: Tensor) -> Tensor:
        """Values of the attributes [B, A] to what the logits stand for: [B, K] of 0, 1, or NaN where unknown."""
        # An ordinal value is a row of yes and no: is it above the first level, above the second, ...
        spread = values[:, self.attribute_of]
        return (spread > self.thresholds).to(values).masked_fill(spread.isnan(), torch.nan)

    def read(self, logits: Tensor) -> Tensor:
        """Logits [B, K] to [B, A]: the probability of a yes, or the level whose steps below are all likelier than
        not."""
        columns, start = [], 0
        for spec in self.specs:
            own = torch.sigmoid(logits[:, start : start + spec.outputs].float())
            start += spec.outputs
            if spec.levels:
                levels = torch.tensor(spec.levels, device=logits.device)
                columns.append(levels[(own > 0.5).sum(1)])
            else:
                columns.append(own[:, 0])
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def start_from(self, values: Tensor) -> None:
        """Biases that give how often each logit's answer is yes among values [N, A]; the loss then starts low."""
        positive = self.targets(values)
        known = ~positive.isnan()
        # One yes and one no more than there are: an answer that all pictures share must not give an infinite bias.
        rate = (positive.nan_to_num().sum(0) + 1) / (known.sum(0) + 2)
        self.biases.copy_(torch.logit(rate))
