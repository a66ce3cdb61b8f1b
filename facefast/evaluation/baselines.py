"""What a model does without any fine-tuning: class means, nearest neighbours, a linear probe on its embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from facefast.models.heads import START_SCALE, unit

NEIGHBOURS = 5
TEMPERATURE = 0.07
"""Of the neighbours' votes, exp(cosine / temperature), as Wu et al. 2018 (arXiv:1805.01978) take it."""
PROBE_MARGIN = 0.1
"""Taken from the right class's cosine while the probe is fitted."""
PROBE_PENALTY = 1e-2
"""Of the probe's squared distances to the class means in its loss."""
CLASS_MEANS = "class means"
PROBE = "linear probe"
ADAPTED = f"adapted {CLASS_MEANS}"
"""The row of the final table for the adapted source model before any update."""
ADAPTED_PROBE = f"adapted {PROBE}"
"""The same for a probe on its embeddings."""
BASELINES = {
    "class_means_top1": CLASS_MEANS,
    "neighbours_top1": f"{NEIGHBOURS} nearest neighbours",
    "probe_top1": PROBE,
}
"""Their names in an evaluation's results, and for people."""


class LabelledEmbeddings(NamedTuple):
    """Embeddings of training pictures, for methods that train no network."""

    embeddings: Tensor
    """[N, D] of any length."""
    labels: Tensor
    """[N] int64, below 0 for rows that do not count."""
    num_classes: int

    def joined(self, other: LabelledEmbeddings) -> LabelledEmbeddings:
        """These pictures and others of the same classes."""
        return self._replace(
            embeddings=torch.cat([self.embeddings, other.embeddings]), labels=torch.cat([self.labels, other.labels])
        )


def baseline_accuracies(
    known: LabelledEmbeddings, embeddings: Tensor, labels: Tensor, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Top-1 accuracy of each of `BASELINES` on test pictures.

    Args:
        known: the training pictures.
        embeddings: [M, D] of the test pictures, of any length.
        labels: [M] int64.
        device: where the neighbours are looked for and the probe is fitted.
    """
    labelled = known.labels >= 0
    train, train_labels = unit(known.embeddings[labelled]), known.labels[labelled]
    test = unit(embeddings)
    means = class_means(train, train_labels, known.num_classes)
    # Means are summed on the CPU: a GPU adds rows of a class in any order, and two runs would differ.
    there = train.to(device), train_labels.to(device), test.to(device)
    found = (
        (test @ means.T).argmax(1),
        nearest_neighbours(*there, known.num_classes).cpu(),
        (there[2] @ linear_probe(*there[:2], known.num_classes).T).argmax(1).cpu(),
    )
    return {name: float((predicted == labels).float().mean()) for name, predicted in zip(BASELINES, found, strict=True)}


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """[M] int64: the class with the most votes among the nearest training pictures, nearer ones voting more.

    Args:
        train: [N, D] of length 1.
        labels: [N] int64.
        test: [M, D] of length 1.
        num_classes: C.
    """
    predicted = []
    for block in test.split(1024):  # no M x N matrix
        cosines, rows = (block @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        # Votes on the CPU too, and for the same reason.
        votes = torch.zeros(len(block), num_classes)
        votes.scatter_add_(1, labels[rows].cpu(), (cosines / TEMPERATURE).exp().cpu())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def linear_probe(train: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C, D] unit vectors whose cosines to a picture name its class: a softmax on frozen embeddings, fitted by L-BFGS
    from the class means, as a cosine head would be.

    Args:
        train: [N, D] of any length.
        labels: [N] int64, below 0 for rows that do not count.
        num_classes: C.

    Raises:
        ValueError: as `class_means`.
    """
    means = class_means(train.cpu(), labels.cpu(), num_classes).to(train.device)  # summed in one order
    vectors, known = unit(train[labels >= 0]), labels[labels >= 0]
    weight = means.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        cosines = F.linear(vectors, F.normalize(weight, dim=1))
        right = cosines.gather(1, known[:, None]) - PROBE_MARGIN
        loss = F.cross_entropy(START_SCALE * cosines.scatter(1, known[:, None], right), known)
        loss = loss + PROBE_PENALTY * (weight - means).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad(), torch.inference_mode(False):  # callers that measure may have gradients off
        optimizer.step(closure)
    return F.normalize(weight.detach(), dim=1)


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C, D] unit vectors: the normalised mean of each class's normalised embeddings.

    Args:
        embeddings: [N, D].
        labels: [N] int64; rows with a negative label do not count.

    Raises:
        ValueError: a class without a single picture.
    """
    known = labels >= 0
    unit = F.normalize(embeddings[known].float(), dim=1)
    counts = torch.bincount(labels[known], minlength=num_classes)
    if bool((counts == 0).any()):
        empty = int((counts == 0).sum())
        raise ValueError(f"{empty} of {num_classes} classes have no readable picture; a class mean needs one")
    sums = torch.zeros(num_classes, unit.shape[1]).index_add_(0, labels[known], unit)
    return F.normalize(sums, dim=1)
