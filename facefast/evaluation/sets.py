"""What a finished model is measured on: pairs that were given, what its recipe kept for testing, or random pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from facefast.data import FaceIndex, PairSet, read_bin, read_pair_list
from facefast.data.divide import EvaluationSet, can_be_paired, divide, evaluation_set
from facefast.data.prepare import Locate, check_budget, photographs_of, require_sound
from facefast.data.subsets import which_are_in, with_attributes
from facefast.data.walk import require_there
from facefast.models import FaceModel, checkpoint
from facefast.recipe import DataConfig, EvalConfig, Phase, Reading, Recipe, TaskConfig, from_json


def given_pairs(
    root: str, reading: Reading, *, pairs: Path | None, bin: Path | None, locate: Locate | None = None
) -> EvaluationSet:
    """A published verification set.

    Args:
        root: folder of the photographs that `pairs` names.
        pairs: a list of pairs in any form that `read_pair_list` knows.
        bin: an InsightFace .bin; one of the two.

    Raises:
        ValueError: both or neither, or a file that is not what it should be.
        DataError: more bad pictures than allowed.
    """
    if pairs is not None and bin is None:
        index, found = read_pair_list(root, pairs)
    elif bin is not None and pairs is None:
        index, found = read_bin(bin)
    else:
        raise ValueError("give --pairs or --bin, not both")
    return EvaluationSet(test=None, verification=checked(index, reading, locate), pairs=found, held_out=True)


def checked(index: FaceIndex, reading: Reading, locate: Locate | None = None) -> FaceIndex:
    """An index scanned, all rows of it, whatever is wrong with them, and, by `locate`, faces found.

    Raises:
        DataError: more bad pictures than allowed.
    """
    index = index.scanned(threads=reading.threads, max_pixels=reading.max_pixels)
    check_budget(index, reading.max_bad_fraction)
    require_sound(index)
    if locate is not None:  # a pair counts places in this index: all rows stay
        index = locate(index, reading, faceless=True)
    return index


def find_evaluation_set(
    path: Path,
    model: FaceModel,
    data: DataConfig,
    config: EvalConfig,
    seed: int,
    threads: int,
    typed: frozenset[str] = frozenset(),
    locate: Locate | None = None,
) -> EvaluationSet:
    """What the model's own recipe kept for testing, or else random pairs of all people in `data`.

    Strangers are also asked for the attributes that the model tells, where the photographs have them.

    Args:
        path: MODEL as it was given; its recipe says what was kept for testing.
        config: number of pairs and folds.
        seed: of random pairs.
        typed: options of `data` and `config` that were given, though they may be at their default: data.test_fraction.

    Raises:
        ValueError: no photographs were named.
    """
    if not data.root:
        raise ValueError("evaluate needs photographs: --data.root DIR, or --bin SET")
    require_there(data.root)
    saved = _recipe_of(path)
    trained = _asked_again(saved or Recipe(phases=(Phase(start="scratch"),)), data, config, typed)
    index = photographs_of(trained, trained.data.reading(threads), locate)
    if not _has(index, trained.tasks.attributes):
        trained = dataclasses.replace(trained, tasks=TaskConfig())
    people = _people_of(path, model, saved)
    if saved is not None and (kept := _still_kept(path, people, index, saved, trained)):
        return kept
    known = set(index.class_names) if people is None else set(people) & set(index.class_names)
    if known or trained.binary.active:
        # Divided again by the recipe's seed: the pictures that were kept out then, as long as the classes agree.
        divided = divide(index, trained, _last_phase(trained))
        found = divided.evaluation
        if people in (None, divided.train.class_names) and (found.test is not None or found.verification is not None):
            return found
    everybody = index.select(index.labels >= 0).compact()
    test = _unnamed(index, trained) if trained.tasks.attributes and not known else None
    if test is not None and not can_be_paired(everybody):
        return EvaluationSet(test=test, verification=None, pairs=None, held_out=True)
    pairs = PairSet.random(everybody, config.pairs, config.folds, seed)
    return EvaluationSet(test=test, verification=everybody, pairs=pairs, held_out=not known)


def _people_of(path: Path, model: FaceModel, saved: Recipe | None) -> tuple[str, ...] | None:
    """Names of those whom a model was trained on, in its order; None where that cannot be told."""
    # A model that learns no names, from triplets or attributes alone, has seen people all the same.
    if model.class_names or saved is None or saved.binary.active:
        return model.class_names
    begun = _begun(path)
    return None if begun is None else divide(begun, saved, _last_phase(saved)).train.class_names


def _begun(path: Path) -> FaceIndex | None:
    """The photographs that a run began with; None where they are not known."""
    with contextlib.suppress(ValueError):  # damaged, or of another facefast
        if found := checkpoint.find_begun(path):
            return FaceIndex.load(found)
    return None


def _still_kept(
    path: Path, people: tuple[str, ...] | None, index: FaceIndex, saved: Recipe, trained: Recipe
) -> EvaluationSet | None:
    """What a run kept for testing, as far as it is still there: were other pictures divided again, those that it was
    trained on would come among them. None where its pictures are all there and no others, or another division was
    asked for."""
    here = os.path.realpath(trained.data.root) == os.path.realpath(saved.data.root)
    alike = dataclasses.replace(trained.data, root=saved.data.root, format=saved.data.format) == saved.data
    same = here and alike and trained.eval.split == saved.eval.split
    begun = _begun(path) if same and not trained.binary.active else None
    if begun is None or (np.array_equal(begun.paths, index.paths) and np.array_equal(begun.offsets, index.offsets)):
        return None
    divided = divide(begun, trained, _last_phase(trained))
    kept = divided.evaluation
    test, verification = (
        None if part is None else part.select(which_are_in(part, index)) for part in (kept.test, kept.verification)
    )
    if verification is not None and not can_be_paired(verification):
        verification = None
    found = evaluation_set(test, verification, kept.held_out, trained)
    return None if found.is_empty or people not in (None, divided.train.class_names) else found


def _has(index: FaceIndex, attributes: tuple[str, ...]) -> bool:
    return {name.lower() for name in attributes} <= {name.lower() for name in index.attribute_names}


def _unnamed(index: FaceIndex, trained: Recipe) -> FaceIndex:
    """All rows with the attributes that were learnt, and nobody's names: those stand for no class of the model."""
    index = with_attributes(index, trained.tasks.attributes)
    return dataclasses.replace(index, labels=np.full(len(index), -1, np.int32), class_names=())


