"""Who is trained on, who is asked to choose by, and who is asked for the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from facefast.data.index import SPLITS, FaceIndex, PairSet
from facefast.data.subsets import joined, with_attributes, with_hidden_labels, with_shots
from facefast.recipe import AttributeSpec, IndexFacts, Phase, Recipe

YES = "match"
"""The attribute that binary recognition learns."""
MOST_LEVELS = 200
"""Of an ordinal attribute."""
LEAST_TO_DIVIDE = 5
"""Training pictures of a person from which one can be spared to choose by."""
LEAST_TO_CHOOSE = 30
"""Pictures that tell one checkpoint from another; fewer are better trained on."""


@dataclass(frozen=True)
class EvaluationSet:
    """What a model is measured on: pictures of known identities to name, with attributes, and pairs to verify."""

    test: FaceIndex | None
    """Labels are the model's classes."""
    verification: FaceIndex | None
    pairs: PairSet | None
    held_out: bool
    """Whether the verified identities were kept out of training."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to measure on."""
        return self.test is None and self.verification is None


@dataclass(frozen=True)
class PhaseData:
    """One phase's data: labels of `train`, `validation.test` and `evaluation.test` are the phase's classes."""

    train: FaceIndex
    validation: EvaluationSet
    """What chooses: the checkpoint, the temperature, the thresholds. It is taken out of training."""
    evaluation: EvaluationSet
    """What is reported: the test part, which nothing is chosen by."""
    attributes: tuple[AttributeSpec, ...] = ()
    """What is learnt beside identities: columns of `train.attributes`."""
    unnamed: FaceIndex | None = None
    """Pictures without a name, for what needs none; those that are trained on are in `train`."""

    def facts(self) -> IndexFacts:
        """What the plan needs."""
        return self.train.facts()

    def labels(self) -> Tensor:
        """[N] int64 labels of the training rows, -1 where there is none."""
        return torch.tensor(self.train.labels, dtype=torch.long)

    def values(self) -> Tensor:
        """[N, A] float32 values of the attributes that are learnt, NaN where unknown."""
        if not self.attributes:
            return torch.zeros(len(self.train), 0)
        return torch.tensor(self.train.attributes)


def divide(index: FaceIndex, recipe: Recipe, phase: Phase) -> PhaseData:
    """Splits an index of `read_photographs` as one phase wants it.

    Raises:
        ValueError: a split without identities, identities both trained on and kept for verification, or an attribute
            that the photographs do not have.
    """
    names = (YES,) if recipe.binary.active else recipe.tasks.attributes
    if names:
        index = with_attributes(index, names)
    specs = tuple(_attribute(index, k) for k in range(len(names)))
    if recipe.binary.active:
        return PhaseData(*_divide_yes_and_no(index), specs)
    unlabelled = index.select(index.labels < 0)
    people = _part(index, phase.split)
    # People for verification, the first that applies: a part of the data set's own partition; some identities taken
    # out of training; the test pictures of known identities, which is the easier question and is called so.
    verification, held_out = None, True
    if recipe.eval.split != "none":
        verification = _part(index, recipe.eval.split)
        shared = set(people.class_names) & set(verification.class_names)
        if shared:
            raise ValueError(
                f"{len(shared)} identities (first: {min(shared)}) are both in phase {phase.name}'s split "
                f"{phase.split!r} and in eval.split {recipe.eval.split!r}; verification needs people it never saw"
            )
    elif recipe.data.verify_fraction:
        people, verification = people.split_identities(recipe.data.verify_fraction, recipe.seed)
        people = people.compact()
    train, test = people.split_per_identity(recipe.data.test_fraction, recipe.seed)
    if verification is None and can_be_paired(test):
        verification, held_out = test, False
    train, test = _with_unlabelled(train, test, unlabelled, recipe, phase)
    train, validation = _to_choose_by(train, recipe)
    choosing, choosing_held_out = (validation, False) if can_be_paired(validation) else (None, False)
    # Names choose where they can; where verification has to, it is that of people never seen, if some were kept out.
    if not len(validation) or not phase.loss.weight or recipe.eval.chooses_by_pairs:
        if verification is not None and held_out and (halves := _halves(verification, recipe.seed)):
            (choosing, verification), choosing_held_out = halves, True
        elif choosing is None and can_be_paired(train):
            choosing = train
    return PhaseData(
        train=train,
        validation=evaluation_set(validation, choosing, choosing_held_out, recipe),
        evaluation=evaluation_set(test, verification, held_out, recipe),
        attributes=specs,
        unnamed=unlabelled if phase.adapt.active and len(unlabelled) and not phase.uses_unnamed else None,
    )


def evaluation_set(test: FaceIndex | None, verified: FaceIndex | None, held_out: bool, recipe: Recipe) -> EvaluationSet:
    """A set to measure on, with the recipe's pairs of `verified`, whose identities are those kept out of training where
    `held_out` says so."""
    pairs = None if verified is None else PairSet.random(verified, recipe.eval.pairs, recipe.eval.folds, recipe.seed)
    return EvaluationSet(test=test or None, verification=verified, pairs=pairs, held_out=held_out)


