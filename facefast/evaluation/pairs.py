"""Verification in full: thresholds for pairs, equal error rate, intervals by identity, spread over draws of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from facefast.data import FaceIndex, PairSet
from facefast.evaluation.intervals import (
    DRAWS,
    draw_weights,
    error_interval,
    middle_of,
    rate_again,
    threshold_interval,
    trials_worth,
)
from facefast.evaluation.measure import verification
from facefast.evaluation.metrics import Floats, Interval, roc
from facefast.evaluation.thresholds import PairThreshold, finite, lowest_threshold, refusal

FMRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""False match rates that pairs have thresholds for, as far as their number supports them."""


class PairScores(NamedTuple):
    """Scores of P comparisons of two pictures."""

    scores: Floats
    same: NDArray[np.bool_]
    """[P] whether both are of one identity."""
    one: NDArray[np.int64]
    """[P] identity of the first picture."""
    other: NDArray[np.int64]
    """[P] identity of the second."""

    @classmethod
    def of(cls, scores: ArrayLike, same: ArrayLike, one: ArrayLike, other: ArrayLike) -> PairScores:
        """Checked columns.

        Raises:
            ValueError: lengths differ, or a score is not finite.
        """
        made = cls(
            finite(scores, "scores of pairs"),
            np.asarray(same, dtype=bool),
            np.asarray(one, dtype=np.int64),
            np.asarray(other, dtype=np.int64),
        )
        if len({column.shape for column in made}) != 1:
            raise ValueError(f"columns of pairs have {[len(column) for column in made]} rows; give as many of each")
        return made


def pair_thresholds(pairs: PairScores, fmrs: Sequence[float] = FMRS) -> tuple[PairThreshold, ...]:
    """The lowest threshold for each rate, refused where the pairs of two people are too few to show it.

    Raises:
        ValueError: a rate outside (0, 1).
    """
    genuine, impostors = pairs.scores[pairs.same], pairs.scores[~pairs.same]
    one, other = pairs.one[~pairs.same], pairs.other[~pairs.same]
    people = len(np.unique(np.concatenate([one, other])))
    found = []
    for fmr in fmrs:
        if not 0 < fmr < 1:
            raise ValueError(f"FMR {fmr:g} must lie between 0 and 1")
        counts: dict[str, Any] = {"impostors": len(impostors), "genuine": len(genuine), "people": people}
        if why := refusal(len(impostors), fmr, "pairs of two people"):
            found.append(PairThreshold(fmr, None, **counts, why=why))
            continue
        trials = trials_worth(impostors, fmr, one, other)
        value = lowest_threshold(impostors, fmr)
        missed = genuine < value
        found.append(
            PairThreshold(
                fmr,
                value,
                **counts,
                interval=threshold_interval(impostors, fmr, trials),
                rate_interval=rate_again(float((impostors >= value).mean()), trials),
                missed=float(missed.mean()) if len(missed) else None,
                missed_interval=error_interval(missed, pairs.one[pairs.same]) if len(missed) else None,
            )
        )
    return tuple(found)


def equal_error_rate(scores: ArrayLike, same: ArrayLike) -> float:
    """The rate at which as large a part of one kind is accepted wrongly as of the other is rejected, on the straight
    lines between the points of the curve.

    Raises:
        ValueError: as `metrics.roc`.
    """
    curve = roc(np.asarray(scores), np.asarray(same))
    return _equal(curve.tar, curve.far)


def _equal(tar: Floats, far: Floats) -> float:
    above = far - (1 - tar)  # rises from -1 to 1
    k = int(np.searchsorted(above, 0.0, "left"))
    if above[k] == 0 or k == 0:
        return float(far[k])
    part = -above[k - 1] / (above[k] - above[k - 1])
    return float(far[k - 1] + part * (far[k] - far[k - 1]))


def identity_intervals(
    pairs: PairScores, fmrs: Sequence[float] = (1e-2, 1e-3), *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals of auc, eer and tar@RATE, identities drawn with replacement; a pair counts as often as
    its identities are drawn (the vertex bootstrap, Conti and Clémençon 2024).

    Rates that the pairs cannot show are left out. A perfect result varies in no draw, which does not make it certain:
    its tar@RATE has the interval of `error_interval`, auc and eer have none.

    Raises:
        ValueError: as `metrics.roc`.
    """
    roc(pairs.scores, pairs.same)  # refuses what has no curve
    impostors = int((~pairs.same).sum())
    rates = {f"tar@{_power(rate)}": rate for rate in fmrs if not refusal(impostors, rate, "")}
    order = np.argsort(-pairs.scores, kind="stable")
    same = pairs.same[order]
    last = np.append(np.flatnonzero(np.diff(pairs.scores[order])), len(order) - 1)
    names, members = np.unique(np.stack([pairs.one[order], pairs.other[order]]), return_inverse=True)
    members = members.reshape(2, -1).astype(np.int64)
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"auc": [], "eer": [], **{name: [] for name in rates}}
    for _ in range(draws):
        weights = draw_weights(rng, len(names), members)
        right = np.cumsum(np.where(same, weights, 0))[last]
        wrong = np.cumsum(np.where(same, 0, weights))[last]
        if not right[-1] or not wrong[-1]:
            continue  # a draw without pairs of one kind has no curve
        tar = np.concatenate([[0.0], right / right[-1]])
        far = np.concatenate([[0.0], wrong / wrong[-1]])
        found["auc"].append(float(np.trapezoid(tar, far)))
        found["eer"].append(_equal(tar, far))
        for name, rate in rates.items():
            found[name].append(float(tar[np.searchsorted(far, rate * (1 + 1e-12), "right") - 1]))
    intervals = {name: middle_of(values, len(names)) for name, values in found.items() if values}
    for name in [name for name, inside in intervals.items() if inside.high - inside.low < 1e-9]:
        share = intervals.pop(name).low
        if name in rates and share in (0.0, 1.0):
            missed = np.full(int(pairs.same.sum()), share == 0)
            low, high = error_interval(missed, pairs.one[pairs.same], pairs.other[pairs.same])
            intervals[name] = Interval(1 - high, 1 - low)
    return intervals


def _power(rate: float) -> str:
    """0.01 as 1e-2."""
    return f"{rate:.0e}".replace("e-0", "e-")


def over_seeds(
    embeddings: Tensor, seen: Tensor, index: FaceIndex, num_pairs: int, num_folds: int, seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Verification on pairs drawn anew by each seed: mean, standard deviation (of a sample), least and most of each
    number that every draw has.

    Args:
        embeddings: [N, D] of `index`.
        seen: [N] bool, False for rows that could not be read.
        index: the people.
        num_pairs: of each draw.
        num_folds: of each draw.
        seeds: at least one.

    Raises:
        ValueError: as `PairSet.random`.
    """
    draws = [
        verification(embeddings, seen, PairSet.random(index, num_pairs, num_folds, seed))
        for seed in dict.fromkeys(seeds)
    ]
    found = {}
    for name in draws[0]:
        values = np.array([draw.get(name, np.nan) for draw in draws])
        if name not in ("pairs", "verification_std") and np.isfinite(values).all():
            found[name] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                "least": float(values.min()),
                "most": float(values.max()),
            }
    return found
