"""Splits and evaluations: who is trained on, who is asked about, and how many bad files a run puts up with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from facefast.data import FaceIndex, read_index
from facefast.data.divide import LEAST_TO_CHOOSE, LEAST_TO_DIVIDE, divide
from facefast.data.index import FAULTS
from facefast.data.prepare import check_budget, photographs_of, read_photographs
from facefast.recipe import (
    AttributeSpec,
    BinaryConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    LossConfig,
    Phase,
    Photographs,
    Reading,
    Recipe,
    TaskConfig,
)
from facefast.runtime.exits import DataError
from tests.support import small
from tests.support.pictures import make_index

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
    data = divide(people(0, 0, 0, 0), recipe(test_fraction=0.34), PHASE)
    assert data.evaluation.test is not None
    assert names(data.train) == names(data.evaluation.test) and len(names(data.train)) == 4
    assert files(data.train).isdisjoint(files(data.evaluation.test))
    assert (len(data.train), len(data.evaluation.test)) == (16, 8)
    assert data.evaluation.verification is data.evaluation.test and not data.evaluation.held_out
    assert data.train.class_names == data.evaluation.test.class_names  # the same numbers mean the same people


def test_people_of_another_part_are_verified_and_never_trained_on() -> None:
    index = people(0, 1, 2, 2, 0, 1)
    phase = dataclasses.replace(PHASE, split="val")
    data = divide(index, recipe(split="test"), phase)
    assert names(data.train) == {"person 1", "person 5"}
    assert names(data.evaluation.verification) == {"person 2", "person 3"}
    assert data.evaluation.held_out
    assert data.train.num_classes == 2  # numbered anew: the head has no room for others
    assert data.evaluation.pairs is not None and len(data.evaluation.pairs.same) == 20


def test_a_part_of_the_people_is_kept_for_verification_where_the_recipe_says_so() -> None:
    data = divide(people(*[0] * 8), recipe(verify_fraction=0.25), PHASE)
    assert len(names(data.evaluation.verification)) == 2 and len(names(data.train)) == 6
    assert names(data.train).isdisjoint(names(data.evaluation.verification))
    assert data.evaluation.held_out
    again = divide(people(*[0] * 8), recipe(verify_fraction=0.25), PHASE)
    assert files(again.train) == files(data.train)


def test_nobody_is_both_trained_on_and_kept_for_verification() -> None:
    with pytest.raises(ValueError, match=r"2 identities \(first: person 2\) are both in phase train's split 'all'"):
        divide(people(0, 1, 2, 2), recipe(split="test"), PHASE)


def test_a_part_without_people_is_refused() -> None:
    with pytest.raises(ValueError, match="/people has no identities in split 'val'; use --phases.K.split all"):
        divide(people(0, 0), recipe(), dataclasses.replace(PHASE, split="val"))


def test_pictures_of_nobody_in_particular_are_left_out() -> None:
    index = people(0, 0, 0)
    stranger = dataclasses.replace(index, labels=np.where(np.arange(18) == 4, -1, index.labels).astype(np.int32))
    data = divide(stranger, recipe(test_fraction=0.34), PHASE)
    assert b"4.jpg" not in files(data.train) | files(data.evaluation.test)


def test_few_pictures_a_person_make_a_test_set_but_no_pairs() -> None:
    """A folder with four photographs a person trains; one test picture of each has nothing to pair with."""
    data = divide(people(0, 0, 0, pictures=4), recipe(test_fraction=0.2), PHASE)
    assert data.evaluation.test is not None and len(data.evaluation.test) == 3
    assert data.evaluation.verification is None and data.evaluation.pairs is None


def test_without_test_pictures_there_is_no_evaluation() -> None:
    evaluation = divide(people(0, 0), recipe(test_fraction=0.0), PHASE).evaluation
    assert (evaluation.test, evaluation.verification, evaluation.pairs) == (None, None, None)


# What chooses.


def test_validation_pictures_are_in_neither_training_nor_test_and_have_the_same_labels() -> None:
    index = people(*[0] * 16, pictures=12)
    data, without = (divide(index, recipe(validation_fraction=part), PHASE) for part in (0.2, 0.0))
    parts = [data.train, data.validation.test, data.evaluation.test]
    found = [files(part) for part in parts]
    assert set().union(*found) == files(index) and sum(map(len, found)) == len(index)
    for part in parts:
        assert part is not None and part.class_names == data.train.class_names
        assert np.bincount(part.labels, minlength=16).min() > 0  # everybody is in each
    assert len(found[1]) == 16 * 2 >= LEAST_TO_CHOOSE and found[2] == files(
        without.evaluation.test
    )  # which does not move
    assert files(without.train) == found[0] | found[1] and without.validation.test is None
    again = divide(index, recipe(validation_fraction=0.2), PHASE)
    assert files(again.validation.test) == found[1]


def test_the_validation_part_is_other_pictures_with_another_seed() -> None:
    index, wish = people(*[0] * 16, pictures=12), recipe(validation_fraction=0.2)
    one, two = (divide(index, dataclasses.replace(wish, seed=seed), PHASE) for seed in (1, 2))
    assert files(one.validation.test) != files(two.validation.test)


def test_people_with_few_pictures_spare_none_to_choose_by() -> None:
    rich = people(*[0] * 16, pictures=12)
    labels = np.concatenate([rich.labels, np.repeat(np.arange(16, 22), LEAST_TO_DIVIDE)]).astype(np.int32)
    index = make_index("/people", [f"{row}.jpg" for row in range(len(labels))], labels=labels)
    data = divide(index, recipe(validation_fraction=0.2), PHASE)  # of five pictures four are left for training
    assert data.validation.test is not None
    assert set(data.validation.test.labels.tolist()) == set(range(16))
    assert np.bincount(data.train.labels)[16:].tolist() == [LEAST_TO_DIVIDE - 1] * 6


def test_a_validation_part_too_small_to_tell_checkpoints_apart_is_trained_on_instead() -> None:
    """Then training pictures choose, by pairs: a worse judge than others, but a better one than the test part."""
    data = divide(people(0, 0, 0, 0, pictures=12), recipe(test_fraction=0.25), PHASE)
    assert data.validation.test is None and len(data.train) == 4 * 9
    assert data.validation.verification is data.train and not data.validation.held_out
    assert files(data.train).isdisjoint(files(data.evaluation.verification))


def test_people_kept_out_are_halved_only_where_pairs_choose() -> None:
    index = people(*[0] * 20, pictures=12)
    names_choose = divide(index, recipe(verify_fraction=0.4, validation_fraction=0.3), PHASE)
    assert len(names(names_choose.evaluation.verification)) == 8 and names_choose.evaluation.held_out
    assert names_choose.validation.verification is names_choose.validation.test
    assert not names_choose.validation.held_out
    by_pairs = recipe(verify_fraction=0.4, validation_fraction=0.3)
    by_pairs = dataclasses.replace(by_pairs, eval=dataclasses.replace(by_pairs.eval, metric="auc"))
    no_names = dataclasses.replace(PHASE, sampler="pk", loss=LossConfig(weight=0.0, triplet=1.0))
    for data in (
        divide(index, by_pairs, PHASE),
        divide(index, recipe(verify_fraction=0.4, validation_fraction=0.3), no_names),
    ):
        one, other = names(data.validation.verification), names(data.evaluation.verification)
        assert len(one) == len(other) == 4 and one | other == names(names_choose.evaluation.verification)
        assert data.validation.held_out and data.evaluation.held_out and one.isdisjoint(other)
        assert (one | other).isdisjoint(names(data.train))


def test_too_few_people_kept_out_are_all_reported() -> None:
    index = people(*[0] * 8, pictures=12)
    wish = recipe(verify_fraction=0.375)
    data = divide(index, dataclasses.replace(wish, eval=dataclasses.replace(wish.eval, metric="auc")), PHASE)
    assert len(names(data.evaluation.verification)) == 3
    assert data.validation.verification is data.validation.test or data.validation.verification is data.train


def half_named(pictures: int = 6) -> FaceIndex:
    """Three people; of every second picture nobody knows whom it shows."""
    index = people(0, 0, 0, pictures=pictures)
    return dataclasses.replace(index, labels=np.where(np.arange(len(index)) % 2, -1, index.labels).astype(np.int32))


def test_pictures_without_a_name_are_trained_on_where_a_phase_can_use_them() -> None:
    index = half_named()
    plain = divide(index, recipe(test_fraction=0.34), PHASE)
    assert (plain.train.labels >= 0).all()
    for fields in ({"labels": "pseudo"}, {"align": "coral"}, {"distill": DistillConfig(embeddings=1.0)}):
        data = divide(index, recipe(test_fraction=0.34), dataclasses.replace(PHASE, **fields))
        assert files(data.evaluation.test) == files(
            plain.evaluation.test
        )  # the evaluation does not depend on the method
        assert (data.train.labels < 0).sum() == 9
        assert data.facts().num_unlabelled == 9
        assert data.train.class_names == plain.train.class_names
        if "distill" not in fields:  # which a teacher makes useful without them
            with pytest.raises(ValueError, match="has no effect: every training picture has a name"):
                divide(people(0, 0), recipe(), dataclasses.replace(PHASE, **fields))


def test_hidden_names_and_few_shots_touch_training_only() -> None:
    index = people(0, 0, 0, pictures=10)
    whole = divide(index, recipe(), PHASE)
    few = divide(index, recipe(shots=2), PHASE)
    hidden = divide(index, recipe(label_fraction=0.25), PHASE)
    assert files(whole.evaluation.test) == files(few.evaluation.test) == files(hidden.evaluation.test)
    assert (len(whole.train), len(few.train), len(hidden.train)) == (24, 6, 6)
    pseudo = divide(index, recipe(label_fraction=0.25), dataclasses.replace(PHASE, labels="pseudo"))
    assert (len(pseudo.train), (pseudo.train.labels >= 0).sum()) == (24, 6)


def test_phases_that_learn_from_hidden_names_and_those_that_do_not_choose_by_the_same_pictures() -> None:
    index, some = people(*[0] * 20, pictures=20), recipe(label_fraction=0.5, validation_fraction=0.25)
    named, pseudo = (divide(index, some, dataclasses.replace(PHASE, labels=labels)) for labels in ("given", "pseudo"))
    assert len(pseudo.train) > len(named.train) and len(files(named.validation.test)) >= 30
    assert files(named.validation.test) == files(pseudo.validation.test)


def test_attributes_come_with_their_kind_and_pictures_that_know_only_them_are_trained_and_tested() -> None:
    index = half_named(pictures=12)
    ages = np.where(np.arange(36) % 3, 20.0 + np.arange(36) % 5, np.nan)
    values = np.stack([np.arange(36) % 2, ages], axis=1).astype(np.float32)
    index = dataclasses.replace(index, attributes=values, attribute_names=("Male", "age"))
    tasks = TaskConfig(attributes=("age", "male"))
    data = divide(index, dataclasses.replace(recipe(test_fraction=0.5), tasks=tasks), PHASE)
    assert data.attributes == (AttributeSpec("age", (20.0, 21.0, 22.0, 23.0, 24.0)), AttributeSpec("male"))
    assert data.values().shape == (len(data.train), 2)
    for part in (data.train, data.evaluation.test):
        assert part is not None and (part.labels < 0).any() and (part.labels >= 0).any()
    assert files(data.train) | files(data.evaluation.test) == files(index)
    with pytest.raises(ValueError, match="attribute age has 1 different values"):
        constant = dataclasses.replace(index, attributes=np.ones((36, 2), np.float32))
        divide(constant, dataclasses.replace(recipe(), tasks=tasks), PHASE)
    with pytest.raises(ValueError, match="an ordinal one has at most 200 whole numbers"):
        halves = dataclasses.replace(index, attributes=values + 0.5)
        divide(halves, dataclasses.replace(recipe(), tasks=tasks), PHASE)


def test_yes_or_no_tests_strangers_that_training_never_saw(tmp_path: Path) -> None:
    root = small.draw(tmp_path / "drawn")
    loss = dataclasses.replace(PHASE, loss=LossConfig(weight=0.0))
    config = DataConfig(root=str(root), format="celeba", test_fraction=0.5)
    asked = Recipe(data=config, phases=(loss,), binary=BinaryConfig(people=("1",)))
    index = photographs_of(asked, Reading(1))
    data = divide(index, asked, loss)
    assert data.attributes == (AttributeSpec("match"),)
    given = read_index(root, "celeba")
    person = {bytes(path): given.class_names[label] for path, label in zip(given.paths, given.labels, strict=True)}
    test = data.evaluation.test
    for part in (data.train, test):
        assert part is not None and part.attributes is not None
        answers = dict(zip(part.paths.tolist(), part.attributes[:, 0].tolist(), strict=True))
        assert answers == {path: float(person[path] == "1") for path in answers}
        assert set(answers.values()) == {0.0, 1.0}
    strangers = [{person[path] for path in files(part)} - {"1"} for part in (data.train, test)]
    assert strangers[0] and strangers[1] and not strangers[0] & strangers[1]
    with pytest.raises(ValueError, match="binary.people names nobody, who is not among the 4 identities"):
        photographs_of(dataclasses.replace(asked, binary=BinaryConfig(people=("nobody",))), Reading(1))
    faces = dataclasses.replace(asked, binary=BinaryConfig(negatives=str(root)))
    both = photographs_of(faces, Reading(1))
    assert both.attributes is not None
    assert np.bincount(both.attributes[:, 0].astype(int)).tolist() == [16, 16]


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


def test_photographs_of_which_none_can_be_read_are_refused_whatever_the_budget(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/1.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 1 pictures .* can be used \(first: ann/1.jpg, not a picture\)"):
        read_photographs(Photographs(str(tmp_path)), Reading(1, max_bad_fraction=1.0))


def test_pictures_without_names_are_told_how_to_get_them(tmp_path: Path) -> None:
    recipe = Recipe(phases=(Phase(start="scratch"),))
    with pytest.raises(ValueError, match=r"none of the 3 pictures .* has a name to learn; .*key\.cls"):
        divide(FaceIndex.build(tmp_path, [b"1", b"2", b"3"], None, ()), recipe, recipe.phases[0])
