"""What numbers mean: accuracy, verification and their uncertainty, as pure functions of arrays.

A pair is accepted, that is, called the same person, where its score is at least the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


class Roc(NamedTuple):
    """Acceptance at every threshold that makes a difference, [T] each, thresholds falling from infinity."""

    thresholds: Floats
    tar: Floats
    """Accepted part of the pairs of one identity (true accept rate)."""
    far: Floats
    """Accepted part of the pairs of two identities (false accept rate)."""


class OperatingPoint(NamedTuple):
    """A threshold and what it does; all NaN where there are too few pairs to tell."""

    threshold: float
    tar: float
    far: float


class Verification(NamedTuple):
    """k-fold verification as LFW's protocol has it."""

    accuracy: float
    """Mean over the folds."""
    std: float
    """Standard deviation over the folds (population form)."""
    accuracies: Floats
    """[K] of each fold."""
    thresholds: Floats
    """[K] chosen on the other folds."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the right one; nothing is read from the device.

    Equal and NaN logits stand before it: a model that cannot decide gets no credit.

    Args:
        logits: [B, C].
        labels: [B] integers; negative ones do not count.

    Returns:
        [B] int64, 0 where the prediction is right, -1 where the label is negative.
    """
    own = logits.gather(1, labels.clamp(min=0).long()[:, None])  # [B, 1]
    before = (~(logits < own)).sum(1) - 1  # "not less" also holds for NaN; less the class itself
    return torch.where(labels >= 0, before, -1)


def topk_accuracy(ranks: NDArray[Any], k: int = 1) -> float:
    """Part of the labelled rows whose label is among the k best.

    Args:
        ranks: [N] of `label_ranks`.
        k: at least 1.

    Raises:
        ValueError: k below 1, or no row that counts.
    """
    ranks = np.asarray(ranks)
    counted = ranks[ranks >= 0]
    if k < 1 or not len(counted):
        raise ValueError(f"top-{k} accuracy of {len(counted)} labelled rows; both must be 1 or more")
    return float((counted < k).mean())


