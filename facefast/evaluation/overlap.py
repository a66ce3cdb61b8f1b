"""Whether what a model is measured on has a part in what it was trained on: people by their names, files by their
content, photographs saved again by their thumbnails."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from facefast.data import FaceIndex, oracle
from facefast.data.divide import divide
from facefast.data.subsets import which_are_in
from facefast.models import FaceModel, checkpoint
from facefast.recipe import Recipe, from_json

NEAR_CORRELATION = 0.985
"""Of the grey thumbnails of two pictures: one photograph saved again stays above it, two photographs of a person, both
aligned, below."""
SIDE = 32
"""Of those thumbnails, in pixels."""
MOST_PICTURES = 20_000
"""On both sides together that thumbnails are made of."""


@dataclass(frozen=True)
class Overlap:
    """What the measured pictures share with the training pictures."""

    trained: int
    """Training pictures compared with; 0 where the model does not tell them."""
    measured: int
    names: int | None
    """People of the same name; None where they are the model's own on purpose and were not compared."""
    files: int
    """Measured pictures whose file was trained on."""
    near: int | None
    """Measured pictures nearly the same as one that was trained on, those files included; None where nobody looked."""
    first: str = ""
    """An example."""
    why: str = ""
    """Something was not compared."""

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)

    def sentence(self) -> str:
        """In a line, for people."""
        people = "" if self.names is None else f"{self.names} people by name"
        if not self.trained:
            return f"shared with training: {people or 'not compared'}{self._example()}; {self.why}"
        near = f", {self.near} nearly the same" if self.near is not None else ""
        why = f"; not compared by thumbnails: {self.why}" if self.why else ""
        return (
            f"shared with the {self.trained} training pictures: {people + ', ' if people else ''}{self.files} of "
            f"{self.measured} files{near}{self._example()}{why}"
        )

    def _example(self) -> str:
        return f" (first: {self.first})" if self.first else ""


def training_rows(path: Path) -> FaceIndex | None:
    """The pictures that a run's model was trained on, by the index and the recipe that the run keeps; None for a model
    that is in no run.

    Raises:
        ValueError: the index does not fit the recipe.
    """
    saved = checkpoint.read_recipe(path)
    if saved is None:
        return None
    folder = checkpoint.find_model(path)
    kept = [place / "index.npz" for place in (folder, *folder.parents[:2]) if (place / "index.npz").is_file()]
    if not kept:
        return None
    index, recipe = FaceIndex.load(kept[0]), from_json(Recipe, saved)
    used = np.zeros(len(index), bool)
    for phase in recipe.phases:
        part = divide(index, recipe, phase).train
        used |= which_are_in(index, part)
    return index.select(used)


def overlap_of(
    path: Path,
    model: FaceModel,
    measured: Sequence[FaceIndex],
    held_out: bool,
    threads: int = 0,
    new: Sequence[FaceIndex] | None = None,
) -> Overlap:
    """What is shared.

    Args:
        path: MODEL as it was given.
        model: it.
        measured: the evaluation's pictures.
        held_out: whether its people should be new to the model; if not, their names are shared on purpose and not
            counted.
        new: those of `measured` whose people these are; by default all.
        threads: that thumbnails are made with; 0 is Python's own choice.
    """
    rows = sum(map(len, measured))
    names = {
        index.class_names[label]
        for index in (measured if new is None else new)
        for label in np.unique(index.labels).tolist()
        if label >= 0
    }
    done = ": names alone were compared" if held_out else ""
    try:
        trained, why = training_rows(path), f"the model keeps no list of its training pictures{done}"
    except ValueError as error:
        trained, why = None, f"its training pictures are not known ({error}){done}"
    known = set(model.class_names)
    if trained is None:
        shared = sorted(names & known) if held_out else []
        return Overlap(0, rows, len(shared) if held_out else None, 0, None, shared[0] if shared else "", why)
    known |= {trained.class_names[label] for label in np.unique(trained.labels).tolist() if label >= 0}
    shared = sorted(names & known) if held_out else []
    contents = {bytes(line) for line in trained.hashes if line.any()}
    files = [np.array([bytes(line) in contents for line in index.hashes], bool) for index in measured]
    near, why = _near(measured, trained, threads)
    examples = [*shared[:1]]
    for index, same in zip(measured, near if near is not None else files, strict=True):
        examples += [index.name(int(row)) for row in np.flatnonzero(same)[:1]]
    return Overlap(
        len(trained),
        rows,
        len(shared) if held_out else None,
        int(sum(same.sum() for same in files)),
        None if near is None else int(sum((a | b).sum() for a, b in zip(near, files, strict=True))),
        examples[0] if examples else "",
        why,
    )


def _near(
    measured: Sequence[FaceIndex], trained: FaceIndex, threads: int
) -> tuple[list[NDArray[np.bool_]] | None, str]:
    count = sum(map(len, measured)) + len(trained)
    if count > MOST_PICTURES:
        return None, f"{count} pictures are too many for thumbnails ({MOST_PICTURES})"
    if not Path(trained.root).is_dir() or not Path(trained.path(0)).exists():
        return None, f"the training pictures are no longer in {trained.root}"
    theirs = thumbnails(trained, threads)
    found = []
    for index in measured:
        ours = thumbnails(index, threads)
        same = [(ours[k : k + 1024] @ theirs.T).max(1) >= NEAR_CORRELATION for k in range(0, len(ours), 1024)]
        found.append(np.concatenate(same) if same else np.zeros(0, bool))
    return found, ""


def thumbnails(index: FaceIndex, threads: int = 0) -> NDArray[np.float32]:
    """[N, SIDE * SIDE] grey thumbnails of mean 0 and length 1, whose products are correlations, unchanged by brightness
    and contrast; 0 for what cannot be read."""

    def look(row: int) -> NDArray[np.float32]:
        try:
            with Image.open(io.BytesIO(oracle.read_bytes(index, row))) as picture:
                picture.draft("L", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded no larger than that
                small = ImageOps.exif_transpose(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged pictures
            return np.zeros(SIDE * SIDE, np.float32)
        values = np.asarray(small, np.float32).ravel()
        values -= values.mean()
        length = float(np.linalg.norm(values))
        return values / length if length > SIDE else np.zeros_like(values)  # a plain picture is like any other

    with ThreadPoolExecutor(threads or None) as pool:
        found = list(pool.map(look, range(len(index))))
    return np.array(found, np.float32).reshape(len(index), SIDE * SIDE)
