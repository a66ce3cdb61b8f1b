"""How probable it is that a label is wrong, from embeddings, labels and what makes a picture hard.

Pure functions of numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facefast.labels.clustering import (
    Floats,
    Numbers,
    class_sums,
    likelihood_ratio,
    own_and_other,
    similarity_blocks,
    unit_rows,
)

NEARER = 0.25
"""Part of the other classes, those most like a class, that wrong labels are expected from."""


@dataclass(frozen=True)
class Doubt:
    """How probable it is that each row's label is wrong."""

    elsewhere: Floats
    """[N] probability that the row shows the person `suggested`."""
    stranger: Floats
    """[N] probability that it shows a person who is no class."""
    suggested: Numbers
    """[N] the most similar other class, -1 if there is none."""
    own: Floats
    """[N] cosine with the mean of the rest of the row's class, NaN where there is no rest."""
    other: Floats
    """[N] cosine with the mean of `suggested`."""
    wrong_fraction: float
    """Estimated part of all labels that is wrong."""

    @property
    def wrong(self) -> Floats:
        """[N] probability that the label is wrong."""
        return np.asarray(self.elsewhere + self.stranger, np.float32)


def doubt(
    embeddings: Floats,
    labels: Numbers,
    *,
    groups: Numbers | None = None,
    hardness: Floats | None = None,
    rounds: int = 3,
    block: int = 0,
) -> Doubt:
    """How probable it is that each label is wrong, every threshold learnt from the set itself.

    A row's label is right, or it shows another known person, or a stranger. What it scores with the mean of the rest
    of its class is drawn from the scores of right labels (right) or of strangers to the class (wrong); what it scores
    with the best other class, from those of strangers (right, stranger) or of right labels (another). The scores of
    strangers are those of rows with the classes that are most like their own; the part of wrong labels follows from how
    many own scores lie below the strangers' median (Storey 2002), and the scores of right labels are what remains
    (the local false discovery rate of Efron 2004). Class means are robust: they start from the densest half of a class
    (least trimmed squares, Rousseeuw and Van Driessen 1999), and then weigh each row by the probability that it
    belongs.

    A profile scores low with its own class because it is a profile. With `hardness`, pictures are held against pictures
    that are as hard (the conditional false discovery rate of Efron 2008), and the part of wrong labels is counted among
    the easy ones, where only wrong labels score low.

    Args:
        embeddings: [N, D].
        labels: [N], -1 unlabelled: no part in anything.
        groups: [C] classes with the same number are one person.
        hardness: [N, K] what makes a picture score low whoever it shows; NaN is not known.

    Raises:
        ValueError: embeddings that are not finite.
    """
    unit, labels = unit_rows(embeddings), labels.astype(np.int64)
    num_classes = int(labels.max(initial=-1)) + 1
    if groups is not None:
        _, first, person = np.unique(groups[:num_classes], return_index=True, return_inverse=True)
        merged = doubt(
            unit, np.where(labels >= 0, person[labels.clip(0)], -1), hardness=hardness, rounds=rounds, block=block
        )
        back = np.where(merged.suggested >= 0, first[merged.suggested.clip(0)], -1)
        return dataclasses.replace(merged, suggested=back)
    nothing = np.zeros(len(unit), np.float32)
    result = Doubt(nothing, nothing, np.full(len(unit), -1), nothing + np.nan, nothing + np.nan, 0.0)
    if num_classes == 0:
        return result
    # Scores need means, robust means need to know which labels are wrong: from a cautious start, in turns.
    weights = _densest_half(unit, labels, num_classes)
    for _ in range(rounds):
        result = _doubt_once(unit, labels, num_classes, weights, hardness, block)
        weights = np.where(labels >= 0, 1 - result.wrong, 0).astype(np.float32)
    return result


