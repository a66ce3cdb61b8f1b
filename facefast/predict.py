"""Names the people in photographs, or embeds them: `python -m facefast.predict MODEL IMAGE|DIR...`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.index import FAULTS, NO_FACE, advice, printable
from facefast.data.walk import loose_photographs
from facefast.deploy.gallery import Gallery, fingerprint
from facefast.evaluation.embed import embed_rows
from facefast.evaluation.naming import DEFAULT_FPIR, asked_rate, name_faces, score_needed, strictest
from facefast.evaluation.thresholds import Thresholds
from facefast.faces.align import locator
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import Reading
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.terminal import complain, say

UNKNOWN = "unknown"
BLOCK = 256
"""Faces named at a time."""
OTHER = "choose another --embeddings, or make room"


@dataclass(frozen=True)
class PredictArguments:
    """`python -m facefast.predict`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or a source model's weights file."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Photographs, or folders of them."""
    detect: str = "auto"
    """Where faces are: auto finds out whether the pictures are aligned as the model wants them, and looks for every
    face where they are not; mtcnn, or the .onnx file of YuNet, looks through all pictures; none takes their middle."""
    embeddings: Path | None = None
    """Write paths, boxes and embeddings of length 1, a row for each face, to this .npz."""
    top: int = 1
    """Names given per face."""
    gallery: Path | None = None
    """Name people by those enrolled here (`facefast gallery enroll`) instead of those the model was trained on."""
    threshold: str = "auto"
    """From which score on a face gets a name instead of unknown: far@1e-2 names 1 % of strangers; auto takes the upper
    end of that threshold's interval; a number is a score (a cosine); none names everybody."""
    json: bool = False
    """Print one JSON object a picture."""

    def __post_init__(self) -> None:
        require(self, top=(1, MOST))


@dataclass(frozen=True)
class Naming:
    """How faces are named."""

    top: int = 1
    least: float = -math.inf
    """The score below which a face is somebody unknown."""
    gallery: Gallery | None = None
    """Enrolled people; those the model was trained on without it."""

    @classmethod
    def of(cls, given: PredictArguments, model: FaceModel) -> Naming:
        """As asked for; says so where a model knows no threshold.

        Raises:
            ValueError: a threshold that there is none for, or a gallery of another model.
        """
        gallery = None if given.gallery is None else Gallery(given.gallery, fingerprint(model))
        asked_rate(given.threshold)
        if gallery is None and (not model.num_classes or (model.thresholds is None and given.threshold == "auto")):
            if model.num_classes:
                complain(f"note: {given.model} knows no threshold: everybody gets a name; give --threshold SCORE")
            return cls(given.top)
        known = Thresholds.from_json(model.thresholds or {})
        find = known.name if gallery is None else gallery.naming
        try:
            if given.threshold != "auto":
                return cls(given.top, score_needed(given.threshold, find), gallery)
            threshold = strictest(find)
        except ValueError as error:
            if gallery is None and given.threshold == "auto":
                complain(f"note: {error}: everybody gets a name; give --threshold SCORE")
                return cls(given.top)
            raise ValueError(f"{error}; give --threshold another rate, a score or none, which names all") from error
        if threshold.rate != DEFAULT_FPIR:
            complain(
                f"note: too few people or pictures for a threshold at FPIR {DEFAULT_FPIR:g}; that of "
                f"{threshold.rate:g} is taken"
            )
        return cls(given.top, threshold.require(), gallery)


def predict(
    model: FaceModel,
    index: FaceIndex,
    run: process.Runtime,
    precision: Precision,
    naming: Naming | None = None,
    detect: str = "none",
) -> Iterator[dict[str, Any]]:
    """One answer a picture: path and `faces`, or the `fault` that kept it from being read.

    A face has its embedding, names with probabilities, attributes, and its box where it had to be looked for. Those of
    the face that the picture is of also stand in the answer itself.

    Args:
        index: a row a picture, scanned.
        detect: what finds faces, as `facefast.faces.align` says.
    """
    faults = {int(row): FAULTS[index.faults[row]] for row in np.flatnonzero(index.faults)}
    sound = np.flatnonzero(index.faults == 0)
    answers: dict[int, list[dict[str, Any]]] = {}
    if len(sound):
        reading = Reading(process.decode_threads(0, run.world), max_bad_fraction=1.0)  # each fault is an answer
        faces = locator(model.image, model.faces, detect, run)
        part, owners = faces.every_face(index.select(sound), reading)
        for row in np.setdiff1d(np.arange(len(sound)), owners).tolist():
            faults[int(sound[row])] = FAULTS[NO_FACE] if faces.readable[row] else "it could not be decoded"
        if len(part):
            embeddings, seen = embed_rows(model, part, run, precision, reading, batch_size=64)
            said = iter(_faces(model, embeddings[seen], run, naming or Naming()))
            for place, owner in enumerate(sound[owners].tolist()):
                if not seen[place]:
                    faults[owner] = "it could not be decoded"
                    continue
                face = next(said)
                if part.boxes is not None:
                    face["box"] = [round(float(value), 1) for value in part.boxes[place]]
                answers.setdefault(owner, []).append(face)
    for row in range(len(index)):
        if row in answers:
            yield {"path": index.path(row), **answers[row][0], "faces": answers[row]}
        else:
            yield {"path": index.path(row), "fault": faults[row]}


