"""From a folder of photographs to what each phase trains and is measured on: index, bad-file budget, splits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from facefast.data import FaceIndex, read_index
from facefast.data.budget import FEWEST_BAD
from facefast.data.corrections import apply_corrections, read_labels
from facefast.data.crew import Crew
from facefast.data.divide import YES, PhaseData, at_random, divide
from facefast.data.drawn import synthetic
from facefast.data.index import FAULTS, NO_FACE, SPLITS
from facefast.data.remote import mirror
from facefast.data.subsets import joined
from facefast.recipe import DataConfig, Phase, Photographs, Reading, Recipe, is_remote
from facefast.runtime import files
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime, decode_threads
from facefast.runtime.terminal import tell
from facefast.runtime.untrusted import open_regular, read_npz

DRAWN_ROOT = Path("data/drawn-faces")


class Locate(Protocol):
    """What finds out where faces are: `facefast.faces.align.Locator`."""

    def __call__(self, index: FaceIndex, reading: Reading, *, faceless: bool = False) -> FaceIndex:
        """The rows that show a face, and with `faceless` the others too, with landmarks where the model needs them."""


def prepare(
    recipe: Recipe, folder: Path, run: Runtime, begun: Path | None = None, locate: Locate | None = None
) -> tuple[PhaseData, ...]:
    """Reads, checks and divides the photographs; every rank gets the same.

    All ranks read and check the files, each its part. Rank 0 puts that together, looks for faces where `locate` finds
    that necessary, and leaves `index.npz` in the run folder for the others.

    Args:
        begun: the index that a run began with which goes on: where the pictures are still those it stays, and those
            that changed count as unreadable, as they do while a run goes.

    Raises:
        DataError: more bad files than `data.max_bad_fraction` allows.
        ValueError: the folder's layout is not what the recipe says, or a phase has nothing to be measured on.
        StorageError: the index cannot be written.
    """
    saved = folder / "index.npz"
    crew = Crew(run)
    if run.is_main:
        reading = recipe.data.reading(decode_threads(recipe.threads, run.world))
        faults: Counter[str] = Counter()
        index = as_it_began(begun, recipe, reading, locate, crew, faults) if begun is not None else None
        if index is None:
            faults.clear()
            index = photographs_of(recipe, reading, locate, crew, faults)
        index.save(saved, left_out=json.dumps(faults))
        crew.dismiss()
    else:
        crew.serve()
    # Where the run folder is not shared by the machines, it holds an old index on another one, or none.
    run.require_same({"index.npz": files.sha256(saved) if saved.exists() else "missing"}, DataError)
    # Rank 0 too reads what it wrote: no rank can work on an index that differs from the others'.
    index = FaceIndex.load(saved)
    datasets = tuple(divide(index, recipe, phase) for phase in recipe.phases)
    for phase, data in zip(recipe.phases, datasets, strict=True):
        _require_evaluation(data, phase, recipe.data)
    return datasets


def left_out(saved: Path) -> dict[str, int]:
    """How many pictures of each fault a run's photographs had, which its `index.npz` holds no more; empty where the
    file does not tell."""
    with contextlib.suppress(OSError, ValueError, KeyError), open_regular(saved) as file:
        found = json.loads(str(read_npz(file)["left_out"]))
        return {str(fault): int(count) for fault, count in found.items()}
    return {}


def as_it_began(
    begun: Path,
    recipe: Recipe,
    reading: Reading,
    locate: Locate | None = None,
    crew: Crew | None = None,
    faults: Counter[str] | None = None,
) -> FaceIndex | None:
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
    now = photographs_of(recipe, dataclasses.replace(reading, max_bad_fraction=1.0), locate, crew, faults)
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
    tell(f"note: {told}: they count as unreadable")
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

    def equal(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
        return a is b is None or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True))

    return (
        one.identities() == other.identities()
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


def photographs_of(
    recipe: Recipe,
    reading: Reading,
    locate: Locate | None = None,
    crew: Crew | None = None,
    faults: Counter[str] | None = None,
) -> FaceIndex:
    """The photographs of a recipe as `read_photographs` reads them, or drawn faces where it names none; after them
    those of `data.more` and `binary.negatives`. `faults` counts what the pictures left out have."""
    data = recipe.data
    if not data.root:
        data = dataclasses.replace(data, root=str(synthetic.write(DRAWN_ROOT, synthetic.DrawnSpec())))
    index = read_photographs(data, reading, locate, crew, faults)
    others = [
        _located(_scanned(_here(folder, data, crew), "auto", reading, crew, faults), reading, locate)
        for folder in data.more
    ]
    if recipe.binary.active:
        index = _with_yes_and_no(index, recipe, reading, locate, crew)
    return joined(index, others)


def read_photographs(
    data: Photographs,
    reading: Reading,
    locate: Locate | None = None,
    crew: Crew | None = None,
    faults: Counter[str] | None = None,
) -> FaceIndex:
    """The sound rows of the photographs, scanned, with corrections and labels applied and, by `locate`, faces found.

    Raises:
        DataError: more bad files than `reading` allows.
        ValueError: the folder's layout is not what `data` says.
    """
    index = _scanned(_here(data.root, data, crew), data.format, reading, crew, faults)
    if data.corrections:
        counts: Counter[str] = Counter()
        index = apply_corrections(index, data.corrections, counts)
        tell(f"corrections: {counts['dropped']} pictures dropped, {counts['renamed']} given to another identity")
        if faults is not None and counts["dropped"]:
            faults["dropped by data.corrections"] += counts["dropped"]
    if data.labels:
        index = read_labels(index, data.labels)
    return _located(index, reading, locate)


def _located(index: FaceIndex, reading: Reading, locate: Locate | None, *, faceless: bool = False) -> FaceIndex:
    return index if locate is None else locate(index, reading, faceless=faceless)


def _here(root: str, data: Photographs, crew: Crew | None) -> str:
    """Where on this machine the photographs of a root are."""
    return str(mirror(root, data.cache, data.cache_gib, crew)) if is_remote(root) else root


def _scanned(
    root: str, format: str, reading: Reading, crew: Crew | None = None, faults: Counter[str] | None = None
) -> FaceIndex:
    read = read_index(root, format, crew=crew)
    with tqdm(total=len(read), unit="pictures", desc="photographs", disable=None, leave=False) as bar:
        index = read.scanned(reading.threads, reading.max_pixels, lambda done: bar.update(done - bar.n), crew)
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
    if faults is not None:
        bad = np.where(faceless, NO_FACE, index.faults)
        faults.update({FAULTS[k]: int(n) for k, n in enumerate(np.bincount(bad)) if k and n})
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


def _with_yes_and_no(
    index: FaceIndex, recipe: Recipe, reading: Reading, locate: Locate | None, crew: Crew | None
) -> FaceIndex:
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
        no = _located(
            _scanned(_here(recipe.binary.negatives, data, crew), "auto", reading, crew), reading, locate, faceless=True
        )
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
    return at_random(index, fraction, seed)
