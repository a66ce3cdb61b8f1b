"""Intervals: coverage in simulations, naive sums and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from facefast.evaluation import intervals
from facefast.evaluation.intervals import error_interval, rate_again, threshold_interval, trials_worth
from facefast.evaluation.metrics import wilson_interval
from facefast.evaluation.thresholds import lowest_threshold


def test_an_error_interval_of_independent_trials_is_wilsons() -> None:
    errors = np.arange(50) < 7
    assert error_interval(errors) == pytest.approx(wilson_interval(7, 50))
    assert error_interval(errors, np.arange(50)) == pytest.approx(wilson_interval(7, 50), abs=0.02)


def test_trials_that_say_the_same_thing_twice_count_once() -> None:
    rng = np.random.default_rng(0)
    errors = rng.random(200) < 0.2
    alone = error_interval(errors, np.arange(200))
    repeated = error_interval(np.repeat(errors, 20), np.repeat(np.arange(200), 20))
    assert repeated == pytest.approx(alone, abs=1e-9)
    taken_for_independent = error_interval(np.repeat(errors, 20))
    assert taken_for_independent.high - taken_for_independent.low < 0.3 * (repeated.high - repeated.low)


def test_without_an_error_identities_are_the_trials() -> None:
    found = error_interval(np.zeros(1000, bool), np.repeat(np.arange(10), 100))
    assert found == pytest.approx(wilson_interval(0, 10))
    assert found.low == 0
    pairs = error_interval(np.ones(1000, bool), np.arange(1000) % 10, (np.arange(1000) + 1) % 10)
    assert pairs == pytest.approx(wilson_interval(5, 5))
    assert pairs.high == 1


def test_the_variance_of_pairs_is_the_sum_over_all_pairs_with_an_identity_in_common() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.integers(12, size=80), rng.integers(12, size=80)
    residuals = rng.normal(size=80)
    members = np.stack([one, other])
    naive = 0.0
    for a in range(80):
        for b in range(80):
            if {one[a], other[a]} & {one[b], other[b]}:
                naive += residuals[a] * residuals[b]
    found = intervals._dependent_variance(residuals, members, 12)
    assert found == pytest.approx(max(0.0, naive) * 12 / 11 / 80**2)


def likeness(
    rng: np.random.Generator, people: int, shared: float
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Best scores of strangers with 20 pictures each, a part of whose variance is the person's, and whose they are."""
    who = np.repeat(np.arange(people), 20)
    return math.sqrt(shared) * rng.normal(size=people)[who] + math.sqrt(1 - shared) * rng.normal(size=len(who)), who


@pytest.mark.parametrize(("people", "rate"), [(10, 0.1), (20, 0.05), (40, 0.01), (150, 0.001)])
def test_a_shipped_rate_holds_on_as_many_other_people_as_often_as_it_says(people: int, rate: float) -> None:
    # With the dependence taken at the rate alone, and a normal distribution: 84 to 91 % instead of 95 %.
    rng = np.random.default_rng(people)
    inside = 0
    for _ in range(300):
        (first, who), (second, _) = likeness(rng, people, 0.4), likeness(rng, people, 0.4)
        threshold = lowest_threshold(first, rate)
        found = rate_again(float((first >= threshold).mean()), trials_worth(first, rate, who))
        inside += found.low <= (second >= threshold).mean() <= found.high
    assert inside / 300 >= 0.94


@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_independent_trials_are_worth_their_number(rate: float) -> None:
    scores = np.random.default_rng(0).normal(size=4000)
    assert trials_worth(scores, rate, np.arange(4000)) == pytest.approx(4000, rel=0.02)
    again = np.repeat(scores, 10)
    assert trials_worth(again, rate, np.repeat(np.arange(4000), 10)) == pytest.approx(4000, rel=0.02)


def test_scores_that_no_threshold_parts_are_worth_their_people() -> None:
    assert trials_worth(np.full(400, 0.5), 0.1, np.arange(400) % 7) == 7
    assert trials_worth(np.full(400, 0.5), 0.1, np.zeros(400)) == 1


def test_the_rate_of_another_set_is_beta_binomial() -> None:
    """Counting all equally likely orders of old and new trials: 3 of 20 errors, and at most how many of 20 more."""
    found = rate_again(0.15, 20)

    def part_up_to(count: int, errors: int) -> float:
        # The chance of `count` or fewer new errors before the next of the old ones (negative hypergeometric).
        ways = [math.comb(errors + k - 1, k) * math.comb(40 - errors - k, 20 - k) for k in range(21)]
        return sum(ways[: count + 1]) / sum(ways)

    high = round(found.high * 20)
    assert part_up_to(high, 4) >= 0.975 > part_up_to(high - 1, 4)
    low = round(found.low * 20)
    assert part_up_to(low, 3) >= 0.025 and (low == 0 or part_up_to(low - 1, 3) < 0.025)
    assert rate_again(0.0, 20).low == 0 and rate_again(1.0, 20).high == 1


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)])
def test_few_identities_have_students_quantiles(freedom: int, quantile: float) -> None:
    assert intervals._student(freedom) == pytest.approx(quantile, rel=0.01)


@pytest.mark.parametrize("pairs", [False, True])
def test_intervals_by_identity_hold_the_truth_as_often_as_they_say(pairs: bool) -> None:
    # Each identity has its own chance of an error, so trials of one are far from independent.
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(200):
        chance = rng.beta(0.5, 4.5, 60)  # 0.1 on average
        if pairs:
            one, other = rng.integers(60, size=(2, 1500))
            errors = rng.random(1500) < (chance[one] + chance[other]) / 2
            found = error_interval(errors, one, other)
        else:
            one = np.repeat(np.arange(60), 25)
            found = error_interval(rng.random(1500) < chance[one], one)
        inside += found.low <= 0.1 <= found.high
    assert 0.88 <= inside / 200 <= 1


def test_a_threshold_interval_holds_the_threshold_of_everybody() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        scores, who = likeness(rng, 40, 0.4)
        found = threshold_interval(scores, 0.1, trials_worth(scores, 0.1, who))
        inside += found.low <= 1.2815515655 <= found.high
        assert found.low <= lowest_threshold(scores, 0.1) <= found.high
    assert 0.92 <= inside / 200 <= 1


def test_a_threshold_interval_of_constant_scores_is_a_point() -> None:
    assert threshold_interval(np.full(40, 0.5), 0.1, 7) == (np.nextafter(0.5, 1),) * 2


def test_bootstrap_values_of_few_people_are_taken_from_further_out() -> None:
    values = np.linspace(0, 1, 10_001).tolist()
    assert intervals.middle_of(values, 10_000) == pytest.approx((0.025, 0.975), abs=1e-3)
    few = intervals.middle_of(values, 5)  # 1.118 times 2.776 standard deviations
    assert few == pytest.approx((0.00096, 0.99904), abs=2e-4)
    assert intervals.middle_of(values, 1) == (0, 1)
