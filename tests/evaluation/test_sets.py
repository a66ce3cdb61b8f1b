"""What a finished model is measured on: a published set, what its recipe kept for testing, or strangers at random."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from facefast.data import FaceIndex, read_index
from facefast.data.corrections import Correction, write_corrections
from facefast.data.divide import EvaluationSet
from facefast.data.drawn import synthetic
from facefast.evaluation.sets import find_evaluation_set, given_pairs
from facefast.models import FaceModel
from facefast.recipe import BinaryConfig, DataConfig, EvalConfig, LossConfig, Phase, Reading, TaskConfig, to_json
from facefast.runtime.exits import DataError
from tests.support import small
from tests.support.pictures import encode, smooth_picture

EVERYTHING = Reading(threads=1, max_bad_fraction=1.0)
CONFIG = EvalConfig(pairs=8, folds=2)


# Published sets.


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Three people in LFW's layout with a pairs.txt, one picture that cannot be decoded."""
    root = small.photographs(tmp_path / "people")
    (tmp_path / "pairs.txt").write_text("ann\t1\t2\nann\t1\tcy\t1\ncy\t2\t3\nbo\t1\tcy\t2\n")
    return root


def test_a_list_of_pairs_is_asked_as_it_is_about_people_never_seen(people: Path) -> None:
    found = given_pairs(str(people), EVERYTHING, pairs=people.parent / "pairs.txt", bin=None)
    assert found.test is None and found.held_out
    assert found.verification is not None and found.pairs is not None
    assert (found.verification.widths > 0).all()  # scanned
    names = [
        tuple(found.verification.name(int(row)).partition("/")[2] for row in pair)
        for pair in zip(found.pairs.left, found.pairs.right, strict=True)
    ]
    assert names[1] == ("ann_0001.png", "cy_0001.png")
    assert found.pairs.same.tolist() == [True, False, True, False]


def test_an_insightface_set_needs_no_folder(tmp_path: Path) -> None:
    pictures = [encode(smooth_picture(small.SIZE, small.SIZE, seed), "PNG") for seed in range(8)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((pictures, [True, True, False, False]), protocol=4))
    found = given_pairs("", EVERYTHING, pairs=None, bin=tmp_path / "lfw.bin")
    assert found.verification is not None and found.pairs is not None
    assert (len(found.verification), found.held_out) == (8, True)
    assert found.pairs.same.tolist() == [True, True, False, False]


def test_one_set_is_asked_for_not_two_and_not_none(people: Path) -> None:
    for pairs, binary in ((Path("pairs.txt"), Path("lfw.bin")), (None, None)):
        with pytest.raises(ValueError, match="give --pairs or --bin, not both"):
            given_pairs(str(people), EVERYTHING, pairs=pairs, bin=binary)


def test_a_set_with_more_bad_pictures_than_allowed_is_no_measure(people: Path) -> None:
    (people / "cy" / "cy_0002.png").write_bytes(b"<html>not found</html>")
    for fraction, fine in ((0.2, True), (0.1, False)):
        reading = Reading(threads=1, max_bad_fraction=fraction)
        if fine:
            given_pairs(str(people), reading, pairs=people.parent / "pairs.txt", bin=None)
            continue
        with pytest.raises(DataError, match="1 of 6 files are bad, above data.max_bad_fraction 0.1"):
            given_pairs(str(people), reading, pairs=people.parent / "pairs.txt", bin=None)


def test_pictures_larger_than_allowed_are_bad_ones_here_too(people: Path) -> None:
    reading = Reading(threads=1, max_bad_fraction=0.5, max_pixels=small.SIZE**2 - 1)
    with pytest.raises(DataError, match="6 of 6 files are bad"):
        given_pairs(str(people), reading, pairs=people.parent / "pairs.txt", bin=None)


# What a model's own recipe kept for testing.


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return small.make_model()


