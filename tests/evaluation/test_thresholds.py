"""Thresholds: refusals, intervals and types, against numbers worked out by hand and naive counting."""

from __future__ import annotations

import json

import numpy as np
import pytest

from facefast.evaluation import thresholds
from facefast.evaluation.metrics import Interval, tar_at_far
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
