"""How embeddings of one person scatter, and the linear map that makes them scatter alike in every direction.

Within-class covariance normalisation (Hatch et al. 2006): the map is the inverse square root of the within-person
covariance, drawn towards a multiple of the identity by as much as verification on people left out asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.models.fold import LinearMap
from facefast.models.heads import unit

LEAST_SPREAD = 1e-8
"""Mean squared difference of a unit vector to the person's mean; copies of one picture have less."""
BLOCK = 8192
"""Rows of embeddings that are looked at in one go."""


class Scatter(NamedTuple):
    """What is known of how the embeddings of people differ; sums, so that those of several groups of people add up."""

    within: Tensor
    """[D, D] float64: of x x^T over all rows, x being the difference to the person's mean."""
    freedom: int
    """Rows less people: what `within` is divided by to be a covariance."""
    people: int
    """With two pictures or more; others say nothing of how pictures of one person differ."""

    @property
    def spreads(self) -> bool:
        """Whether pictures of one person differ at all, by more than rounding."""
        return self.freedom > 0 and float(self.within.trace()) / self.freedom > LEAST_SPREAD


def added(scatters: Sequence[Scatter]) -> Scatter:
    """Of several groups of people, the one of all."""
    within, freedom, people = zip(*scatters, strict=True)
    return Scatter(torch.stack(within).sum(0), sum(freedom), sum(people))


def within_scatter(
    embeddings: Tensor, labels: NDArray[np.int64] | NDArray[np.int32], folds: NDArray[np.int64], count: int
) -> list[Scatter]:
    """One `Scatter` for each group of people, of embeddings made 1 long.

    Needs no memory beside the embeddings but that of a block of them.

    Args:
        embeddings: [N, D] of any length; rows with numbers that are not finite do not count.
        labels: [N], below 0 for rows that do not count.
        folds: [C] the group of each person, 0 to count - 1.
        count: groups.
    """
    labels = np.where(_finite(embeddings), labels, -1)
    pictures = np.bincount(labels[labels >= 0], minlength=len(folds))
    found = []
    for fold in range(count):
        wanted = (pictures > 1) & (folds == fold)
        rows = np.flatnonzero(wanted[labels] & (labels >= 0))
        rows = rows[np.argsort(labels[rows], kind="stable")]
        within = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
        for block in _blocks(labels[rows]):
            within += _products(embeddings, rows[block], labels[rows[block]])
        found.append(Scatter(within, len(rows) - int(wanted.sum()), int(wanted.sum())))
    return found


def _finite(embeddings: Tensor) -> NDArray[np.bool_]:
    """[N] whether a row holds numbers that can be used; rows of zeros have no direction."""
    # A length makes no copy of the embeddings, as a sum of their squares would.
    lengths: NDArray[np.float32] = torch.linalg.vector_norm(embeddings, dim=1).numpy()
    return np.asarray(np.isfinite(lengths) & (lengths > 0))


def _blocks(people: NDArray[np.int64] | NDArray[np.int32]) -> Iterator[slice]:
    """Slices of about `BLOCK` rows that end where a person does; `people` comes in stretches of one person."""
    ends = np.append(np.flatnonzero(np.diff(people)) + 1, len(people))
    start = 0
    while start < len(people):
        last = max(np.searchsorted(ends, start + BLOCK, side="right") - 1, np.searchsorted(ends, start, side="right"))
        yield slice(start, int(ends[last]))
        start = int(ends[last])


def _products(embeddings: Tensor, rows: NDArray[np.int64], people: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
    """[D, D] float64 sum of x x^T, x the differences to the means of people, who come in stretches."""
    number = torch.from_numpy(np.concatenate([[0], np.cumsum(np.diff(people) != 0)]))
    means = torch.zeros(int(number[-1]) + 1, embeddings.shape[1])
    pieces = [torch.from_numpy(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK)]
    of_whom = number.split(BLOCK)
    for piece, whom in zip(pieces, of_whom, strict=True):  # more than one only for a person of many pictures
        means.index_add_(0, whom, unit(embeddings[piece].float()))
    means /= number.bincount()[:, None]
    total = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
    for piece, whom in zip(pieces, of_whom, strict=True):
        away = unit(embeddings[piece].float()).sub_(means[whom])
        total += (away.T @ away).double()
    return total


def whitening(scatter: Scatter, shrinkage: float) -> LinearMap:
    """The inverse square root of ((1 - s) S + s tr(S) / D I), S being the within-person covariance.

    Its scale is such that what scatters as much as the average direction keeps its length.

    Args:
        scatter: which `spreads`.
        shrinkage: s, above 0 and at most 1, where nothing is changed.
    """
    size = len(scatter.within)
    covariance = scatter.within / scatter.freedom
    mean = covariance.trace() / size
    values, vectors = torch.linalg.eigh(covariance / mean)
    factors = ((1 - shrinkage) * values.clamp(min=0) + shrinkage).rsqrt()
    return LinearMap((vectors * factors) @ vectors.T, torch.zeros(size, dtype=torch.float64))
