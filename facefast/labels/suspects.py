"""What is probably wrong with a labelled set, from its embeddings: wrong labels, duplicates, one person twice.

Pure functions of embeddings and labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from facefast.labels.clustering import (
    Floats,
    Numbers,
    class_sums,
    likelihood_ratio,
    neighbours,
    own_and_other,
    similarity_blocks,
    unit_rows,
)

Kind = Literal["wrong_label", "duplicate", "merge"]
KINDS: tuple[Kind, ...] = ("wrong_label", "duplicate", "merge")

RELABEL = 0.9
"""Probability from which the suggested identity is taken over, not only the wrong one left."""
NEAR = 0.85
"""Cosine from which two pictures are compared by pixels; a photograph cropped a little differently stays above it."""
NEAREST = 5
"""Pictures that each is compared with, at most."""
MOST_PAIRS = 50_000
"""Pairs that are compared by pixels, those with the nearest embeddings first: about an hour."""
COPY = 0.99
"""Confidence of copies that are told by pixels."""
NEARER = 0.25
"""Part of the other classes, those most like a class, that wrong labels are expected from."""
MIN_TAIL = 20
"""Pairs of identities in the tail that the false rate of merges is extrapolated from."""


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

    Args:
        embeddings: [N, D].
        labels: [N], -1 unlabelled: no part in anything.
        groups: [C] classes with the same number are one person.

    Raises:
        ValueError: embeddings that are not finite.
    """
    unit, labels = unit_rows(embeddings), labels.astype(np.int64)
    num_classes = int(labels.max(initial=-1)) + 1
    if groups is not None:
        _, first, person = np.unique(groups[:num_classes], return_index=True, return_inverse=True)
        merged = doubt(unit, np.where(labels >= 0, person[labels.clip(0)], -1), rounds=rounds, block=block)
        back = np.where(merged.suggested >= 0, first[merged.suggested.clip(0)], -1)
        return dataclasses.replace(merged, suggested=back)
    nothing = np.zeros(len(unit), np.float32)
    result = Doubt(nothing, nothing, np.full(len(unit), -1), nothing + np.nan, nothing + np.nan, 0.0)
    if num_classes == 0:
        return result
    # Scores need means, robust means need to know which labels are wrong: from a cautious start, in turns.
    weights = _densest_half(unit, labels, num_classes)
    for _ in range(rounds):
        result = _doubt_once(unit, labels, num_classes, weights, block)
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


def _doubt_once(unit: Floats, labels: Numbers, num_classes: int, weights: Floats, block: int) -> Doubt:
    own, other, which = own_and_other(unit, labels, num_classes, weights, block)
    judged = np.isfinite(own)
    mass = np.bincount(labels[labels >= 0], weights[labels >= 0], num_classes)
    rest = np.where(labels >= 0, mass[labels.clip(0)] - weights, 0)
    bins = np.searchsorted(SIZES, rest, "right") - 1
    strangers = _stranger_scores(unit, labels, num_classes, weights, block)

    # Half of the wrong labels score below the strangers' median, and hardly any right ones: twice that many are wrong.
    low = sum(np.count_nonzero(own[judged & (bins == k)] < np.median(s)) for k, s in strangers.items() if len(s))
    wrong = float(np.clip((2 * low + 1) / (np.count_nonzero(judged) + 1), 0, 0.5))
    right_by_own = np.ones(len(unit))  # p(own | right) / p(own | wrong)
    for k, scores in strangers.items():
        rows = np.flatnonzero(judged & (bins == k))
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


@dataclass(frozen=True)
class Suspect:
    """One finding. Rows and labels are those of the embeddings."""

    kind: Kind
    row: int
    """The picture in doubt; of a merge, the most typical one of `label`."""
    label: int
    """The identity it is labelled as; of a merge, the smaller one."""
    other_row: int
    """The picture it is a copy of; the most typical one of `suggested`, or -1."""
    suggested: int
    """The identity it seems to show; -1 where it is none of these."""
    action: Literal["drop", "keep", "relabel", "merge"]
    confidence: float
    """Probability in [0, 1] that this is wrong as it is; of a merge, 1 - the false discovery rate."""
    score: float
    """Cosine with the rest of its own identity; NaN without a rest."""
    other_score: float
    """Cosine with the suggested identity or the other picture."""


@dataclass(frozen=True)
class Suspects:
    """All findings on a set: wrong labels, then duplicates, then merges, the surest first."""

    found: tuple[Suspect, ...]
    doubt: Doubt
    mixed: tuple[int, ...]
    """Labels of identities half or more of whose pictures are suspects: the set cannot show which half is right."""

    def of(self, kind: Kind) -> list[Suspect]:
        """Those of one kind."""
        return [suspect for suspect in self.found if suspect.kind == kind]


