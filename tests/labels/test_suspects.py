"""Wrong labels, duplicates and merges found among points of a sphere where they were planted."""

from __future__ import annotations

import numpy as np
import pytest

from facefast.labels import suspects as suspects_module
from facefast.labels.doubts import doubt
from facefast.labels.selftest import plant_wrong_labels, self_test
from facefast.labels.suspects import Suspects, find_suspects
from tests.support.points import Floats, Numbers, people


def rows_of(suspects: Suspects, kind: str = "wrong_label") -> set[int]:
    return {suspect.row for suspect in suspects.found if suspect.kind == kind}


def test_planted_labels_are_found_and_put_right() -> None:
    unit, labels, _ = people([15] * 30)
    planted, rows = plant_wrong_labels(labels, 0.05, seed=1)
    result = self_test(find_suspects(unit, labels), find_suspects(unit, planted), rows, labels)
    assert result.planted == len(rows) == round(0.05 * len(labels))
    assert min(result.raw_precision, result.precision, result.recall, result.suggested) > 0.9


def test_a_clean_set_has_hardly_a_suspect() -> None:
    unit, labels, _ = people([15] * 30)
    assert len(find_suspects(unit, labels).found) <= 2


def test_a_stranger_is_dropped_without_a_name() -> None:
    unit, labels, generator = people([15] * 30)
    rows = generator.choice(len(labels), 20, replace=False)
    unit[rows] = people([1] * 20, seed=5)[0]
    suspects = find_suspects(unit, labels)
    assert len(rows_of(suspects) & set(rows.tolist())) >= 18
    assert len(rows_of(suspects) - set(rows.tolist())) <= 2
    hits = [suspect for suspect in suspects.found if suspect.row in rows]
    assert {(suspect.suggested, suspect.action) for suspect in hits} == {(-1, "drop")}


def test_the_minority_of_an_identity_with_two_people_is_suspected() -> None:
    unit, labels, _ = people([20] * 25 + [8])
    labels[labels == 25] = 0  # 8 of 28: somebody who is nobody else here
    suspects = rows_of(find_suspects(unit, labels))
    strangers = set(range(500, 508))
    assert strangers <= suspects
    assert len(suspects - strangers) <= 2


def test_an_identity_that_is_wrong_in_many_ways_keeps_its_own() -> None:
    unit, labels, generator = people([20] * 25)
    wrong = np.arange(9)  # 9 of 20 pictures of the first show 9 others
    unit[wrong] = unit[generator.choice(np.arange(100, 500), 9, replace=False)]
    suspects = find_suspects(unit, labels)
    assert set(wrong.tolist()) <= rows_of(suspects)
    assert not rows_of(suspects) & set(range(9, 20))
    assert suspects.mixed == ()


def test_where_two_pictures_differ_nobody_knows_which_is_wrong() -> None:
    unit, labels, _ = people([15] * 20 + [1, 1])
    labels[-1] = labels[-2] = 20
    suspects = find_suspects(unit, labels)
    pair = [suspect for suspect in suspects.of("wrong_label") if suspect.label == 20]
    assert all(suspect.action == "keep" and suspect.confidence < 0.6 for suspect in pair)
    assert not [suspect for suspect in suspects.of("wrong_label") if suspect.label != 20][2:]


def test_single_pictures_and_unlabelled_ones_are_no_wrong_labels() -> None:
    unit, labels, _ = people([15] * 20 + [1] * 10)
    labels[labels >= 25] = -1
    assert not rows_of(find_suspects(unit, labels)) & set(range(300, 310))


def planted_merges() -> tuple[Floats, Numbers]:
    """People 0 and 1 each under two names, the second a part of the pictures; person 2 has a single one under 22."""
    unit, labels, _ = people([15] * 20)
    labels[10:15] = 20
    labels[22:30] = 21
    labels[44] = 22
    return unit, labels


def test_one_person_under_two_names_is_a_merge() -> None:
    unit, labels = planted_merges()
    suspects = find_suspects(unit, labels)
    pairs = {(suspect.label, suspect.suggested) for suspect in suspects.of("merge")}
    assert pairs == {(20, 0), (1, 21), (22, 2)}  # the smaller into the larger
    assert all(suspect.action == "merge" and suspect.confidence > 0.9 for suspect in suspects.of("merge"))
    assert all(labels[suspect.row] == suspect.label for suspect in suspects.of("merge"))
    assert len(rows_of(suspects)) <= 2  # neither half takes the other for strangers


def test_different_people_are_no_merge() -> None:
    for seed in range(5):
        unit, labels, _ = people([8] * 40 + [1] * 10, seed=seed)
        assert not find_suspects(unit, labels).of("merge")


