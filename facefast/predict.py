"""Names the people in photographs, or embeds them: `python -m facefast.predict MODEL IMAGE|DIR...`."""

from __future__ import annotations

import json
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
from facefast.data.walk import DECODED, list_pictures, require_there
from facefast.evaluation.embed import embed_rows
from facefast.faces.align import locator
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import Reading
from facefast.recipe.options import parse
from facefast.runtime import exits, files, process
from facefast.runtime.terminal import say

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
    json: bool = False
    """Print one JSON object a picture."""


def find_images(given: tuple[Path, ...]) -> list[Path]:
    """The photographs that paths and folders name, folders in sorted order, by the rules of `data.walk`.

    Raises:
        ValueError: a path that is not there, or nothing to look at.
    """
    found: list[Path] = []
    for path in given:
        require_there(path)
        if os.path.isdir(path):
            found += [path / os.fsdecode(inside) for inside in list_pictures(path)]
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise ValueError(f"{path} is neither a photograph nor a folder")
    if not found:
        endings = ", ".join(sorted(map(os.fsdecode, DECODED)))
        raise ValueError(f"no photographs in {', '.join(map(str, given))}; they end in {endings}")
    return found


def index_of(paths: list[Path]) -> FaceIndex:
    """A scanned index of loose photographs."""
    # Loose photographs may lie anywhere: the file system's root is the one folder that holds all of them.
    names = [os.fsencode(os.path.abspath(path)).lstrip(b"/") for path in paths]
    return FaceIndex.build("/", names, np.full(len(names), -1), ()).scanned()


def predict(
    model: FaceModel, index: FaceIndex, run: process.Runtime, precision: Precision, top: int = 1, detect: str = "none"
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
            for place, owner in enumerate(sound[owners].tolist()):
                if not seen[place]:
                    faults[owner] = "it could not be decoded"
                    continue
                face = _face(model, embeddings[place : place + 1], run, top)
                if part.boxes is not None:
                    face["box"] = [round(float(value), 1) for value in part.boxes[place]]
                answers.setdefault(owner, []).append(face)
    for row in range(len(index)):
        if row in answers:
            yield {"path": index.path(row), **answers[row][0], "faces": answers[row]}
        else:
            yield {"path": index.path(row), "fault": faults[row]}


def _face(model: FaceModel, embedding: Tensor, run: process.Runtime, top: int) -> dict[str, Any]:
    """What the model says of one face, by its embedding [1, D]."""
    face: dict[str, Any] = {"embedding": torch.nn.functional.normalize(embedding[0], dim=0).numpy()}
    with torch.inference_mode():
        attributes = model.predict_attributes(embedding.to(run.device))
        if attributes:
            face["attributes"] = {name: round(float(value), 6) for name, value in attributes.items()}
        if model.num_classes:
            logits = model.classify(embedding.to(run.device)).float() * model.scale
            best = torch.softmax(logits[0].cpu(), 0).topk(min(top, model.num_classes))
            names = model.class_names or tuple(map(str, range(model.num_classes)))
            face["names"] = [names[k] for k in best.indices.tolist()]
            face["probabilities"] = [round(p, 6) for p in best.values.tolist()]
    return face


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(PredictArguments, arguments, "predict")
        if given.embeddings is not None:
            files.require_writable(_npz(given.embeddings), advice=OTHER, parents=False)
        with process.start() as run:
            model = checkpoint.load_model(given.model, run.device)
            if not model.num_classes and model.attribute_heads is None and given.embeddings is None:
                raise ValueError(f"{given.model} knows no identities; ask for --embeddings OUT.npz")
            if given.top < 1:
                raise ValueError(f"--top is {given.top}; it must be at least 1")
            precision = checkpoint.precision_of(given.model, model)
            index = index_of(find_images(given.images))
            answers = list(predict(model, index, run, precision, given.top, given.detect))
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
    with files.replacing(_npz(path), needed, OTHER) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def _npz(path: Path) -> Path:
    """As numpy names it."""
    return path if path.suffix == ".npz" or path.exists() and not path.is_file() else Path(f"{path}.npz")


def _lines(answer: dict[str, Any]) -> str:
    """A line for each face of a picture; where there are several, each has its box."""
    path = printable(os.fsencode(answer["path"]))
    if "fault" in answer:
        return f"{path}  not read: {answer['fault']}{advice(answer['fault'])}"
    lines = []
    for face in answer["faces"]:
        pairs = zip(face.get("names", []), face.get("probabilities", []), strict=True)
        attributes = (f"{name} {value:.4g}" for name, value in face.get("attributes", {}).items())
        where = ["at {:.0f},{:.0f} {:.0f}x{:.0f}".format(*face["box"])] if len(answer["faces"]) > 1 else []
        lines.append(
            "  ".join([path, *where, *(f"{name} {probability:.1%}" for name, probability in pairs), *attributes])
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