@pytest.fixture(scope="module")
def run(drawn: Path, model: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", model, drawn)


def save_with(folder: Path, model: FaceModel, root: Path, **fields: object) -> Path:
    """A run folder whose recipe has other fields; those of its data by their own names."""
    recipe = small.make_recipe(root, model)
    names = {f.name for f in dataclasses.fields(DataConfig)}
    data = dataclasses.replace(recipe.data, **{k: v for k, v in fields.items() if k in names})  # type: ignore[arg-type]
    rest = {name: value for name, value in fields.items() if name not in names}
    recipe = dataclasses.replace(recipe, data=data, **rest)  # type: ignore[arg-type]
    return small.save_as(folder, model, to_json(recipe))


def asked(path: Path, model: FaceModel, data: DataConfig, seed: int = 0) -> EvaluationSet:
    return find_evaluation_set(path, model, data, CONFIG, seed, threads=1)


def names_of(found: EvaluationSet) -> list[str]:
    """The test pictures' file names."""
    assert found.test is not None
    return [found.test.name(row) for row in range(len(found.test))]


def test_a_model_is_asked_about_the_pictures_that_its_run_kept_for_testing(
    run: Path, model: FaceModel, drawn: Path
) -> None:
    found = asked(run, model, DataConfig(root=str(drawn)))
    index = read_index(drawn)
    _, kept = index.split_per_identity(0.5, seed=7)  # as `make_recipe` has it, not as the defaults have it
    assert names_of(found) == [kept.name(row) for row in range(len(kept))]
    assert found.test is not None and found.test.class_names == small.NAMES
    assert not found.held_out
    assert names_of(asked(run, model, DataConfig(root=str(drawn)), seed=5)) == names_of(found)


def test_a_copy_of_the_photographs_elsewhere_is_divided_alike(
    run: Path, model: FaceModel, drawn: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawn, tmp_path / "copy")
    expected = names_of(asked(run, model, DataConfig(root=str(drawn))))
    assert names_of(asked(run, model, DataConfig(root=str(tmp_path / "copy")))) == expected


def test_pictures_that_left_bring_no_training_picture_into_the_test(
    model: FaceModel, drawn: Path, tmp_path: Path
) -> None:
    run, data = small.save_run(tmp_path / "run", model, drawn), DataConfig(root=str(drawn))
    index = read_index(drawn).scanned(threads=1)
    index.save(run / "index.npz")
    train, kept = index.split_per_identity(0.5, seed=7)
    assert names_of(asked(run, model, data)) == [kept.name(row) for row in range(len(kept))]
    # By their places in what is left other pictures would be kept.
    for gone in ([train.paths[0]], [train.paths[0], kept.paths[3]]):

        def locate(
            index: FaceIndex, reading: Reading, *, faceless: bool = False, gone: list[bytes] = gone
        ) -> FaceIndex:
            return index.select(~np.isin(index.paths, gone))

        found = find_evaluation_set(run, model, data, CONFIG, 0, 1, locate=locate)
        assert names_of(found) == [kept.name(row) for row in range(len(kept)) if kept.paths[row] not in gone]
        assert found.verification is not None and found.pairs is not None and len(found.pairs)
        assert max(found.pairs.left.max(), found.pairs.right.max()) < len(found.verification)


def test_how_pictures_are_divided_can_be_given_anew(run: Path, model: FaceModel, drawn: Path) -> None:
    found = asked(run, model, DataConfig(root=str(drawn), test_fraction=0.25))
    assert len(names_of(found)) == 4


def test_what_was_typed_wins_over_the_run_also_where_it_is_the_default(
    run: Path, model: FaceModel, drawn: Path
) -> None:
    default, config = DataConfig(root=str(drawn)), EvalConfig()
    assert (default.test_fraction, config.folds) == (0.2, 10)  # the run has 0.5 and 2
    found = find_evaluation_set(run, model, default, config, 0, 1, frozenset())
    assert len(names_of(found)) == 8 and found.pairs is not None and found.pairs.folds.max() == 1
    typed = frozenset({"data.test_fraction", "eval.folds"})
    found = find_evaluation_set(run, model, default, config, 0, 1, typed)
    assert len(names_of(found)) == 4
    (one, two) = (
        find_evaluation_set(run, model, DataConfig(root=str(drawn)), EvalConfig(pairs=pairs), 0, 1).pairs
        for pairs in (4, 6000)
    )
    assert (
        one is not None and two is not None and (len(one), len(two)) == (4, 8)
    )  # as given; all there are of the run's 12


def test_what_the_recipe_knows_of_its_photographs_is_heeded_on_them_and_on_no_others(
    model: FaceModel, drawn: Path, tmp_path: Path
) -> None:
    index = read_index(drawn)
    dropped = [index.name(row) for row in np.flatnonzero(index.labels == 0)[:2].tolist()]
    write_corrections(tmp_path / "suspects.csv", [Correction("wrong_label", name, "1", "", "drop") for name in dropped])
    path = save_with(tmp_path / "run", model, drawn, corrections=str(tmp_path / "suspects.csv"))
    own = names_of(asked(path, model, DataConfig(root=str(drawn))))
    assert len(own) == 3 * 2 + 1 and not set(dropped) & set(own)
    shutil.copytree(drawn, tmp_path / "copy")
    other = names_of(asked(path, model, DataConfig(root=str(tmp_path / "copy"))))
    assert len(other) == 4 * 2
    again = DataConfig(root=str(tmp_path / "copy"), corrections=str(tmp_path / "suspects.csv"))
    assert names_of(asked(path, model, again)) == own


def test_the_same_folder_under_another_name_is_the_same_folder(
    model: FaceModel, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = read_index(drawn)
    line = Correction("wrong_label", index.name(0), index.class_names[index.labels[0]], "", "drop")
    write_corrections(tmp_path / "suspects.csv", [line])
    path = save_with(tmp_path / "run", model, drawn, corrections=str(tmp_path / "suspects.csv"))
    expected = names_of(asked(path, model, DataConfig(root=str(drawn))))
    (tmp_path / "link").symlink_to(drawn)
    monkeypatch.chdir(drawn.parent)
    for root in (str(tmp_path / "link"), f"./{drawn.name}", f"{drawn}/../{drawn.name}/"):
        assert names_of(asked(path, model, DataConfig(root=root))) == expected


def test_a_model_is_asked_about_the_part_of_the_people_that_its_last_phase_was_trained_on(
    model: FaceModel, tmp_path: Path
) -> None:
    spec = synthetic.DrawnSpec(identities=(4, 2, 0), pictures=4, seed=3)
    root = synthetic.write(tmp_path / "both", spec, processes=1, progress=False)
    phases = (Phase(name="first", start="scratch", split="val"), Phase(name="last", split="train", trainable=("head",)))
    found = asked(save_with(tmp_path / "run", model, root, phases=phases), model, DataConfig(root=str(root)))
    assert found.test is not None and found.test.class_names == small.NAMES
    assert len(found.test) == 8


# Strangers, and people half known.


def test_strangers_are_asked_about_in_random_pairs_of_everybody(run: Path, model: FaceModel, people: Path) -> None:
    found = asked(run, model, DataConfig(root=str(people)))
    assert found.test is None and found.held_out
    assert found.verification is not None and found.pairs is not None
    assert (len(found.verification), len(found.pairs)) == (9, 8)
    other = asked(run, model, DataConfig(root=str(people)), seed=1)
    again = asked(run, model, DataConfig(root=str(people)))
    assert other.pairs is not None and again.pairs is not None
    np.testing.assert_array_equal(found.pairs.left, again.pairs.left)
    assert (found.pairs.left != other.pairs.left).any()


def test_one_known_face_among_the_strangers_makes_them_no_people_never_seen(people: Path, tmp_path: Path) -> None:
    model = small.make_model(classes=("ann", "dan"))
    found = asked(small.save_run(tmp_path / "run", model, people), model, DataConfig(root=str(people)))
    assert found.test is None and not found.held_out
    assert found.verification is not None and len(found.verification) == 9


def test_pictures_of_nobody_are_in_no_pair(run: Path, model: FaceModel, people: Path) -> None:
    shutil.copy(people / "ann" / "ann_0001.png", people / "loose.png")
    found = asked(run, model, DataConfig(root=str(people), format="folder"))
    assert found.verification is not None and len(found.verification) == 9
    assert found.verification.labels.min() == 0


def test_weights_without_a_recipe_are_asked_about_everybody(drawn: Path, model: FaceModel, tmp_path: Path) -> None:
    weights = tmp_path / "weights.ckpt"
    weights.touch()
    found = asked(weights, small.make_model(classes=()), DataConfig(root=str(drawn)))
    assert found.test is None and found.held_out
    assert found.verification is not None and len(found.verification) == 16


def test_a_model_that_tells_attributes_is_asked_for_its_own_in_its_own_order(
    model: FaceModel, drawn: Path, tmp_path: Path
) -> None:
    path = save_with(tmp_path / "run", model, drawn, tasks=TaskConfig(attributes=("Smiling", "Bangs")))
    found = asked(path, model, DataConfig(root=str(drawn)))
    assert found.test is not None and found.test.attribute_names == ("Smiling", "Bangs")
    index = read_index(drawn)
    assert index.attributes is not None and found.test.attributes is not None
    rows = {index.name(row): row for row in range(len(index))}
    chosen = [rows[name] for name in names_of(found)]
    column = index.attribute_names.index("Smiling")
    np.testing.assert_array_equal(found.test.attributes[:, 0], index.attributes[chosen, column])


def nameless_run(folder: Path, root: Path, **fields: object) -> Path:
    """A run from which a model without names came, with the index that it began with."""
    fields = {"phases": (Phase(start="scratch", sampler="pk", loss=LossConfig(weight=0.0, triplet=1.0)),)} | fields
    path = save_with(folder, small.make_model(classes=()), root, **fields)
    read_index(root).scanned().sound().save(path / "index.npz")
    return path


def test_a_model_without_names_is_not_asked_about_pictures_that_it_learnt_from(drawn: Path, tmp_path: Path) -> None:
    model, path = small.make_model(classes=()), nameless_run(tmp_path / "run", drawn)
    _, kept = read_index(drawn).split_per_identity(0.5, seed=7)
    expected = [kept.name(row) for row in range(len(kept))]
    shutil.copytree(drawn, tmp_path / "copy")
    for root in (drawn, tmp_path / "copy"):
        found = asked(path, model, DataConfig(root=str(root)))
        assert names_of(found) == expected and not found.held_out
        assert found.verification is found.test
    (path / "index.npz").unlink()  # as of an exported package: who was in it cannot be told
    found = asked(path, model, DataConfig(root=str(tmp_path / "copy")))
    assert names_of(found) == expected and not found.held_out


def test_a_model_without_names_is_asked_about_people_that_were_kept_from_it(tmp_path: Path) -> None:
    root = synthetic.write(
        tmp_path / "people", synthetic.DrawnSpec(identities=(6, 0, 0), pictures=4, seed=3), processes=1, progress=False
    )
    path = nameless_run(tmp_path / "run", root, verify_fraction=0.5, test_fraction=0.0)
    found = asked(path, small.make_model(classes=()), DataConfig(root=str(root)))
    assert found.test is None and found.held_out
    assert found.verification is not None and len(set(found.verification.labels.tolist())) == 3


def test_a_model_without_names_is_asked_about_all_strangers(drawn: Path, people: Path, tmp_path: Path) -> None:
    path = nameless_run(tmp_path / "run", drawn)
    found = asked(path, small.make_model(classes=()), DataConfig(root=str(people)))
    assert found.test is None and found.held_out
    assert found.verification is not None and len(found.verification) == 9


def test_a_model_of_attributes_alone_is_asked_for_them(drawn: Path, people: Path, tmp_path: Path) -> None:
    model = small.make_model(classes=())
    phases = (Phase(start="scratch", loss=LossConfig(weight=0.0)),)
    path = nameless_run(tmp_path / "run", drawn, phases=phases, tasks=TaskConfig(attributes=("Smiling",)))
    found = asked(path, model, DataConfig(root=str(drawn)))
    assert found.test is not None and found.test.attribute_names == ("Smiling",) and len(found.test) == 8
    assert not found.held_out
    other = synthetic.DrawnSpec(identities=(0, 3, 0), pictures=4, seed=9)
    root = synthetic.write(tmp_path / "others", other, processes=1, progress=False)
    (root / "identity_CelebA.txt").write_text(
        "".join(f"{k + 1:06d}.jpg {90 + k // 4}\n" for k in range(12))  # names that nobody else has
    )
    found = asked(path, model, DataConfig(root=str(root)))
    assert found.test is not None and found.test.attribute_names == ("Smiling",) and len(found.test) == 12
    assert found.test.labels.max() == -1 and found.held_out and found.verification is not None
    found = asked(path, model, DataConfig(root=str(people)))  # which have no such attribute
    assert found.test is None and found.verification is not None


def test_a_model_of_one_person_is_asked_about_its_own_strangers(drawn: Path, tmp_path: Path) -> None:
    model = small.make_model(classes=())
    nameless = Phase(start="scratch", loss=LossConfig(weight=0.0))
    path = save_with(tmp_path / "run", model, drawn, phases=(nameless,), binary=BinaryConfig(people=("1",)))
    found = asked(path, model, DataConfig(root=str(drawn)))
    assert found.test is not None and found.test.attributes is not None
    assert found.test.attribute_names == ("match",)
    assert set(found.test.attributes[:, 0].tolist()) == {0.0, 1.0}
    assert found.verification is None


def test_photographs_must_be_named(run: Path, model: FaceModel) -> None:
    with pytest.raises(ValueError, match="evaluate needs photographs: --data.root DIR, or --bin SET"):
        asked(run, model, DataConfig())


def test_a_set_that_gives_no_pair_is_refused(run: Path, model: FaceModel, tmp_path: Path) -> None:
    for name in ("ann", "bo"):
        (tmp_path / "people" / name).mkdir(parents=True)
        (tmp_path / "people" / name / "1.png").write_bytes(encode(smooth_picture(40, 40, len(name)), "PNG"))
    with pytest.raises(ValueError, match="8 pairs cannot be drawn from 2 pictures of 2 identities"):
        asked(run, model, DataConfig(root=str(tmp_path / "people")))
