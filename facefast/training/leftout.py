"""What a change of embeddings does to verification of people who had no part in it, and whether that is above
chance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.models.heads import unit

Labels = NDArray[np.int64] | NDArray[np.int32]
FAR = 1e-2
"""At which people left out are verified."""
MOST_ASKED = 1000
"""Pictures of the people left out, in one fold."""
MOST_EACH = 20
"""Of them, of one person."""
ERRORS = 2.0
"""Standard errors over people by which a gain has to be above 0: about one chance in forty."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one setting does to verification of people left out."""

    name: str
    tar: float
    """At `FAR`, the mean over people."""
    gain: float
    """Over doing nothing."""
    low: float
    high: float
    """`ERRORS` standard errors below and above the gain."""
    people: int
    """Of whom this is the mean."""

    def told(self) -> str:
        """For people."""
        return (
            f"  {self.name}: TAR at FAR {FAR:.0%} of {self.people} people left out {self.tar:.1%}, "
            f"{100 * self.gain:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        )


def tar_of_people(embeddings: Tensor, labels: Labels) -> Tensor:
    """[P] for each person with two pictures, in the order of their labels: the part of pairs of their pictures above
    the threshold that `FAR` of all pairs of different people pass.

    Args:
        embeddings: [N, D] of any length.
        labels: [N], not below 0.
    """
    people, numbers = np.unique(labels, return_inverse=True)
    number = torch.from_numpy(numbers)
    directions = unit(embeddings)
    scores = directions @ directions.T
    same = number[:, None] == number
    different = scores[~same]
    counts = number.bincount()
    several = counts > 1
    if not len(different):  # of one person alone nothing can be told
        return torch.full((int(several.sum()),), torch.nan, dtype=torch.float64)
    rank = max(1, math.ceil(len(different) * FAR))
    threshold = different.kthvalue(len(different) - rank + 1).values
    above = ((scores >= threshold) & same.fill_diagonal_(False)).sum(1)  # not with itself
    passed = torch.zeros(len(people), dtype=torch.float64).index_add_(0, number, above.double())
    return (passed / (counts * (counts - 1)))[several]


def choose(tried: Sequence[tuple[str, Tensor]], before: Tensor) -> tuple[int, tuple[Trial, ...]]:
    """Which of several settings to take, by the same people's TAR under each.

    Args:
        tried: names and [P] TARs of people left out; NaN where nothing can be told.
        before: [P] their TARs where nothing is changed.

    Returns:
        The place of the one with the largest gain among those whose gain is above chance, -1 where none is; and all of
        which something can be told.
    """
    trials, places = [], []
    for place, (name, tars) in enumerate(tried):
        told = tars.isfinite() & before.isfinite()
        gains = (tars - before)[told]
        if len(gains) < 2:  # nothing can be told
            continue
        mean, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        places.append(place)
        low, high = mean - ERRORS * error, mean + ERRORS * error
        trials.append(Trial(name, float(tars[told].mean()), mean, low, high, len(gains)))
    sure = [(trial.gain, -place) for place, trial in zip(places, trials, strict=True) if trial.low > 0]
    return -max(sure, default=(0.0, 1))[1], tuple(trials)


def groups_of_people(labels: Labels, count: int, seed: int) -> NDArray[np.int64]:
    """[C] int64, the group of each person, drawn at random; those with two pictures are in groups of one size.

    Args:
        labels: [N], below 0 for rows that do not count.
        count: groups.
        seed: of the draw.
    """
    pictures = np.bincount(labels[labels >= 0], minlength=1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(pictures))
    order = order[np.argsort(pictures[order] < 2, kind="stable")]
    groups = np.empty(len(pictures), np.int64)
    groups[order] = np.arange(len(pictures)) % count
    return groups


def rows_to_ask(
    labels: Labels, people: NDArray[np.bool_], seed: int | Sequence[int], each: int | None = None
) -> NDArray[np.int64]:
    """Rows of people with two pictures or more, by person and place: people drawn at random until `MOST_ASKED` rows are
    reached, since those whose names come first may all be of one camera, and for the same reason random pictures.

    Args:
        labels: [N], below 0 for rows that do not count.
        people: [C] whom to choose among.
        seed: of the draw.
        each: the most rows of one person; `MOST_EACH` without it.
    """
    random = np.random.Generator(np.random.Philox(seed))
    each = each or MOST_EACH
    pictures = np.bincount(labels[labels >= 0], minlength=len(people))
    chosen = random.permutation(np.flatnonzero(people & (pictures > 1)))
    chosen = chosen[np.cumsum(pictures[chosen].clip(max=each)) <= MOST_ASKED]
    rows = some_of_each(random, labels, np.flatnonzero(np.isin(labels, chosen)), each)
    return rows[np.argsort(labels[rows], kind="stable")]


def some_of_each(random: np.random.Generator, labels: Labels, rows: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    """At most `each` of the rows of a person, drawn at random, in order; fewer are among those that more would be."""
    drawn = random.permutation(rows)
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    place = np.arange(len(drawn)) - np.searchsorted(labels[drawn], labels[drawn])
    return np.sort(drawn[place < each])
