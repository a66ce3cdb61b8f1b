"""Which identities are one person.

Pure functions of embeddings and labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from facefast.labels.clustering import Floats, Numbers, class_sums, similarity_blocks
from facefast.labels.doubts import Doubt

MIN_TAIL = 20
"""Pairs of identities in the tail that the false rate of merges is extrapolated from."""


Pair = tuple[int, int, float, float]
"""Two identities, the smaller first, their cosine and the confidence that they are one person."""


def merge_pairs(unit: Floats, labels: Numbers, doubts: Doubt, false_rate: float, block: int = 0) -> list[Pair]:
    """Identities that look like one person, the surest first.

    The cosines of all pairs of class means tell what two people look like: above their 99th percentile they fall off
    exponentially (Pickands 1975), and a pair is reported while the number expected by chance at its cosine stays below
    `false_rate` of the pairs reported (Benjamini and Hochberg 1995), and while the means are as near as half of the
    set's pictures are to the mean of the rest of their identity. An identity with a single picture has no mean: its
    picture is held against what the pictures of the other identities score with the best class that is not theirs.
    """
    counts = np.bincount(labels[labels >= 0])
    if np.count_nonzero(counts) < 2:
        return []
    sums = class_sums(unit, labels, len(counts), np.asarray(1 - doubts.wrong, np.float32))
    several = np.flatnonzero(counts >= 2)
    found: list[Pair] = []
    if len(several) > 1:
        lengths = np.linalg.norm(sums[several], axis=1, keepdims=True)
        means = np.divide(sums[several], lengths, out=np.zeros_like(sums[several]), where=lengths > 1e-3)
        pairs = _above_chance(means, float(np.nanmedian(doubts.own[labels >= 0])), false_rate, block)
        found = [(int(several[one]), int(several[other]), cosine, sure) for one, other, cosine, sure in pairs]
    found += _single_pictures(labels, counts, doubts, false_rate, [label for pair in found for label in pair[:2]])

    # The surest first, and each pair only if it joins what is not joined yet: n names of one person are n - 1 merges.
    chosen: list[Pair] = []
    group = np.arange(len(counts))
    for one, other, cosine, sure in sorted(found, key=lambda pair: (-pair[3], -pair[2])):
        if group[one] == group[other]:
            continue
        group[group == group[one]] = group[other]
        small, large = (other, one) if (counts[one], -one) > (counts[other], -other) else (one, other)
        chosen.append((small, large, cosine, sure))
    return chosen


def _above_chance(means: Floats, floor: float, false_rate: float, block: int, most: int = 1 << 22) -> list[Pair]:
    """Pairs of means [C, D]."""
    classes = len(means)
    # A part of all cosines is enough to estimate what chance gives; only pairs above the floor are kept by name.
    every = max(1, classes * classes // most)
    cosines, near = [], []
    for part, found in similarity_blocks(means, means, block):
        rows = np.arange(part.start, part.stop)
        upper = np.arange(classes)[None, :] > rows[:, None]
        cosines.append(found[upper][::every])
        one, other = np.nonzero(upper & (found >= floor))
        near += list(zip(rows[one].tolist(), other.tolist(), found[one, other].tolist(), strict=True))
    near.sort(key=lambda pair: -pair[2])
    sure = _confidences([pair[2] for pair in near], np.concatenate(cosines), classes * (classes - 1) / 2, false_rate)
    return [(*pair, confidence) for pair, confidence in zip(near, sure, strict=False)]


def _single_pictures(
    labels: Numbers, counts: Numbers, doubts: Doubt, false_rate: float, merged: Sequence[int]
) -> list[Pair]:
    # Doubtful labels and merged identities say nothing of chance: the best other class may be the same person.
    known = (labels >= 0) & np.isfinite(doubts.other)
    alone = known & (counts[labels.clip(0)] == 1)
    usual = known & ~alone & (doubts.wrong < 0.5) & ~np.isin(labels, merged)
    rows = np.flatnonzero(alone)
    rows = rows[np.argsort(-doubts.other[rows], kind="stable")]
    sure = _confidences(doubts.other[rows].tolist(), doubts.other[usual], len(rows), false_rate)
    return [
        (int(labels[row]), int(doubts.suggested[row]), float(doubts.other[row]), confidence)
        for row, confidence in zip(rows.tolist(), sure, strict=False)
    ]


def _confidences(cosines: list[float], chance: Floats, tests: float, false_rate: float) -> list[float]:
    """1 - the false discovery rate of as many of `cosines`, from the highest, as keep it below `false_rate`.

    Args:
        cosines: falling.
        chance: what pairs of two people score, most of it; its tail is extrapolated.
        tests: pairs that could have been among `cosines`.
    """
    if len(chance) == 0:
        return []
    part = min(0.5, max(0.01, 50 / len(chance)))  # the 99th percentile on, or the 50 highest where those are more
    start = float(np.quantile(chance, 1 - part))
    tail = chance[chance > start] - start
    if len(tail) < MIN_TAIL:
        return []
    scale = float(np.median(tail)) / np.log(2)  # the mean would be drawn up by the very pairs that are sought
    ordered = np.sort(chance)
    rates = []
    for place, cosine in enumerate(cosines, 1):
        # Pairs of two people expected at or above this cosine, over the pairs reported down to it.
        above = part * np.exp(-(cosine - start) / scale)
        if cosine < start:  # not in the tail: counted
            above = (len(ordered) - np.searchsorted(ordered, cosine)) / len(ordered)
        rates.append(tests * float(above) / place)
    last = max((place for place, rate in enumerate(rates, 1) if rate <= false_rate), default=0)
    # The least rate of any longer list that holds the pair: a surer pair must not look less sure than one below it.
    return [1 - min(rates[place:last]) for place in range(last)]
