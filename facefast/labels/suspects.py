"""What is probably wrong with a labelled set, from its embeddings: wrong labels, duplicates, one person twice.

Pure functions of embeddings and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from facefast.labels.clustering import Floats, Numbers, neighbours, unit_rows
from facefast.labels.doubts import Doubt, doubt
from facefast.labels.merges import merge_pairs

Kind = Literal["wrong_label", "duplicate", "merge"]
KINDS: tuple[Kind, ...] = ("wrong_label", "duplicate", "merge")

RELABEL = 0.9
"""Probability from which the suggested identity is taken over, not only the wrong one left."""
NEAR = 0.85
"""Cosine from which two pictures are compared by pixels; a photograph cropped a little differently stays above it."""
NEAR_ENOUGH = 0.75
"""Cosine from which the nearest one of all is compared: a photograph saved again much smaller stays above it."""
NEAREST = 5
"""Pictures that each is compared with, at most."""
MOST_PAIRS = 50_000
"""Pairs that are compared by pixels, those with the nearest embeddings first: about an hour."""
COPY = 0.99
"""Confidence of copies that are told by pixels."""


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
    uncompared: int = 0
    """Pairs with near embeddings beyond `MOST_PAIRS`, which nobody looked at."""

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
    hardness: Floats | None = None,
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
        hardness: [N, K], as `doubt` has it.
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
    alone = doubt(unit, labels, hardness=hardness, block=block)
    merges = merge_pairs(unit, labels, alone, false_merges, block)
    groups = np.arange(num_classes)
    for one, other, _, _ in merges:
        groups[groups == groups[one]] = groups[other]
    doubts = doubt(unit, labels, groups=groups, hardness=hardness, block=block) if merges else alone

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
    copies, uncompared = _duplicates(unit, labels, hashes, doubts, same_picture, block)
    found += copies
    for one, other, cosine, sure in merges:
        pair = int(typical[one]), int(typical[other])
        found.append(Suspect("merge", pair[0], one, pair[1], other, "merge", sure, float("nan"), cosine))
    return Suspects(tuple(found), doubts, mixed, uncompared)


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
) -> tuple[list[Suspect], int]:
    """One finding for every row to drop, and the number of pairs that were left out; of copies the one whose label is
    least in doubt stays, else the first."""
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
    uncompared, found = 0, []
    if same_picture is not None:
        # Only near embeddings are compared by pixels, which reads both files; and only where they are not joined yet.
        places, cosines = neighbours(unit, NEAREST, block)
        near = cosines >= NEAR
        near[:, :1] |= cosines[:, :1] >= NEAR_ENOUGH
        rows, columns = np.nonzero(near)
        pairs = np.sort(np.column_stack([rows, places[rows, columns]]), axis=1)
        order = np.argsort(-cosines[rows, columns], kind="stable")
        candidates = list(dict.fromkeys(map(tuple, pairs[order].tolist())))  # each pair once
        for one, other in candidates[:MOST_PAIRS]:
            if root(one) != root(other) and same_picture(one, other):
                join(one, other)
        uncompared = len(candidates[MOST_PAIRS:])
    roots = np.array([root(row) for row in range(len(unit))])
    for rows in _sets(np.arange(len(unit)), roots):
        unlabelled = labels[rows] < 0
        # Rounded, so that equal pictures do not differ by the last bit of their doubt: the first of them stays.
        kept = int(rows[np.lexsort((rows, np.round(doubts.wrong[rows], 3), unlabelled))[0]])
        for row in rows[rows != kept].tolist():
            exact = hashes is not None and bool(hashes[row].any()) and bool((hashes[row] == hashes[kept]).all())
            cosine = min(1.0, float(unit[row] @ unit[kept]))
            copy = Suspect(
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
            found.append(copy)
    return found, uncompared


def _sets(rows: Numbers, group: Numbers) -> Iterator[Numbers]:
    """The rows of each group of two or more, in order."""
    order = np.argsort(group, kind="stable")
    ends = np.flatnonzero(np.diff(group[order])) + 1
    for part in np.split(order, ends):
        if len(part) > 1:
            yield np.sort(rows[part])
