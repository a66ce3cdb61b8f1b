"""Where embeddings lie and how those of one person scatter, and the linear map that moves them to 0 and makes them
scatter alike in every direction.

Within-class covariance normalisation (Hatch et al. 2006): the map is the inverse square root of the within-person
covariance, drawn towards a multiple of the identity by as much as verification on people left out asks for. What all
pictures have in common, such as a camera's blur, is subtracted before (Dehak et al. 2011): it says nothing of anybody,
and makes all cosines large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.models.fold import LinearMap
from facefast.models.heads import SHORTEST

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


def sums_of(embeddings: Tensor, seen: Tensor, groups: NDArray[np.int64], count: int) -> Tensor:
    """[count, D + 1] float64: of each group's rows their sum and, last, their number.

    Args:
        embeddings: [N, D]; rows with numbers that are not finite do not count.
        seen: [N] bool, which rows count.
        groups: [N] the group of each row.
        count: groups.
    """
    sums = torch.zeros(count, embeddings.shape[1] + 1, dtype=torch.float64)
    rows = seen & torch.from_numpy(finite(embeddings))
    for block, counts, group in zip(
        embeddings.split(BLOCK), rows.split(BLOCK), torch.from_numpy(groups).split(BLOCK), strict=True
    ):
        members = torch.nn.functional.one_hot(group[counts], count).float()  # [b, count]
        sums[:, :-1] += members.T @ block[counts].float()
        sums[:, -1] += members.sum(0)
    return sums


def mean_of(sums: Tensor) -> Tensor:
    """[D] float64 of one or more rows [K, D + 1] of `sums_of`; zeros where they are of nothing."""
    total = sums.sum(0)
    return total[:-1] / total[-1].clamp(min=1)


def within_scatter(
    embeddings: Tensor,
    labels: NDArray[np.int64] | NDArray[np.int32],
    folds: NDArray[np.int64],
    count: int,
    centre: Tensor | None = None,
) -> list[Scatter]:
    """One `Scatter` for each group of people, of embeddings made 1 long.

    Needs no memory beside the embeddings but that of a block of them.

    Args:
        embeddings: [N, D] of any length; rows with numbers that are not finite do not count.
        labels: [N], below 0 for rows that do not count.
        folds: [C] the group of each person, 0 to count - 1.
        count: groups.
        centre: [D], subtracted before they are made 1 long.
    """
    labels = np.where(finite(embeddings), labels, -1)
    pictures = np.bincount(labels[labels >= 0], minlength=len(folds))
    found = []
    for fold in range(count):
        wanted = (pictures > 1) & (folds == fold)
        rows = np.flatnonzero(wanted[labels] & (labels >= 0))
        rows = rows[np.argsort(labels[rows], kind="stable")]
        within = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
        for block in _blocks(labels[rows]):
            within += _products(embeddings, rows[block], labels[rows[block]], centre)
        found.append(Scatter(within, len(rows) - int(wanted.sum()), int(wanted.sum())))
    return found


def finite(embeddings: Tensor) -> NDArray[np.bool_]:
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


def _directions(embeddings: Tensor, rows: Tensor, centre: Tensor | None) -> Tensor:
    """[K, D] of some rows, centred and 1 long; taking them out makes the only copy."""
    vectors = embeddings[rows].float()
    if centre is not None:
        vectors -= centre.float()
    vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=SHORTEST)
    return vectors


def _products(
    embeddings: Tensor,
    rows: NDArray[np.int64],
    people: NDArray[np.int64] | NDArray[np.int32],
    centre: Tensor | None,
) -> Tensor:
    """[D, D] float64 sum of x x^T, x the differences to the means of people, who come in stretches."""
    number = torch.from_numpy(np.concatenate([[0], np.cumsum(np.diff(people) != 0)]))
    means = torch.zeros(int(number[-1]) + 1, embeddings.shape[1])
    pieces = [torch.from_numpy(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK)]
    of_whom = number.split(BLOCK)
    away: Tensor | None = None
    for piece, whom in zip(pieces, of_whom, strict=True):  # more than one only for a person of many pictures
        away = _directions(embeddings, piece, centre)
        means.index_add_(0, whom, away)
    means /= number.bincount()[:, None]
    total = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
    for piece, whom in zip(pieces, of_whom, strict=True):
        if away is None or len(pieces) > 1:  # one alone is still at hand
            away = _directions(embeddings, piece, centre)
        away -= means[whom]
        total += (away.T @ away).double()
    return total


class Whitening:
    """The inverse square root of ((1 - s) S + s tr(S) / D I), S being the within-person covariance.

    Its scale is such that what scatters as much as the average direction keeps its length.

    Args:
        scatter: which `spreads`.
    """

    def __init__(self, scatter: Scatter) -> None:
        covariance = scatter.within / scatter.freedom
        self._values, self._vectors = torch.linalg.eigh(covariance / covariance.trace() * len(covariance))

    def map(self, shrinkage: float, centre: Tensor | None = None) -> LinearMap:
        """For s above 0 and at most 1, where nothing is changed but that `centre` [D] becomes 0."""
        factors = ((1 - shrinkage) * self._values.clamp(min=0) + shrinkage).rsqrt()
        matrix = (self._vectors * factors) @ self._vectors.T
        return LinearMap(matrix, -matrix @ (torch.zeros(len(matrix)) if centre is None else centre).to(matrix))


def whitening(scatter: Scatter, shrinkage: float, centre: Tensor | None = None) -> LinearMap:
    """The map of `Whitening` for one shrinkage."""
    return Whitening(scatter).map(shrinkage, centre)


def centring(centre: Tensor) -> LinearMap:
    """Subtracts [D] and changes nothing else."""
    return LinearMap(torch.eye(len(centre), dtype=torch.float64), -centre.double())


def map_rows(mapped: LinearMap, embeddings: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Maps embeddings in place, a block at a time.

    Args:
        mapped: what to do.
        embeddings: [N, D] float32.
        seen: [N] bool, which rows count below.

    Returns:
        Mean and variance [D] float64 of the mapped rows.
    """
    sums = torch.zeros(3, embeddings.shape[1], dtype=torch.float64)
    shift: Tensor | None = None
    for block, read in zip(embeddings.split(BLOCK), seen.split(BLOCK), strict=True):
        moved = mapped(block)
        block.copy_(moved)
        if not bool(read.all()) or not bool(moved.sum().isfinite()):
            moved = moved[read & moved.isfinite().all(1)]
        if len(moved):
            shift = moved.mean(0) if shift is None else shift  # squares of what is far from 0 would round
            moved -= shift
            squares = torch.linalg.vector_norm(moved, dim=0).square()
            sums += torch.stack([torch.full_like(shift, len(moved)), moved.sum(0), squares]).double()
    if shift is None:
        raise ValueError("no embedding could be read; there is nothing to map")
    mean = sums[1] / sums[0]
    return mean + shift, (sums[2] / sums[0] - mean.square()).clamp(min=0)
