"""evaluation.json: whom a model confuses, how sure it was, which groups it serves worse; of bounded size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from facefast.data.divide import EvaluationSet, PhaseData
from facefast.evaluation import findings
from facefast.evaluation.measure import Answers
from facefast.runtime import files
from tests.support.reported import asked_of, index_of, phase_data

NAMES = ("ann", "bo", "cy")


def answered(labels: list[int], predicted: list[int], sure: list[float]) -> Answers:
    right = np.array(labels) == np.array(predicted)
    ranks = np.where(right, 0, 2)
    return Answers(np.arange(len(labels)), np.array(labels), ranks, np.array(predicted), np.array(sure), 1.0)


def test_people_come_worst_first_with_whom_they_are_taken_for_and_what_was_learnt_from(tmp_path: Path) -> None:
    test, train = index_of(tmp_path, NAMES, 2), index_of(tmp_path, NAMES, 3)
    found = findings.closed_set(
        answered([0, 0, 1, 1, 2, 2], [0, 0, 2, 2, 1, 2], [0.9, 0.8, 0.7, 0.6, 0.5, 0.95]), test, train
    )
    assert (found["pictures"], found["people"], found["wrong_pictures"]) == (6, 3, 3)
    assert [(row["name"], row["right"], row["taken_for"]) for row in found["worst_people"]] == [
        ("bo", 0, "cy"),
        ("cy", 1, "bo"),
        ("ann", 2, None),
    ]
    assert [row["learnt_from"] for row in found["worst_people"]] == [3, 3, 3]
    assert [(row["name"], row["taken_for"], row["pictures"], row["of"]) for row in found["confusions"]] == [
        ("bo", "cy", 2, 2),
        ("cy", "bo", 1, 2),
    ]
    assert found["confusions"][0]["picture"] == "1/0.jpg" and found["confusions"][0]["example"] == "2/0.jpg"
    assert [(row["picture"], row["rank"]) for row in found["wrong"]] == [("1/0.jpg", 3), ("1/1.jpg", 3), ("2/0.jpg", 3)]
    assert found["cmc"] == [0.5, 0.5, 1.0]
    assert (found["accuracies"][0], found["accuracies"][50], found["accuracies"][-1]) == (0.0, 0.5, 1.0)


def test_an_answer_that_no_rank_knows_is_nobody(tmp_path: Path) -> None:
    index = index_of(tmp_path, NAMES, 1)
    found = findings.closed_set(answered([0, 1, 2], [0, -1, 2], [0.9, 0.6, 0.9]), index, index)
    assert not found["confusions"]
    (wrong,) = found["wrong"]
    assert wrong["taken_for"] is None and wrong["example"] is None


def test_bins_of_the_reliability_diagram_hold_every_picture_once_and_give_the_calibration_error(tmp_path: Path) -> None:
    data = phase_data(tmp_path, NAMES, pictures=40)
    answers = asked_of(data).answers
    assert answers is not None and data.evaluation.test is not None
    found = findings.closed_set(answers, data.evaluation.test, data.train)
    bins = found["reliability"]
    assert sum(row["pictures"] for row in bins) == 120
    gaps = sum(row["pictures"] * abs(row["probability"] - row["accuracy"]) for row in bins) / 120
    assert gaps == pytest.approx(found["ece"])
    assert all(row["from"] < row["probability"] <= row["to"] for row in bins)
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in bins)


def test_groups_are_thirds_of_what_was_learnt_from_and_attributes_the_widest_gap_first(tmp_path: Path) -> None:
    names = tuple(f"p{k}" for k in range(6))
    test = index_of(tmp_path, names, 4, attribute=True)  # odd people have it
    train = index_of(tmp_path, names, 6).select(np.array([k for k in range(36) if k % 6 <= k // 6]))  # 1 to 6 pictures
    labels = test.labels.tolist()
    predicted = [label if label % 2 or k % 4 else (label + 1) % 6 for k, label in enumerate(labels)]
    groups = findings.closed_set(answered(labels, predicted, [0.5] * 24), test, train)["groups"]
    assert [(row["column"], row["group"]) for row in groups] == [
        ("p0", "no"),
        ("p0", "yes"),
        ("training pictures of the person", "1 to 2"),
        ("training pictures of the person", "3 to 4"),
        ("training pictures of the person", "5 to 6"),
    ]
    assert [row["accuracy"] for row in groups[:2]] == [0.75, 1.0]
    assert all(row["interval"][0] < row["accuracy"] <= row["interval"][1] and row["people"] <= 3 for row in groups)


def test_pairs_have_a_histogram_of_all_of_them_curves_thresholds_and_the_hardest(tmp_path: Path) -> None:
    data = phase_data(tmp_path, NAMES, pictures=30, pairs=1000)
    found = findings.document(asked_of(data), data, {})["verification"]
    assert sum(row["same"] for row in found["histogram"]) == found["same_pairs"] == 500
    assert sum(row["different"] for row in found["histogram"]) == 500
    assert found["curve"][0]["fmr"] <= found["curve"][-1]["fmr"] == 1.0
    assert [row["fmr"] for row in found["thresholds"]] == [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    assert found["thresholds"][0]["threshold"] is not None and found["thresholds"][1]["why"]
    hard = [row["cosine"] for row in found["hardest"]["one_person"]]
    assert hard == sorted(hard) and len(hard) == findings.MOST_HARD
    assert {row["group"] for row in found["groups"]} == {"no", "yes"} and found["groups"][0]["threshold_fmr"] == 1e-2


def test_ten_times_the_people_make_hardly_a_larger_file(tmp_path: Path) -> None:
    sizes = []
    for count in (500, 5000):
        data = phase_data(tmp_path, tuple(f"person {k:05}" for k in range(count)))
        sizes.append(len(json.dumps(files.strict(findings.document(asked_of(data), data, {})))))
    assert sizes[1] < 1.2 * sizes[0]


def test_where_nobody_is_named_and_nothing_is_compared_there_is_no_such_part(tmp_path: Path) -> None:
    index = index_of(tmp_path, NAMES, 2)
    nothing = EvaluationSet(None, None, None, held_out=False)
    data = PhaseData(index, nothing, EvaluationSet(index, None, None, held_out=False))
    found = findings.document(findings.Asked(None, None, None), data, {"empty": 2})
    assert found["closed_set"] is None and found["verification"] is None
    assert found["photographs"]["left_out"] == {"empty": 2} and found["photographs"]["pairs"] is None
    assert found["photographs"]["parts"]["training"] == {"pictures": 6, "people": 3, "nameless": 0}
    assert sum(row["people"] for row in found["photographs"]["pictures_per_person"]) == 3


def test_precision_and_recall_are_of_names_and_of_pairs_with_scores_from_0_to_1(tmp_path: Path) -> None:
    data = phase_data(tmp_path, NAMES, pictures=10)
    asked = asked_of(data)
    found = findings.top_scores(asked, data)
    assert set(found) == {"names", "pairs"}
    for right, scores in found.values():
        assert len(right) == len(scores) and 0 <= scores.min() <= scores.max() <= 1
    broken = asked._replace(seen=torch.zeros(30, dtype=torch.bool))
    assert set(findings.top_scores(broken, data)) == {"names"}
