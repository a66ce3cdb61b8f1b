"""Open-set identification against naive counting and numbers worked out by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facefast.evaluation import openset
from facefast.evaluation.openset import Join, OpenSetScores


def crowd(
    people: int, pictures: int, noise: float = 0.7, seed: int = 0
) -> tuple[Tensor, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(people, 16, generator=generator)
    labels = np.arange(people * pictures) % people
    noisy = centres[torch.from_numpy(labels)] + noise * torch.randn(len(labels), 16, generator=generator)
    return noisy, labels.astype(np.int64)


def test_open_set_numbers_by_hand() -> None:
    # Three known probes and two strangers against a gallery of Ann, Bo and Cy.
    matrix = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.5, 0.0], [0.1, 0.1, 0.4], [0.3, 0.7, 0.2], [0.1, 0.2, 0.15]])
    scores = openset.scores_of(matrix, [0, 1, 2, -1, -1])
    assert scores.genuine == pytest.approx([0.9, 0.5, 0.4])
    assert scores.ranks.tolist() == [0, 1, 0]  # Bo's probe looks more like Ann
    assert scores.impostors == pytest.approx([0.7, 0.2])
    assert scores.missed(0.45).tolist() == [False, True, True]
    assert scores.named(0.45).tolist() == [True, False]
    assert openset.cmc(scores.ranks, 3) == pytest.approx([2 / 3, 1, 1])
    assert [tuple(round(x, 6) for x in point) for point in openset.naming_curve(scores)] == [
        (0.9, 0.0, 0.666667), (0.7, 0.5, 0.666667), (0.4, 0.5, 0.333333), (0.2, 1.0, 0.333333)
    ]  # fmt: skip


def test_ties_give_the_known_person_no_credit() -> None:
    scores = openset.scores_of(torch.full((2, 3), 0.5), [0, -1])
    assert scores.ranks.tolist() == [2]
    assert scores.missed(0.0).all()
    assert scores.named(0.5).all() and not scores.named(0.51).any()


def naive_leave_one_out(
    embeddings: Tensor, labels: np.ndarray[tuple[int], np.dtype[np.int64]], join: Join
) -> tuple[list[float], list[int], list[float]]:
    unit = F.normalize(embeddings.double(), dim=1).numpy()

    def entry(rows: list[int], probe: int) -> float:
        if join == "max":
            return max(float(unit[row] @ unit[probe]) for row in rows)
        mean = unit[rows].sum(0)
        return float(mean @ unit[probe] / np.linalg.norm(mean))

    genuine, ranks, impostors = [], [], []
    for probe in np.argsort(labels, kind="stable"):
        if labels[probe] < 0:
            continue
        others = [
            entry(np.flatnonzero(labels == who).tolist(), probe) for who in set(labels.tolist()) - {-1, labels[probe]}
        ]
        impostors.append(max(others))
        own = [row for row in np.flatnonzero(labels == labels[probe]).tolist() if row != probe]
        if own:
            genuine.append(entry(own, probe))
            ranks.append(sum(score >= genuine[-1] for score in others))
    return genuine, ranks, impostors


@pytest.mark.parametrize("join", ["mean", "max"])
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_leaving_out_each_person_equals_counting_one_by_one(join: Join, block: int) -> None:
    embeddings, labels = crowd(9, 5, noise=1.5)
    labels[[3, 17]] = -1
    labels[labels == 8] = -1
    labels[44] = 8  # a person with one picture
    found = openset.leave_one_out(embeddings, labels, join, block)
    genuine, ranks, impostors = naive_leave_one_out(embeddings, labels, join)
    assert found.genuine == pytest.approx(genuine, abs=1e-5)
    assert found.impostors == pytest.approx(impostors, abs=1e-5)
    assert found.ranks.tolist() == ranks
    assert len(found.strangers) == len(found.known) + 1
    assert 8 in found.strangers and 8 not in found.known


def test_leaving_out_each_person_needs_two() -> None:
    with pytest.raises(ValueError, match="identities is 1; it takes 2"):
        openset.leave_one_out(torch.randn(3, 4), np.array([0, 0, -1]))
    with pytest.raises(ValueError, match="1 of 3 embeddings have no direction"):
        openset.leave_one_out(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [0, 0, 1])
    with pytest.raises(ValueError, match="1 of 3 embeddings have no direction"):
        openset.leave_one_out(torch.tensor([[math.nan, 0.0], [1.0, 0.0], [0.0, 1.0]]), [0, 0, 1])


@pytest.mark.parametrize("join", ["mean", "max"])
def test_a_gallery_of_other_pictures_equals_the_matrix_of_scores(join: Join) -> None:
    embeddings, labels = crowd(12, 6, noise=1.2)
    gallery = (labels < 8) & (np.arange(72) < 36)
    probes = ~gallery
    found = openset.against_gallery(
        embeddings[probes], labels[probes], embeddings[gallery], labels[gallery], join, block=5
    )
    unit = F.normalize(embeddings, dim=1)
    entries = []
    for who in range(8):
        own = unit[torch.from_numpy(gallery & (labels == who))]
        scores = unit[torch.from_numpy(probes)] @ own.T
        entries.append(scores.amax(1) if join == "max" else scores.sum(1) / own.sum(0).norm())
    matrix = torch.stack(entries, 1)
    expected = openset.scores_of(matrix, np.where(labels[probes] < 8, labels[probes], -1), labels[probes])
    assert found.genuine == pytest.approx(expected.genuine, abs=1e-5)
    assert found.impostors == pytest.approx(expected.impostors, abs=1e-5)
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert set(found.strangers) == {8, 9, 10, 11}
    assert set(found.known) == set(range(8))


def test_people_need_no_numbers_in_a_row() -> None:
    probes, gallery = torch.eye(3), torch.eye(3)[:2]
    found = openset.against_gallery(probes, [700, 5, 9000], gallery, [700, 5])
    assert found.known.tolist() == [700, 5]
    assert found.strangers.tolist() == [9000]
    assert found.genuine.tolist() == [1, 1]


def test_naming_thresholds_hold_their_rates_on_the_strangers_they_were_found_on() -> None:
    embeddings, labels = crowd(80, 8)
    scores = openset.leave_one_out(embeddings, labels)
    found = openset.naming_thresholds(scores)
    assert [threshold.rate for threshold in found] == [0.1, 0.05, 0.01, 0.001]
    for threshold in found[:3]:
        value = threshold.require()
        named = (scores.impostors >= value).mean()
        assert threshold.rate - 1 / 640 < named <= threshold.rate
        missed = np.mean([rank > 0 or own < value for rank, own in zip(scores.ranks, scores.genuine, strict=True)])
        assert threshold.missed == missed
        assert threshold.rate_interval is not None and threshold.rate_interval.low <= named
        assert threshold.rate_interval.high >= threshold.rate
        assert threshold.interval is not None and threshold.interval.low <= value <= threshold.interval.high
        assert threshold.people == 80
    values = [threshold.require() for threshold in found[:3]]
    assert values == sorted(values)
    assert found[3].value is None
    assert found[3].why == "640 pictures of strangers cannot show a rate of 0.001; 3000 are needed"


def test_many_pictures_of_few_strangers_show_no_low_rate() -> None:
    rng = np.random.default_rng(4)
    strangers = np.repeat(np.arange(10), 100)  # 1000 pictures, of which 10 may be named: all of one person
    scores = rng.normal(size=10)[strangers] + rng.normal(size=1000)
    none = strangers[:0]
    found = openset.naming_thresholds(OpenSetScores(scores[:0], none, scores, none, strangers, strangers))
    assert [threshold.value is None for threshold in found] == [False, False, True, True]
    needed = re.search(r"1000 pictures of 10 strangers cannot show a rate of 0.01: .* about (\d+) people", found[2].why)
    assert needed is not None and 20 < int(needed[1]) < 200
    alone = np.arange(1000)
    found = openset.naming_thresholds(OpenSetScores(scores[:0], none, scores, none, alone, alone))
    assert found[2].value is not None


def test_a_shipped_rate_holds_on_other_strangers() -> None:
    embeddings, labels = crowd(400, 5, noise=1.0, seed=5)
    inside = 0
    gallery = labels < 100
    for part in range(3):
        first = (labels >= 100 * (part + 1)) & (labels < 100 * (part + 1) + 50)
        second = (labels >= 100 * (part + 1) + 50) & (labels < 100 * (part + 2))
        scores = [
            openset.against_gallery(embeddings[side], labels[side], embeddings[gallery], labels[gallery])
            for side in (first, second)
        ]
        threshold = openset.naming_thresholds(scores[0], [0.05])[0]
        interval = threshold.rate_interval
        assert interval is not None
        again = float(scores[1].named(threshold.require()).mean())
        inside += interval.low <= again <= interval.high
    assert inside >= 2


def test_one_side_may_be_empty() -> None:
    nobody, none = np.zeros(0), np.zeros(0, np.int64)
    only_known = OpenSetScores(np.array([0.5]), np.array([0]), nobody, np.array([1]), none, none)
    assert all(t.value is None and "0 pictures of strangers" in t.why for t in openset.naming_thresholds(only_known))
    apart = np.arange(100)
    only_strangers = OpenSetScores(nobody, none, np.linspace(0, 1, 100), none, apart, apart)
    found = openset.naming_thresholds(only_strangers, [0.1])[0]
    assert found.value is not None and found.missed is None and found.missed_interval is None
    with pytest.raises(ValueError, match="a curve needs both"):
        openset.naming_curve(only_known)
    with pytest.raises(ValueError, match="no probe of a known person"):
        openset.cmc(none)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        openset.scores_of(torch.tensor([[0.5, bad], [0.1, 0.2]]), [0, -1])
    with pytest.raises(ValueError, match="FPIR 1 must lie"):
        openset.naming_thresholds(openset.scores_of(torch.eye(2), [0, -1]), [1.0])
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="as many of each"):
        OpenSetScores(np.zeros(2), one, np.zeros(1), np.zeros(2, np.int64), one, one)


@pytest.mark.parametrize("decimals", [1, 9])
def test_the_error_curve_equals_counting_at_each_threshold(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    genuine, impostors = np.round(rng.normal(1, 1, 90), decimals), np.round(rng.normal(0, 1, 130), decimals)
    curve = openset.error_curve(genuine, impostors, points=0)
    assert [point[0] for point in curve] == sorted({*genuine, *impostors}, reverse=True)
    for threshold, accepted, rejected in curve:
        assert accepted == (impostors >= threshold).mean()
        assert rejected == (genuine < threshold).mean()


def test_a_thinned_curve_has_points_of_the_whole_one_and_both_ends() -> None:
    rng = np.random.default_rng(0)
    genuine, impostors = rng.normal(2, 1, 3000), rng.normal(0, 1, 5000)
    whole = openset.error_curve(genuine, impostors, points=0)
    thin = openset.error_curve(genuine, impostors)
    assert len(thin) <= openset.POINTS
    assert set(thin) <= set(whole)
    assert thin[0] == whole[0] and thin[-1][1] == 1
    rare = [accepted for _, accepted, _ in thin if 0 < accepted < 0.01]
    assert len(rare) > 20  # a straight spacing would have two


def test_a_person_under_two_names_is_found_and_set_aside() -> None:
    embeddings, labels = crowd(40, 10, noise=0.8)
    twice, named = torch.cat([embeddings, embeddings[labels == 3] + 0.3]), np.append(labels, np.full(10, 50))
    scores = openset.leave_one_out(twice, named, "max")
    assert sorted(openset.double_names(scores)) == [(3, 50), (50, 3)]
    kept, aside = openset.without_double_names(scores)
    assert aside == 2
    assert not {3, 50} & {*kept.strangers.tolist(), *kept.known.tolist()}
    assert len(kept.impostors) == len(kept.nearest) == len(scores.impostors) - 20
    clean = openset.leave_one_out(embeddings, labels, "max")
    assert openset.double_names(clean) == []
    # Pictures of the one, which are all very like those of the other, would set the threshold of a low rate.
    raw, better, best = (openset.naming_thresholds(s, [0.04])[0].require() for s in (scores, kept, clean))
    assert raw > better + 0.1
    assert better == pytest.approx(best, abs=0.05)
    alone = OpenSetScores(np.zeros(0), labels[:0], np.ones(9), labels[:0], labels[:9], labels[:9])
    assert openset.double_names(alone) == []
