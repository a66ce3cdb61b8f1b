"""From a folder of photographs to what each phase trains on and is asked: index, bad-file budget, splits, exams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facefast.data import FaceIndex, PairSet, read_index, synthetic
from facefast.data.index import FAULTS, SPLITS
from facefast.recipe import IndexFacts, Phase, Recipe
from facefast.runtime import DataError, Runtime, decode_threads

DRAWN_ROOT = Path("data/drawn-faces")


@dataclass(frozen=True)
class Exam:
    """What a model is asked: pictures of known identities to name, and pairs of pictures to verify."""

    test: FaceIndex | None
    """Labels are the model's classes."""
    verification: FaceIndex | None
    pairs: PairSet | None
    held_out: bool
    """Whether the verified identities were kept out of training."""


@dataclass(frozen=True)
class Stage:
    """One phase's data: labels of `train` and `exam.test` are the phase's classes."""

    train: FaceIndex
    exam: Exam

    def facts(self) -> IndexFacts:
        """What the plan needs."""
        return self.train.facts()


def prepare(recipe: Recipe, folder: Path, run: Runtime) -> tuple[Stage, ...]:
    """Reads, checks and divides the photographs; every rank gets the same.

    Rank 0 scans the files and leaves `index.npz` in the run folder for the others.

    Raises:
        DataError: more bad files than `data.max_bad_fraction` allows.
        ValueError: the folder's layout is not what the recipe says.
    """
    saved = folder / "index.npz"
    if run.is_main:
        index = read_photographs(recipe, decode_threads(recipe.threads, run.world))
        index.save(saved)
    run.barrier()
    index = FaceIndex.load(saved)
    return tuple(divide(index, recipe, phase) for phase in recipe.phases)


def read_photographs(recipe: Recipe, threads: int) -> FaceIndex:
    """The sound rows of the recipe's photographs, scanned."""
    root = recipe.data.root
    if not root:
        root = str(synthetic.write(DRAWN_ROOT, synthetic.DrawnSpec()))
    index = read_index(root, recipe.data.format).scanned(threads=threads, max_pixels=recipe.data.max_pixels)
    check_budget(index, recipe.data.max_bad_fraction)
    return index.sound()


def check_budget(index: FaceIndex, max_bad_fraction: float) -> None:
    """Stops a run whose photographs are worse than it was told to accept.

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


def divide(index: FaceIndex, recipe: Recipe, phase: Phase) -> Stage:
    """Splits a scanned index as one phase wants it.

    Raises:
        ValueError: a split without identities, or identities both trained on and kept for verification.
    """
    people = _part(index, phase.split)
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
    return Stage(
        train=train,
        exam=Exam(
            test=test if len(test) else None,
            verification=verification,
            pairs=PairSet.random(verification, recipe.eval.pairs, recipe.eval.folds, recipe.seed)
            if verification is not None
            else None,
            held_out=held_out,
        ),
    )


def _can_be_paired(index: FaceIndex) -> bool:
    """Whether there are two pictures of one identity, and another identity."""
    counts = np.bincount(index.labels[index.labels >= 0])
    return bool((counts > 1).any() and (counts > 0).sum() > 1)


def _part(index: FaceIndex, split: str) -> FaceIndex:
    """Rows with an identity, of one part of the data set's own partition."""
    known = index.labels >= 0
    if split != "all":
        known &= index.splits == SPLITS.index(split)
    if not known.any():
        raise ValueError(f"{index.root} has no identities in split {split!r}; use --phases.K.split all")
    return index.select(known).compact()