def find_suspects(
    embeddings: Floats,
    labels: Numbers,
    hashes: NDArray[np.uint64] | None = None,
    *,
    confidence: float = 0.5,
    false_merges: float = 0.05,
    same_picture: Callable[[int, int], bool] | None = None,
    block: int = 0,
) -> Suspects:
    """Wrong labels, duplicates and identities that are one person.

    Args:
        embeddings: [N, D].
        labels: [N], -1 unlabelled: can only be a duplicate.
        hashes: [N, 2] content hashes; rows with the same one are copies, 0 is unknown.
        confidence: least probability of a wrong label.
        false_merges: expected part of the merges that is false.
        same_picture: whether two rows with near embeddings show one photograph; without it only hashes tell copies.

    Raises:
        ValueError: a fraction outside (0, 1), or embeddings that are not finite.
    """
    if not 0 < confidence < 1 or not 0 < false_merges < 1:
        raise ValueError(f"confidence is {confidence} and false_merges {false_merges}; both must lie in (0, 1)")
    unit, labels = unit_rows(embeddings), labels.astype(np.int64)
    num_classes = int(labels.max(initial=-1)) + 1
    # Twice: two identities that are one person make each other's pictures look wrong. Merges are found with the first
    # doubts, which keep wrong labels out of the means, and then count as one class.
    alone = doubt(unit, labels, block=block)
    merges = merge_pairs(unit, labels, alone, false_merges, block)
    groups = np.arange(num_classes)
    for one, other, _, _ in merges:
        groups[groups == groups[one]] = groups[other]
    doubts = doubt(unit, labels, groups=groups, block=block) if merges else alone

    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    flagged = np.flatnonzero((doubts.wrong >= confidence) & np.isfinite(doubts.own))
    suspects_of = np.bincount(labels[flagged], minlength=num_classes)
    mixed = tuple(np.flatnonzero((suspects_of > 0) & (2 * suspects_of >= counts)).tolist())
    found = []
    for row in flagged[np.argsort(-doubts.wrong[flagged], kind="stable")].tolist():
        # A new name needs more certainty than leaving a picture out, which in a mixed identity is left to a person.
        known = bool(doubts.elsewhere[row] >= doubts.stranger[row])
        action: Literal["drop", "keep", "relabel"] = "relabel" if doubts.elsewhere[row] >= RELABEL else "drop"
        found.append(
            Suspect(
                "wrong_label",
                row,
                int(labels[row]),
                -1,
                int(doubts.suggested[row]) if known else -1,
                "keep" if labels[row] in mixed and action == "drop" else action,
                float(doubts.wrong[row]),
                float(doubts.own[row]),
                float(doubts.other[row]),
            )
        )
    typical = _typical_rows(unit, labels, doubts, num_classes)
    found += list(_duplicates(unit, labels, hashes, doubts, same_picture, block))
    for one, other, cosine, sure in merges:
        pair = int(typical[one]), int(typical[other])
        found.append(Suspect("merge", pair[0], one, pair[1], other, "merge", sure, float("nan"), cosine))
    return Suspects(tuple(found), doubts, mixed)


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


def _typical_rows(unit: Floats, labels: Numbers, doubts: Doubt, num_classes: int) -> Numbers:
    """[C] the row nearest to each class's mean."""
    order = np.lexsort((-np.nan_to_num(doubts.own, nan=-1), labels))
    order = order[labels[order] >= 0]
    typical = np.full(num_classes, -1)
    present, first = np.unique(labels[order], return_index=True)
    typical[present] = order[first]
    return typical


def _duplicates(
    unit: Floats,
    labels: Numbers,
    hashes: NDArray[np.uint64] | None,
    doubts: Doubt,
    same_picture: Callable[[int, int], bool] | None,
    block: int,
) -> Iterator[Suspect]:
    """One finding for every row to drop; of copies the one whose label is least in doubt stays, else the first."""
    # Disjoint sets whose root is their first row: the result does not depend on the order of joining.
    links = dict(enumerate(range(len(unit))))

    def root(row: int) -> int:
        while links[row] != row:
            links[row] = links[links[row]]
            row = links[row]
        return row

    def join(one: int, other: int) -> None:
        one, other = sorted((root(one), root(other)))
        links[other] = one

    if hashes is not None:
        known = np.flatnonzero(hashes.any(axis=1))
        _, group = np.unique(hashes[known], axis=0, return_inverse=True)
        for rows in _sets(known, group.reshape(-1)):
            for row in rows[1:].tolist():
                join(int(rows[0]), row)
    if same_picture is not None:
        # Only near embeddings are compared by pixels, which reads both files; and only where they are not joined yet.
        places, cosines = neighbours(unit, NEAREST, block)
        rows, columns = np.nonzero(cosines >= NEAR)
        others, asked = places[rows, columns], 0
        for place in np.argsort(-cosines[rows, columns], kind="stable").tolist():
            row, other = int(rows[place]), int(others[place])
            if (row < other or row not in places[other]) and root(row) != root(other) and asked < MOST_PAIRS:
                asked += 1
                if same_picture(row, other):
                    join(row, other)
    roots = np.array([root(row) for row in range(len(unit))])
    for rows in _sets(np.arange(len(unit)), roots):
        unlabelled = labels[rows] < 0
        # Rounded, so that equal pictures do not differ by the last bit of their doubt: the first of them stays.
        kept = int(rows[np.lexsort((rows, np.round(doubts.wrong[rows], 3), unlabelled))[0]])
        for row in rows[rows != kept].tolist():
            exact = hashes is not None and bool(hashes[row].any()) and bool((hashes[row] == hashes[kept]).all())
            cosine = min(1.0, float(unit[row] @ unit[kept]))
            yield Suspect(
                "duplicate",
                row,
                int(labels[row]),
                kept,
                int(labels[kept]),
                "drop",
                1.0 if exact else COPY,
                float(doubts.own[row]),
                cosine,
            )


def _sets(rows: Numbers, group: Numbers) -> Iterator[Numbers]:
    """The rows of each group of two or more, in order."""
    order = np.argsort(group, kind="stable")
    ends = np.flatnonzero(np.diff(group[order])) + 1
    for part in np.split(order, ends):
        if len(part) > 1:
            yield np.sort(rows[part])
