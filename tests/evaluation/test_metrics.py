"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facefast.evaluation import metrics

# Four pairs, one of them a stranger who looks alike.
SCORES = np.array([0.9, 0.6, 0.7, 0.1])
SAME = np.array([True, True, False, False])


def test_label_ranks_count_the_classes_before_the_right_one() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    ranks = metrics.label_ranks(logits, torch.tensor([0, 1, 2, -100]))
    assert ranks.tolist() == [0, 2, 1, -1]


def test_ties_and_nan_give_no_credit() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0], [math.nan, 2.0, 0.0], [0.0, math.nan, 3.0]])
    assert metrics.label_ranks(logits, torch.tensor([0, 0, 2])).tolist() == [2, 2, 1]


def test_topk_accuracy_leaves_out_rows_without_a_label() -> None:
    ranks = np.array([0, 3, -1, 1])
    assert metrics.topk_accuracy(ranks) == pytest.approx(1 / 3)
    assert metrics.topk_accuracy(ranks, 2) == pytest.approx(2 / 3)
    assert metrics.topk_accuracy(ranks, 5) == 1


def test_topk_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="of 0 labelled rows"):
        metrics.topk_accuracy(np.array([-1, -1]))


def test_per_class_accuracy_is_nan_for_absent_classes() -> None:
    ranks, labels = np.array([0, 1, 0, -1]), np.array([0, 0, 2, -100])
    found = metrics.per_class_accuracy(ranks, labels, 4)
    assert np.array_equal(found, [0.5, np.nan, 1.0, np.nan], equal_nan=True)
    assert np.nanmean(found) == 0.75


def test_pair_scores_are_cosines() -> None:
    embeddings = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    found = metrics.pair_scores(embeddings, np.array([0, 0, 1]), np.array([0, 1, 2]))
    assert found == pytest.approx([1, 0, 0.8])


def test_roc_of_four_pairs() -> None:
    curve = metrics.roc(SCORES, SAME)
    assert curve.thresholds.tolist() == [np.inf, 0.9, 0.7, 0.6, 0.1]
    assert curve.tar.tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve.far.tolist() == [0, 0, 0.5, 0.5, 1]


def test_roc_has_one_point_for_equal_scores() -> None:
    curve = metrics.roc(np.array([0.5, 0.5, 0.5, 0.2]), np.array([True, False, True, False]))
    assert curve.thresholds.tolist() == [np.inf, 0.5, 0.2]
    assert curve.tar.tolist() == [0, 1, 1]
    assert curve.far.tolist() == [0, 0.5, 1]


def test_auc_of_four_pairs_is_three_quarters() -> None:
    assert metrics.auc(SCORES, SAME) == 0.75  # 3 of the 4 (same, different) combinations are in order


def test_auc_counts_ties_as_half() -> None:
    assert metrics.auc(np.ones(6), np.array([True, False] * 3)) == 0.5


def test_auc_equals_the_count_over_all_combinations() -> None:
    rng = np.random.default_rng(0)
    scores, same = rng.integers(0, 9, 200) / 8, rng.random(200) < 0.3
    above = scores[same][:, None] - scores[~same][None, :]
    assert metrics.auc(scores, same) == pytest.approx(((above > 0) + (above == 0) / 2).mean())


def test_tar_at_far_takes_the_lowest_threshold_that_keeps_the_rate() -> None:
    assert metrics.tar_at_far(SCORES, SAME, 0.5) == metrics.OperatingPoint(0.6, 1.0, 0.5)


def test_tar_at_far_does_not_interpolate() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    same = np.array([True, False, True, False, False, True])
    # One false accept in three is 0.33, so 0.6 allows one: the threshold stops above the second.
    point = metrics.tar_at_far(scores, same, 0.6)
    assert point == pytest.approx((0.7, 2 / 3, 1 / 3))


def test_tar_at_far_accepts_no_tie_in_part() -> None:
    scores = np.array([0.5, 0.5, 0.5, 0.5])
    point = metrics.tar_at_far(scores, SAME, 0.5)
    assert point == metrics.OperatingPoint(np.inf, 0.0, 0.0)


def test_the_threshold_of_an_operating_point_gives_its_rates() -> None:
    rng = np.random.default_rng(1)
    same = np.arange(2000) < 1000
    scores = rng.normal(size=2000) + 2 * same
    point = metrics.tar_at_far(scores, same, 0.01)
    assert (scores[~same] >= point.threshold).sum() == 10
    assert point.far == 0.01
    assert (scores[same] >= point.threshold).mean() == point.tar


