"""From a folder of photographs to what each phase trains and is measured on: index, bad-file budget, splits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from facefast.data import FaceIndex, PairSet, read_index
from facefast.data.corrections import apply_corrections, read_labels
from facefast.data.drawn import synthetic
from facefast.data.index import FAULTS, NO_FACE, SPLITS
from facefast.data.subsets import joined, with_attributes, with_hidden_labels, with_shots
from facefast.recipe import AttributeSpec, DataConfig, IndexFacts, Phase, Photographs, Reading, Recipe
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime, decode_threads

DRAWN_ROOT = Path("data/drawn-faces")
YES = "match"
"""The attribute that binary recognition learns."""
MOST_LEVELS = 200
"""Of an ordinal attribute."""


class Locate(Protocol):
    """What finds out where faces are: `facefast.faces.align.Locator`."""

    def __call__(self, index: FaceIndex, reading: Reading, *, faceless: bool = False) -> FaceIndex:
        """The rows that show a face, and with `faceless` the others too, with landmarks where the model needs them."""


@dataclass(frozen=True)
class EvaluationSet:
    """What a model is measured on: pictures of known identities to name, with attributes, and pairs to verify."""

    test: FaceIndex | None
    """Labels are the model's classes."""
    verification: FaceIndex | None
    pairs: PairSet | None
    held_out: bool
    """Whether the verified identities were kept out of training."""


@dataclass(frozen=True)
class PhaseData:
    """One phase's data: labels of `train` and `evaluation.test` are the phase's classes."""

    train: FaceIndex
    evaluation: EvaluationSet
    attributes: tuple[AttributeSpec, ...] = ()
    """What is learnt beside identities: columns of `train.attributes`."""

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


def prepare(recipe: Recipe, folder: Path, run: Runtime, locate: Locate | None = None) -> tuple[PhaseData, ...]:
    """Reads, checks and divides the photographs; every rank gets the same.

    Rank 0 scans the files, looks for faces where `locate` finds that necessary, and leaves `index.npz` in the run
    folder for the others.

    Raises:
        DataError: more bad files than `data.max_bad_fraction` allows.
        ValueError: the folder's layout is not what the recipe says, or a phase has nothing to be measured on.
    """
    saved = folder / "index.npz"
    if run.is_main:
        index = photographs_of(recipe, recipe.data.reading(decode_threads(recipe.threads, run.world)), locate)
        index.save(saved)
        run.broadcast(True)
    else:
        # To look for faces may take longer than a collective operation waits: rank 0 says None while it is busy.
        while run.broadcast(None) is None:
            pass
    # Rank 0 too reads what it wrote: no rank can work on an index that differs from the others'.
    index = FaceIndex.load(saved)
    datasets = tuple(divide(index, recipe, phase) for phase in recipe.phases)
    for phase, data in zip(recipe.phases, datasets, strict=True):
        _require_evaluation(data, phase, recipe.data)
    return datasets


def _require_evaluation(data: PhaseData, phase: Phase, config: DataConfig) -> None:
    if data.evaluation.test is not None or data.evaluation.verification is not None:
        return
    most = int(np.bincount(data.train.labels[data.train.labels >= 0], minlength=1).max())
    advice = (
        "give people more photographs: one to learn from and one to test with at least"
        if most < 2
        else "raise data.test_fraction, or keep people for verification with data.verify_fraction"
    )
    raise ValueError(
        f"phase {phase.name}: no photograph is left to measure the model on: {len(data.train)} pictures of "
        f"{data.train.num_classes} identities, at most {most} of one, and data.test_fraction {config.test_fraction:g}; "
        f"{advice}"
    )


def photographs_of(recipe: Recipe, reading: Reading, locate: Locate | None = None) -> FaceIndex:
    """The photographs of a recipe as `read_photographs` reads them, or drawn faces where it names none; after them
    those of `data.more` and `binary.negatives`."""
    data = recipe.data
    if not data.root:
        data = dataclasses.replace(data, root=str(synthetic.write(DRAWN_ROOT, synthetic.DrawnSpec())))
    index = read_photographs(data, reading, locate)
    others = [_located(_scanned(folder, "auto", reading), reading, locate) for folder in data.more]
    if recipe.binary.active:
        index = _with_yes_and_no(index, recipe, reading, locate)
    return joined(index, others)


def read_photographs(data: Photographs, reading: Reading, locate: Locate | None = None) -> FaceIndex:
    """The sound rows of the photographs, scanned, with corrections and labels applied and, by `locate`, faces found.

    Raises:
        DataError: more bad files than `reading` allows.
        ValueError: the folder's layout is not what `data` says.
    """
    index = _scanned(data.root, data.format, reading)
    if data.corrections:
        index = apply_corrections(index, data.corrections)
    if data.labels:
        index = read_labels(index, data.labels)
    return _located(index, reading, locate)


def _located(index: FaceIndex, reading: Reading, locate: Locate | None, *, faceless: bool = False) -> FaceIndex:
    return index if locate is None else locate(index, reading, faceless=faceless)


