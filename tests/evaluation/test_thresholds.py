"""Thresholds: refusals, intervals and types, against numbers worked out by hand and naive counting."""

from __future__ import annotations

import json

import numpy as np
import pytest

from facefast.evaluation import thresholds
from facefast.evaluation.metrics import Interval, tar_at_far, wilson_interval
from facefast.evaluation.thresholds import NamingThreshold, PairThreshold, Thresholds


def test_the_lowest_threshold_by_hand() -> None:
    scores = np.array([0.1, 0.5, 0.3, 0.9, 0.7])
    # One of five may be accepted: 0.9 is, and whatever lies just above 0.7.
    assert thresholds.lowest_threshold(scores, 0.2) == np.nextafter(0.7, 1)
    assert thresholds.lowest_threshold(scores, 0.39) == np.nextafter(0.7, 1)
    assert thresholds.lowest_threshold(scores, 0.4) == np.nextafter(0.5, 1)
    assert thresholds.lowest_threshold(scores, 0.1) == np.nextafter(0.9, 1)


def test_equal_scores_are_accepted_together_or_not_at_all() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    assert thresholds.lowest_threshold(scores, 0.4) == np.nextafter(0.5, 1)  # two may be accepted, four would be
    assert thresholds.lowest_threshold(np.full(10, 0.5), 0.9) == np.nextafter(0.5, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_lowest_threshold_is_the_lowest_that_keeps_the_rate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=300), seed % 3)  # from many ties to none
    for rate in (0.01, 0.05, 0.29, 0.57, 0.9):
        found = thresholds.lowest_threshold(scores, rate)
        assert (scores >= found).sum() <= round(rate * 300, 9)
        lower = np.nextafter(found, -np.inf)
        assert (scores >= lower).sum() > round(rate * 300, 9)
        same = np.zeros(600, bool)
        same[300:] = True
        everything = np.concatenate([scores, rng.normal(1, 1, 300)])
        assert tar_at_far(everything, same, rate).tar == (everything[same] >= found).mean()


@pytest.mark.parametrize(("trials", "rate"), [(299, 0.01), (2, 0.99), (0, 0.5), (29, 0.1)])
def test_too_few_trials_refuse_a_rate_and_say_how_many_are_needed(trials: int, rate: float) -> None:
    why = thresholds.refusal(trials, rate, "pictures of strangers")
    needed = int(why.split("; ")[1].split()[0])
    assert why.startswith(f"{trials} pictures of strangers cannot show a rate of {rate:g}")
    assert thresholds.refusal(needed, rate, "pictures of strangers") == ""
    assert thresholds.refusal(needed - 1, rate, "pictures of strangers")


def test_the_rule_of_30_says_which_thresholds_are_firm() -> None:
    assert PairThreshold(0.01, 0.5, 3000, 10).firm
    assert not PairThreshold(0.01, 0.5, 2999, 10).firm
    assert not PairThreshold(0.01, None, 3000, 10).firm


def test_an_error_interval_of_independent_trials_is_wilsons() -> None:
    errors = np.arange(50) < 7
    assert thresholds.error_interval(errors) == pytest.approx(wilson_interval(7, 50))
    assert thresholds.error_interval(errors, np.arange(50)) == pytest.approx(wilson_interval(7, 50), abs=0.02)


def test_trials_that_say_the_same_thing_twice_count_once() -> None:
    rng = np.random.default_rng(0)
    errors = rng.random(200) < 0.2
    alone = thresholds.error_interval(errors, np.arange(200))
    repeated = thresholds.error_interval(np.repeat(errors, 20), np.repeat(np.arange(200), 20))
    assert repeated == pytest.approx(alone, abs=1e-9)
    taken_for_independent = thresholds.error_interval(np.repeat(errors, 20))
    assert taken_for_independent.high - taken_for_independent.low < 0.3 * (repeated.high - repeated.low)


def test_without_an_error_identities_are_the_trials() -> None:
    found = thresholds.error_interval(np.zeros(1000, bool), np.repeat(np.arange(10), 100))
    assert found == pytest.approx(wilson_interval(0, 10))
    assert found.low == 0
    pairs = thresholds.error_interval(np.ones(1000, bool), np.arange(1000) % 10, (np.arange(1000) + 1) % 10)
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
    found = thresholds._dependent_variance(residuals, members, 12)
    assert found == pytest.approx(max(0.0, naive) * 12 / 11 / 80**2)


