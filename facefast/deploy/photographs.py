"""Photographs to answers: which faces are on them, who they are, or that nobody knows; for `facefast predict` and for
`facefast.load` alike."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from facefast.data import FaceIndex
from facefast.data.index import FAULTS, NO_FACE
from facefast.data.walk import loose_photographs
from facefast.deploy.gallery import Gallery, fingerprint
from facefast.evaluation.embed import embed_rows
from facefast.evaluation.naming import DEFAULT_FPIR, asked_rate, name_faces, score_needed, strictest
from facefast.evaluation.thresholds import Thresholds
from facefast.faces.align import Locator, locator
from facefast.models import FaceModel, Prediction, checkpoint
from facefast.models.heads import unit
from facefast.models.precision import Precision
from facefast.recipe import Reading
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime, World, decode_threads
from facefast.runtime.terminal import complain

UNKNOWN = "unknown"
UNDECODED = "it could not be decoded"
BLOCK = 256
"""Faces named at a time."""
BATCH_SIZE = 64
"""Faces embedded at a time."""

Photograph = str | os.PathLike[str] | NDArray[np.uint8]
"""A file, a folder of them, or a decoded picture [H, W, 3] of RGB bytes."""


@dataclass(frozen=True)
class Naming:
    """How faces are named."""

    top: int = 1
    least: float = -math.inf
    """The score below which a face is somebody unknown."""
    gallery: Gallery | None = None
    """Enrolled people; those the model was trained on without it."""

    @classmethod
    def of(
        cls, model: FaceModel, name: str, top: int = 1, threshold: str = "auto", gallery: Path | None = None
    ) -> Naming:
        """As asked for; says so where a model knows no threshold.

        Args:
            model: it.
            name: the model's, for messages.
            top: names for each face.
            threshold: as `facefast predict --threshold`.
            gallery: a gallery's file.

        Raises:
            ValueError: a threshold that there is none for, or a gallery of another model.
        """
        known = Thresholds.from_json(model.thresholds or {})
        opened = None if gallery is None else Gallery(gallery, fingerprint(model))
        asked_rate(threshold)
        if opened is None and (not model.num_classes or (model.thresholds is None and threshold == "auto")):
            if model.num_classes:
                complain(f"note: {name} knows no threshold: everybody gets a name; give --threshold SCORE")
            return cls(top)
        find = known.name if opened is None else opened.naming
        try:
            if threshold != "auto":
                return cls(top, score_needed(threshold, find), opened)
            found = strictest(find)
        except ValueError as error:
            if opened is None and threshold == "auto":
                complain(f"note: {error}: everybody gets a name; give --threshold SCORE")
                return cls(top)
            raise ValueError(f"{error}; give --threshold another rate, a score or none, which names all") from error
        if found.rate != DEFAULT_FPIR:
            complain(
                f"note: too few people or pictures for a threshold at FPIR {DEFAULT_FPIR:g}; that of "
                f"{found.rate:g} is taken"
            )
        return cls(top, found.require(), opened)


@dataclass(frozen=True)
class Found:
    """The faces on N photographs."""

    part: FaceIndex
    """A row for each face; the one that a picture is of comes before its others."""
    owners: NDArray[np.int64]
    """[M] the photograph that each belongs to, never falling."""
    embeddings: Tensor
    """[M, D] of any length."""
    seen: Tensor
    """[M] whether it could be read."""
    faults: dict[int, str]
    """What kept photographs without a face from having one."""


def answering(run: Runtime) -> Reading:
    """How photographs are read that each get an answer: no number of bad ones is too many."""
    return Reading(decode_threads(0, run.world), max_bad_fraction=1.0)


def find_and_embed(
    model: FaceModel, index: FaceIndex, run: Runtime, precision: Precision, faces: Locator, mirror: bool = True
) -> Found:
    """Every face on the photographs of a scanned index, embedded.

    Args:
        faces: finds them.
        mirror: as for `FaceModel.embed`.
    """
    faults = {int(row): FAULTS[index.faults[row]] for row in np.flatnonzero(index.faults)}
    sound = np.flatnonzero(index.faults == 0)
    nobody = np.zeros(0, np.int64)
    nothing = Found(index.select(nobody), nobody, torch.zeros(0, 0), torch.zeros(0, dtype=torch.bool), faults)
    if not len(sound):
        return nothing
    reading = answering(run)
    part, owners = faces.every_face(index.select(sound), reading)
    readable = faces.readable if len(faces.readable) else np.ones(len(sound), bool)
    for row in np.setdiff1d(np.arange(len(sound)), owners).tolist():
        faults[int(sound[row])] = FAULTS[NO_FACE] if readable[row] else UNDECODED
    if not len(part):
        return nothing
    embeddings, seen = embed_rows(
        model, part, run, precision, reading, batch_size=BATCH_SIZE, mirror="mean" if mirror else "none"
    )
    found = Found(part, sound[owners], embeddings, seen, faults)
    for owner in np.setdiff1d(found.owners, found.owners[seen.numpy()]).tolist():
        faults[owner] = UNDECODED
    return found


def answer(
    model: FaceModel,
    index: FaceIndex,
    run: Runtime,
    precision: Precision,
    naming: Naming | None = None,
    faces: Locator | str = "none",
) -> Iterator[dict[str, Any]]:
    """One answer a picture: path and `faces`, or the `fault` that kept it from being read.

    A face has its embedding, names with probabilities, attributes, and its box where it had to be looked for. Those of
    the face that the picture is of also stand in the answer itself.

    Args:
        index: a row a picture, scanned.
        faces: finds them, or what does, as `facefast.faces.align` says.
    """
    if isinstance(faces, str):
        faces = locator(model.image, model.faces, faces, run)
    found = find_and_embed(model, index, run, precision, faces)
    answers: dict[int, list[dict[str, Any]]] = {}
    said = _faces(model, found.embeddings[found.seen], run, naming or Naming())
    for place, owner in enumerate(found.owners.tolist()):
        if not found.seen[place]:
            continue
        face = next(said)
        if found.part.boxes is not None:
            face["box"] = [round(float(value), 1) for value in found.part.boxes[place]]
        answers.setdefault(owner, []).append(face)
    for row in range(len(index)):
        if row in answers:
            yield {"path": index.path(row), **answers[row][0], "faces": answers[row]}
        else:
            yield {"path": index.path(row), "fault": found.faults[row]}


def _faces(model: FaceModel, embeddings: Tensor, run: Runtime, naming: Naming) -> Iterator[dict[str, Any]]:
    """What the model says of each face, by embeddings [N, D]."""
    for block in embeddings.split(BLOCK):  # a gallery is gone through once for many; no N x C memory
        with torch.inference_mode():
            attributes = model.predict_attributes(block.to(run.device))
            answers = _names(model, block, run, naming)
        for place, direction in enumerate(nn.functional.normalize(block, dim=1).numpy()):
            face: dict[str, Any] = {"embedding": direction}
            if attributes:
                face["attributes"] = {name: round(float(values[place]), 6) for name, values in attributes.items()}
            yield face | (answers[place] if answers else {})


def _names(model: FaceModel, embeddings: Tensor, run: Runtime, naming: Naming) -> list[dict[str, Any]]:
    """Names with probabilities or scores for each of [N, D] embeddings; none where nobody is known."""
    answers: list[dict[str, Any]] = []
    if naming.gallery is not None:
        found = naming.gallery.search(embeddings, naming.top)
        for people, scores in zip(found.people.tolist(), found.scores.tolist(), strict=True):
            listed = [round(score, 6) for score in scores]
            names = [naming.gallery.names[k] for k in people]
            answers.append({"names": names, "scores": listed, "score": listed[0] if listed else -1.0})
    elif model.head is not None:
        logits = model.classify(embeddings.to(run.device)).float().cpu() * model.scale
        known = model.class_names or tuple(map(str, range(model.num_classes)))
        for named in name_faces(model.head.weight.float().cpu(), logits, embeddings, known, naming.top):
            probabilities = [round(p, 6) for p in named.probabilities]
            answers.append({"names": list(named.names), "probabilities": probabilities, "score": round(named.score, 6)})
    for face in answers:
        if face["score"] < naming.least:
            face["nearest"] = face["names"][:1]
            face |= {"names": [UNKNOWN]} | {key: [None] for key in ("probabilities", "scores") if key in face}
    return answers


class PhotographModel(FaceModel):
    """A model that takes photographs as well as tensors: what `facefast.load` gives.

    Args:
        model: whose modules and parameters these are.
        path: MODEL as it was given.
        detect: what finds faces, as `--detect` of every command: auto, mtcnn, a file of YuNet, or none.
    """

    def __init__(self, model: FaceModel, path: Path, detect: str = "auto") -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)  # the same parts under another class, not copies of them
        self.path, self.detect = path, detect

    def embed(self, images: Tensor | Photograph | Sequence[Photograph], mirror: bool = True) -> Tensor:
        """Embeddings of length 1, whose dot products are cosine similarities.

        Args:
            images: files, folders of them, or arrays [H, W, 3] of RGB bytes: faces are found and aligned as `facefast
                predict` does it, and each photograph gets a row, of the largest face near its middle. Or a tensor of
                aligned pictures [B, 3, H, W], uint8 RGB or normalised, as `FaceModel.embed` takes it.
            mirror: adds the embedding of the mirror image before the length becomes 1.

        Returns:
            [B, D] float32; of photographs on the CPU, in the order given, folders in that of their files.

        Raises:
            DataError: a photograph cannot be read or shows no face; `predict` answers for each of them.
            ValueError: a path that is not there, pictures of another kind, or a model in training mode.
        """
        if isinstance(images, Tensor):
            return super().embed(images, mirror)
        with self._looked_at(images) as (index, names, run, precision, faces):
            found = find_and_embed(self, index, run, precision, faces, mirror)
            if found.faults:
                row, why = min(found.faults.items())
                raise DataError(
                    f"{len(found.faults)} of {len(index)} photographs give no embedding (first: {names[row]}: {why}); "
                    "leave them out, or let predict say what is on each"
                )
            rows = np.flatnonzero(found.seen.numpy())
            return unit(found.embeddings[rows[np.unique(found.owners[rows], return_index=True)[1]]])

    @overload
    def predict(self, images: Tensor) -> Prediction: ...

    @overload
    def predict(
        self,
        images: Photograph | Sequence[Photograph],
        *,
        top: int = 1,
        threshold: str | float = "auto",
        gallery: str | os.PathLike[str] | None = None,
    ) -> list[dict[str, Any]]: ...

    def predict(
        self,
        images: Tensor | Photograph | Sequence[Photograph],
        *,
        top: int = 1,
        threshold: str | float = "auto",
        gallery: str | os.PathLike[str] | None = None,
    ) -> Prediction | list[dict[str, Any]]:
        """Names the people on photographs, every face of them, or says that they are unknown: `facefast predict`.

        Args:
            images: as for `embed`.
            top: names for each face; photographs only, as the rest.
            threshold: from which score on a face gets a name: auto, far@RATE, a score, or none.
            gallery: names those enrolled here instead of those the model was trained on.

        Returns:
            Of a tensor a `Prediction`. Of photographs a dict each: `path` ("array 0" for the first array), and either
            `faces`, the one that the picture is of first, or a `fault`, such as that no face was found. A face has
            `names` (["unknown"], with `nearest`, below the threshold), `probabilities` or `scores`, `score`,
            `embedding`, `attributes` where the model tells them, and its `box` where it had to be looked for. Those
            of the first face stand in the photograph's dict as well.

        Raises:
            ValueError: as `embed`, but for photographs without a face; a threshold or a gallery that does not fit.
        """
        if isinstance(images, Tensor):
            if (top, threshold, gallery) != (1, "auto", None):
                raise ValueError("top, threshold and gallery are for photographs; a tensor gives all probabilities")
            return super().predict(images)
        if top < 1:
            raise ValueError(f"top is {top}; it must be at least 1")
        naming = Naming.of(self, str(self.path), top, str(threshold), None if gallery is None else Path(gallery))
        if gallery is None and self.head is None and self.attribute_heads is None:
            raise ValueError(f"{self.path} knows no identities; give gallery, or use embed")
        with self._looked_at(images) as (index, names, run, precision, faces):
            answers = list(answer(self, index, run, precision, naming, faces))
        return [said | {"path": name} for said, name in zip(answers, names, strict=True)]

    @contextlib.contextmanager
    def _looked_at(
        self, images: Photograph | Sequence[Photograph]
    ) -> Iterator[tuple[FaceIndex, list[str], Runtime, Precision, Locator]]:
        """An index of the photographs, their names, and what reads them."""
        if self.training:
            raise ValueError("the model is in training mode, where BatchNorm mixes pictures; call eval() first")
        run = Runtime(World(), self.pixel_mean.device)
        faces = locator(self.image, self.faces, self.detect, run)
        faces.detector = self.__dict__.get("_detector")  # it takes a while to load
        with tempfile.TemporaryDirectory(prefix="facefast-") as folder:
            index, names = _index_of(images, Path(folder))
            yield index, names, run, checkpoint.precision_of(self.path, self), faces
        self.__dict__["_detector"] = faces.detector


def _index_of(images: Photograph | Sequence[Photograph], folder: Path) -> tuple[FaceIndex, list[str]]:
    """A scanned index of photographs, and what each is called; arrays go into `folder` without loss.

    Raises:
        ValueError: nothing was given, a path is not there, or an array is no picture.
    """
    given: list[Any] = [images] if isinstance(images, str | os.PathLike) or _is_picture(images) else list(images)
    if not given:
        raise ValueError("no photographs were given")
    called: dict[str, str] = {}
    paths: list[str | os.PathLike[str]] = []
    for number, one in enumerate(given):
        if isinstance(one, str | os.PathLike):
            paths.append(one)
            continue
        if not _is_picture(one) or one.dtype != np.uint8:
            what = f"{one.dtype} {list(one.shape)}" if isinstance(one, np.ndarray | Tensor) else type(one).__name__
            raise ValueError(f"photograph {number} is {what}; give a path, or an array [H, W, 3] of RGB bytes (uint8)")
        file = folder / f"{number}.png"
        Image.fromarray(one).save(file, compress_level=1)
        called[str(file)] = f"array {number}"
        paths.append(file)
    index = loose_photographs(paths)
    found = [index.path(row) for row in range(len(index))]
    return index, [called.get(path, path) for path in found]


def _is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu", detect: str = "auto") -> PhotographModel:
    """A model in evaluation mode, for photographs and for tensors.

    Args:
        path: a run folder, a checkpoint folder, a package (in float or int8), an ONNX file that facefast wrote, or a
            source model's weights file.
        device: where it computes; ONNX and int8 always do on the CPU.
        detect: what finds faces on photographs, as `--detect` of every command: auto, mtcnn, a file of YuNet, or none.

    Returns:
        A `FaceModel` whose `embed` and `predict` also take photographs.

    Raises:
        ValueError: there is no model there, or it is of an unknown kind or of a newer format.
        StorageError: a file of it is damaged.
    """
    path = Path(path)
    return PhotographModel(checkpoint.load_model(path, device), path, detect)