def _asked_again(trained: Recipe, data: DataConfig, config: EvalConfig, typed: frozenset[str]) -> Recipe:
    """The recipe that a model was trained with, for an evaluation on `data`.

    How pictures are divided and paired stays, unless `data` or `config` says otherwise. On the photographs that the
    model was trained on, so does what the recipe knows of them: corrections, further folders, the people of binary
    recognition; other photographs have their own.
    """
    merged = dataclasses.replace(trained.data, **_given(data, "data", typed) | {"format": data.format})
    trained = dataclasses.replace(trained, eval=dataclasses.replace(trained.eval, **_given(config, "eval", typed)))
    if os.path.realpath(data.root) == os.path.realpath(trained.data.root):
        return dataclasses.replace(trained, data=merged)
    merged = dataclasses.replace(merged, more=(), corrections=data.corrections, labels=data.labels)
    return Recipe(
        data=merged,
        image=trained.image,
        phases=(_last_phase(trained),),
        eval=trained.eval,
        tasks=trained.tasks,
        seed=trained.seed,
    )


def _given(values: DataConfig | EvalConfig, section: str, typed: frozenset[str]) -> dict[str, Any]:
    """Fields that were given: those that were typed, and those that are not at their default."""
    default = type(values)()
    names = [field.name for field in dataclasses.fields(default)]
    return {
        name: getattr(values, name)
        for name in names
        if f"{section}.{name}" in typed or getattr(values, name) != getattr(default, name)
    }


def _last_phase(trained: Recipe) -> Phase:
    """The last phase without what only training needs: its evaluation is the same."""
    return Phase(name=trained.phases[-1].name, split=trained.phases[-1].split, start="scratch")


def _recipe_of(model: Path) -> Recipe | None:
    """The recipe a model was trained with; None for a source model's weights."""
    saved = checkpoint.read_recipe(model)
    return None if saved is None else from_json(Recipe, saved)