def _faces(model: FaceModel, embeddings: Tensor, run: process.Runtime, naming: Naming) -> Iterator[dict[str, Any]]:
    """What the model says of each face, by embeddings [N, D]."""
    for block in embeddings.split(BLOCK):  # a gallery is gone through once for many; no N x C memory
        with torch.inference_mode():
            attributes = model.predict_attributes(block.to(run.device))
            answers = _names(model, block, run, naming)
        for place, unit in enumerate(torch.nn.functional.normalize(block, dim=1).numpy()):
            face: dict[str, Any] = {"embedding": unit}
            if attributes:
                face["attributes"] = {name: round(float(values[place]), 6) for name, values in attributes.items()}
            yield face | (answers[place] if answers else {})


def _names(model: FaceModel, embeddings: Tensor, run: process.Runtime, naming: Naming) -> list[dict[str, Any]]:
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
        for answer in name_faces(model.head.weight.float().cpu(), logits, embeddings, known, naming.top):
            probabilities = [round(p, 6) for p in answer.probabilities]
            answers.append(
                {"names": list(answer.names), "probabilities": probabilities, "score": round(answer.score, 6)}
            )
    for face in answers:
        if face["score"] < naming.least:
            face["nearest"] = face["names"][:1]
            face |= {"names": [UNKNOWN]} | {key: [None] for key in ("probabilities", "scores") if key in face}
    return answers


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(PredictArguments, arguments, "predict")
        if given.embeddings is not None:
            files.require_writable(files.npz(given.embeddings), advice=OTHER, parents=False)
        with process.start() as run:
            model = checkpoint.load_model(given.model, run.device)
            knows = model.num_classes or model.attribute_heads is not None or given.gallery is not None
            if not knows and given.embeddings is None:
                raise ValueError(f"{given.model} knows no identities; give --gallery G, or --embeddings OUT.npz")
            precision = checkpoint.precision_of(given.model, model)
            naming = Naming.of(given, model)
            if not given.images:
                raise ValueError("predict needs photographs: facefast predict MODEL IMAGE|DIR...")
            index = loose_photographs(given.images)
            answers = list(predict(model, index, run, precision, naming, given.detect))
        embedded = [answer for answer in answers if "embedding" in answer]
        if given.embeddings is not None:
            write_embeddings(given.embeddings, embedded)
        for answer in answers:
            for holder in (answer, *answer.get("faces", ())):
                holder.pop("embedding", None)
            say(json.dumps(answer) if given.json else _lines(answer))
        if not embedded:
            raise exits.DataError(f"none of {len(answers)} pictures could be embedded")
    return outcome.code


def write_embeddings(path: Path, answers: list[dict[str, Any]]) -> None:
    """Paths [N], boxes [N, 4] (NaN where no face was looked for) and embeddings [N, D] of N faces to an .npz.

    Raises:
        StorageError: it cannot be written; a file that was there is as it was.
    """
    faces = [(answer["path"], face) for answer in answers for face in answer["faces"]]
    arrays: dict[str, Any] = {
        "paths": np.array([path for path, _ in faces]),
        "boxes": np.array([face.get("box", [np.nan] * 4) for _, face in faces], np.float32),
        "embeddings": np.array([face["embedding"] for _, face in faces], np.float32),
    }
    needed = sum(array.nbytes for array in arrays.values())
    with files.replacing(files.npz(path), needed, OTHER) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def _lines(answer: dict[str, Any]) -> str:
    """A line for each face of a picture; where there are several, each has its box."""
    path = printable(os.fsencode(answer["path"]))
    if "fault" in answer:
        return f"{path}  not read: {answer['fault']}{advice(answer['fault'])}"
    lines = []
    for face in answer["faces"]:
        said = [_said(face, place) for place in range(len(face.get("names", ())))]
        attributes = (f"{name} {value:.4g}" for name, value in face.get("attributes", {}).items())
        where = ["at {:.0f},{:.0f} {:.0f}x{:.0f}".format(*face["box"])] if len(answer["faces"]) > 1 else []
        lines.append("  ".join([path, *where, *said, *attributes]))
    return "\n".join(lines)


def _said(face: dict[str, Any], place: int) -> str:
    name = face["names"][place]
    if name == UNKNOWN and "nearest" in face:
        near = f", nearest {face['nearest'][0]}" if face["nearest"] else ""
        return f"{UNKNOWN} (score {face['score']:.3f}{near})"
    return (
        f"{name} {face['probabilities'][place]:.1%}"
        if "probabilities" in face
        else f"{name} {face['scores'][place]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