def test_copies_are_found_by_hash_within_and_across_identities() -> None:
    unit, labels, generator = people([15] * 20)
    hashes = generator.integers(1, 1 << 60, (300, 2)).astype(np.uint64)
    for copy, original in ((3, 1), (4, 1), (200, 20)):
        unit[copy], hashes[copy] = unit[original], hashes[original]
    hashes[[50, 70]] = 0  # not scanned: no copies
    suspects = find_suspects(unit, labels, hashes)
    found = {(suspect.row, suspect.other_row, suspect.suggested) for suspect in suspects.of("duplicate")}
    assert found == {(3, 1, 0), (4, 1, 0), (200, 20, 1)}  # 200 shows person 1: its label is the one in doubt
    assert all(suspect.confidence == 1 for suspect in suspects.of("duplicate"))
    assert 200 in rows_of(suspects)


def test_near_copies_are_those_whose_pictures_agree() -> None:
    unit, labels, generator = people([15] * 20)
    for copy, original in ((3, 1), (30, 31), (61, 60)):
        noise = 0.01 * generator.standard_normal(unit.shape[1:])
        unit[copy] = unit[original] + noise.astype(np.float32)
    asked: list[tuple[int, int]] = []

    def same(one: int, other: int) -> bool:
        asked.append((one, other))
        return (one, other) in ((1, 3), (30, 31))

    suspects = find_suspects(unit, labels, same_picture=same)
    assert {(s.row, s.other_row) for s in suspects.of("duplicate")} == {(3, 1), (31, 30)}
    assert all(s.confidence == 0.99 for s in suspects.of("duplicate"))
    assert (60, 61) in asked
    assert len(asked) == len(set(asked)) <= len(unit)
    assert suspects.uncompared == 0


def test_pairs_beyond_the_most_that_are_compared_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, labels, _ = people([15] * 20)
    unit[3] = unit[1]
    monkeypatch.setattr(suspects_module, "MOST_PAIRS", 1)
    asked: list[tuple[int, int]] = []

    def never(one: int, other: int) -> bool:
        asked.append((one, other))
        return False

    suspects = find_suspects(unit, labels, same_picture=never)
    assert asked == [(1, 3)]  # the nearest
    assert suspects.uncompared > 10


def hard_people(seed: int) -> tuple[Floats, Numbers, Floats]:
    """Forty people, a tenth of whose pictures are profiles: right labels that score low, and shorter embeddings."""
    unit, labels, generator = people([20] * 40, seed=seed)
    hard = np.arange(len(unit)) % 10 == 0
    noise = generator.standard_normal(unit.shape).astype(np.float32)
    mixed = unit + hard[:, None] * 0.3 * noise
    lengths = np.where(hard, 1.0, 2.0) + 0.1 * generator.standard_normal(len(unit))
    return mixed, labels, -lengths[:, None].astype(np.float32)


def test_hard_pictures_with_right_labels_are_no_suspects_and_with_wrong_ones_they_are() -> None:
    called = np.zeros(2, np.int64)
    found = np.zeros(2, np.int64)
    for seed in range(4):
        embeddings, labels, hardness = hard_people(seed)
        wrong, rows = plant_wrong_labels(labels, 0.03, seed)
        for k, known in enumerate((None, hardness)):
            flagged = rows_of(find_suspects(embeddings, wrong, hardness=known))
            called[k] += len({row for row in flagged if row % 10 == 0} - set(rows.tolist()))
            found[k] += len(flagged & set(rows.tolist()))
    assert called[0] >= 15
    assert called[1] <= called[0] / 3
    assert found[1] >= 0.85 * found[0]


def test_what_is_not_known_of_hardness_changes_nothing() -> None:
    unit, labels, _ = people([20] * 40)
    wrong, _ = plant_wrong_labels(labels, 0.05, seed=0)
    expected = doubt(unit, wrong)
    for nothing in (np.full((len(unit), 2), np.nan, np.float32), np.ones((len(unit), 1), np.float32)):
        np.testing.assert_array_equal(doubt(unit, wrong, hardness=nothing).wrong, expected.wrong)


def test_findings_do_not_depend_on_the_block_and_are_the_same_each_time() -> None:
    unit, labels, _ = people([9] * 20, spread=0.1)
    planted, _ = plant_wrong_labels(labels, 0.1, seed=0)
    first = doubt(unit, planted)
    for block in (0, 7):
        np.testing.assert_allclose(doubt(unit, planted, block=block).wrong, first.wrong, atol=1e-4)


def test_tiny_sets_are_survived() -> None:
    unit, labels, _ = people([2, 1])
    assert find_suspects(unit, labels).of("merge") == []
    assert find_suspects(unit, np.full(3, -1)).found == ()
    assert find_suspects(unit, np.zeros(3, np.int64)).of("merge") == []
    sparse = np.array([0, 0, 7])  # labels without a picture between
    assert find_suspects(unit, sparse).of("merge") == []


def test_fractions_must_be_fractions() -> None:
    unit, labels, _ = people([2, 2])
    with pytest.raises(ValueError, match=r"confidence is 0"):
        find_suspects(unit, labels, confidence=0)
    with pytest.raises(ValueError, match=r"plant is 0.7"):
        plant_wrong_labels(labels, 0.7, seed=0)
