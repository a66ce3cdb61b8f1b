"""Photographs to what a gallery takes: whose they are, their embeddings, and what speaks against some of them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex, make_loader, read_index
from facefast.data.divide import divide
from facefast.data.index import FAULTS, NO_FACE, advice
from facefast.data.prepare import Locate, photographs_of
from facefast.data.subsets import which_are_in
from facefast.deploy.gallery import Offer
from facefast.deploy.photographs import BATCH_SIZE, UNDECODED, answering
from facefast.evaluation.embed import embed_rows
from facefast.evaluation.thresholds import Thresholds
from facefast.faces.align import Locator, locator
from facefast.faces.landmarks import cache_file, find_landmarks
from facefast.faces.quality import SEEN_AT, Limits, face_sizes, laplacian_variances, poses
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import Reading, Recipe, from_json
from facefast.runtime.process import Runtime

_LUMA = (0.299, 0.587, 0.114)


class Faces(NamedTuple):
    """The faces of N pictures as a model saw them."""

    embeddings: Tensor
    """[N, D] of any length; 0 where there is a fault."""
    faults: list[str]
    """[N] why there is no embedding: the picture could not be read, or shows no face."""
    located: FaceIndex
    """Those that could be read, with landmarks where the model needed them."""
    rows: NDArray[np.int64]
    """The picture of each of them."""


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
        seen = self.look(index)
        return seen.embeddings, seen.faults

    def look(self, index: FaceIndex) -> Faces:
        """The embedding of the largest face in the middle of each picture, and where it was found."""
        faults = [FAULTS[fault] + advice(FAULTS[fault]) if fault else "" for fault in index.faults.tolist()]
        sound = np.flatnonzero(index.faults == 0)
        embeddings = torch.zeros(len(index), self.model.embedding_size)
        part = index.select(sound)
        if len(sound):
            part = self.faces(part, self._reading, faceless=True)
            how = self.faces.done[-1]
            if how.way == "not aligned" and how.detector:  # a sample showed no face: is there one beside it?
                part = dataclasses.replace(part, landmarks=self._landmarks(part))
            if part.landmarks is not None:
                for place in np.flatnonzero(~np.isfinite(part.landmarks).all((1, 2))).tolist():
                    faults[sound[place]] = FAULTS[NO_FACE]
            found, seen = embed_rows(self.model, part, self.run, self.precision, self._reading, batch_size=BATCH_SIZE)
            embeddings[torch.from_numpy(sound)] = found
            for place in torch.nonzero(~seen).flatten().tolist():
                faults[sound[place]] = UNDECODED
        return Faces(embeddings, faults, part, sound)

    @property
    def _reading(self) -> Reading:
        return answering(self.run)

    def objections(self, located: FaceIndex, limits: Limits) -> list[str]:
        """What speaks against faces that can be seen; a pose is not known where nobody looks for faces.

        Args:
            located: of `look`.
            limits: what a face must have.
        """
        sizes, angles = np.full(len(located), np.nan), np.full((len(located), 3), np.nan)
        if not len(located):
            return []
        landmarks = located.landmarks
        if landmarks is None:  # pictures that are aligned already were looked at by a sample
            landmarks = self._landmarks(located)
        if landmarks is not None:
            sizes, angles = face_sizes(landmarks), poses(landmarks)
        sides = np.minimum(located.widths, located.heights)
        return limits.objections(np.fmin(sizes, sides), self._sharpness(located), angles)

    def _landmarks(self, located: FaceIndex) -> NDArray[np.float32] | None:
        """[N, 5, 2] as the detector says that was asked for a sample; None where none was."""
        if self.faces.detector is None:
            return None
        cache = cache_file(located.root, self.faces.detector) if self.faces.keep else None
        return find_landmarks(located, np.arange(len(located)), self.faces.detector, self._reading, cache).landmarks

    def _sharpness(self, located: FaceIndex) -> NDArray[np.float64]:
        """[N] of each face as the model takes it, but at `SEEN_AT` pixels; NaN where it cannot be read."""
        height, width = self.model.image.shape
        image = dataclasses.replace(self.model.image, size=SEEN_AT, width=round(SEEN_AT * width / height))
        mean, std, luma = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std, _LUMA))
        if image.color == "bgr":
            luma = luma.flip(0)
        found = np.full(len(located), np.nan)
        batch_size = min(BATCH_SIZE, len(located))
        with make_loader(located, image, batch_size=batch_size, **dataclasses.asdict(self._reading)) as loader:
            for batch in loader:
                kept = batch.rows >= 0
                grey = ((batch.images[kept].float() * std + mean) * luma).sum(1)
                found[batch.rows[kept].numpy()] = laplacian_variances(grey.numpy())
        return found


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
    """The pictures that a model was trained on, as its recipe divides them; what was kept for testing is not enrolled,
    nor what came to the photographs since or left them.

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
    begun = checkpoint.find_begun(path)
    divided = index if begun is None else FaceIndex.load(begun)
    train = divide(divided, recipe, recipe.phases[-1]).train
    return train.select((train.labels >= 0) & which_are_in(train, index))


def offer_of(index: FaceIndex, embedder: Embedder, name: str | None = None, limits: Limits | None = None) -> Offer:
    """The pictures of an index as they are offered to a gallery.

    Args:
        index: scanned; with labels where `name` is None.
        embedder: the model.
        name: whose all of them are.
        limits: what their faces must have; None takes all that can be read.
    """
    seen = embedder.look(index)
    faults = list(seen.faults)
    if limits is not None:
        for row, why in zip(seen.rows.tolist(), embedder.objections(seen.located, limits), strict=True):
            faults[row] = faults[row] or why
    names = [name if name is not None else index.class_names[label] for label in index.labels.tolist()]
    return Offer(names, seen.embeddings, index.hashes, tuple(faults))