@pytest.mark.parametrize(("accepted", "negatives"), [(29, 100), (57, 100), (7, 1000), (3, 3000)])
def test_a_rate_that_is_less_in_binary_still_allows_its_pairs(accepted: int, negatives: int) -> None:
    scores = np.concatenate([[-1.0], np.arange(negatives, 0, -1.0)])
    same = np.arange(negatives + 1) == 0
    point = metrics.tar_at_far(scores, same, accepted / negatives)
    assert (scores[~same] >= point.threshold).sum() == accepted


def test_a_rate_that_too_few_pairs_cannot_show_is_nan() -> None:
    point = metrics.tar_at_far(SCORES, SAME, 0.1)
    assert np.isnan(point).all()
    assert not metrics.enough_negatives(99, 0.01)
    assert metrics.enough_negatives(100, 0.01)


def test_a_false_accept_rate_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.tar_at_far(SCORES, SAME, 0.0)


@pytest.mark.parametrize(
    ("scores", "same", "threshold"),
    [
        ([0.9, 0.6, 0.4, 0.1], [1, 1, 0, 0], 0.5),
        ([0.9, 0.6, 0.4, 0.1], [1, 1, 1, 0], 0.25),
        (
            [0.2, 0.4, 0.3],
            [1, 0, 0],
            np.nextafter(0.4, 1),
        ),  # nothing accepted is as good as it gets
    ],
)
def test_best_threshold_lies_between_the_scores(scores: list[float], same: list[int], threshold: float) -> None:
    assert metrics.best_threshold(np.array(scores), np.array(same)) == pytest.approx(threshold, abs=1e-12)


def test_best_threshold_separates_neighbouring_numbers() -> None:
    low = 0.5
    high = float(np.nextafter(low, 1))
    threshold = metrics.best_threshold(np.array([high, low]), np.array([True, False]))
    assert low < threshold <= high


def test_best_threshold_decides_as_well_as_any() -> None:
    rng = np.random.default_rng(2)
    same = rng.random(300) < 0.5
    scores = np.round(rng.normal(size=300) + same, 1)
    tried = [((scores >= t) == same).mean() for t in [*scores, np.inf]]
    found = metrics.best_threshold(scores, same)
    assert ((scores >= found) == same).mean() == max(tried)


def test_kfold_chooses_each_threshold_on_the_other_folds() -> None:
    # Fold 0 separates at 0.5, fold 1 at 0.75: each is judged by the other's threshold.
    scores = np.array([0.6, 0.4, 0.9, 0.6])
    same = np.array([True, False, True, False])
    found = metrics.kfold_verification(scores, same, np.array([0, 0, 1, 1]))
    assert found.thresholds.tolist() == [0.75, 0.5]
    assert found.accuracies.tolist() == [0.5, 0.5]
    assert (found.accuracy, found.std) == (0.5, 0)


def test_kfold_of_perfect_scores_is_perfect() -> None:
    same = np.arange(100) % 2 == 0
    found = metrics.kfold_verification(same * 1.0, same, np.arange(100) // 10)
    assert (found.accuracy, found.std, len(found.accuracies)) == (1, 0, 10)


def test_kfold_needs_two_folds() -> None:
    with pytest.raises(ValueError, match="1 folds over 4"):
        metrics.kfold_verification(SCORES, SAME, np.zeros(4, int))


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        metrics.roc(np.array([0.9, math.nan, 0.7, 0.1]), SAME)


@pytest.mark.parametrize("kind", [True, False])
def test_pairs_of_one_kind_only_are_refused(kind: bool) -> None:
    with pytest.raises(ValueError, match="needs both"):
        metrics.auc(SCORES, np.full(4, kind))


def test_scores_and_pairs_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="both must be"):
        metrics.roc(SCORES, SAME[:3])


def test_wilson_interval_of_nine_in_ten() -> None:
    found = metrics.wilson_interval(9, 10)
    assert found == pytest.approx((0.5958, 0.9821), abs=1e-4)


def test_wilson_interval_stays_inside_at_the_ends() -> None:
    assert metrics.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert metrics.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    with pytest.raises(ValueError, match="total above 0"):
        metrics.wilson_interval(0, 0)


def test_bootstrap_interval_agrees_with_wilson_on_a_proportion() -> None:
    right = np.arange(500) < 400
    found = metrics.bootstrap_interval(lambda column: float(column.mean()), right)
    assert found == pytest.approx(metrics.wilson_interval(400, 500), abs=0.01)


def test_bootstrap_keeps_rows_together_and_repeats() -> None:
    rows = np.arange(50.0)

    def difference(left: np.ndarray, right: np.ndarray) -> float:
        return float(np.abs(left - right).max())

    assert metrics.bootstrap_interval(difference, rows, rows, samples=50) == (0, 0)
    assert metrics.bootstrap_interval(np.mean, rows, seed=3) == metrics.bootstrap_interval(np.mean, rows, seed=3)
    with pytest.raises(ValueError, match="equal numbers"):
        metrics.bootstrap_interval(difference, rows, rows[:3])
