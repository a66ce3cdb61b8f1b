"""Terms of an objective beside the focal loss: class weights, triplets, contrasts, matched statistics, mixed pictures.

Pure functions of embeddings and labels. Labels below 0 count for nothing.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from facefast.models.heads import unit
from facefast.recipe import LossConfig


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights of classes by their effective number of pictures, (1 - beta) / (1 - beta^n) (Cui et al. 2019,
    arXiv:1901.05555), with mean 1 over the pictures.

    Args:
        counts: [C] pictures of each class.
        beta: in [0, 1); 0 weighs all classes alike, towards 1 by the inverse of their number.

    Returns:
        [C] float32; a class without a picture weighs 0.
    """
    n = counts.double()
    weights = torch.where(n > 0, (1 - beta) / (1 - beta**n), 0)
    mean = (weights * n).sum() / n.sum().clamp(min=1)
    return (weights / mean).float()


def batch_hard_triplet(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """max(0, margin + d(farthest of the same person) - d(nearest of another)), the mean over the rows that have both
    (Hermans et al. 2017, arXiv:1703.07737, section 2).

    Args:
        embeddings: [B, D] of any length; distances are between unit vectors.
        labels: [B] int64.
        margin: in units of that distance, which is at most 2.
    """
    vectors = unit(embeddings)
    squares = (2 - 2 * vectors @ vectors.T).clamp(min=1e-8)  # the root's slope is infinite at 0
    distances = squares.sqrt()
    same, other = _relations(labels)
    farthest = distances.masked_fill(~same, 0).amax(1)
    # Infinite without another person; the mask below keeps infinity out of the loss and out of its gradient.
    nearest = distances.masked_fill(~other, math.inf).amin(1)
    usable = same.any(1) & other.any(1)
    losses = (margin + farthest - nearest.masked_fill(~usable, 0)).clamp(min=0)
    return (losses * usable).sum() / usable.sum().clamp(min=1)


def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """-log softmax of the similarity to each picture of the same person among all others, the mean over those and over
    the rows that have one (Khosla et al. 2020, arXiv:2004.11362, equation 2).

    Args:
        embeddings: [B, D] of any length.
        labels: [B] int64.
        temperature: divides cosines, above 0.
    """
    vectors = unit(embeddings)
    same, other = _relations(labels)
    scores = (vectors @ vectors.T / temperature).masked_fill(~(same | other), -math.inf)
    lonely = ~same.any(1)  # alone in the batch; where there is no other person either, a row of -inf would give NaN
    log_sum = scores.masked_fill(lonely[:, None], 0).logsumexp(1)
    losses = (log_sum[:, None] - scores).masked_fill(~same, 0).sum(1) / same.sum(1).clamp(min=1)
    return losses.sum() / (~lonely).sum().clamp(min=1)


def _relations(labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, B] bool: another picture of the same person; a picture of another person."""
    known = (labels >= 0)[:, None] & (labels >= 0)[None]
    equal = labels[:, None] == labels[None]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return equal & known & ~itself, ~equal & known


def matched_statistics(embeddings: Tensor, target: Tensor, source: Tensor, kind: Literal["coral", "mmd"]) -> Tensor:
    """How far the embeddings of two domains are apart; 0 where either has fewer than two rows.

    Args:
        embeddings: [B, D] of any length.
        target: [B] bool, rows of the target domain.
        source: [B] bool, rows of the source domain.
        kind: coral: squared distance of the covariances / 4 D^2 (Sun & Saenko 2016, arXiv:1607.01719); mmd: squared
            maximum mean discrepancy, the sum of five Gaussian kernels about the mean distance (Long et al. 2015,
            arXiv:1502.02791).
    """
    # Coordinates of about 1, however long an embedding is and however many it has.
    vectors = unit(embeddings) * math.sqrt(embeddings.shape[1])
    # Masks as weights instead of selections: how many rows each domain has is known on the device only.
    weights = torch.stack([source, target]).to(vectors)  # [2, B]
    counts = weights.sum(1)
    enough = (counts >= 2).all()
    if kind == "coral":
        means = weights @ vectors / counts.clamp(min=1)[:, None]
        centred = vectors[None] - means[:, None]  # [2, B, D]
        covariances = (centred * weights[..., None]).mT @ centred / (counts - 1).clamp(min=1)[:, None, None]
        distance = (covariances[0] - covariances[1]).square().sum() / (4 * vectors.shape[1] ** 2)
    else:
        squares = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
        width = squares.detach().mean().clamp(min=1e-6)
        kernels = sum((-squares / (width * factor)).exp() for factor in (0.25, 0.5, 1.0, 2.0, 4.0))
        sign = weights[0] / counts[0].clamp(min=1) - weights[1] / counts[1].clamp(min=1)
        distance = sign @ kernels @ sign
    return torch.where(enough, distance, 0 * distance)  # 0, but still a part of the graph


class Mixture(NamedTuple):
    """Pictures that were mixed with others of their batch."""

    images: Tensor
    """[B, 3, H, W]."""
    partner: Tensor
    """[B] int64, the row that each picture was mixed with."""
    weight: float
    """The part of a picture that is its own."""


def mix(images: Tensor, mixup: float, cutmix: float) -> Mixture:
    """Mixes a batch by torch's generators: mixup (Zhang et al. 2018, arXiv:1710.09412) or cutmix (Yun et al. 2019,
    arXiv:1905.04899), one of them drawn where both are above 0.

    Args:
        images: [B, 3, H, W].
        mixup: parameter of the Beta distribution that weights are drawn from; 0 is off.
        cutmix: the same for cutmix.
    """
    cuts = cutmix > 0 and (mixup == 0 or bool(torch.rand(()) < 0.5))
    strength = cutmix if cuts else mixup
    weight = float(torch.distributions.Beta(strength, strength).sample())  # on the CPU: no device is waited for
    partner = torch.randperm(len(images)).to(images.device, non_blocking=True)
    if not cuts:
        return Mixture(torch.lerp(images[partner], images, weight), partner, weight)
    height, width = images.shape[2:]
    # Drawn on the CPU: the rectangle's corners become slices, for which the device need not be waited for.
    side = math.sqrt(1 - weight)
    y, x = (torch.rand(2) * torch.tensor([height, width])).int().tolist()
    top, bottom = max(0, y - round(height * side / 2)), min(height, y + round(height * side / 2))
    left, right = max(0, x - round(width * side / 2)), min(width, x + round(width * side / 2))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    # The rectangle may reach over the edge: the weight is that of the pixels that were really exchanged.
    return Mixture(mixed, partner, 1 - (bottom - top) * (right - left) / (height * width))


def best_probability(loss: LossConfig, num_classes: int) -> float:
    """The label's probability, margin included, where embeddings and classes stand as far apart as they can: cosine 1
    to one's own class and -1 / (C - 1) to each other one (Wang et al. 2018, arXiv:1801.09414, section 3.3)."""
    if loss.margin == "none" or num_classes < 2:
        return 1.0
    own = math.cos(loss.margin_size) if loss.margin == "arc" else 1 - loss.margin_size
    others = math.log(num_classes - 1) - loss.scale / (num_classes - 1)
    return 1 / (1 + math.exp(min(700.0, others - loss.scale * own)))  # exp overflows beyond 709
