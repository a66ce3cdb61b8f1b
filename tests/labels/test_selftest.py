"""The audit's self-test: which labels are planted, and what its numbers count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from facefast.labels.doubts import Doubt
from facefast.labels.selftest import plant_wrong_labels, self_test
from facefast.labels.suspects import Suspect, Suspects

LABELS = np.repeat(np.arange(5), 20)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_a_planted_label_is_another_class_and_the_rest_stays(fraction: float) -> None:
    planted, rows = plant_wrong_labels(LABELS, fraction, seed=3)
    assert len(rows) == len(set(rows.tolist())) == max(1, round(fraction * 100))
    assert set(np.flatnonzero(planted != LABELS).tolist()) == set(rows.tolist())
    assert (np.diff(rows) > 0).all()
    assert set(planted.tolist()) <= set(range(5))
    np.testing.assert_array_equal(LABELS, np.repeat(np.arange(5), 20))  # the given ones are as they were


def test_every_other_class_is_planted_about_equally_often() -> None:
    labels = np.repeat(np.arange(5), 2000)
    planted, rows = plant_wrong_labels(labels, 0.5, seed=0)
    away = (planted[rows] - labels[rows]) % 5
    assert (np.abs(np.bincount(away, minlength=5)[1:] / len(rows) - 0.25) < 0.03).all()


def test_pictures_of_nobody_stay_nobodys() -> None:
    labels = np.where(np.arange(100) % 2 == 0, LABELS, -1)
    planted, rows = plant_wrong_labels(labels, 0.2, seed=1)
    assert len(rows) == 10  # a fifth of those with a label
    assert (labels[rows] >= 0).all()
    np.testing.assert_array_equal(planted < 0, labels < 0)


def test_the_seed_alone_decides() -> None:
    one, two, other = (plant_wrong_labels(LABELS, 0.2, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51, math.nan, math.inf])
def test_a_fraction_that_cannot_be_planted_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"plant is .* among 5 identities; it must lie in \(0, 0.5\]"):
        plant_wrong_labels(LABELS, fraction, seed=0)


@pytest.mark.parametrize("labels", [np.zeros(9, np.int64), np.full(9, -1), np.zeros(0, np.int64)])
def test_fewer_than_two_people_have_no_wrong_labels(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="among [01] identities"):
        plant_wrong_labels(labels, 0.1, seed=0)


def suspects(*rows: tuple[int, int, str]) -> Suspects:
    """Findings by (row, suggested, action), and a duplicate, which the self-test does not count."""
    nothing = np.zeros(0, np.float32)
    found = [Suspect("wrong_label", row, 0, -1, other, action, 0.9, 0.1, 0.2) for row, other, action in rows]  # type: ignore[arg-type]
    found.append(Suspect("duplicate", 9, 0, 8, 0, "drop", 1.0, 0.1, 1.0))
    return Suspects(tuple(found), Doubt(nothing, nothing, nothing.astype(np.int64), nothing, nothing, 0.0), ())


def test_the_numbers_are_those_counted_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    planted = np.array([0, 2, 4, 6])
    before = suspects((7, 1, "drop"), (0, 2, "drop"))  # 7 is wrong by nature; 0 would have been, were it not planted
    after = suspects(
        (0, 0, "relabel"),  # its own identity back
        (2, 3, "relabel"),  # another one
        (4, 2, "drop"),  # its own, but not sure enough to be given back
        (7, 1, "drop"),  # flagged before too: the self-test's fault it is not
        (5, 0, "relabel"),  # a false alarm
    )
    found = self_test(before, after, planted, labels)
    assert (found.planted, found.flagged) == (4, 5)
    assert found.raw_precision == 3 / 5
    assert found.precision == 3 / 4
    assert found.recall == 3 / 4
    assert found.suggested == 2 / 3
    assert found.relabelled == 1 / 2


def test_where_nothing_is_flagged_there_is_no_precision_and_no_recall_at_all() -> None:
    found = self_test(suspects(), suspects(), np.array([1, 2]), np.zeros(3, np.int64))
    assert (found.planted, found.flagged, found.recall) == (2, 0, 0.0)
    assert all(math.isnan(value) for value in (found.raw_precision, found.precision, found.suggested, found.relabelled))
