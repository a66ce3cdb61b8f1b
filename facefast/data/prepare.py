"""From a folder of photographs to what each phase trains and is measured on: index, bad-file budget, splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex, PairSet, read_index
from facefast.data.corrections import apply_corrections, read_labels
from facefast.data.drawn import synthetic
from facefast.data.index import FAULTS, NO_FACE, SPLITS
from facefast.data.loader import FEWEST_BAD
from facefast.data.subsets import joined, with_attributes, with_hidden_labels, with_shots
from facefast.recipe import AttributeSpec, DataConfig, IndexFacts, Phase, Photographs, Reading, Recipe
from facefast.runtime import files
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime, decode_threads

DRAWN_ROOT = Path("data/drawn-faces")
YES = "match"
"""The attribute that binary recognition learns."""
MOST_LEVELS = 200
"""Of an ordinal attribute."""
LEAST_TO_DIVIDE = 5
"""Training pictures of a person from which one can be spared to choose by."""
LEAST_TO_CHOOSE = 30
"""Pictures that tell one checkpoint from another; fewer are better trained on."""


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


def prepare(
    recipe: Recipe, folder: Path, run: Runtime, begun: Path | None = None, locate: Locate | None = None
) -> tuple[PhaseData, ...]:
    """Reads, checks and divides the photographs; every rank gets the same.

    Rank 0 scans the files, looks for faces where `locate` finds that necessary, and leaves `index.npz` in the run
    folder for the others.

    Args:
        begun: the index that a run began with which goes on: where the pictures are still those it stays, and those
            that changed count as unreadable, as they do while a run goes.

    Raises:
        DataError: more bad files than `data.max_bad_fraction` allows.
        ValueError: the folder's layout is not what the recipe says, or a phase has nothing to be measured on.
        StorageError: the index cannot be written.
    """
    saved = folder / "index.npz"
    if run.is_main:
        reading = recipe.data.reading(decode_threads(recipe.threads, run.world))
        index = as_it_began(begun, recipe, reading, locate) if begun is not None else None
        if index is None:
            index = photographs_of(recipe, reading, locate)
        index.save(saved)
        run.broadcast(True)
    else:
        # To look for faces may take longer than a collective operation waits: rank 0 says None while it is busy.
        while run.broadcast(None) is None:
            pass
    # Where the run folder is not shared by the machines, it holds an old index on another one, or none.
    run.require_same({"index.npz": files.sha256(saved) if saved.exists() else "missing"}, DataError)
    # Rank 0 too reads what it wrote: no rank can work on an index that differs from the others'.
    index = FaceIndex.load(saved)
    datasets = tuple(divide(index, recipe, phase) for phase in recipe.phases)
    for phase, data in zip(recipe.phases, datasets, strict=True):
        _require_evaluation(data, phase, recipe.data)
    return datasets


def as_it_began(begun: Path, recipe: Recipe, reading: Reading, locate: Locate | None = None) -> FaceIndex | None:
    """The index that a run began with, if the photographs are still its pictures under the same names; else None.

    A picture that changed, can no longer be read or is gone keeps its row: to the reader it is then unreadable, so the
    run goes on to the bits to which it would have come without a stop. What it prints names those pictures. A picture
    more, or another name, landmark or attribute, is another set of photographs.

    Args:
        begun: the file in which the run left the index.

    Raises:
        DataError: more of them changed than the loader of a run would bear.
        ValueError: the folder's layout is not what the recipe says.
    """
    try:
        before = FaceIndex.load(begun)
    except ValueError:
        return None
    # Those that turned bad are counted below, among the run's own pictures.
    now = photographs_of(recipe, dataclasses.replace(reading, max_bad_fraction=1.0), locate)
    rows = _places(before, now)
    if before.root != now.root or -1 in rows or not _same_facts(before.select(rows), now):
        return None
    same = np.zeros(len(before), bool)
    same[rows] = (before.hashes[rows] == now.hashes).all(axis=1)
    changed = np.flatnonzero(~same).tolist()
    if not changed:
        return before
    named = ", ".join(before.name(row) for row in changed[:3]) + (", ..." if len(changed) > 3 else "")
    told = f"{len(changed)} of {len(before)} pictures changed or went since the run began ({named})"
    limit = reading.max_bad_fraction
    if len(changed) > limit * len(before) and (limit == 0 or len(changed) >= min(FEWEST_BAD, len(before))):
        raise DataError(
            f"{told}, above data.max_bad_fraction {limit}; bring them back as they were, or start anew with "
            "another --out"
        )
    print(f"note: {told}: they count as unreadable", flush=True)
    return before


def _places(before: FaceIndex, now: FaceIndex) -> list[int]:
    """The row of `before` that each row of `now` was, -1 where it is new."""
    if all(np.array_equal(getattr(before, name), getattr(now, name)) for name in ("paths", "offsets", "lengths")):
        return list(range(len(before)))  # nearly always: millions of pictures need no dictionary

    def keys(index: FaceIndex) -> Iterator[tuple[bytes, int, int]]:
        return zip(index.paths.tolist(), index.offsets.tolist(), index.lengths.tolist(), strict=True)

    place = {key: row for row, key in enumerate(keys(before))}
    return [place.get(key, -1) for key in keys(now)]


def _same_facts(one: FaceIndex, other: FaceIndex) -> bool:
    """Whether the rows have the same names, partition, landmarks and attributes."""

    def names(index: FaceIndex) -> list[str]:
        return [index.class_names[label] if label >= 0 else "" for label in index.labels.tolist()]

    def equal(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
        return a is b is None or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True))

    return (
        names(one) == names(other)
        and one.attribute_names == other.attribute_names
        and equal(one.splits, other.splits)
        and equal(one.landmarks, other.landmarks)
        and equal(one.attributes, other.attributes)
    )


def _require_evaluation(data: PhaseData, phase: Phase, config: DataConfig) -> None:
    if not data.evaluation.is_empty:
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
        f"  `python -m facefast.index {index.root}` lists them all"
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
        validation=_evaluation_set(validation, choosing, choosing_held_out, recipe),
        evaluation=_evaluation_set(test, verification, held_out, recipe),
        attributes=specs,
    )


def _evaluation_set(test: FaceIndex, verified: FaceIndex | None, held_out: bool, recipe: Recipe) -> EvaluationSet:
    pairs = None if verified is None else PairSet.random(verified, recipe.eval.pairs, recipe.eval.folds, recipe.seed)
    return EvaluationSet(test=test if len(test) else None, verification=verified, pairs=pairs, held_out=held_out)


def _to_choose_by(train: FaceIndex, recipe: Recipe) -> tuple[FaceIndex, FaceIndex]:
    """(train, validation): pictures taken out of training, none where people have too few to spare.

    Of pictures without a name, a part is taken where there are attributes to learn.
    """
    fraction, generator = recipe.data.validation_fraction, np.random.Generator(np.random.Philox(recipe.seed + 1))
    named = train.labels >= 0
    counts = np.bincount(train.labels[named], minlength=train.num_classes)[train.labels]
    # Another order than that of the test part, whose neighbours are no random pictures.
    wanted = np.where(counts >= LEAST_TO_DIVIDE, np.maximum(np.rint(counts * fraction), fraction > 0), 0)
    chosen = named & (train.random_places(recipe.seed + 1) < wanted)
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
    parts = []
    for pictures, answer in ((yes, 1), (no, 0)):
        rest, test = _yes_or_no(pictures, data.test_fraction, recipe.seed, strangers=not answer)
        train, validation = _yes_or_no(rest, data.validation_fraction, recipe.seed + 1, strangers=not answer)
        for part, split in ((train, "train"), (validation, "val"), (test, "test")):
            parts.append(
                dataclasses.replace(
                    part,
                    labels=np.full(len(part), -1, np.int32),
                    class_names=(),
                    splits=np.full(len(part), SPLITS.index(split), np.uint8),
                    attributes=np.full((len(part), 1), answer, np.float32),
                    attribute_names=(YES,),
                )
            )
    return joined(parts[0], parts[1:])


def _yes_or_no(index: FaceIndex, fraction: float, seed: int, *, strangers: bool) -> tuple[FaceIndex, FaceIndex]:
    """Two parts by pictures, or by people where they are strangers: the model meets our person again, and strangers
    for the first time."""
    people = len(np.unique(index.labels[index.labels >= 0]))
    if strangers and people > 1:
        return index.split_identities(fraction, seed)
    if not strangers and people:
        return index.split_per_identity(fraction, seed)
    return _at_random(index, fraction, seed)


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
