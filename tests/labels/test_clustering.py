"""Neighbours, clusters, assigned labels and agreement, on points of a sphere and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from facefast.labels import clustering
from facefast.labels.clustering import (
    agreement,
    assign,
    cluster,
    default_similarity,
    likelihood_ratio,
    neighbours,
    own_and_other,
    stranger_limit,
)
from tests.support.points import people


def test_neighbours_are_those_of_brute_force_whatever_the_block() -> None:
    unit, _, _ = people([10] * 12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    best = np.argsort(-cosines, axis=1)[:, :5]
    for block in (0, 1, 7, 1000):
        places, values = neighbours(unit, 5, block)
        np.testing.assert_array_equal(places, best)
        np.testing.assert_allclose(values, np.take_along_axis(cosines, best, 1), atol=1e-6)


def test_few_rows_have_few_neighbours() -> None:
    unit, _, _ = people([2])
    assert neighbours(unit, 5)[0].tolist() == [[1], [0]]
    assert neighbours(unit[:1], 5)[0].shape == (1, 0)


def test_strangers_rarely_exceed_their_limit() -> None:
    unit, labels, _ = people([10] * 40)
    cosines = unit @ unit.T
    different = labels[:, None] != labels
    expected = (cosines[different] > stranger_limit(unit)).mean() * len(unit)
    assert 0.1 < expected < 5
    assert (cosines[~different] > stranger_limit(unit)).mean() > 0.95


def test_clusters_are_the_people_and_strangers_are_noise() -> None:
    unit, labels, generator = people([12, 10, 8, 6, 4, 2] + [1] * 5, spread=0.04, dimensions=512)
    order = generator.permutation(len(unit))
    found, confidences = cluster(unit[order])
    for label in range(6):
        assert set(found[labels[order] == label].tolist()) == {label}  # the largest is number 0
    assert (found[labels[order] >= 6] == -1).all()
    assert (confidences[labels[order] >= 6] == 0).all()
    assert (confidences[labels[order] < 6] > 0.95).all()


@pytest.mark.parametrize("counts", [[20], [60], [4], [20, 20], [12, 3], [20] * 5, [4] * 6], ids=str)
def test_by_default_one_person_is_one_cluster_and_several_are_as_many(counts: list[int]) -> None:
    for seed in range(5):
        unit, labels, _ = people(counts, seed=seed)
        np.testing.assert_array_equal(cluster(unit)[0], labels)


def test_the_models_threshold_is_the_least_that_counts_and_many_strangers_raise_it() -> None:
    one, many = people([60])[0], people([20] * 30)[0]
    assert default_similarity(one) == clustering.SAME_PERSON
    assert default_similarity(one, 0.17) == 0.17
    assert default_similarity(many, 0.1) == stranger_limit(many) > 0.1
    assert default_similarity(many, 0.9) == 0.9


def test_several_people_whose_cosines_are_all_high_are_told_apart() -> None:
    # Networks trained without an angular margin put everybody near one direction.
    unit, labels, _ = people([20] * 30)
    near = clustering.unit_rows(np.column_stack([unit, np.ones(len(unit), np.float32)]))
    assert (near @ near.T).min() > clustering.SAME_PERSON - 0.1
    np.testing.assert_array_equal(cluster(near)[0], labels)


def test_clusters_do_not_depend_on_the_block_and_are_the_same_each_time() -> None:
    unit, _, _ = people([9] * 15, spread=0.15)
    first = cluster(unit)
    for block in (0, 1, 50):
        again = cluster(unit, block=block)
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_allclose(again[1], first[1], atol=1e-5)


def test_over_a_whole_graph_clustering_is_average_linkage() -> None:
    unit, _, _ = people([5] * 6, spread=0.2, dimensions=16)
    limit = 0.3
    groups = [[row] for row in range(len(unit))]
    cosines = (unit @ unit.T).astype(np.float64)
    while len(groups) > 1:
        pairs = [
            (cosines[np.ix_(one, other)].mean(), i, j)
            for i, one in enumerate(groups)
            for j, other in enumerate(groups[:i])
        ]
        mean, i, j = max(pairs)
        if mean < limit:
            break
        groups[j] += groups.pop(i)
    found, _ = cluster(unit, similarity=limit, num_neighbours=len(unit), min_size=1)
    assert {frozenset(group) for group in groups} == {
        frozenset(np.flatnonzero(found == k).tolist()) for k in range(found.max() + 1)
    }


def test_one_row_and_copies_can_be_clustered() -> None:
    unit, _, _ = people([1])
    assert cluster(unit)[0].tolist() == [-1]
    assert cluster(np.repeat(unit, 4, axis=0), similarity=0.5)[0].tolist() == [0] * 4


@pytest.mark.parametrize("options", [{"min_size": 0}, {"num_neighbours": 0}])
def test_clustering_refuses_sizes_below_one(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cluster(people([3])[0], **options)


def test_embeddings_must_be_finite() -> None:
    with pytest.raises(ValueError, match="could not be read"):
        cluster(np.full((3, 4), np.nan, np.float32))


def test_own_and_other_leave_the_row_out() -> None:
    unit, labels, _ = people([4, 3, 1])
    own, other, which = own_and_other(unit, labels, 3)
    means = [unit[labels == k].sum(0) for k in range(3)]
    for row in range(7):
        rest = means[labels[row]] - unit[row]
        assert own[row] == pytest.approx(float(rest @ unit[row] / np.linalg.norm(rest)), abs=1e-5)
        cosines = [
            -1.0 if k == labels[row] else float(means[k] @ unit[row] / np.linalg.norm(means[k])) for k in range(3)
        ]
        assert (which[row], other[row]) == (np.argmax(cosines), pytest.approx(max(cosines), abs=1e-5))
    assert np.isnan(own[7])  # nothing is left of a class of one


def test_known_people_lend_their_names_and_strangers_get_none() -> None:
    unit, labels, generator = people([12] * 20 + [6] * 10, spread=0.1)
    known = labels < 20
    seeds = np.where(known & (generator.random(len(labels)) < 0.3), labels, -1)
    found, confidences = assign(unit, seeds, 20, confidence=0.9)
    opened = seeds < 0
    named = opened & known & (found >= 0)
    assert named.sum() > 0.9 * (opened & known).sum()
    assert (found[named] == labels[named]).mean() > 0.98
    assert (found[~known] == -1).mean() > 0.95
    assert (found[~opened] == seeds[~opened]).all()
    assert (confidences[~opened] == 1).all()
    assert ((confidences >= 0) & (confidences <= 1)).all()
    np.testing.assert_array_equal(found >= 0, confidences >= 0.9)


def test_who_wants_less_certainty_gets_more_names_and_the_same_ones() -> None:
    unit, labels, generator = people([12] * 20, spread=0.3)
    seeds = np.where(generator.random(len(labels)) < 0.3, labels, -1)
    every, sure = assign(unit, seeds, 20)
    assert (every >= 0).all()
    for least in (0.3, 0.5, 0.95):
        found, confidences = assign(unit, seeds, 20, confidence=least)
        np.testing.assert_array_equal(confidences, sure)
        np.testing.assert_array_equal(found, np.where(sure >= least, every, -1))
    assert (sure < 0.5).any() and (sure[seeds < 0] > 0.95).any()


def test_rows_without_a_name_sharpen_the_means_of_few_named_ones() -> None:
    unit, labels, _ = people([16] * 40, spread=0.25)
    seeds = np.where(np.arange(len(labels)) % 16 < 2, labels, -1)
    opened = seeds < 0
    once, thrice = (assign(unit, seeds, 40, rounds=rounds)[0] for rounds in (1, 3))
    wrong_once, wrong_thrice = ((found[opened] != labels[opened]).mean() for found in (once, thrice))
    assert wrong_thrice < 0.7 * wrong_once, (wrong_once, wrong_thrice)


def test_the_temperature_is_fitted_on_a_part_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, _, _ = people([20] * 30, spread=0.2)
    whole = cluster(unit)
    monkeypatch.setattr(clustering, "MOST_LOSSES", 3000)
    part = cluster(unit)
    np.testing.assert_array_equal(part[0], whole[0])
    assert np.abs(part[1] - whole[1]).mean() < 0.02


def test_one_picture_of_each_person_is_enough() -> None:
    unit, labels, _ = people([10] * 8)
    seeds = np.full(len(labels), -1)
    seeds[::10] = np.arange(8)
    found, _ = assign(unit, seeds, 8)
    assert (found == labels).mean() > 0.9
    np.testing.assert_array_equal(found, assign(unit, seeds, 8, block=3)[0])


def seeded(known: list[int], seed: int) -> tuple[clustering.Floats, clustering.Numbers, clustering.Numbers]:
    """Known people with so many named pictures and three without a name, and forty strangers with three each: rows,
    names, and who they are, -1 for strangers."""
    unit, labels, _ = people([count + 3 for count in known] + [3] * 40, dimensions=128, seed=seed)
    true = np.where(labels < len(known), labels, -1)
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)
    return unit, np.where((true >= 0) & (place < np.array([*known, 0])[true]), true, -1), true


@pytest.mark.parametrize("same_person", [None, 0.3])
@pytest.mark.parametrize("known", [[5], [1, 1], [1] * 20], ids=["one person", "one picture of two", "of twenty"])
def test_strangers_are_not_named_where_known_people_do_not_show_how_near_strangers_come(
    known: list[int], same_person: float | None
) -> None:
    named = right = strange = 0
    for seed in range(5):
        unit, names, true = seeded(known, seed)
        found, confidences = assign(unit, names, len(known), confidence=0.9, same_person=same_person)
        named += int(np.count_nonzero(found[true < 0] >= 0))
        strange += int(np.count_nonzero(true < 0))
        right += int(np.count_nonzero((found == true)[(names < 0) & (true >= 0)]))
        assert confidences[names < 0].max() < 0.995
    assert named <= 0.02 * strange
    assert right >= 0.9 * 5 * 3 * len(known)


@pytest.mark.parametrize(("same_person", "named"), [(None, 0), (0.3, 3), (0.99, 0)])
def test_few_pictures_with_one_known_person_go_by_the_models_threshold_or_by_nothing(
    same_person: float | None, named: int, capsys: pytest.CaptureFixture[str]
) -> None:
    unit, names, true = seeded([5], 0)
    true = true[:38]
    found, confidences = assign(unit[:38], names[:38], 1, confidence=0.9, same_person=same_person)
    assert np.count_nonzero(found >= 0) == 5 + named
    assert (found[true < 0] == -1).all() and (confidences[true < 0] == 0).all()
    said = capsys.readouterr().err
    assert ("no name is sure" in said and "no threshold for pairs" in said) == (same_person is None)


def test_a_lone_cluster_is_no_certainty_and_less_so_the_nearer_a_row_is_to_falling_out() -> None:
    unit, _, _ = people([6])
    near, strict = (cluster(unit, similarity=limit) for limit in (0.2, 0.5))
    assert set(near[0].tolist()) == set(strict[0].tolist()) == {0}
    for confidences in (near[1], strict[1]):
        assert (confidences > 0.5).all() and (confidences < 0.95).all()
    assert (strict[1] < near[1]).all()


def test_nothing_to_assign_changes_nothing() -> None:
    unit, labels, _ = people([3, 3])
    found, confidences = assign(unit, labels, 2)
    np.testing.assert_array_equal(found, labels)
    assert (confidences == 1).all()


@pytest.mark.parametrize(
    ("labels", "confidence"), [([-1, -1, -1], 0.9), ([0, 5, -1], 0.9), ([0, 1, -1], 1.5), ([0, 1], 0.9)]
)
def test_assigning_refuses_labels_that_make_no_sense(labels: list[int], confidence: float) -> None:
    with pytest.raises(ValueError, match=r"labels up to|must lie in"):
        assign(people([3])[0], np.array(labels), 2, confidence=confidence)


def test_a_likelihood_ratio_never_falls_and_stays_within_what_its_samples_show() -> None:
    generator = np.random.default_rng(0)
    high, low = generator.normal(0.6, 0.1, 500), generator.normal(0.1, 0.1, 800)
    ratio = likelihood_ratio(high, low)
    values = ratio(np.linspace(-1, 1, 200).astype(np.float32))
    assert (np.diff(values) >= 0).all()
    assert values[0] == pytest.approx(1 / 501)
    assert values[-1] == pytest.approx(801)
    middle = ratio(np.array([0.35], np.float32))[0]  # where the densities cross
    assert 0.1 < middle < 10


def test_agreement_of_a_hand_worked_example() -> None:
    true = np.array([0, 0, 0, 1, 1, -1])
    found = np.array([7, 7, 3, 3, -1, 3])
    scores = agreement(true, found)
    # Pairs of one identity: 3 + 1, of one cluster: 1 + 1, of both: 1.
    assert (scores.pair_precision, scores.pair_recall) == (0.5, 0.25)
    assert scores.pair_f == pytest.approx(1 / 3)
    assert scores.bcubed_precision == pytest.approx((1 + 1 + 0.5 + 0.5 + 1) / 5)
    assert scores.bcubed_recall == pytest.approx((2 / 3 + 2 / 3 + 1 / 3 + 0.5 + 0.5) / 5)


def test_agreement_is_whole_for_the_same_grouping_under_other_numbers() -> None:
    scores = agreement(np.array([0, 0, 1, 2, 2]), np.array([9, 9, 4, 0, 0]))
    assert (scores.pair_f, scores.bcubed_f) == (1, 1)


def test_agreement_needs_a_true_identity() -> None:
    with pytest.raises(ValueError, match="labelled"):
        agreement(np.array([-1]), np.array([0]))
