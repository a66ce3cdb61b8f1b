"""How well wrong labels are found: some are planted, and the findings with and without them are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from facefast.labels.clustering import Numbers
from facefast.labels.suspects import Suspects


def plant_wrong_labels(labels: Numbers, fraction: float, seed: int) -> tuple[Numbers, Numbers]:
    """Labels [N] of which `fraction` is changed to another class drawn evenly, and the rows that were: the self-test.

    Raises:
        ValueError: `fraction` outside (0, 0.5], or fewer than two classes.
    """
    known = np.flatnonzero(labels >= 0)
    classes = int(labels.max(initial=-1)) + 1
    if not 0 < fraction <= 0.5 or classes < 2:
        raise ValueError(f"plant is {fraction} among {classes} identities; it must lie in (0, 0.5], among at least 2")
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(known, max(1, round(fraction * len(known))), replace=False))
    planted = labels.copy()
    planted[rows] = (labels[rows] + generator.integers(1, classes, len(rows))) % classes  # never its own
    return planted, rows


@dataclass(frozen=True)
class SelfTest:
    """How well planted wrong labels are found."""

    planted: int
    flagged: int
    raw_precision: float
    """Of the flagged, those planted: every mistake that the set had before counts against it."""
    precision: float
    """The same, with those set aside that are flagged without planting too."""
    recall: float
    """Of the planted, those flagged."""
    suggested: float
    """Of the planted and flagged, those whose own identity is suggested."""
    relabelled: float
    """Of the planted that `relabel` would change, those that get their own identity back."""


def self_test(before: Suspects, after: Suspects, rows: Numbers, labels: Numbers) -> SelfTest:
    """Compares the findings on true `labels` [N] and on labels with wrong ones planted in `rows`."""
    planted = set(rows.tolist())
    natural = {suspect.row for suspect in before.of("wrong_label")} - planted
    flagged = after.of("wrong_label")
    hits = [suspect for suspect in flagged if suspect.row in planted]
    # A set has wrong labels of its own, and finding those is no mistake: they are set aside.
    fresh = [suspect for suspect in flagged if suspect.row not in natural]
    changed = [suspect for suspect in hits if suspect.action == "relabel"]

    def part(some: float, of: int) -> float:
        return some / of if of else float("nan")

    return SelfTest(
        len(planted),
        len(flagged),
        part(len(hits), len(flagged)),
        part(len(hits), len(fresh)),
        part(len(hits), len(planted)),
        part(sum(int(labels[suspect.row]) == suspect.suggested for suspect in hits), len(hits)),
        part(sum(int(labels[suspect.row]) == suspect.suggested for suspect in changed), len(changed)),
    )