def _densest_half(unit: Floats, labels: Numbers, num_classes: int) -> Floats:
    """[N] 1 for the rows of each class that lie closest together, just more than half of them, else 0."""
    weights = np.zeros(len(unit), np.float32)
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(num_classes + 1))
    for label in range(num_classes):
        rows = order[ends[label] : ends[label + 1]]
        if len(rows) < 3:
            weights[rows] = 1
            continue
        # Starts where it is most crowded, at the row whose nearest half is nearest (of a selection, in a large class).
        half = len(rows) // 2 + 1
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), 2048)).astype(np.int64)]
        cosines = np.sort(unit[some] @ unit[some].T, axis=1)[:, -(len(some) // 2 + 1) :]
        centre = unit[some[cosines.mean(1).argmax()]]
        chosen = np.zeros(0, np.int64)
        for _ in range(10):  # concentration steps: each one can only make the half denser
            nearest = np.sort(np.argsort(-(unit[rows] @ centre), kind="stable")[:half])
            if np.array_equal(nearest, chosen):
                break
            chosen = nearest
            centre = unit[rows[chosen]].mean(0)
        weights[rows[chosen]] = 1
    return weights


SIZES = (0.0, 1.5, 3.5, 7.5, 15.5)
"""Where the bins of class sizes begin: a mean of many pictures scores higher with its own and lower with others."""


STRATA = (0.03, 0.1)
"""Parts of the rows, the hardest first, where strata of rows that are equally hard end."""
FEWEST_ROWS = 50
"""Rows of a stratum; those of fewer belong to the next one."""


def _strata(own: Floats, judged: NDArray[np.bool_], weights: Floats, hardness: Floats | None) -> Numbers:
    """[N] stratum of each row, 0 the easiest: by the own score that a straight line through `hardness` expects."""
    strata = np.zeros(len(own), np.int64)
    if hardness is None or np.count_nonzero(judged) * STRATA[-1] < FEWEST_ROWS:
        return strata
    columns = [np.ones(len(own))]
    for column in np.asarray(hardness, np.float64).T:
        known = np.isfinite(column)
        if known.any() and column[known].std() > 1e-6 * abs(column[known]).max():
            columns.append(np.where(known, column, np.median(column[known])))
    design = np.stack(columns, 1)
    share = np.sqrt(weights[judged].astype(np.float64))  # pictures of other people say nothing of hardness
    line = np.linalg.lstsq(design[judged] * share[:, None], own[judged] * share, rcond=None)[0]
    expected = design @ line
    count = np.count_nonzero(judged)
    for part in reversed(STRATA):
        if part * count >= FEWEST_ROWS:
            strata[expected < np.quantile(expected[judged], part)] += 1
    return strata


def _doubt_once(
    unit: Floats, labels: Numbers, num_classes: int, weights: Floats, hardness: Floats | None, block: int
) -> Doubt:
    own, other, which = own_and_other(unit, labels, num_classes, weights, block)
    judged = np.isfinite(own)
    mass = np.bincount(labels[labels >= 0], weights[labels >= 0], num_classes)
    rest = np.where(labels >= 0, mass[labels.clip(0)] - weights, 0)
    bins = np.searchsorted(SIZES, rest, "right") - 1
    strangers = _stranger_scores(unit, labels, num_classes, weights, block)

    # Half of the wrong labels score below the strangers' median, and hardly any right ones: twice that many are wrong.
    strata = _strata(own, judged, weights, hardness)
    easy = judged & (strata == 0)
    low = sum(np.count_nonzero(own[easy & (bins == k)] < np.median(s)) for k, s in strangers.items() if len(s))
    wrong = float(np.clip((2 * low + 1) / (np.count_nonzero(easy) + 1), 0, 0.5))
    right_by_own = np.ones(len(unit))  # p(own | right) / p(own | wrong)
    for k, stratum in itertools.product(strangers, range(int(strata.max()) + 1)):
        rows, scores = np.flatnonzero(judged & (bins == k) & (strata == stratum)), strangers[k]
        if len(rows) == 0 or len(scores) == 0:
            continue
        # p(own) = (1 - wrong) p(own | right) + wrong p(own | wrong): what all labels score, over what strangers score,
        # gives right over wrong without knowing any right label. The strangers' scores, which are many more, weigh as
        # much as the rows together: a ratio is no surer than the rows make it.
        all_labels = likelihood_ratio(own[rows], scores, None, np.full(len(scores), len(rows) / len(scores)))
        ratio = (all_labels(own[rows]) - wrong) / (1 - wrong)
        ratio = np.maximum(ratio, 1 / (len(rows) + 1))
        others_wrong = wrong ** np.maximum(rest[rows], 1)  # then a right picture too scores like a stranger
        right_by_own[rows] = (1 - others_wrong) * ratio + others_wrong
    right = (1 - wrong) * right_by_own / ((1 - wrong) * right_by_own + wrong)

    # A wrong label's best other class is scored as a right label scores its own, if that is who it shows.
    elsewhere = np.ones(len(unit))  # p(other | shows that person) / p(other | does not)
    paired = judged & np.isfinite(other)
    if paired.any():
        elsewhere = likelihood_ratio(own[judged], other[paired], right[judged], right[paired])(np.nan_to_num(other))
    elsewhere[~np.isfinite(other)] = 0
    # Bayes' rule over the three cases: right, another known person, a stranger. How wrong labels divide among the last
    # two is the one number that is not known yet, and is estimated by expectation maximisation.
    share = 0.5  # of wrong labels, those of known people
    for _ in range(50):
        parts = (1 - wrong) * right_by_own, wrong * share * elsewhere, wrong * (1 - share) * np.ones(len(unit))
        total = parts[0] + parts[1] + parts[2]
        known, strange = parts[1] / total, parts[2] / total
        counts = known[judged].sum(), strange[judged].sum()
        share = float(np.clip(counts[0] / max(counts[0] + counts[1], 1e-9), 0.05, 0.95))
    out = labels < 0
    known[out] = strange[out] = 0
    return Doubt(known.astype(np.float32), strange.astype(np.float32), which, own, other, wrong)


def _stranger_scores(
    unit: Floats, labels: Numbers, num_classes: int, weights: Floats, block: int, most: int = 1 << 22
) -> dict[int, Floats]:
    """Cosines of rows with the means of the nearest quarter of the other classes, by bin of the class's size.

    People who sort photographs confuse faces that are alike: a wrong label is more like its class than chance has it.
    """
    sums = class_sums(unit, labels, num_classes, weights)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    present = np.flatnonzero(lengths[:, 0] > 1e-3)
    means = sums[present] / lengths[present]
    mass = np.bincount(labels[labels >= 0], weights[labels >= 0], num_classes)[present]
    bins = np.searchsorted(SIZES, mass, "right") - 1
    place = np.full(num_classes, -1)
    place[present] = np.arange(len(present))
    rows = np.flatnonzero((labels >= 0) & (place[labels.clip(0)] >= 0))
    rows = rows[:: max(1, len(rows) * num_classes // most)]
    found: list[list[Floats]] = [[] for _ in SIZES]
    count = max(1, round((len(present) - 1) * NEARER))
    if len(present) < 2:
        return {}
    for part, cosines in similarity_blocks(unit[rows], means, block):
        own = place[labels[rows[part]]]
        # Nearest by the class means, not by the row: a row with a wrong label would choose the very person it shows.
        among = means[own] @ means.T
        among[np.arange(len(own)), own] = -np.inf
        nearest = np.argpartition(-among, count - 1, axis=1)[:, :count]
        scores = np.take_along_axis(cosines, nearest, 1)
        for k, scores_of_bin in enumerate(found):
            scores_of_bin.append(scores[bins[nearest] == k])
    return {k: np.concatenate(parts) for k, parts in enumerate(found)}