def per_class_accuracy(ranks: NDArray[Any], labels: NDArray[Any], num_classes: int) -> Floats:
    """Top-1 accuracy of each class; `np.nanmean` of it weighs every identity the same.

    Args:
        ranks: [N] of `label_ranks`.
        labels: [N] integers below `num_classes`; negative ones do not count.

    Returns:
        [C], NaN for classes without a row.
    """
    ranks, labels = np.asarray(ranks), np.asarray(labels)
    counted = ranks >= 0
    rows = np.bincount(labels[counted], minlength=num_classes)
    right = np.bincount(labels[counted & (ranks == 0)], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(right / rows, dtype=np.float64)


def pair_scores(embeddings: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> Floats:
    """Cosine similarity of pairs.

    Args:
        embeddings: [N, D] of length 1.
        left: [P] rows.
        right: [P] rows.
    """
    scores: Floats = np.einsum("pd,pd->p", embeddings[left], embeddings[right], dtype=np.float64)
    return scores


def roc(scores: NDArray[Any], same: NDArray[Any]) -> Roc:
    """The receiver operating characteristic: one point per distinct score, and one that accepts nothing.

    Args:
        scores: [P], higher is more alike.
        same: [P] bool, whether a pair is of one identity.

    Raises:
        ValueError: lengths differ, a score is not finite, or all pairs are of one kind.
    """
    scores, same = _checked(scores, same)
    order = np.argsort(-scores, kind="stable")
    falling, kind = scores[order], same[order]
    # Equal scores fall together: no threshold can tell them apart, so only the last of them is a point.
    last = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)
    tar = np.cumsum(kind)[last] / kind.sum()
    far = np.cumsum(~kind)[last] / (~kind).sum()
    return Roc(
        np.concatenate(([np.inf], falling[last])),
        np.concatenate(([0.0], tar)),
        np.concatenate(([0.0], far)),
    )


def auc(scores: NDArray[Any], same: NDArray[Any]) -> float:
    """Chance that a pair of one identity scores above a pair of two, ties counting half.

    Raises:
        ValueError: as `roc`.
    """
    curve = roc(scores, same)
    return float(np.trapezoid(curve.tar, curve.far))


def tar_at_far(scores: NDArray[Any], same: NDArray[Any], far: float) -> OperatingPoint:
    """The lowest threshold whose false accept rate is at most `far`, without interpolation.

    Its `far` is therefore what these pairs really give, and the threshold is one that can be used. Fewer than 1 / far
    pairs of two identities cannot show such a rate: the point is then NaN.

    Raises:
        ValueError: as `roc`, or `far` outside (0, 1).
    """
    if not 0 < far < 1:
        raise ValueError(f"false accept rate {far} must lie between 0 and 1")
    # The rate is that of the curve's own points: a threshold between two scores would accept the same pairs.
    curve = roc(scores, same)
    negatives = int((~np.asarray(same, dtype=bool)).sum())
    if not enough_negatives(negatives, far):
        return OperatingPoint(math.nan, math.nan, math.nan)
    # A rate like 0.29 is a little less in binary, where 29 of 100 must still do.
    k = int(np.searchsorted(curve.far * negatives, far * negatives * (1 + 1e-12), "right")) - 1
    return OperatingPoint(float(curve.thresholds[k]), float(curve.tar[k]), float(curve.far[k]))


def enough_negatives(negatives: int, far: float) -> bool:
    """Whether this many pairs of two identities can show a false accept rate: one of them must be allowed."""
    return far * negatives * (1 + 1e-12) >= 1


def best_threshold(scores: NDArray[Any], same: NDArray[Any]) -> float:
    """The threshold that decides most pairs rightly: halfway between two scores, in the middle of equally good ones.

    Raises:
        ValueError: as `roc`.
    """
    curve = roc(scores, same)
    positives = np.count_nonzero(same)
    negatives = len(np.asarray(same)) - positives
    # Accepted pairs of one identity minus those of two: the number decided rightly, but for a constant. Whole numbers
    # again, so that equally good thresholds are equal.
    right = np.rint(curve.tar * positives - curve.far * negatives)
    best = np.flatnonzero(right == right.max())
    k = int(best[len(best) // 2])
    below = curve.thresholds[min(k + 1, len(curve.thresholds) - 1)]
    at = curve.thresholds[k]
    if k == 0:  # best to accept nothing
        return float(np.nextafter(below, np.inf))
    middle = (at + below) / 2
    return float(middle if middle > below else at)  # neighbouring numbers have nothing between them


def kfold_verification(scores: NDArray[Any], same: NDArray[Any], folds: NDArray[Any]) -> Verification:
    """Accuracy on each fold with the threshold that is best on the others (LFW's protocol).

    Args:
        scores: [P], higher is more alike.
        same: [P] bool, whether a pair is of one identity.
        folds: [P] integers, at least two different ones.

    Raises:
        ValueError: as `roc`, for all pairs or for all but one fold, or there is only one fold.
    """
    scores, same = _checked(scores, same)
    folds = np.asarray(folds)
    names = np.unique(folds)
    if len(names) < 2 or folds.shape != scores.shape:
        raise ValueError(
            f"{len(names)} folds over {folds.size} of {scores.size} pairs; give each pair one of at least two folds"
        )
    # No pair has a part in the threshold that it is judged by.
    thresholds = np.array([best_threshold(scores[folds != k], same[folds != k]) for k in names])
    accuracies = np.array(
        [((scores >= threshold) == same)[folds == k].mean() for k, threshold in zip(names, thresholds, strict=True)]
    )
    return Verification(float(accuracies.mean()), float(accuracies.std()), accuracies, thresholds)


def wilson_interval(right: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; it stays inside [0, 1] and is sound for few trials and for 100 %.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} right of {total}; give 0 <= right <= total, total above 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = right / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + (z / (2 * total)) ** 2)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: NDArray[Any],
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap: the statistic of rows drawn with replacement.

    Args:
        statistic: takes the drawn columns, for instance `lambda s, y: tar_at_far(s, y, 1e-2).tar`.
        columns: arrays of equal length N whose rows belong together; rows are taken to be independent, so pairs that
            share photographs make the interval a little too narrow.
        samples: draws.

    Raises:
        ValueError: no rows, or columns of different lengths.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"columns have {sorted(lengths)} rows; give equal numbers above 0")
    rng = np.random.default_rng(seed)
    rows = len(columns[0])
    found = []
    for _ in range(samples):
        drawn = rng.integers(rows, size=rows)
        found.append(statistic(*(column[drawn] for column in columns)))
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


def _checked(scores: NDArray[Any], same: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores, same = np.asarray(scores, dtype=np.float64), np.asarray(same, dtype=bool)
    if scores.ndim != 1 or scores.shape != same.shape:
        raise ValueError(f"{scores.shape} scores for {same.shape} pairs; both must be [P]")
    if bad := int((~np.isfinite(scores)).sum()):
        raise ValueError(
            f"{bad} of {len(scores)} scores are not finite; leave out pairs whose pictures could not be read"
        )
    positives = int(same.sum())
    if positives in (0, len(same)):
        raise ValueError(
            f"{positives} pairs of one identity and {len(same) - positives} of two; verification needs both"
        )
    return scores, same