def _scanned(root: str, format: str, reading: Reading) -> FaceIndex:
    read = read_index(root, format)
    index = read.scanned(threads=reading.threads, max_pixels=reading.max_pixels)
    check_budget(index, reading.max_bad_fraction)
    # What a saved index knows of faces is of the pictures that it saw.
    same = (index.hashes == read.hashes).all(1)
    if index.landmarks is not None and read.hashes.any() and not same.all():
        index = dataclasses.replace(
            index, landmarks=np.where(same[:, None, None], index.landmarks, np.nan).astype(np.float32)
        )
    faceless = (read.faults == NO_FACE) & same
    if faceless.all():
        raise DataError(f"{root} says of each of its {len(index)} pictures that no face was found in it")
    require_sound(index)
    return index.select((index.faults == 0) & ~faceless)


def check_budget(index: FaceIndex, max_bad_fraction: float) -> None:
    """Stops a run with more bad photographs than it accepts.

    Raises:
        DataError: with the count, the limit, and the first ten files and their faults.
    """
    bad = np.flatnonzero(index.faults)
    if len(bad) == 0 or len(bad) <= max_bad_fraction * len(index):
        return
    listed = "\n".join(f"  {index.path(row)}: {FAULTS[index.faults[row]]}" for row in bad[:10])
    raise DataError(
        f"{len(bad)} of {len(index)} files are bad, above data.max_bad_fraction {max_bad_fraction}:\n{listed}\n"
        f"`python -m facefast.index {index.root}` lists them all"
    )


def require_sound(index: FaceIndex) -> None:
    """Stops what cannot begin, whatever the budget: not one picture can be read.

    Raises:
        DataError: with the first of them and its fault.
    """
    if index.faults.all():
        raise DataError(
            f"none of the {len(index)} pictures in {index.root} can be used (first: {index.name(0)}, "
            f"{FAULTS[index.faults[0]]}); `python -m facefast.index {index.root}` lists them all"
        )


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
    if verification is None and _can_be_paired(test):
        verification, held_out = test, False
    train, test = _with_unlabelled(train, test, unlabelled, recipe, phase)
    return PhaseData(
        train=train,
        evaluation=EvaluationSet(
            test=test if len(test) else None,
            verification=verification,
            pairs=PairSet.random(verification, recipe.eval.pairs, recipe.eval.folds, recipe.seed)
            if verification is not None
            else None,
            held_out=held_out,
        ),
        attributes=specs,
    )


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
        unlabelled, asked = _at_random(unlabelled, recipe.data.test_fraction, recipe.seed)
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


def _at_random(index: FaceIndex, fraction: float, seed: int) -> tuple[FaceIndex, FaceIndex]:
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


def _with_yes_and_no(index: FaceIndex, recipe: Recipe, reading: Reading, locate: Locate | None) -> FaceIndex:
    """The index with the attribute `YES` and a split: strangers in the test part are people that training never sees.

    Raises:
        ValueError: a name that is not there, or one of the two kinds has no picture.
    """
    data, people = recipe.data, recipe.binary.people
    if people:
        unknown = sorted(set(people) - set(index.class_names))
        if unknown:
            raise ValueError(
                f"binary.people names {', '.join(unknown)}, who {'is' if len(unknown) == 1 else 'are'} not among the "
                f"{index.num_classes} identities of {index.root} ({', '.join(index.class_names[:5])}, ...)"
            )
        ours = np.isin(index.labels, [index.class_names.index(name) for name in people])
        yes, no = index.select(ours), index.select(~ours)
    else:
        # What is no face is a no as well.
        no = _located(_scanned(recipe.binary.negatives, "auto", reading), reading, locate, faceless=True)
        yes = index
    if not len(yes) or not len(no):
        raise ValueError(f"binary has {len(yes)} pictures to say yes to and {len(no)} to say no to; both are needed")
    # Yes is divided by pictures, no by people: the model meets our person again, and strangers for the first time.
    yes_train, yes_test = (
        yes.split_per_identity(data.test_fraction, recipe.seed)
        if (yes.labels >= 0).any()
        else _at_random(yes, data.test_fraction, recipe.seed)
    )
    named = len(np.unique(no.labels[no.labels >= 0])) > 1
    no_train, no_test = (
        no.split_identities(data.test_fraction, recipe.seed)
        if named
        else _at_random(no, data.test_fraction, recipe.seed)
    )
    parts = []
    for part, answer, split in ((yes_train, 1, 0), (yes_test, 1, 2), (no_train, 0, 0), (no_test, 0, 2)):
        parts.append(
            dataclasses.replace(
                part,
                labels=np.full(len(part), -1, np.int32),
                class_names=(),
                splits=np.full(len(part), split, np.uint8),
                attributes=np.full((len(part), 1), answer, np.float32),
                attribute_names=(YES,),
            )
        )
    return joined(parts[0], parts[1:])


def _divide_yes_and_no(index: FaceIndex) -> tuple[FaceIndex, EvaluationSet]:
    """Training rows and the evaluation of binary recognition, as `_with_yes_and_no` has divided them."""
    train, test = index.select(index.splits == 0), index.select(index.splits == 2)
    return train, EvaluationSet(test=test if len(test) else None, verification=None, pairs=None, held_out=False)


def _can_be_paired(index: FaceIndex) -> bool:
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