def test_the_interval_of_another_set_holds_what_another_set_shows() -> None:
    rng = np.random.default_rng(11)
    people = np.repeat(np.arange(60), 25)

    def trials() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return rng.normal(size=1500) + rng.normal(size=60)[people]

    inside = {False: 0, True: 0}
    for _ in range(200):
        first, second = trials(), trials()
        threshold = thresholds.lowest_threshold(first, 0.05)
        rate = (second >= threshold).mean()
        for again in inside:
            found = thresholds.error_interval(first >= threshold, people, again=again)
            inside[again] += found.low <= rate <= found.high
    assert inside[True] / 200 >= 0.9
    assert inside[False] < inside[True] - 10
    few = thresholds.error_interval(np.arange(300) < 3, again=True)
    assert few.low == 0 and thresholds.error_interval(np.arange(300) < 3).low > 0


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
            found = thresholds.error_interval(errors, one, other)
        else:
            one = np.repeat(np.arange(60), 25)
            found = thresholds.error_interval(rng.random(1500) < chance[one], one)
        inside += found.low <= 0.1 <= found.high
    assert 0.88 <= inside / 200 <= 1


def test_a_threshold_interval_is_that_of_a_naive_bootstrap() -> None:
    rng = np.random.default_rng(1)
    people = np.repeat(np.arange(30), 10)
    scores = np.round(rng.normal(size=300) + rng.normal(size=30)[people], 2)
    found = thresholds.threshold_interval(scores, 0.1, people)
    drawn = []
    for _ in range(1000):
        chosen = rng.integers(30, size=30)
        drawn.append(thresholds.lowest_threshold(np.concatenate([scores[people == who] for who in chosen]), 0.1))
    assert found == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.12)
    assert found.low <= thresholds.lowest_threshold(scores, 0.1) <= found.high


def test_a_threshold_interval_of_constant_scores_is_a_point() -> None:
    assert thresholds.threshold_interval(np.full(40, 0.5), 0.1, np.arange(40)) == (0.5, 0.5)
    both = thresholds.threshold_interval(np.full(40, 0.5), 0.1, np.arange(40) % 7, np.arange(40) % 5)
    assert both == (0.5, 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        thresholds.finite([0.1, bad, 0.3], "scores")
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        thresholds.finite([[0.1, 0.2]], "scores")


FOUND = Thresholds(
    pairs=(PairThreshold(0.01, 0.31, 3000, 3000, Interval(0.3, 0.32), Interval(0.005, 0.02), 0.02, None, 40),),
    naming=(
        NamingThreshold(0.01, 0.47, 800, 90, Interval(0.4, 0.5), Interval(0.0, 0.02), 0.1, Interval(0.0, 0.2), 40),
        NamingThreshold(0.001, None, 800, 90, why="800 pictures of strangers cannot show a rate of 0.001"),
    ),
    measured_on="40 people kept out",
)


def test_thresholds_survive_strict_json() -> None:
    text = json.dumps(FOUND.to_json(), allow_nan=False)
    assert Thresholds.from_json(json.loads(text)) == FOUND
    assert json.loads(text)["naming"][1]["threshold"] is None


def test_a_threshold_of_pairs_is_not_taken_for_one_of_naming() -> None:
    document = FOUND.to_json()
    with pytest.raises(ValueError, match="'pair' is no threshold of kind 'naming'"):
        NamingThreshold.from_json(document["pairs"][0])
    with pytest.raises(ValueError, match="not interchangeable"):
        Thresholds.from_json({"pairs": document["naming"], "naming": []})
    with pytest.raises(ValueError, match="lacks or garbles 'fmr'"):
        PairThreshold.from_json({"kind": "pair"})


def test_a_threshold_is_asked_for_by_its_rate() -> None:
    assert FOUND.pair(1e-2).require() == 0.31
    assert FOUND.name(0.01).value == 0.47
    with pytest.raises(ValueError, match="cannot show a rate of 0.001"):
        FOUND.name(0.001)
    with pytest.raises(ValueError, match="no threshold for naming at FPIR 0.2; known: 0.01, 0.001"):
        FOUND.name(0.2)
    with pytest.raises(ValueError, match="known: none"):
        Thresholds().pair(0.01)
