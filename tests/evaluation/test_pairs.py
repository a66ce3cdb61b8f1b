"""Verification in full, against naive counting and numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from facefast.data import PairSet
from facefast.evaluation import metrics, pairs
from facefast.evaluation.intervals import error_interval
from facefast.evaluation.pairs import PairScores
from tests.support.pictures import make_index


def drawn(people: int = 40, count: int = 4000, decimals: int = 9, seed: int = 0) -> PairScores:
    rng = np.random.default_rng(seed)
    one = rng.integers(people, size=count)
    other = np.where(np.arange(count) % 2 == 0, one, (one + rng.integers(1, people, size=count)) % people)
    alike = rng.normal(0, 0.5, people)
    scores = np.round(rng.normal(size=count) + 2.5 * (one == other) + (alike[one] + alike[other]) / 2, decimals)
    return PairScores.of(scores, one == other, one, other)


def part(found: PairScores, chosen: NDArray[np.bool_]) -> PairScores:
    return PairScores(found.scores[chosen], found.same[chosen], found.one[chosen], found.other[chosen])


def test_the_equal_error_rate_by_hand() -> None:
    same = np.array([True, True, False, False])
    assert pairs.equal_error_rate([0.9, 0.6, 0.7, 0.1], same) == 0.5  # at 0.7 one of two strangers, one of two mates
    assert pairs.equal_error_rate([0.9, 0.8, 0.7, 0.1], same) == 0
    assert pairs.equal_error_rate([0.1, 0.2, 0.7, 0.9], same) == 1
    assert pairs.equal_error_rate([0.5, 0.5, 0.5, 0.5], same) == 0.5  # half way from nothing to everything


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_the_equal_error_rate_lies_where_the_curves_cross(decimals: int) -> None:
    found = drawn(decimals=decimals)
    eer = pairs.equal_error_rate(found.scores, found.same)
    curve = metrics.roc(found.scores, found.same)
    # Wherever else one walks along the curve, false accepts and false rejects differ by more.
    steps = np.linspace(0, len(curve.far) - 1, 20 * len(curve.far) + 1)
    far, tar = (np.interp(steps, np.arange(len(curve.far)), column) for column in (curve.far, curve.tar))
    nearest = int(np.argmin(np.abs(far - (1 - tar))))
    assert eer == pytest.approx(far[nearest], abs=0.05 * float(np.diff(curve.far).max()))


def test_pair_thresholds_reach_as_far_as_the_pairs_support() -> None:
    found = drawn()
    thresholds = pairs.pair_thresholds(found)
    assert [t.value is not None for t in thresholds] == [True, False, False, False, False]
    assert thresholds[1].why == "2000 pairs of two people cannot show a rate of 0.001; 3000 are needed"
    first = thresholds[0]
    impostors = found.scores[~found.same]
    assert (impostors >= first.require()).sum() == 20
    assert first.missed == pytest.approx(1 - metrics.tar_at_far(found.scores, found.same, 1e-2).tar)
    assert first.interval is not None and first.interval.low <= first.require() <= first.interval.high
    assert first.rate_interval is not None and first.rate_interval.low < 0.01 < first.rate_interval.high
    assert first.people == 40
    with pytest.raises(ValueError, match="FMR 0 must lie"):
        pairs.pair_thresholds(found, [0.0])


def test_pairs_of_one_kind_alone_have_thresholds_without_the_other_rate() -> None:
    found = drawn()
    strangers = part(found, ~found.same)
    first = pairs.pair_thresholds(strangers)[0]
    assert first.value is not None and first.missed is None
    mates = part(found, found.same)
    assert all(threshold.value is None for threshold in pairs.pair_thresholds(mates))


def test_constant_scores_accept_nobody() -> None:
    one = np.arange(800) % 10
    other = np.where(np.arange(800) < 400, one, (one + 1) % 10)
    found = pairs.pair_thresholds(PairScores.of(np.full(800, 0.5), one == other, one, other))[0]
    assert found.require() == np.nextafter(0.5, 1)
    assert found.missed == 1
    assert found.rate_interval is not None and found.rate_interval.low == 0


def test_intervals_by_identity_are_those_of_a_naive_bootstrap() -> None:
    found = drawn(people=20, count=600, decimals=1)
    intervals = pairs.identity_intervals(found, (0.1, 1e-3), draws=400)
    assert set(intervals) == {"auc", "eer", "tar@1e-1"}  # 300 pairs of two people cannot show 0.1 %
    rng = np.random.default_rng(5)
    drawn_values: dict[str, list[float]] = {"auc": [], "eer": [], "tar@1e-1": []}
    for _ in range(400):
        times = np.bincount(rng.integers(20, size=20), minlength=20)
        weights = np.where(found.same, times[found.one], times[found.one] * times[found.other])
        scores, same = np.repeat(found.scores, weights), np.repeat(found.same, weights)
        drawn_values["auc"].append(metrics.auc(scores, same))
        drawn_values["eer"].append(pairs.equal_error_rate(scores, same))
        drawn_values["tar@1e-1"].append(metrics.tar_at_far(scores, same, 0.1).tar)
    for name, values in drawn_values.items():
        low, high = np.quantile(values, [0.025, 0.975])
        width = high - low
        assert intervals[name].low == pytest.approx(low, abs=0.25 * width)
        assert intervals[name].high == pytest.approx(high, abs=0.25 * width)


def test_intervals_by_identity_are_wider_than_those_by_pair() -> None:
    found = drawn(people=15, count=4000)
    by_identity = pairs.identity_intervals(found)["auc"]
    apart = np.arange(4000)
    by_pair = pairs.identity_intervals(PairScores(found.scores, found.same, apart, apart))["auc"]
    assert by_identity.high - by_identity.low > 1.5 * (by_pair.high - by_pair.low)


def test_a_perfect_result_is_no_certain_one() -> None:
    one = np.arange(400) % 20
    other = np.where(np.arange(400) < 200, one, (one + 1) % 20)
    for best in (True, False):
        scores = np.where((one == other) == best, 1.0, 0.0) + np.arange(400) / 1e4
        found = pairs.identity_intervals(PairScores.of(scores, one == other, one, other), (0.1,))
        assert set(found) == {"tar@1e-1"}
        missed = error_interval(np.full(200, not best), one[:200], other[:200])
        assert found["tar@1e-1"] == (1 - missed.high, 1 - missed.low)
        assert found["tar@1e-1"].high - found["tar@1e-1"].low > 0.1


def test_columns_of_pairs_must_fit_and_be_finite() -> None:
    with pytest.raises(ValueError, match="2, 1, 2, 2"):
        PairScores.of([0.1, 0.2], [True], [0, 1], [0, 2])
    with pytest.raises(ValueError, match="1 of 2 scores of pairs are not finite"):
        PairScores.of([0.1, np.inf], [True, False], [0, 1], [0, 2])


def test_several_draws_of_pairs_have_a_spread(tmp_path: Path) -> None:
    index = make_index(tmp_path, [f"{k}.png" for k in range(60)], labels=np.arange(60, dtype=np.int32) % 6)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(6, 8, generator=generator)[torch.arange(60) % 6]
    embeddings = embeddings + 0.8 * torch.randn(60, 8, generator=generator)
    found = pairs.over_seeds(embeddings, torch.ones(60) > 0, index, 100, 5, (0, 1, 2))
    values = [
        metrics.auc(metrics.pair_scores(torch.nn.functional.normalize(embeddings).numpy(), p.left, p.right), p.same)
        for p in (PairSet.random(index, 100, 5, seed) for seed in (0, 1, 2))
    ]
    assert found["auc"]["mean"] == pytest.approx(np.mean(values))
    assert found["auc"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["auc"]["least"] == min(values) and found["auc"]["most"] == max(values)
    assert "tar@1e-3" not in found  # no draw can show it
    once = pairs.over_seeds(embeddings, torch.ones(60) > 0, index, 100, 5, (3, 3))
    assert once["auc"]["std"] == 0
