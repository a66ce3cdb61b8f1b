"""Photographs to what a gallery takes: whose they are, their embeddings, and what speaks against some of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facefast.data import FaceIndex, read_index
from facefast.data.divide import divide
from facefast.data.index import FAULTS, NO_FACE, advice
from facefast.data.prepare import Locate, photographs_of
from facefast.deploy.gallery import Offer
from facefast.evaluation.embed import embed_rows
from facefast.evaluation.thresholds import Thresholds
from facefast.faces.align import Locator, locator
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import Reading, Recipe, from_json
from facefast.runtime.process import Runtime, decode_threads

LEAST_SIDE = 40
"""Pixels of a picture's shorter side; what is smaller shows too little of a face to know it again by."""
BATCH_SIZE = 64

Quality = Callable[[FaceIndex], Sequence[str]]
"""What speaks against each row's picture, in words; empty for good ones."""


class Embedder(NamedTuple):
    """A model ready for photographs."""

    model: FaceModel
    precision: Precision
    run: Runtime
    faces: Locator

    @classmethod
    def load(cls, path: Path, run: Runtime, detect: str = "auto") -> Embedder:
        """From a run, a checkpoint, a package or source weights.

        Args:
            path: it.
            run: the process.
            detect: what finds faces, as `facefast.faces.align` says.

        Raises:
            ValueError: there is no model there.
            StorageError: a file of it is damaged.
        """
        model = checkpoint.load_model(path, run.device)
        return cls(model, checkpoint.precision_of(path, model), run, locator(model.image, model.faces, detect, run))

    @property
    def thresholds(self) -> Thresholds:
        """Those that the model was given, none where it has none."""
        return Thresholds.from_json(self.model.thresholds or {})

    def embed(self, index: FaceIndex) -> tuple[Tensor, list[str]]:
        """[N, D] of any length, of the largest face in the middle of each picture, and [N] why there is none: it
        could not be read, or shows no face."""
        faults = [FAULTS[fault] + advice(FAULTS[fault]) if fault else "" for fault in index.faults.tolist()]
        sound = np.flatnonzero(index.faults == 0)
        embeddings = torch.zeros(len(index), self.model.embedding_size)
        if len(sound):
            reading = Reading(decode_threads(0, self.run.world), max_bad_fraction=1.0)  # each fault is an answer
            part = self.faces(index.select(sound), reading, faceless=True)
            if part.landmarks is not None:
                for place in np.flatnonzero(~np.isfinite(part.landmarks).all((1, 2))).tolist():
                    faults[sound[place]] = FAULTS[NO_FACE]
            found, seen = embed_rows(self.model, part, self.run, self.precision, reading, batch_size=BATCH_SIZE)
            embeddings[torch.from_numpy(sound)] = found
            for place in torch.nonzero(~seen).flatten().tolist():
                faults[sound[place]] = "it could not be decoded"
        return embeddings, faults


def people_of(root: str | os.PathLike[str]) -> FaceIndex:
    """A scanned index of people: a folder each, or any layout that `read_index` knows; pictures without a name are left
    out.

    Raises:
        ValueError: there are none, or their layout is not known.
    """
    index = read_index(root)
    named = index.select(index.labels >= 0)
    if not len(named):
        raise ValueError(f"no picture in {os.fspath(root)} has a name; give NAME DIR, or a folder per person")
    return named.scanned()


def people_of_run(path: Path, locate: Locate, threads: int = 0) -> FaceIndex:
    """The pictures that a model was trained on, as its recipe divides them; what was kept for testing is not enrolled.

    Args:
        path: the model.
        locate: finds faces as in training: rows without one had no part in the division.
        threads: that read.

    Raises:
        ValueError: the model has no recipe or no people, or its photographs are not where they were.
        DataError: more of them are bad than the recipe allows.
    """
    saved = checkpoint.read_recipe(path)
    if saved is None:
        raise ValueError(f"{path} is no run: nothing tells its people; enroll folders instead")
    recipe = from_json(Recipe, saved)
    if not recipe.data.root or recipe.learns_attributes:
        what = "has attributes instead of people" if recipe.learns_attributes else "does not say where its pictures are"
        raise ValueError(f"{path} {what}; enroll folders instead")
    index = photographs_of(recipe, recipe.data.reading(threads), locate)
    train = divide(index, recipe, recipe.phases[-1]).train
    return train.select(train.labels >= 0)


def large_enough(index: FaceIndex) -> list[str]:
    """The least quality that a scan tells."""
    sides = np.minimum(index.widths, index.heights).tolist()
    return [
        f"its shorter side has {side} pixels, {LEAST_SIDE} are needed" if 0 < side < LEAST_SIDE else ""
        for side in sides
    ]


def offer_of(index: FaceIndex, embedder: Embedder, name: str | None = None, quality: Quality = large_enough) -> Offer:
    """The pictures of an index as they are offered to a gallery.

    Args:
        index: scanned; with labels where `name` is None.
        embedder: the model.
        name: whose all of them are.
        quality: what speaks against pictures that can be read.
    """
    embeddings, faults = embedder.embed(index)
    against = quality(index)
    names = [name if name is not None else index.class_names[label] for label in index.labels.tolist()]
    return Offer(names, embeddings, index.hashes, tuple(a or b for a, b in zip(faults, against, strict=True)))
