"""What a finished model is measured on: pairs that were given, what its recipe kept for testing, or random pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from facefast.data import PairSet, read_bin, read_lfw
from facefast.data.prepare import EvaluationSet, Locate, check_budget, divide, photographs_of, require_sound
from facefast.models import FaceModel, checkpoint
from facefast.recipe import DataConfig, EvalConfig, Phase, Reading, Recipe, from_json


def given_pairs(
    root: str, reading: Reading, *, pairs: Path | None, bin: Path | None, locate: Locate | None = None
) -> EvaluationSet:
    """A published verification set.

    Args:
        root: folder of the photographs that `pairs` names.
        pairs: LFW's pairs.txt.
        bin: an InsightFace .bin; one of the two.

    Raises:
        ValueError: both or neither, or a file that is not what it should be.
        DataError: more bad pictures than allowed.
    """
    if pairs is not None and bin is None:
        index, found = read_lfw(root, pairs)
    elif bin is not None and pairs is None:
        index, found = read_bin(bin)
    else:
        raise ValueError("give --pairs or --bin, not both")
    index = index.scanned(threads=reading.threads, max_pixels=reading.max_pixels)
    check_budget(index, reading.max_bad_fraction)
    require_sound(index)
    if locate is not None:  # a pair counts places in this index: all rows stay
        index = locate(index, reading, faceless=True)
    return EvaluationSet(test=None, verification=index, pairs=found, held_out=True)


def find_evaluation_set(
    path: Path,
    model: FaceModel,
    data: DataConfig,
    config: EvalConfig,
    seed: int,
    threads: int,
    locate: Locate | None = None,
) -> EvaluationSet:
    """What the model's own recipe kept for testing, or else random pairs of all people in `data`.

    Args:
        path: MODEL as it was given; its recipe says what was kept for testing.
        config: number of pairs and folds.
        seed: of random pairs.

    Raises:
        ValueError: no photographs were named.
    """
    if not data.root:
        raise ValueError("evaluate needs photographs: --data.root DIR, or --bin SET")
    trained = _asked_again(_recipe_of(path), data)
    index = photographs_of(trained, trained.data.reading(threads), locate)
    known = set(model.class_names) & set(index.class_names)
    if known or trained.learns_attributes:
        # Divided again by the recipe's seed: the pictures that were kept out then, as long as the classes agree.
        evaluation_set = divide(index, trained, _last_phase(trained)).evaluation
        if evaluation_set.test is not None and evaluation_set.test.class_names == model.class_names:
            return evaluation_set
    everybody = index.select(index.labels >= 0).compact()
    pairs = PairSet.random(everybody, config.pairs, config.folds, seed)
    return EvaluationSet(test=None, verification=everybody, pairs=pairs, held_out=not known)


def _asked_again(trained: Recipe, data: DataConfig) -> Recipe:
    """The recipe that a model was trained with, for an evaluation on `data`.

    How pictures are divided stays, unless `data` says otherwise. On the photographs that the model was trained on, so
    does what the recipe knows of them: corrections, further folders, attributes, the people of binary recognition;
    other photographs have their own.
    """
    default = DataConfig()
    # A field that is at its default was not given: how to read and divide is then the recipe's.
    names = [f.name for f in dataclasses.fields(default)]
    given = {name: getattr(data, name) for name in names if getattr(data, name) != getattr(default, name)}
    merged = dataclasses.replace(trained.data, **given | {"format": data.format})
    if Path(data.root).resolve() == Path(trained.data.root).resolve():
        return dataclasses.replace(trained, data=merged)
    merged = dataclasses.replace(merged, more=(), corrections=data.corrections, labels=data.labels)
    return Recipe(
        data=merged, image=trained.image, phases=(_last_phase(trained),), eval=trained.eval, seed=trained.seed
    )


def _last_phase(trained: Recipe) -> Phase:
    """The last phase without what only training needs: its evaluation is the same."""
    return Phase(name=trained.phases[-1].name, split=trained.phases[-1].split, start="scratch")


def _recipe_of(model: Path) -> Recipe:
    """The recipe a model was trained with; a plain one for a source model's weights."""
    saved = checkpoint.read_recipe(model)
    return Recipe(phases=(Phase(start="scratch"),)) if saved is None else from_json(Recipe, saved)