def _to_choose_by(train: FaceIndex, recipe: Recipe) -> tuple[FaceIndex, FaceIndex]:
    """(train, validation): pictures taken out of training, none where people have too few to spare.

    Of pictures without a name, a part is taken where there are attributes to learn.
    """
    fraction, generator = recipe.data.validation_fraction, np.random.Generator(np.random.Philox(recipe.seed + 1))
    named = train.labels >= 0
    counts = np.bincount(train.labels[named], minlength=train.num_classes)[train.labels]
    # Another order than that of the test part, whose neighbours are no random pictures.
    wanted = np.where(counts >= LEAST_TO_DIVIDE, np.maximum(np.rint(counts * fraction), fraction > 0), 0)
    # The same ones in a phase that leaves the rows without a name out as in one that learns from them.
    places = np.zeros(len(train), np.int64)
    places[named] = train.select(named).random_places(recipe.seed + 1)
    chosen = named & (places < wanted)
    if recipe.learns_attributes:
        chosen |= ~named & (generator.random(len(train)) < fraction)
    if chosen.sum() < LEAST_TO_CHOOSE:
        chosen[:] = False
    return train.select(~chosen), train.select(chosen)


def _halves(people: FaceIndex, seed: int) -> tuple[FaceIndex, FaceIndex] | None:
    """People kept out of training in two parts, to choose by and to report; None where they are too few."""
    if len(np.unique(people.labels)) < 4:
        return None
    parts = people.split_identities(0.5, seed)
    return parts if all(map(can_be_paired, parts)) else None


def _with_unlabelled(
    train: FaceIndex, test: FaceIndex, unlabelled: FaceIndex, recipe: Recipe, phase: Phase
) -> tuple[FaceIndex, FaceIndex]:
    """Training and test rows with the pictures without a name that the phase learns from; fewer names where the recipe
    hides some."""
    # Names and pictures are taken from training alone: results stay comparable with those on the whole set.
    if recipe.data.shots:
        train = with_shots(train, recipe.data.shots, recipe.seed)
    if recipe.data.label_fraction < 1:
        train = with_hidden_labels(train, recipe.data.label_fraction, recipe.seed)
    if recipe.learns_attributes and len(unlabelled):
        unlabelled, asked = at_random(unlabelled, recipe.data.test_fraction, recipe.seed)
        test = _chained(test, asked)
    if phase.uses_unnamed or recipe.learns_attributes:
        train = _chained(train, unlabelled)
        if phase.labels == "pseudo" or phase.align != "none":
            _require_unlabelled(train, phase)
        return train, test
    return train.select(train.labels >= 0), test


def _require_unlabelled(train: FaceIndex, phase: Phase) -> None:
    if (train.labels >= 0).all():
        wish = "labels pseudo" if phase.labels == "pseudo" else f"align {phase.align}"
        raise ValueError(
            f"phase {phase.name}: {wish} has no effect: every training picture has a name; add pictures without one "
            "with data.more, or hide names with data.label_fraction"
        )


def _chained(first: FaceIndex, second: FaceIndex) -> FaceIndex:
    """The rows of two selections of one index; the classes are those of the first, the second has none."""
    return dataclasses.replace(joined(first, [second]), class_names=first.class_names) if len(second) else first


def at_random(index: FaceIndex, fraction: float, seed: int) -> tuple[FaceIndex, FaceIndex]:
    chosen = np.random.Generator(np.random.Philox(seed)).random(len(index)) < fraction
    return index.select(~chosen), index.select(chosen)


def _attribute(index: FaceIndex, column: int) -> AttributeSpec:
    """Yes or no where the values are 0 and 1, else ordinal."""
    name = index.attribute_names[column]
    assert index.attributes is not None
    values = index.attributes[:, column]
    levels = np.unique(values[~np.isnan(values)])
    if len(levels) < 2:
        raise ValueError(f"attribute {name} has {len(levels)} different values in the photographs; 2 are needed")
    if set(levels.tolist()) == {0.0, 1.0}:
        return AttributeSpec(name)
    if len(levels) > MOST_LEVELS or not np.array_equal(levels, np.rint(levels)):
        raise ValueError(
            f"attribute {name} has {len(levels)} values from {levels[0]:g} to {levels[-1]:g}; an ordinal one has at "
            f"most {MOST_LEVELS} whole numbers"
        )
    return AttributeSpec(name, tuple(levels.tolist()))


def _divide_yes_and_no(index: FaceIndex) -> tuple[FaceIndex, EvaluationSet, EvaluationSet]:
    """Training rows and the evaluations of binary recognition, as `_with_yes_and_no` has divided them."""
    train, *asked = (index.select(index.splits == SPLITS.index(name)) for name in ("train", "val", "test"))
    sets = [EvaluationSet(part if len(part) else None, verification=None, pairs=None, held_out=False) for part in asked]
    return train, sets[0], sets[1]


def can_be_paired(index: FaceIndex) -> bool:
    """Whether there are two pictures of one identity, and another identity."""
    counts = np.bincount(index.labels[index.labels >= 0])
    return bool((counts > 1).any() and (counts > 0).sum() > 1)


def _part(index: FaceIndex, split: str) -> FaceIndex:
    """Rows with an identity, of one part of the data set's own partition."""
    known = index.labels >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(index)} pictures in {index.root} has a name to learn; put each person's into a folder "
            "of their own (in shards: key.cls or key.json beside key.jpg), or name them with --data.labels, which "
            "facefast label writes"
        )
    if split != "all":
        known &= index.splits == SPLITS.index(split)
    if not known.any():
        raise ValueError(f"{index.root} has no identities in split {split!r}; use --phases.K.split all")
    return index.select(known).compact()
