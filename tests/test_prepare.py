"""Splits and exams: who is trained on, who is asked about, and how many bad files a run puts up with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pictures import make_index

from facefast.data import FaceIndex
from facefast.data.index import FAULTS
from facefast.prepare import check_budget, divide
from facefast.recipe import DataConfig, EvalConfig, Phase, Recipe
from facefast.runtime import DataError

PHASE = Phase(start="scratch")


def people(*splits: int, pictures: int = 6) -> FaceIndex:
    """One person per entry, with six pictures each, in that part of the data set's own partition."""
    labels = np.repeat(np.arange(len(splits), dtype=np.int32), pictures)
    index = make_index("/people", [f"{row}.jpg" for row in range(len(labels))], labels=labels)
    return dataclasses.replace(index, splits=np.repeat(np.array(splits, np.uint8), pictures))


def recipe(**fields: object) -> Recipe:
    config = EvalConfig(pairs=20, folds=2, split=fields.pop("split", "none"))  # type: ignore[arg-type]
    return Recipe(data=DataConfig(**fields), eval=config, phases=(PHASE,))  # type: ignore[arg-type]


def names(index: FaceIndex | None) -> set[str]:
    assert index is not None
    return {index.class_names[label] for label in index.labels}


def files(index: FaceIndex | None) -> set[bytes]:
    assert index is not None
    return set(index.paths.tolist())


def test_everybody_is_trained_on_and_asked_about_with_other_pictures() -> None:
    stage = divide(people(0, 0, 0, 0), recipe(test_fraction=0.34), PHASE)
    assert stage.exam.test is not None
    assert names(stage.train) == names(stage.exam.test) and len(names(stage.train)) == 4
    assert files(stage.train).isdisjoint(files(stage.exam.test))
    assert (len(stage.train), len(stage.exam.test)) == (16, 8)
    assert stage.exam.verification is stage.exam.test and not stage.exam.held_out
    assert stage.train.class_names == stage.exam.test.class_names  # the same numbers mean the same people


def test_people_of_another_part_are_verified_and_never_trained_on() -> None:
    index = people(0, 1, 2, 2, 0, 1)
    phase = dataclasses.replace(PHASE, split="val")
    stage = divide(index, recipe(split="test"), phase)
    assert names(stage.train) == {"person 1", "person 5"}
    assert names(stage.exam.verification) == {"person 2", "person 3"}
    assert stage.exam.held_out
    assert stage.train.num_classes == 2  # numbered anew: the head has no room for others
    assert stage.exam.pairs is not None and len(stage.exam.pairs.same) == 20


def test_a_part_of_the_people_is_kept_for_verification_where_the_recipe_says_so() -> None:
    stage = divide(people(*[0] * 8), recipe(verify_fraction=0.25), PHASE)
    assert len(names(stage.exam.verification)) == 2 and len(names(stage.train)) == 6
    assert names(stage.train).isdisjoint(names(stage.exam.verification))
    assert stage.exam.held_out
    again = divide(people(*[0] * 8), recipe(verify_fraction=0.25), PHASE)
    assert files(again.train) == files(stage.train)


def test_nobody_is_both_trained_on_and_kept_for_verification() -> None:
    with pytest.raises(ValueError, match=r"2 identities \(first: person 2\) are both in phase train's split 'all'"):
        divide(people(0, 1, 2, 2), recipe(split="test"), PHASE)


def test_a_part_without_people_is_refused() -> None:
    with pytest.raises(ValueError, match="/people has no identities in split 'val'; use --phases.K.split all"):
        divide(people(0, 0), recipe(), dataclasses.replace(PHASE, split="val"))


def test_pictures_of_nobody_in_particular_are_left_out() -> None:
    index = people(0, 0, 0)
    stranger = dataclasses.replace(index, labels=np.where(np.arange(18) == 4, -1, index.labels).astype(np.int32))
    stage = divide(stranger, recipe(test_fraction=0.34), PHASE)
    assert b"4.jpg" not in files(stage.train) | files(stage.exam.test)


def test_few_pictures_a_person_make_a_test_set_but_no_pairs() -> None:
    """A folder with four photographs a person trains; one test picture of each has nothing to pair with."""
    stage = divide(people(0, 0, 0, pictures=4), recipe(test_fraction=0.2), PHASE)
    assert stage.exam.test is not None and len(stage.exam.test) == 3
    assert stage.exam.verification is None and stage.exam.pairs is None


def test_without_test_pictures_there_is_no_exam() -> None:
    exam = divide(people(0, 0), recipe(test_fraction=0.0), PHASE).exam
    assert (exam.test, exam.verification, exam.pairs) == (None, None, None)


@pytest.mark.parametrize(("bad", "allowed"), [(0, 0.0), (2, 0.1), (20, 1.0)])
def test_as_many_bad_files_as_the_budget_allows_stop_nothing(bad: int, allowed: float) -> None:
    check_budget(make_bad(bad), allowed)


def test_one_bad_file_more_stops_the_run_and_names_ten() -> None:
    with pytest.raises(DataError) as stopped:
        check_budget(make_bad(12), 0.59)
    text = str(stopped.value)
    assert "12 of 20 files are bad, above data.max_bad_fraction 0.59" in text
    assert text.count(f": {FAULTS[1]}") == 10
    assert "/people/9.jpg" in text and "/people/10.jpg" not in text
    assert "facefast.index /people" in text


def make_bad(bad: int) -> FaceIndex:
    return make_index("/people", [f"{row}.jpg" for row in range(20)], faults=(np.arange(20) < bad).astype(np.uint8))
